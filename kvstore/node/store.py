"""The verbs of the store over a directory and its tiers. Whose connection it is, is the server's to know.

Every verb is synchronous and runs to its end before the next begins, so there are no locks. What waits is
in `kvstore.node.patience`.
"""

import itertools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict
from itertools import takewhile
from operator import truth
from typing import Protocol, cast

from kvstore.block import HitLength
from kvstore.errors import InvalidRequest, LeaseError
from kvstore.node.audit import audit
from kvstore.node.directory import Block, Directory, Shelf, State
from kvstore.node.lease import Grant, Holder, ReadLease, WriteLease
from kvstore.node.room import Room
from kvstore.node.waiting import Waiting
from kvstore.statistics import StoreCounters, TierState
from tiers.base import Slot, SlotTier

_PRESENT, _BUSY, _GRANTED, _REFUSED = b"pbgr"
_READABLE = (State.SEALED, State.DEMOTING)
ROOM = "room"  # what a reserve waits for


class Listener(Protocol):
    """Where the life of blocks comes out: after seal, and before a slot is used again."""

    def sealed(self, tier: str, blocks: Sequence[Block], tokens: bytes | None) -> None:
        """These blocks, in the order of their prefix, are readable in the tier from now on."""

    def removed(self, tier: str, blocks: Sequence[Block]) -> None:
        """These blocks are readable in the tier no longer."""


class Store:
    """One node's blocks in one slot tier.

    Leases are numbered from `first_lease`: with the daemon's epoch, no lease of an earlier daemon can be
    taken for one of this. `debug` is for `Room`.
    """

    def __init__(
        self,
        directory: Directory,
        tier: SlotTier,
        *,
        first_lease: int = 1,
        listeners: Sequence[Listener] = (),
        debug: bool = False,
    ) -> None:
        self.directory = directory
        self.tier = tier
        self._dram = directory.tiers[0]
        self._room = Room(tier, self._dram, debug=debug)
        self._listeners = tuple(listeners)
        self._lease_ids = itertools.count(first_lease)
        self.waiting = Waiting()
        self.counters = StoreCounters()

    # Writers.

    def reserve(
        self,
        holder: Holder,
        shelf: Shelf,
        keys: Sequence[bytes],
        lengths: Sequence[int],
        *,
        parent: bytes | None = None,
        tokens: bytes | None = None,
    ) -> Grant:
        """Reserve what is missing of a chain of keys, as far as there is room at once.

        What is granted is a leading run of what is missing; everything after the first key that finds no
        room is refused. The lease is the holder's until every granted key is committed or it is aborted.

        Raises:
            InvalidRequest: a key occurs twice, or is here with another length. Nothing was reserved.
        """
        self._check_lengths(shelf, keys, lengths)
        lease = WriteLease(next(self._lease_ids), shelf, tokens)
        status = bytearray(b"r" * len(keys))
        slots: list[Slot] = []
        self._room.begin()
        last = None if parent is None else shelf.sealed.get(parent) or shelf.pending.get(parent)
        # What is present must not be evicted for what is missing.
        kept = [last] if last is not None and last.state in _READABLE else []
        self._dram.pin(kept)
        refused = False
        for index, key in enumerate(keys):
            if (block := shelf.sealed.get(key)) is not None:
                status[index] = _PRESENT
                lease.present.append(block)
                self._dram.pin([block])
                kept.append(block)
            elif (block := shelf.pending.get(key)) is not None:
                status[index] = _BUSY
            elif not refused and (block := self._reserve_one(holder, shelf, key, lengths[index], last)):
                status[index] = _GRANTED
                lease.open.append(block)
                lease.block_bytes += block.length
                slots.append(block.slot)
            else:
                refused = True
                continue
            last = block
        self._dram.unpin(kept)
        self._announce_evicted()
        if lease.open:
            holder.writes[lease.id] = lease
        self.counters.reserved_blocks += len(lease.open)
        self.counters.refused_blocks += status.count(_REFUSED)
        return Grant(lease, bytes(status), slots)

    def undo(self, holder: Holder, lease: WriteLease) -> None:
        """Take a reserve back as if it had not been: nobody is told that room has appeared."""
        if lease.open:
            self._end_write(holder, lease, keep_slots=False)
            del holder.writes[lease.id]

    def commit(self, holder: Holder, lease_id: int, indices: Iterable[int] | None = None) -> int:
        """Seal all blocks of a write lease, or those of some of its granted keys. How many were sealed.

        Raises:
            LeaseError: the lease is not the holder's or has ended, or a block was committed before.
        """
        lease = self._write_lease(holder, lease_id)
        chosen = lease.chosen(indices)
        blocks = [block for _, block in chosen]
        self._dram.seal(blocks)
        present = [block for block in lease.present if block.state is State.SEALED]
        lease.present = []
        self._dram.requested([*present, *blocks])
        for index, _ in chosen:
            lease.open[index] = None
        self._settled(holder, blocks)
        if not any(lease.open):
            del holder.writes[lease_id]
            self.waiting.wake(ROOM)
        self.counters.sealed_blocks += len(blocks)
        for listener in self._listeners:
            listener.sealed(self._dram.name, blocks, lease.tokens)
        return len(blocks)

    def writable(self, holder: Holder, lease_id: int, indices: Iterable[int] | None) -> list[memoryview]:
        """The memory of what `commit` with the same arguments would seal, in its order.

        Raises:
            LeaseError: as `commit` does.
        """
        return [
            self.tier.view(block.slot)[: block.length]
            for _, block in self._write_lease(holder, lease_id).chosen(indices)
        ]

    def abort(self, holder: Holder, lease_id: int) -> None:
        """Drop what of a write lease is not committed, and end it.

        Raises:
            LeaseError: the lease is not the holder's, or has ended.
        """
        lease = self._write_lease(holder, lease_id)
        self._end_write(holder, lease, keep_slots=False)
        del holder.writes[lease_id]
        self.waiting.wake(ROOM)

    # Readers.

    def acquire(self, holder: Holder, shelf: Shelf, keys: Sequence[bytes]) -> ReadLease:
        """Pin the leading keys that are here. The lease is the holder's if it pins anything.

        Raises:
            InvalidRequest: a key occurs twice.
        """
        lease = self.acquire_nothing(keys)
        self.extend(holder, shelf, lease, keys)
        self.count_hits(lease, keys)
        return lease

    def acquire_nothing(self, keys: Sequence[bytes]) -> ReadLease:
        """A lease over none of the keys yet, for `extend`; raises as `acquire` does."""
        _check_distinct(keys)
        return ReadLease(next(self._lease_ids), [], 0, limited=False)

    def extend(self, holder: Holder, shelf: Shelf, lease: ReadLease, keys: Sequence[bytes]) -> None:
        """Pin as many of the keys after those that the lease has as are here without a hole."""
        room_bytes = holder.pinned_bytes_max - holder.pinned_bytes
        wanted = keys[len(lease.blocks) :] if lease.blocks else keys
        blocks = cast("list[Block]", list(takewhile(truth, map(shelf.sealed.get, wanted))))
        added_bytes = sum([block.length for block in blocks])
        while added_bytes > room_bytes:
            added_bytes -= blocks.pop().length
            lease.limited = True
        self.counters.limited_requests += lease.limited
        lease.blocks += blocks
        lease.block_bytes += added_bytes
        self._pin(holder, lease, blocks, added_bytes)

    def count_hits(self, lease: ReadLease, keys: Sequence[bytes]) -> None:
        """Count what an acquire of the keys has found."""
        self.counters.hit_blocks += len(lease.blocks)
        self.counters.missed_blocks += len(keys) - len(lease.blocks)

    def acquire_each(self, holder: Holder, items: Sequence[tuple[Shelf, bytes]]) -> tuple[ReadLease, bytes]:
        """Pin every item that is here; holes are allowed. The lease, and one byte an item: here or not."""
        lease = ReadLease(next(self._lease_ids), [], 0, limited=False)
        found = bytearray(len(items))
        for index, (shelf, key) in enumerate(items):
            block = shelf.sealed.get(key)
            if block is None:
                continue
            if holder.pinned_bytes + lease.block_bytes + block.length > holder.pinned_bytes_max:
                lease.limited = True
                break
            found[index] = 1
            lease.blocks.append(block)
            lease.block_bytes += block.length
        self._pin(holder, lease, lease.blocks, lease.block_bytes)
        self.counters.hit_blocks += len(lease.blocks)
        self.counters.missed_blocks += len(items) - len(lease.blocks)
        return lease, bytes(found)

    def release(self, holder: Holder, lease_id: int) -> None:
        """End a read lease.

        Raises:
            LeaseError: the lease is not the holder's, or has ended.
        """
        lease = holder.reads.pop(lease_id, None)
        if lease is None:
            raise LeaseError(f"read lease {lease_id} is not held by this connection; it may have ended")
        holder.pinned_bytes -= lease.block_bytes
        for slot in self._dram.unpin(lease.blocks):
            self._room.free(slot)
        self.waiting.wake(ROOM)

    # Anyone.

    def hit_length(self, shelves: Sequence[Shelf], keys: Sequence[bytes]) -> HitLength:
        """How many leading keys are here, per medium. Pins nothing and does not count as a use."""
        return self.directory.hit_length(shelves, keys)

    def hit_each(self, items: Sequence[tuple[Shelf, bytes]]) -> bytes:
        """One byte an item: here or not."""
        return bytes(key in shelf.sealed for shelf, key in items)

    def remove(self, shelf: Shelf, keys: Iterable[bytes]) -> int:
        """Hide these blocks now; slots of pinned ones are freed at the last release. How many were here."""
        blocks = [block for key in dict.fromkeys(keys) if (block := shelf.sealed.get(key)) is not None]
        slots = [slot for block in blocks for gone, slot in [self._dram.remove(block)] if gone]
        for listener in self._listeners:
            listener.removed(self._dram.name, blocks)
        for slot in slots:
            self._room.free(slot)
        self.counters.removed_blocks += len(blocks)
        self.waiting.wake(ROOM)
        return len(blocks)

    def page(self, shelf: Shelf, after: int, limit: int) -> tuple[list[tuple[bytes, int]], int | None]:
        """A page of (key, length) in the order of sealing, and the cursor of the next page if there is one.

        A block that is here all the while is listed at least once.
        """
        blocks = (block for block in shelf.sealed.values() if block.generation > after)
        page = list(itertools.islice(blocks, limit + 1))
        entries = [(block.key, block.length) for block in page[:limit]]
        return entries, page[limit - 1].generation if len(page) > limit else None

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
            self._end_write(holder, lease, keep_slots=True)
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
            self.release(holder, lease_id)
        else:
            self.abort(holder, lease_id)

    def grow(self, ready_bytes: int) -> None:
        """More of the arena is populated."""
        self._room.grow(ready_bytes)
        self.waiting.wake(ROOM)

    def statistics(self) -> list[TierState]:
        """The tiers now. Totals are in `counters`."""
        tier, room = self.tier.statistics(), self._room.statistics()
        self.counters.evicted_blocks, self.counters.evicted_bytes = room.evicted_blocks, room.evicted_bytes
        self.counters.moved_blocks, self.counters.moved_bytes = room.moved_blocks, room.moved_bytes
        state = asdict(tier) | asdict(self._dram.statistics())
        state["used_bytes"] -= self._room.late_bytes  # free, but for debugging held back
        return [TierState(**state)]

    def check(self, holders: Collection[Holder] = ()) -> list[str]:
        """Recount everything; each line says what is wrong. Takes 1 us a block, on the event loop."""
        return [
            *self.directory.check(),
            *self.tier.check(),
            *audit(self._dram, self.tier, holders, self._room.late_bytes),
        ]

    # Helpers, in the order of the above.

    def _check_lengths(self, shelf: Shelf, keys: Sequence[bytes], lengths: Sequence[int]) -> None:
        _check_distinct(keys)
        capacity = self.tier.capacity_bytes
        for length in set(lengths):
            if not 1 <= length <= capacity:
                raise InvalidRequest(f"nbytes is {length}; give 1 to {capacity} bytes, the arena's capacity")
        for key, length in zip(keys, lengths, strict=True):
            block = shelf.sealed.get(key) or shelf.pending.get(key)
            if block is not None and block.length != length:
                raise InvalidRequest(
                    f"nbytes is {length} for key {key.hex()}, which is here with {block.length} bytes; "
                    "a block never changes: use another key, or remove it first"
                )

    def _reserve_one(
        self, holder: Holder, shelf: Shelf, key: bytes, length: int, parent: Block | None
    ) -> Block | None:
        if holder.reserved_bytes + length > holder.reserved_bytes_max:
            self.counters.limited_requests += 1
            return None
        slot = self._room.take(length)
        if slot is None:
            return None
        block = self._dram.add(shelf, key, length, slot, State.RESERVED, parent)
        slot.owner = block
        holder.reserved_bytes += length
        return block

    def _announce_evicted(self) -> None:
        if self._room.evicted:
            for listener in self._listeners:
                listener.removed(self._dram.name, self._room.evicted)

    def _write_lease(self, holder: Holder, lease_id: int) -> WriteLease:
        lease = holder.writes.get(lease_id)
        if lease is None:
            raise LeaseError(f"write lease {lease_id} is not held by this connection; it may have ended")
        return lease

    def _end_write(self, holder: Holder, lease: WriteLease, *, keep_slots: bool) -> None:
        """Abort what is open: the one way in which aborts, lost clients and shutdown end a write."""
        blocks = [block for block in lease.open if block is not None]
        lease.open = []
        for block in reversed(blocks):
            slot = self._dram.abort(block)
            slot.owner = lease
            lease.orphans.append(slot)
        if not keep_slots:
            for slot in lease.orphans:
                self._room.free(slot)
            lease.orphans = []
        self.counters.aborted_blocks += len(blocks)
        self._settled(holder, blocks)

    def _settled(self, holder: Holder, blocks: Sequence[Block]) -> None:
        """These blocks are reserved no longer: tell those who wait for them."""
        for block in blocks:
            holder.reserved_bytes -= block.length
            self.waiting.wake(block)

    def _pin(self, holder: Holder, lease: ReadLease, blocks: Sequence[Block], added_bytes: int) -> None:
        if blocks:
            self._dram.pin(blocks)
            # What was pinned before this, while waiting, may have been removed since.
            self._dram.requested([block for block in lease.blocks if block.state is not State.DOOMED])
            holder.pinned_bytes += added_bytes
            holder.reads[lease.id] = lease


def _check_distinct(keys: Sequence[bytes]) -> None:
    if len(set(keys)) != len(keys):
        twice = next(key for index, key in enumerate(keys) if key in keys[:index])
        raise InvalidRequest(f"key {twice.hex()} occurs twice in {len(keys)} keys; give each key once")
