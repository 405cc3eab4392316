"""`kvstore` with a bad disk, a wall clock that is set back, or less patience with its clients.

The NVMe tier is the real one and does real I/O; a fault strikes in its threads, where a bad disk would. The
file that KVSTORE_FAULTS names has a line for each fault: the beginning of an action ("reading", "writing",
"forgetting", "looking", "opening", or "" for all), and "hang", "error" or seconds to sleep.
KVSTORE_CLOCK_SHIFT_S is added to the wall clock; the monotonic one goes on as it is. KVSTORE_FRAME_TIMEOUT_S
is how long a client may take for a frame, a hello or an answer, KVSTORE_STOP_S a disk when the daemon stops.
"""

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import kvstore.node.movement
import kvstore.node.server
import tiers.nvme
from kvstore.__main__ import main
from tiers.jobs import Jobs

T = TypeVar("T")


def strike(action: str) -> None:
    """Suffer what the file says now. A hang ends when the file no longer says so."""
    while (fault := _fault(action)) is not None:
        if fault == "error":
            raise OSError(errno.EIO, "the test says so")
        if fault != "hang":
            time.sleep(float(fault))
            return
        time.sleep(0.01)


def _fault(action: str) -> str | None:
    try:
        lines = Path(os.environ["KVSTORE_FAULTS"]).read_text().splitlines()
    except FileNotFoundError:
        return None
    found = [fault for verb, _, fault in (line.partition(" ") for line in lines) if action.startswith(verb)]
    return found[0] if found else None


class FaultyJobs(Jobs):
    """The threads of a tier on a bad disk."""

    def _run(self, action: str, work: Callable[[], T]) -> T:
        def suffering() -> T:
            strike(action)
            return work()

        return super()._run(action, suffering)


def _shift_clock(seconds: float) -> None:
    now, now_ns = time.time, time.time_ns
    time.time = lambda: now() + seconds
    time.time_ns = lambda: now_ns() + int(seconds * 1e9)


if __name__ == "__main__":
    if "KVSTORE_FAULTS" in os.environ:
        tiers.nvme.Jobs = FaultyJobs  # type: ignore[misc]
    if "KVSTORE_FRAME_TIMEOUT_S" in os.environ:
        kvstore.node.server.FRAME_TIMEOUT_S = float(os.environ["KVSTORE_FRAME_TIMEOUT_S"])  # type: ignore[misc]
    if "KVSTORE_STOP_S" in os.environ:
        kvstore.node.movement._STOP_S = float(os.environ["KVSTORE_STOP_S"])  # type: ignore[misc]
    _shift_clock(float(os.environ.get("KVSTORE_CLOCK_SHIFT_S", "0")))
    main()
