"""Slots for blocks: taken from a slot tier and given back, and room made where there is none.

Blocks of many sizes share an arena, so the policy's coldest block rarely lies where a slot of the wanted
length could be. The planner looks at the coldest blocks and grows a window by address around each, over
free memory and evictable neighbours, and evicts the window that costs least. Where enough memory is free
but in pieces, it moves what lies between two pieces instead, a bounded number of bytes a request.

It decides and changes the directory and the tier; it runs on the event loop, so all it does is bounded.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Final, cast

from kvstore.node.accounts import Account
from kvstore.node.blocks import Block, evictable
from kvstore.node.directory import TierDirectory
from kvstore.node.policy import Policy
from kvstore.node.window import Condemned, Window
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
    `memory` is the space again where its bytes can be moved and poisoned. `limit_bytes` may be set to less
    than the space has: then blocks leave although memory is free.
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
        self.limit_bytes = space.capacity_bytes
        self._unready_bytes = 0 if memory is None else space.capacity_bytes - memory.statistics().ready_bytes
        self.evicted: list[Block] = []
        self._move_bytes_left = self._steps_left = 0
        self._evicted_blocks = self._evicted_bytes = self._moved_blocks = self._moved_bytes = 0

    def begin(self) -> None:
        """Start a request: its bounds are whole again, and nothing has been evicted for it."""
        self.evicted = []
        self._move_bytes_left = MOVE_BYTES_MAX
        self._steps_left = _STEPS_MAX

    def take(self, length: int, account: Account | None = None) -> Slot | None:
        """A slot of `length` bytes, owned by this room until the caller says otherwise; None without room.

        While the tier's memory is still being populated nobody has to leave: a little later there is room.
        A block of an `account` at its quota makes room among those of its own salt first.
        """
        limited = account is not None and account.quota_bytes is not None
        if limited and not self._within_quota(cast(Account, account), length):
            return None
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

    def shed(self, blocks_max: int) -> None:
        """Evict about so many blocks of salts that are above their quotas, coldest first."""
        accounts = self._directory.accounts
        accounts.enter(blocks_max)
        for account in list(accounts.over):
            while account.excess_bytes() and blocks_max > 0:
                blocks_max -= 1
                if not self._evict_own(account, 1):
                    break
            if not account.excess_bytes(account.wanted_bytes):
                del accounts.over[account]

    def grow(self, ready_bytes: int) -> None:
        """The memory is populated up to here."""
        assert self._memory is not None
        self._memory.grow(ready_bytes)
        self._unready_bytes = self._memory.capacity_bytes - ready_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes of slots that are not free; what debug holds back counts as free."""
        return self._space.capacity_bytes - self._unready_bytes - self._space.free_bytes - self.late_bytes

    def shrink(self, blocks_max: int) -> bool:
        """Evict about so many blocks of what is used beyond the limit, coldest first; whether any left.

        It is a request of its own: what left is to be announced.
        """
        self.begin()
        while blocks_max > 0 and self.used_bytes > self.limit_bytes:
            blocks_max -= 1
            if not self._evict_of(self._directory.policy, 1):
                break
        return bool(self.evicted)

    def statistics(self) -> RoomStatistics:
        """Totals since start."""
        return RoomStatistics(
            self._evicted_blocks, self._evicted_bytes, self._moved_blocks, self._moved_bytes
        )

    def _take(self, length: int) -> Slot | None:
        wanted = self._space.slot_length(length)
        if self.limit_bytes < self._space.capacity_bytes and not self._within_limit(wanted):
            return None
        slot = self._space.take(length, self)
        if slot is not None or self._unready_bytes:
            return slot
        worth = max(wanted, self._space.capacity_bytes // _MOVE_WHEN_FREE)
        if self._memory is not None and self._space.free_bytes >= worth:
            hole = self._compacted(self._memory, wanted)
            if hole is not None:
                return self._space.take(length, self, hole)
        coldest = self._coldest()
        if coldest is not None and coldest.slot.length == wanted:
            return self._evicted(coldest)
        window = self._window(wanted)
        if window is None:
            return None
        hole = window.slots()[0]
        return self._space.take(length, self, self._emptied(window.blocks) or hole)

    def _within_limit(self, wanted: int) -> bool:
        """Whether so many bytes more may be used, for which the coldest blocks leave if need be."""
        excess_bytes = self.used_bytes + wanted - self.limit_bytes
        if wanted > self.limit_bytes:
            return False
        return excess_bytes <= 0 or self._evict_of(self._directory.policy, excess_bytes)

    def _free_oldest(self) -> None:
        slot = self._late.popleft()
        self.late_bytes -= slot.length
        self._space.free(slot)

    # Quotas.

    def _within_quota(self, account: Account, length: int) -> bool:
        """Whether the salt may have `length` bytes more, for which its coldest blocks leave if need be."""
        if account.quota_bytes is None:
            return True
        excess_bytes = account.excess_bytes(length)
        if length > account.quota_bytes or (excess_bytes and not self._evict_own(account, excess_bytes)):
            return False
        account.wanted_bytes = 0
        return True

    def _evict_own(self, account: Account, nbytes: int) -> bool:
        """`_evict_of` a salt's blocks."""
        return account.order is not None and self._evict_of(account.order, nbytes)

    def _evict_of(self, order: Policy, nbytes: int) -> bool:
        """Evict the coldest blocks, `nbytes` or a little more; False, and none, if they cannot leave."""
        condemned = Condemned()
        for block in condemned.coldest(cast(Iterator[Block], order.victims(condemned.may_leave))):
            self._steps_left -= 1
            condemned.add(block)
            nbytes -= block.length
            if nbytes <= 0:
                self._emptied(list(condemned.order))
                return True
            if self._steps_left <= 0:
                break
        return False

    # Evicting.

    def _window(self, wanted: int) -> Window | None:
        """The window to evict: the one whose youngest block is oldest, where that can be found in time."""
        condemned = Condemned()
        for victim in self._directory.policy.victims(condemned.may_leave):
            for block in condemned.with_ancestors(cast(Block, victim)):
                self._steps_left -= 1
                first, last, size = condemned.add(block)
                if size >= wanted:
                    window = Window(first)
                    window.extend(last)
                    window.blocks.sort(key=condemned.order.__getitem__)
                    window.trim(wanted)
                    condemned.add_descendants(window.blocks)
                    return window
            if self._steps_left <= 0:
                break
        return self._nearest_window(wanted)

    def _nearest_window(self, wanted: int) -> Window | None:
        """The first window around one of the coldest blocks, however young its neighbours."""
        seeds = islice(self._directory.policy.victims(evictable), _SEEDS)
        for block in seeds:
            window = Window(cast(Block, block).slot)
            if window.grow(wanted, Window.may_evict):
                window.trim(wanted)
                return window
        return None

    def _coldest(self) -> Block | None:
        return cast("Block | None", next(self._directory.policy.victims(evictable), None))

    def _emptied(self, blocks: Iterable[Block]) -> Slot | None:
        """Evict blocks, children before parents; the answer is the free slot that the last has become."""
        hole = None
        for block in blocks:
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
            window = Window(hole)
            grown = window.grow(wanted, lambda w, b: w.block_bytes + b.slot.length <= self._move_bytes_left)
            self._steps_left -= len(window.blocks)
            if grown:
                # Only once: having tried, other free slots may no longer be what they were.
                return self._moved_away(memory, window)
            if self._steps_left <= 0:
                break
        return None

    def _moved_away(self, memory: SlotTier, window: Window) -> Slot | None:
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
