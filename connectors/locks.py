"""What an engine's lookups have locked: counted per lookup, and ended with the last unlock.

An unlock names keys, not the lookup that locked them, so which of a key's locks it ends is chosen here: one
that pins nothing first, then the oldest. A lookup's blocks are one read lease of the daemon, which is
released when nobody has locked any of them. Locks that are never undone end when they are old.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from kvstore.leases import EachLease

K = TypeVar("K")


@dataclass(frozen=True, slots=True)
class LockStatistics:
    """What is locked now, and how many lookups were forgotten by those who made them."""

    locks: int
    leases: int
    expired_leases: int
    pinned_bytes: int


class _Hold(Generic[K]):
    """One lookup's lease. `locked` counts its keys that are locked still, `users` the loads that read it."""

    __slots__ = ("lease", "locked", "nbytes", "since", "users", "views")

    def __init__(self, lease: EachLease, views: dict[K, memoryview], since: float) -> None:
        self.lease = lease
        self.views = views
        self.nbytes = sum(map(len, views.values()))
        self.locked = len(views)
        self.since = since
        self.users = 0


class Locks(Generic[K]):
    """The locks of one connector, by its engine's keys. Locks older than `age_max_s` are ended."""

    def __init__(self, age_max_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._age_max_s = age_max_s
        self._clock = clock
        # A lock of a block that was not pinned, since it was in a tier below, has no hold.
        self._locks: dict[K, list[_Hold[K] | None]] = {}
        self._holds: OrderedDict[_Hold[K], None] = OrderedDict()
        self._expired = 0
        self.pinned_bytes = 0
        self._lock = threading.Lock()

    def add(self, lease: EachLease | None, pinned: dict[K, memoryview], unpinned: Collection[K]) -> None:
        """Lock what a lookup has found. `pinned` are by its lease, which is ours from now on."""
        hold = None if lease is None else _Hold(lease, pinned, self._clock())
        ended = []
        with self._lock:
            for key in pinned:
                self._locks.setdefault(key, []).append(hold)
            for key in unpinned:
                self._locks.setdefault(key, []).append(None)
            if hold is not None:
                self._holds[hold] = None
                self.pinned_bytes += hold.nbytes
                ended += self._ended(hold)
            ended += self._old()
        self._release(ended)

    def unlock(self, keys: Sequence[K]) -> None:
        """Undo one lookup's lock of each key; a key that is not locked is none's concern."""
        ended = []
        with self._lock:
            for key in keys:
                locks = self._locks.get(key)
                if not locks:
                    continue
                hold = locks.pop(locks.index(None) if None in locks else 0)
                if not locks:
                    del self._locks[key]
                if hold is not None:
                    hold.locked -= 1
                    ended += self._ended(hold)
        self._release(ended)

    @contextmanager
    def reading(self, keys: Collection[K]) -> Iterator[dict[K, memoryview]]:
        """The bytes of those keys that a lookup has pinned. They stay pinned until the block is left."""
        views: dict[K, memoryview] = {}
        holds: dict[_Hold[K], bool] = {}  # and whether its connection stands, which is asked once
        with self._lock:
            for key in keys:
                for hold in filter(None, self._locks.get(key, ())):
                    if hold not in holds:
                        holds[hold] = hold.lease.valid
                        hold.users += 1
                    if holds[hold]:
                        views[key] = hold.views[key]
                        break
        try:
            yield views
        finally:
            ended = []
            with self._lock:
                for hold in holds:
                    hold.users -= 1
                    ended += self._ended(hold)
            self._release(ended)

    def clear(self) -> None:
        """End all locks. Nobody may be reading."""
        with self._lock:
            holds = list(self._holds)
            self._holds.clear()
            self._locks.clear()
            self.pinned_bytes = 0
        self._release(holds)

    def statistics(self) -> LockStatistics:
        """What is locked now."""
        with self._lock:
            locks = sum(map(len, self._locks.values()))
            return LockStatistics(locks, len(self._holds), self._expired, self.pinned_bytes)

    # Helpers; the first two under the lock.

    def _ended(self, hold: _Hold[K]) -> list[_Hold[K]]:
        """The hold, if this was the last that kept it."""
        if hold.locked or hold.users or hold not in self._holds:
            return []
        del self._holds[hold]
        self.pinned_bytes -= hold.nbytes
        return [hold]

    def _old(self) -> list[_Hold[K]]:
        """Forget the locks of lookups that are too old; those of them that nobody reads."""
        old = []
        for hold in list(self._holds):
            if self._clock() - hold.since <= self._age_max_s:
                break
            for key in hold.views:
                locks = self._locks.get(key, [])
                if hold in locks:
                    locks.remove(hold)
                    if not locks:
                        del self._locks[key]
            hold.locked = 0
            self._expired += 1
            old += self._ended(hold)
        return old

    def _release(self, ended: list[_Hold[K]]) -> None:
        for hold in ended:
            hold.lease.end_quietly()
