"""What one publisher has in one of its lives, and the tables that it is kept in. Pure.

A holding belongs to an index, which gives it slots and tables and says whether it counts. It knows nothing of
how its publisher is heard.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final, Protocol

from kvstore.block import SHARD, Medium, Namespace
from kvstore.index.keytable import Key, KeyTable
from kvstore.index.masks import Masks, bits_of
from kvstore.index.saved import SavedHolding

# Namespaces and shards of one holding: tenants, and ranks.
NAMESPACES_MAX: Final = 65_536
SHARDS_MAX: Final = 256


class Table(KeyTable):
    """A namespace's keys; `users` are the holdings' places in it."""

    def __init__(self, masks: Masks, namespace: Namespace) -> None:
        super().__init__(masks)
        self.namespace = namespace
        self.users = 0


@dataclass(slots=True, eq=False)
class Place:
    """A holding's part of a table."""

    table: Table
    slot: int
    blocks: int = 0


class Index(Protocol):
    """What a holding needs of the index that it belongs to."""

    def table(self, namespace: Namespace) -> Table:
        """The table of a namespace's set, made if need be, with one more user."""

    def leave(self, table: Table) -> None:
        """One user less; a table without users goes."""

    def take_slot(self, holding: "Holding") -> int | None:
        """A slot for the holding, which counts at once if the holding does; None: not now."""

    def empty(self, holding: "Holding") -> None:
        """It has nothing any more, at once."""


class Holding:
    """What one publisher has in one of its lives. Made by `Locality.open`, ended by `Locality.close`."""

    def __init__(self, index: Index, name: str, blocks_max: int) -> None:
        self.name = name
        self.blocks = 0
        self.blocks_max = blocks_max
        self.over = False
        self._index = index
        self._places: dict[Namespace, Place] = {}
        self._shard_to_slot: dict[str, int] = {}
        self._torn: set[KeyTable] = set()

    def stored(
        self, namespace: Namespace, medium: Medium, keys: Sequence[Key], parent: Key | None
    ) -> Sequence[Key]:
        """These blocks are in the medium now. Those of them that were not.

        With `parent` the keys follow each other, and the first follows it, or ROOT; None: nobody knows.
        What is beyond the holding's limits is left out, and `over` is set.
        """
        if ":" in namespace.shard:
            namespace = plain(namespace)
        place = self._places.get(namespace) or self._place(namespace)
        if place is None or not keys:
            return ()
        if self.blocks + len(keys) > self.blocks_max:
            self.over = True
            keys = keys[: max(0, self.blocks_max - self.blocks)]
            if not keys:
                return ()
        changed = place.table.store(place.slot, medium, keys, parent)
        place.blocks += len(changed)
        self.blocks += len(changed)
        return changed

    def removed(self, namespace: Namespace, medium: Medium, keys: Sequence[Key]) -> Sequence[Key]:
        """These blocks are in the medium no longer. Those of them that were."""
        if ":" in namespace.shard:
            namespace = plain(namespace)
        place = self._places.get(namespace)
        if place is None:
            return ()
        changed = place.table.remove(place.slot, medium, keys)
        self._torn.add(place.table)
        place.blocks -= len(changed)
        self.blocks -= len(changed)
        if not place.blocks:
            place.table.reset(bits_of(place.slot))
            del self._places[namespace]
            self._index.leave(place.table)
        return changed

    def settle(self) -> None:
        """A batch of events is through."""
        for table in self._torn:
            table.settle()
        self._torn.clear()

    def clear(self) -> None:
        """It has nothing any more, and begins anew."""
        self._index.empty(self)

    @property
    def bits(self) -> int:
        """Its slots' bits."""
        return sum([bits_of(slot) for slot in self._shard_to_slot.values()])

    def place(self, namespace: Namespace) -> Place | None:
        """Where its blocks of a namespace are, if it has had any."""
        return self._places.get(namespace)

    def slot(self, shard: str) -> int | None:
        """The slot of what it has in a shard, if it has had any."""
        return self._shard_to_slot.get(shard)

    def save(self) -> SavedHolding:
        """What to go on from after a restart, but for the tables."""
        blocks = [(namespace.canonical, place.blocks) for namespace, place in self._places.items()]
        return SavedHolding(self.name, self.over, dict(self._shard_to_slot), blocks)

    def restore(self, saved: SavedHolding) -> None:
        """Have what was saved, in tables that are still to be filled.

        Raises:
            InvalidRequest, KeyError: it names a namespace that is none, or one in a shard without a slot.
        """
        self.over = saved.over
        self._shard_to_slot = saved.slots
        for canonical, blocks in saved.blocks:
            namespace = Namespace.from_canonical(canonical)
            slot = saved.slots[namespace.shard]
            self._places[namespace] = Place(self._index.table(namespace), slot, blocks)
            self.blocks += blocks

    def give_up(self) -> tuple[list[int], list[Place]]:
        """Its slots and places, which are its own no longer."""
        slots, places = list(self._shard_to_slot.values()), list(self._places.values())
        self._places, self._shard_to_slot, self._torn = {}, {}, set()
        self.blocks, self.over = 0, False
        return slots, places

    def _place(self, namespace: Namespace) -> Place | None:
        slot = self._shard_to_slot.get(namespace.shard)
        room = len(self._places) < NAMESPACES_MAX
        if slot is None and room and len(self._shard_to_slot) < SHARDS_MAX:
            slot = self._index.take_slot(self)
        if slot is None or not room:
            self.over = True
            return None
        self._shard_to_slot[namespace.shard] = slot
        place = self._places[namespace] = Place(self._index.table(namespace), slot)
        return place


# Namespaces are checked when they are made, which takes longer than a lookup.


@lru_cache(NAMESPACES_MAX)
def set_of(namespace: Namespace) -> Namespace:
    """The namespace that stands for all shards of its set."""
    world = world_of(namespace)
    return shard_of(namespace, 0, world) if world > 1 else plain(namespace)


@lru_cache(NAMESPACES_MAX)
def shard_of(namespace: Namespace, rank: int, world: int) -> Namespace:
    """One of the namespaces of a set."""
    return replace(namespace, shard=f"{rank}/{world}") if world > 1 else namespace


@lru_cache(NAMESPACES_MAX)
def plain(namespace: Namespace) -> Namespace:
    """The namespace with its shard as RANK/WORLD: where on its node a rank is makes no difference."""
    rank, world = namespace.rank_and_world
    return replace(namespace, shard=f"{rank}/{world}") if SHARD.fullmatch(namespace.shard) else namespace


def world_of(namespace: Namespace) -> int:
    """How many shards there are; 1 where `shard` does not say, or says absurdly many."""
    world = namespace.rank_and_world[1]
    return world if world <= SHARDS_MAX else 1
