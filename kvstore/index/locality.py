"""The locality index: who has the longest prefix of a prompt, and in which medium. Pure, and soft state.

Publishers (engines, and the daemons of nodes) say what they have; what one of them has in one of its lives is
a `Holding`. A publisher that starts anew gets a new one: nothing of the old one can be mistaken for it.

    Locality    tables, one for each namespace but for its shard; which holdings count; the engines
    Holding     what publishers' events are applied to
    KeyTable    keys to masks, with lookups
    Placement   what an engine has of a prompt

A holding answers from `show` on, and not while it is muted: both are one bit operation, so the death of a
node with a million blocks costs lookups nothing. `tend` takes away what it leaves, in slices.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, cast

from kvstore.block import Namespace
from kvstore.index.holding import Holding, Table, set_of
from kvstore.index.keytable import Depths, Key
from kvstore.index.masks import Mask, Masks, bits_of
from kvstore.index.placement import Engine, Found, Placement, Placing, placing
from kvstore.index.saved import SavedLocality, SavedTable, bits_from_bytes, bits_to_bytes

# Blocks that one publisher may claim: 64 million tokens in blocks of 16, and half a gigabyte here.
HOLDING_BLOCKS_MAX: Final = 4_000_000
# What `tend` does in one slice, each about 5 ms.
_MASKS_AT_ONCE: Final = 4096
_KEYS_AT_ONCE: Final = 8192
_TABLES_AT_ONCE: Final = 2048
_TABLE_IN_KEYS: Final = 16  # what a table costs beside its keys
# Slots of one name that wait to be cleared: a hostile publisher would take them all, and widen all masks.
_DEAD_SLOTS_MAX: Final = 16


@dataclass(frozen=True, slots=True)
class LocalityStatistics:
    """Counts of the whole index; `keys` counts a block once, whoever has it."""

    keys: int
    masks: int
    namespaces: int
    holdings: int
    to_tend: int


@dataclass(slots=True)
class _Remains:
    """What closed holdings have left, in the order in which it goes.

    First the slots' bits leave the masks, then `to_reset`, and the slots may be given out again. Then tables
    are purged: of each, how many places in it there were, and how many blocks.
    """

    slots: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)  # whose they were
    tables: dict[Table, tuple[int, int]] = field(default_factory=dict)
    to_reset: list[Table] = field(default_factory=list)


class Locality:
    """All that is known. One owner calls it, from one thread.

    `namespace_changes` and `holder_changes` count how often a namespace, or a publisher, an engine or the
    slots of one have come or gone: what somebody has made of those is good for as long as they stand.
    """

    def __init__(self, *, blocks_max: int = HOLDING_BLOCKS_MAX) -> None:
        self._blocks_max = blocks_max
        self._masks = Masks()
        self._tables: dict[Namespace, Table] = {}
        self._model_salt: dict[tuple[str, str], dict[Namespace, Table]] = {}
        self._models: Counter[str] = Counter()  # namespaces of each
        self._shown: dict[str, Holding] = {}
        self._muted: set[str] = set()
        self._live = 0
        self._free_slots: list[int] = []
        self._name_to_dead: Counter[str] = Counter()  # slots that are not cleared yet
        self._slots = 0
        self._waiting = _Remains()  # until masks are clear of those before
        self._clearing: _Remains | None = None
        self._engines: tuple[Engine, ...] = ()
        self.namespace_changes = 0
        self.holder_changes = 0

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
        self._count(holding)

    def close(self, holding: Holding) -> None:
        """It is over: it answers no more, at once."""
        if self._shown.get(holding.name) is holding:
            del self._shown[holding.name]
        self.empty(holding)

    def empty(self, holding: Holding) -> None:
        """It has nothing any more, at once; what it had is taken away by `tend`."""
        slots, places = holding.give_up()
        remains = self._waiting
        remains.slots += slots
        remains.names += [holding.name] * len(slots)
        self._name_to_dead[holding.name] += len(slots)
        for place in places:
            users, blocks = remains.tables.get(place.table, (0, 0))
            remains.tables[place.table] = users + 1, blocks + place.blocks
        self._count_out(sum([bits_of(slot) for slot in slots]))

    def mute(self, name: str) -> None:
        """Leave out what answers for this name until it is unmuted: its publisher is silent."""
        self._muted.add(name)
        if (holding := self._shown.get(name)) is not None:
            self._count_out(holding.bits)

    def unmute(self, name: str) -> None:
        """Count it again."""
        self._muted.discard(name)
        if (holding := self._shown.get(name)) is not None:
            self._count(holding)

    def holding(self, name: str) -> Holding | None:
        """What answers for the name."""
        return self._shown.get(name)

    def set_engines(self, engines: Iterable[Engine]) -> None:
        """Answer for these engines from now on."""
        self._engines = tuple(engines)
        self.holder_changes += 1

    @property
    def engines(self) -> tuple[Engine, ...]:
        """Those that it answers for."""
        return self._engines

    # Lookups.

    def namespaces(self, model: str, salt: str) -> Sequence[Namespace]:
        """Those of a model and a salt of which somebody has blocks; shards of a set are one, with rank 0."""
        return list(self._model_salt.get((model, salt), ()))

    @property
    def models(self) -> Collection[str]:
        """Those of which somebody has blocks."""
        return self._models.keys()

    def blocks_of(self, namespace: Namespace) -> int:
        """How many blocks somebody has of one of `namespaces`, each counted once."""
        table = self._tables.get(namespace)
        return 0 if table is None else len(table)

    def depths(self, namespace: Namespace, keys: Sequence[Key], among: int = -1) -> Depths:
        """How many leading keys who has, of those with bits in `among`."""
        table = self._tables.get(namespace) or self._tables.get(set_of(namespace))
        return [] if table is None else table.depths(keys, self._live & among)

    def find(
        self, namespace_to_keys: Mapping[Namespace, Sequence[Key]], engines: Iterable[Engine] | None = None
    ) -> list[Placement]:
        """What each engine, of those given or of all, has of a prompt, whose keys these are."""
        found = {space: self.depths(space, keys) for space, keys in namespace_to_keys.items()}
        return self.placing(found)(self._engines if engines is None else engines)

    def placing(self, found: Mapping[Namespace, Depths]) -> Placing:
        """Says what engines have, of what was found in these namespaces."""
        return placing([Found(set_of(space), depths) for space, depths in found.items()], self._shown)

    # Holdings' own.

    def table(self, namespace: Namespace) -> Table:
        """The table of a namespace's set, made if need be, with one more user."""
        space = set_of(namespace)
        table = self._tables.get(space)
        if table is None:
            table = self._tables[space] = Table(self._masks, space)
            self._model_salt.setdefault((space.model, space.salt), {})[space] = table
            self._models[space.model] += 1
            self.namespace_changes += 1
        table.users += 1
        return table

    def leave(self, table: Table, users: int = 1) -> None:
        """Fewer users; a table without users goes."""
        table.users -= users
        if not table.users:
            space = table.namespace
            self.namespace_changes += 1
            del self._tables[space]
            self._models[space.model] -= 1
            if not self._models[space.model]:
                del self._models[space.model]
            siblings = self._model_salt[space.model, space.salt]
            del siblings[space]
            if not siblings:
                del self._model_salt[space.model, space.salt]

    def take_slot(self, holding: Holding) -> int | None:
        """A slot for the holding, which counts at once if the holding does.

        None where too many of its name are still to be cleared: who begins anew all the time has to wait.
        """
        if self._name_to_dead[holding.name] >= _DEAD_SLOTS_MAX:
            return None
        self.holder_changes += 1
        if self._free_slots:
            slot = self._free_slots.pop()
        else:
            slot = self._slots
            self._slots += 1
        if self._shown.get(holding.name) is holding and holding.name not in self._muted:
            self._live |= bits_of(slot)
        return slot

    def _count(self, holding: Holding) -> None:
        self.holder_changes += 1
        if holding.name not in self._muted:
            self._live |= holding.bits

    def _count_out(self, bits: int) -> None:
        self.holder_changes += 1
        self._live &= ~bits

    # Cleaning.

    def tend(self) -> bool:
        """Take a slice of what is dead away. Whether there is more."""
        remains = self._clearing
        if remains is None:
            if not self._waiting.tables and not self._waiting.slots:
                return False
            remains, self._waiting = self._waiting, _Remains()
            remains.to_reset = list(remains.tables)
            self._clearing = remains
            self._masks.clear(sum([bits_of(slot) for slot in remains.slots]))
        elif self._masks.dead:
            self._masks.clear_some(_MASKS_AT_ONCE)
        elif remains.slots:
            self._reset(remains)
        elif remains.tables:
            self._purge(remains.tables)
        else:
            self._clearing = None
            return bool(self._waiting.tables or self._waiting.slots)
        return True

    def _reset(self, remains: _Remains) -> None:
        """No mask has the slots' bits any more: once no table has them, they may be given out again."""
        bits = sum([bits_of(slot) for slot in remains.slots])
        for table in remains.to_reset[-_TABLES_AT_ONCE:]:
            table.reset(bits)
        del remains.to_reset[-_TABLES_AT_ONCE:]
        if not remains.to_reset:
            self._free_slots += remains.slots
            self._name_to_dead -= Counter(remains.names)  # which leaves none out that has some
            remains.slots = []

    def _purge(self, tables: dict[Table, tuple[int, int]]) -> None:
        keys = _KEYS_AT_ONCE
        while tables and keys > 0:
            table, (users, blocks) = tables.popitem()
            keys -= _TABLE_IN_KEYS + min(len(table), _KEYS_AT_ONCE)
            if blocks and table.purge(_KEYS_AT_ONCE):
                tables[table] = users, blocks
                return
            self.leave(table, users)

    # Across a restart.

    def save(self, names: Iterable[str], write: Callable[[SavedTable], None]) -> SavedLocality:
        """What answers for these names, of which `write` is given the tables."""
        holdings = [self._shown[name] for name in names if name in self._shown]
        bits = sum([holding.bits for holding in holdings])
        mask_to_place: dict[Mask, int] = {}
        for table in self._tables.values():
            write(table.save(table.namespace.canonical, bits, mask_to_place))
        masks = [bits_to_bytes(mask.raw & bits) for mask in mask_to_place]
        return SavedLocality(masks, [holding.save() for holding in holdings])

    def restore(self, saved: SavedLocality, tables: Iterable[SavedTable]) -> dict[str, Holding]:
        """Have what was saved, where nothing is yet: holdings by their names, none of which is shown.

        Raises:
            InvalidRequest, IndexError, KeyError, ValueError: it contradicts itself; this index is no use now.
        """
        masks = [self._masks.of(bits_from_bytes(raw)) for raw in saved.masks]
        slots = [slot for each in saved.holdings for slot in each.slots.values()]
        self._slots = max(slots, default=-1) + 1
        self._free_slots = sorted(set(range(self._slots)) - set(slots))
        if None in masks or len(set(slots)) != len(slots):
            raise ValueError("a mask of nobody, or a slot of two")
        holdings = {each.name: self.open(each.name) for each in saved.holdings}
        for each in saved.holdings:
            holdings[each.name].restore(each)
        for table in tables:
            namespace = Namespace.from_canonical(table.namespace)
            if namespace in self._tables:  # somebody's
                self._tables[namespace].restore(table, cast(list[Mask], masks))
        return holdings

    def statistics(self) -> LocalityStatistics:
        """Counts of now."""
        return LocalityStatistics(
            keys=sum(map(len, self._tables.values())),
            masks=len(self._masks),
            namespaces=len(self._tables),
            holdings=len(self._shown),
            to_tend=len(self._waiting.tables) + (len(self._clearing.tables) if self._clearing else 0),
        )

    def check(self) -> None:
        """Raise AssertionError unless tables and holdings agree."""
        for table in self._tables.values():
            table.check()
        live = 0
        for name, holding in self._shown.items():
            live |= 0 if name in self._muted else holding.bits
        assert live == self._live
