"""Reading blocks of a storage tier into memory that nobody else sees, to know whether they can be read."""

import mmap
from collections.abc import Sequence
from typing import Final

from kvstore.node.blocks import Block
from tiers.base import StorageTier, Transfer

_PAGE_BYTES: Final = 4096


def as_transfer(block: Block) -> Transfer:
    """A transfer of a block of a storage tier, without memory so far."""
    namespace = block.shelf.namespace
    return Transfer(
        namespace,
        block.key,
        block.length,
        slot=block.slot,
        checksum=block.checksum,
        record=block.record,
    )


async def read_aside(tier: StorageTier, transfers: Sequence[Transfer]) -> None:
    """Read blocks into memory that nobody else sees; says only which are damaged."""
    sizes = [-(-transfer.length // _PAGE_BYTES) * _PAGE_BYTES for transfer in transfers]
    if not sizes:
        return
    memory = memoryview(mmap.mmap(-1, sum(sizes)))  # on pages, and gone with the last view of it
    end = 0
    for transfer, size in zip(transfers, sizes, strict=True):
        transfer.memory = memory[end : end + size]
        end += size
    await tier.read(transfers)
