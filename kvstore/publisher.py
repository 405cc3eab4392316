"""A listener that tells an outbox what comes and goes in the media of a node, and what follows what.

Listeners hear of tiers; what is published is media. Of the tiers of one medium the first that gets a block
and the last that loses it count.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import attrgetter
from zlib import crc32

from kvstore.block import Medium, Namespace
from kvstore.index.feed import Digest
from kvstore.index.feed_server import Held
from kvstore.index.outbox import Outbox
from kvstore.node.blocks import Block, Shelf
from kvstore.node.directory import TierDirectory
from kvstore.node.origin import Origin

_of_shelf = attrgetter("shelf")


class _Known:
    """What writers said of the keys of a namespace that are in some medium."""

    __slots__ = ("predecessors", "tokens")

    def __init__(self) -> None:
        self.predecessors: dict[bytes, bytes] = {}
        self.tokens: dict[bytes, bytes] = {}


class Publisher:
    """Implements `kvstore.node.arena.Listener`, and `kvstore.index.feed_server.Inventory`.

    `tokens` says whether to remember token ids.
    """

    def __init__(self, tiers: Sequence[TierDirectory], outbox: Outbox, *, tokens: bool = False) -> None:
        self._tiers = tuple(tiers)
        self._outbox = outbox
        self._tokens = tokens
        self._siblings = {
            tier: [other for other in tiers if other.medium is tier.medium and other is not tier]
            for tier in tiers
        }
        self._known: dict[Namespace, _Known] = {}

    # Listener.

    def sealed(self, tier: str, blocks: Sequence[Block], origin: Origin | None) -> None:
        for shelf, keys in _by_shelf(blocks):
            if origin is not None:
                self._learn(shelf.namespace, keys, origin)
            if alone := _without(keys, _shelves(self._siblings[shelf.tier], shelf.namespace)):
                predecessors = self.predecessors(shelf.namespace, alone)
                self._outbox.stored(shelf.namespace, shelf.tier.medium, alone, predecessors)

    def removed(self, tier: str, blocks: Sequence[Block]) -> None:
        for shelf, keys in _by_shelf(blocks):
            if alone := _without(keys, _shelves(self._siblings[shelf.tier], shelf.namespace)):
                self._outbox.removed(shelf.namespace, shelf.tier.medium, alone)
            self._forget(shelf.namespace, keys)

    # Inventory.

    def held(self) -> list[Held]:
        """All that can be read, medium by medium; 10 ms with 1M blocks."""
        shelves = [shelf for tier in self._tiers for shelf in tier.shelves()]
        held = [Held(shelf.namespace, shelf.tier.medium, self._first(shelf)) for shelf in shelves]
        return [some for some in held if some.keys]

    def predecessors(self, namespace: Namespace, keys: Sequence[bytes]) -> list[bytes | None]:
        """What each of the keys follows, where somebody has said it."""
        known = self._known.get(namespace)
        return [None] * len(keys) if known is None else list(map(known.predecessors.get, keys))

    def tokens_of(self, namespace: Namespace, key: bytes) -> bytes | None:
        """The token ids of a block, u32 little endian, where somebody has said them."""
        known = self._known.get(namespace)
        return None if known is None else known.tokens.get(key)

    def check(self) -> list[str]:
        """What was told of and is not there, or the other way round; what is remembered and nowhere.

        Of what lies in a shared tier not all may have been told of yet.
        """
        wrong = []
        told = self._outbox.digests()
        for medium in {tier.medium for tier in self._tiers} - {Medium.REMOTE}:
            keys = [key for held in self.held() if held.medium is medium for key in held.keys]
            there = Digest(len(keys), sum(map(crc32, keys)) % (1 << 64))
            if told.get(medium, Digest(0, 0)) != there:
                wrong.append(f"{medium}: {there} is there, and {told.get(medium)} was told of")
        for namespace, known in self._known.items():
            shelves = _shelves(self._tiers, namespace)
            lost = {*known.predecessors, *known.tokens}.difference(*[shelf.sealed for shelf in shelves])
            wrong += [f"{namespace}: {key.hex()} is remembered, and nowhere" for key in lost]
        return wrong

    # Helpers.

    def _first(self, shelf: Shelf) -> list[bytes]:
        """The shelf's keys that no earlier tier of the medium has."""
        earlier = self._tiers[: self._tiers.index(shelf.tier)]
        siblings = [tier for tier in self._siblings[shelf.tier] if tier in earlier]
        return _without(list(shelf.sealed), _shelves(siblings, shelf.namespace))

    def _learn(self, namespace: Namespace, keys: Sequence[bytes], origin: Origin) -> None:
        known = self._known.get(namespace)
        if known is None:
            known = self._known[namespace] = _Known()
        predecessors = origin.predecessors(keys)
        unknown = predecessors[0] is None  # which no other can be
        known.predecessors.update(zip(keys[unknown:], predecessors[unknown:], strict=True))  # type: ignore[arg-type]
        if self._tokens and origin.tokens is not None:
            for key in keys:
                if (tokens := origin.tokens_of(key, namespace.block_tokens)) is not None:
                    known.tokens[key] = tokens

    def _forget(self, namespace: Namespace, keys: list[bytes]) -> None:
        """Forget what was said of those keys that are nowhere now."""
        known = self._known.get(namespace)
        if known is None:
            return
        for key in _without(keys, _shelves(self._tiers, namespace)):
            known.predecessors.pop(key, None)
            if self._tokens:
                known.tokens.pop(key, None)
        if not known.predecessors and not known.tokens:
            del self._known[namespace]


def _by_shelf(blocks: Sequence[Block]) -> Iterator[tuple[Shelf, list[bytes]]]:
    """The blocks' keys, in their order; most often all are of one shelf."""
    for shelf, group in groupby(blocks, _of_shelf):
        yield shelf, [block.key for block in group]


def _shelves(tiers: Iterable[TierDirectory], namespace: Namespace) -> list[Shelf]:
    """Those of a namespace."""
    return [shelf for tier in tiers if (shelf := tier.known(namespace)) is not None]


def _without(keys: list[bytes], shelves: Sequence[Shelf]) -> list[bytes]:
    """Those keys that are on none of the shelves."""
    for shelf in shelves:
        keys = [key for key in keys if key not in shelf.sealed]
    return keys
