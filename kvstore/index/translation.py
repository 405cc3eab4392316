"""Translation: an engine's hashes to our keys, for blocks whose hash no router can reproduce. Pure.

An entry lives while its block is in some medium, since only the engine's hash says what is removed. Entries
of blocks removed lately are remembered as well: vLLM announces the removal of one of two copies, and blocks
that follow the other one come later.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from kvstore.block import Medium

_REMEMBERED_MAX: Final = 16_384
# An entry is its key and four bits of media in one number: half the memory of a pair.
_MEDIA_BITS: Final = 4
_MEDIA_MASK: Final = (1 << _MEDIA_BITS) - 1
_BITS: Final = {medium: 1 << position for position, medium in enumerate(Medium)}


class Translation:
    """What one engine has in one namespace. Hashes and keys are numbers of 60 bits."""

    def __init__(self, living: dict[int, int] | None = None, removed: dict[int, int] | None = None) -> None:
        self._living = living or {}
        self._removed = OrderedDict(removed or {})

    def __len__(self) -> int:
        return len(self._living)

    def save(self) -> tuple[dict[int, int], dict[int, int]]:
        """What to make it of again."""
        return self._living, dict(self._removed)

    def key(self, engine_hash: int) -> int | None:
        """Our key of a block that is there, or was lately."""
        entry = self._living.get(engine_hash)
        return self._removed.get(engine_hash) if entry is None else entry >> _MEDIA_BITS

    def stored(self, hashes: Sequence[int], keys: Sequence[int], medium: Medium) -> None:
        """These blocks are in the medium, and these are our keys of them."""
        bit = _BITS[medium]
        for engine_hash, key in zip(hashes, keys, strict=True):
            media = self._living.get(engine_hash, 0) & _MEDIA_MASK
            self._living[engine_hash] = key << _MEDIA_BITS | media | bit
            self._removed.pop(engine_hash, None)

    def removed(self, hashes: Sequence[int], medium: Medium) -> tuple[list[int], list[int]]:
        """They are there no longer: our keys of those that were, and the hashes of others."""
        bit = _BITS[medium]
        keys, others = [], []
        for engine_hash in hashes:
            entry = self._living.get(engine_hash)
            if entry is None:
                others.append(engine_hash)
            elif entry & bit:
                keys.append(entry >> _MEDIA_BITS)
                self._take(engine_hash, entry ^ bit)
        return keys, others

    def _take(self, engine_hash: int, entry: int) -> None:
        if entry & _MEDIA_MASK:
            self._living[engine_hash] = entry
            return
        del self._living[engine_hash]
        self._removed[engine_hash] = entry >> _MEDIA_BITS
        if len(self._removed) > _REMEMBERED_MAX:
            self._removed.popitem(last=False)
