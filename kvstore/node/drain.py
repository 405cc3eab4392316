"""Draining a node: it takes nothing new, and what only its arena has is written below. Readers go on.

It goes on until it is cancelled or the daemon ends, whether or not anybody waits for it.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final

from kvstore.node.arena import ROOM, Arena
from kvstore.node.blocks import Block
from kvstore.node.movement import Movements

logger = logging.getLogger(__name__)

# Blocks looked at before others have their turn, about 1 us each.
_TURN: Final = 512
# A writer that goes wakes nobody; who waits for it looks again after this time.
_LOOK_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class Remains:
    """What of the arena no tier below has, how many writers are not done, and what is still to be written.

    `owed_blocks` are those that tiers which work are to get, `away` says which do not, and why. Once it is
    `over`, waiting changes nothing.
    """

    blocks: int
    block_bytes: int
    leases: int
    owed_blocks: int = 0
    away: tuple[str, ...] = ()
    over: bool = True


class Drain:
    """Of one arena."""

    def __init__(self, arena: Arena, movements: Movements) -> None:
        self._arena = arena
        self._movements = movements
        self._told: Remains | None = None

    @property
    def under_way(self) -> bool:
        """Whether it has begun and was not cancelled."""
        return self._movements.draining

    @property
    def owed_blocks(self) -> int:
        """What tiers below that work are still to get."""
        working = [lower for lower in self._movements.lowers if not lower.breaker.open]
        return sum([lower.backlog_blocks for lower in working])

    def begin(self) -> None:
        """Grant no reserve any more, and write everything below, whatever the tiers' rules say."""
        if not self.under_way:
            logger.warning("draining: nothing new is taken, %d blocks are owed below", self.owed_blocks)
            self._told = None
            self._movements.drain(on=True)

    def cancel(self) -> None:
        """Go on as before."""
        if self.under_way:
            self._movements.drain(on=False)
            logger.warning("draining is cancelled")

    async def wait(self, open_writes: Callable[[], int], wait_s: float) -> Remains:
        """What remains when it is over, or after `wait_s`; the log says it, too.

        It is over when tiers that work have got everything, no write is open, and only what no tier can take
        is in the arena alone: a tier that is away is waited for where no other has what it is to get.
        """
        now_s = asyncio.get_running_loop().time
        deadline = now_s() + wait_s
        over = False
        while self.under_way and not (over := await self._is_over(open_writes)):
            remaining_s = deadline - now_s()
            if remaining_s <= 0:
                break
            await self._arena.waiting.wait(ROOM, min(remaining_s, _LOOK_S))
        count = nbytes = 0
        async for block in self._above():
            count += 1
            nbytes += block.length
        away = tuple(self._movements.away())
        remains = Remains(count, nbytes, open_writes(), self.owed_blocks, away, over)
        if self.under_way and remains != self._told:
            self._told = remains
            logger.warning(
                "%s: %d blocks (%d bytes) are in no tier below, %d are owed below, %d writes are open%s",
                "drained" if over else "draining",
                *(count, nbytes, remains.owed_blocks, remains.leases),
                "".join([f"; {clause}" for clause in away]),
            )
        return remains

    async def _is_over(self, open_writes: Callable[[], int]) -> bool:
        lowers = self._movements.lowers
        if lowers and (self._movements.offering or self.owed_blocks or open_writes()):
            return False
        if any(lower.breaker.open for lower in lowers):
            async with aclosing(self._above()) as above:
                async for block in above:
                    if block.copies or any(block in lower.unwritten for lower in lowers):
                        return False
        return True

    async def _above(self) -> AsyncGenerator[Block, None]:
        """What of the arena no tier below has."""
        lowers = self._movements.lowers
        blocks = [block for shelf in self._arena.directory.shelves() for block in shelf.sealed.values()]
        for start in range(0, len(blocks), _TURN):
            for block in blocks[start : start + _TURN]:
                if block.readable and not any(lower.copy_of(block) is not None for lower in lowers):
                    yield block
            await asyncio.sleep(0)
