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

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, cast

from kvstore.block import Namespace
from kvstore.index.holding import Holding, Place, Table, set_of
from kvstore.index.keytable import Key
from kvstore.index.masks import Mask, Masks, bits_of
from kvstore.index.placement import Engine, Found, Placement, placements
from kvstore.index.saved import SavedLocality, SavedTable, bits_from_bytes, bits_to_bytes

# Blocks that one publisher may claim: 4,096 tokens of 16 each for a thousand prompts, many times over.
HOLDING_BLOCKS_MAX: Final = 4_000_000
# What `tend` does in one slice, each about 5 ms.
_MASKS_AT_ONCE: Final = 4096
_KEYS_AT_ONCE: Final = 8192


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
    """What closed holdings have left: slots whose bits must be cleared, then tables to purge."""

    slots: list[int] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)


class Locality:
    """All that is known. One owner calls it, from one thread."""

    def __init__(self, *, blocks_max: int = HOLDING_BLOCKS_MAX) -> None:
        self._blocks_max = blocks_max
        self._masks = Masks()
        self._tables: dict[Namespace, Table] = {}
        self._model_salt: dict[tuple[str, str], dict[Namespace, Table]] = {}
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
        table = self._tables.get(set_of(namespace))
        return [] if table is None else table.depths(keys, self._live)

    def find(
        self, namespace_to_keys: Mapping[Namespace, Sequence[Key]], engines: Iterable[Engine] | None = None
    ) -> list[Placement]:
        """What each engine, of those given or of all, has of a prompt, whose keys these are."""
        found = [Found(set_of(space), self.depths(space, keys)) for space, keys in namespace_to_keys.items()]
        return placements(self._engines if engines is None else engines, found, self._shown)

    # Holdings' own.

    def table(self, namespace: Namespace) -> Table:
        """The table of a namespace's set, made if need be, with one more user."""
        space = set_of(namespace)
        table = self._tables.get(space)
        if table is None:
            table = self._tables[space] = Table(self._masks, space)
            self._model_salt.setdefault((space.model, space.salt), {})[space] = table
        table.users += 1
        return table

    def leave(self, table: "Table") -> None:
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
        if place.blocks and place.table.purge(_KEYS_AT_ONCE):
            return
        remains.places.pop()
        for other in remains.places:
            if other.table is place.table:
                other.blocks = 0  # purged with it
        self.leave(place.table)

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
