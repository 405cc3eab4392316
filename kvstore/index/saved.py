"""What an index knows, as values that can be written to disk: see `kvstore.index.snapshot`. Pure.

Sets of bits are little-endian bytes, since they are longer than msgpack's numbers.
"""

import msgspec

Key = int | bytes


class SavedTable(msgspec.Struct, array_like=True, gc=False):
    """The keys of a namespace, and who has them.

    `masks` are those of the first so many `keys`, as places in a list of masks; the others are only named
    by links. Links lead from `followed` to `followers`, which are places in `keys`, like those of `holes`.
    """

    namespace: bytes
    keys: list[Key]
    masks: list[int]
    followed: list[int]
    followers: list[int]
    open: bytes
    holes: list[tuple[int, bytes]]


class SavedHolding(msgspec.Struct, array_like=True, gc=False):
    """What one publisher has: its slots by shard, and its blocks by namespace."""

    name: str
    over: bool
    slots: dict[str, int]
    blocks: list[tuple[bytes, int]]


class SavedLocality(msgspec.Struct, array_like=True, gc=False):
    """Who has what, but for the tables."""

    masks: list[bytes]
    holdings: list[SavedHolding]


class SavedNode(msgspec.Struct, array_like=True, gc=False):
    """Where a daemon's feed was: blocks and the sum of their CRC-32 by medium, in the media's order."""

    address: str
    name: str
    epoch: int
    seq: int
    tallies: list[tuple[int, int]]
    skipped: bool


class SavedTranslation(msgspec.Struct, array_like=True, gc=False):
    """What an engine's hashes stand for, in one of its namespaces; `media` are bits, in `living`'s order."""

    block_tokens: int
    in_pairs: bool
    living: dict[int, int]
    media: bytes
    removed: dict[int, int]
    salts: dict[int, str]
    lineage: dict[int, bytes]


class SavedGroup(msgspec.Struct, array_like=True, gc=False):
    """A KV-cache group of an engine; `block_tokens` of its namespaces that have the engine's own keys."""

    number: int
    no_prefix: bool
    block_tokens: list[int]
    translations: list[SavedTranslation]


class SavedEngine(msgspec.Struct, array_like=True, gc=False):
    """Where an engine's stream was; `source` is what was configured, as JSON."""

    name: str
    source: bytes
    next_seq: int
    marks: list[int]
    published_s: float
    incomplete: bool
    groups: list[SavedGroup]


class SavedIndex(msgspec.Struct, array_like=True, gc=False):
    """All of it but for the tables, of which there are so many."""

    locality: SavedLocality
    nodes: list[SavedNode]
    engines: list[SavedEngine]
    tables: int = 0


def bits_to_bytes(bits: int) -> bytes:
    """A set of bits, as it is saved."""
    return bits.to_bytes((bits.bit_length() + 7) // 8, "little")


def bits_from_bytes(data: bytes) -> int:
    """The set of bits that was saved so."""
    return int.from_bytes(data, "little")
