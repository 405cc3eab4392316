"""Promotion: blocks that readers wait for, copied from the tiers below into slots of the arena.

A load is begun once, however many wait for it, and belongs to nobody: a reader whose time is over leaves it
running, and the next one finds the block.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from kvstore.fitting import LineFit
from kvstore.node.accounts import Account, Together
from kvstore.node.arena import ROOM, Arena
from kvstore.node.blocks import Block, Shelf, State
from kvstore.node.lower import Lower
from tiers.base import Transfer

Shelves = tuple[Shelf, ...]

# Read by one call: what is smaller shares it, so that hand-overs between threads do not outweigh the reading.
_CALL_BYTES: Final = 1 << 20
# Of the arena, being loaded at a time by all clients together.
_LOADING_FRACTION: Final = 0.25


@dataclass(slots=True)
class _Batch:
    """What was asked of a tier at once, and how many of its calls are still to end.

    It is what a reader waits for, others' calls before it included. Of four readers at once a line through
    such points foretells 0.5 to 1.4 of what each sees; one through calls 0.3 to 1.7, and one through all
    bytes that had been asked for by then 0.2 to 0.5.
    """

    nbytes: int
    began_s: float
    calls: int = 0
    well: bool = True

    def call_ended(self, line: LineFit, *, well: bool) -> None:
        """The last one of those that all went well gives a point."""
        self.calls -= 1
        self.well &= well
        if self.well and not self.calls:
            line.observe(self.nbytes, time.monotonic() - self.began_s)


@dataclass(frozen=True, slots=True)
class _Load:
    block: Block
    generation: int
    source: Block
    transfer: Transfer


class Promoter:
    """Loads into an arena from the tiers below it, fastest first.

    `promoted` is told of what has arrived, `wanted` of how many bytes found no room, and whose.
    """

    def __init__(
        self,
        arena: Arena,
        lowers: Sequence[Lower],
        *,
        promoted: Callable[[Lower, Sequence[Block]], None],
        wanted: Callable[[int, Account], None],
    ) -> None:
        self._arena = arena
        self._lowers = tuple(lowers)
        self._promoted = promoted
        self._wanted = wanted
        self._queues: dict[Lower, deque[tuple[list[_Load], _Batch]]] = {lower: deque() for lower in lowers}
        # Of each tier, so that one which hangs keeps no other from loading.
        loading_bytes = arena.tier.capacity_bytes * _LOADING_FRACTION
        self._loading_bytes_max = int(loading_bytes / max(1, len(lowers)))
        self.loading: set[asyncio.Task[None]] = set()

    def source(self, shelves: Shelves, key: bytes) -> tuple[Lower, Block] | None:
        """The tier below from which the block is expected first, of those that can be asked for it."""
        found = [
            (lower, block)
            for lower, shelf in zip(self._lowers, shelves[1:], strict=True)
            if (block := lower.readable(shelf, key)) is not None
        ]
        if len(found) < 2:
            return found[0] if found else None
        return min(found, key=lambda pair: pair[0].expected_s(pair[1].length))

    def load(self, items: Sequence[tuple[Shelves, bytes]], bytes_max: int, leased: Sequence[Block]) -> None:
        """Begin to load what of these is below and not on its way, in their order, as far as there is room.

        Only as many of the items count as have `bytes_max` together, and keep their salts' quotas beside what
        is `leased`; what of those is in the arena already is not evicted for the others.
        """
        arena, directory = self._arena, self._arena.directory
        kept, sources = self._within(items, bytes_max, Together(leased))
        directory.pin(kept)
        arena.room.begin()
        calls: dict[Lower, list[_Load]] = {}
        for lower, source, shelf in sources:
            if source.key in shelf.pending:  # asked for twice
                continue
            lower.directory.requested([source])
            if not self._may_load(lower, source.length):
                break
            load = self._begin(lower, source, shelf)
            if load is None:
                self._wanted(source.length, shelf.account)
                break
            lower.counters.hit_blocks += 1
            for other in self._lowers:
                if other is not lower:
                    other.pace.passed_over()
            calls.setdefault(lower, []).append(load)
        directory.unpin(kept)
        arena.settle()
        for lower, loads in calls.items():
            self._enqueue(lower, loads)
            self.pump(lower)

    def pump(self, lower: Lower) -> None:
        """Begin as many calls as there may be."""
        queue = self._queues[lower]
        while queue and lower.may_read():
            loads, batch = queue.popleft()
            lower.queued_reads -= 1
            lower.reading += 1
            task = asyncio.get_running_loop().create_task(self._run(lower, loads, batch))
            self.loading.add(task)
            task.add_done_callback(self.loading.discard)

    def give_up_queued(self, lower: Lower) -> None:
        """The tier fails: what has not begun will not, and those who wait for it are told."""
        queue = self._queues[lower]
        while queue:
            loads, _ = queue.popleft()
            lower.queued_reads -= 1
            self._end(lower, loads, well=False)

    def give_up(self, block: Block) -> None:
        """Nobody is to see what this load brings."""
        self._arena.directory.give_up(block)
        self._arena.waiting.wake(block)

    def _within(
        self, items: Sequence[tuple[Shelves, bytes]], bytes_max: int, together: Together
    ) -> tuple[list[Block], list[tuple[Lower, Block, Shelf]]]:
        """What of the leading items is in the arena, and what is below; of no more than `bytes_max`."""
        kept: list[Block] = []
        sources: list[tuple[Lower, Block, Shelf]] = []
        for shelves, key in items:
            arena = shelves[0]
            block = arena.sealed.get(key)
            found = None
            if block is None and key not in arena.pending:
                found = self.source(shelves, key)
            there = block or (found[1] if found is not None else arena.pending.get(key))
            if there is None or not together.fits(arena.account, there.length):
                continue
            bytes_max -= there.length
            if bytes_max < 0:
                break
            if block is not None:
                kept.append(block)
            elif found is not None:
                sources.append((*found, arena))
        return kept, sources

    def _may_load(self, lower: Lower, length: int) -> bool:
        return lower.loading_bytes == 0 or lower.loading_bytes + length <= self._loading_bytes_max

    def _begin(self, lower: Lower, source: Block, shelf: Shelf) -> _Load | None:
        slot = self._arena.room.take(source.length, shelf.account)
        if slot is None:
            return None
        directory = self._arena.directory
        parent = None if source.parent is None else shelf.resident(source.parent.key)
        block = directory.add(shelf, source.key, source.length, slot, State.LOADING, parent)
        slot.owner = block
        directory.hold([block])
        lower.directory.pin([source])
        lower.loading_bytes += source.length
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

    def _enqueue(self, lower: Lower, loads: list[_Load]) -> None:
        nbytes = sum([load.source.length for load in loads])
        share = max(1, nbytes // lower.rules.jobs)
        call: list[_Load] = []
        call_bytes = 0
        batch = _Batch(nbytes, time.monotonic())
        for load in loads:
            call.append(load)
            call_bytes += load.source.length
            if call_bytes >= min(share, _CALL_BYTES) or load is loads[-1]:
                lower.calls += 1
                lower.queued_reads += 1
                batch.calls += 1
                self._queues[lower].append((call, batch))
                call, call_bytes = [], 0

    async def _run(self, lower: Lower, loads: list[_Load], batch: _Batch) -> None:
        def late() -> None:
            for load in loads:
                if load.block.state is State.LOADING:
                    self.give_up(load.block)

        operation = lower.tier.read([load.transfer for load in loads])
        started = time.monotonic()
        read_bytes = sum([load.source.length for load in loads])
        well = await lower.attempt(operation, lower.reads, late, nbytes=read_bytes)
        if well:
            lower.pace.observe(read_bytes, time.monotonic() - started, lower.reading)
        batch.call_ended(lower.line, well=well)
        lower.reading -= 1
        self._end(lower, loads, well=well)
        lower.call_ended()

    def _end(self, lower: Lower, loads: list[_Load], *, well: bool) -> None:
        """What was read can be read by all, or those who wait for it are told that it is not there."""
        lower.unpin([load.source for load in loads])
        lower.calls -= 1
        arrived = [load.block for load in loads if self._ended(lower, load, well=well)]
        if arrived:
            self._arena.directory.requested(arrived)
            self._arena.announce_sealed(arrived)
            lower.counters.read_blocks += len(arrived)
            lower.counters.read_bytes += sum([block.length for block in arrived])
        if well:
            damaged = [load.source for load in loads if load.transfer.damaged]
            lower.damaged([source for source in damaged if source.state is State.SEALED])
            missing = [load.source for load in loads if load.transfer.missing]
            lower.missing([source for source in missing if source.state is State.SEALED])
        # Readers first: what they have waited for is not to leave again before they have it.
        for load in loads:
            self._arena.waiting.wake(load.block)
        self._arena.waiting.wake(ROOM)
        self._promoted(lower, arrived)

    def _ended(self, lower: Lower, load: _Load, *, well: bool) -> bool:
        """End one load's copy; whether its block can be read now."""
        directory, block = self._arena.directory, load.block
        lower.loading_bytes -= block.length
        slot = directory.let_go(block)
        if slot is None and well and load.transfer.arrived:
            if directory.finish(block, load.generation):
                block.checksum = load.transfer.checksum
                return True
        elif slot is None and block.state is State.LOADING:
            slot = directory.abort(block)
        if slot is not None:
            self._arena.room.free(slot)
        return False
