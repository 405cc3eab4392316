"""What a daemon that was killed has left in an NVMe tier's directory. It measures nothing."""

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from kvstore.block import Namespace
from tiers.allocator import Allocator
from tiers.base import Transfer
from tiers.namespaces import Namespaces
from tiers.table import Table
from tiers.volume import FORMAT, IDENTITY_BYTES, Head, Volume

NAMESPACE: Final = Namespace(model="bench")


@dataclass(frozen=True, slots=True)
class Written:
    """A tier's directory, and what is recorded there."""

    folder: Path
    capacity_bytes: int
    blocks: int


def block_key(number: int) -> bytes:
    """The key of a block that has a number."""
    return number.to_bytes(32, "big")


@contextmanager
def written_tier(directory: Path, blocks: int, block_bytes: int) -> Iterator[Written]:
    """A directory with genuine records of so many blocks, as long as the context lasts.

    The bytes of the blocks are allocated and never written: a start does not read them.
    """
    with TemporaryDirectory(prefix="tier-", dir=directory) as name:
        folder = Path(name)
        capacity_bytes = blocks * block_bytes
        head = Head(FORMAT, os.urandom(IDENTITY_BYTES), capacity_bytes)
        with closing(Volume(folder / "blocks", capacity_bytes)) as volume:
            volume.allocate("bench")
            volume.write_head(head)
        with closing(Table(folder / "table", Namespaces(folder / "namespaces"))) as table:
            table.begin(head)
            table.put(_transfers(table, blocks, block_bytes))
        yield Written(folder, capacity_bytes, blocks)


def _transfers(table: Table, blocks: int, block_bytes: int) -> list[Transfer]:
    space = Allocator(blocks * block_bytes)
    space.grow(blocks * block_bytes)
    transfers = []
    for number in range(blocks):
        slot = space.take(block_bytes, table)
        assert slot is not None
        transfer = Transfer(NAMESPACE, block_key(number), block_bytes, slot=slot, checksum=number)
        transfer.record = table.take()
        transfers.append(transfer)
    return transfers
