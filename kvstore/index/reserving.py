"""Reserves: what an engine was chosen for is held in its nodes' DRAM until it gets there.

A reserve is holds at the daemons of the engine, one for each namespace that one has leading blocks of. The
daemons end them by their time; nothing here has to. What the index knows is a hint, and so is the answer: a
daemon pins what it has, and that is told.
"""

import asyncio
import heapq
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

from kvstore.block import Namespace
from kvstore.engine_keys import data_keys
from kvstore.errors import InvalidRequest
from kvstore.index import feed
from kvstore.index.holding import shard_of, world_of
from kvstore.index.keytable import Key
from kvstore.index.locality import Locality
from kvstore.index.masks import bits_of
from kvstore.index.node_stream import NodeStream
from kvstore.index.placement import Engine
from kvstore.index.query import Query

# Reserves at a time, some 300 bytes each, and messages for one of them: 8 shards of 2 groups.
RESERVES_MAX: Final = 65_536
_HOLDS_MAX: Final = 64
# Making the keys of so many tokens takes 2 ms or more: it is done beside the loop.
_ASIDE_TOKENS: Final = 32_768


class Follower(Protocol):
    """What reserving needs of who follows a daemon."""

    stream: NodeStream

    def say(self, message: feed.Hold | feed.Unhold) -> bool:
        """Send it, or do not where the daemon takes nothing now."""


@dataclass(frozen=True, slots=True)
class NodeReserved:
    """What became of a reserve on one node, in blocks: pinned, on their way up, and not there after all."""

    pinned: int = 0
    loading: int = 0
    missing: int = 0


@dataclass(frozen=True, slots=True)
class Reserved:
    """A reserve as it was when it began. `id` is for `release`, 0 where nothing was asked for.

    `problems` say in a sentence each what is not held, and why.
    """

    id: int
    nodes: Mapping[str, NodeReserved]
    problems: Sequence[str] = ()

    @property
    def blocks(self) -> int:
        """Those that are in DRAM, or will be."""
        return sum(node.pinned + node.loading for node in self.nodes.values())


@dataclass(slots=True)
class ReservingStatistics:
    """Totals, but for `open`, of reserves; `refused` and `unanswered` count holds."""

    open: int = 0
    reserves: int = 0
    released: int = 0
    expired: int = 0
    refused: int = 0
    unanswered: int = 0


@dataclass(frozen=True, slots=True)
class _Wish:
    """Leading keys to hold on a node, in a namespace as that node calls it."""

    node: str
    namespace: bytes
    keys: Sequence[bytes]


class Reserving:
    """`follower` gives who follows the daemon of a name, if anybody does. For one event loop."""

    def __init__(self, locality: Locality, follower: Callable[[str], Follower | None]) -> None:
        self._locality = locality
        self._follower = follower
        self._ids = itertools.count(1)
        self._waiting: dict[tuple[str, int], asyncio.Future[feed.Held]] = {}
        # Reserve -> its holds: node and id; and by when they end.
        self._open: dict[int, list[tuple[str, int]]] = {}
        self._ends: list[tuple[float, int]] = []
        self._statistics = ReservingStatistics()

    async def reserve(
        self,
        engine: Engine,
        query: Query,
        keys: Mapping[Namespace, Sequence[Key]],
        ttl_s: float,
        timeout_s: float = 0.05,
    ) -> Reserved:
        """Hold for `ttl_s` what the engine's nodes have of a prompt, and begin to load what is below.

        `keys` are the prompt's in the index, as `keys_of` has them. Whoever has not answered within
        `timeout_s` holds it all the same. Cancelling ends what was begun.
        """
        loop = asyncio.get_running_loop()
        self._expire(loop.time())
        if len(self._open) >= RESERVES_MAX:
            problem = f"{len(self._open)} reserves; the limit is {RESERVES_MAX}: report outcomes, or shorter"
            return Reserved(0, {}, [problem])
        problems = [f"{node} is silent" for node in engine.nodes if self._is_silent(node)]
        wishes = await self._wishes(engine, query, keys, problems)
        number = next(self._ids)
        asked = [(wish, hold_id) for wish in wishes if (hold_id := self._ask(wish, ttl_s, problems))]
        if not asked:
            return Reserved(0, {}, problems)
        self._open[number] = [(wish.node, hold_id) for wish, hold_id in asked]
        heapq.heappush(self._ends, (loop.time() + ttl_s, number))
        self._statistics.reserves += 1
        try:
            await asyncio.wait([self._waiting[where] for where in self._open[number]], timeout=timeout_s)
        except asyncio.CancelledError:
            self.release(number)
            raise
        finally:
            answers = [(wish, self._waiting.pop((wish.node, hold_id))) for wish, hold_id in asked]
        return Reserved(number, self._collected(answers, timeout_s, problems), problems)

    def release(self, number: int) -> bool:
        """Hold it no longer. False where it is over, or was none."""
        holds = self._open.pop(number, None)
        for node, hold_id in holds or ():
            if (follower := self._follower(node)) is not None:
                follower.say(feed.Unhold(hold_id))
        self._statistics.released += holds is not None
        return holds is not None

    def held(self, node: str, answer: feed.Held) -> None:
        """A daemon has answered; nobody may wait for that any more."""
        waiting = self._waiting.get((node, answer.id))
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)

    def statistics(self) -> ReservingStatistics:
        """As of now."""
        self._expire(asyncio.get_running_loop().time())
        return replace(self._statistics, open=len(self._open))

    # What to ask for.

    async def _wishes(
        self, engine: Engine, query: Query, keys: Mapping[Namespace, Sequence[Key]], problems: list[str]
    ) -> list[_Wish]:
        wishes: list[_Wish] = []
        for space, known in keys.items():
            places = list(self._places(engine, space, known))
            if not places:
                continue
            depth = max(depth for _, _, depth in places)
            names = await _data_keys(query, space, known[:depth])
            if isinstance(names, str):
                problems.append(names)
                continue
            for node, canonical, deep in places:
                starts = range(0, deep, feed.KEYS_MAX)
                wishes += [_Wish(node, canonical, names[i : min(deep, i + feed.KEYS_MAX)]) for i in starts]
        if len(wishes) > _HOLDS_MAX:
            problems.append(f"{len(wishes)} holds would be needed; the limit is {_HOLDS_MAX}: it is not all")
        return wishes[:_HOLDS_MAX]

    def _places(
        self, engine: Engine, space: Namespace, keys: Sequence[Key]
    ) -> Iterator[tuple[str, bytes, int]]:
        """Which nodes of the engine have leading blocks of a namespace's set, how they call it, how many."""
        groups = self._locality.depths(space, keys)
        shards = [shard_of(space, rank, world_of(space)) for rank in range(world_of(space))] if groups else []
        for node in engine.nodes:
            holding, follower = self._locality.holding(node), self._follower(node)
            if holding is None or follower is None:
                continue
            for shard in shards:
                place = holding.place(shard)
                bits = 0 if place is None else bits_of(place.slot)
                depth = max([depth for depth, has in groups if has & bits], default=0)
                for canonical in follower.stream.canonicals(shard) if depth else ():
                    yield node, canonical, depth

    # Asking.

    def _ask(self, wish: _Wish, ttl_s: float, problems: list[str]) -> int:
        """Send a wish; the id of the hold, or 0 where it could not be sent."""
        follower = self._follower(wish.node)
        if follower is None or self._is_silent(wish.node):
            problem = f"{wish.node} is silent"
        elif not follower.stream.takes_holds:
            problem = f"{wish.node} takes no holds of this index: it is of an earlier release, or has a token"
            problem += " and no key; give its [events] and this index the same key_file"
        elif not follower.say(feed.Hold(hold_id := next(self._ids), wish.namespace, list(wish.keys), ttl_s)):
            problem = f"{wish.node} takes no message now; it is busy"
        else:
            self._waiting[wish.node, hold_id] = asyncio.get_running_loop().create_future()
            return hold_id
        if problem not in problems:
            problems.append(problem)
        return 0

    def _is_silent(self, node: str) -> bool:
        """Whether nothing is heard of it now: what it has is in no answers until it is heard again."""
        follower = self._follower(node)
        return follower is None or follower.stream.silent

    def _collected(
        self,
        answers: Sequence[tuple[_Wish, "asyncio.Future[feed.Held]"]],
        timeout_s: float,
        problems: list[str],
    ) -> dict[str, NodeReserved]:
        nodes: dict[str, NodeReserved] = {}
        for wish, waiting in answers:
            node = nodes.setdefault(wish.node, NodeReserved())
            if not waiting.done():
                self._statistics.unanswered += 1
                problem = f"{wish.node} has not answered within {timeout_s * 1000:g} ms"
            elif problem := waiting.result().refused:
                self._statistics.refused += 1
                problem = f"{wish.node} refuses: {problem:.400}"
            else:
                found = waiting.result()
                nodes[wish.node] = NodeReserved(
                    node.pinned + found.pinned, node.loading + found.loading, node.missing + found.missing
                )
            if problem and problem not in problems:
                problems.append(problem)
        return nodes

    def _expire(self, now_s: float) -> None:
        while self._ends and self._ends[0][0] <= now_s:
            _, number = heapq.heappop(self._ends)
            self._statistics.expired += self._open.pop(number, None) is not None
        if len(self._ends) > 2 * RESERVES_MAX:  # most were released
            self._ends = [end for end in self._ends if end[1] in self._open]
            heapq.heapify(self._ends)


async def _data_keys(query: Query, space: Namespace, keys: Sequence[Key]) -> Sequence[bytes] | str:
    """The keys that a store has for these, or why they cannot be known."""
    if query.keys is not None:
        keys = query.keys[: len(keys)]
    if isinstance(keys[0], bytes):
        return keys  # type: ignore[return-value]
    if query.tokens is None:
        return f"{space}: keys were given as numbers, which name no data; give digests, or tokens"
    tokens = query.tokens[: len(keys) * space.block_tokens]
    try:
        if len(tokens) < _ASIDE_TOKENS:
            made = _made(query, space, tokens)
        else:
            made = await asyncio.get_running_loop().run_in_executor(None, _made, query, space, tokens)
    except InvalidRequest as error:
        return f"{space}: {error}"
    if made is None:
        return f"{space}: keys of scheme {space.scheme!r:.80} name no data, or cannot be made here"
    return made


def _made(query: Query, space: Namespace, tokens: Sequence[int]) -> list[bytes] | None:
    return data_keys(space, tokens, lora=query.lora, salt=query.salt, media=query.media)
