"""What engines have of a prompt, from what publishers have: their own, and that of their nodes. Pure."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

import msgspec

from kvstore.block import Namespace
from kvstore.index.holding import NAMESPACES_MAX, Holding, shard_of, world_of
from kvstore.index.masks import MEDIA, SLOT_BITS

_Tokens = Sequence[int]  # of each medium
_NOTHING: Final[_Tokens] = (0,) * len(MEDIA)
_MANY: Final = 32
_ONES: Final = [[media >> place & 1 for place in range(len(MEDIA))] for media in range(16)]


@dataclass(frozen=True, slots=True)
class Engine:
    """A serving process as routers address it; a rank with a cache of its own is one of its own.

    `name` is also that of the publisher of its GPU cache. `nodes` are the names of the daemons that serve it;
    of blocks in shards each shard must be on one of them.
    """

    name: str
    nodes: tuple[str, ...] = ()
    model: str = ""


class Placement(msgspec.Struct, frozen=True, gc=False):
    """Leading tokens that an engine need not compute, cumulative: `dram` counts what is in gpu or dram."""

    engine: str
    gpu: int = 0
    dram: int = 0
    nvme: int = 0
    remote: int = 0


# Says what each of some engines has.
Placing = Callable[[Iterable[Engine]], list[Placement]]


@dataclass(frozen=True, slots=True)
class Found:
    """How many leading keys of a namespace who has: (depth, bits) groups, as `KeyTable.depths` gives them."""

    namespace: Namespace
    groups: Sequence[tuple[int, int]]


def placing(found: Iterable[Found], holdings: Mapping[str, Holding]) -> Placing:
    """Says what each of some engines has.

    Namespaces that differ in their group hold parts of the same blocks: who has some of a group needs it, and
    who has nothing of it has no such group. Of others an engine may use the one that gives most.
    """
    families: dict[Namespace, dict[str, list[_Part]]] = {}
    for part in map(_Part, found):
        groups = families.setdefault(family_of(part.space), {})
        groups.setdefault(part.space.group, []).append(part)
    parts = {family: list(groups.values()) for family, groups in families.items()}
    return lambda engines: [_placement(engine, parts, holdings) for engine in engines]


def _placement(
    engine: Engine,
    families: Mapping[Namespace, Sequence[Sequence["_Part"]]],
    holdings: Mapping[str, Holding],
) -> Placement:
    tokens = _NOTHING
    for family, groups in families.items():
        if engine.model in ("", family.model):
            for had in _had(engine, groups, holdings):
                if had is not _NOTHING:
                    tokens = had if tokens is _NOTHING else tuple(map(max, tokens, had))
    return Placement(engine.name, *tokens)


def _had(
    engine: Engine, groups: Sequence[Sequence["_Part"]], holdings: Mapping[str, Holding]
) -> Iterator[_Tokens]:
    """What the engine's own publisher has of a family, and what its nodes have."""
    if engine.name not in engine.nodes:  # a node that answers for itself has no cache beside its shards
        yield _needed(
            [[part.had_by(engine.name, part.space, holdings) for part in parts] for parts in groups]
        )
    if engine.nodes:
        yield _needed([[part.near(engine.nodes, holdings) for part in parts] for parts in groups])


class _Part:
    """What of one namespace who has, in tokens, by slot and medium."""

    def __init__(self, found: Found) -> None:
        space = found.namespace
        world = world_of(space)
        self.model = space.model
        self.space = space
        self.shards = [shard_of(space, rank, world) for rank in range(world)]
        self.slot_to_tokens = by_slot(found.groups, space.block_tokens)

    def near(self, nodes: Sequence[str], holdings: Mapping[str, Holding]) -> _Tokens | None:
        """Leading tokens that the nodes have all shards of; None if they have no block of any."""
        if len(nodes) == len(self.shards) == 1:
            return self.had_by(nodes[0], self.shards[0], holdings)
        shards = []
        for shard in self.shards:
            had = [self.had_by(node, shard, holdings) for node in nodes]
            shards.append([tokens for tokens in had if tokens is not None])
        return _least([_most(had) for had in shards]) if any(shards) else None

    def had_by(self, name: str, namespace: Namespace, holdings: Mapping[str, Holding]) -> _Tokens | None:
        """Leading tokens that a publisher has; None if it has no block of the namespace."""
        holding = holdings.get(name)
        place = None if holding is None else holding.place(namespace)
        return None if place is None else self.slot_to_tokens.get(place.slot, _NOTHING)


def _needed(groups: Sequence[Sequence[_Tokens | None]]) -> _Tokens:
    """The least of the groups of which there is something; blocks of one group may have several lengths."""
    if len(groups) == len(groups[0]) == 1:
        return groups[0][0] or _NOTHING
    had = [[tokens for tokens in group if tokens is not None] for group in groups]
    return _least([_most(group) for group in had if group] or [_NOTHING])


def _most(several: Sequence[_Tokens]) -> _Tokens:
    """Of each medium the most; most engines have nothing but from one."""
    some = [tokens for tokens in several if tokens is not _NOTHING]
    if len(some) < 2:
        return some[0] if some else _NOTHING
    return tuple(map(max, *some))


def _least(several: Sequence[_Tokens]) -> _Tokens:
    """Of each medium the least."""
    return several[0] if len(several) == 1 else tuple(map(min, *several))


def by_slot(groups: Sequence[tuple[int, int]], block_tokens: int) -> dict[int, Sequence[int]]:
    """What each slot has in tokens, by medium."""
    found: dict[int, Sequence[int]] = {}
    for depth, bits in groups:
        tokens = depth * block_tokens
        known: dict[int, Sequence[int]] = {}
        for slot, media in slots_of(bits):
            fresh = known.get(media)
            if fresh is None:
                fresh = known[media] = [tokens * one for one in _ONES[media]]
            before = found.get(slot)
            found[slot] = fresh if before is None else list(map(max, before, fresh))
    return found


def slots_of(bits: int) -> Iterable[tuple[int, int]]:
    """The slots of some bits, each with its media."""
    if bits.bit_count() > _MANY:
        digits = f"{bits:x}"  # one for each slot
        return [(slot, int(digit, 16)) for slot, digit in enumerate(reversed(digits)) if digit != "0"]
    some = []
    while bits:
        slot = ((bits & -bits).bit_length() - 1) // SLOT_BITS
        media = bits >> SLOT_BITS * slot & 15
        some.append((slot, media))
        bits ^= media << SLOT_BITS * slot
    return some


@lru_cache(NAMESPACES_MAX)
def family_of(namespace: Namespace) -> Namespace:
    """What namespaces of one kind of blocks have in common, whatever their groups' blocks are long."""
    return replace(namespace, group="", block_tokens=1)
