"""A node's store: readers, writers and movements over one arena and the tiers below it.

Every verb is synchronous and runs to its end before the next begins, so there are no locks. What waits is
in `kvstore.node.patience`. Whose connection it is, is the server's to know.
"""

import itertools
import time
from collections.abc import Collection, Coroutine, Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

from kvstore.node.ages import Ages
from kvstore.node.arena import ROOM, Arena
from kvstore.node.audit import audit, audit_lower
from kvstore.node.directory import Directory, TierDirectory
from kvstore.node.drain import Drain
from kvstore.node.holds import Holds
from kvstore.node.lease import Holder
from kvstore.node.lower import Lower
from kvstore.node.movement import Movements
from kvstore.node.promote import Shelves
from kvstore.node.readers import Readers
from kvstore.node.salts import Salts
from kvstore.node.writers import Writers
from kvstore.statistics import StoreCounters, TierCounters, TierState
from tiers.base import Tier


class Store:
    """One node's blocks.

    Leases are numbered from `first_lease`: with the daemon's epoch, no lease of an earlier daemon can be
    taken for one of this. `missing_s` is for `Movements`.
    """

    def __init__(
        self, arena: Arena, lowers: Sequence[Lower], *, first_lease: int = 1, missing_s: float = 2.0
    ) -> None:
        self.arena = arena
        self.directory = Directory([arena.directory, *[lower.directory for lower in lowers]])
        self.waiting = arena.waiting
        self.counters = StoreCounters()
        self.movements = Movements(arena, lowers, missing_s=missing_s)
        lease_ids = itertools.count(first_lease)
        self.writers = Writers(arena, self.movements, self.counters, lease_ids)
        self.readers = Readers(self.directory, arena, self.movements, self.counters, lease_ids)
        self.drain = Drain(arena, self.movements)
        self.salts = Salts(arena, self.movements)
        self.holds = Holds(self)
        self._ages = {directory: Ages() for directory in self.directory.tiers}

    def remove(self, shelves: Shelves, keys: Iterable[bytes]) -> tuple[int, Coroutine[Any, Any, None] | None]:
        """Hide these blocks now, in every tier; slots of pinned ones are freed at the last release.

        How many were here, and what to await until no restart brings them back, if there is such a tier.
        """
        names = list(dict.fromkeys(keys))
        found = self.hide(shelves, names)
        if not self.movements.lowers:
            return found, None
        namespace_id = shelves[0].namespace.id
        return found, self.movements.make_lasting([(namespace_id, key) for key in names])

    def hide(self, shelves: Shelves, names: Sequence[bytes]) -> int:
        """Hide these blocks now, in every tier, until a restart; how many were here."""
        blocks = [block for key in names if (block := shelves[0].sealed.get(key)) is not None]
        slots = [slot for block in blocks for gone, slot in [self.arena.directory.remove(block)] if gone]
        self.movements.demoter.left(blocks, evicted=False)
        self.arena.announce_removed(blocks)
        self.arena.free(slots)
        found = {block.key for block in blocks} | self.movements.remove(shelves, names)
        self.counters.removed_blocks += len(found)
        return len(found)

    # Holders that go, and memory that comes.

    def disconnect(self, holder: Holder) -> bool:
        """The holder's connection is lost: its writes are aborted at once. Whether it still holds slots.

        A holder that maps the arena may still be writing or reading, so its slots stay taken until `end`
        or until it gives up its leases one by one.
        """
        if not holder.maps:
            self.end(holder)
            return False
        for lease_id, lease in list(holder.writes.items()):
            self.writers.end_write(holder, lease, keep_slots=True)
            if not lease.orphans:
                del holder.writes[lease_id]
        return bool(holder.reads or holder.writes)

    def end(self, holder: Holder) -> None:
        """The holder is gone for good: end all its leases and free what they held."""
        for lease_id in holder.lease_ids():
            self.end_lease(holder, lease_id)

    def end_lease(self, holder: Holder, lease_id: int) -> None:
        """Release or abort, whichever the lease wants."""
        if lease_id in holder.reads:
            self.readers.release(holder, lease_id)
        else:
            self.writers.abort(holder, lease_id)

    def grow(self, ready_bytes: int) -> None:
        """More of the arena is populated."""
        self.arena.room.grow(ready_bytes)
        self.waiting.wake(ROOM)

    # What it has to say.

    def sample(self) -> None:
        """Remember which request is the latest now; to be called about once a second."""
        for directory, ages in self._ages.items():
            ages.sample(time.monotonic(), directory.requests)

    def statistics(self) -> list[TierState]:
        """The tiers now. Totals over all of them are in `counters`."""
        arena, room = self.arena, self.arena.room.statistics()
        self.counters.evicted_blocks = arena.counters.evicted_blocks
        self.counters.evicted_bytes = arena.counters.evicted_bytes
        self.counters.moved_blocks, self.counters.moved_bytes = room.moved_blocks, room.moved_bytes
        first = self._state(arena.tier, arena.directory, arena.counters, arena.evicted_stamp)
        # What debug holds back is free.
        used_bytes = first.used_bytes - arena.room.late_bytes
        first = replace(first, used_bytes=used_bytes, limit_bytes=arena.room.limit_bytes)
        return [first, *[self._lower_state(lower) for lower in self.movements.lowers]]

    def check(self, holders: Collection[Holder] = ()) -> list[str]:
        """Recount everything; each line says what is wrong. Takes 1 us a block, on the event loop."""
        arena = self.arena
        wrong = [*self.directory.check(), *arena.tier.check(), *self.movements.demoter.check()]
        wrong += self.holds.check()
        wrong += audit(arena.directory, arena.tier, [*holders, self.holds.holder], arena.room.late_bytes)
        for lower in self.movements.lowers:
            wrong += [*lower.tier.check(), *audit_lower(lower)]
        return wrong

    def _lower_state(self, lower: Lower) -> TierState:
        return replace(
            self._state(lower.tier, lower.directory, lower.counters, lower.evicted_stamp),
            backlog_blocks=lower.backlog_blocks,
            backlog_bytes=lower.unwritten_bytes + lower.writing_bytes,
            breaker_open=lower.breaker.open,
            enabled=lower.enabled,
            failing=lower.failing,
            limit_bytes=lower.room.limit_bytes,
            reads=lower.reads,
            writes=lower.writes,
        )

    def _state(
        self, tier: Tier, directory: TierDirectory, counters: TierCounters, evicted_stamp: int
    ) -> TierState:
        age_s = self._ages[directory].age_s(time.monotonic(), evicted_stamp) if evicted_stamp else 0.0
        values = asdict(tier.statistics()) | asdict(directory.statistics())
        return TierState(**values, eviction_age_s=age_s, counters=counters)
