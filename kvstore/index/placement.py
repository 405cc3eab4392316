"""What engines have of a prompt, from what publishers have: their own, and that of their nodes. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from kvstore.block import Namespace
from kvstore.index.holding import NAMESPACES_MAX, Holding, shard_of, world_of
from kvstore.index.masks import MEDIA, bit_of

_NOTHING = (0,) * len(MEDIA)


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
    families: dict[Namespace, list[Found]] = {}
    for part in found:
        families.setdefault(_without_group(part.namespace), []).append(part)
    answers = []
    for engine in engines:
        tokens: Sequence[int] = _NOTHING
        for family in families.values():
            parts = [_tokens(engine, part, holdings) for part in family]
            tokens = [max(most, min(all_of)) for most, *all_of in zip(tokens, *parts, strict=True)]
        answers.append(Placement(engine.name, *tokens))
    return answers


def _tokens(engine: Engine, found: Found, holdings: Mapping[str, Holding]) -> Sequence[int]:
    """Leading tokens of one namespace that the engine has, for each medium."""
    space = found.namespace
    if not found.groups or engine.model not in ("", space.model):
        return _NOTHING
    own = _depths(holdings.get(engine.name), space, found)
    world = world_of(space)
    shards = []
    for rank in range(world):
        shard = shard_of(space, rank, world)
        near = [_depths(holdings.get(node), shard, found) for node in engine.nodes]
        shards.append([max(depths) for depths in zip(*near, strict=True)] if near else _NOTHING)
    return [space.block_tokens * max(mine, min(theirs)) for mine, *theirs in zip(own, *shards, strict=True)]


def _depths(holding: Holding | None, namespace: Namespace, found: Found) -> Sequence[int]:
    place = None if holding is None else holding.place(namespace)
    if place is None:
        return _NOTHING
    wanted = [bit_of(place.slot, medium) for medium in MEDIA]
    return [next((depth for depth, bits in found.groups if bits & bit), 0) for bit in wanted]


@lru_cache(NAMESPACES_MAX)
def _without_group(namespace: Namespace) -> Namespace:
    return replace(namespace, group="")
