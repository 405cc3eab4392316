"""A process beside this one that is to be there: started, watched, started again, and ended with this one."""

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from tempfile import TemporaryFile
from typing import Final

import msgspec

from kvstore.config import Config

logger = logging.getLogger(__name__)

# Between two starts: at first, and at most where it ends again and again.
_PAUSE_S: Final = (0.2, 10.0)
# Who has lived so long is started again at once.
_WELL_S: Final = 30.0
_STOP_S: Final = 5.0
# The data path of the process that it stands beside must not wait for it.
_NICENESS: Final = 5
_PR_SET_PDEATHSIG: Final = 1


class Child:
    """`python -m kvstore NAME --child-of PID`, from `start` to `stop`, both on one event loop.

    It reads its settings from standard input. What it prints goes to standard error, where the log is.
    """

    def __init__(self, name: str, settings: Config) -> None:
        self._name = name
        self._settings = msgspec.json.encode(settings)
        self._command = [sys.executable, "-m", "kvstore", name, "--child-of", str(os.getpid())]
        self._loop = asyncio.get_running_loop()
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        self._ended = asyncio.Event()
        self._stopping = False
        self._started_s = 0.0
        self._pause_s = _PAUSE_S[0]
        self._again: asyncio.Handle | None = None

    def start(self) -> None:
        """Start it, and again whenever it ends."""
        self._again = None
        self._started_s = time.monotonic()
        try:
            with TemporaryFile() as settings:  # a pipe might not take them all at once
                settings.write(self._settings)
                settings.seek(0)
                self._process = subprocess.Popen(self._command, stdin=settings, stdout=sys.stderr)
            self._pidfd = os.pidfd_open(self._process.pid)
        except OSError as error:
            logger.warning("the %s cannot be started: %s", self._name, error)
            if self._process is not None:  # it cannot be watched
                self._process.kill()
                self._process.wait()
                self._process = None
            self._start_later()
            return
        self._ended.clear()
        self._loop.add_reader(self._pidfd, self._reap)
        logger.info("started the %s, process %d", self._name, self._process.pid)

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL where that does not help."""
        self._stopping = True
        if self._again is not None:
            self._again.cancel()
        if self._process is None:
            return
        self._process.terminate()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), _STOP_S)
        if self._process is not None:
            self._process.kill()
            await self._ended.wait()

    def _reap(self) -> None:
        assert self._process is not None
        status = self._process.wait()
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._process = None
        self._ended.set()
        if not self._stopping:
            logger.warning("the %s has ended with status %d", self._name, status)
            self._start_later()

    def _start_later(self) -> None:
        well = time.monotonic() - self._started_s >= _WELL_S
        self._pause_s = _PAUSE_S[0] if well else self._pause_s
        self._again = self._loop.call_later(self._pause_s, self.start)
        self._pause_s = min(2 * self._pause_s, _PAUSE_S[1])


def settings_of_parent(parent: int) -> Config:
    """In such a process: what it is to do, behind the process that it stands beside, no longer than that."""
    end_with_parent(parent)
    os.nice(_NICENESS)
    return msgspec.json.decode(sys.stdin.buffer.read(), type=Config)


def end_with_parent(parent: int) -> None:
    """Be ended by SIGTERM when the thread that started this process ends; at once where it has ended."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        os._exit(0)
