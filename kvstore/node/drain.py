"""Draining a node: it takes nothing new, and what only its arena has is written below. Readers go on.

It goes on until it is cancelled or the daemon ends, whether or not anybody waits for it.
"""

import asyncio
import logging
from collections.abc import Callable
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
    """What of the arena is not below, as far as it should or could be, and how many writers are not done."""

    blocks: int
    block_bytes: int
    leases: int


class Drain:
    """Of one arena."""

    def __init__(self, arena: Arena, movements: Movements) -> None:
        self._arena = arena
        self._movements = movements

    @property
    def under_way(self) -> bool:
        """Whether it has begun and was not cancelled."""
        return self._movements.draining

    @property
    def owed_blocks(self) -> int:
        """What tiers below are still to get."""
        return sum([lower.backlog_blocks for lower in self._movements.lowers])

    def begin(self) -> None:
        """Grant no reserve any more, and write everything below, whatever the tiers' rules say."""
        if not self.under_way:
            logger.warning("draining: nothing new is taken, %d blocks are owed below", self.owed_blocks)
            self._movements.drain(on=True)

    def cancel(self) -> None:
        """Go on as before."""
        if self.under_way:
            self._movements.drain(on=False)
            logger.warning("draining is cancelled")

    async def wait(self, open_writes: Callable[[], int], wait_s: float) -> Remains:
        """What remains once nothing is owed and no write is open, or after `wait_s`.

        With no tier below there is nothing to wait for.
        """
        now_s = asyncio.get_running_loop().time
        deadline = now_s() + wait_s
        while self.under_way and self._movements.lowers and (remaining_s := deadline - now_s()) > 0:
            if not (self._movements.offering or self.owed_blocks or open_writes()):
                break
            await self._arena.waiting.wait(ROOM, min(remaining_s, _LOOK_S))
        blocks = [block for shelf in self._arena.directory.shelves() for block in shelf.sealed.values()]
        count = nbytes = 0
        for start in range(0, len(blocks), _TURN):
            above = [b for b in blocks[start : start + _TURN] if b.readable and not self._is_below(b)]
            count += len(above)
            nbytes += sum([block.length for block in above])
            await asyncio.sleep(0)
        return Remains(count, nbytes, open_writes())

    def _is_below(self, block: Block) -> bool:
        lowers = self._movements.lowers
        waited_for = block.copies or any(block in lower.unwritten for lower in lowers)
        return not waited_for and any(lower.copy_of(block) is not None for lower in lowers)
