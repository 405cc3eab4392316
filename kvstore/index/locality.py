"""The locality index: who has the longest prefix of a prompt, and in which medium. Pure, and soft state.

Publishers (engines, and the daemons of nodes) say what they have; what one of them has in one of its lives is
a `Holding`. A publisher that starts anew gets a new one: nothing of the old one can be mistaken for it.

    Locality    tables, one for each namespace but for its shard; which holdings count; the engines
    Holding     what publishers' events are applied to
    KeyTable    keys to masks, with lookups

A holding answers from `show` on, and not while it is muted: both are one bit operation, so the death of a
node with a million blocks costs lookups nothing. `tend` takes away what it leaves, in slices.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Final

from kvstore.block import Medium, Namespace
from kvstore.index.keytable import Key, KeyTable
from kvstore.index.masks import MEDIA, Masks, bit_of, bits_of

# Blocks that one publisher may claim: 4,096 tokens of 16 each for a thousand prompts, many times over.
HOLDING_BLOCKS_MAX: Final = 4_000_000
# Namespaces and shards of one holding: tenants, and ranks.
_NAMESPACES_MAX: Final = 65_536
_SHARDS_MAX: Final = 256
# What `tend` does in one slice, each about 5 ms.
_MASKS_AT_ONCE: Final = 4096
_KEYS_AT_ONCE: Final = 32_768


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
class LocalityStatistics:
    """Counts of the whole index; `keys` counts a block once, whoever has it."""

    keys: int
    masks: int
    namespaces: int
    holdings: int
    to_tend: int


class Holding:
    """What one publisher has in one of its lives. Made by `Locality.open`, ended by `Locality.close`."""

    def __init__(self, index: "Locality", name: str, blocks_max: int) -> None:
        self.name = name
        self.blocks = 0
        self.blocks_max = blocks_max
        self.over = False
        self._index = index
        self._places: dict[Namespace, _Place] = {}
        self._shard_to_slot: dict[str, int] = {}

    def stored(
        self, namespace: Namespace, medium: Medium, keys: Sequence[Key], parent: Key | None
    ) -> Sequence[Key]:
        """These blocks are in the medium now. Those of them that were not.

        With `parent` the keys follow each other, and the first follows it, or ROOT; None: nobody knows.
        What is beyond the holding's limits is left out, and `over` is set.
        """
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
        place = self._places.get(namespace)
        if place is None:
            return ()
        changed = place.table.remove(place.slot, medium, keys)
        place.blocks -= len(changed)
        self.blocks -= len(changed)
        if not place.blocks:
            place.table.reset(bits_of(place.slot))
            del self._places[namespace]
            self._index.leave(place.table)
        return changed

    def settle(self) -> None:
        """A batch of events is through."""
        for place in self._places.values():
            place.table.settle()

    def clear(self) -> None:
        """It has nothing any more, and begins anew."""
        self._index.empty(self)

    @property
    def bits(self) -> int:
        """Its slots' bits."""
        return sum([bits_of(slot) for slot in self._shard_to_slot.values()])

    def place(self, namespace: Namespace) -> "_Place | None":
        """Where its blocks of a namespace are, if it has had any."""
        return self._places.get(namespace)

    def give_up(self) -> "tuple[list[int], list[_Place]]":
        """Its slots and places, which are its own no longer."""
        slots, places = list(self._shard_to_slot.values()), list(self._places.values())
        self._places, self._shard_to_slot = {}, {}
        self.blocks, self.over = 0, False
        return slots, places

    def _place(self, namespace: Namespace) -> "_Place | None":
        slot = self._shard_to_slot.get(namespace.shard)
        if len(self._places) >= _NAMESPACES_MAX or (slot is None and len(self._shard_to_slot) >= _SHARDS_MAX):
            self.over = True
            return None
        if slot is None:
            slot = self._shard_to_slot[namespace.shard] = self._index.take_slot(self)
        place = self._places[namespace] = _Place(self._index.table(namespace), slot)
        return place


@dataclass(slots=True, eq=False)
class _Place:
    """A holding's part of a table."""

    table: "_Table"
    slot: int
    blocks: int = 0


class _Table(KeyTable):
    """A namespace's keys; `users` are the holdings' places in it."""

    def __init__(self, masks: Masks, namespace: Namespace) -> None:
        super().__init__(masks)
        self.namespace = namespace
        self.users = 0


@dataclass(slots=True)
class _Remains:
    """What closed holdings have left: slots whose bits must be cleared, then tables to purge."""

    slots: list[int] = field(default_factory=list)
    places: list[_Place] = field(default_factory=list)
    position: int = 0


class Locality:
    """All that is known. One owner calls it, from one thread."""

    def __init__(self, *, blocks_max: int = HOLDING_BLOCKS_MAX) -> None:
        self._blocks_max = blocks_max
        self._masks = Masks()
        self._tables: dict[Namespace, _Table] = {}
        self._model_salt: dict[tuple[str, str], dict[Namespace, _Table]] = {}
        self._shown: dict[str, Holding] = {}
        self._muted: set[str] = set()
        self._live = 0
        self._free_slots: list[int] = []
        self._slots = 0
        self._waiting = _Remains()  # until masks are clear of those before
        self._clearing: _Remains | None = None
        self._engines: tuple[Engine, ...] = ()

    # Publishers.

    def open(self, name: str) -> Holding:
        """A fresh holding, which answers nothing yet."""
        return Holding(self, name, self._blocks_max)

    def show(self, holding: Holding) -> None:
        """It answers for its name from now on; what did before is closed."""
        before = self._shown.get(holding.name)
        self._shown[holding.name] = holding
        if before is not None and before is not holding:
            self.close(before)
        self._see()

    def close(self, holding: Holding) -> None:
        """It is over: it answers no more, at once."""
        if self._shown.get(holding.name) is holding:
            del self._shown[holding.name]
        self.empty(holding)

    def empty(self, holding: Holding) -> None:
        """It has nothing any more, at once; what it had is taken away by `tend`."""
        slots, places = holding.give_up()
        self._waiting.slots += slots
        self._waiting.places += places
        self._see()

    def mute(self, name: str) -> None:
        """Leave out what answers for this name until it is unmuted: its publisher is silent."""
        self._muted.add(name)
        self._see()

    def unmute(self, name: str) -> None:
        """Count it again."""
        self._muted.discard(name)
        self._see()

    def holding(self, name: str) -> Holding | None:
        """What answers for the name."""
        return self._shown.get(name)

    def set_engines(self, engines: Iterable[Engine]) -> None:
        """Answer for these engines from now on."""
        self._engines = tuple(engines)

    @property
    def engines(self) -> tuple[Engine, ...]:
        """Those that it answers for."""
        return self._engines

    # Lookups.

    def namespaces(self, model: str, salt: str) -> Sequence[Namespace]:
        """Those of a model and a salt of which somebody has blocks; shards of a set are one, with rank 0."""
        return list(self._model_salt.get((model, salt), ()))

    def depths(self, namespace: Namespace, keys: Sequence[Key]) -> list[tuple[int, int]]:
        """How many leading keys who has: (depth, bits) groups, deepest first, none of depth 0."""
        table = self._tables.get(_set_of(namespace))
        return [] if table is None else table.depths(keys, self._live)

    def find(
        self, namespace_to_keys: Mapping[Namespace, Sequence[Key]], engines: Iterable[Engine] | None = None
    ) -> list[Placement]:
        """What each engine, of those given or of all, has of a prompt, whose keys these are.

        Namespaces that differ in their group hold parts of the same blocks, of which an engine needs all; of
        others it may use the one that gives most.
        """
        families: dict[Namespace, list[tuple[Namespace, list[tuple[int, int]]]]] = {}
        for namespace, keys in namespace_to_keys.items():
            space = _set_of(namespace)
            family = families.setdefault(_without_group(space), [])
            family.append((space, self.depths(space, keys)))
        placements = []
        for engine in self._engines if engines is None else engines:
            tokens = [0] * len(MEDIA)
            for family in families.values():
                parts = [self._tokens(engine, space, groups) for space, groups in family]
                tokens = [max(most, min(part)) for most, *part in zip(tokens, *parts, strict=True)]
            placements.append(Placement(engine.name, *tokens))
        return placements

    def _tokens(self, engine: Engine, space: Namespace, groups: Sequence[tuple[int, int]]) -> list[int]:
        """Leading tokens of one namespace that the engine has, for each medium."""
        if not groups or engine.model not in ("", space.model):
            return [0] * len(MEDIA)
        own = self._depths_of(engine.name, space, groups)
        world = _world(space)
        shards = []
        for rank in range(world):
            part = _shard_of(space, rank, world)
            near = [self._depths_of(node, part, groups) for node in engine.nodes]
            shards.append([max(depths, default=0) for depths in zip(*near, strict=True)] or [0] * len(MEDIA))
        return [
            space.block_tokens * max(mine, min(theirs)) for mine, *theirs in zip(own, *shards, strict=True)
        ]

    def _depths_of(self, name: str, namespace: Namespace, groups: Sequence[tuple[int, int]]) -> list[int]:
        holding = self._shown.get(name)
        place = None if holding is None else holding.place(namespace)
        if place is None:
            return [0] * len(MEDIA)
        wanted = [bit_of(place.slot, medium) for medium in MEDIA]
        return [next((depth for depth, bits in groups if bits & bit), 0) for bit in wanted]

    # Holdings' own.

    def table(self, namespace: Namespace) -> _Table:
        """The table of a namespace's set, made if need be, with one more user."""
        space = _set_of(namespace)
        table = self._tables.get(space)
        if table is None:
            table = self._tables[space] = _Table(self._masks, space)
            self._model_salt.setdefault((space.model, space.salt), {})[space] = table
        table.users += 1
        return table

    def leave(self, table: "_Table") -> None:
        """One user less; a table without users goes."""
        table.users -= 1
        if not table.users:
            space = table.namespace
            del self._tables[space]
            siblings = self._model_salt[space.model, space.salt]
            del siblings[space]
            if not siblings:
                del self._model_salt[space.model, space.salt]

    def take_slot(self, holding: Holding) -> int:
        """A slot for the holding, which counts at once if the holding does."""
        if self._free_slots:
            slot = self._free_slots.pop()
        else:
            slot = self._slots
            self._slots += 1
        if self._shown.get(holding.name) is holding and holding.name not in self._muted:
            self._live |= bits_of(slot)
        return slot

    def _see(self) -> None:
        self._live = 0
        for name, holding in self._shown.items():
            if name not in self._muted:
                self._live |= holding.bits

    # Cleaning.

    def tend(self) -> bool:
        """Take a slice of what is dead away. Whether there is more."""
        if self._clearing is None:
            if not self._waiting.slots and not self._waiting.places:
                return False
            self._clearing, self._waiting = self._waiting, _Remains()
            self._masks.clear(sum([bits_of(slot) for slot in self._clearing.slots]))
            return True
        remains = self._clearing
        if remains.slots:
            if self._masks.clear_some(_MASKS_AT_ONCE):
                self._cleared(remains)
            return True
        if not remains.places:
            self._clearing = None
            return bool(self._waiting.slots)
        self._purge(remains)
        return True

    def _cleared(self, remains: _Remains) -> None:
        """No mask has the slots' bits any more: they may be given out again."""
        tables = dict.fromkeys([place.table for place in remains.places])
        bits = sum([bits_of(slot) for slot in remains.slots])
        for table in tables:
            table.reset(bits)
        self._free_slots += remains.slots
        remains.slots = []

    def _purge(self, remains: _Remains) -> None:
        place = remains.places[-1]
        position = place.table.purge(remains.position, _KEYS_AT_ONCE) if place.blocks else None
        if position is not None:
            remains.position = position
            return
        remains.position = 0
        remains.places.pop()
        for other in remains.places:
            if other.table is place.table:
                other.blocks = 0  # purged with it
        self.leave(place.table)

    def statistics(self) -> LocalityStatistics:
        """Counts of now."""
        return LocalityStatistics(
            keys=sum(map(len, self._tables.values())),
            masks=len(self._masks),
            namespaces=len(self._tables),
            holdings=len(self._shown),
            to_tend=len(self._waiting.places) + (len(self._clearing.places) if self._clearing else 0),
        )

    def check(self) -> None:
        """Raise AssertionError unless tables and holdings agree."""
        for table in self._tables.values():
            table.check()
        live = 0
        for name, holding in self._shown.items():
            live |= 0 if name in self._muted else holding.bits
        assert live == self._live


# Namespaces are checked when they are made, which takes longer than a lookup.


@lru_cache(_NAMESPACES_MAX)
def _set_of(namespace: Namespace) -> Namespace:
    """The namespace that stands for all shards of its set."""
    return _shard_of(namespace, 0, _world(namespace))


@lru_cache(_NAMESPACES_MAX)
def _shard_of(namespace: Namespace, rank: int, world: int) -> Namespace:
    return replace(namespace, shard=f"{rank}/{world}") if world > 1 else namespace


@lru_cache(_NAMESPACES_MAX)
def _without_group(namespace: Namespace) -> Namespace:
    return replace(namespace, group="")


def _world(namespace: Namespace) -> int:
    """How many shards there are; 1 where `shard` does not say RANK/WORLD, or of absurdly many."""
    rank, _, world = namespace.shard.partition("/")
    if not (rank.isdecimal() and world.isdecimal() and len(world) <= 3):
        return 1
    return int(world) if int(rank) < int(world) <= _SHARDS_MAX else 1
