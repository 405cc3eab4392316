"""When the snapshot is written: by a forked process, which has all as it was at one moment.

The index goes on meanwhile. What it changes until the process is done is copied by the kernel, so for some
seconds the two may take twice the memory.
"""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import time
from pathlib import Path
from typing import Final

from kvstore.child import end_with_parent
from kvstore.index import snapshot

logger = logging.getLogger(__name__)

# A process that takes longer is ended; the next one tries again.
_LATE_S: Final = 300.0
# Exit status for what is no error of the system, whose numbers are lower.
_MISTAKE: Final = 255
# It must not take the core that lookups need.
_NICENESS: Final = 10


class Saver:
    """Writes a snapshot every `period_s`, from `start` to `close`."""

    def __init__(self, path: Path, period_s: float, save: snapshot.Save) -> None:
        self.written = 0
        self.failed = 0
        # How long nothing was answered for the last one.
        self.fork_s = 0.0
        self._path = path
        self._period_s = period_s
        self._save = save
        self._loop = asyncio.get_running_loop()
        self._next: asyncio.TimerHandle | None = None
        self._child: tuple[int, int] | None = None
        self._began_s = 0.0

    def start(self) -> None:
        """Write the first one after a period."""
        self._next = self._loop.call_later(self._period_s, self._turn)

    def close(self) -> None:
        """Write a last one, here and now, if it was started."""
        if self._next is None:
            return
        self._next.cancel()
        if self._child is not None:
            self._end_child()
        try:
            nbytes = snapshot.write(self._path, self._save)
            logger.info("wrote %s, %d bytes", self._path, nbytes)
        except OSError as error:
            logger.warning("%s cannot be written: %s", self._path, error.strerror or error)

    def _turn(self) -> None:
        self.start()
        if self._child is None:
            self._fork()
        elif time.monotonic() - self._began_s > _LATE_S:
            os.kill(self._child[0], signal.SIGKILL)

    def _fork(self) -> None:
        self._began_s = time.monotonic()
        parent = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            self.failed += 1
            logger.warning("no process for %s: %s", self._path, error.strerror)
            return
        if pid == 0:
            self._write_and_exit(parent)
        self.fork_s = time.monotonic() - self._began_s
        pidfd = os.pidfd_open(pid)
        self._child = pid, pidfd
        self._loop.add_reader(pidfd, self._reap)

    def _write_and_exit(self, parent: int) -> None:
        """What the forked process does. It never returns, and touches neither sockets nor the event loop."""
        status = _MISTAKE
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            end_with_parent(parent)
            os.closerange(3, os.sysconf("SC_OPEN_MAX"))
            os.nice(_NICENESS)
            gc.disable()
            snapshot.write(self._path, self._save)
            status = 0
        except OSError as error:
            status = error.errno or _MISTAKE
        finally:
            os._exit(status)

    def _reap(self) -> None:
        status = self._end_child(kill=False)
        if status:
            self.failed += 1
            reason = os.strerror(status) if 0 < status < _MISTAKE else f"its process ended with {status}"
            logger.warning("%s could not be written: %s", self._path, reason)
        else:
            self.written += 1

    def _end_child(self, *, kill: bool = True) -> int:
        assert self._child is not None
        pid, pidfd = self._child
        self._child = None
        self._loop.remove_reader(pidfd)
        if kill:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        os.close(pidfd)
        return os.waitstatus_to_exitcode(status)
