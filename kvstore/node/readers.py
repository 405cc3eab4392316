"""The reader's verbs: acquire, release, questions. Synchronous; what waits is in `kvstore.node.patience`."""

import itertools
from collections.abc import Sequence
from itertools import takewhile
from operator import truth
from typing import cast

from kvstore.block import HitLength
from kvstore.errors import LeaseError
from kvstore.node.arena import Arena
from kvstore.node.blocks import Block, Shelf, State
from kvstore.node.directory import Directory
from kvstore.node.lease import Holder, ReadLease, check_distinct
from kvstore.node.movement import Movements
from kvstore.node.promote import Shelves
from kvstore.statistics import StoreCounters


class Readers:
    """What readers do to an arena, and what they may ask of all tiers."""

    def __init__(
        self,
        directory: Directory,
        arena: Arena,
        movements: Movements,
        counters: StoreCounters,
        lease_ids: "itertools.count[int]",
    ) -> None:
        self._all = directory
        self._arena = arena
        self._directory = arena.directory
        self._movements = movements
        self._counters = counters
        self._lease_ids = lease_ids

    def acquire(self, holder: Holder, shelf: Shelf, keys: Sequence[bytes]) -> ReadLease:
        """Pin the leading keys that are here. The lease is the holder's if it pins anything.

        Raises:
            InvalidRequest: a key occurs twice.
        """
        lease = self.acquire_nothing(keys)
        self.extend(holder, shelf, lease, keys)
        self.looked(len(lease.blocks), len(keys))
        self.count_hits(shelf, lease, keys)
        return lease

    def acquire_nothing(self, keys: Sequence[bytes]) -> ReadLease:
        """A lease over none of the keys yet, for `extend`; raises as `acquire` does."""
        check_distinct(keys)
        return ReadLease(next(self._lease_ids), [], 0, limited=False)

    def extend(self, holder: Holder, shelf: Shelf, lease: ReadLease, keys: Sequence[bytes]) -> None:
        """Pin as many of the keys after those that the lease has as are here without a hole."""
        room_bytes = holder.pinned_bytes_max - holder.pinned_bytes
        wanted = keys[len(lease.blocks) :] if lease.blocks else keys
        blocks = cast("list[Block]", list(takewhile(truth, map(shelf.sealed.get, wanted))))
        added_bytes = sum([block.length for block in blocks])
        while added_bytes > room_bytes:
            added_bytes -= blocks.pop().length
            self.limit(lease)
        lease.blocks += blocks
        lease.block_bytes += added_bytes
        self._pin(holder, lease, blocks, added_bytes)

    def looked(self, hits: int, asked: int) -> None:
        """Count what a reader found in the arena at its first look."""
        self._arena.counters.hit_blocks += hits
        self._arena.counters.missed_blocks += asked - hits

    def count_hits(self, shelf: Shelf, lease: ReadLease, keys: Sequence[bytes]) -> None:
        """Count what an acquire of the keys has found."""
        hits, missed = len(lease.blocks), len(keys) - len(lease.blocks)
        self._counters.hit_blocks += hits
        self._counters.missed_blocks += missed
        shelf.account.hit_blocks += hits
        shelf.account.missed_blocks += missed
        self._movements.missed(missed)

    def acquire_each(self, holder: Holder, items: Sequence[tuple[Shelves, bytes]]) -> tuple[ReadLease, bytes]:
        """Pin every item that is here; holes are allowed. The lease, and one byte an item: here or not."""
        lease, found = self.acquire_nothing([]), bytearray(len(items))
        self.extend_each(holder, lease, items, found)
        self.looked(len(lease.blocks), len(items))
        self._count_each(lease, items, found)
        return lease, bytes(found)

    def extend_each(
        self, holder: Holder, lease: ReadLease, items: Sequence[tuple[Shelves, bytes]], found: bytearray
    ) -> None:
        """Pin what of the items is here and not in the lease, and mark it in `found`."""
        room_bytes = holder.pinned_bytes_max - holder.pinned_bytes
        blocks: list[Block] = []
        for index, (shelves, key) in enumerate(items):
            block = None if found[index] else shelves[0].sealed.get(key)
            if block is None:
                continue
            room_bytes -= block.length
            if room_bytes < 0:
                self.limit(lease)
                break
            found[index] = 1
            blocks.append(block)
        added_bytes = sum([block.length for block in blocks])
        lease.blocks += blocks
        lease.block_bytes += added_bytes
        self._pin(holder, lease, blocks, added_bytes)

    def finish_each(
        self, lease: ReadLease, items: Sequence[tuple[Shelves, bytes]], found: bytearray
    ) -> tuple[ReadLease, bytes]:
        """Put the lease's blocks into the order of the items, and count them."""
        named = {(block.shelf, block.key): block for block in lease.blocks}
        here = [item for item, is_here in zip(items, found, strict=True) if is_here]
        lease.blocks[:] = [named[shelves[0], key] for shelves, key in here]
        self._count_each(lease, items, found)
        return lease, bytes(found)

    def limit(self, lease: ReadLease) -> None:
        """The holder's limit ends this lease's hit."""
        self._counters.limited_requests += not lease.limited
        lease.limited = True

    def release(self, holder: Holder, lease_id: int) -> None:
        """End a read lease.

        Raises:
            LeaseError: the lease is not the holder's, or has ended.
        """
        lease = holder.reads.pop(lease_id, None)
        if lease is None:
            raise LeaseError(f"read lease {lease_id} is not held by this connection; it may have ended")
        holder.pinned_bytes -= lease.block_bytes
        self._arena.free(self._directory.unpin(lease.blocks))

    # Questions.

    def hit_length(self, shelves: Shelves, keys: Sequence[bytes]) -> HitLength:
        """How many leading keys are here, per medium. Pins nothing and does not count as a use."""
        return self._all.hit_length(self._movements.readable(shelves), keys)

    def length_each(self, items: Sequence[tuple[Shelves, bytes]]) -> list[int]:
        """Each item's length in bytes, in whatever tier it is; 0 where it is not."""
        readable = self._movements.readable
        lengths = [0] * len(items)
        for index, (shelves, key) in enumerate(items):
            for shelf in readable(shelves):
                if (block := shelf.sealed.get(key)) is not None:
                    lengths[index] = block.length
                    break
        return lengths

    # Helpers.

    def _count_each(self, lease: ReadLease, items: Sequence[tuple[Shelves, bytes]], found: bytearray) -> None:
        missed = len(items) - len(lease.blocks)
        self._counters.hit_blocks += len(lease.blocks)
        self._counters.missed_blocks += missed
        self._movements.missed(missed)
        for block in lease.blocks:
            block.shelf.account.hit_blocks += 1
        if missed:
            for (shelves, _), is_here in zip(items, found, strict=True):
                shelves[0].account.missed_blocks += not is_here

    def _pin(self, holder: Holder, lease: ReadLease, blocks: Sequence[Block], added_bytes: int) -> None:
        if blocks:
            self._directory.pin(blocks)
            # What was pinned before this, while waiting, may have been removed since.
            self._directory.requested([block for block in lease.blocks if block.state is not State.DOOMED])
            self._movements.demoter.hit(blocks)
            holder.pinned_bytes += added_bytes
            holder.reads[lease.id] = lease
