"""What moves blocks between the arena and the tiers below it: promotion, demotion, removal, looking after."""

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final

from kvstore.errors import TierError
from kvstore.node.arena import ROOM, Arena
from kvstore.node.blocks import Block, Shelf, State
from kvstore.node.care import look_after
from kvstore.node.demote import Demoter
from kvstore.node.finder import ASKED_AT_ONCE, Finder
from kvstore.node.lower import Lower
from kvstore.node.promote import Promoter, Shelves
from kvstore.node.rules import Rules
from tiers.base import SharedTier

# On a stop, what is owed to the tiers below gets this long, and so do calls under way to end.
_STOP_S: Final = 5.0
# Blocks evicted for a lower limit before others have their turn, about 20 us each.
_TURN: Final = 64
# How rules differ while draining: everything is written, soon, and stays above too.
_DRAINING: Final[dict[str, Any]] = {
    "on_eviction": False,
    "exclusive": False,
    "admit_hits": 0,
    "owed": True,
}


class Movements:
    """The tiers below an arena, fastest first; with none, everything here does nothing.

    What a shared tier was asked for in vain is not asked for again within `missing_s`.
    """

    def __init__(self, arena: Arena, lowers: Sequence[Lower], *, missing_s: float = 2.0) -> None:
        self._arena = arena
        self.lowers = tuple(lowers)
        self.demoter = Demoter(arena, lowers)
        self.promoter = Promoter(arena, lowers, promoted=self._promoted, wanted=self.demoter.want)
        self._finders = [
            Finder(lower, lower.tier, missing_s=missing_s, length_max=arena.tier.capacity_bytes)
            for lower in lowers
            if isinstance(lower.tier, SharedTier)
        ]
        self._tasks: set[asyncio.Task[None]] = set()
        self._trimming: asyncio.Task[None] | None = None
        self._offering: asyncio.Task[None] | None = None
        self._rules = {lower: lower.rules for lower in lowers}  # but for draining
        self.draining = False
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
            self._spawn(look_after(lower))

    def leave(self) -> set[Block]:
        """Begin nothing more. What the tiers below are still to get, which is somebody else's to write."""
        for lower in self.lowers:
            self.promoter.give_up_queued(lower)
        return self.demoter.leave_all()

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

    # What can change meanwhile.

    def set_rules(self, lower: Lower, rules: Rules) -> None:
        """Move blocks to and from this tier by other rules from now on."""
        fewer_hits = rules.admit_hits < self._rules[lower].admit_hits
        self._rules[lower] = rules
        owed, lower.rules = lower.rules.owed, replace(rules, **_DRAINING) if self.draining else rules
        if lower.rules.owed != owed:
            self._spawn(self.demoter.owing_changed(lower))
        if fewer_hits and not self.draining:
            self._spawn(self.demoter.offer())
        self.demoter.pump()

    def drain(self, *, on: bool) -> None:
        """Write all below, whatever the rules say, and let nobody write anew; or go by the rules again."""
        self.draining = on
        for lower, rules in self._rules.items():
            self.set_rules(lower, rules)
        if on:
            self._offering = self._spawn(self.demoter.offer())
            self._arena.waiting.wake(ROOM)  # in vain

    @property
    def offering(self) -> bool:
        """Whether a drain is still looking for what to write."""
        return self._offering is not None and not self._offering.done()

    def set_limit(self, tier: Arena | Lower, limit_bytes: int) -> None:
        """Let the tier have no more than this used, or all that it was made with. Gives no memory back."""
        tier.room.limit_bytes = min(limit_bytes, tier.tier.capacity_bytes)
        self._arena.waiting.wake(ROOM)
        self.demoter.pump()
        self.trim()

    def trim(self) -> None:
        """Begin to evict what is above a limit; to be called now and then, for what was pinned or owed."""
        if self._trimming is None or self._trimming.done():
            working = [lower for lower in self.lowers if not lower.breaker.open]
            tiers: list[Arena | Lower] = [self._arena, *working]
            over = [tier for tier in tiers if tier.room.used_bytes > tier.room.limit_bytes]
            self._trimming = self._spawn(_trim(over)) if over else None

    def away(self) -> list[str]:
        """Which tiers are left alone, and why: a clause for each."""
        return [
            f"tier {low.name} fails: {low.failing}" if low.enabled else f"tier {low.name} is turned off"
            for low in self.lowers
            if low.failing
        ]

    # Readers.

    def below(self, shelves: Shelves, key: bytes) -> bool:
        """Whether a tier below has the block and can be asked for it."""
        return len(shelves) > 1 and self.promoter.source(shelves, key) is not None

    def may_find(self, shelves: Shelves, key: bytes) -> bool:
        """Whether a shared tier is worth asking for a block that is not here."""
        return any(finder.may_know(shelves[0], key) for finder in self._finders)

    async def find_prefix(self, shelves: Shelves, keys: Sequence[bytes], timeout_s: float) -> None:
        """As `find`, for keys of which none is of use behind one that nobody has."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        for start in range(0, len(keys), ASKED_AT_ONCE):
            turn = [(shelves, key) for key in keys[start : start + ASKED_AT_ONCE]]
            await self.find(turn, deadline - loop.time())
            if not all(shelves[0].resident(key) or self.below(shelves, key) for _, key in turn):
                return

    async def find(self, items: Sequence[tuple[Shelves, bytes]], timeout_s: float) -> None:
        """Ask the shared tiers for what of these is not here, for up to `timeout_s`.

        What they have can be loaded then. Cancelling, and the end of the time, leave the question to itself.
        """
        unknown = [
            (shelves, key)
            for shelves, key in items
            if shelves[0].resident(key) is None and not self.below(shelves, key)
        ]
        if not unknown or not self._finders:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                for finder in self._finders:
                    number = self.lowers.index(finder.lower) + 1
                    await finder.find([(shelves[number], key) for shelves, key in unknown])

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

    async def make_lasting(self, names: Sequence[tuple[bytes, bytes]]) -> None:
        """Return once no restart brings back these removed blocks (namespace id, key).

        Raises:
            TierError: a tier cannot promise that now; it will be made good once it is back.
        """
        failing = await self.bury(names)
        if failing:
            raise TierError(
                f"{len(names)} keys are hidden, but {', '.join(failing)}: until it is back, a restart "
                "of the daemon may bring them back; remove them again once it is"
            )

    async def bury(self, names: Sequence[tuple[bytes, bytes]]) -> list[str]:
        """As `make_lasting`, but say which tiers cannot promise it, and why: a clause for each."""
        buried = await asyncio.gather(*[lower.bury(names) for lower in self.lowers])
        return [
            f"tier {lower.name} {'fails' if lower.enabled else 'is turned off'}"
            for lower, done in zip(self.lowers, buried, strict=True)
            if not done
        ]

    # Helpers.

    def _promoted(self, lower: Lower, blocks: Sequence[Block]) -> None:
        """Blocks have arrived from a tier."""
        if not lower.rules.exclusive:
            return
        lower.drop(list(filter(None, map(lower.copy_of, blocks))))
        self.demoter.promoted(lower, blocks)

    def _call_ended(self, lower: Lower) -> None:
        self.promoter.pump(lower)
        self.demoter.pump()  # what one tier was just given, another may have waited for

    def _breaker_changed(self, lower: Lower) -> None:
        if lower.breaker.open:
            self.promoter.give_up_queued(lower)
        self._spawn(self.demoter.owing_changed(lower))
        if not lower.breaker.open:
            self._spawn(self.demoter.offer())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def _trim(tiers: Sequence[Arena | Lower]) -> None:
    for tier in tiers:
        while tier.room.shrink(_TURN):
            tier.settle()
            await asyncio.sleep(0)
