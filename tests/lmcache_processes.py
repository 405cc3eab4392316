"""LMCache's own processes beside a daemon: its tools and its server. Each ends, or is killed, with its test.

What a tool returns says little; what it prints is read by `figures`.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from tests.node import free_ports, wait_for
from tests.readme import command, replaced

# LMCache reports its use to its makers unless told not to.
ENVIRON: Final = {"LMCACHE_TRACK_USAGE": "false", "LMCACHE_DISABLE_BANNER": "1"}
_BIN: Final = Path(sys.executable).parent
_HOST: Final = "127.0.0.1"
# A tool takes 5 s, a server as long to be ready; both are importing most of the time.
_WITHIN_S: Final = 90.0
_ANSWER_WITHIN_S: Final = 20.0
_SECTION: Final = re.compile(r"-+ (.+?) -+")


def adapter(address: str, **other: Any) -> str:
    """The README's `--l2-adapter` for a daemon at `address`."""
    words = command("lmcache bench l2")
    spec = json.loads(words[words.index("--l2-adapter") + 1])
    return json.dumps({**spec, "adapter_params": {**spec["adapter_params"], "address": address}, **other})


def run(words: Sequence[str], *, status: int = 0, environ: dict[str, str] | None = None) -> str:
    """Run a command to its end; what it has printed to stdout."""
    ended = subprocess.run(
        _program(words),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=_environ(environ),
        timeout=_WITHIN_S,
    )
    assert ended.returncode == status, f"{ended.stdout[-4000:]}\n{ended.stderr[-4000:]}"
    return ended.stdout


@contextlib.contextmanager
def running(words: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command beside what is done meanwhile, and kill it then."""
    silent = subprocess.DEVNULL
    with subprocess.Popen(
        _program(words), stdin=silent, stdout=silent, stderr=silent, env=_environ()
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def figures(output: str) -> dict[str, dict[str, str]]:
    """The tables that LMCache's benches print at their end: by section and name."""
    sections: dict[str, dict[str, str]] = {}
    section: dict[str, str] = {}
    for line in output.splitlines():
        if found := _SECTION.fullmatch(line):
            section = sections.setdefault(found[1], {})
        elif ":" in line:
            name, _, value = line.partition(":")
            section[name] = value.strip()
    return sections


class Server:
    """`lmcache server` over one L2 adapter, in a process group of its own. It is ready when it is made.

    `transfer` is what an engine is told of it.
    """

    def __init__(self, folder: Path, adapter: str, l1_size_gb: float = 0.5) -> None:
        self._port, self._http_port, prometheus_port = free_ports(3)
        self._log = folder / f"lmcache-{self._port}.log"
        words = replaced(
            command("lmcache server"),
            port=self._port,
            http_port=self._http_port,
            prometheus_port=prometheus_port,
            shm_name=f"kvstore-test-{self._port}",
            l1_size_gb=l1_size_gb,
            l2_adapter=adapter,
        )
        self.transfer = json.loads(command("vllm serve")[-1])
        self.transfer["kv_connector_extra_config"]["lmcache.mp.port"] = self._port
        self._shared_memory = Path(f"/dev/shm/lmcache_l1_pool_kvstore-test-{self._port}")
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                _program(words),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_environ(),
                start_new_session=True,
            )
        try:
            wait_for(self._is_healthy, _WITHIN_S)
        except BaseException:
            self.kill()
            raise

    @property
    def log(self) -> str:
        """What it has logged so far."""
        return self._log.read_text(errors="replace")

    def bench(self, *options: str) -> list[str]:
        """The command that benches it, as an engine without a GPU that stores and loads prompts."""
        urls = ["--rpc-url", f"tcp://{_HOST}:{self._port}", "--url", f"http://{_HOST}:{self._http_port}"]
        return [
            "lmcache",
            "bench",
            "server",
            *urls,
            "--mode",
            "cpu",
            "--transfer-mode",
            "engine_driven",
            *options,
        ]

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """What it answers over HTTP; an HTTPError for anything but success."""
        request = urllib.request.Request(
            f"http://{_HOST}:{self._http_port}{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=_ANSWER_WITHIN_S) as response:
            return json.loads(response.read())

    def adapter_status(self) -> dict[str, Any]:
        """What our adapter says of itself."""
        (status,) = self.ask("GET", "/status")["storage_manager"]["l2_adapters"]
        return dict(status)

    def clear(self) -> None:
        """Let it drop all that it keeps in its own memory; returns once that is empty."""

        def is_empty() -> bool:
            self.ask("POST", "/cache/clear")
            storage = self.ask("GET", "/status")["storage_manager"]
            return bool(storage["l1_manager"]["total_object_count"] == 0)

        wait_for(is_empty)

    def kill(self) -> None:
        """SIGKILL; returns once it is gone, and its shared memory, which a child of it removes then."""
        self.process.kill()
        try:
            end_group(self.process)
        finally:
            self._shared_memory.unlink(missing_ok=True)

    def _is_healthy(self) -> bool:
        assert self.process.poll() is None, self.log[-4000:]
        try:
            self.ask("GET", "/healthcheck")
        except (urllib.error.URLError, ConnectionError):
            return False
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


def end_group(process: subprocess.Popen[bytes], within_s: float = 20.0) -> None:
    """Wait for a process that ends, and for its children, which remove what they share; kill the rest."""
    try:
        process.wait(within_s)
        wait_for(lambda: not _is_there(process.pid), within_s)
    except (AssertionError, subprocess.TimeoutExpired):
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _program(words: Sequence[str]) -> list[str]:
    """The command with the path of its program, which is one of our environment's."""
    name, *arguments = words
    return [str(_BIN / name), *arguments]


def _environ(more: dict[str, str] | None = None) -> dict[str, str]:
    return {**os.environ, **ENVIRON, **(more or {})}


def _is_there(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
