"""What engines have of a prompt, from what publishers have: their own, and that of their nodes. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

from kvstore.block import Namespace
from kvstore.index.holding import NAMESPACES_MAX, Holding, shard_of, world_of
from kvstore.index.masks import SLOT_BITS

_NOTHING: Final[Sequence[int]] = (0,) * SLOT_BITS
_ALL: Final = (1 << SLOT_BITS) - 1
# The places of the media whose bits are set.
_MEDIA_OF: Final = [[place for place in range(SLOT_BITS) if bits >> place & 1] for bits in range(_ALL + 1)]


@dataclass(frozen=True, slots=True)
class Engine:
    """A serving process as routers address it; a rank with a cache of its own is one of its own.

    `name` is also that of the publisher of its GPU cache. `nodes` are the names of the daemons that serve it;
    of blocks in shards each shard must be on one of them.
    """

    name: str
    nodes: tuple[str, ...] = ()
    model: str = ""


@dataclass(frozen=True, slots=True)
class Placement:
    """Leading tokens that an engine need not compute, cumulative: `dram` counts what is in gpu or dram."""

    engine: str
    gpu: int = 0
    dram: int = 0
    nvme: int = 0
    remote: int = 0


@dataclass(frozen=True, slots=True)
class Found:
    """How many leading keys of a namespace who has: (depth, bits) groups, as `KeyTable.depths` gives them."""

    namespace: Namespace
    groups: Sequence[tuple[int, int]]


def placements(
    engines: Iterable[Engine], found: Iterable[Found], holdings: Mapping[str, Holding]
) -> list[Placement]:
    """What each engine has.

    Namespaces that differ in their group hold parts of the same blocks, of which an engine needs all; of
    others it may use the one that gives most.
    """
    families: dict[Namespace, list[_Part]] = {}
    for each in found:
        world = world_of(each.namespace)
        shards = [shard_of(each.namespace, rank, world) for rank in range(world)]
        part = _Part(each.namespace, shards, each.groups)
        families.setdefault(_without_group(each.namespace), []).append(part)
    answers = []
    for engine in engines:
        tokens = _NOTHING
        for family in families.values():
            tokens = _most([tokens, _least([_tokens(engine, part, holdings) for part in family])])
        answers.append(Placement(engine.name, *tokens))
    return answers


@dataclass(frozen=True, slots=True)
class _Part:
    """What was found in the shards of one namespace."""

    namespace: Namespace
    shards: list[Namespace]
    groups: Sequence[tuple[int, int]]


def _tokens(engine: Engine, part: _Part, holdings: Mapping[str, Holding]) -> Sequence[int]:
    """Leading tokens of one namespace that the engine has, for each medium."""
    if not part.groups or engine.model not in ("", part.namespace.model):
        return _NOTHING
    near = [
        _most([_depths(holdings.get(node), shard, part) for node in engine.nodes]) for shard in part.shards
    ]
    depths = _least(near)
    if engine.name not in engine.nodes:  # a node that answers for itself has no cache beside its shards
        depths = _most([_depths(holdings.get(engine.name), part.namespace, part), depths])
    block_tokens = part.namespace.block_tokens
    return _NOTHING if depths is _NOTHING else [block_tokens * depth for depth in depths]


def _depths(holding: Holding | None, namespace: Namespace, part: _Part) -> Sequence[int]:
    place = None if holding is None else holding.place(namespace)
    if place is None:
        return _NOTHING
    depths = [0] * SLOT_BITS
    shift, missing = SLOT_BITS * place.slot, _ALL
    for depth, bits in part.groups:  # deepest first
        here = bits >> shift & missing
        if here:
            missing ^= here
            for medium in _MEDIA_OF[here]:
                depths[medium] = depth
    return depths


def _most(several: list[Sequence[int]]) -> Sequence[int]:
    """Of each medium the most; most engines have nothing but from one."""
    some = [depths for depths in several if depths is not _NOTHING]
    if len(some) < 2:
        return some[0] if some else _NOTHING
    return list(map(max, *some))


def _least(several: list[Sequence[int]]) -> Sequence[int]:
    """Of each medium the least."""
    return several[0] if len(several) == 1 else list(map(min, *several))


@lru_cache(NAMESPACES_MAX)
def _without_group(namespace: Namespace) -> Namespace:
    return replace(namespace, group="")
