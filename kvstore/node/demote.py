"""Write-behind and demotion: blocks of the arena, copied into the tiers below.

A tier of several of one medium gets a block, the least busy one. What a tier below is still owed stays in
the arena until it is written, which is how a slow disk holds writers back; what a failing one is owed may go.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Final, cast

from kvstore.node.accounts import Account
from kvstore.node.arena import ROOM, Arena
from kvstore.node.blocks import Block, State, idle
from kvstore.node.lower import Lower
from kvstore.node.policy import Policy
from tiers.base import Transfer

# Written by one call: small blocks share it.
_CALL_BYTES: Final = 2 << 20
# Blocks looked at for one call, under 1 us each.
_LOOKS_MAX: Final = 2048
# Blocks whose owing is changed before others have their turn.
_TURN: Final = 512


@dataclass(slots=True)
class _Write:
    block: Block
    owed: bool
    generation: int | None  # of the demotion, where it is one
    parent: Block | None
    below: Block
    transfer: Transfer
    forgotten: bool = False


class Demoter:
    """Writes blocks of an arena into the tiers below it."""

    def __init__(self, arena: Arena, lowers: Sequence[Lower]) -> None:
        self._arena = arena
        self._lowers = tuple(lowers)
        media = dict.fromkeys(lower.tier.medium for lower in lowers)
        self._groups = [[low for low in lowers if low.tier.medium is medium] for medium in media]
        self._hits: dict[Block, int] = {}
        self._writes: dict[Block, _Write] = {}  # by the block below
        self._leaving_children: dict[Block, int] = {}
        self._leaving_bytes = 0
        self._demoting: set[Lower] = set()
        self._wanted_bytes = 0
        self.writing: set[asyncio.Task[None]] = set()

    # What happens in the arena.

    def sealed(self, blocks: Sequence[Block]) -> None:
        """These blocks are in the arena from now on, as their writer has left them."""
        for group in self._groups:
            for block in blocks:
                lower = self._destination(group, block)
                if lower is not None and not lower.rules.admit_hits:
                    self._enter(lower, block)
        self.pump()

    def promoted(self, lower: Lower, blocks: Sequence[Block]) -> None:
        """These blocks have come from a tier that has given them up: it is to get them back."""
        for block in blocks:
            if self._destination([lower], block) is lower:
                self._enter(lower, block)
        self.pump()

    def hit(self, blocks: Sequence[Block]) -> None:
        """A reader was given these blocks."""
        if not any(lower.rules.admit_hits for lower in self._lowers):
            return
        for block in blocks:
            hits = self._hits[block] = self._hits.get(block, 0) + 1
            for group in self._groups:
                lower = self._destination(group, block)
                if lower is not None and lower.rules.admit_hits == hits:
                    self._enter(lower, block)
        self.pump()

    def left(self, blocks: Sequence[Block], *, evicted: bool) -> None:
        """These blocks are in the arena no longer."""
        for block in blocks:
            self._hits.pop(block, None)
            for lower in self._lowers:
                if block in lower.unwritten:
                    self._leave(lower, block)
                    lower.counters.dropped_blocks += evicted
        if evicted:
            self._touch(blocks)

    def want(self, length: int, account: Account) -> None:
        """So many bytes found no room: demote as many more, watermark or not; of their salt at its quota."""
        if not account.excess_bytes(length):
            self._wanted_bytes = max(self._wanted_bytes, length)
        elif account.quota_bytes is not None and length <= account.quota_bytes:
            account.wanted_bytes = length
            self._arena.directory.accounts.over[account] = None
        self.pump()

    def remove(self, lower: Lower, below: Block) -> None:
        """Nobody is to see what is being written there now."""
        write = self._writes[below]
        write.transfer.dropped = True
        if write.transfer.record is not None:
            lower.tier.forget([write.transfer.record])
            write.forgotten = True
        lower.directory.give_up(below)

    # What happens to a tier.

    async def owing_changed(self, lower: Lower) -> None:
        """Owe a tier that fails nothing any more, so that the arena goes on; owe it again when it is back.

        Likewise where its rules are others now.
        """
        owed = lower.rules.owed and not lower.breaker.open
        blocks = list(lower.unwritten)
        for start in range(0, len(blocks), _TURN):
            if (lower.rules.owed and not lower.breaker.open) != owed:
                return  # it has changed again
            turn = islice(blocks, start, start + _TURN)
            changed = [block for block in turn if lower.unwritten.get(block, owed) != owed]
            for block in changed:
                lower.unwritten[block] = owed
                block.owed += 1 if owed else -1
            if not owed:
                self._arena.directory.policy.freed(changed)
                self._arena.waiting.wake(ROOM)
            await asyncio.sleep(0)
        self.pump()

    async def offer(self, blocks: Sequence[Block] | None = None) -> None:
        """Enter what is in the arena, or these blocks, and below nowhere: a tier below has lost them."""
        if blocks is None:
            blocks = [block for shelf in self._arena.directory.shelves() for block in shelf.sealed.values()]
        for start in range(0, len(blocks), _TURN):
            self.sealed([b for b in blocks[start : start + _TURN] if b.state is State.SEALED])
            await asyncio.sleep(0)

    def leave_all(self) -> set[Block]:
        """What tiers below are still to get, which nobody is to write any more."""
        unwritten = {block for lower in self._lowers for block in lower.unwritten}
        for lower in self._lowers:
            for block in list(lower.unwritten):
                self._leave(lower, block)
        return unwritten

    def pump(self) -> None:
        """Begin as many calls as there may be."""
        for lower in self._lowers:
            self.pump_one(lower)

    def pump_one(self, lower: Lower) -> None:
        """Begin as many calls of one tier as there may be."""
        while lower.may_write():
            writes = self._next(lower)
            if not writes:
                break
            lower.calls += 1
            lower.writing += 1
            task = asyncio.get_running_loop().create_task(self._run(lower, writes))
            self.writing.add(task)
            task.add_done_callback(self.writing.discard)

    def check(self) -> list[str]:
        """Recount what is owed; each line says what is wrong."""
        owed: dict[Block, int] = {}
        wrong = []
        for lower in self._lowers:
            for block, owing in lower.unwritten.items():
                owed[block] = owed.get(block, 0) + owing
                if block.state not in (State.SEALED, State.DEMOTING):
                    wrong.append(f"{block} is to be written to {lower.name}")
            if lower.unwritten_bytes != sum(block.length for block in lower.unwritten):
                wrong.append(f"bytes to be written to {lower.name} do not add up")
        for write in self._writes.values():
            owed[write.block] = owed.get(write.block, 0) + write.owed
        blocks = self._arena.directory.all_blocks()
        wrong += [
            f"{b} is owed to {b.owed}, {owed.get(b, 0)} found" for b in blocks if b.owed != owed.get(b, 0)
        ]
        return wrong

    # Which block goes where.

    def _destination(self, group: Sequence[Lower], block: Block) -> Lower | None:
        """Where of these the block is to go; None if it is there, on its way, or nowhere welcome."""
        best: Lower | None = None
        for lower in group:
            if block in lower.unwritten or self._is_there(lower, block):
                return None
            fits = lower.tier.slot_length(block.length) <= lower.tier.capacity_bytes
            if fits and (best is None or lower.load < best.load):
                best = lower
        return best

    def _is_there(self, lower: Lower, block: Block) -> bool:
        shelf = lower.directory.known(block.shelf.namespace)
        return shelf is not None and (block.key in shelf.sealed or block.key in shelf.pending)

    def _enter(self, lower: Lower, block: Block) -> None:
        owed = lower.rules.owed and not lower.breaker.open
        lower.unwritten[block] = owed
        lower.unwritten_bytes += block.length
        block.owed += owed

    def _leave(self, lower: Lower, block: Block) -> None:
        block.owed -= lower.unwritten.pop(block)
        lower.unwritten_bytes -= block.length

    def _touch(self, blocks: Sequence[Block]) -> None:
        """What leaves the arena was used later than what left before: the tiers below follow that order."""
        for lower in self._lowers:
            copies = list(filter(None, map(lower.copy_of, blocks)))
            lower.directory.requested(copies[::-1])  # what left first is the oldest, as a tail is

    # What is written next.

    def _next(self, lower: Lower) -> list[_Write]:
        """The blocks of one call: the oldest, or the coldest where the arena must be cleared."""
        cold = lower.rules.on_eviction
        candidates = self._coldest(lower) if cold else iter(list(islice(lower.unwritten, _LOOKS_MAX)))
        lower.room.begin()
        writes: list[_Write] = []
        size = 0
        for block in candidates:
            if block.copies or block.state is not State.SEALED:
                continue
            if size and size + block.length > _CALL_BYTES:
                break
            there = self._is_there(lower, block)  # found there when the tier was recovered
            write = None if there else self._begin(lower, block)
            if write is None:
                self._leave(lower, block)
                lower.counters.dropped_blocks += not there
                self._arena.directory.policy.freed([block])
                continue
            writes.append(write)
            size += block.length
            if size >= _CALL_BYTES:
                break
        lower.settle()
        return writes

    def _coldest(self, lower: Lower) -> Iterator[Block]:
        """What may be demoted now, while salts are above their quotas or the arena is too full."""
        directory = self._arena.directory
        for account in list(directory.accounts.over):
            if account.order is not None:
                yield from self._coldest_of(lower, account.order, account.is_over)
        yield from self._coldest_of(lower, directory.policy, partial(self._too_full, lower))

    def _coldest_of(self, lower: Lower, policy: Policy, too_full: Callable[[int], bool]) -> Iterator[Block]:
        """What of the policy's blocks may be demoted, `too_full` with so many bytes less."""
        spare_bytes = 0
        if not too_full(spare_bytes):
            return
        coldest = cast(Iterator[Block], policy.coldest())
        for block in list(islice(filter(idle, coldest), _LOOKS_MAX)):
            if not too_full(spare_bytes):
                return
            if block.children > self._leaving_children.get(block, 0):
                continue
            owed_here = lower.unwritten.get(block)
            if owed_here is not None and block.owed == owed_here:  # and to no other tier
                yield block
            elif block.owed == 0:
                spare_bytes += block.length  # as good as free: it may leave at once

    def _too_full(self, lower: Lower, spare_bytes: int) -> bool:
        capacity = self._arena.room.limit_bytes
        staying = self._arena.used_bytes - self._leaving_bytes - spare_bytes
        if staying > lower.rules.high_watermark * capacity:
            self._demoting.add(lower)
        elif staying <= lower.rules.low_watermark * capacity:
            self._demoting.discard(lower)
        return lower in self._demoting or self._wanted_bytes > self._leaving_bytes

    def _begin(self, lower: Lower, block: Block) -> _Write | None:
        shelf = lower.directory.shelf(block.shelf.namespace)
        slot = lower.take(block.length, shelf.account)
        if slot is None:
            return None
        parent = None if block.parent is None else shelf.resident(block.parent.key)
        below = lower.directory.add(shelf, block.key, block.length, slot, State.RESERVED, parent)
        slot.owner = below
        lower.directory.hold([below])
        directory = self._arena.directory
        directory.hold([block])
        owed = lower.unwritten[block]
        self._leave(lower, block)
        block.owed += owed
        generation = None
        if lower.rules.on_eviction:
            generation = directory.demote(block)
            self._leaving_bytes += block.slot.length
            block.shelf.account.leaving_bytes += block.length
            if block.parent is not None:
                leaving = self._leaving_children
                leaving[block.parent] = leaving.get(block.parent, 0) + 1
        transfer = Transfer(
            block.shelf.namespace,
            block.key,
            block.length,
            slot=slot,
            memory=self._arena.tier.view(block.slot),
            checksum=block.checksum,
        )
        lower.writing_blocks += 1
        lower.writing_bytes += block.length
        write = self._writes[below] = _Write(block, owed, generation, block.parent, below, transfer)
        return write

    # How it ends.

    async def _run(self, lower: Lower, writes: list[_Write]) -> None:
        operation = lower.tier.write([write.transfer for write in writes])
        nbytes = sum([write.block.length for write in writes])
        well = await lower.attempt(operation, lower.writes, lambda: None, nbytes=nbytes)
        lower.calls -= 1
        lower.writing -= 1
        stored = [write.below for write in writes if self._ended_below(lower, write, well=well)]
        if stored:
            lower.entered(stored)
            lower.graves.difference_update([below.identity for below in stored])
            lower.counters.written_blocks += len(stored)
            lower.counters.written_bytes += sum([below.length for below in stored])
        gone = [write.block for write in writes if self._ended_above(lower, write)]
        if gone:
            self._wanted_bytes = max(0, self._wanted_bytes - sum([block.length for block in gone]))
            self._arena.demoted(gone)
            self.left(gone, evicted=True)
        self._arena.waiting.wake(ROOM)
        lower.call_ended()

    def _ended_below(self, lower: Lower, write: _Write, *, well: bool) -> bool:
        """Whether the block can be read below now."""
        below, transfer = write.below, write.transfer
        lower.writing_blocks -= 1
        lower.writing_bytes -= below.length
        del self._writes[below]
        slot = lower.directory.let_go(below)
        if transfer.dropped and not write.forgotten:
            lower.tier.forget([transfer.record])
        if slot is None and well and not transfer.refused:
            below.checksum, below.record = transfer.checksum, transfer.record
            write.block.checksum = transfer.checksum
            lower.directory.seal([below])
            return True
        lower.counters.refused_blocks += transfer.refused
        lower.room.free(lower.directory.abort(below) if slot is None else slot)
        return False

    def _ended_above(self, lower: Lower, write: _Write) -> bool:
        """Whether the block has left the arena with that."""
        directory, block = self._arena.directory, write.block
        if write.generation is not None:
            self._leaving_bytes -= block.slot.length
            block.shelf.account.leaving_bytes -= block.length
            self._count_left(write.parent)
        slot = directory.let_go(block)
        block.owed -= write.owed
        if slot is not None:  # it was removed meanwhile
            self._arena.room.free(slot)
            return False
        if write.below.state is State.SEALED and write.generation is not None:
            left, slot = directory.finish_demotion(block, write.generation)
            if left:
                self._arena.room.free(slot)
                return True
        elif block.state is State.DEMOTING:
            directory.resume(block)
        again = block.state is State.SEALED and not write.transfer.refused
        if again and self._destination([lower], block) is lower:
            self._enter(lower, block)  # it could not be written: once more
        directory.policy.freed([block])
        return False

    def _count_left(self, parent: Block | None) -> None:
        if parent is not None:
            self._leaving_children[parent] -= 1
            if self._leaving_children[parent] == 0:
                del self._leaving_children[parent]
