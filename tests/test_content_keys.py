"""Our own chain: a prompt and the event that announces its blocks meet at one key, and nothing else does."""

import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise, product
from typing import Any

import pytest
from dynamo.llm import compute_block_hash_for_seq
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.content_keys import (
    KEY_MASK,
    content_keys,
    event_extras,
    event_hashes,
    local_hashes,
    salt_of,
    sequence_hashes,
)
from kvstore.engine_hashes import Extra, MediaItem
from kvstore.errors import InvalidRequest

TOKENS = list(range(1000, 1064))

prompts = st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 3), max_size=60)
block_sizes = st.integers(1, 20)
names = st.sampled_from(["", "a", "mm", "lora", "some name"])
junk = st.recursive(
    st.none() | st.integers() | st.floats() | st.text(max_size=3) | st.binary(max_size=3),
    lambda some: st.lists(some, max_size=3) | st.dictionaries(st.text(max_size=3), some, max_size=3),
    max_leaves=6,
)


def sequence(parent: int | None, tokens: Sequence[int], extra: Extra = None) -> int:
    """The hash of the prefix that ends with the one block of these tokens."""
    return sequence_hashes(parent, event_hashes(tokens, len(tokens), (extra,)))[0]


def key(tokens: Sequence[int], extra: Extra = None) -> int:
    """The key of the one block of these tokens, which begins a prompt."""
    return sequence(None, tokens, extra) & KEY_MASK


def test_the_keys_stay_as_they_are() -> None:
    # An index that runs would forget all that it knows by them.
    tokens = [0, 1, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 7, 7, 7]
    assert content_keys(tokens, 4) == [806328511776102118, 650115859878541382, 233249039573578932]
    assert content_keys(tokens, 4, lora="a", salt="s", media=[MediaItem("p", 1, 4)]) == [
        556465155560426097,
        56630461774054524,
        112346249515860336,
    ]


@settings(deadline=None)
@given(tokens=prompts, block_tokens=block_sizes, split=st.integers(0, 60))
def test_a_chain_may_be_made_in_any_steps(tokens: list[int], block_tokens: int, split: int) -> None:
    sequences = sequence_hashes(None, local_hashes(tokens, block_tokens))
    assert content_keys(tokens, block_tokens) == [number & KEY_MASK for number in sequences]
    split = min(split, len(sequences))
    head = sequence_hashes(None, event_hashes(tokens[: split * block_tokens], block_tokens))
    parent = head[-1] if head else None
    tail = event_hashes(tokens[split * block_tokens :], block_tokens)
    assert head + sequence_hashes(parent, tail) == sequences
    parent = None
    for start, expected in zip(range(0, len(tokens), block_tokens), sequences, strict=False):
        parent = sequence(parent, tokens[start : start + block_tokens])
        assert parent == expected


@settings(deadline=None)
@given(tokens=prompts, pages=st.integers(1, 8))
def test_pairs_that_an_engine_announces_are_those_of_the_prompt(tokens: list[int], pages: int) -> None:
    pairs: list[Any] = [list(pair) for pair in pairwise(tokens)]
    assert event_hashes(pairs, pages) == local_hashes(tokens, pages, eagle=True)


@pytest.mark.parametrize(
    ("event", "prompt"),
    [
        (("a", None, ["a"]), {"lora": "a"}),
        (("a", None, None), {"lora": "a"}),
        ((None, None, ["s"]), {"salt": "s"}),
        ((None, "s", None), {"salt": "s"}),
        ((None, "s", ["s"]), {"salt": "s"}),
        (("a", None, ["a", "a"]), {"lora": "a", "salt": "a"}),
        (("a", "s", None), {"lora": "a", "salt": "s"}),
        ((None, None, [("p", 3), "s"]), {"salt": "s", "media": [MediaItem("p", 3, 1)]}),
        (
            ("a", None, ["a", ["p", 3], ["q", 5]]),
            {"lora": "a", "media": [MediaItem("p", 3, 2), MediaItem("q", 5, 1)]},
        ),
        ((None, None, None), {}),
        (("", "", []), {}),
    ],
)
def test_a_first_block_has_one_key_by_its_event_and_by_its_prompt(
    event: tuple[Any, Any, Any], prompt: dict[str, Any]
) -> None:
    extra = event_extras(*event, first=True)
    assert key(TOKENS[:16], extra) == content_keys(TOKENS, 16, **prompt)[0]
    assert salt_of(extra) == prompt.get("salt", "")


def test_a_later_block_has_one_key_by_its_event_and_by_its_prompt() -> None:
    hashes = local_hashes(TOKENS, 16, lora="a", salt="s", media=[MediaItem("p", 3, 20)])
    extra = event_extras("a", "s", ["a", ("p", -13)], first=False)  # SGLang's salt field is on every block
    assert event_hashes(TOKENS[16:32], 16, [extra]) == hashes[1:2]
    # vLLM has the salt with the first alone, which is known then.
    extra = event_extras("a", None, ["a"], first=False)
    assert event_hashes(TOKENS[32:48], 16, [extra], salt="s") == hashes[2:3]
    assert event_hashes(TOKENS[32:], 16, lora="a", salt="s") == hashes[2:]


def test_different_contents_have_different_keys() -> None:
    asked = [
        content_keys(TOKENS, 16, lora=lora, salt=salt, media=media)
        for lora, salt, media in product(
            ("", "x", "y"),
            ("", "x", "y"),
            (
                [],
                [MediaItem("x", 0, 1)],
                [MediaItem("y", 0, 1)],
                [MediaItem("x", 0, 1), MediaItem("y", 1, 1)],
            ),
        )
    ]
    embedded = sequence_hashes(None, event_hashes(TOKENS, 16, [event_extras(None, None, [b"z"], first=True)]))
    pairs: list[Any] = list(zip(TOKENS[::2], TOKENS[1::2], strict=True))
    keys = [*asked, embedded, content_keys(TOKENS, 16, eagle=True), event_hashes(pairs, 16)]
    assert len({one for chain in keys for one in chain}) == sum(map(len, keys))


def test_media_of_one_block_count_wherever_in_it_they_begin() -> None:
    # As in Dynamo: the tokens in their places say where.
    one = content_keys(TOKENS, 16, media=[MediaItem("x", 0, 1), MediaItem("y", 3, 1)])
    assert one == content_keys(TOKENS, 16, media=[MediaItem("x", 5, 1), MediaItem("y", 2, 1)])


def test_a_block_that_follows_another_is_not_the_first_of_a_prompt() -> None:
    assert len({sequence(parent, TOKENS) for parent in (None, 0, 1, 2**64 - 1)}) == 4


@pytest.mark.parametrize(
    ("prompt", "dynamos"),
    [
        ({}, {}),
        ({"lora": "a"}, {"lora_name": "a"}),
        ({"salt": "té"}, {"cache_namespace": "té"}),
        ({"lora": "a", "salt": "s"}, {"lora_name": "a", "cache_namespace": "s"}),
        ({"eagle": True}, {"is_eagle": True}),
        ({"eagle": True, "salt": "s"}, {"is_eagle": True, "cache_namespace": "s"}),
    ],
)
def test_local_hashes_are_dynamos(prompt: dict[str, Any], dynamos: dict[str, Any]) -> None:
    tokens = [0, 2**32 - 1, *TOKENS]
    for size in (1, 16, 64):
        assert local_hashes(tokens, size, **prompt) == compute_block_hash_for_seq(tokens, size, **dynamos)


def test_media_are_hashed_as_dynamo_does() -> None:
    digests = ["00000000000000ff" + "0" * 48, "0000000000000001" + "f" * 48]
    media = [MediaItem(digests[0], 3, 5), MediaItem(digests[1], 10, 30)]
    objects = [{"mm_hash": 255, "offsets": []}, {"mm_hash": 1, "offsets": []}]
    infos = [{"mm_objects": some} for some in (objects, objects[1:], objects[1:])]
    assert local_hashes(TOKENS, 16, lora="a", media=media) == compute_block_hash_for_seq(
        TOKENS, 16, [*infos, None], lora_name="a"
    )


# Bad input


@settings(deadline=None)
@given(lora=junk, salt=junk, extra_keys=junk | st.lists(junk, max_size=3), first=st.booleans())
def test_rubbish_is_refused_or_hashed(lora: Any, salt: Any, extra_keys: Any, first: bool) -> None:
    try:
        extra = event_extras(lora, salt, extra_keys, first)
    except InvalidRequest:
        return
    assert 0 <= key(TOKENS, extra) <= KEY_MASK


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ((1, None, None), "lora_name is 1; give a string"),
        ((None, b"s", None), "cache_salt is b's'; give a string"),
        ((None, None, "salt"), "extra keys are 'salt'; give a list"),
        ((None, None, {"a": 1}), "extra keys are"),
        ((None, None, [{"a": 1}]), "extra key is"),
        ((None, None, [("p", 1.5)]), "extra key is"),
        ((None, None, [("p", 2**40)]), "extra key is"),
        ((None, None, ["a", "b"]), "extra key is 'b'; give one salt"),
    ],
)
def test_what_no_engine_announces_is_named(event: tuple[Any, Any, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        event_extras(*event, first=True)


def test_a_salt_on_a_later_block_is_refused() -> None:
    # Were it ignored, blocks of a tenant could answer all others.
    with pytest.raises(InvalidRequest, match="extra key is 's'; give one salt, on a prompt's first block"):
        event_extras(None, None, ["s"], first=False)


@pytest.mark.parametrize(
    "tokens", [[1, -1], [1, {}], [1, (2, 3)], [(1, 2), 3], [(1, 2), (3,)], [(1, 2), (3, "a")]]
)
def test_bad_tokens_are_named(tokens: list[Any]) -> None:
    with pytest.raises(InvalidRequest, match=r"^token "):
        event_hashes(tokens, 1)


def test_blocks_without_tokens_are_refused() -> None:
    for block_tokens in (0, -1):
        with pytest.raises(InvalidRequest, match=f"block_tokens is {block_tokens}; give at least 1"):
            content_keys(TOKENS, block_tokens)
        with pytest.raises(InvalidRequest, match=f"block_tokens is {block_tokens}; give at least 1"):
            event_hashes(TOKENS, block_tokens)


def test_a_package_that_is_not_installed_is_asked_for() -> None:
    code = (
        "import sys; sys.modules['xxhash'] = None\n"
        "from kvstore.content_keys import content_keys\n"
        "try: content_keys([1], 1)\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == 'scheme "tokens" needs the package xxhash; install it\n'
