"""What the events of an engine mean for the index: namespaces, media and keys of its blocks. Pure.

Where the engine's hash can be reproduced by whoever has the tokens, its low 60 bits are the key. Where not
(scheme "tokens", and blocks of LoRA adapters under every scheme) the key is a hash of our own over the tokens
that the event brings, and a `Translation` finds it again for events that bring none. What cannot be placed is
counted and harms nothing: a hit is shorter. That includes blocks that would answer prompts of others: those
of an adapter that has a number and no name, those whose hash should hold a salt and does not, and what
follows them.

A batch is applied in one turn of the loop. Removals are cheap, and all of them count; what is stored beyond
what takes 0.1 s is left out.
"""

import logging
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from enum import StrEnum
from itertools import groupby
from typing import Final, cast

import msgspec

from kvstore.block import Medium, Namespace
from kvstore.content_keys import KEY_MASK, event_extras, event_hashes, salt_of, sequence_hashes
from kvstore.engine_hashes import Extra
from kvstore.engine_keys import engine_hash64, engine_key, engine_keys
from kvstore.errors import InvalidRequest, ProtocolError
from kvstore.index.engine_group import OWN_SCHEME, EngineGroup
from kvstore.index.engine_source import EngineSource
from kvstore.index.events import AllBlocksCleared, Batch, BlockRemoved, BlockStored, Event, Hash
from kvstore.index.holding import Holding
from kvstore.index.keytable import ROOT, Key
from kvstore.index.salted import holds_salt, is_salted
from kvstore.index.saved import SavedGroup
from kvstore.index.translation import Translation

logger = logging.getLogger(__name__)

_MEDIA: Final = {
    None: Medium.GPU,
    "GPU": Medium.GPU,
    "CPU": Medium.DRAM,
    "CPU_PINNED": Medium.DRAM,
    "STORAGE": Medium.NVME,
    "DISK": Medium.NVME,
    "EXTERNAL": Medium.REMOTE,
}
# vLLM's kinds of groups whose every block of a prefix must be there for a hit. Of the others (windows,
# states) a few last ones are enough, so what is there says nothing about a hit.
_PREFIX_KINDS: Final = frozenset({None, "full_attention", "mla_attention", "sink_full_attention"})
# An engine has a handful.
_GROUPS_MAX: Final = 64
# Of a batch: events of blocks stored, and bytes of the tokens that are hashed, where an event, a block and a
# salt cost as much as so many bytes. 128,000 tokens have 640 KiB at most.
_STORED_MAX: Final = 16_384
_HASHED_BYTES_MAX: Final = 768 << 10
_EVENT_BYTES: Final = 64
_BLOCK_BYTES: Final = 8
_SALT_BYTES: Final = 256
# Blocks that were refused: what follows them is, too.
_REFUSED_MAX: Final = 65_536


class Ignored(StrEnum):
    """Why an event, or a batch, was passed over."""

    TOPIC = "topic"
    MEDIUM = "medium"
    BLOCK_SIZE = "block_size"
    KIND = "kind"
    LORA = "lora"
    SALT = "salt"
    REFUSED = "refused"
    LIMIT = "limit"
    UNKNOWN = "unknown"
    MALFORMED = "malformed"


class EngineBlocks:
    """The blocks of one publisher. `incomplete` says that some of its events are known to be missing."""

    def __init__(self, source: EngineSource, holding: Holding) -> None:
        self._source = source
        self._groups: dict[int, EngineGroup] = {}
        self.holding = holding
        self.ignored: Counter[Ignored] = Counter()
        self.orphans = 0
        self.incomplete = False
        self._refused: OrderedDict[int, None] = OrderedDict()
        self._to_store = self._to_hash = 0

    def begin(self, holding: Holding) -> None:
        """Forget all, and go on with a fresh holding."""
        self.holding = holding
        self._groups = {}
        self._refused.clear()
        self.incomplete = False

    def save(self) -> list[SavedGroup]:
        """What to go on from after a restart, beside the holding."""
        return [group.save() for group in self._groups.values()]

    def restore(self, groups: Sequence[SavedGroup], holding: Holding, *, incomplete: bool) -> None:
        """Go on from what was saved with the holding."""
        self.begin(holding)
        self.incomplete = incomplete
        for saved in groups:
            group = self._group(saved.number)
            if group is None:
                return
            group.restore(saved)

    def translations(self) -> Iterator[tuple[Namespace, Translation]]:
        """What the engine's hashes stand for, of its first group."""
        group = self._groups.get(0)
        return iter(group.translations.items() if group is not None else ())

    def pass_over(self, topic: bytes) -> None:
        """A batch has come under a topic that is not the source's."""
        if self._source.topic is not None and not self.ignored[Ignored.TOPIC]:
            logger.warning(
                "engine %s publishes under the topic %.80r and not under %r, which is configured; such "
                "batches are passed over, and from now on counted",
                self._source.name,
                topic,
                self._source.topic.encode(),
            )
        self.ignored[Ignored.TOPIC] += 1

    def apply(self, batch: Batch) -> None:
        """What the batch says holds from now on."""
        self._to_store, self._to_hash = _STORED_MAX, _HASHED_BYTES_MAX
        for event in _joined(batch.events[_last_clear(batch) :]):
            try:
                if isinstance(event, BlockStored):
                    self._stored(event)
                elif isinstance(event, BlockRemoved):
                    self._removed(event)
                else:
                    self._cleared()
            except (InvalidRequest, ProtocolError):
                self._lose(Ignored.MALFORMED)
        if batch.malformed:
            self._lose(Ignored.MALFORMED, batch.malformed)
        if batch.unknown:
            self.ignored[Ignored.UNKNOWN] += batch.unknown
        self.holding.settle()

    def _stored(self, event: BlockStored) -> None:
        self._to_store -= 1
        if self._to_store < 0 or self._to_hash < 0:
            return self._lose(Ignored.LIMIT)
        medium, group = _medium(event), self._group(event.group_idx)
        if medium is None:
            return self._ignore(Ignored.MEDIUM)
        if group is None:
            return self._ignore(Ignored.LIMIT)
        if event.kv_cache_spec_kind not in _PREFIX_KINDS and not group.no_prefix:
            self._leave_out(group)
        if group.no_prefix:
            return self._ignore(Ignored.KIND)
        hashes = _keys(event.block_hashes)
        if event.lora_id is not None and not event.lora_name and not self._source.lora:
            return self._refuse(Ignored.LORA, hashes)
        if self._refused and _parent(event) in self._refused:
            return self._refuse(Ignored.REFUSED, hashes)
        if event.lora_name or self._source.scheme == OWN_SCHEME or self._is_own(group, event, hashes):
            return self._stored_by_content(event, group, medium, hashes)
        return self._stored_by_hash(event, group, medium, hashes)

    def _stored_by_hash(
        self, event: BlockStored, group: EngineGroup, medium: Medium, hashes: Sequence[int]
    ) -> None:
        size = event.block_size or self._source.block_tokens
        space = group.space(size)
        if space is None:
            return self._ignore(Ignored.BLOCK_SIZE)
        if is_salted(event):
            if not self._may_hash(event, _SALT_BYTES):
                return self._lose(Ignored.LIMIT)
            if not holds_salt(event, space, hashes):
                return self._refuse(Ignored.SALT, hashes)
        parent: Key | None = _parent(event)
        if parent is None and event.block_size and event.has_tokens:
            parent = ROOT
        return self._place(space, medium, hashes, parent)

    def _stored_by_content(
        self, event: BlockStored, group: EngineGroup, medium: Medium, hashes: Sequence[int]
    ) -> None:
        if not event.has_tokens:
            return self._stored_again(group, medium, hashes)
        if not self._may_hash(event, _EVENT_BYTES):
            return self._lose(Ignored.LIMIT)
        tokens = event.tokens()
        in_pairs = bool(tokens) and isinstance(tokens[0], tuple)
        space = group.own_space(event.block_size, in_pairs)
        if space is None:
            return self._ignore(Ignored.BLOCK_SIZE)
        if len(tokens) != len(hashes) * event.block_size:
            raise ProtocolError(
                f"{len(hashes)} blocks of {event.block_size} tokens with {len(tokens)} tokens"
            )
        translation = group.translation(space)
        parent = _parent(event)
        before = None if parent is None else translation.sequence(parent)
        if parent is not None and before is None:
            self.orphans += len(hashes)
            return None
        extras = _extras(event)
        salt = salt_of(extras[0] if extras else None) or ("" if parent is None else translation.salt(parent))
        if self._source.salt and salt not in ("", self._source.salt):
            return self._refuse(Ignored.SALT, hashes)
        salt = salt or self._source.salt
        locals_ = event_hashes(
            cast(Sequence[int], tokens), event.block_size, extras, lora=self._source.lora, salt=salt
        )
        if sum([len(other) for other in group.translations.values()]) >= self.holding.blocks_max:
            return self._lose(Ignored.LIMIT)
        sequences = sequence_hashes(before, locals_)
        translation.stored(hashes, sequences, medium, salt)
        if translation.lineage is not None:
            translation.lineage.stored(
                hashes, list(map(engine_hash64, event.block_hashes)), locals_, _parent64(event)
            )
        keys = [sequence & KEY_MASK for sequence in sequences]
        return self._place(space, medium, keys, ROOT if before is None else before & KEY_MASK)

    def _stored_again(self, group: EngineGroup, medium: Medium, hashes: Sequence[int]) -> None:
        """Blocks without tokens, which are known if they were there with them."""
        for engine_hash in hashes:
            for space, translation in group.translations.items():
                sequence = translation.sequence(engine_hash)
                if sequence is not None:
                    translation.stored([engine_hash], [sequence], medium)
                    self._place(space, medium, [sequence & KEY_MASK], None)
                    break
            else:
                self.orphans += 1

    def _removed(self, event: BlockRemoved) -> None:
        medium, group = _medium(event), self._groups.get(event.group_idx or 0)
        if medium is None:
            return self._ignore(Ignored.MEDIUM)
        if group is None or group.no_prefix:
            return None
        # The event does not say which block size it is about: a group mostly has one.
        hashes = _keys(event.block_hashes)
        for space, translation in group.translations.items():
            keys, hashes = translation.removed(hashes, medium)
            self.holding.removed(space, medium, keys)
        for space in group.spaces:
            self.holding.removed(space, medium, hashes)
        return None

    def _cleared(self) -> None:
        if self.holding.blocks:
            self.holding.clear()
        for group in self._groups.values():
            group.translations.clear()
        self._refused.clear()
        self.incomplete = False

    def _leave_out(self, group: EngineGroup) -> None:
        """Hits of this group need no whole prefix. What was taken for one is forgotten, with all the rest."""
        group.no_prefix = True
        if group.is_used:
            self._cleared()
            self.incomplete = True

    def _refuse(self, why: Ignored, hashes: Sequence[int]) -> None:
        """These blocks would answer prompts of others."""
        if why is Ignored.SALT and not self.ignored[why]:
            logger.warning(
                "engine %s: its hashes are not those of %s with the salt; salted blocks are passed over, and "
                'from now on counted; give the scheme "tokens"',
                self._source.name,
                self._source.scheme,
            )
        self._ignore(why)
        self._refused.update(dict.fromkeys(hashes))
        while len(self._refused) > _REFUSED_MAX:
            self._refused.popitem(last=False)

    def _may_hash(self, event: BlockStored, cost: int) -> bool:
        """Whether the batch has not had too much to hash yet."""
        self._to_hash -= memoryview(event.token_ids).nbytes + cost + _BLOCK_BYTES * len(event.block_hashes)
        return self._to_hash >= 0

    def _place(self, space: Namespace, medium: Medium, keys: Sequence[int], parent: Key | None) -> None:
        self.holding.stored(space, medium, keys, parent)
        if self.holding.over:
            self._lose(Ignored.LIMIT)

    def _group(self, index: int | None) -> EngineGroup | None:
        number = index or 0
        group = self._groups.get(number)
        if group is None and len(self._groups) < _GROUPS_MAX:
            group = self._groups[number] = EngineGroup(self._source, number)
        return group

    def _is_own(self, group: EngineGroup, event: BlockStored, hashes: Sequence[int]) -> bool:
        """Whether this is about blocks with keys of our own, and does not say so."""
        if not group.translations or event.has_tokens:
            return False
        return any(
            one.sequence(engine_hash) is not None
            for one in group.translations.values()
            for engine_hash in hashes
        )

    def _ignore(self, why: Ignored) -> None:
        self.ignored[why] += 1

    def _lose(self, why: Ignored, events: int = 1) -> None:
        self.ignored[why] += events
        self.incomplete = True


def _last_clear(batch: Batch) -> int:
    """Nothing before it matters."""
    clears = [i for i, event in enumerate(batch.events) if isinstance(event, AllBlocksCleared)]
    return clears[-1] if clears else 0


def _joined(events: Sequence[Event]) -> Iterator[Event]:
    """Removals that follow each other as one, a tenth of the work: vLLM sends one for each block."""
    for where, run in groupby(events, _where):
        first, *others = run
        if where is None or not others:
            yield from (first, *others)
            continue
        removed = cast(list[BlockRemoved], [first, *others])
        hashes = [one for event in removed for one in event.block_hashes]
        yield msgspec.structs.replace(removed[0], block_hashes=hashes)


def _where(event: Event) -> tuple[str | None, int | None, str | None] | None:
    return (event.medium, event.group_idx, event.locality) if isinstance(event, BlockRemoved) else None


def _medium(event: BlockStored | BlockRemoved) -> Medium | None:
    if event.locality is not None and event.locality.upper() == "REMOTE":
        return Medium.REMOTE
    medium = event.medium
    return _MEDIA.get(medium) or _MEDIA.get(medium.upper() if medium else None)


def _parent(event: BlockStored) -> int | None:
    return None if event.parent_block_hash is None else engine_key(event.parent_block_hash)


def _parent64(event: BlockStored) -> int | None:
    return None if event.parent_block_hash is None else engine_hash64(event.parent_block_hash)


def _keys(hashes: list[Hash]) -> list[int]:
    """`engine_keys`, faster for what a decoder has found to be numbers of 64 bits."""
    try:
        return [one & KEY_MASK for one in hashes]  # type: ignore[operator]
    except TypeError:
        return engine_keys(cast(list[bytes], hashes))


def _extras(event: BlockStored) -> Sequence[Extra]:
    """What the event's blocks hold beside their tokens."""
    extra_keys = event.extra_keys or ()
    if not event.lora_name and not event.cache_salt and not any(extra_keys):
        return ()
    return [
        event_extras(
            event.lora_name,
            event.cache_salt,
            extra_keys[i] if i < len(extra_keys) else None,
            first=event.parent_block_hash is None and i == 0,
        )
        for i in range(len(event.block_hashes))
    ]
