"""What one node has, as its feed tells it: a holding of the index, and the digests of what is in it.

Pure. It trusts nothing: a message is checked whole before any of it is applied. When to begin anew is the
stream's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from zlib import crc32

from kvstore.block import KEY_BYTES_MAX, Medium, Namespace
from kvstore.engine_keys import engine_key, engine_keys
from kvstore.errors import InvalidRequest, ProtocolError
from kvstore.index.feed import KEYS_MAX, Digest, Removed, Stored
from kvstore.index.holding import Holding, plain
from kvstore.index.keytable import Key
from kvstore.index.saved import SavedNode

# Of namespaces whose keys are digests, of which the index has what engines publish too.
_DIGESTED: Final = "vllm-"
_DIGEST_BYTES: Final = (8, 32)
# Namespaces kept parsed, of at most so long a form: 8 fields of 512 characters, a few bytes each.
_SPACES_MAX: Final = 1024
_CANONICAL_BYTES_MAX: Final = 32 << 10
_CRC_SUM_MASK: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Space:
    """A namespace, and whether the index has numbers for its keys."""

    namespace: Namespace
    digested: bool

    def keys(self, keys: list[bytes]) -> Sequence[Key]:
        """The keys as the index has them; the same object where they are as they came."""
        return engine_keys(keys) if self.digested else keys

    def parent(self, key: bytes | None) -> Key | None:
        """The parent of a chain of such keys."""
        return engine_key(key) if key and self.digested else key


class Spaces:
    """The key spaces that one publisher names, each parsed once as long as they are few.

    `skipped` counts events about such as are none. `local` has the canonical forms of those whose shards say
    where on its node a rank is, by the namespace without that.
    """

    def __init__(self) -> None:
        self.skipped = 0
        self.local: dict[Namespace, list[bytes]] = {}
        self._known: dict[bytes, Space | None] = {}

    def get(self, canonical: bytes) -> Space | None:
        """The space of a namespace's canonical form; None where it is none."""
        try:
            return self._known[canonical]
        except KeyError:
            pass
        if len(canonical) > _CANONICAL_BYTES_MAX:
            return None
        if len(self._known) >= _SPACES_MAX:
            self._known.clear()
            self.local.clear()
        space = self._known[canonical] = _parsed(canonical)
        if space is not None and ":" in space.namespace.shard:
            self.local.setdefault(plain(space.namespace), []).append(canonical)
        return space


def _parsed(canonical: bytes) -> Space | None:
    try:
        namespace = Namespace.from_canonical(canonical)
    except InvalidRequest:
        return None
    # A field that a later release has would be lost, and with it what tells two namespaces apart.
    if namespace.canonical != canonical:
        return None
    return Space(namespace, namespace.scheme.startswith(_DIGESTED))


class NodeCopy:
    """What a node has in one of its lives, as far as it was taken."""

    def __init__(self, holding: Holding, spaces: Spaces, saved: SavedNode | None = None) -> None:
        """What was saved belongs to the holding."""
        self.holding = holding
        self._spaces = spaces
        self._skipped = saved.skipped if saved else False
        tallies = saved.tallies if saved else [(0, 0) for _ in Medium]
        self._tallies = {medium: list(tally) for medium, tally in zip(Medium, tallies, strict=True)}

    def apply(self, events: Sequence[Stored | Removed]) -> None:
        """Do what a message says, all of it or nothing.

        Raises:
            ProtocolError: it holds too many keys, or some that are none.
        """
        for event, space in self._checked(events):
            if space is None:
                self._spaces.skipped += 1
                self._skipped = True
            elif isinstance(event, Stored):
                self._store(event, space)
            else:
                self._remove(event, space)
        self.holding.settle()

    def agrees(self, digests: dict[Medium, Digest]) -> bool:
        """Whether these digests are of what is here; of a part that was taken nobody can say, so it is."""
        if self.holding.over or self._skipped:
            return True
        return all(digests.get(medium, _NOTHING) == Digest(*tally) for medium, tally in self._tallies.items())

    def save(self) -> tuple[list[tuple[int, int]], bool]:
        """What to go on from after a restart, beside the holding."""
        return [(blocks, crc_sum) for blocks, crc_sum in self._tallies.values()], self._skipped

    def _checked(self, events: Sequence[Stored | Removed]) -> list[tuple[Stored | Removed, Space | None]]:
        count = 0
        checked: list[tuple[Stored | Removed, Space | None]] = []
        for event in events:
            space = self._spaces.get(event.namespace)
            count += _checked_count(event, space is not None and space.digested)
            checked.append((event, space))
        if count > KEYS_MAX:
            raise ProtocolError(f"feed: a message of {count} keys; the limit is {KEYS_MAX}")
        return checked

    def _store(self, event: Stored, space: Space) -> None:
        keys = space.keys(event.keys)
        parent = space.parent(event.parent)
        changed = self.holding.stored(space.namespace, event.medium, keys, parent)
        tally = self._tallies[event.medium]
        tally[0] += len(changed)
        tally[1] = tally[1] + _crc_sum(event.keys, keys, changed) & _CRC_SUM_MASK

    def _remove(self, event: Removed, space: Space) -> None:
        keys = space.keys(event.keys)
        changed = self.holding.removed(space.namespace, event.medium, keys)
        tally = self._tallies[event.medium]
        tally[0] -= len(changed)
        tally[1] = tally[1] - _crc_sum(event.keys, keys, changed) & _CRC_SUM_MASK


_NOTHING: Final = Digest(0, 0)


def _checked_count(event: Stored | Removed, digested: bool) -> int:
    """How many keys an event has, each of a length that keys have."""
    least, most = _DIGEST_BYTES if digested else (1, KEY_BYTES_MAX)
    parent = event.parent if isinstance(event, Stored) else None
    lengths = set(map(len, (*event.keys, parent) if parent else event.keys))
    if not event.keys or not least <= min(lengths) <= max(lengths) <= most:
        raise ProtocolError(
            f"feed: {len(event.keys)} keys of {sorted(lengths)[:9]} bytes; give some, of {least} to {most}"
        )
    return len(event.keys)


def _crc_sum(raw: list[bytes], keys: Sequence[Key], changed: Sequence[Key]) -> int:
    """Of those of `raw` whose keys in the index have changed."""
    if changed is keys:
        return sum(map(crc32, raw))
    key_to_raw = dict(zip(keys, raw, strict=True))
    return sum(crc32(key_to_raw[key]) for key in changed)
