"""What other nodes have stored in a shared tier: asked for in batches, entered, and else known to be missing.

It asks when somebody waits who has time for it, and never for what it was told lately is not there.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from kvstore.node.blocks import Shelf, State
from kvstore.node.lower import Lower
from kvstore.statistics import Latencies
from tiers.base import Found, SharedTier

# Names remembered as missing, about 200 bytes each.
_MISSING_MAX: Final = 1 << 16
# Entered before others have their turn.
_TURN: Final = 256

Name = tuple[bytes, bytes]  # namespace id and key


class Finder:
    """Asks one shared tier. What is missing there is remembered for `missing_s`."""

    def __init__(self, lower: Lower, tier: SharedTier, *, missing_s: float) -> None:
        self.lower = lower
        self._tier = tier
        self._missing_s = missing_s
        self._missing: OrderedDict[Name, float] = OrderedDict()  # until when
        self._asking: dict[Name, asyncio.Task[None]] = {}

    def may_know(self, shelf: Shelf, key: bytes) -> bool:
        """Whether it is worth asking for a block that this node does not know."""
        if self.lower.breaker.open:
            return False
        until = self._missing.get((shelf.namespace.id, key))
        return until is None or until <= time.monotonic()

    def ask(self, items: Sequence[tuple[Shelf, bytes]]) -> set[asyncio.Task[None]]:
        """Begin to ask for these, in one batch; what ends when all of them are known to be there or not."""
        tasks: set[asyncio.Task[None]] = set()
        fresh: dict[Name, tuple[Shelf, bytes]] = {}
        for shelf, key in items:
            if not self.may_know(shelf, key):
                continue
            name = shelf.namespace.id, key
            if name in self._asking:
                tasks.add(self._asking[name])
            else:
                fresh[name] = shelf, key
        if fresh:
            task = asyncio.get_running_loop().create_task(self._ask(fresh))
            self._asking |= dict.fromkeys(fresh, task)
            tasks.add(task)
        return tasks

    async def _ask(self, items: dict[Name, tuple[Shelf, bytes]]) -> None:
        lower = self.lower
        found: list[Found | None] = []

        async def find() -> None:
            found.extend(await self._tier.find([(shelf.namespace, key) for shelf, key in items.values()]))

        lower.calls += 1
        try:
            well = await lower.attempt(find(), Latencies(), lambda: None)
            if well:
                lower.counters.asked_blocks += len(items)
                await self._enter(items, found)
        finally:
            lower.calls -= 1
            for name in items:
                del self._asking[name]

    async def _enter(self, items: dict[Name, tuple[Shelf, bytes]], found: Sequence[Found | None]) -> None:
        until = time.monotonic() + self._missing_s
        entered = []
        self.lower.room.begin()
        for number, ((name, (shelf, key)), there) in enumerate(zip(items.items(), found, strict=True)):
            if number % _TURN == _TURN - 1:
                self.lower.settle()
                await asyncio.sleep(0)
                self.lower.room.begin()
            if there is None:
                self._missing[name] = until
                self._missing.move_to_end(name)
            elif (block := self.lower.enter(shelf, key, there)) is not None:
                self._missing.pop(name, None)
                entered.append(block)
        self.lower.settle()
        while len(self._missing) > _MISSING_MAX:
            self._missing.popitem(last=False)
        self.lower.entered([block for block in entered if block.state is State.SEALED])
