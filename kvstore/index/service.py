"""The running index: publishers into one Locality, and lookups out of it. It knows no HTTP.

Daemons come and go with the membership; engines are configured, or named by the daemons that they use. A
daemon that no engine is known of answers under its own name. All of it lives on one event loop; `Tending`
takes away what is dead, in slices between its turns.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import zmq

from kvstore.block import Namespace
from kvstore.errors import ConfigError, InvalidRequest
from kvstore.index.answer import Answer, Freshness, Located, best_first, prompt_tokens_of
from kvstore.index.compact import Compact
from kvstore.index.engine_source import SourceStatistics
from kvstore.index.engine_stream import EngineStream
from kvstore.index.engine_subscriber import EngineSubscriber
from kvstore.index.keytable import Key
from kvstore.index.locality import LocalityStatistics
from kvstore.index.member import Member, Source
from kvstore.index.membership import Membership, MembershipStatistics
from kvstore.index.node_state import NodeStreamStatistics
from kvstore.index.node_stream import Names
from kvstore.index.node_subscriber import NodeSubscriber
from kvstore.index.placement import Engine, Placement
from kvstore.index.query import Query, Search, keys_of, search_of
from kvstore.index.remembrance import remembered
from kvstore.index.reserving import Reserving, ReservingStatistics
from kvstore.index.resolver import Resolver
from kvstore.index.saved import SavedIndex, SavedTable
from kvstore.index.searching import search
from kvstore.index.settings import Rank
from kvstore.index.speeds import Speeds, SpeedsStatistics
from kvstore.index.tending import Tending
from kvstore.index.turns import finished, parts, pause
from kvstore.statistics import Latencies

logger = logging.getLogger(__name__)

# Sockets of one process: each subscriber has up to four, each with a file of its own.
_SOCKETS_MAX: Final = 65_000
_JOIN_S: Final = 0.25
# Each has up to four sockets.
_ENGINES_MAX: Final = 8192
# Making the keys of so many tokens, in one way, takes 2 ms or more: it is done beside the loop.
_ASIDE_TOKENS: Final = 32_768
# What was known before a restart is kept so long for publishers that have not come back.
_REMEMBERED_S: Final = 60.0
# What a start waits for publishers before lookups are answered without them.
SETTLE_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class IndexStatistics:
    """All of the index now. `left_out` counts namespaces that lookups had no room for, `late` is how late
    the event loop came to what was due, `age_s` that of the oldest knowledge that lookups use."""

    locality: LocalityStatistics
    membership: MembershipStatistics
    nodes: list[NodeStreamStatistics]
    engines: list[SourceStatistics]
    engine_ages_s: dict[str, float]
    lookups: Latencies
    left_out: int
    late: Latencies
    late_max_s: float
    stall_max_s: float
    age_s: float
    uptime_s: float
    speeds: SpeedsStatistics
    reserving: ReservingStatistics


class Index:
    """Follows its publishers from `start` to `close`, both on the loop that it was made on."""

    def __init__(
        self,
        ranks: Sequence[Rank],
        sources: Sequence[Source],
        *,
        blocks_max: int,
        secret: bytes | None = None,
        snapshot: Path | None = None,
    ) -> None:
        """Begins with what the file `snapshot` holds, if there is one that can be used."""
        self._remembrance = remembered(snapshot, blocks_max)
        self.locality = self._remembrance.locality
        self.compact = Compact(self.locality)
        self._ranks = {rank.engine.name: rank for rank in ranks}
        self._secret = secret
        self._loop = asyncio.get_running_loop()
        self._started_s = time.monotonic()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, _SOCKETS_MAX)
        self._resolver = Resolver()
        self._names = Names(self._ranks)
        self._nodes: dict[str, NodeSubscriber] = {}
        self._engines: dict[str, EngineSubscriber] = {}
        self._joined: dict[str, tuple[str, ...]] | None = None
        self._joining: asyncio.Handle | None = None
        self.speeds = Speeds()
        self.reserving = Reserving(self.locality, self._follower)
        self._membership = Membership(sources, self._change, self._is_heard)
        self._tending = Tending(self.locality)
        self._lookups = Latencies()
        self._left_out = 0

    def start(self) -> None:
        """Connect to the engines, and ask which daemons there are; never waits.

        Raises:
            ConfigError: an endpoint is none.
        """
        for name, rank in self._ranks.items():
            self._engines[name] = self._subscriber(rank)
            self._remembrance.claim_engine(self._engines[name].stream)
        self._membership.start()
        self._tending.start()
        self._join()

    async def close(self) -> None:
        """Hear nobody any more."""
        if self._joining is not None:
            self._joining.cancel()
        self._tending.close()
        await self._membership.close()
        for node in self._nodes.values():
            node.close()
        for engine in self._engines.values():
            engine.close()
        self._resolver.close()
        self._context.destroy(linger=0)

    def add_engine(self, rank: Rank) -> None:
        """Follow one more engine; answers tell of it within _JOIN_S. The same once more changes nothing.

        Raises:
            InvalidRequest: its name is another's, or there are too many, or an endpoint is none.
        """
        name = rank.engine.name
        if self._ranks.get(name) == rank:
            return
        if name in self._ranks or name in self._names:
            raise InvalidRequest(f"{name} is the name of another engine or daemon; take that away, or rename")
        if len(self._ranks) >= _ENGINES_MAX:
            raise InvalidRequest(f"there are {len(self._ranks)} engines, the most; take one away")
        try:
            self._engines[name] = self._subscriber(rank)
        except ConfigError as exc:
            raise InvalidRequest(str(exc)) from exc
        self._remembrance.claim_engine(self._engines[name].stream)
        self._ranks[name] = rank
        self._joined = None

    def remove_engine(self, name: str) -> bool:
        """Follow an engine no longer, and forget its blocks at once. Whether there was one."""
        if self._ranks.pop(name, None) is None:
            return False
        self._engines.pop(name).close()
        self._joined = None
        return True

    def engine_stream(self, name: str) -> EngineStream | None:
        """What one engine says of its own cache."""
        subscriber = self._engines.get(name)
        return None if subscriber is None else subscriber.stream

    async def lookup(self, query: Query, engines: Iterable[str] | None = None) -> list[Answer]:
        """What each engine, of those named or of all, has of a prompt; most first, in the fastest medium.

        Raises:
            InvalidRequest: a key is none.
        """
        located = await self.find(query, engines)
        return sorted(self.answers(located.engines, located.placements), key=best_first)

    async def find(self, query: Query, engines: Iterable[str] | None = None) -> Located:
        """The same in no order and without a word of how old it is, with the keys that were looked for.

        Of all engines those that are known to have another model are left out. Engines that are named and
        not known have nothing: who names them means to send prompts there.

        Raises:
            InvalidRequest: a key is none.
        """
        began_s = time.perf_counter()
        wanted = search_of(query, self.locality)
        keys = await self._keys(query, wanted)
        asked = self._asked(query.model, engines)
        await pause(len(asked))
        placements = await self.placements(keys, asked)
        self._lookups.observe(time.perf_counter() - began_s)
        return Located(asked, placements, keys, prompt_tokens_of(query, wanted.spaces))

    async def placements(
        self, keys: Mapping[Namespace, Sequence[Key]], engines: Sequence[Engine]
    ) -> list[Placement]:
        """What each of these engines has of the prompt whose keys these are."""
        placing = self.compact.placing(await finished(search(self.locality, keys)))
        placements: list[Placement] = []
        for some in parts(engines):
            placements += placing(some)
            await pause(len(engines))
        return placements

    def answers(self, engines: Iterable[Engine], placements: Iterable[Placement]) -> list[Answer]:
        """What each of these engines has, with how good that knowledge is now."""
        now_s, loop_s = time.monotonic(), self._loop.time()
        known: dict[tuple[str, ...], Freshness] = {}
        answers = []
        for engine, placement in zip(engines, placements, strict=True):
            near = known.get(engine.nodes)
            if near is None:
                near = known[engine.nodes] = self._near(engine.nodes, loop_s)
            answers.append(self._answer(engine, placement, near, now_s))
        return answers

    async def _keys(self, query: Query, wanted: Search) -> dict[Namespace, Sequence[Key]]:
        """Of many tokens they are made beside the loop."""
        self._left_out += wanted.left_out
        given = 2 * len(query.keys or ())  # checking a key takes as long as reading so many tokens
        if wanted.effort(len(query.tokens or ())) + given >= _ASIDE_TOKENS:
            return await self._loop.run_in_executor(None, keys_of, query, wanted.spaces)
        return keys_of(query, wanted.spaces)

    def missing(self) -> list[str]:
        """What lookups do not know yet though it is configured, or a member; lines for people.

        Once SETTLE_S are over nothing is waited for: what is away only shortens hits.
        """
        if time.monotonic() - self._started_s > SETTLE_S:
            return []
        self._see_engines()  # those of a daemon that was heard just now
        return self.unknown()

    def unknown(self) -> list[str]:
        """Who tells of no daemon, and publishers of which nothing is known now."""
        nodes = [each for each in self._nodes.values() if math.isinf(each.age_s())]
        engines = [name for name, each in self._engines.items() if math.isinf(each.age_s())]
        sources = self._membership.statistics().sources
        return [
            *[f"{each.label} cannot be asked: {each.failing}" for each in sources if each.failing],
            *[f"{each.label} names no daemon" for each in sources if not each.members and not each.failing],
            *[f"the daemon at {each.stream.address} was not heard" for each in nodes],
            *[f"engine {name} was not heard" for name in engines],
        ]

    def age_s(self) -> float:
        """The age of the oldest knowledge that lookups use."""
        ages = [each.age_s() for each in self._nodes.values()]
        ages += [each.age_s() for each in self._engines.values()]
        return max((age for age in ages if not math.isinf(age)), default=0.0)

    def statistics(self) -> IndexStatistics:
        """All of it now."""
        return IndexStatistics(
            locality=self.locality.statistics(),
            membership=self._membership.statistics(),
            nodes=[each.statistics() for each in self._nodes.values()],
            engines=[each.statistics() for each in self._engines.values()],
            engine_ages_s={name: each.age_s() for name, each in self._engines.items()},
            lookups=replace(self._lookups, counts=list(self._lookups.counts)),
            left_out=self._left_out,
            late=self._tending.late,
            late_max_s=self._tending.late_max_s,
            stall_max_s=self._tending.stall_max_s,
            age_s=self.age_s(),
            uptime_s=time.monotonic() - self._started_s,
            speeds=self.speeds.statistics(),
            reserving=self.reserving.statistics(),
        )

    def save(self, write: Callable[[SavedTable], None]) -> SavedIndex:
        """What to go on from after a restart; `write` is given the tables."""
        nodes = [node for each in self._nodes.values() if (node := each.stream.save()) is not None]
        engines = [engine for each in self._engines.values() if (engine := each.stream.save()) is not None]
        names = [*[node.name for node in nodes], *[engine.name for engine in engines]]
        return SavedIndex(self.locality.save(names, write), nodes, engines)

    # Daemons.

    def _change(self, joined: Collection[Member], left: Collection[Member]) -> None:
        for member in left:
            logger.info("follows the daemon at %s no longer", member.address)
            self._nodes.pop(member.address).close()
        for member in joined:
            logger.info("follows the daemon at %s", member.address)
            subscriber = NodeSubscriber(
                self._context,
                self.locality,
                self._names,
                member.address,
                expected=member.name,
                secret=self._secret,
            )
            subscriber.stream.on_measured = self.speeds.observe
            subscriber.stream.on_held = self.reserving.held
            self._nodes[member.address] = subscriber
            self._remembrance.claim_node(subscriber.stream, self._names, member.name)
            subscriber.start()

    def _follower(self, node: str) -> NodeSubscriber | None:
        stream = self._names.get(node)
        return None if stream is None else self._nodes.get(stream.address)

    def _is_heard(self, member: Member) -> bool:
        subscriber = self._nodes.get(member.address)
        return subscriber is not None and subscriber.heard

    # Engines and their nodes.

    def _subscriber(self, rank: Rank) -> EngineSubscriber:
        return EngineSubscriber(self._context, rank.source, self.locality, self._resolver)

    def _join(self) -> None:
        """See who is there, and which engines use which nodes."""
        self._joining = self._loop.call_later(_JOIN_S, self._join)
        if time.monotonic() - self._started_s > _REMEMBERED_S:
            self._remembrance.forget()
        self._see_engines()

    def _see_engines(self) -> None:
        node_to_engines = {name: stream.engines for name, stream in sorted(self._names.items())}
        if node_to_engines != self._joined:
            self._joined = node_to_engines
            self.locality.set_engines(join([rank.engine for rank in self._ranks.values()], node_to_engines))

    def _asked(self, model: str, names: Iterable[str] | None) -> Sequence[Engine]:
        if names is None:
            return [one for one in self.locality.engines if one.model in ("", model)]
        wanted = dict.fromkeys(names)
        found = [one for one in self.locality.engines if one.name in wanted or _address(one.name) in wanted]
        known = {name for one in found for name in (one.name, _address(one.name))}
        return [*found, *[Engine(name) for name in wanted if name not in known]]

    def _answer(self, engine: Engine, placement: Placement, near: Freshness, now_s: float) -> Answer:
        own = self._engines.get(engine.name)
        age_s, incomplete = near.age_s, near.incomplete
        if own is not None:
            incomplete |= own.incomplete
            age_s = max(age_s, own.stream.age_s(now_s))
        elif math.isinf(age_s):
            age_s = math.inf
        return Answer(engine, placement, age_s, near.epochs, incomplete)

    def _near(self, nodes: Iterable[str], now_s: float) -> Freshness:
        streams = [self._names[node] for node in nodes if node in self._names]
        return Freshness(
            max([stream.age_s(now_s) for stream in streams], default=-math.inf),
            {stream.name: stream.epoch for stream in streams if stream.name and stream.epoch is not None},
            any(stream.over for stream in streams),
        )


def join(engines: Iterable[Engine], node_to_engines: dict[str, tuple[str, ...]]) -> list[Engine]:
    """The engines with the nodes that name them, by address or ADDRESS#RANK; those that only nodes name; and
    nodes without an engine, each as one that has its name."""
    by_name = {engine.name: engine for engine in engines}
    known = {_address(name) for name in by_name} | set(by_name)
    for address in dict.fromkeys(name for names in node_to_engines.values() for name in names):
        if address not in known:
            by_name[address] = Engine(address)
    naming: dict[str, list[str]] = {}
    for node, names in node_to_engines.items():
        for name in names:
            naming.setdefault(name, []).append(node)
    order = {node: place for place, node in enumerate(node_to_engines)}
    joined = []
    for engine in by_name.values():
        own = {*naming.get(engine.name, ()), *naming.get(_address(engine.name), ())}
        nodes = tuple(dict.fromkeys((*engine.nodes, *sorted(own, key=order.__getitem__))))
        joined.append(engine if nodes == engine.nodes else Engine(engine.name, nodes, engine.model))
    used = {node for engine in joined for node in engine.nodes}.union(by_name)
    return joined + [Engine(node, (node,)) for node in node_to_engines if node not in used]


def _address(name: str) -> str:
    """Of an engine's rank, its engine's."""
    return name.partition("#")[0]
