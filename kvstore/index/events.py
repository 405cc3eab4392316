"""KV-cache events as engines publish them: what a batch holds, and its bytes. No state, no socket.

A batch is msgpack, `[seconds, [event, ...], data-parallel rank]`. An event is a map with `type` and its
fields, as vLLM 0.32 and SGLang 0.5.23 send it, or the array of older vLLM that some routers still want:

    ["BlockStored", hashes, parent, token_ids, block_size, lora_id, medium, lora_name, extra_keys, group_idx,
     kv_cache_spec_kind, kv_cache_spec_sliding_window]
    ["BlockRemoved", hashes, medium, group_idx]
    ["AllBlocksCleared"]

Fields that nobody here knows are skipped, missing ones have their defaults, events of unknown types are
counted.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Any, Final

import msgspec

from kvstore.errors import ProtocolError

# 64 bits, which SGLang signs and vLLM does not, or a digest.
Hash = int | bytes
# One element of token_ids: a token, or with EAGLE a token and the one after it.
Token = int | tuple[int, int]

_encoder: Final = msgspec.msgpack.Encoder()
# Of one batch. As vLLM writes them, 76,000 removals of a block have 4 MiB; 262,144 blocks of 16 are 4 million
# tokens.
_EVENTS_MAX: Final = 80_000
_HASHES_MAX: Final = 1 << 18
# Events that are looked at one by one since some of a batch are none: 40 ms. And how many may be none: 1 ms.
_EACH_MAX: Final = 16_384
_BAD_MAX: Final = 1000
# What decoding raises: beside msgspec's own, text that is no UTF-8 and a nesting that nobody means.
_MALFORMED: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def pack_tokens(tokens: Sequence[Token]) -> msgspec.Raw:
    """The `token_ids` of an event."""
    return msgspec.Raw(_encoder.encode(tokens))


def _none() -> None:
    """A default that is written, since a receiver may insist on the field."""


class BlockStored(
    msgspec.Struct, frozen=True, omit_defaults=True, tag_field="type", tag="BlockStored", gc=False
):
    """Blocks that follow each other, the first of them after `parent_block_hash`, are in a medium.

    Placeholders of vLLM's offloading have no tokens, `block_size` 0 and no parent, wherever they belong.
    `extra_keys` has an entry for each block: LoRA name, (multimodal id, offset) pairs, cache salt and digests
    of embeddings, untagged, in this order. `cache_salt` is SGLang's.
    """

    block_hashes: list[Hash]
    parent_block_hash: Hash | None
    # Left as they came: decoding them costs more than all the rest.
    token_ids: msgspec.Raw
    block_size: int
    lora_id: int | None = msgspec.field(default_factory=_none)
    medium: str | None = msgspec.field(default_factory=_none)
    lora_name: str | None = msgspec.field(default_factory=_none)
    extra_keys: list[tuple[Any, ...] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None
    ownership: str | None = None
    session_id: str | None = None
    cache_salt: str | None = None

    @property
    def has_tokens(self) -> bool:
        """Whether there are any; an empty array is one byte."""
        return memoryview(self.token_ids).nbytes > 1

    def tokens(self) -> Sequence[Token]:
        """All blocks' tokens, one after the other.

        Raises:
            ProtocolError: they are none.
        """
        try:
            return _tokens.decode(self.token_ids)
        except _MALFORMED:
            try:
                return _token_pairs.decode(self.token_ids)
            except _MALFORMED as exc:
                raise ProtocolError(f"token_ids of an event: {exc}") from exc


class BlockRemoved(
    msgspec.Struct, frozen=True, omit_defaults=True, tag_field="type", tag="BlockRemoved", gc=False
):
    """Blocks are in a medium no longer."""

    block_hashes: list[Hash]
    medium: str | None = msgspec.field(default_factory=_none)
    group_idx: int | None = None
    locality: str | None = None
    ownership: str | None = None


class AllBlocksCleared(msgspec.Struct, frozen=True, tag_field="type", tag="AllBlocksCleared", gc=False):
    """The publisher has no block any more, in no medium."""


Event = BlockStored | BlockRemoved | AllBlocksCleared


class Batch(msgspec.Struct, frozen=True, gc=False):
    """What happened, in its order. `at_s` is the publisher's wall clock.

    `unknown` are events of types that are not known here, `malformed` those that lack or distort a field.
    """

    at_s: float
    events: Sequence[Event]
    rank: int | None = None
    unknown: int = 0
    malformed: int = 0


def encode_batch(events: Sequence[Event], at_s: float, *, arrays: bool, rank: int | None = None) -> bytes:
    """The payload of a batch: maps, or `arrays` for receivers that know no maps.

    Arrays have no place for locality, ownership, session_id and cache_salt.
    """
    items: Sequence[object] = [_as_array(event) for event in events] if arrays else events
    return _encoder.encode((at_s, items) if rank is None else (at_s, items, rank))


def decode_batch(payload: bytes) -> Batch:
    """The batch of a payload, whose `token_ids` keep the payload alive.

    Raises:
        ProtocolError: it is none.
    """
    try:
        batch: _Maps | _Arrays = _maps.decode(payload)
    except _MALFORMED:
        try:
            batch = _arrays.decode(payload)
        except _MALFORMED:
            return _decode_each(payload)
    return _checked(Batch(_clock(batch.at_s), batch.events, batch.rank))


class _StoredArray(BlockStored, frozen=True, array_like=True, tag="BlockStored", gc=False):
    pass


class _RemovedArray(BlockRemoved, frozen=True, array_like=True, tag="BlockRemoved", gc=False):
    pass


class _ClearedArray(AllBlocksCleared, frozen=True, array_like=True, tag="AllBlocksCleared", gc=False):
    pass


_LENGTH: Final = msgspec.Meta(max_length=_EVENTS_MAX)


class _Maps(msgspec.Struct, array_like=True, gc=False):
    at_s: float
    events: Annotated[list[BlockStored | BlockRemoved | AllBlocksCleared], _LENGTH]
    rank: int | None = None


class _Arrays(msgspec.Struct, array_like=True, gc=False):
    at_s: float
    events: Annotated[list[_StoredArray | _RemovedArray | _ClearedArray], _LENGTH]
    rank: int | None = None


class _Raws(msgspec.Struct, array_like=True, gc=False):
    at_s: float
    events: Annotated[list[msgspec.Raw], _LENGTH]
    rank: int | None = None


class _Tag(msgspec.Struct, gc=False):
    type: str


class _ArrayTag(msgspec.Struct, array_like=True, gc=False):
    type: str


_Decoder = msgspec.msgpack.Decoder
_maps: "Final[_Decoder[_Maps]]" = _Decoder(_Maps)
_arrays: "Final[_Decoder[_Arrays]]" = _Decoder(_Arrays)
_raws: "Final[_Decoder[_Raws]]" = _Decoder(_Raws)
_map: "Final[_Decoder[Event]]" = _Decoder(BlockStored | BlockRemoved | AllBlocksCleared)
_array: "Final[_Decoder[Event]]" = _Decoder(_StoredArray | _RemovedArray | _ClearedArray)
_tokens: "Final[_Decoder[list[int]]]" = _Decoder(list[int])
_token_pairs: "Final[_Decoder[list[tuple[int, int]]]]" = _Decoder(list[tuple[int, int]])
_tag: "Final[_Decoder[_Tag]]" = _Decoder(_Tag)
_array_tag: "Final[_Decoder[_ArrayTag]]" = _Decoder(_ArrayTag)
_TYPES: Final = frozenset({"BlockStored", "BlockRemoved", "AllBlocksCleared"})


def _as_array(event: Event) -> tuple[object, ...]:
    if isinstance(event, BlockStored):
        return (
            "BlockStored",
            event.block_hashes,
            event.parent_block_hash,
            event.token_ids,
            event.block_size,
            event.lora_id,
            event.medium,
            event.lora_name,
            event.extra_keys,
            event.group_idx,
            event.kv_cache_spec_kind,
            event.kv_cache_spec_sliding_window,
        )
    if isinstance(event, BlockRemoved):
        return ("BlockRemoved", event.block_hashes, event.medium, event.group_idx)
    return ("AllBlocksCleared",)


def _clock(at_s: float) -> float:
    if not math.isfinite(at_s):
        raise ProtocolError(f"a batch of the time {at_s}; it must be seconds")
    return at_s


def _checked(batch: Batch) -> Batch:
    events = [event for event in batch.events if not isinstance(event, AllBlocksCleared)]
    hashes = sum([len(event.block_hashes) for event in events])
    if hashes > _HASHES_MAX:
        raise ProtocolError(f"a batch of {hashes} blocks; {_HASHES_MAX} are the most")
    return batch


def _decode_each(payload: bytes) -> Batch:
    """The batch without what of it cannot be decoded."""
    try:
        batch = _raws.decode(payload)
    except _MALFORMED as exc:
        raise ProtocolError(f"{len(payload)} bytes that are no batch of events: {exc}") from exc
    events: list[Event] = []
    unknown = malformed = 0
    for raw in batch.events[:_EACH_MAX]:
        try:
            events.append(_decode_one(raw))
        except _MALFORMED:
            if _has_known_type(raw):
                malformed += 1
            else:
                unknown += 1
            if unknown + malformed > _BAD_MAX:
                raise ProtocolError(f"more than {_BAD_MAX} events of a batch are none") from None
    malformed += len(batch.events[_EACH_MAX:])
    return _checked(Batch(_clock(batch.at_s), events, batch.rank, unknown, malformed))


def _decode_one(raw: msgspec.Raw) -> Event:
    try:
        return _map.decode(raw)
    except msgspec.ValidationError:
        return _array.decode(raw)


def _has_known_type(raw: msgspec.Raw) -> bool:
    """Whether it says that it is one of our events."""
    try:
        return _tag.decode(raw).type in _TYPES
    except _MALFORMED:
        pass
    try:
        return _array_tag.decode(raw).type in _TYPES
    except _MALFORMED:
        return False
