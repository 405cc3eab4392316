"""Reading what a storage tier has and comparing it with its checksums: into memory of its own, in turns."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Final

from kvstore.errors import TierError
from kvstore.node.aside import as_transfer, read_aside
from kvstore.node.blocks import State
from kvstore.node.lower import Lower
from kvstore.protocol import Verified
from kvstore.statistics import Latencies
from tiers.base import StorageTier

# Read in one turn: short enough for a progress bar and for readers who wait for the same disk.
_TURN_BYTES: Final = 16 << 20
_TURN_BLOCKS: Final = 256


class Verification:
    """One client's going through a tier as it was when it began; blocks that leave are passed over."""

    def __init__(self, lower: Lower) -> None:
        self._lower = lower
        self._reading: asyncio.Future[Verified] | None = None
        self._blocks = [block for shelf in lower.directory.shelves() for block in shelf.sealed.values()]

    async def page(self, after: int) -> Verified:
        """Verify the next blocks; those that are damaged are dropped. Cancelling lets it end unheard.

        Raises:
            TierError: the tier fails now.
        """
        self._reading = asyncio.ensure_future(self._page(after))
        self._reading.add_done_callback(lambda reading: reading.cancelled() or reading.exception())
        return await asyncio.shield(self._reading)

    async def _page(self, after: int) -> Verified:
        lower = self._lower
        if lower.breaker.open:
            raise TierError(f"tier {lower.name} fails and is left alone until it is back; check it then")
        taken = list(_turn([block.length for block in self._blocks[after : after + _TURN_BLOCKS]]))
        blocks = [b for b in self._blocks[after : after + len(taken)] if b.state is State.SEALED]
        lower.directory.pin(blocks)
        lower.calls += 1
        lower.reading += 1
        transfers = [as_transfer(block) for block in blocks]
        nbytes = sum([block.length for block in blocks])
        reading = read_aside(lower.tier, transfers)
        well = await lower.attempt(reading, Latencies(), lambda: None, nbytes=nbytes)
        lower.reading -= 1
        lower.calls -= 1
        lower.unpin(blocks)
        lower.call_ended()
        if not well:
            raise TierError(f"tier {lower.name} cannot be read now; the daemon's log says why")
        pairs = zip(blocks, transfers, strict=True)
        damaged = [block for block, transfer in pairs if transfer.damaged and block.state is State.SEALED]
        lower.damaged(damaged)
        pairs = zip(blocks, transfers, strict=True)
        lower.missing([block for block, t in pairs if t.missing and block.state is State.SEALED])
        after += len(taken)
        names = [f"{block.shelf.namespace} {block.key.hex()}" for block in damaged]
        return Verified(len(taken), names, after if after < len(self._blocks) else 0)


async def verify_stopped(tier: StorageTier) -> AsyncIterator[tuple[int, int, list[str]]]:
    """Go through a tier that no daemon uses: how many are done, how many there are, and which are damaged."""
    found = await tier.recover()
    done = 0
    while done < len(found):
        turn = found[done : done + _TURN_BLOCKS]
        turn = turn[: len(list(_turn([transfer.length for transfer in turn])))]
        await read_aside(tier, turn)
        done += len(turn)
        yield done, len(found), [f"{t.namespace} {t.key.hex()}" for t in turn if t.damaged]


def _turn(lengths: Sequence[int]) -> Iterator[int]:
    """The leading lengths that make a turn, at least one."""
    size = 0
    for count, length in enumerate(lengths):
        if count and size + length > _TURN_BYTES:
            return
        size += length
        yield length
