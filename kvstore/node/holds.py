"""Holds: prefixes that are to stay in the arena for a while, for whoever maps nothing of it, as a router.

A hold is a read lease with a time-to-live. It pins leading keys that are in the arena at once, and what is
loaded for it from the tiers below as it arrives. It belongs to no client: it ends by its time, or when
somebody says so, and with the daemon. All of them together pin a part of the arena at most, for what is
pinned is what nobody can make room of.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from operator import truth
from typing import TYPE_CHECKING, Final, cast

from kvstore.block import Namespace, check_keys
from kvstore.errors import InvalidRequest, Unavailable
from kvstore.node import patience
from kvstore.node.blocks import Block
from kvstore.node.lease import Holder, ReadLease
from kvstore.node.promote import Shelves
from kvstore.protocol import KEYS_MAX

if TYPE_CHECKING:
    from kvstore.node.store import Store

HELD_FRACTION: Final = 0.25
TTL_S_MAX: Final = 3600.0
# A hold takes some 500 bytes, and a task of some KB while it loads.
HOLDS_MAX: Final = 4096
# How long a prefetch may take, which holds what it has while it goes on.
_PREFETCH_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Hold:
    """A hold as it was when it began, in leading keys; 0 is the id where nothing is held.

    `pinned` were in the arena, `loading` are expected there: below, or being written now. From the first key
    that is neither all are `missing`, though shared tiers are asked for them in the background.
    """

    id: int
    pinned: int
    loading: int
    missing: int


@dataclass(frozen=True, slots=True)
class HoldsStatistics:
    """Holds now, and the bytes they pin; what two of them pin counts twice."""

    holds: int
    pinned_bytes: int


@dataclass(slots=True)
class _Held:
    lease: ReadLease
    timer: asyncio.TimerHandle
    loading: asyncio.Task[None] | None = None


class Holds:
    """The holds of one store."""

    def __init__(self, store: "Store") -> None:
        self._store = store
        self.holder = Holder("holds", pinned_bytes_max=0, reserved_bytes_max=0, maps=False)
        self._held: dict[int, _Held] = {}
        self._last = 0
        self._closed = False
        self.fraction = HELD_FRACTION  # may be set; what is pinned already stays

    @property
    def pinned_bytes_max(self) -> int:
        """What all holds together may pin, of what the arena may use now."""
        return int(self._store.arena.room.limit_bytes * self.fraction)

    def hold(self, namespace: Namespace, keys: Sequence[bytes], ttl_s: float) -> Hold:
        """Pin the leading keys for `ttl_s`, and begin to load what of them is below. Returns at once.

        With a `ttl_s` of 0 they are pinned only until all that can be had has arrived.

        Raises:
            InvalidRequest: a value is out of its limits, or all holds together would be.
            Unavailable: the daemon stops.
        """
        self._check_request(keys, ttl_s)
        shelves = self._store.directory.shelves(namespace)
        lease = self._store.readers.acquire_nothing(keys)
        here, expected, nbytes = self._known(shelves, keys)
        self._check_room(nbytes)
        rest = keys[here:]
        worth = bool(rest) and (expected or self._store.movements.may_find(shelves, rest[0]))
        if not worth and not (here and ttl_s):
            return Hold(0, here, 0, len(rest))
        loop = asyncio.get_running_loop()
        timer = loop.call_later(ttl_s or _PREFETCH_S, self.end, lease.id)
        held = self._held[lease.id] = _Held(lease, timer)
        self._last = lease.id
        self._store.readers.extend(self.holder, shelves[0], lease, keys)
        if worth:
            loading = patience.extend(self._store, self.holder, lease, shelves, keys, ttl_s or _PREFETCH_S)
            held.loading = loop.create_task(loading)
            held.loading.add_done_callback(lambda _: self._loaded(lease, ttl_s))
        return Hold(lease.id, here, expected, len(rest) - expected)

    def end(self, hold_id: int) -> bool:
        """End a hold; what is being loaded for it arrives all the same. False where there is none."""
        held = self._held.pop(hold_id, None)
        if held is None:
            return False
        held.timer.cancel()
        if held.loading is not None:
            held.loading.cancel()
        if hold_id in self.holder.reads:
            self._store.end_lease(self.holder, hold_id)
        return True

    def is_over(self, hold_id: int) -> bool:
        """Whether it is none of now, but may have been one, of this daemon or an earlier one."""
        return 0 < hold_id <= self._last and hold_id not in self._held

    def close(self) -> None:
        """End all holds, and begin no more."""
        self._closed = True
        for hold_id in list(self._held):
            self.end(hold_id)

    def statistics(self) -> HoldsStatistics:
        """What is held now."""
        return HoldsStatistics(len(self._held), self.holder.pinned_bytes)

    def check(self) -> list[str]:
        """What is wrong, a line each; pins are counted by whoever counts those of all holders."""
        return [f"lease {number} of no hold" for number in self.holder.reads if number not in self._held]

    # Helpers.

    def _loaded(self, lease: ReadLease, ttl_s: float) -> None:
        """Nothing more comes: what was there for that alone is over, and so is what has found nothing."""
        if not (ttl_s and lease.blocks):
            self.end(lease.id)

    def _check_request(self, keys: Sequence[bytes], ttl_s: float) -> None:
        if self._closed:
            raise Unavailable("the daemon stops, and holds nothing any more; ask another")
        if not 0 <= ttl_s <= TTL_S_MAX:
            raise InvalidRequest(f"ttl_s is {ttl_s}; give 0 to {TTL_S_MAX:g} seconds")
        if not 1 <= len(keys) <= KEYS_MAX:
            raise InvalidRequest(f"{len(keys)} keys to hold; give 1 to {KEYS_MAX}")
        check_keys(keys)
        if len(self._held) >= HOLDS_MAX:
            raise InvalidRequest(f"{len(self._held)} holds; the limit is {HOLDS_MAX}: end one")

    def _check_room(self, nbytes: int) -> None:
        self.holder.pinned_bytes_max = self.pinned_bytes_max
        left = self.holder.pinned_bytes_max - self.holder.pinned_bytes
        if nbytes > left:
            raise InvalidRequest(
                f"{nbytes} bytes to hold; of the {self.holder.pinned_bytes_max} that all holds may pin "
                f"{max(0, left)} are left: give fewer keys, end a hold, or raise limits.held_fraction"
            )

    def _known(self, shelves: Shelves, keys: Sequence[bytes]) -> tuple[int, int, int]:
        """Leading keys in the arena, those after them that can be expected there, and the bytes of both."""
        arena, source = shelves[0], self._store.movements.promoter.source
        here = cast("list[Block]", list(takewhile(truth, map(arena.sealed.get, keys))))
        nbytes = sum([block.length for block in here])
        expected = 0
        for key in keys[len(here) :]:
            there = arena.resident(key)
            if there is None:
                found = source(shelves, key)
                if found is None:
                    break
                there = found[1]
            expected += 1
            nbytes += there.length
        return len(here), expected, nbytes
