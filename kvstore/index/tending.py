"""What keeps an index clean between lookups: the dead is taken away in slices. It also measures lateness."""

import asyncio
import time
from typing import Final

from kvstore.index.locality import Locality
from kvstore.statistics import Latencies

_IDLE_S: Final = 0.02
# Between slices, at least.
_PAUSE_S: Final = 0.002


class Tending:
    """Tends a Locality from `start` to `close`. `late` is how late it had its turns of the event loop.

    `stall_max_s` is the longest lateness for which this process worked itself; the rest of it is others'.
    """

    def __init__(self, locality: Locality) -> None:
        self.late = Latencies()
        self.late_max_s = 0.0
        self.stall_max_s = 0.0
        self._locality = locality
        self._loop = asyncio.get_running_loop()
        self._next: asyncio.Handle | None = None
        self._due_s = self._cpu_s = 0.0

    def start(self) -> None:
        """Begin."""
        self._again(_IDLE_S)

    def close(self) -> None:
        """Leave what is dead where it is."""
        if self._next is not None:
            self._next.cancel()

    def _again(self, pause_s: float) -> None:
        self._due_s = time.monotonic() + pause_s
        self._cpu_s = time.process_time()
        self._next = self._loop.call_later(pause_s, self._turn)

    def _turn(self) -> None:
        began_s = time.monotonic()
        used_s = time.process_time() - self._cpu_s
        more = self._locality.tend()
        took_s = time.monotonic() - began_s
        late_s = max(0.0, began_s - self._due_s)
        tending_s = min(took_s, time.process_time() - self._cpu_s - used_s)
        self.stall_max_s = max(self.stall_max_s, min(late_s, used_s), tending_s)
        self.late.observe(late_s)
        self.late_max_s = max(self.late_max_s, late_s, took_s)
        # A request takes some turns of the loop: it must not wait for a slice in each of them.
        self._again(max(took_s, _PAUSE_S) if more else _IDLE_S)
