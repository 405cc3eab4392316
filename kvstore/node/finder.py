"""What other nodes have stored in a shared tier: asked for in batches, entered, and else known to be missing.

It asks when somebody waits who has time for it, and never for what it was told lately is not there. However
many ask, a few questions are under way at a time; what is asked for meanwhile goes with the next.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Final

from kvstore.node.blocks import Shelf, State
from kvstore.node.lower import Lower
from kvstore.statistics import Latencies
from tiers.base import Found, SharedTier

# Names remembered as missing, about 200 bytes each.
_MISSING_MAX: Final = 1 << 16
# Asked for in one question, some milliseconds of a core, and how many questions there are at a time.
ASKED_AT_ONCE: Final = 512
_QUESTIONS: Final = 2
# Entered before others have their turn.
_TURN: Final = 128

Name = tuple[bytes, bytes]  # namespace id and key


class Finder:
    """Asks one shared tier. What is missing there is remembered for `missing_s`.

    Blocks longer than `length_max` are of no use here, whoever says that they are there.
    """

    def __init__(self, lower: Lower, tier: SharedTier, *, missing_s: float, length_max: int) -> None:
        self.lower = lower
        self._tier = tier
        self._missing_s = missing_s
        self._length_max = length_max
        self._missing: OrderedDict[Name, float] = OrderedDict()  # until when
        self._queue: dict[Name, tuple[Shelf, bytes]] = {}
        self._asked: set[Name] = set()
        self._questions: set[asyncio.Task[None]] = set()
        self._answered: asyncio.Future[None] | None = None

    def may_know(self, shelf: Shelf, key: bytes) -> bool:
        """Whether it is worth asking for a block that this node does not know."""
        if self.lower.breaker.open:
            return False
        until = self._missing.get((shelf.namespace.id, key))
        return until is None or until <= time.monotonic()

    async def find(self, items: Iterable[tuple[Shelf, bytes]]) -> None:
        """Ask for these, and return once it is known which are there, or that it will not be.

        Cancelling leaves the question to itself.
        """
        waiting: set[Name] = set()
        for shelf, key in items:
            if self.may_know(shelf, key):
                name = shelf.namespace.id, key
                waiting.add(name)
                if name not in self._asked:
                    self._queue[name] = shelf, key
        self._ask_more()
        while waiting := {name for name in waiting if name in self._asked or name in self._queue}:
            if self._answered is None:
                self._answered = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._answered)

    def _ask_more(self) -> None:
        if self.lower.breaker.open:
            self._queue.clear()
        while self._queue and len(self._questions) < _QUESTIONS:
            batch = {name: self._queue.pop(name) for name in list(self._queue)[:ASKED_AT_ONCE]}
            self._asked.update(batch)
            question = asyncio.get_running_loop().create_task(self._ask(batch))
            self._questions.add(question)
            question.add_done_callback(self._questions.discard)

    async def _ask(self, batch: dict[Name, tuple[Shelf, bytes]]) -> None:
        lower = self.lower
        found: list[Found | None] = []

        async def find() -> None:
            found.extend(await self._tier.find([(shelf.namespace, key) for shelf, key in batch.values()]))

        lower.calls += 1
        try:
            if await lower.attempt(find(), Latencies(), lambda: self._over(batch)):
                lower.counters.asked_blocks += len(batch)
                await self._enter(batch, found)
        finally:
            lower.calls -= 1
            self._questions.discard(asyncio.current_task())
            self._over(batch)

    def _over(self, batch: dict[Name, tuple[Shelf, bytes]]) -> None:
        """Nobody is to wait for these any longer."""
        self._asked.difference_update(batch)
        self._ask_more()
        answered, self._answered = self._answered, None
        if answered is not None:
            answered.set_result(None)

    async def _enter(self, batch: dict[Name, tuple[Shelf, bytes]], found: Sequence[Found | None]) -> None:
        until = time.monotonic() + self._missing_s
        entered = []
        self.lower.room.begin()
        for number, ((name, (shelf, key)), there) in enumerate(zip(batch.items(), found, strict=True)):
            if number % _TURN == _TURN - 1:
                self.lower.settle()
                await asyncio.sleep(0)
                self.lower.room.begin()
            if there is None or there.length > self._length_max:
                self._missing[name] = until
                self._missing.move_to_end(name)
            elif (block := self.lower.enter(shelf, key, there)) is not None:
                self._missing.pop(name, None)
                entered.append(block)
        self.lower.settle()
        while len(self._missing) > _MISSING_MAX:
            self._missing.popitem(last=False)
        self.lower.entered([block for block in entered if block.state is State.SEALED])
