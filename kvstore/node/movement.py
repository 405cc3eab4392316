"""What moves blocks between the arena and the tiers below it: promotion, demotion, removal, looking after."""

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from contextlib import suppress
from typing import Any, Final

from kvstore.errors import TierError
from kvstore.node.arena import Arena
from kvstore.node.blocks import Block, Shelf, State
from kvstore.node.demote import Demoter
from kvstore.node.lower import Lower
from kvstore.node.promote import Promoter, Shelves

# On a stop, what is owed to the tiers below gets this long, and so do calls under way to end.
_STOP_S: Final = 5.0


class Movements:
    """The tiers below an arena, fastest first; with none, everything here does nothing."""

    def __init__(self, arena: Arena, lowers: Sequence[Lower]) -> None:
        self._arena = arena
        self.lowers = tuple(lowers)
        self.demoter = Demoter(arena, lowers)
        self.promoter = Promoter(arena, lowers, promoted=self._promoted, wanted=self.demoter.want)
        self._tasks: set[asyncio.Task[None]] = set()
        arena.on_evicted(lambda blocks: self.demoter.left(blocks, evicted=True))
        for lower in lowers:
            lower.watch_calls(on_breaker=self._breaker_changed, on_end=self._call_ended)

    async def start(self) -> None:
        """Recover what the tiers hold, and look after them from now on.

        Raises:
            ConfigError: a tier cannot be what it should be.
        """
        await asyncio.gather(*[lower.start() for lower in self.lowers])
        for lower in self.lowers:
            self._spawn(lower.watch())

    async def stop(self) -> bool:
        """Write what is owed for a while, then let what is under way end; False if some of it hangs."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_STOP_S):
                while self.demoter.writing:
                    await asyncio.wait(self.demoter.writing)
                await asyncio.gather(*[lower.bury([]) for lower in self.lowers])
        for lower in self.lowers:
            lower.breaker.trip()
        for task in self._tasks:
            task.cancel()
        under_way = [*self.promoter.loading, *self.demoter.writing]
        if under_way:
            await asyncio.wait(under_way, timeout=_STOP_S)
        for lower in self.lowers:
            lower.tier.close()
        return all(task.done() for task in under_way)

    # Readers.

    def below(self, shelves: Shelves, key: bytes) -> bool:
        """Whether a tier below has the block and can be asked for it."""
        return len(shelves) > 1 and self.promoter.source(shelves, key) is not None

    def readable(self, shelves: Shelves) -> Shelves:
        """The shelves, with empty ones for tiers that cannot be asked now."""
        if not any(lower.breaker.open for lower in self.lowers):
            return shelves
        below = zip(self.lowers, shelves[1:], strict=True)
        return shelves[0], *[Shelf(s.tier, s.namespace) if low.breaker.open else s for low, s in below]

    def missed(self, blocks: int) -> None:
        """Count what a reader waited for in vain."""
        for lower in self.lowers:
            lower.counters.missed_blocks += blocks

    # Removal.

    def remove(self, shelves: Shelves, keys: Iterable[bytes]) -> set[bytes]:
        """Hide these blocks in the tiers below, and what is on its way up or down. Which were there."""
        names = list(keys)
        for lower in self.lowers:
            lower.mark((shelves[0].namespace.id, key) for key in names)
        found: set[bytes] = set()
        for key in names:
            loading = shelves[0].pending.get(key)
            if loading is not None and loading.state is State.LOADING:
                self.promoter.give_up(loading)
        for lower, shelf in zip(self.lowers, shelves[1:], strict=True):
            here = [block for key in names if (block := shelf.sealed.get(key)) is not None]
            lower.drop(here)
            found.update(block.key for block in here)
            for key in names:
                if (writing := shelf.pending.get(key)) is not None:
                    self.demoter.remove(lower, writing)
        return found

    async def make_lasting(self, shelves: Shelves, keys: Sequence[bytes]) -> None:
        """Return once no restart brings these removed blocks back.

        Raises:
            TierError: a tier cannot promise that now; it will be made good once it is back.
        """
        names = [(shelves[0].namespace.id, key) for key in keys]
        buried = await asyncio.gather(*[lower.bury(names) for lower in self.lowers])
        failing = [lower.name for lower, done in zip(self.lowers, buried, strict=True) if not done]
        if failing:
            raise TierError(
                f"{len(names)} keys are hidden, but {', '.join(failing)} fails: until it is back, a restart "
                "of the daemon may bring them back; remove them again once it is"
            )

    # Helpers.

    def _promoted(self, lower: Lower, blocks: Sequence[Block]) -> None:
        """Blocks have arrived from a tier."""
        if not lower.rules.exclusive:
            return
        lower.drop(list(filter(None, map(lower.copy_of, blocks))))
        self.demoter.promoted(lower, blocks)

    def _call_ended(self, lower: Lower) -> None:
        self.promoter.pump(lower)
        self.demoter.pump_one(lower)

    def _breaker_changed(self, lower: Lower) -> None:
        if lower.breaker.open:
            self.promoter.give_up_queued(lower)
        self._spawn(self.demoter.breaker_changed(lower))
        if not lower.breaker.open:
            self._spawn(self.demoter.offer())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
