"""The space of a tier whose bytes lie elsewhere: room for knowing blocks, an entry each."""

from typing import Final

from tiers.base import Slot

# What a node needs of its own memory for a block that it knows to be elsewhere (benchmarks redis).
ENTRY_BYTES: Final = 1024


class Ledger:
    """So many entries, given out as slots that have no neighbours; see `Space`."""

    def __init__(self, entries: int) -> None:
        self.capacity_bytes = entries * ENTRY_BYTES
        self._used_bytes = 0
        self._next = 0

    def slot_length(self, length: int) -> int:
        return ENTRY_BYTES

    def take(self, length: int, owner: object, within: Slot | None = None) -> Slot | None:
        if self._used_bytes == self.capacity_bytes:
            return None
        self._used_bytes += ENTRY_BYTES
        slot = Slot(self._next, ENTRY_BYTES)
        slot.owner = owner
        self._next += ENTRY_BYTES
        return slot

    def free(self, slot: Slot) -> Slot:
        slot.owner = None
        self._used_bytes -= slot.length
        return slot

    def largest(self, count: int) -> list[Slot]:
        return []

    def clear(self) -> None:
        """Nothing is taken any more; slots of before mean nothing."""
        self._used_bytes = 0

    @property
    def free_bytes(self) -> int:
        return self.capacity_bytes - self._used_bytes
