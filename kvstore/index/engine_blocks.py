"""What the events of an engine mean for the index: namespaces, media and keys of its blocks. Pure.

Where the engine's hash can be reproduced by whoever has the tokens, its low 60 bits are the key. Where not
(scheme "tokens", and blocks of LoRA adapters under every scheme) the key is a hash of our own over the tokens
that the event brings, and a `Translation` finds it again for events that bring none. What cannot be placed is
counted and harms nothing: a hit is shorter.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, cast

from kvstore.block import Medium, Namespace
from kvstore.content_keys import KEY_MASK, content_chain, event_extras
from kvstore.engine_hashes import Extra
from kvstore.engine_keys import engine_key, engine_keys
from kvstore.errors import InvalidRequest, ProtocolError
from kvstore.index.engine_source import EngineSource
from kvstore.index.events import Batch, BlockRemoved, BlockStored, Hash
from kvstore.index.holding import Holding
from kvstore.index.keytable import ROOT, Key
from kvstore.index.saved import SavedGroup, SavedTranslation
from kvstore.index.translation import Translation

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
# An engine has a handful of groups, and of each one size.
_GROUPS_MAX: Final = 64
_SIZES_MAX: Final = 4
_TOKENS: Final = "tokens"


class Ignored(StrEnum):
    """Why an event, or a batch, was passed over."""

    TOPIC = "topic"
    MEDIUM = "medium"
    BLOCK_SIZE = "block_size"
    KIND = "kind"
    LIMIT = "limit"
    UNKNOWN = "unknown"
    MALFORMED = "malformed"


@dataclass(slots=True)
class _Group:
    """A KV-cache group of the engine: its namespaces by block size, and those with keys of our own."""

    name: str
    no_prefix: bool = False
    spaces: dict[int, Namespace] = field(default_factory=dict)
    own_spaces: dict[tuple[int, bool], Namespace] = field(default_factory=dict)
    translations: dict[Namespace, Translation] = field(default_factory=dict)


class EngineBlocks:
    """The blocks of one publisher. `incomplete` says that some of its events are known to be missing."""

    def __init__(self, source: EngineSource, holding: Holding) -> None:
        self._source = source
        self._groups: dict[int, _Group] = {}
        self.holding = holding
        self.ignored: Counter[Ignored] = Counter()
        self.orphans = 0
        self.incomplete = False

    def begin(self, holding: Holding) -> None:
        """Forget all, and go on with a fresh holding."""
        self.holding = holding
        self._groups = {}
        self.incomplete = False

    def save(self) -> list[SavedGroup]:
        """What to go on from after a restart, beside the holding."""
        return [
            SavedGroup(
                number,
                group.no_prefix,
                list(group.spaces),
                [
                    SavedTranslation(*way, *group.translations[space].save())
                    for way, space in group.own_spaces.items()
                    if space in group.translations
                ],
            )
            for number, group in self._groups.items()
        ]

    def restore(self, groups: Sequence[SavedGroup], holding: Holding, *, incomplete: bool) -> None:
        """Go on from what was saved with the holding."""
        self.begin(holding)
        self.incomplete = incomplete
        for saved in groups:
            group = self._group(saved.number)
            if group is None:
                return
            group.no_prefix = saved.no_prefix
            for block_tokens in saved.block_tokens:
                self._space(group, block_tokens)
            for each in saved.translations:
                space = self._own_space(group, each.block_tokens, each.in_pairs)
                if space is not None:
                    group.translations[space] = Translation(each.living, each.removed)

    def apply(self, batch: Batch) -> None:
        """What the batch says holds from now on."""
        for event in batch.events:
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
        medium, group = _medium(event), self._group(event.group_idx)
        if medium is None:
            return self._ignore(Ignored.MEDIUM)
        if group is None:
            return self._ignore(Ignored.LIMIT)
        if event.kv_cache_spec_kind not in _PREFIX_KINDS:
            group.no_prefix = True
        if group.no_prefix:
            return self._ignore(Ignored.KIND)
        hashes = _keys(event.block_hashes)
        if event.lora_name or self._source.scheme == _TOKENS or self._is_own(group, event, hashes):
            return self._stored_by_content(event, group, medium, hashes)
        size = event.block_size or self._source.block_tokens
        space = group.spaces.get(size) or self._space(group, size)
        if space is None:
            return self._ignore(Ignored.BLOCK_SIZE)
        if event.parent_block_hash is not None:
            parent: Key | None = engine_key(event.parent_block_hash)
        else:
            parent = ROOT if event.block_size and event.has_tokens else None
        return self._place(space, medium, hashes, parent)

    def _stored_by_content(
        self, event: BlockStored, group: _Group, medium: Medium, hashes: Sequence[int]
    ) -> None:
        if not event.has_tokens:
            return self._stored_again(group, medium, hashes)
        tokens = event.tokens()
        space = self._own_space(
            group, event.block_size, in_pairs=bool(tokens) and isinstance(tokens[0], tuple)
        )
        if space is None:
            return self._ignore(Ignored.BLOCK_SIZE)
        translation = group.translations.setdefault(space, Translation())
        before: int | None = None
        if event.parent_block_hash is not None:
            before = translation.key(engine_key(event.parent_block_hash))
            if before is None:
                self.orphans += len(hashes)
                return None
        keys = content_chain(before, cast(Sequence[int], tokens), event.block_size, _extras(event))
        if len(keys) != len(hashes) or len(tokens) != len(keys) * event.block_size:
            raise ProtocolError(
                f"{len(hashes)} blocks of {event.block_size} tokens with {len(tokens)} tokens"
            )
        if sum([len(other) for other in group.translations.values()]) >= self.holding.blocks_max:
            return self._lose(Ignored.LIMIT)
        translation.stored(hashes, keys, medium)
        return self._place(space, medium, keys, ROOT if before is None else before)

    def _stored_again(self, group: _Group, medium: Medium, hashes: Sequence[int]) -> None:
        """Blocks without tokens, which are known if they were there with them."""
        for engine_hash in hashes:
            for space, translation in group.translations.items():
                key = translation.key(engine_hash)
                if key is not None:
                    translation.stored([engine_hash], [key], medium)
                    self._place(space, medium, [key], None)
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
        for space in group.spaces.values():
            self.holding.removed(space, medium, hashes)
        return None

    def _cleared(self) -> None:
        if self.holding.blocks:
            self.holding.clear()
        for group in self._groups.values():
            group.translations.clear()
        self.incomplete = False

    def _place(self, space: Namespace, medium: Medium, keys: Sequence[int], parent: Key | None) -> None:
        self.holding.stored(space, medium, keys, parent)
        if self.holding.over:
            self._lose(Ignored.LIMIT)

    def _group(self, index: int | None) -> _Group | None:
        number = index or 0
        group = self._groups.get(number)
        if group is None and len(self._groups) < _GROUPS_MAX:
            group = self._groups[number] = _Group(str(number))
        return group

    def _space(self, group: _Group, size: int) -> Namespace | None:
        """The namespace of the engine's own hashes of blocks of this size."""
        times, rest = divmod(size, self._source.block_tokens)
        if rest or not times or len(group.spaces) >= _SIZES_MAX:
            return None
        scheme = self._source.scheme + (f"/{times}" if times > 1 else "")
        space = Namespace(self._source.model, size, group=group.name, scheme=scheme)
        group.spaces[size] = space
        return space

    def _own_space(self, group: _Group, size: int, in_pairs: bool) -> Namespace | None:
        """The namespace of our own keys of blocks of this size."""
        space = group.own_spaces.get((size, in_pairs))
        if space is not None:
            return space
        if size <= 0 or size % self._source.block_tokens or len(group.own_spaces) >= _SIZES_MAX:
            return None
        scheme = _TOKENS + ("-eagle" if in_pairs else "")
        space = Namespace(self._source.model, size, group=group.name, scheme=scheme)
        group.own_spaces[size, in_pairs] = space
        return space

    def _is_own(self, group: _Group, event: BlockStored, hashes: Sequence[int]) -> bool:
        """Whether this is about blocks with keys of our own, and does not say so."""
        if not group.translations or event.has_tokens:
            return False
        return any(
            one.key(engine_hash) is not None for one in group.translations.values() for engine_hash in hashes
        )

    def _ignore(self, why: Ignored) -> None:
        self.ignored[why] += 1

    def _lose(self, why: Ignored, events: int = 1) -> None:
        self.ignored[why] += events
        self.incomplete = True


def _medium(event: BlockStored | BlockRemoved) -> Medium | None:
    if event.locality is not None and event.locality.upper() == "REMOTE":
        return Medium.REMOTE
    medium = event.medium
    return _MEDIA.get(medium) or _MEDIA.get(medium.upper() if medium else None)


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
