"""vLLM's OpenAI servers as processes of the engines' environment. Each ends, or is killed, with its test."""

import json
import os
import select
import signal
import subprocess
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from tests.engines.processes import ENGINE_ENVIRON, ENGINES
from tests.node import free_ports, wait_for

# On two idle cores they are ready after 18 s.
_READY_WITHIN_S: Final = 240.0


class Serving:
    """Servers with the model at `folder / model`, each with KV events. They start in the background."""

    def __init__(self, count: int, folder: Path, model: str) -> None:
        self.ports = [free_ports(3) for _ in range(count)]
        self.addresses = [f"127.0.0.1:{ports[0]}" for ports in self.ports]
        places = [":".join(map(str, ports)) for ports in self.ports]
        python = ENGINES / "bin" / "python"
        assert python.exists(), f"no {ENGINES.name} here; run these tests with `make test-engines`"
        self._log = folder / "servers.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [str(python), str(Path(__file__).with_name("server.py")), model, *places],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=folder,
                env={**os.environ, **ENGINE_ENVIRON, "VLLM_RPC_BASE_PATH": str(folder)},
            )

    def ready(self) -> Self:
        """Wait until all of them take requests."""
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], _READY_WITHIN_S)
        line = self._process.stdout.readline() if readable else b""
        assert line, self._why()
        self._pids = json.loads(line)
        wait_for(lambda: all(map(self._serves, self.addresses)), _READY_WITHIN_S)
        return self

    def kill(self, address: str) -> None:
        """SIGKILL one of them, with all its processes."""
        os.killpg(self._pids[self.addresses.index(address)], signal.SIGKILL)

    def stop(self) -> None:
        """End them all."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()

    def _serves(self, address: str) -> bool:
        assert self._process.poll() is None, self._why()
        try:
            with urllib.request.urlopen(f"http://{address}/health", timeout=5):
                return True
        except OSError:
            return False

    def _why(self) -> str:
        return f"the servers have ended; the end of their log:\n{self._log.read_text()[-6000:]}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
