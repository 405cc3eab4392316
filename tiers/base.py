"""The contracts of tiers: bytes in, bytes out. A tier knows no client, no lease and no other tier.

A `SlotTier` is memory that clients map: the store gives its slots out and readers look at them in place. A
`StorageTier` lies below: blocks are copied between it and slots. Where a block goes is the tier's; which
blocks leave to make room is the store's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from kvstore.block import Medium, Namespace


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


class Space(Protocol):
    """What slots are cut from: contiguous pieces of any length, rounded up to an alignment."""

    capacity_bytes: int

    def slot_length(self, length: int) -> int:
        """The length of the slot that a block of `length` bytes takes."""

    def take(self, length: int, owner: object, within: Slot | None = None) -> Slot | None:
        """Take a slot from what is free, from the free slot `within` if given; None when nothing fits."""

    def free(self, slot: Slot) -> Slot:
        """Give a slot back; the answer is the free slot it has become part of."""

    def largest(self, count: int) -> list[Slot]:
        """Up to `count` of the largest free slots."""

    @property
    def free_bytes(self) -> int:
        """Bytes free, in pieces."""


class SlotTier(Tier, Space, Protocol):
    """Memory given out in slots that clients map."""

    arena: int

    def grow(self, ready_bytes: int) -> None:
        """Give out slots up to here."""

    def open(self, *, writable: bool) -> int:
        """A new descriptor of the memory, for a client to map; the caller closes it."""

    def move(self, slot: Slot, to: Slot) -> None:
        """Copy a slot's bytes to a taken slot that is no shorter. No lease may be looking at either."""

    def poison(self, slot: Slot) -> None:
        """Overwrite the slot, so that whoever still looks at it notices."""

    def view(self, slot: Slot) -> memoryview:
        """The slot's bytes, writable; valid until the slot is freed."""


class Transfer:
    """One block on its way between memory and a storage tier, or found there on start.

    `memory` begins on a page (4 KiB) and is whole pages long; the block is its first `length` bytes, what
    follows is padding without meaning. It must stay as it is until the transfer has ended, however late.
    `slot` is the place in the tier, of at least `slot_length(length)` bytes. `checksum` is xxh3_64 of the
    block's bytes, None until somebody has computed it. `record` is how the tier remembers the block.

    `dropped` may be set at any time while a write goes on: the block must then not be there afterwards.
    `refused` is set by a write that did not take this block and will not, such as where another of its name
    is. `damaged` is set by a read whose bytes are not those that were written, `missing` where they are gone.
    """

    __slots__ = (
        "checksum",
        "damaged",
        "dropped",
        "key",
        "length",
        "memory",
        "missing",
        "namespace",
        "record",
        "refused",
        "slot",
    )

    def __init__(
        self,
        namespace: Namespace,
        key: bytes,
        length: int,
        *,
        slot: Slot,
        memory: memoryview | None = None,
        checksum: int | None = None,
        record: Any = None,
    ) -> None:
        self.namespace = namespace
        self.key = key
        self.length = length
        self.slot = slot
        self.memory = memory
        self.checksum = checksum
        self.record = record
        self.dropped = self.refused = self.damaged = self.missing = False

    @property
    def arrived(self) -> bool:
        """After a read that went well: whether the block is in `memory`."""
        return not self.damaged and not self.missing


class StorageTier(Tier, Space, Protocol):
    """A tier below the arena, which keeps blocks over a restart. For one event loop.

    Space is handed out synchronously; what takes time is awaited, and several calls may be under way at once.
    Cancelling a call does not stop it: memory and slots are the tier's until the call would have ended. One
    may take as much longer as its bytes need at `slowest_bytes_per_s` before it is late.
    """

    slowest_bytes_per_s: float

    async def recover(self) -> list[Transfer]:
        """Open what is stored and say what it holds, oldest first, with slots taken and nothing in memory.

        What does not fit the capacity, or is damaged as far as can be told without reading the blocks, is
        left out. May be called again after `same` said no, when no other call is under way: slots and records
        of before mean nothing then, so whoever has some lets go of them first.

        Raises:
            ConfigError: somebody else owns the place, or it cannot be what it should be: do not go on.
            TierError: it cannot be opened now; try again later.
        """

    async def write(self, transfers: Sequence[Transfer]) -> None:
        """Store blocks: when this returns they outlive the process. Sets `checksum` and `record`.

        Raises:
            TierError: it cannot take bytes now. None of the blocks is there afterwards.
        """

    async def read(self, transfers: Sequence[Transfer]) -> None:
        """Fill each `memory` with its block, or set `damaged` or `missing`, where its contents are undefined.

        Raises:
            TierError: it cannot give bytes now; the contents of all are undefined.
        """

    def forget(self, records: Sequence[Any]) -> None:
        """These blocks are to be there no longer: before their slots or records are used again, and at the
        latest when a `flush` begun after this has ended, no restart brings them back. Frees no slot."""

    def evict(self, records: Sequence[Any]) -> None:
        """These blocks leave this node's directory, and their slots will be used again. Frees no slot."""

    async def flush(self, names: Sequence[tuple[bytes, bytes]] = ()) -> None:
        """Make lasting what was forgotten, over a power cut too. Of `names` (namespace id, key) nothing is to
        be there either, where something may be of which this node has never heard.

        Raises:
            TierError: it cannot; what was forgotten is tried again by the next write or flush.
        """

    async def same(self) -> bool:
        """Whether what was stored is still there as it was; where not, `recover` again. Takes no I/O of data.

        Raises:
            TierError: that cannot be told now.
        """

    def interrupt(self) -> None:
        """Some call is late: have those that can be ended fail soon. Takes no time."""

    async def probe(self) -> None:
        """Write and read a little.

        Raises:
            TierError: that does not go.
        """


class Found(NamedTuple):
    """A block that somebody else has stored: its length in bytes, and what a `Transfer` says of it."""

    length: int
    checksum: int | None
    record: Any


@runtime_checkable
class SharedTier(StorageTier, Protocol):
    """A storage tier that other nodes write to as well: a node knows what it wrote, and what it asked for.

    So `recover` finds nothing, slots are entries of the directory alone, and a block may be gone at any time.
    """

    async def find(self, blocks: Sequence[tuple[Namespace, bytes]]) -> list[Found | None]:
        """Ask for all of these in one batch: what is there now, None for what is not.

        Raises:
            TierError: that cannot be told now.
        """
