"""The processes around the daemon: vLLM engines and LMCache's server. Each ends, or is killed, with its test.

An engine runs in the engines' environment; the server runs in this one, where it finds `connectors.lmcache`.
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from tests import readme
from tests.engines.engine import Answer
from tests.node import wait_for

CHUNK_TOKENS: Final = 256

_ROOT: Final = Path(__file__).parents[2]
_ENGINES: Final = _ROOT / ".venv-engines"
_HOST: Final = "127.0.0.1"
# On two cores an engine is ready after 12 to 30 s, LMCache's server after 5 s.
_READY_WITHIN_S: Final = 150.0
_ANSWER_WITHIN_S: Final = 60.0
_END_WITHIN_S: Final = 30.0
_LMCACHE_ENVIRON: Final = {"LMCACHE_TRACK_USAGE": "false", "LMCACHE_DISABLE_BANNER": "1"}
_ENGINE_ENVIRON: Final = {
    **_LMCACHE_ENVIRON,
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    # In one process vLLM 0.32 for the CPU does not start with LMCache: it stumbles over a module of ctypes.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


class Program:
    """A process in a group of its own, so that its children end with it. What it prints goes to `log`."""

    def __init__(
        self, command: Sequence[str], log: Path, environ: dict[str, str], *, pipe: int | None = None
    ) -> None:
        """Start it in the folder of its log; `pipe` is for stdin and stdout, if those are for us."""
        self._log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                stdin=pipe or subprocess.DEVNULL,
                stdout=pipe or output,
                stderr=output,
                cwd=log.parent,
                env={**os.environ, **environ},
                start_new_session=True,
            )

    def end(self) -> None:
        """Ask it to end."""
        self.process.terminate()

    def stop(self) -> None:
        """End it, if need be with SIGKILL; no process of it is left when this returns."""
        try:
            self.end()
            self.process.wait(_END_WITHIN_S)
            # Children that are killed leave their shared memory behind.
            wait_for(lambda: not self._has_children(), _END_WITHIN_S)
        except (AssertionError, subprocess.TimeoutExpired):
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def _has_children(self) -> bool:
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def why(self, what: str) -> str:
        """A message for a failure: what failed, and the end of the log."""
        return f"{what}; the end of {self._log.name}:\n{self._log.read_text(errors='replace')[-6000:]}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class Engine(Program):
    """A vLLM process with the model that lies at `folder / model`. It starts in the background."""

    def __init__(self, name: str, folder: Path, model: str, lmcache: "CacheServer | None" = None) -> None:
        python = _ENGINES / "bin" / "python"
        assert python.exists(), f"no {_ENGINES.name} here; run these tests with `make test-engines`"
        command = [str(python), str(Path(__file__).with_name("engine.py")), model]
        if lmcache is not None:
            command.append(json.dumps(lmcache.transfer))
        environ = {**_ENGINE_ENVIRON, "VLLM_RPC_BASE_PATH": str(folder)}  # of sockets that it leaves behind
        super().__init__(command, folder / f"{name}.log", environ, pipe=subprocess.PIPE)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._questions, self._answers = self.process.stdin, self.process.stdout
        self._is_ready = False

    def ready(self) -> Self:
        """Wait until it takes prompts."""
        if not self._is_ready:
            self._line(_READY_WITHIN_S)
            self._is_ready = True
        return self

    def ask(self, prompt: Sequence[int]) -> Answer:
        """What it generates."""
        self.ready()
        self._questions.write(json.dumps(prompt).encode() + b"\n")
        self._questions.flush()
        return Answer(**json.loads(self._line(_ANSWER_WITHIN_S)))

    def end(self) -> None:
        self._questions.close()

    def stop(self) -> None:
        super().stop()
        self._answers.close()

    def _line(self, within_s: float) -> bytes:
        deadline, line = time.monotonic() + within_s, b""
        while not line.endswith(b"\n"):
            readable, _, _ = select.select([self._answers], [], [], max(0.0, deadline - time.monotonic()))
            assert readable, self.why(f"no line within {within_s} s")
            piece = os.read(self._answers.fileno(), 1 << 16)
            assert piece, self.why("the engine has ended")
            line += piece
        return line


class CacheServer(Program):
    """`lmcache server` over one L2 adapter. `transfer` is what an engine is told of it, once it is ready."""

    def __init__(self, folder: Path, adapter: dict[str, Any]) -> None:
        port, self._http_port, prometheus_port = _free_ports(3)
        self.transfer = json.loads(readme.command("vllm serve")[-1])
        self.transfer["kv_connector_extra_config"]["lmcache.mp.port"] = port
        words = readme.replaced(
            readme.command("lmcache server"),
            port=port,
            http_port=self._http_port,
            prometheus_port=prometheus_port,
            shm_name=f"kvstore-test-{port}",
            l2_adapter=json.dumps(adapter),
        )
        words[0] = str(Path(sys.executable).with_name(words[0]))
        super().__init__(words, folder / "lmcache.log", _LMCACHE_ENVIRON)
        try:
            wait_for(self._healthy, _READY_WITHIN_S)
        except BaseException:
            self.stop()
            raise

    def clear(self) -> None:
        """Have it drop all that it keeps in its own memory; returns once that is empty."""

        def empty() -> bool:
            self._http("POST", "/cache/clear")
            return bool(self._storage_status()["l1_manager"]["total_object_count"] == 0)

        wait_for(empty)

    def adapter_status(self) -> dict[str, Any]:
        """What the adapter says of itself."""
        (status,) = self._storage_status()["l2_adapters"]
        return dict(status)

    def _storage_status(self) -> dict[str, Any]:
        return dict(json.loads(self._http("GET", "/status"))["storage_manager"])

    def _healthy(self) -> bool:
        assert self.process.poll() is None, self.why("LMCache's server has ended")
        try:
            self._http("GET", "/healthcheck")
        except (urllib.error.URLError, ConnectionError):
            return False
        return True

    def _http(self, method: str, path: str) -> bytes:
        request = urllib.request.Request(f"http://{_HOST}:{self._http_port}{path}", method=method)
        with urllib.request.urlopen(request, timeout=_ANSWER_WITHIN_S) as response:
            return bytes(response.read())


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server((_HOST, 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
