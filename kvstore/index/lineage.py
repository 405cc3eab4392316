"""What an engine's blocks follow, and their local hashes, which another indexer must be told. Pure.

Kept of engines alone whose blocks are dumped, since it takes as much memory again as the rest of a block. It
is in many small dictionaries: one can be listed, or grow, without holding up the loop.
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple

_SHARDS: Final = 256
_ORIGIN: Final = struct.Struct("<QQQ?")


class Origin(NamedTuple):
    """A block's local hash, the engine's hash of it with all its bits, and of the block before, if any."""

    local: int
    engine_hash: int
    parent: int
    follows: bool


class Lineage:
    """Of one engine in one namespace, by the low 60 bits of the engine's hashes."""

    def __init__(self, saved: Mapping[int, bytes] | None = None) -> None:
        self._shards: list[dict[int, bytes]] = [{} for _ in range(_SHARDS)]
        for key, origin in (saved or {}).items():
            self._shards[key % _SHARDS][key] = origin

    def save(self) -> dict[int, bytes]:
        """What to make it of again."""
        return {key: origin for shard in self._shards for key, origin in shard.items()}

    def stored(
        self, keys: Sequence[int], engine_hashes: Sequence[int], locals: Sequence[int], parent: int | None
    ) -> None:
        """These blocks follow each other, and the first of them `parent`, or nothing."""
        before, follows = parent or 0, parent is not None
        for key, engine_hash, local in zip(keys, engine_hashes, locals, strict=True):
            self._shards[key % _SHARDS][key] = _ORIGIN.pack(local, engine_hash, before, follows)
            before, follows = engine_hash, True

    def drop(self, key: int) -> None:
        """The block is gone."""
        self._shards[key % _SHARDS].pop(key, None)

    def origin(self, key: int) -> Origin | None:
        """Where a block comes from; None of one that is not there."""
        packed = self._shards[key % _SHARDS].get(key)
        return None if packed is None else Origin._make(_ORIGIN.unpack(packed))

    def keys(self) -> Iterator[int]:
        """Those of blocks that are there; some that come or go meanwhile may be among them, and may not."""
        for shard in self._shards:
            yield from list(shard)
