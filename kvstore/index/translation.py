"""Translation: an engine's hashes to ours, for blocks whose hash no router can reproduce. Pure.

An entry lives while its block is in some medium, since only the engine's hash says what is removed. Entries
of blocks removed lately are remembered as well: vLLM announces the removal of one of two copies, and blocks
that follow the other one come later.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from kvstore.block import Medium
from kvstore.content_keys import KEY_MASK
from kvstore.index.lineage import Lineage
from kvstore.index.saved import SavedTranslation

_REMEMBERED_MAX: Final = 16_384
# An entry is our hash and four bits of media in one number: half the memory of a pair.
_MEDIA_BITS: Final = 4
_MEDIA_MASK: Final = (1 << _MEDIA_BITS) - 1
_BITS: Final = {medium: 1 << position for position, medium in enumerate(Medium)}
_MEDIA: Final = [tuple(medium for medium, bit in _BITS.items() if bits & bit) for bits in range(16)]


class Translation:
    """What one engine has in one namespace. An engine's hashes have 60 bits, our sequence hashes 64.

    Salts are remembered of those that have one: vLLM names it with a prompt's first block alone.
    """

    def __init__(self, *, traced: bool = False) -> None:
        self._living: dict[int, int] = {}
        self._removed: OrderedDict[int, int] = OrderedDict()
        self._salts: dict[int, str] = {}
        self.lineage = Lineage() if traced else None

    def __len__(self) -> int:
        return len(self._living)

    def save(self, block_tokens: int, in_pairs: bool) -> SavedTranslation:
        """What to make it of again."""
        return SavedTranslation(
            block_tokens,
            in_pairs,
            {engine_hash: entry >> _MEDIA_BITS for engine_hash, entry in self._living.items()},
            bytes([entry & _MEDIA_MASK for entry in self._living.values()]),
            dict(self._removed),
            self._salts,
            self.lineage.save() if self.lineage else {},
        )

    def restore(self, saved: SavedTranslation) -> None:
        """Be as it was."""
        entries = zip(saved.living.items(), saved.media, strict=True)
        self._living = {key: sequence << _MEDIA_BITS | media for (key, sequence), media in entries}
        self._removed = OrderedDict(saved.removed)
        self._salts = saved.salts
        if self.lineage is not None:
            self.lineage = Lineage(saved.lineage)

    def sequence(self, engine_hash: int) -> int | None:
        """Our hash of a block that is there, or was lately."""
        entry = self._living.get(engine_hash)
        return self._removed.get(engine_hash) if entry is None else entry >> _MEDIA_BITS

    def salt(self, engine_hash: int) -> str:
        """That of such a block."""
        return self._salts.get(engine_hash, "")

    def media(self, engine_hash: int) -> Sequence[Medium]:
        """Where a block is."""
        return _MEDIA[self._living.get(engine_hash, 0) & _MEDIA_MASK]

    def stored(self, hashes: Sequence[int], sequences: Sequence[int], medium: Medium, salt: str = "") -> None:
        """These blocks are in the medium, and these are our hashes of them."""
        bit = _BITS[medium]
        for engine_hash, sequence in zip(hashes, sequences, strict=True):
            media = self._living.get(engine_hash, 0) & _MEDIA_MASK
            self._living[engine_hash] = sequence << _MEDIA_BITS | media | bit
            self._removed.pop(engine_hash, None)
        if salt:
            self._salts.update(dict.fromkeys(hashes, salt))

    def removed(self, hashes: Sequence[int], medium: Medium) -> tuple[list[int], list[int]]:
        """They are there no longer: our keys of those that were, and the hashes of others."""
        bit = _BITS[medium]
        keys, others = [], []
        for engine_hash in hashes:
            entry = self._living.get(engine_hash)
            if entry is None:
                others.append(engine_hash)
            elif entry & bit:
                keys.append(entry >> _MEDIA_BITS & KEY_MASK)
                self._take(engine_hash, entry ^ bit)
        return keys, others

    def _take(self, engine_hash: int, entry: int) -> None:
        if entry & _MEDIA_MASK:
            self._living[engine_hash] = entry
            return
        del self._living[engine_hash]
        self._removed[engine_hash] = entry >> _MEDIA_BITS
        if len(self._removed) > _REMEMBERED_MAX:
            forgotten, _ = self._removed.popitem(last=False)
            self._salts.pop(forgotten, None)
            if self.lineage is not None:
                self.lineage.drop(forgotten)
