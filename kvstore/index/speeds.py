"""How fast blocks come from the media of each node, and how large they are: as daemons measured it. Pure.

A daemon measures what its own readers saw, so what a node reads over links has their price in it. Of a node
that has not read from a medium yet the nearest others count, medium by medium: the median of its rack, else
of its zone, else of all; where nobody has measured, a default. A daemon that lies is believed of itself,
within limits, and is one of many in a median.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import lru_cache
from math import isfinite
from statistics import median
from typing import Final

from kvstore.block import Medium, Namespace
from kvstore.errors import InvalidRequest
from kvstore.index.estimate import Speed
from kvstore.index.feed import SPACES_MAX, Measures, SpaceMeasure
from kvstore.index.holding import set_of, world_of

# As a daemon that has measured nothing believes of its own tiers (`kvstore.node.lower`); DRAM: one thread
# copies 8 to 13 GB/s out of the arena. Latencies: one turn of the daemon's loop, a queue, a round trip.
DEFAULTS: Final[Mapping[Medium, Speed]] = {
    Medium.DRAM: Speed(0.0005, 10e9),
    Medium.NVME: Speed(0.002, 1.5e9),
    Medium.REMOTE: Speed(0.005, 0.5e9),
}
# What is measured is within these, or a lie: 1 kB/s of a link that hardly works, 1 TB/s of HBM.
_BYTES_PER_S: Final = (1e3, 1e12)
_LATENCY_MAX_S: Final = 10.0
_BLOCK_BYTES_MAX: Final = 1 << 40
_CANONICAL_BYTES_MAX: Final = 32 << 10
# What a daemon said counts so long after it was heard last.
KEPT_S: Final = 300.0
# Medians are made anew so often, or when there is something of which there was none: 2 ms with 1,000 nodes.
_ANEW_S: Final = 5.0
_NODES_MAX: Final = 8192
# No zone or rack is called so.
_EVERYWHERE: Final = "*/*/*"


class Source(StrEnum):
    """Whose measurement a speed is, nearest first."""

    OWN = "measured there"
    RACK = "of its rack"
    ZONE = "of its zone"
    ALL = "of all nodes"
    DEFAULT = "a default"


@dataclass(frozen=True, slots=True)
class SpeedsStatistics:
    """Whose measurements are known, by node; `refused` counts figures that could not be."""

    speeds: Mapping[str, Mapping[Medium, Speed]]
    refused: int


@dataclass(frozen=True, slots=True)
class _Node:
    topology: str
    at_s: float
    speeds: dict[Medium, Speed] = field(default_factory=dict)
    spaces: dict[Namespace, float] = field(default_factory=dict)  # bytes of a token in one shard


class Speeds:
    """What daemons have measured, each of them of itself."""

    def __init__(self) -> None:
        self.refused = 0
        self._nodes: OrderedDict[str, _Node] = OrderedDict()  # who was heard last is last
        self._models: dict[str, dict[Namespace, dict[str, float]]] = {}  # set -> node -> bytes
        self._anew_s = 0.0
        # Made when they are asked for, and forgotten when something changes.
        self._answers: dict[str, tuple[dict[Medium, Speed], dict[Medium, Source]]] = {}
        self._medians: dict[Medium, dict[str, Speed]] = {}  # of racks, zones and all
        self._tokens: dict[str, float | None] = {}

    def observe(self, node: str, topology: str, measures: Measures | None, now_s: float) -> None:
        """A daemon says where it is, and perhaps what it has measured; what it has said before stays else."""
        before = self._nodes.pop(node, None)
        if measures is None:
            known = (
                _Node(topology, now_s) if before is None else replace(before, topology=topology, at_s=now_s)
            )
        else:
            speeds = self._speeds(measures.speeds)
            known = _Node(topology, now_s, speeds, self._spaces(measures.spaces[:SPACES_MAX]))
        self._nodes[node] = known
        if before is None or before.spaces != known.spaces:
            self._enter(node, before, known)
        self._age(now_s)
        self._answers.pop(node, None)
        if before is None or _has_news(before, known) or now_s - self._anew_s >= _ANEW_S:
            self._anew_s = now_s
            self._make_anew()

    def forget(self, node: str) -> None:
        """It is gone for good."""
        known = self._nodes.pop(node, None)
        if known is not None:
            self._enter(node, known, None)
            self._make_anew()

    def of(self, node: str) -> Mapping[Medium, Speed]:
        """How each medium below an engine's own is read on that node, as far as anybody knows."""
        return self._answer(node)[0]

    def sources(self, node: str) -> Mapping[Medium, Source]:
        """Where those speeds come from."""
        return self._answer(node)[1]

    def token_bytes(self, model: str) -> float | None:
        """Bytes of a token's KV in all groups and shards of a model's blocks; None where nobody has any.

        Of several kinds of blocks that which most nodes have counts.
        """
        if model not in self._tokens:
            self._tokens[model] = _token_bytes(self._models.get(model, {}))
        return self._tokens[model]

    def statistics(self) -> SpeedsStatistics:
        """What was measured, without what follows from it."""
        return SpeedsStatistics({name: node.speeds for name, node in self._nodes.items()}, self.refused)

    # What daemons say.

    def _speeds(self, said: Mapping[str, tuple[float, float]]) -> dict[Medium, Speed]:
        speeds: dict[Medium, Speed] = {}
        for medium in Medium:
            if medium in said and medium is not Medium.GPU:
                if _plausible(*said[medium]):
                    speeds[medium] = Speed(*said[medium])
                else:
                    self.refused += 1
        return speeds

    def _spaces(self, said: Sequence[SpaceMeasure]) -> dict[Namespace, float]:
        spaces: dict[Namespace, list[SpaceMeasure]] = {}
        for one in said:
            namespace = _set(one.namespace) if len(one.namespace) <= _CANONICAL_BYTES_MAX else None
            if namespace is None or not 0 < one.blocks <= one.block_bytes <= one.blocks * _BLOCK_BYTES_MAX:
                self.refused += 1
            else:
                spaces.setdefault(namespace, []).append(one)
        return {
            space: sum(one.block_bytes for one in ones) / sum(one.blocks for one in ones) / space.block_tokens
            for space, ones in spaces.items()
        }

    def _enter(self, node: str, before: _Node | None, known: _Node | None) -> None:
        for space in before.spaces if before else ():
            nodes = self._models[space.model][space]
            del nodes[node]
            if not nodes:
                del self._models[space.model][space]
            if not self._models[space.model]:
                del self._models[space.model]
        for space, token_bytes in known.spaces.items() if known else ():
            self._models.setdefault(space.model, {}).setdefault(space, {})[node] = token_bytes
            if self._tokens.get(space.model) is None:
                self._tokens.pop(space.model, None)

    def _age(self, now_s: float) -> None:
        """Let go of who was not heard for long, or of whom there is no room."""
        while self._nodes:
            name, oldest = next(iter(self._nodes.items()))
            if now_s - oldest.at_s <= KEPT_S and len(self._nodes) <= _NODES_MAX:
                return
            self.forget(name)

    # What follows.

    def _make_anew(self) -> None:
        self._answers.clear()
        self._tokens.clear()
        self._medians.clear()

    def _answer(self, name: str) -> tuple[dict[Medium, Speed], dict[Medium, Source]]:
        answer = self._answers.get(name)
        if answer is None:
            answer = self._made(self._nodes.get(name))
            if len(self._answers) <= _NODES_MAX:
                self._answers[name] = answer
        return answer

    def _made(self, node: _Node | None) -> tuple[dict[Medium, Speed], dict[Medium, Source]]:
        speeds: dict[Medium, Speed] = {}
        sources: dict[Medium, Source] = {}
        for medium in DEFAULTS:
            if node is not None and medium in node.speeds:
                speeds[medium], sources[medium] = node.speeds[medium], Source.OWN
            else:
                speeds[medium], sources[medium] = self._nearest(node.topology if node else "", medium)
        return speeds, sources

    def _nearest(self, topology: str, medium: Medium) -> tuple[Speed, Source]:
        if medium not in self._medians:
            self._medians[medium] = _medians(self._nodes.values(), medium)
        medians, (rack, zone) = self._medians[medium], _rack_and_zone(topology)
        for place, source in ((rack, Source.RACK), (zone, Source.ZONE), (_EVERYWHERE, Source.ALL)):
            if place in medians:
                return medians[place], source
        return DEFAULTS[medium], Source.DEFAULT


def _has_news(before: _Node, known: _Node) -> bool:
    """Whether there is more than other figures for what there was."""
    if before.topology != known.topology or before.speeds.keys() != known.speeds.keys():
        return True
    return before.spaces.keys() != known.spaces.keys()


def _plausible(latency_s: float, bytes_per_s: float) -> bool:
    least, most = _BYTES_PER_S
    return 0 <= latency_s <= _LATENCY_MAX_S and least <= bytes_per_s <= most and isfinite(latency_s)


def _rack_and_zone(topology: str) -> tuple[str, str]:
    """The names of both; empty for none. A zone is no rack's name: that has the zone's before it."""
    zone, slash, _ = topology.partition("/")
    return (topology if slash else ""), zone


def _medians(nodes: Iterable[_Node], medium: Medium) -> dict[str, Speed]:
    """Of each rack, each zone, and of all."""
    measured: dict[str, list[Speed]] = {}
    for node in nodes:
        if (speed := node.speeds.get(medium)) is not None:
            for place in {_EVERYWHERE, *_rack_and_zone(node.topology)} - {""}:
                measured.setdefault(place, []).append(speed)
    return {place: _median(speeds) for place, speeds in measured.items()}


def _median(speeds: Sequence[Speed]) -> Speed:
    return Speed(median([one.latency_s for one in speeds]), median([one.bytes_per_s for one in speeds]))


def _token_bytes(spaces: Mapping[Namespace, Mapping[str, float]]) -> float | None:
    families: dict[Namespace, dict[str, tuple[int, float]]] = {}
    for space, nodes in spaces.items():
        groups = families.setdefault(replace(space, group="", block_tokens=1), {})
        found = len(nodes), world_of(space) * median(nodes.values())
        groups[space.group] = max(found, groups.get(space.group, (0, 0.0)))
    if not families:
        return None
    best = max(families.values(), key=lambda groups: max(groups.values()))
    return sum(token_bytes for _, token_bytes in best.values())


@lru_cache(4096)
def _set(canonical: bytes) -> Namespace | None:
    """The set of shards that a namespace belongs to, whoever's it is; None where it is none."""
    try:
        return set_of(replace(Namespace.from_canonical(canonical), salt=""))
    except InvalidRequest:
        return None
