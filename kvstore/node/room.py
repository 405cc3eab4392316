"""Slots for blocks: taken from a slot tier and given back, and room made where there is none.

Blocks of many sizes share an arena, so the policy's coldest block rarely lies where a slot of the wanted
length could be. The planner looks at the coldest blocks and grows a window by address around each, over
free memory and evictable neighbours, and evicts the window that costs least. Where enough memory is free
but in pieces, it moves what lies between two pieces instead, a bounded number of bytes a request.

It decides and changes the directory and the tier; it runs on the event loop, so all it does is bounded.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Final, cast

from kvstore.node.blocks import Block, evictable, idle
from kvstore.node.directory import TierDirectory
from tiers.base import Slot, SlotTier, Space

# Moved by one request at most, copied on the event loop: 8 MiB take about 1.2 ms.
MOVE_BYTES_MAX: Final = 8 << 20
# Memory free in pieces is worth moving blocks for when it is more than one part in this many.
_MOVE_WHEN_FREE: Final = 50
# Places looked at for joining pieces, and blocks around which a window is grown when time is short.
_SEEDS: Final = 16
# Blocks looked at by one request, under 1 us each. A slot of 64 MiB among blocks of all sizes takes some
# hundreds, one of the usual length a single one.
_STEPS_MAX: Final = 8192


@dataclass(frozen=True, slots=True)
class RoomStatistics:
    """What making room has cost since start."""

    evicted_blocks: int
    evicted_bytes: int
    moved_blocks: int
    moved_bytes: int


class Room:
    """Gives out slots of a space, be it memory or a file.

    `evicted` collects the blocks that have left since `begin`; the caller announces them before it tells
    anyone of the slots. `debug` poisons freed slots and uses them again as late as it can, so that whoever
    reads after release or writes after commit is found; `late_bytes` are in the slots that it holds back.
    `memory` is the space again where its bytes can be moved and poisoned.
    """

    def __init__(
        self, space: Space, directory: TierDirectory, *, memory: SlotTier | None = None, debug: bool = False
    ) -> None:
        self._space = space
        self._memory = memory
        self._directory = directory
        self._debug = debug
        self._late: deque[Slot] = deque()  # freed slots that debug holds back
        self.late_bytes = 0
        self._populated = memory is None
        self.evicted: list[Block] = []
        self._move_bytes_left = self._steps_left = 0
        self._evicted_blocks = self._evicted_bytes = self._moved_blocks = self._moved_bytes = 0

    def begin(self) -> None:
        """Start a request: its bounds are whole again, and nothing has been evicted for it."""
        self.evicted = []
        self._move_bytes_left = MOVE_BYTES_MAX
        self._steps_left = _STEPS_MAX

    def take(self, length: int) -> Slot | None:
        """A slot of `length` bytes, owned by this room until the caller says otherwise; None without room.

        While the tier's memory is still being populated nobody has to leave: a little later there is room.
        """
        slot = self._take(length)
        while slot is None and self._late:
            # A few tries, not one for each small slot: the arena may be full of them.
            kept_bytes = self.late_bytes - max(length, self.late_bytes // 4)
            while self._late and self.late_bytes > kept_bytes:
                self._free_oldest()
            slot = self._take(length)
        return slot

    def free(self, slot: Slot) -> None:
        """Give a slot back."""
        if not self._debug or self._memory is None:
            self._space.free(slot)
            return
        self._memory.poison(slot)
        slot.owner = self
        self._late.append(slot)
        self.late_bytes += slot.length
        while self.late_bytes > self._space.capacity_bytes // 8:
            self._free_oldest()

    def grow(self, ready_bytes: int) -> None:
        """The memory is populated up to here."""
        assert self._memory is not None
        self._memory.grow(ready_bytes)
        self._populated = ready_bytes == self._memory.capacity_bytes

    def statistics(self) -> RoomStatistics:
        """Totals since start."""
        return RoomStatistics(
            self._evicted_blocks, self._evicted_bytes, self._moved_blocks, self._moved_bytes
        )

    def _take(self, length: int) -> Slot | None:
        slot = self._space.take(length, self)
        if slot is not None or not self._populated:
            return slot
        wanted = self._space.slot_length(length)
        worth = max(wanted, self._space.capacity_bytes // _MOVE_WHEN_FREE)
        if self._memory is not None and self._space.free_bytes >= worth:
            hole = self._compacted(self._memory, wanted)
            if hole is not None:
                return self._space.take(length, self, hole)
        coldest = self._coldest()
        if coldest is not None and coldest.slot.length == wanted:
            return self._evicted(coldest)
        window = self._window(wanted)
        return None if window is None else self._space.take(length, self, self._emptied(window))

    def _free_oldest(self) -> None:
        slot = self._late.popleft()
        self.late_bytes -= slot.length
        self._space.free(slot)

    # Evicting.

    def _window(self, wanted: int) -> "_Window | None":
        """The window to evict: the one whose youngest block is oldest, where that can be found in time."""
        condemned = _Condemned()
        for victim in self._directory.policy.victims(condemned.may_leave):
            for block in condemned.with_ancestors(cast(Block, victim)):
                self._steps_left -= 1
                first, last, size = condemned.add(block)
                if size >= wanted:
                    window = _Window(first)
                    window.extend(last)
                    window.blocks.sort(key=condemned.order.__getitem__)
                    window.trim(wanted)
                    condemned.add_descendants(window.blocks)
                    return window
            if self._steps_left <= 0:
                break
        return self._nearest_window(wanted)

    def _nearest_window(self, wanted: int) -> "_Window | None":
        """The first window around one of the coldest blocks, however young its neighbours."""
        seeds = islice(self._directory.policy.victims(evictable), _SEEDS)
        for block in seeds:
            window = _Window(cast(Block, block).slot)
            if window.grow(wanted, _Window.may_evict):
                window.trim(wanted)
                return window
        return None

    def _coldest(self) -> Block | None:
        return cast("Block | None", next(self._directory.policy.victims(evictable), None))

    def _emptied(self, window: "_Window") -> Slot:
        """Evict the window's blocks, children before parents; the answer is the free slot left."""
        hole = window.slots()[0]
        for block in window.blocks:
            hole = self._space.free(self._evicted(block))
        return hole

    def _evicted(self, block: Block) -> Slot:
        """Evict one block; its slot is this room's, neither free nor given out."""
        self._evicted_blocks += 1
        self._evicted_bytes += block.length
        self.evicted.append(block)
        slot = cast(Slot, self._directory.evict(block))
        slot.owner = self
        if self._debug and self._memory is not None:
            self._memory.poison(slot)
        return slot

    # Moving.

    def _compacted(self, memory: SlotTier, wanted: int) -> Slot | None:
        """Join free pieces by moving the blocks between them; None when no cheap enough place is there."""
        for hole in self._space.largest(_SEEDS):
            window = _Window(hole)
            grown = window.grow(wanted, lambda w, b: w.block_bytes + b.slot.length <= self._move_bytes_left)
            self._steps_left -= len(window.blocks)
            if grown:
                # Only once: having tried, other free slots may no longer be what they were.
                return self._moved_away(memory, window)
            if self._steps_left <= 0:
                break
        return None

    def _moved_away(self, memory: SlotTier, window: "_Window") -> Slot | None:
        # Take the window's own free pieces, so that nothing moves into them.
        pieces = [memory.take(s.length, window, s) for s in window.slots() if s.owner is None]
        targets: list[Slot] = []
        for block in window.blocks:
            target = memory.take(block.slot.length, window)
            if target is None:
                break
            targets.append(target)
        fits = len(targets) == len(window.blocks)
        if fits:
            for block, target in zip(window.blocks, targets, strict=True):
                memory.move(block.slot, target)
                pieces.append(block.slot)
                block.slot, target.owner = target, block
                self._moved_blocks += 1
                self._moved_bytes += block.length
                self._move_bytes_left -= target.length
        else:
            pieces.extend(targets)
        joined: Slot | None = None
        for piece in pieces:
            assert piece is not None
            joined = memory.free(piece)
        return joined if fits else None


class _Window:
    """A run of neighbouring slots, grown from one: `blocks` are those on it, in the order they entered."""

    __slots__ = ("_children_inside", "_first", "_last", "block_bytes", "blocks", "size")

    def __init__(self, seed: Slot) -> None:
        self._first = self._last = seed
        self.size = 0
        self.block_bytes = 0
        self.blocks: list[Block] = []
        self._children_inside: dict[Block, int] = {}
        self._enter(seed)

    def may_evict(self, block: Block) -> bool:
        """No resident block outside the window may continue a block that leaves with it, and none be owed."""
        return block.owed == 0 and block.children == self._children_inside.get(block, 0)

    def grow(self, wanted: int, may_enter: Callable[["_Window", Block], bool]) -> bool:
        """Extend to either side until `wanted` bytes are inside; False when pins or `may_enter` stop it."""
        while self.size < wanted:
            sides = [
                slot
                for slot in (self._first.before, self._last.after)
                if slot is not None and self._passable(slot, may_enter)
            ]
            if not sides:
                return False
            # Free memory first, for it costs nothing; then what costs less.
            chosen = min(sides, key=lambda slot: 0 if slot.owner is None else slot.length)
            if chosen is self._first.before:
                self._first = chosen
            else:
                self._last = chosen
            self._enter(chosen)
        return True

    def extend(self, last: Slot) -> None:
        """Take in all slots up to `last`, which lies after."""
        while self._last is not last:
            assert self._last.after is not None
            self._last = self._last.after
            self._enter(self._last)

    def trim(self, wanted: int) -> None:
        """Spare blocks at either end that need not leave, the younger first."""
        blocks = set(self.blocks)
        while True:
            ends = [s for s in {self._first, self._last} if self._dispensable(s, wanted, blocks)]
            if not ends:
                break
            end = max(ends, key=lambda slot: slot.owner.stamp if slot.owner is not None else 0)
            if end is self._first and end.after is not None:
                self._first = end.after
            elif end.before is not None:
                self._last = end.before
            self.size -= end.length
            if end.owner is not None:
                self.block_bytes -= end.length
                blocks.remove(end.owner)
        self.blocks = [block for block in self.blocks if block in blocks]

    def slots(self) -> list[Slot]:
        """All slots by address."""
        slots, slot = [self._first], self._first
        while slot is not self._last and slot.after is not None:
            slot = slot.after
            slots.append(slot)
        return slots

    def _enter(self, slot: Slot) -> None:
        self.size += slot.length
        block = slot.owner
        if block is not None:
            self.blocks.append(block)
            self.block_bytes += slot.length
            if block.parent is not None:
                inside = self._children_inside
                inside[block.parent] = inside.get(block.parent, 0) + 1

    def _passable(self, slot: Slot, may_enter: Callable[["_Window", Block], bool]) -> bool:
        block = slot.owner
        if block is None:
            return True
        # A slot's owner that is no block is somebody who must not be disturbed.
        return isinstance(block, Block) and idle(block) and may_enter(self, block)

    def _dispensable(self, slot: Slot, wanted: int, blocks: set[Block]) -> bool:
        block = slot.owner
        # A block cannot stay whose parent leaves.
        return self.size - slot.length >= wanted and (block is None or block.parent not in blocks)


class _Condemned:
    """Blocks in the order in which the policy gives them up, joined into runs of neighbours as they come.

    The first run that is long enough is the best there is: any other would need a younger block.
    """

    def __init__(self) -> None:
        self.order: dict[Block, int] = {}
        self._children: dict[Block, int] = {}
        # The far end and the size of each run, by its end.
        self._from_first: dict[Slot, tuple[Slot, int]] = {}
        self._from_last: dict[Slot, tuple[Slot, int]] = {}

    def may_leave(self, block: Block) -> bool:
        """As `evictable`, were all that is condemned gone."""
        return idle(block) and block.owed == 0 and block.children == self._children.get(block, 0)

    def with_ancestors(self, block: Block) -> Iterator[Block]:
        """The block, and after it those that the policy gave up before it and only it has kept."""
        next_one: Block | None = block
        while next_one is not None and next_one not in self.order:
            yield next_one  # and is condemned
            parent = next_one.parent
            passed_over = parent is not None and parent.stamp < next_one.stamp and self.may_leave(parent)
            next_one = parent if passed_over else None

    def add_descendants(self, blocks: list[Block]) -> None:
        """Put in front of `blocks` those that continue them and lie elsewhere: they cannot stay alone."""
        leaving = set(blocks)
        elsewhere = []
        for block in reversed(self.order):
            if block.parent in leaving and block not in leaving:
                leaving.add(block)
                elsewhere.append(block)
        blocks[:0] = reversed(elsewhere)

    def add(self, block: Block) -> tuple[Slot, Slot, int]:
        """Condemn a block; first slot, last slot and size of the run that it is in now."""
        self.order[block] = len(self.order)
        if block.parent is not None:
            self._children[block.parent] = self._children.get(block.parent, 0) + 1
        first = last = block.slot
        size = first.length
        while (slot := first.before) is not None:
            # Runs before free slots: a run may end with one, which must not count twice.
            if slot in self._from_last:
                first, more = self._from_last[slot]
                size += more
            elif slot.owner is None:
                first, size = slot, size + slot.length
            else:
                break
        while (slot := last.after) is not None:
            if slot in self._from_first:
                last, more = self._from_first[slot]
                size += more
            elif slot.owner is None:
                last, size = slot, size + slot.length
            else:
                break
        self._from_first[first] = last, size
        self._from_last[last] = first, size
        return first, last, size
