"""Promotion: blocks that readers wait for, copied from the tiers below into slots of the arena.

A load is begun once, however many wait for it, and belongs to nobody: a reader whose time is over leaves it
running, and the next one finds the block.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from kvstore.node.arena import ROOM, Arena
from kvstore.node.blocks import Block, Shelf, State
from kvstore.node.lower import Lower
from tiers.base import Transfer

Shelves = tuple[Shelf, ...]

# Read by one call: what is smaller shares it, so that hand-overs between threads do not outweigh the reading.
_CALL_BYTES: Final = 1 << 20
# Of the arena, being loaded at a time by all clients together.
_LOADING_FRACTION: Final = 0.25


@dataclass(frozen=True, slots=True)
class _Load:
    block: Block
    generation: int
    source: Block
    transfer: Transfer


class Promoter:
    """Loads into an arena from the tiers below it, fastest first.

    `promoted` is told of what has arrived, `wanted` of how many bytes found no room.
    """

    def __init__(
        self,
        arena: Arena,
        lowers: Sequence[Lower],
        *,
        promoted: Callable[[Lower, Sequence[Block]], None],
        wanted: Callable[[int], None],
    ) -> None:
        self._arena = arena
        self._lowers = tuple(lowers)
        self._promoted = promoted
        self._wanted = wanted
        self._loading_bytes = 0
        self._loading_bytes_max = int(arena.tier.capacity_bytes * _LOADING_FRACTION)
        self.loading: set[asyncio.Task[None]] = set()

    def source(self, shelves: Shelves, key: bytes) -> tuple[Lower, Block] | None:
        """The fastest tier below that has the block and can be asked for it."""
        for lower, shelf in zip(self._lowers, shelves[1:], strict=True):
            block = lower.readable(shelf, key)
            if block is not None:
                return lower, block
        return None

    def load(self, items: Sequence[tuple[Shelves, bytes]], bytes_max: int) -> None:
        """Begin to load what of these is below and not on its way, in their order, as far as there is room.

        `bytes_max` bounds what this call begins. What of the items is in the arena is not evicted for it.
        """
        arena, directory = self._arena, self._arena.directory
        kept = [block for shelves, key in items if (block := shelves[0].sealed.get(key)) is not None]
        directory.pin(kept)
        arena.room.begin()
        calls: dict[Lower, list[_Load]] = {}
        for shelves, key in items:
            if key in shelves[0].sealed or key in shelves[0].pending:
                continue
            found = self.source(shelves, key)
            if found is None:
                continue
            lower, source = found
            bytes_max -= source.length
            if bytes_max < 0 or not self._may_load(source.length):
                break
            load = self._begin(lower, source, shelves[0])
            if load is None:
                self._wanted(source.length)
                break
            lower.counters.hit_blocks += 1
            calls.setdefault(lower, []).append(load)
        directory.unpin(kept)
        arena.settle()
        for lower, loads in calls.items():
            self._start(lower, loads)

    def give_up(self, block: Block) -> None:
        """Nobody is to see what this load brings."""
        self._arena.directory.give_up(block)
        self._arena.waiting.wake(block)

    def _may_load(self, length: int) -> bool:
        return self._loading_bytes == 0 or self._loading_bytes + length <= self._loading_bytes_max

    def _begin(self, lower: Lower, source: Block, shelf: Shelf) -> _Load | None:
        slot = self._arena.room.take(source.length)
        if slot is None:
            return None
        directory = self._arena.directory
        parent = None if source.parent is None else shelf.resident(source.parent.key)
        block = directory.add(shelf, source.key, source.length, slot, State.LOADING, parent)
        slot.owner = block
        directory.hold([block])
        lower.directory.pin([source])
        self._loading_bytes += source.length
        transfer = Transfer(
            shelf.namespace,
            source.key,
            source.length,
            slot=source.slot,
            memory=self._arena.tier.view(slot),
            checksum=source.checksum,
            record=source.record,
        )
        return _Load(block, block.generation, source, transfer)

    def _start(self, lower: Lower, loads: list[_Load]) -> None:
        lower.directory.requested([load.source for load in loads])
        share = max(1, sum([load.source.length for load in loads]) // lower.rules.jobs)
        call: list[_Load] = []
        call_bytes = 0
        for load in loads:
            call.append(load)
            call_bytes += load.source.length
            if call_bytes >= min(share, _CALL_BYTES) or load is loads[-1]:
                lower.calls += 1
                task = asyncio.get_running_loop().create_task(self._run(lower, call))
                self.loading.add(task)
                task.add_done_callback(self.loading.discard)
                call, call_bytes = [], 0

    async def _run(self, lower: Lower, loads: list[_Load]) -> None:
        def late() -> None:
            for load in loads:
                if load.block.state is State.LOADING:
                    self.give_up(load.block)

        operation = lower.tier.read([load.transfer for load in loads])
        well = await lower.attempt(operation, lower.reads, late)
        lower.unpin([load.source for load in loads])
        lower.calls -= 1
        arrived = [load for load in loads if self._ended(load, well=well)]
        blocks = [load.block for load in arrived]
        if blocks:
            self._arena.directory.requested(blocks)
            self._arena.announce_sealed(blocks)
            lower.counters.read_blocks += len(blocks)
            lower.counters.read_bytes += sum([block.length for block in blocks])
        damaged = [load.source for load in loads if load.transfer.damaged]
        if damaged and well:
            lower.damaged([source for source in damaged if source.state is State.SEALED])
        self._promoted(lower, blocks)
        for load in loads:
            self._arena.waiting.wake(load.block)
        self._arena.waiting.wake(ROOM)

    def _ended(self, load: _Load, *, well: bool) -> bool:
        """End one load's copy; whether its block can be read now."""
        directory, block = self._arena.directory, load.block
        self._loading_bytes -= block.length
        slot = directory.let_go(block)
        if slot is None and well and not load.transfer.damaged:
            if directory.finish(block, load.generation):
                block.checksum = load.transfer.checksum
                return True
        elif slot is None and block.state is State.LOADING:
            slot = directory.abort(block)
        if slot is not None:
            self._arena.room.free(slot)
        return False
