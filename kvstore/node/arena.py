"""What verbs and movements share: the slots that clients map, and the directory of what lies there."""

from collections.abc import Callable, Sequence
from typing import Protocol

from kvstore.node.blocks import Block
from kvstore.node.directory import TierDirectory
from kvstore.node.origin import Origin
from kvstore.node.room import Room
from kvstore.node.waiting import Waiting
from kvstore.statistics import TierCounters
from tiers.base import Slot, SlotTier

ROOM = "room"  # what those wait for who need a slot


class Listener(Protocol):
    """Where the life of blocks comes out: after seal, and before a slot is used again."""

    def sealed(self, tier: str, blocks: Sequence[Block], origin: Origin | None) -> None:
        """These blocks, in the order of their prefix, are readable in the tier from now on.

        `origin` is there when their writer has committed them: what it said of them.
        """

    def removed(self, tier: str, blocks: Sequence[Block]) -> None:
        """These blocks are readable in the tier no longer."""


class Arena:
    """A slot tier, its blocks, who waits for them, and who is told of them. `debug` is for `Room`.

    Listeners may join `listeners` while no block is there yet.
    """

    def __init__(
        self, tier: SlotTier, directory: TierDirectory, listeners: Sequence[Listener], *, debug: bool
    ) -> None:
        self.tier = tier
        self.directory = directory
        self.room = Room(tier, directory, memory=tier, debug=debug)
        self.waiting = Waiting()
        self._listeners = listeners
        self.counters = TierCounters()
        self.evicted_stamp = 0  # of the block that left last
        self._on_evicted: list[Callable[[Sequence[Block]], None]] = []

    def on_evicted(self, call: Callable[[Sequence[Block]], None]) -> None:
        """Call this with the blocks that had to leave, once they have."""
        self._on_evicted.append(call)

    def settle(self) -> None:
        """Announce what left since `room.begin`, before anyone is told of the slots."""
        if self.room.evicted:
            self._count_evicted(self.room.evicted)
            self.announce_removed(self.room.evicted)
            for call in self._on_evicted:
                call(self.room.evicted)

    def demoted(self, blocks: Sequence[Block]) -> None:
        """Count and announce what left because it is below now; nobody has its slots yet."""
        self._count_evicted(blocks)
        self.announce_removed(blocks)

    def announce_sealed(self, blocks: Sequence[Block], origin: Origin | None = None) -> None:
        """Tell the listeners."""
        for listener in self._listeners:
            listener.sealed(self.directory.name, blocks, origin)

    def announce_removed(self, blocks: Sequence[Block]) -> None:
        """Tell the listeners."""
        for listener in self._listeners:
            listener.removed(self.directory.name, blocks)

    def free(self, slots: Sequence[Slot]) -> None:
        """Give slots back and wake those who wait for room."""
        for slot in slots:
            self.room.free(slot)
        self.waiting.wake(ROOM)

    @property
    def used_bytes(self) -> int:
        """Bytes of slots that are not free; what debug holds back counts as free."""
        return self.room.used_bytes

    def _count_evicted(self, blocks: Sequence[Block]) -> None:
        self.counters.evicted_blocks += len(blocks)
        self.counters.evicted_bytes += sum([block.length for block in blocks])
        self.evicted_stamp = blocks[-1].stamp
