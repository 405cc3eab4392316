"""The codec of engines' events: vLLM's and SGLang's maps, older arrays, and what is none of these."""

import struct
import subprocess
import sys
from typing import Any, Final

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import ProtocolError
from kvstore.index.events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    Event,
    decode_batch,
    encode_batch,
    pack_tokens,
)

HASHES: Final = st.lists(
    st.integers(-(1 << 63), (1 << 64) - 1) | st.binary(min_size=8, max_size=32), max_size=4
)
TEXTS: Final = st.none() | st.text(max_size=8)
STORED: Final = st.builds(
    BlockStored,
    block_hashes=HASHES,
    parent_block_hash=st.none() | st.integers(0, (1 << 64) - 1),
    token_ids=st.lists(st.integers(0, 1 << 31), max_size=4).map(pack_tokens),
    block_size=st.integers(0, 64),
    lora_id=st.none() | st.integers(0, 9),
    medium=TEXTS,
    lora_name=TEXTS,
    extra_keys=st.none() | st.lists(st.none() | st.tuples(st.text(max_size=4)), max_size=3),
    group_idx=st.none() | st.integers(0, 9),
    kv_cache_spec_kind=TEXTS,
    kv_cache_spec_sliding_window=st.none() | st.integers(0, 4096),
)
EVENTS: Final = st.lists(
    STORED
    | st.builds(BlockRemoved, HASHES, TEXTS, st.none() | st.integers(0, 9))
    | st.builds(AllBlocksCleared),
    max_size=4,
)
STRUCT: Final = BlockStored([1], None, pack_tokens([5, 6]), 2)


def plain(payload: bytes) -> Any:
    """The batch as it lies on the wire."""
    return msgspec.msgpack.decode(payload)


def fields(event: Event) -> dict[str, Any]:
    """A comparable form: `token_ids` are compared by their bytes."""
    found = {name: getattr(event, name) for name in event.__struct_fields__}
    if "token_ids" in found:
        found["token_ids"] = bytes(found["token_ids"])
    return found


@given(EVENTS, st.booleans(), st.none() | st.integers(0, 7))
def test_what_was_encoded_is_decoded(events: list[Event], arrays: bool, rank: int | None) -> None:
    batch = decode_batch(encode_batch(events, 12.5, arrays=arrays, rank=rank))
    assert (batch.at_s, batch.rank, batch.unknown, batch.malformed) == (12.5, rank, 0, 0)
    assert [fields(event) for event in batch.events] == [fields(event) for event in events]


def test_maps_have_the_fields_that_vllm_requires_and_no_other_defaults() -> None:
    payload = encode_batch([STRUCT, BlockRemoved([1]), AllBlocksCleared()], 1.0, arrays=False, rank=0)
    assert plain(payload) == [
        1.0,
        [
            {
                "type": "BlockStored",
                "block_hashes": [1],
                "parent_block_hash": None,
                "token_ids": [5, 6],
                "block_size": 2,
                "lora_id": None,
                "medium": None,
                "lora_name": None,
            },
            {"type": "BlockRemoved", "block_hashes": [1], "medium": None},
            {"type": "AllBlocksCleared"},
        ],
        0,
    ]


def test_arrays_have_the_layout_of_older_vllm() -> None:
    stored = BlockStored(
        [1], 2, pack_tokens([5]), 1, 3, "GPU", "a", [("a",)], 4, "mamba", 5, "LOCAL", "o", "s", "salt"
    )
    payload = encode_batch(
        [stored, BlockRemoved([1], "GPU", 4, "LOCAL"), AllBlocksCleared()], 1.0, arrays=True
    )
    assert plain(payload) == [
        1.0,
        [
            ["BlockStored", [1], 2, [5], 1, 3, "GPU", "a", [["a"]], 4, "mamba", 5],
            ["BlockRemoved", [1], "GPU", 4],
            ["AllBlocksCleared"],
        ],
    ]


def test_fields_that_are_missing_have_defaults_and_others_are_skipped() -> None:
    old = ["BlockStored", [1], None, [5, 6], 2]
    new = {"type": "BlockRemoved", "block_hashes": [1], "reason": {"why": ["this"]}}
    for event, expected in ((old, STRUCT), (new, BlockRemoved([1]))):
        (decoded,) = decode_batch(msgspec.msgpack.encode([1.0, [event], 0, "more"])).events
        assert fields(decoded) == fields(expected)


def test_events_that_are_unknown_or_malformed_are_counted_and_the_others_stay() -> None:
    events = [
        {"type": "BlockMoved", "block_hashes": [1]},
        ["BlockMoved", [1]],
        5,
        {"type": "BlockRemoved", "block_hashes": "all"},
        ["BlockStored", [1]],
        {"type": "BlockRemoved", "block_hashes": [7]},
        ["BlockRemoved", [8]],
    ]
    batch = decode_batch(msgspec.msgpack.encode([1.0, events]))
    assert [fields(event)["block_hashes"] for event in batch.events] == [[7], [8]]
    assert (batch.unknown, batch.malformed) == (3, 2)


def test_a_batch_of_nothing_but_rubbish_is_refused_before_all_of_it_is_looked_at() -> None:
    with pytest.raises(ProtocolError, match="1000"):
        decode_batch(msgspec.msgpack.encode([1.0, [5] * 1_000_000]))


@pytest.mark.parametrize(
    "events",
    [
        [["AllBlocksCleared"]] * 80_001,
        [{"type": "AllBlocksCleared"}] * 80_001,
        [["AllBlocksCleared"]] * 80_000 + [5],
        [["BlockRemoved", [1] * 100_000]] * 3,
        [["BlockRemoved", [1] * 100_000]] * 3 + [5],
    ],
)
def test_a_batch_that_is_too_much_for_one_turn_is_refused(events: list[Any]) -> None:
    with pytest.raises(ProtocolError):
        decode_batch(msgspec.msgpack.encode([1.0, events]))


def test_where_events_are_looked_at_one_by_one_the_rest_counts_as_malformed() -> None:
    batch = decode_batch(msgspec.msgpack.encode([1.0, [5] + [["BlockRemoved", [1]]] * 20_000]))
    assert (len(batch.events), batch.unknown, batch.malformed) == (16_383, 1, 3617)


def test_tokens_are_numbers_or_pairs() -> None:
    assert STRUCT.tokens() == [5, 6]
    pairs = BlockStored([1], None, pack_tokens([(5, 6), (6, 7)]), 2)
    (decoded,) = decode_batch(encode_batch([pairs], 1.0, arrays=False)).events
    assert isinstance(decoded, BlockStored)
    assert decoded.tokens() == [(5, 6), (6, 7)]
    with pytest.raises(ProtocolError):
        msgspec.structs.replace(STRUCT, token_ids=msgspec.Raw(b"\xa1x")).tokens()


def test_an_event_says_whether_it_has_tokens() -> None:
    assert STRUCT.has_tokens
    assert not msgspec.structs.replace(STRUCT, token_ids=pack_tokens([])).has_tokens


HEAD: Final = b"\x92\xcb" + struct.pack(">d", 1.0)
GARBAGE: Final = {
    "nothing": b"",
    "no msgpack": b"\xc1",
    "no batch": b"\x91" * 100_000,
    "no time": msgspec.msgpack.encode([float("nan"), []]),
    "cut": encode_batch([STRUCT], 1.0, arrays=False)[:-1],
    "a trillion events": HEAD + b"\xdd\xff\xff\xff\xff",
    "a trillion hashes": HEAD + b"\x91\x93\xabBlockStored\xdd\xff\xff\xff\xff\x01",
    "a trillion hashes in a map": HEAD
    + b"\x91\x82\xa4type\xabBlockStored\xacblock_hashes\xdd\xff\xff\xff\xff\x01",
    "a trillion tokens": HEAD + b"\x91\x94\xabBlockStored\x90\xc0\xdd\xff\xff\xff\xff\x01",
    "long bytes": HEAD + b"\x91\xc6\xff\xff\xff\xff",
    "deep": HEAD + b"\x91\x81\xa3abc" + b"\x91" * 100_000 + b"\x01",
}


@pytest.mark.parametrize("payload", GARBAGE.values(), ids=GARBAGE)
def test_garbage_is_refused(payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_batch(payload)


@given(st.binary(max_size=64), st.binary(max_size=8), st.integers(0, 200))
def test_whatever_comes_is_a_batch_or_refused(payload: bytes, piece: bytes, at: int) -> None:
    good = encode_batch([STRUCT, BlockRemoved([1], "GPU")], 1.0, arrays=False)
    for bytes_ in (payload, HEAD + payload, good[:at] + piece + good[at + len(piece) :]):
        try:
            decode_batch(bytes_)
        except ProtocolError:
            continue


def test_absurd_counts_allocate_nothing() -> None:
    code = "\n".join(
        [
            "import resource",
            "from tests.test_events import GARBAGE, decode_batch, ProtocolError",
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss",
            "for payload in GARBAGE.values():",
            "    try: decode_batch(payload)",
            "    except ProtocolError: pass",
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)",
        ]
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(run.stdout) * 1024 < 32 << 20
