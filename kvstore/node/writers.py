"""The writer's verbs: reserve, commit, abort. Synchronous; what waits is in `kvstore.node.patience`."""

import itertools
from collections.abc import Iterable, Sequence

from kvstore.block import check_keys
from kvstore.errors import InvalidRequest, LeaseError
from kvstore.node.accounts import Together
from kvstore.node.arena import ROOM, Arena
from kvstore.node.blocks import Block, Shelf, State
from kvstore.node.lease import Grant, Holder, WriteLease, check_distinct
from kvstore.node.movement import Movements
from kvstore.node.origin import Origin
from kvstore.node.promote import Shelves
from kvstore.statistics import StoreCounters
from tiers.base import Slot

_PRESENT, _BUSY, _GRANTED, _REFUSED = b"pbgr"
_READABLE = (State.SEALED, State.DEMOTING)


class Writers:
    """What writers do to an arena. `lease_ids` numbers the leases of readers and writers alike."""

    def __init__(
        self, arena: Arena, movements: Movements, counters: StoreCounters, lease_ids: "itertools.count[int]"
    ) -> None:
        self._arena = arena
        self._directory = arena.directory
        self._movements = movements
        self._counters = counters
        self._lease_ids = lease_ids

    def reserve(
        self,
        holder: Holder,
        shelves: Shelves,
        keys: Sequence[bytes],
        lengths: Sequence[int],
        *,
        parent: bytes | None = None,
        tokens: bytes | None = None,
    ) -> Grant:
        """Reserve what is missing of a chain of keys, as far as there is room at once.

        The first key follows `parent`: b"" where it starts a prompt, None where that is not known.

        What is granted is a leading run of what is missing; everything after the first key that finds no
        room is refused. The lease is the holder's until every granted key is committed or it is aborted.

        Raises:
            InvalidRequest: a key occurs twice or can be read here with another length, or the parent is no
                key. Nothing was reserved.
        """
        check_distinct(keys)
        if parent:
            check_keys([parent])
        last = shelves[0].resident(parent) if parent else None
        items = [(shelves, key) for key in keys]
        return self._reserve(holder, items, lengths, last, Origin(keys, parent, tokens))

    def reserve_each(
        self, holder: Holder, items: Sequence[tuple[Shelves, bytes]], lengths: Sequence[int]
    ) -> Grant:
        """Like `reserve`, for keys of several namespaces, which continue nothing."""
        check_distinct([(shelves[0].namespace.id, key) for shelves, key in items])
        return self._reserve(holder, items, lengths, None, None)

    def undo(self, holder: Holder, lease: WriteLease) -> None:
        """Take a reserve back as if it had not been: nobody is told that room has appeared."""
        if lease.open:
            self.end_write(holder, lease, keep_slots=False)
            del holder.writes[lease.id]

    def commit(self, holder: Holder, lease_id: int, indices: Iterable[int] | None = None) -> int:
        """Seal all blocks of a write lease, or those of some of its granted keys. How many were sealed.

        Raises:
            LeaseError: the lease is not the holder's or has ended, or a block was committed before.
        """
        lease = self._write_lease(holder, lease_id)
        chosen = lease.chosen(indices)
        blocks = [block for _, block in chosen]
        self._directory.seal(blocks)
        present = [block for block in lease.present if block.state is State.SEALED]
        lease.present = []
        self._directory.requested([*present, *blocks])
        for index, _ in chosen:
            lease.open[index] = None
        self._settled(holder, blocks)
        if not any(lease.open):
            del holder.writes[lease_id]
            self._arena.waiting.wake(ROOM)
        self._counters.sealed_blocks += len(blocks)
        self._arena.announce_sealed(blocks, lease.origin)
        self._movements.demoter.sealed(blocks)
        return len(blocks)

    def writable(self, holder: Holder, lease_id: int, indices: Iterable[int] | None) -> list[memoryview]:
        """The memory of what `commit` with the same arguments would seal, in its order.

        Raises:
            LeaseError: as `commit` does.
        """
        return [
            self._arena.tier.view(block.slot)[: block.length]
            for _, block in self._write_lease(holder, lease_id).chosen(indices)
        ]

    def abort(self, holder: Holder, lease_id: int) -> None:
        """Drop what of a write lease is not committed, and end it.

        Raises:
            LeaseError: the lease is not the holder's, or has ended.
        """
        lease = self._write_lease(holder, lease_id)
        self.end_write(holder, lease, keep_slots=False)
        del holder.writes[lease_id]
        self._arena.waiting.wake(ROOM)

    # Helpers, in the order of the above.

    def _reserve(
        self,
        holder: Holder,
        items: Sequence[tuple[Shelves, bytes]],
        lengths: Sequence[int],
        last: Block | None,
        origin: Origin | None,
    ) -> Grant:
        self._check_lengths(items, lengths)
        lease = WriteLease(next(self._lease_ids), origin)
        status = bytearray(b"r" * len(items))
        slots: list[Slot] = []
        self._arena.room.begin()
        # What is present must not be evicted for what is missing.
        kept = [last] if last is not None and last.state in _READABLE else []
        self._directory.pin(kept)
        refused = self._movements.draining
        for index, (shelves, key) in enumerate(items):
            shelf = shelves[0]
            block = shelf.sealed.get(key)
            if block is not None:
                status[index] = _PRESENT
                lease.present.append(block)
                self._directory.pin([block])
                kept.append(block)
            elif (block := shelf.pending.get(key)) is not None:
                status[index] = _BUSY
            elif self._movements.below(shelves, key):
                status[index] = _PRESENT
                continue
            elif not refused and (block := self._reserve_one(holder, shelf, key, lengths[index], last)):
                status[index] = _GRANTED
                lease.open.append(block)
                lease.block_bytes += block.length
                slots.append(block.slot)
            else:
                refused = True
                continue
            last = None if origin is None else block
        self._directory.unpin(kept)
        self._arena.settle()
        if lease.open:
            holder.writes[lease.id] = lease
        self._counters.reserved_blocks += len(lease.open)
        self._counters.refused_blocks += status.count(_REFUSED)
        hopeless = refused and (
            self._movements.draining or _beyond_quotas(items, lengths, status, lease.present)
        )
        return Grant(lease, bytes(status), slots, hopeless)

    def _check_lengths(self, items: Sequence[tuple[Shelves, bytes]], lengths: Sequence[int]) -> None:
        capacity = self._arena.tier.capacity_bytes
        for length in set(lengths):
            if not 1 <= length <= capacity:
                raise InvalidRequest(f"nbytes is {length}; give 1 to {capacity} bytes, the arena's capacity")
        for (shelves, key), length in zip(items, lengths, strict=True):
            # One that is pending somewhere may never be readable: until it is, the key is only busy.
            for shelf in shelves:
                block = shelf.sealed.get(key)
                if block is None or block.length == length:
                    continue
                raise InvalidRequest(
                    f"nbytes is {length} for key {key.hex()}, which is here with {block.length} bytes; "
                    "a block never changes: use another key, or remove it first"
                )

    def _reserve_one(
        self, holder: Holder, shelf: Shelf, key: bytes, length: int, parent: Block | None
    ) -> Block | None:
        if holder.reserved_bytes + length > holder.reserved_bytes_max:
            self._counters.limited_requests += 1
            return None
        slot = self._arena.room.take(length, shelf.account)
        if slot is None:
            self._movements.demoter.want(length, shelf.account)
            return None
        block = self._directory.add(shelf, key, length, slot, State.RESERVED, parent)
        slot.owner = block
        holder.reserved_bytes += length
        return block

    def _write_lease(self, holder: Holder, lease_id: int) -> WriteLease:
        lease = holder.writes.get(lease_id)
        if lease is None:
            raise LeaseError(f"write lease {lease_id} is not held by this connection; it may have ended")
        return lease

    def end_write(self, holder: Holder, lease: WriteLease, *, keep_slots: bool) -> None:
        """Abort what is open: the one way in which aborts, lost clients and shutdown end a write."""
        blocks = [block for block in lease.open if block is not None]
        lease.open = []
        for block in reversed(blocks):
            slot = self._directory.abort(block)
            slot.owner = lease
            lease.orphans.append(slot)
        if not keep_slots:
            for slot in lease.orphans:
                self._arena.room.free(slot)
            lease.orphans = []
        self._counters.aborted_blocks += len(blocks)
        self._settled(holder, blocks)

    def _settled(self, holder: Holder, blocks: Sequence[Block]) -> None:
        """These blocks are reserved no longer: tell those who wait for them."""
        for block in blocks:
            holder.reserved_bytes -= block.length
            self._arena.waiting.wake(block)


def _beyond_quotas(
    items: Sequence[tuple[Shelves, bytes]],
    lengths: Sequence[int],
    status: bytearray,
    present: Sequence[Block],
) -> bool:
    """Whether some salt may not have so much at a time, with what is here of the same request."""
    together = Together(present)
    wanted = zip(items, lengths, status, strict=True)
    return not all(
        letter == _PRESENT or together.fits(shelves[0].account, length)
        for (shelves, _), length, letter in wanted
    )
