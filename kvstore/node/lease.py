"""Leases and who holds them. They say what is held, never free it: that is `Store`'s."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvstore.errors import InvalidRequest, LeaseError
from kvstore.node.blocks import Block
from kvstore.node.origin import Origin
from tiers.base import Slot


class ReadLease:
    """Pins on blocks. `limited` says that the holder's limit, and not absence, ended the hit."""

    __slots__ = ("block_bytes", "blocks", "id", "limited")

    def __init__(self, lease_id: int, blocks: list[Block], block_bytes: int, *, limited: bool) -> None:
        self.id = lease_id
        self.blocks = blocks
        self.block_bytes = block_bytes
        self.limited = limited


class WriteLease:
    """Reserved blocks, one entry a granted key, None once committed or aborted.

    `origin` is what was said of a chain of keys; None where they continue nothing. `present` are the blocks
    of the same request that were there already. When the holder's connection is
    lost, the blocks are aborted at once and `orphans` are the slots that its process may still write.
    """

    __slots__ = ("block_bytes", "id", "open", "origin", "orphans", "present")

    def __init__(self, lease_id: int, origin: Origin | None) -> None:
        self.id = lease_id
        self.origin = origin
        self.open: list[Block | None] = []
        self.present: list[Block] = []
        self.block_bytes = 0
        self.orphans: list[Slot] = []

    def chosen(self, indices: Iterable[int] | None) -> list[tuple[int, Block]]:
        """The blocks that are not committed, all or those at `indices`, each with its index.

        Raises:
            LeaseError: the lease has ended with its connection, or a block was committed before.
            InvalidRequest: there is no such index.
        """
        if self.orphans:
            raise LeaseError(f"write lease {self.id} ended with its connection; reserve again")
        if indices is None:
            return [(index, block) for index, block in enumerate(self.open) if block is not None]
        chosen = []
        for index in sorted(set(indices)):
            if not 0 <= index < len(self.open):
                raise InvalidRequest(
                    f"commit of index {index} in write lease {self.id}; it has 0 to {len(self.open) - 1}"
                )
            block = self.open[index]
            if block is None:
                raise LeaseError(f"index {index} of write lease {self.id} is committed already")
            chosen.append((index, block))
        return chosen


@dataclass(slots=True)
class Holder:
    """A client of the store: its limits, and the leases it holds. One per connection.

    `maps` says whether its process can touch slots by itself, so that they outlive its connection.
    """

    name: str
    pinned_bytes_max: int
    reserved_bytes_max: int
    maps: bool
    pinned_bytes: int = 0
    reserved_bytes: int = 0
    reads: dict[int, ReadLease] = field(default_factory=dict)
    writes: dict[int, WriteLease] = field(default_factory=dict)

    def lease_ids(self) -> list[int]:
        """The leases it holds."""
        return [*self.reads, *self.writes]


@dataclass(frozen=True, slots=True)
class Grant:
    """The answer to reserve. `status` has one letter a key: g(ranted), p(resent), b(usy), r(efused).

    It is hopeless to wait for what was refused when all of it together is beyond a salt's quota.
    """

    lease: WriteLease
    status: bytes
    slots: Sequence[Slot]
    hopeless: bool = False


def check_distinct(keys: Sequence[bytes] | Sequence[tuple[bytes, bytes]]) -> None:
    """Raise InvalidRequest when a key, or a key with its namespace's id, occurs twice."""
    if len(set(keys)) != len(keys):
        twice: Any = next(key for index, key in enumerate(keys) if key in keys[:index])
        key = twice if isinstance(twice, bytes) else twice[1]
        raise InvalidRequest(f"key {key.hex()} occurs twice in {len(keys)} keys; give each key once")
