"""Routes prompts by what the index finds, how fast engines are, and what was routed before. It knows no HTTP.

One search gives what each engine has; the chooser orders them; who asks to be routed has the first one taken,
and its blocks held in the nodes' DRAM where that was asked for. All of it is soft state on one event loop.
"""

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from kvstore.block import Namespace
from kvstore.content_keys import content_keys
from kvstore.errors import InvalidRequest, KVStoreError
from kvstore.index.answer import Answer, Located
from kvstore.index.chooser import Candidate, Chain, Choice, Chooser, ChooserStatistics, Load, Outcome
from kvstore.index.explain import explain
from kvstore.index.keytable import Key
from kvstore.index.query import Query
from kvstore.index.reserving import Reserved
from kvstore.index.service import Index
from kvstore.index.traits import Paces
from kvstore.index.turns import parts, pause
from kvstore.statistics import Latencies

# Keys by which prompts that were just routed are known again: 131,072 tokens in blocks of 16.
_CHAIN_KEYS_MAX: Final = 8192
# Where nobody has blocks of the model yet: in blocks of so many tokens, and no more tokens than take 1 ms.
_COLD_BLOCK_TOKENS: Final = 16
_COLD_TOKENS_MAX: Final = 16_384
# Reserves whose end has not been reported.
_RESERVES_MAX: Final = 1 << 16
# What a lookup waits for the daemons of the engine that it reserves at.
RESERVE_WAIT_S: Final = 0.05


class UnknownRoute(KVStoreError):
    """Nobody was given this id here."""


class EndedRoute(KVStoreError):
    """The prompt was routed, and that is over: its outcome is known, or was not told in time."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What is wanted beside the answers: `loads` are of candidates, None for all engines that are known.

    `route`: the first one is taken. `reserve_s` above 0 implies that, and holds the prefix there so long.
    Of `top` engines is told, or of all.
    """

    loads: Mapping[str, Load | None] | None = None
    route: bool = False
    reserve_s: float = 0.0
    top: int | None = None


class Ranked(msgspec.Struct, frozen=True, gc=False):
    """One engine: what it has, and what it could do."""

    answer: Answer
    choice: Choice


@dataclass(frozen=True, slots=True)
class Routed:
    """Engines, best first. `id` names the route that was taken, None where none was."""

    prompt_tokens: int
    ranked: Sequence[Ranked]
    id: str | None = None
    reserved: Reserved | None = None

    def reasons(self, place: int) -> list[str]:
        """Why an engine is where it is."""
        return explain(self.ranked[place].choice, self.ranked[0].choice)


@dataclass(frozen=True, slots=True)
class RoutingStatistics:
    """All of it now; `errors` are of predictions, in seconds either way. `unknown` outcomes were of no route,
    `late` ones of routes that were over."""

    chooser: ChooserStatistics
    errors: Latencies
    unknown: int
    late: int


class Routing:
    """The state of routing beside an index."""

    def __init__(
        self, index: Index, paces: Paces, chooser: Chooser, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._index = index
        self._paces = paces
        self._chooser = chooser
        self._clock = clock
        # Ids of another process, or of one before this, are not taken for ours.
        self._prefix = os.urandom(6).hex()
        self._last = 0
        self._reserves: OrderedDict[str, int] = OrderedDict()
        self._errors = Latencies()
        self._unknown = self._late = 0

    async def lookup(self, query: Query, wish: Wish) -> Routed:
        """What each engine has and could do, best first.

        Raises:
            InvalidRequest: a key is none.
        """
        located = await self._index.find(query, wish.loads)
        if not located.engines:
            return Routed(located.prompt_tokens, [])
        chain = chain_of(query, located.keys)
        choices = await self._choices(query.model, located, chain, wish)
        route, reserved = None, None
        if wish.route or wish.reserve_s:
            route = self._new_id()
            self._chooser.take(route, located.prompt_tokens, chain, choices[0], self._clock())
        await pause(len(choices))
        ranked = await self._ranked(located, choices[: wish.top])
        if route is not None and wish.reserve_s:
            reserved = await self._index.reserving.reserve(
                ranked[0].answer.engine, query, located.keys, wish.reserve_s, timeout_s=RESERVE_WAIT_S
            )
            if reserved.id:
                self._remember(route, reserved.id)
        return Routed(located.prompt_tokens, ranked, route, reserved)

    def outcome(
        self,
        route: str,
        *,
        engine: str | None = None,
        ttft_s: float | None = None,
        cached_tokens: int | None = None,
        failed: bool = False,
        ended: bool = False,
    ) -> Outcome:
        """What became of a prompt; what is held for it is held no longer.

        Raises:
            UnknownRoute, EndedRoute: it is not under way.
        """
        reserve = self._reserves.pop(route, None)
        if reserve is not None:
            self._index.reserving.release(reserve)
        found = self._chooser.outcome(
            route,
            self._clock(),
            engine=engine,
            ttft_s=ttft_s,
            cached_tokens=cached_tokens,
            failed=failed,
            ended=ended,
        )
        if found is None:
            if self._was_given(route):
                self._late += 1
                raise EndedRoute(
                    f"route {route} is over: report its outcome once, within seconds of its time"
                )
            self._unknown += 1
            raise UnknownRoute(f"route {route!r:.60} is not known here; give the id that a lookup answered")
        if found.error_s is not None:
            self._errors.observe(abs(found.error_s))
        return found

    def statistics(self) -> RoutingStatistics:
        """All of it now."""
        errors = Latencies(list(self._errors.counts), self._errors.sum_s)
        return RoutingStatistics(self._chooser.statistics(), errors, self._unknown, self._late)

    async def _choices(self, model: str, located: Located, chain: Chain | None, wish: Wish) -> list[Choice]:
        """Of all engines, best first; to be taken in the turn in which it returns."""
        engines, placements = located.engines, located.placements
        loads, traits = wish.loads or {}, self._paces.of(model)
        ranking = self._chooser.ranking(
            located.prompt_tokens, chain, len(engines), self._clock(), fleet=model
        )
        for some in parts(list(zip(engines, placements, strict=True))):
            ranking.weigh(
                [Candidate(had, traits(engine), _load_of(engine.name, loads)) for engine, had in some]
            )
            await pause(len(engines))
        return ranking.done()

    async def _ranked(self, located: Located, choices: Sequence[Choice]) -> list[Ranked]:
        by_name = {engine.name: engine for engine in located.engines}
        ranked: list[Ranked] = []
        for some in parts(choices):
            placements = [choice.placement for choice in some]
            answers = self._index.answers([by_name[one.engine] for one in placements], placements)
            ranked += map(Ranked, answers, some)
            await pause(len(choices))
        return ranked

    def _new_id(self) -> str:
        self._last += 1
        return f"{self._prefix}-{self._last}"

    def _was_given(self, route: str) -> bool:
        prefix, _, number = route.partition("-")
        return (
            prefix == self._prefix and number.isdecimal() and len(number) < 20 and int(number) <= self._last
        )

    def _remember(self, route: str, reserve: int) -> None:
        """Those whose outcome nobody reports are forgotten, oldest first; their daemons end them."""
        self._reserves[route] = reserve
        if len(self._reserves) > _RESERVES_MAX:
            self._reserves.popitem(last=False)


def chain_of(query: Query, keys: Mapping[Namespace, Sequence[Key]]) -> Chain | None:
    """The prompt's keys in one namespace, that with the smallest blocks; where there is none, by its tokens.

    Of a long prompt its beginning is enough to know it again.
    """
    space = repr((query.model, query.lora, query.salt))
    if keys:
        finest = min(keys, key=lambda each: (each.block_tokens, each.scheme, each.group, each.dtype))
        return Chain(keys[finest][:_CHAIN_KEYS_MAX], finest.block_tokens, space)
    if query.tokens is None:
        block_tokens = Namespace(query.model, **query.fields).block_tokens
        return Chain(query.keys[:_CHAIN_KEYS_MAX], block_tokens, space) if query.keys else None
    try:
        made = content_keys(
            query.tokens[:_COLD_TOKENS_MAX],
            _COLD_BLOCK_TOKENS,
            lora=query.lora,
            salt=query.salt,
            media=query.media,
        )
    except InvalidRequest:  # no such hash is installed
        return None
    return Chain(made, _COLD_BLOCK_TOKENS, space) if made else None


def _load_of(engine: str, loads: Mapping[str, Load | None]) -> Load | None:
    """What was said of an engine, or of the one that it is a rank of."""
    if not loads:
        return None
    load = loads.get(engine)
    return loads.get(engine.partition("#")[0]) if load is None else load
