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
from itertools import takewhile
from typing import Generic, TypeVar

from kvstore.client import EachLease

K = TypeVar("K")


@dataclass(frozen=True, slots=True)
class LockStatistics:
    """What is locked now, and how many leases were forgotten by those who made them."""

    locks: int
    leases: int
    expired_leases: int
    pinned_bytes: int


class _Hold(Generic[K]):
    """One lookup. Of its keys that are locked still, `pinned` counts those that its lease pins, `unpinned`
    the rest; `users` are the loads that read it. Its lease ends before it does, where others are left.
    """

    __slots__ = ("keys", "lease", "nbytes", "pinned", "pins", "since", "unpinned", "users", "views")

    def __init__(
        self, lease: EachLease | None, views: dict[K, memoryview], keys: set[K], since: float
    ) -> None:
        self.lease = lease
        self.views = views
        self.keys = keys
        self.nbytes = sum(map(len, views.values()))
        self.pins = frozenset(views)
        self.pinned = len(self.pins)
        self.unpinned = len(keys) - self.pinned
        self.since = since
        self.users = 0


class Locks(Generic[K]):
    """The locks of one connector, by its engine's keys. Locks older than `age_max_s` are ended."""

    def __init__(self, age_max_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._age_max_s = age_max_s
        self._clock = clock
        self._key_to_holds: dict[K, list[_Hold[K]]] = {}
        self._holds: OrderedDict[_Hold[K], None] = OrderedDict()
        self._expired = 0
        self.removals = 0  # how often keys were hidden
        self.pinned_bytes = 0
        self._lock = threading.Lock()

    def add(
        self,
        lease: EachLease | None,
        pinned: dict[K, memoryview],
        unpinned: Collection[K],
        removals: int | None = None,
    ) -> None:
        """Lock what a lookup has found. `pinned` are by its lease, which is ours from now on.

        If `removals`, as it was when the lookup began, has changed, what is pinned may be what was removed.
        It stays pinned then, and is not read.
        """
        if lease is not None and not pinned:
            lease.end_quietly()
            lease = None
        if not pinned and not unpinned:
            self.expire()
            return
        hold = _Hold(lease, pinned, {*pinned, *unpinned}, self._clock())
        with self._lock:
            if removals not in (None, self.removals):
                hold.views.clear()
            for key in hold.keys:
                self._key_to_holds.setdefault(key, []).append(hold)
            self._holds[hold] = None
            self.pinned_bytes += hold.nbytes
            ended = self._old()
        self._release(ended)

    def unlock(self, keys: Sequence[K]) -> None:
        """Undo one lookup's lock of each key; a key that is not locked is none's concern."""
        ended = []
        with self._lock:
            for key in keys:
                holds = self._key_to_holds.get(key)
                if holds:
                    ended += self._undo(key, next((h for h in holds if key not in h.views), holds[0]))
        self._release(ended)

    def expire(self) -> None:
        """End the locks that are too old."""
        with self._lock:
            ended = self._old()
        self._release(ended)

    def hide(self, keys: Sequence[K]) -> None:
        """What is locked of these keys is not theirs any more: it stays pinned, and is not read."""
        with self._lock:
            self.removals += 1
            for key in keys:
                for hold in self._key_to_holds.get(key, ()):
                    hold.views.pop(key, None)

    @contextmanager
    def reading(self, keys: Collection[K]) -> Iterator[dict[K, memoryview]]:
        """The bytes of those keys that a lookup has pinned. They stay pinned until the block is left."""
        views: dict[K, memoryview] = {}
        valid: dict[_Hold[K], bool] = {}  # whether its connection stands, which is asked once
        with self._lock:
            for key in keys:
                for hold in reversed(self._key_to_holds.get(key, ())):
                    if key not in hold.views:
                        continue
                    if hold not in valid:
                        valid[hold] = hold.lease is not None and hold.lease.valid
                        hold.users += valid[hold]
                    if valid[hold]:
                        views[key] = hold.views[key]
                        break
        try:
            yield views
        finally:
            ended = []
            with self._lock:
                for hold in filter(valid.get, valid):
                    hold.users -= 1
                    ended += self._ended(hold)
            self._release(ended)

    def clear(self) -> None:
        """End all locks. Nobody may be reading."""
        with self._lock:
            leases = [hold.lease for hold in self._holds if hold.lease is not None]
            self._holds.clear()
            self._key_to_holds.clear()
            self.pinned_bytes = 0
        self._release(leases)

    def statistics(self) -> LockStatistics:
        """What is locked now."""
        with self._lock:
            locks = sum(map(len, self._key_to_holds.values()))
            leases = sum(hold.lease is not None for hold in self._holds)
            return LockStatistics(locks, leases, self._expired, self.pinned_bytes)

    def check(self) -> list[str]:
        """Recount what is locked; each line says what is wrong."""
        with self._lock:
            locked = {hold for holds in self._key_to_holds.values() for hold in holds}
            kept = {hold for hold in self._holds if hold.lease is not None}
            nbytes = sum(hold.nbytes for hold in kept)
            wrong = [
                (not locked <= set(self._holds), "a key is locked by a lookup that is over"),
                (not set(self._holds) <= locked | kept, "a lookup that is over is kept"),
                (self.pinned_bytes != nbytes, f"{self.pinned_bytes} bytes pinned counted, {nbytes} found"),
            ]
        return [text for bad, text in wrong if bad]

    # Helpers; all but the last under the lock.

    def _undo(self, key: K, hold: _Hold[K]) -> list[EachLease]:
        """Undo one lock; the lease, if that was the last that kept it."""
        holds = self._key_to_holds[key]
        holds.remove(hold)
        if not holds:
            del self._key_to_holds[key]
        if key in hold.pins:
            hold.pinned -= 1
        else:
            hold.unpinned -= 1
        return self._ended(hold)

    def _ended(self, hold: _Hold[K]) -> list[EachLease]:
        """The hold's lease, if nobody needs it any more."""
        if hold.pinned or hold.users:
            return []
        lease, hold.lease = hold.lease, None
        if not hold.unpinned:
            self._holds.pop(hold, None)
        if lease is None:
            return []
        self.pinned_bytes -= hold.nbytes
        return [lease]

    def _old(self) -> list[EachLease]:
        """Undo the locks of lookups that are too old; the leases that nobody reads."""
        old: list[EachLease] = []
        oldest = self._clock() - self._age_max_s
        for hold in list(takewhile(lambda hold: hold.since < oldest, self._holds)):
            self._expired += hold.pinned > 0
            for key in hold.keys:
                if hold in self._key_to_holds.get(key, ()):
                    old += self._undo(key, hold)
        return old

    def _release(self, ended: list[EachLease]) -> None:
        for lease in ended:
            lease.end_quietly()
