"""What engines have of a prompt, from what publishers have: their own, and that of their nodes. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import msgspec

from kvstore.block import Namespace
from kvstore.index.holding import NAMESPACES_MAX, Holding, shard_of, world_of
from kvstore.index.masks import MEDIA, SLOT_BITS

_NOTHING = (0,) * len(MEDIA)
_MANY = 32
_ONES = [[media >> place & 1 for place in range(len(MEDIA))] for media in range(16)]


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


@dataclass(frozen=True, slots=True)
class Found:
    """How many leading keys of a namespace who has: (depth, bits) groups, as `KeyTable.depths` gives them."""

    namespace: Namespace
    groups: Sequence[tuple[int, int]]


class _Part:
    """What of one namespace who has, in tokens, by slot and medium."""

    def __init__(self, found: Found) -> None:
        space = found.namespace
        world = world_of(space)
        self.model = space.model
        self.space = space
        self.shards = [shard_of(space, rank, world) for rank in range(world)]
        self.slot_to_tokens = _by_slot(found.groups, space.block_tokens)

    def of(self, engine: Engine, holdings: Mapping[str, Holding]) -> Sequence[int]:
        """Leading tokens that the engine has, for each medium."""
        if not self.slot_to_tokens or engine.model not in ("", self.model):
            return _NOTHING
        nodes = engine.nodes
        if not nodes:
            return self._had_by(engine.name, self.space, holdings)
        shards = []
        for shard in self.shards:
            near = [self._had_by(node, shard, holdings) for node in nodes]
            shards.append(near[0] if len(near) == 1 else tuple(map(max, *near)))
        theirs = shards[0] if len(shards) == 1 else tuple(map(min, *shards))
        # A node that answers for itself has no cache beside its shards.
        own = _NOTHING if engine.name in nodes else self._had_by(engine.name, self.space, holdings)
        return theirs if own is _NOTHING else tuple(map(max, own, theirs))

    def _had_by(self, name: str, namespace: Namespace, holdings: Mapping[str, Holding]) -> Sequence[int]:
        holding = holdings.get(name)
        place = None if holding is None else holding.place(namespace)
        return _NOTHING if place is None else self.slot_to_tokens.get(place.slot, _NOTHING)


def _by_slot(groups: Sequence[tuple[int, int]], block_tokens: int) -> dict[int, Sequence[int]]:
    found: dict[int, Sequence[int]] = {}
    for depth, bits in groups:
        tokens = depth * block_tokens
        known: dict[int, Sequence[int]] = {}
        for slot, media in _slots(bits):
            fresh = known.get(media)
            if fresh is None:
                fresh = known[media] = [tokens * one for one in _ONES[media]]
            before = found.get(slot)
            found[slot] = fresh if before is None else list(map(max, before, fresh))
    return found


def _slots(bits: int) -> Iterable[tuple[int, int]]:
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


def placements(
    engines: Iterable[Engine], found: Iterable[Found], holdings: Mapping[str, Holding]
) -> list[Placement]:
    """What each engine has.

    Namespaces that differ in their group hold parts of the same blocks, of which an engine needs all; of
    others it may use the one that gives most.
    """
    families: dict[Namespace, list[_Part]] = {}
    for part in found:
        families.setdefault(_without_group(part.namespace), []).append(_Part(part))
    if len(families) == 1:
        ((only, *others),) = families.values()
        if not others:
            return [Placement(engine.name, *only.of(engine, holdings)) for engine in engines]
    answers = []
    for engine in engines:
        tokens: Sequence[int] = _NOTHING
        for family in families.values():
            parts = [part.of(engine, holdings) for part in family]
            least = parts[0] if len(parts) == 1 else tuple(map(min, *parts))
            tokens = tuple(map(max, tokens, least))
        answers.append(Placement(engine.name, *tokens))
    return answers


@lru_cache(NAMESPACES_MAX)
def _without_group(namespace: Namespace) -> Namespace:
    return replace(namespace, group="")
