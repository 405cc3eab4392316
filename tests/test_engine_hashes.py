"""Hashes beside numbers that vLLM 0.32 gave, beside pickle and CBOR themselves, beside SGLang's formula."""

import hashlib
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.engine_hashes import (
    VLLM_ALGORITHMS,
    MediaItem,
    block_extras,
    sglang_page_hashes,
    vllm_block_hashes,
    vllm_none_hash,
)
from kvstore.errors import InvalidRequest
from kvstore.hashing import VLLM_SEED

# Both sides of each width that pickle knows.
TOKENS = [0, 1, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 7, 7, 7]
# Both of them are in the first block of 4: pickle refers from the second "mm" to the first.
PICTURES = [MediaItem("picture", 1, 2), MediaItem("picture", 3, 4)]

token_ids = st.sampled_from(TOKENS) | st.integers(0, 2**32 - 1) | st.integers(0, 300)
prompts = st.lists(token_ids, max_size=120)
block_sizes = st.sampled_from([1, 2, 3, 4, 16, 40])
texts = st.text(max_size=20)


def serialised(algorithm: str) -> Callable[[Any], bytes]:
    if algorithm.endswith("_cbor"):
        cbor2 = import_module("cbor2")
        return lambda value: bytes(cbor2.dumps(value, canonical=True))
    return lambda value: pickle.dumps(value, 5)


def hashed(algorithm: str) -> Callable[[bytes], bytes]:
    xxh3_128 = import_module("xxhash").xxh3_128_digest
    return (lambda data: hashlib.sha256(data).digest()) if algorithm.startswith("sha256") else xxh3_128


# vLLM


@pytest.mark.parametrize(
    ("algorithm", "seed", "ends"),
    [
        ("sha256", VLLM_SEED, ("2165eb033b353dd0", "8e83bca6002a1cf7", "a17d75cb1875383c")),
        ("sha256_cbor", VLLM_SEED, ("5a7b1716a266b079", "05e524f99c957984", "56223e8fff3bfa54")),
        ("xxhash", "0", ("d7aa5563330b9502", "61671a3b9a9041d3", "f9290dc0dc3f8695")),
        ("xxhash_cbor", "0", ("224308b5120d5233", "77988e1b073bfac8", "4d768f5642f604bb")),
    ],
)
def test_the_hashes_are_those_that_vllm_gave(algorithm: str, seed: str, ends: Sequence[str]) -> None:
    hashes = vllm_block_hashes(
        TOKENS, 4, algorithm, seed, lora=("adapter", "/adapters/1"), salt="tenant", media=PICTURES
    )
    assert tuple(one[:8].hex() for one in hashes) == ends


def test_the_hashes_of_a_plain_prompt_are_those_that_vllm_gave() -> None:
    assert [one[:8].hex() for one in vllm_block_hashes(TOKENS, 4)] == [
        "a7ab9b12ccc55769",
        "79a248b69c2cb399",
        "1a05e387f2c08e77",
    ]


@pytest.mark.parametrize("algorithm", VLLM_ALGORITHMS)
@settings(deadline=None)
@given(tokens=prompts, block_tokens=block_sizes, seed=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_prompt_hashes_as_an_encoder_has_it(
    algorithm: str, tokens: list[int], block_tokens: int, seed: str
) -> None:
    encode, digest_of = serialised(algorithm), hashed(algorithm)
    digest, expected = digest_of(encode(seed)), []
    for end in range(block_tokens, len(tokens) + 1, block_tokens):
        extra = (("cache_salt", "tenant"),) if end == block_tokens else None
        digest = digest_of(encode((digest, tuple(tokens[end - block_tokens : end]), extra)))
        expected.append(digest)
    assert vllm_block_hashes(tokens, block_tokens, algorithm, seed, salt="tenant") == expected


@pytest.mark.parametrize("algorithm", VLLM_ALGORITHMS)
def test_a_longer_prompt_begins_with_the_hashes_of_a_shorter(algorithm: str) -> None:
    long = vllm_block_hashes(TOKENS, 2, algorithm, salt="tenant", media=PICTURES)
    assert vllm_block_hashes(TOKENS[:7], 2, algorithm, salt="tenant", media=PICTURES) == long[:3]
    assert vllm_block_hashes(TOKENS[:1], 2, algorithm, salt="tenant", media=PICTURES) == []
    assert vllm_block_hashes([], 2, algorithm) == []


@pytest.mark.parametrize("algorithm", VLLM_ALGORITHMS)
@pytest.mark.parametrize("kind", [tuple, np.array])
def test_tokens_may_come_in_any_sequence(algorithm: str, kind: Any) -> None:
    assert vllm_block_hashes(kind(TOKENS), 4, algorithm) == vllm_block_hashes(TOKENS, 4, algorithm)


def test_whatever_is_beside_the_tokens_changes_the_hashes() -> None:
    hashes = [
        vllm_block_hashes(TOKENS, 4),
        vllm_block_hashes(TOKENS, 4, salt="x"),
        vllm_block_hashes(TOKENS, 4, lora=("x", "x")),
        vllm_block_hashes(TOKENS, 4, lora=("x", "y")),
        vllm_block_hashes(TOKENS, 4, media=[MediaItem("x", 0, 1)]),
        vllm_block_hashes(TOKENS, 4, media=[MediaItem("x", 1, 1)]),
        vllm_block_hashes(TOKENS, 4, seed="0"),
    ]
    assert len({one for chain in hashes for one in chain}) == 3 * len(hashes)


def test_one_object_in_two_places_is_hashed_as_two() -> None:
    name = "some name"
    equal = "".join(list(name))
    one = vllm_block_hashes(TOKENS, 4, lora=(name, name), salt=name)
    assert one == vllm_block_hashes(TOKENS, 4, lora=(name, equal), salt="".join(list(name)))


def test_a_salt_that_no_utf8_holds_is_a_salt() -> None:
    for algorithm in VLLM_ALGORITHMS:
        assert len(vllm_block_hashes(TOKENS, 4, algorithm, salt="\ud800")) == 3
    assert len(sglang_page_hashes(TOKENS, 4, salt="\ud800")) == 3


# What blocks hold beside their tokens


def test_an_item_is_in_each_block_that_it_overlaps_at_its_place_there() -> None:
    items = [MediaItem("two", 7, 1), MediaItem("one", 3, 3)]
    assert block_extras(9, 4, (), "", items) == [(("mm", "one", 3),), (("mm", "one", -1), ("mm", "two", 3))]
    assert block_extras(1, 4, (), "", items) == [(("mm", "one", 3),)]
    late = block_extras(9, 4, (), "tenant", [MediaItem("late", 8, 1)])
    assert late == [(("cache_salt", "tenant"),), None, (("mm", "late", 0),)]


def test_a_lora_is_on_every_block_and_a_salt_on_the_first() -> None:
    assert block_extras(3, 4, ("a",), "s", []) == [
        (("lora", "a"), ("cache_salt", "s")),
        *[(("lora", "a"),)] * 2,
    ]
    assert block_extras(3, 4, (), "s", []) == [(("cache_salt", "s"),)]
    assert block_extras(0, 4, ("a",), "s", PICTURES) == []
    assert block_extras(3, 4, (), "", []) == []


# SGLang


@settings(deadline=None)
@given(tokens=prompts, page_tokens=block_sizes, salt=st.none() | texts, eagle=st.booleans())
def test_any_prompt_hashes_as_sglangs_formula_has_it(
    tokens: list[int], page_tokens: int, salt: str | None, eagle: bool
) -> None:
    units = list(pairwise(tokens)) if eagle else [(token,) for token in tokens]
    digest, expected = b"", []
    if salt:
        digest = hashlib.sha256(b"sglang-cache-salt-v1\0" + salt.encode()).digest()
    for end in range(page_tokens, len(units) + 1, page_tokens):
        page = [token for unit in units[end - page_tokens : end] for token in unit]
        digest = hashlib.sha256(digest + b"".join(token.to_bytes(4, "little") for token in page)).digest()
        number = int(digest.hex()[:16], 16)
        expected.append(number - 2**64 if number >= 2**63 else number)
    assert sglang_page_hashes(tokens, page_tokens, salt=salt, eagle=eagle) == expected


def test_an_empty_salt_is_none_to_sglang() -> None:
    assert sglang_page_hashes(TOKENS, 4, salt="") == sglang_page_hashes(TOKENS, 4)
    assert not set(sglang_page_hashes(TOKENS, 4, salt="x")) & set(sglang_page_hashes(TOKENS, 4))


# Bad input


@pytest.mark.parametrize("hashes_of", [vllm_block_hashes, sglang_page_hashes])
def test_a_bad_token_or_block_size_is_named_with_its_limit(hashes_of: Callable[..., Any]) -> None:
    for bad in (-1, 1 << 32, 1.5, "a", None, {}):
        with pytest.raises(InvalidRequest, match=r"^token 2 is .*; give token ids from 0 to 4294967295$"):
            hashes_of([1, 2, bad], 2)
    with pytest.raises(InvalidRequest, match="block_tokens is 0; give at least 1"):
        hashes_of([1], 0)


def test_an_unknown_algorithm_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidRequest, match="'md5'; give one of sha256, sha256_cbor, xxhash, xxhash_cbor"):
        vllm_block_hashes([1], 1, "md5")


def test_a_package_that_is_not_installed_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xxhash", None)
    with pytest.raises(InvalidRequest, match="needs the package xxhash; install it"):
        vllm_none_hash("xxhash", "no other test's seed")


def test_hashing_needs_no_engine_and_no_package() -> None:
    code = (
        "import sys; from kvstore.engine_keys import *\n"
        "from kvstore.engine_hashes import *\n"
        "for name in 'sha256', 'sha256_cbor': vllm_block_hashes([1] * 16, 16, name)\n"
        "print({'vllm', 'sglang', 'torch', 'cbor2', 'xxhash', 'blake3'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "set()\n"
