"""The keys of a prompt in each scheme are those under which engines and daemons announce its blocks."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.block import Namespace
from kvstore.content_keys import content_keys
from kvstore.engine_hashes import MediaItem, sglang_page_hashes, vllm_block_hashes
from kvstore.engine_keys import (
    data_keys,
    engine_key,
    engine_keys,
    keys_for,
    scheme_holds_salt,
    vllm_scheme,
)
from kvstore.errors import InvalidRequest
from kvstore.hashing import (
    VLLM_SEED,
    lmcache_chunk_hashes,
    lmcache_engine_keys,
    lmcache_engine_namespace,
    lmcache_namespace,
)

TOKENS = [(i * 7 + 3) % 1000 + 5 for i in range(200)]
PICTURE = MediaItem("picture", 70, 10)


def space(scheme: str, block_tokens: int = 16) -> Namespace:
    return Namespace("m", block_tokens, scheme=scheme)


@pytest.fixture(autouse=True)
def unseeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)


# One key


def test_a_number_and_the_digest_that_it_is_the_end_of_have_one_key() -> None:
    digest = vllm_block_hashes(TOKENS, 16)[0]
    number = int.from_bytes(digest, "big") & (1 << 64) - 1  # as vLLM publishes it
    signed = int.from_bytes(digest[-8:], "big", signed=True)  # as SGLang would
    assert engine_key(digest) == engine_key(number) == engine_key(signed) == number & (1 << 60) - 1
    assert engine_key(digest[-8:]) == engine_key(digest[-16:]) == engine_key(digest)


@settings(deadline=None)
@given(
    st.lists(st.integers(-(2**63), 2**64 - 1))
    | st.lists(st.binary(min_size=32, max_size=32))
    | st.lists(st.binary(min_size=16, max_size=16))
    | st.lists(st.binary(min_size=8, max_size=32) | st.integers(-(2**63), 2**64 - 1))
)
def test_many_keys_are_as_one_by_one(published: list[int | bytes]) -> None:
    assert engine_keys(published) == [engine_key(one) for one in published]


@pytest.mark.parametrize("bad", [-(2**63) - 1, 2**64, bytes(7), bytes(33), b"", 1.0, "a", None, [], {}])
def test_what_no_engine_publishes_is_refused(bad: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"block hash is .*; give a number of 64 bits or 8 to 32 bytes"):
        engine_key(bad)
    for published in ([bad], [1, bad], [bad, 1], [bytes(32), bad], [bad, bad]):
        with pytest.raises(InvalidRequest, match="block hash is"):
            engine_keys(published)


# Schemes


def test_vllms_keys_are_those_of_its_hashes() -> None:
    expected = engine_keys(vllm_block_hashes(TOKENS, 16, salt="s", media=[PICTURE]))
    assert keys_for(space(vllm_scheme()), TOKENS, salt="s", media=[PICTURE]) == expected
    assert keys_for(space("vllm-sha256"), TOKENS, salt="s", media=[PICTURE]) == expected
    assert keys_for(space("vllm-sha256_cbor"), TOKENS) == engine_keys(
        vllm_block_hashes(TOKENS, 16, "sha256_cbor")
    )


def test_larger_blocks_have_the_keys_of_their_last_hash_blocks() -> None:
    small = keys_for(space(vllm_scheme()), TOKENS, salt="s", media=[PICTURE])
    assert small is not None
    large = keys_for(space(vllm_scheme(every=4), 64), TOKENS, salt="s", media=[PICTURE])
    assert large == small[3::4]
    assert len(large) == 3
    assert keys_for(space(vllm_scheme(every=3), 64), TOKENS) is None


def test_a_scheme_names_the_seed() -> None:
    assert vllm_scheme() == "vllm-sha256:066b1e89"
    assert vllm_scheme("xxhash", "0") == "vllm-xxhash:6fb31cc3"
    assert vllm_scheme("xxhash", "0", 2) == "vllm-xxhash:6fb31cc3/2"
    assert len({vllm_scheme(name, seed) for name in ("sha256", "xxhash") for seed in ("0", "1")}) == 4


def test_a_seed_is_known_if_it_is_vllms_or_this_processs(monkeypatch: pytest.MonkeyPatch) -> None:
    other = space(vllm_scheme("xxhash", "7"))
    assert keys_for(other, TOKENS) is None
    assert keys_for(space("vllm-xxhash"), TOKENS) is None  # vLLM's own is random
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    expected = engine_keys(vllm_block_hashes(TOKENS, 16, "xxhash", "7"))
    assert keys_for(other, TOKENS) == keys_for(space("vllm-xxhash"), TOKENS) == expected
    assert keys_for(space(vllm_scheme()), TOKENS) == engine_keys(vllm_block_hashes(TOKENS, 16))
    assert keys_for(space("vllm-sha256"), TOKENS) == engine_keys(vllm_block_hashes(TOKENS, 16, seed="7"))


def test_sglangs_keys_are_those_of_its_hashes() -> None:
    for scheme, eagle in (("sglang", False), ("sglang-eagle", True)):
        expected = engine_keys(sglang_page_hashes(TOKENS, 16, salt="s", eagle=eagle))
        assert keys_for(space(scheme), TOKENS, salt="s") == expected


def test_our_own_keys_hold_lora_salt_and_media() -> None:
    for scheme, eagle in (("tokens", False), ("tokens-eagle", True)):
        expected = content_keys(TOKENS, 16, lora="a", salt="s", media=[PICTURE], eagle=eagle)
        assert keys_for(space(scheme), TOKENS, lora="a", salt="s", media=[PICTURE]) == expected


def test_lmcaches_keys_are_those_of_its_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    server = lmcache_namespace("m", 0x01000100, block_tokens=64)
    assert keys_for(server, TOKENS, salt="s") == lmcache_chunk_hashes(TOKENS, 64)
    for seed in (VLLM_SEED, None):
        inside = lmcache_engine_namespace("m", 1, 0, "half", block_tokens=64, seed=seed)
        assert keys_for(inside, TOKENS) == lmcache_engine_keys(TOKENS, 64, seed=seed)
    other = lmcache_namespace("m", 0x01000100, block_tokens=64, algorithm="sha256_cbor", seed="7")
    assert keys_for(other, TOKENS) is None
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    assert keys_for(other, TOKENS) == lmcache_chunk_hashes(TOKENS, 64, "sha256_cbor", "7")


@pytest.mark.parametrize("scheme", ["sglang", "sglang-eagle", "lmcache"])
def test_where_media_replace_tokens_keys_end_before_the_first(scheme: str) -> None:
    namespace = lmcache_namespace("m", 1 << 24, block_tokens=16) if scheme == "lmcache" else space(scheme)
    plain = keys_for(namespace, TOKENS)
    assert plain is not None
    assert keys_for(namespace, TOKENS, media=[MediaItem("later", 90, 1), PICTURE]) == plain[:4]


@pytest.mark.parametrize(
    "scheme", ["vllm-sha256", "vllm-sha256:066b1e89/2", "sglang", "sglang-eagle", "lmcache-blake3:5092e599"]
)
def test_the_engines_hashes_of_a_lora_are_not_known(scheme: str) -> None:
    assert keys_for(space(scheme, 256), TOKENS, lora="a") is None


@pytest.mark.parametrize(
    "scheme",
    [
        "",
        "custom",
        "vllm",
        "vllm-md5",
        "vllm-sha256:066B1E89",
        "vllm-sha256:066b1e89/0",
        "vllm-sha256:066b1e89/2/2",
        "vllm-sha256:066b1e89\n",
        "sglang-other",
        "tokens/2",
        "lmcache-blake3",
        "lmcache-blake3:00000000",
        "lmcache-engine-blake3:5092e599",
    ],
)
def test_an_unknown_scheme_has_no_keys(scheme: str) -> None:
    assert keys_for(space(scheme), TOKENS) is None


def test_salts_are_in_the_keys_of_engines_and_in_the_namespaces_of_lmcache() -> None:
    for scheme in ("vllm-sha256", vllm_scheme(every=2), "sglang", "sglang-eagle", "tokens", "tokens-eagle"):
        assert scheme_holds_salt(space(scheme))
        plain, salted = keys_for(space(scheme), TOKENS), keys_for(space(scheme), TOKENS, salt="s")
        assert plain is not None
        assert salted is not None
        assert not {*plain} & {*salted}
    for scheme in ("", "custom", "lmcache-blake3:5092e599"):
        assert not scheme_holds_salt(space(scheme))


@pytest.mark.parametrize("scheme", ["vllm-sha256", "sglang", "tokens", "tokens-eagle"])
def test_a_bad_token_is_named(scheme: str) -> None:
    with pytest.raises(InvalidRequest, match="token 2 is -1; give token ids from 0 to 4294967295"):
        keys_for(space(scheme), [1, 2, -1])


# Keys of data


def test_stores_have_vllm_s_blocks_under_whole_digests_and_lmcache_s_as_they_are() -> None:
    every = space(vllm_scheme(every=2), 32)
    assert data_keys(space(vllm_scheme()), TOKENS) == vllm_block_hashes(TOKENS, 16)
    assert data_keys(every, TOKENS, salt="s") == vllm_block_hashes(TOKENS, 16, salt="s")[1::2]
    server = lmcache_namespace("m", 1 << 24, block_tokens=16)
    assert data_keys(server, TOKENS, media=[PICTURE]) == lmcache_chunk_hashes(TOKENS, 16)[:4]


@pytest.mark.parametrize("scheme", ["tokens", "sglang", "sglang-eagle", "vllm-sha256:00000000", "", "custom"])
def test_a_scheme_of_numbers_or_of_an_unknown_seed_names_no_data(scheme: str) -> None:
    assert data_keys(space(scheme), TOKENS) is None
    assert data_keys(space(vllm_scheme()), TOKENS, lora="adapter") is None
