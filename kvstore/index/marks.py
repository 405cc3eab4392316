"""Marks: checksums of the last batches of a numbered stream, which tell its sender from another. Pure."""

from typing import Final
from zlib import crc32

_KEPT: Final = 256
_NONE: Final = -1
# An entry is the number's end and the checksum: 63 bits.
_SEQ_MASK: Final = (1 << 31) - 1


class Marks:
    """Of the last 256 numbers. `entries` are what to make it of again."""

    def __init__(self, entries: list[int] | None = None) -> None:
        self.entries = ((entries or []) + [_NONE] * _KEPT)[:_KEPT]

    def set(self, seq: int, payload: bytes) -> None:
        """This is the batch of that number."""
        self.entries[seq % _KEPT] = (seq & _SEQ_MASK) << 32 | crc32(payload)

    def matches(self, seq: int, payload: bytes) -> bool | None:
        """Whether it is the same batch as was here; None: nobody knows."""
        entry = self.entries[seq % _KEPT]
        return entry & 0xFFFF_FFFF == crc32(payload) if entry >> 32 == seq & _SEQ_MASK else None
