"""Runs of neighbouring slots: what has to leave so that a slot of a wanted length can be. Pure."""

from collections.abc import Callable, Iterator

from kvstore.node.blocks import Block, idle
from tiers.base import Slot


class Window:
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

    def grow(self, wanted: int, may_enter: Callable[["Window", Block], bool]) -> bool:
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

    def _passable(self, slot: Slot, may_enter: Callable[["Window", Block], bool]) -> bool:
        block = slot.owner
        if block is None:
            return True
        # A slot's owner that is no block is somebody who must not be disturbed.
        return isinstance(block, Block) and idle(block) and may_enter(self, block)

    def _dispensable(self, slot: Slot, wanted: int, blocks: set[Block]) -> bool:
        block = slot.owner
        # A block cannot stay whose parent leaves.
        return self.size - slot.length >= wanted and (block is None or block.parent not in blocks)


class Condemned:
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
            passed_over = parent is not None and parent.stamp <= next_one.stamp and self.may_leave(parent)
            next_one = parent if passed_over else None

    def coldest(self, victims: Iterator[Block]) -> Iterator[Block]:
        """All that may leave together, of the victims that `may_leave` allows; each is to be condemned."""
        for victim in victims:
            yield from self.with_ancestors(victim)
        # What only those have kept, however young.
        below = list(self.order)
        while below:
            parent = below.pop().parent
            if parent is not None and parent not in self.order and self.may_leave(parent):
                yield parent
                below.append(parent)

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
