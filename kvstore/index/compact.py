"""What engines have of a prompt in groups of equal depth, as bits: no object for an engine is made. Pure.

Of each engine there are four bits, at its place in `Locality.engines`, one for each medium, fastest first. A
publisher's bits become those of the engines that it serves, once for each set of publishers.
"""

from collections.abc import Mapping
from typing import Final

from kvstore.block import Namespace
from kvstore.index.holding import world_of
from kvstore.index.keytable import Depths
from kvstore.index.locality import Locality
from kvstore.index.masks import SLOT_BITS
from kvstore.index.placement import Placement, Placing, by_slot, family_of, slots_of

# (tokens, bits), most tokens first. Each bit is in one group, that of all that it has.
Groups = list[tuple[int, int]]

# What is remembered: models with shards, and of each the engines of so many sets of publishers.
_WAYS_MAX: Final = 256
_SETS_MAX: Final = 16_384


class Compact:
    """Answers out of a Locality, the same as its `placing`. Used where that is used."""

    def __init__(self, locality: Locality) -> None:
        self._locality = locality
        self._model_shard: dict[tuple[str, str], _Engines | None] = {}
        self._made_at = -1

    def groups(self, found: Mapping[Namespace, Depths]) -> Groups:
        """Which engines have how many leading tokens of a prompt, of which this was found."""
        groups = self._most(found)
        return self._least(found) if groups is None else groups

    def placing(self, found: Mapping[Namespace, Depths]) -> Placing:
        """Says what each of some engines has, whether it is known or not."""
        groups = self._most(found)
        if groups is None:
            return self._locality.placing(found)
        known = self._locality.engines
        has = {known[number].name: tokens for number, tokens in by_slot(groups, 1).items()}
        return lambda engines: [Placement(engine.name, *has.get(engine.name, ())) for engine in engines]

    def _most(self, found: Mapping[Namespace, Depths]) -> Groups | None:
        """Where any namespace will do; None where all of some are needed."""
        if self._made_at != self._locality.holder_changes:
            self._model_shard.clear()
            self._made_at = self._locality.holder_changes
        if len(found) > 1 and not _any_will_do(found):
            return None
        groups: Groups = []
        for space, depths in found.items():
            engines = self._engines(space)
            if engines is None:
                return None
            block_tokens = space.block_tokens
            for depth, bits in depths:
                groups.append((depth * block_tokens, engines[bits]))
        return _once(groups)

    def _least(self, found: Mapping[Namespace, Depths]) -> Groups:
        """Where blocks have shards or KV groups, all of which are needed."""
        tokens_to_bits: dict[int, int] = {}
        placements = self._locality.placing(found)(self._locality.engines)
        for number, one in enumerate(placements):
            for place, tokens in enumerate((one.gpu, one.dram, one.nvme, one.remote)):
                if tokens:
                    bit = 1 << SLOT_BITS * number + place
                    tokens_to_bits[tokens] = tokens_to_bits.get(tokens, 0) | bit
        return sorted(tokens_to_bits.items(), reverse=True)

    def _engines(self, space: Namespace) -> "_Engines | None":
        """Whose engines publishers in this namespace serve; None where it has shards."""
        way = space.model, space.shard
        if way not in self._model_shard:
            if len(self._model_shard) >= _WAYS_MAX:
                self._model_shard.clear()
            self._model_shard[way] = None if world_of(space) > 1 else _Engines(self._slot_to_engines(space))
        return self._model_shard[way]

    def _slot_to_engines(self, space: Namespace) -> dict[int, int]:
        """The first bit of each engine that the publisher with a slot serves."""
        slot_to_engines: dict[int, int] = {}
        for number, engine in enumerate(self._locality.engines):
            if engine.model in ("", space.model):
                for name in {engine.name, *engine.nodes}:
                    holding = self._locality.holding(name)
                    slot = None if holding is None else holding.slot(space.shard)
                    if slot is not None:
                        slot_to_engines[slot] = slot_to_engines.get(slot, 0) | 1 << SLOT_BITS * number
        return slot_to_engines


class _Engines(dict[int, int]):
    """Publishers' bits to engines' bits; what is not there yet is made."""

    def __init__(self, slot_to_engines: Mapping[int, int]) -> None:
        super().__init__()
        self._slot_to_engines = slot_to_engines

    def __missing__(self, bits: int) -> int:
        if len(self) >= _SETS_MAX:
            self.clear()
        engines = 0
        for slot, media in slots_of(bits):
            engines |= self._slot_to_engines.get(slot, 0) * media
        self[bits] = engines
        return engines


def _any_will_do(spaces: Mapping[Namespace, object]) -> bool:
    """Whether no two of these namespaces hold parts of the same blocks."""
    family_to_group: dict[Namespace, str] = {}
    return all(family_to_group.setdefault(family_of(space), space.group) == space.group for space in spaces)


def _once(groups: Groups) -> Groups:
    """Each bit where it is first, most tokens first."""
    if len(groups) < 2:
        return groups if groups and groups[0][1] else []
    kept, seen = [], 0
    for tokens, bits in sorted(groups, reverse=True):
        new = bits & ~seen
        if new:
            kept.append((tokens, new))
            seen |= new
    return kept
