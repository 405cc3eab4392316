"""The contracts of tiers: bytes in, bytes out. A tier knows no client, no lease and no other tier.

A `SlotTier` is memory that clients map: the store gives its slots out and readers look at them in place.
Which block goes where is the tier's; which blocks leave to make room is the store's.
"""

from dataclasses import dataclass
from typing import Any, Protocol

from kvstore.block import Medium


@dataclass(frozen=True, slots=True)
class TierStatistics:
    """Bytes of one tier. `used_bytes` counts whole slots, `ready_bytes` what can be given out by now."""

    name: str
    medium: str
    capacity_bytes: int
    ready_bytes: int
    used_bytes: int
    largest_free_bytes: int


class Tier(Protocol):
    """What all tiers have."""

    name: str
    medium: Medium
    capacity_bytes: int

    def statistics(self) -> TierStatistics:
        """Bytes now."""

    def check(self) -> list[str]:
        """Recount everything; each line says what is wrong."""

    def close(self) -> None:
        """Give the memory or the files back. Nothing else may be called after."""


class Slot:
    """A contiguous piece of an arena, and its neighbours by address. Free when `owner` is None."""

    __slots__ = ("after", "before", "length", "offset", "owner")

    def __init__(self, offset: int, length: int) -> None:
        self.offset = offset
        self.length = length
        self.owner: Any = None
        self.before: Slot | None = None
        self.after: Slot | None = None

    def __repr__(self) -> str:
        return f"<{self.offset:#x}+{self.length:#x} {'free' if self.owner is None else self.owner}>"


class SlotTier(Tier, Protocol):
    """Memory given out in contiguous slots of any length, rounded up to the tier's alignment."""

    arena: int

    def open(self, *, writable: bool) -> int:
        """A new descriptor of the memory, for a client to map; the caller closes it."""

    def slot_length(self, length: int) -> int:
        """The length of the slot that a block of `length` bytes takes."""

    def take(self, length: int, owner: object, within: Slot | None = None) -> Slot | None:
        """Take a slot from free memory, from the free slot `within` if given; None when nothing fits."""

    def free(self, slot: Slot) -> Slot:
        """Give a slot back; the answer is the free slot it has become part of."""

    def move(self, slot: Slot, to: Slot) -> None:
        """Copy a slot's bytes to a taken slot that is no shorter. No lease may be looking at either."""

    def poison(self, slot: Slot) -> None:
        """Overwrite the slot, so that whoever still looks at it notices."""

    def grow(self, ready_bytes: int) -> None:
        """Give out memory up to here."""

    def view(self, slot: Slot) -> memoryview:
        """The slot's bytes, writable; valid until the slot is freed."""

    def largest(self, count: int) -> list[Slot]:
        """Up to `count` of the largest free slots."""

    @property
    def free_bytes(self) -> int:
        """Bytes free, in pieces."""
