"""Keys and namespaces beside those of LMCache itself, and beside numbers that LMCache 0.5.6 gave in vLLM."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.block import Namespace, check_keys
from kvstore.errors import InvalidRequest
from kvstore.hashing import (
    VLLM_SEED,
    fingerprint,
    lmcache_chunk_hashes,
    lmcache_engine_key,
    lmcache_engine_keys,
    lmcache_engine_namespace,
    lmcache_engine_string,
    lmcache_kv_rank,
    lmcache_namespace,
    lmcache_object_fields,
    lmcache_seed,
    same_but_for_keys,
)

os.environ.setdefault("LMCACHE_TRACK_USAGE", "false")
# LMCache's logger, as it is made at import.
pytestmark = pytest.mark.filterwarnings("ignore:`LoggingHandler` in `opentelemetry-sdk`:DeprecationWarning")

VECTOR = [(i * 7 + 3) % 1000 + 5 for i in range(2148)]
# Both sides of each width that CBOR knows.
WIDTHS = [0, 1, 23, 24, 255, 256, 65535, 65536, 2**32 - 1, 5] * 3

token_ids = st.integers(0, 2**32 - 1) | st.integers(0, 300)
prompts = st.lists(token_ids, max_size=80)
chunk_sizes = st.integers(1, 40)
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
# All of a key's tags, quoted, are one field of a namespace, of 512 characters at most.
tag_words = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
models = names.filter(bool) | st.sampled_from(["meta/Llama-3", "/mnt/models/q@7:b%", "a b#c", "模型/x"])


def lmcache_hashes(algorithm: str, tokens: list[int], chunk_tokens: int) -> list[bytes]:
    hasher = import_module("lmcache.v1.multiprocess.token_hasher").TokenHasher(chunk_tokens, algorithm)
    hashes: list[bytes] = hasher.compute_chunk_hashes(tokens)
    return hashes


def lmcache_engine_hashes(algorithm: str, tokens: list[int], chunk_tokens: int) -> list[int]:
    database = import_module("lmcache.v1.token_database").ChunkedTokenDatabase
    config = import_module("lmcache.v1.config").LMCacheEngineConfig.from_defaults(
        chunk_size=chunk_tokens, pre_caching_hash_algorithm=algorithm
    )
    return [number for _, _, number in database(config, None).process_tokens(tokens, make_key=False)]


def in_process(code: str, **environment: str) -> str:
    """What a process of its own prints."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONHASHSEED"}
    done = subprocess.run(
        [sys.executable, "-c", f"from kvstore.hashing import *\n{code}"],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stdout.strip()


# Keys of the server


def test_the_blake3_hashes_are_those_seen_in_a_running_lmcache() -> None:
    hashes = lmcache_chunk_hashes(VECTOR)
    assert len(hashes) == 8
    assert hashes[0].hex() == "5092e599f58d27d520d3a90e3b9366ab235ad83b62e0eee08a8c3abccaed850d"
    assert hashes[-1].hex() == "69f9752c895174e03a216a964476a25f8db41043bf990c178eb2d69029435787"


@pytest.mark.parametrize(
    ("seed", "first", "last", "widths"),
    [
        (
            "0",
            "9c5f85d4297416764eb66241a66a1d217cdb904e115f0bac694cfd289d45dfff",
            "f38d6fd05ffa7c32b24774f631ba255bce05f17f680d62fdfa82aa24b1d001f1",
            "330a22ea3cefc88b4413d5338f6844842a032312e55830670f5913b483d67173",
        ),
        (
            VLLM_SEED,
            "f0e4653f3a000557b2797e8d1e012b4e91d502c16c58884e1f03f24f351cd6d6",
            "f1e17a51790d2433b4a5b32b8ee842a00e5e6f887a622afabbbaf77880ceaeb1",
            "5c7b562be1852672fa6bf4e0a2310b961fa7a52b280c2f7f068a7d3d3c58f469",
        ),
    ],
)
def test_the_cbor_hashes_are_those_of_lmcache_beside_vllm(
    seed: str, first: str, last: str, widths: str
) -> None:
    hashes = lmcache_chunk_hashes(VECTOR, 256, "sha256_cbor", seed)
    assert (len(hashes), hashes[0].hex(), hashes[-1].hex()) == (8, first, last)
    assert [one.hex() for one in lmcache_chunk_hashes(WIDTHS, 30, "sha256_cbor", seed)] == [widths]


@pytest.mark.parametrize("algorithm", ["blake3", "sha256_cbor", "builtin"])
@settings(deadline=None)
@given(tokens=prompts, chunk_tokens=chunk_sizes)
def test_any_prompt_hashes_as_in_lmcaches_server(
    algorithm: str, tokens: list[int], chunk_tokens: int
) -> None:
    ours = lmcache_chunk_hashes(tokens, chunk_tokens, algorithm, lmcache_seed())
    assert ours == lmcache_hashes(algorithm, tokens, chunk_tokens)
    assert len(ours) == len(tokens) // chunk_tokens
    check_keys(ours)


@settings(deadline=None)
@given(tokens=prompts, chunk_tokens=chunk_sizes, seed=names)
def test_any_prompt_hashes_as_an_encoder_of_cbor_has_it(
    tokens: list[int], chunk_tokens: int, seed: str
) -> None:
    cbor2 = import_module("cbor2")

    def sha256_cbor(value: Any) -> bytes:
        return hashlib.sha256(cbor2.dumps(value, canonical=True)).digest()

    def chain(start: Any, extra: Any, link: Any) -> list[Any]:
        chained, previous = [], link(start)
        for end in range(chunk_tokens, len(tokens) + 1, chunk_tokens):
            previous = link(sha256_cbor((previous, tuple(tokens[end - chunk_tokens : end]), extra)))
            chained.append(previous)
        return chained

    start = sha256_cbor(seed)
    ours = lmcache_chunk_hashes(tokens, chunk_tokens, "sha256_cbor", seed)
    assert ours == chain(start, None, lambda digest: digest)
    numbers = chain(start, (), lambda digest: int.from_bytes(digest[:8], "big"))
    ours = lmcache_engine_keys(tokens, chunk_tokens, "sha256_cbor", seed)
    assert ours == [lmcache_engine_key(number) for number in numbers]


@pytest.mark.parametrize("algorithm", ["blake3", "sha256_cbor", "builtin"])
def test_a_prompt_shorter_than_a_chunk_has_no_key(algorithm: str) -> None:
    assert lmcache_chunk_hashes([], 256, algorithm) == []
    assert lmcache_chunk_hashes(VECTOR[:255], 256, algorithm) == []


@pytest.mark.parametrize("algorithm", ["blake3", "sha256_cbor", "builtin"])
@pytest.mark.parametrize("kind", [tuple, np.array, lambda tokens: np.array(tokens, np.int32)])
def test_tokens_may_come_in_any_sequence(algorithm: str, kind: Any) -> None:
    assert lmcache_chunk_hashes(kind(VECTOR), 256, algorithm) == lmcache_chunk_hashes(VECTOR, 256, algorithm)


# Keys inside the engine


def test_the_engines_hashes_are_those_of_lmcache_beside_vllm() -> None:
    keys = lmcache_engine_keys(VECTOR, 256, "sha256_cbor", "0")
    assert (len(keys), keys[0], keys[-1]) == (
        8,
        lmcache_engine_key(0xC158853393FB252B),
        lmcache_engine_key(0xB4AB45D7DC128330),
    )
    keys = lmcache_engine_keys(VECTOR, 256, "sha256_cbor", VLLM_SEED)
    assert keys[0] == lmcache_engine_key(0x18563FB893174642)
    assert keys[-1] == lmcache_engine_key(0x9157160167DFBB0A)
    wide = lmcache_engine_keys(WIDTHS, 30, "sha256_cbor", "0")
    assert wide == [lmcache_engine_key(0x6F72822761086A35)]


def test_pythons_own_hash_is_that_of_lmcache_beside_vllm_under_one_seed() -> None:
    code = f"keys = lmcache_engine_keys({VECTOR}, 256, 'builtin', '0'); print(keys[0].hex(), keys[-1].hex())"
    expected = [lmcache_engine_key(number).hex() for number in (0x14351AB3F7634E7C, -0x6A31630DCC74F975)]
    assert in_process(code, PYTHONHASHSEED="0").split() == expected


@pytest.mark.parametrize("algorithm", ["sha256_cbor", "builtin"])
@settings(deadline=None)
@given(tokens=prompts, chunk_tokens=chunk_sizes)
def test_any_prompt_hashes_as_in_lmcache_inside_the_engine(
    algorithm: str, tokens: list[int], chunk_tokens: int
) -> None:
    numbers = lmcache_engine_hashes(algorithm, tokens, chunk_tokens)
    ours = lmcache_engine_keys(tokens, chunk_tokens, algorithm, lmcache_seed())
    assert ours == [lmcache_engine_key(number) for number in numbers]
    check_keys(ours)


@pytest.mark.parametrize(
    ("scheme", "algorithm"),
    [
        (lmcache_chunk_hashes, "blake3"),
        (lmcache_chunk_hashes, "sha256_cbor"),
        (lmcache_engine_keys, "builtin"),
    ],
)
@given(tokens=prompts, more=prompts, chunk_tokens=chunk_sizes)
def test_a_longer_prompt_begins_with_the_keys_of_a_shorter(
    scheme: Any, algorithm: str, tokens: list[int], more: list[int], chunk_tokens: int
) -> None:
    short = scheme(tokens, chunk_tokens, algorithm)
    assert scheme(tokens + more, chunk_tokens, algorithm)[: len(short)] == short


# Bad input


@pytest.mark.parametrize("scheme", [lmcache_chunk_hashes, lmcache_engine_keys])
@pytest.mark.parametrize("algorithm", ["sha256_cbor", "builtin"])
@pytest.mark.parametrize("bad", [-1, 1 << 32, 10**30, 1.5, "a", None])
def test_a_bad_token_is_named_with_its_place_and_the_limit(scheme: Any, algorithm: str, bad: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^token 3 is .*; give token ids from 0 to 4294967295$"):
        scheme([1, 2, 3, bad, 5], 2, algorithm)


def test_blake3_and_arrays_refuse_bad_tokens_too() -> None:
    with pytest.raises(InvalidRequest, match="token 0 is -1"):
        lmcache_chunk_hashes([-1])
    with pytest.raises(InvalidRequest, match=r"token 1 is .*4294967296"):
        lmcache_chunk_hashes(np.array([1, 1 << 32]))  # type: ignore[arg-type]


def test_an_unknown_algorithm_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidRequest, match="'md5'; give one of blake3, sha256_cbor, builtin"):
        lmcache_chunk_hashes([1], 1, "md5")
    with pytest.raises(InvalidRequest, match="'blake3'; give one of sha256_cbor, builtin"):
        lmcache_engine_keys([1], 1, "blake3")


@pytest.mark.parametrize("chunk_tokens", [0, -256])
def test_a_chunk_has_at_least_one_token(chunk_tokens: int) -> None:
    with pytest.raises(InvalidRequest, match=f"chunk_tokens is {chunk_tokens}; give at least 1"):
        lmcache_chunk_hashes([1], chunk_tokens)
    with pytest.raises(InvalidRequest, match="chunk_tokens"):
        fingerprint(lmcache_chunk_hashes, chunk_tokens)


def test_blake3_that_is_not_installed_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "blake3", None)
    with pytest.raises(InvalidRequest, match="needs the package blake3"):
        lmcache_chunk_hashes(VECTOR)


# Fingerprints


@pytest.mark.parametrize(
    ("scheme", "algorithm", "seed", "expected"),
    [
        (lmcache_chunk_hashes, "blake3", VLLM_SEED, "5092e599"),
        (lmcache_chunk_hashes, "blake3", None, "5092e599"),
        (lmcache_chunk_hashes, "sha256_cbor", VLLM_SEED, "f0e4653f"),
        (lmcache_chunk_hashes, "sha256_cbor", "0", "9c5f85d4"),
        (lmcache_engine_keys, "sha256_cbor", VLLM_SEED, "18563fb8"),
        (lmcache_engine_keys, "sha256_cbor", "0", "c1588533"),
    ],
)
def test_a_fingerprint_is_the_head_of_the_first_key(
    scheme: Any, algorithm: str, seed: str | None, expected: str
) -> None:
    assert fingerprint(scheme, 256, algorithm, seed) == expected


def test_processes_have_fingerprints_in_common_if_and_only_if_they_have_keys_in_common() -> None:
    code = (
        "print(*(fingerprint(*scheme) for scheme in ("
        "(lmcache_chunk_hashes, 256, 'blake3'), (lmcache_chunk_hashes, 256, 'sha256_cbor'),"
        "(lmcache_engine_keys, 256, 'sha256_cbor'), (lmcache_engine_keys, 256, 'builtin', None),"
        "(lmcache_engine_keys, 256, 'builtin', 'x'), (lmcache_chunk_hashes, 256, 'builtin', 'x'))))"
    )
    *one_same, one_engine, one_server = in_process(code, PYTHONHASHSEED="1").split()
    *two_same, two_engine, two_server = in_process(code, PYTHONHASHSEED="2").split()
    # Numbers alone hash the same under any PYTHONHASHSEED.
    numbers_alone = fingerprint(lmcache_engine_keys, 256, "builtin", None)
    assert one_same == two_same == ["5092e599", "f0e4653f", "18563fb8", numbers_alone]
    assert one_engine != two_engine
    assert one_server != two_server
    assert in_process(code, PYTHONHASHSEED="1").split()[-2] == one_engine


def test_fingerprints_tell_whether_processes_agree_on_the_servers_builtin() -> None:
    # Before Python 3.12 they seldom do: the hash is of the address of None, too.
    code = (
        "print(fingerprint(lmcache_chunk_hashes, 256, 'builtin', '0'),"
        " lmcache_chunk_hashes(range(20), 5, 'builtin', '0')[-1].hex())"
    )
    seen = {tuple(in_process(code, PYTHONHASHSEED="0").split()) for _ in range(4)}
    assert len({found for found, _ in seen}) == len({key for _, key in seen}) == len(seen)


def test_the_seed_is_the_environments_where_vllm_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.hashing.find_spec", lambda name: None)
    assert lmcache_seed() is None
    monkeypatch.setattr("kvstore.hashing.find_spec", lambda name: name)
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    assert lmcache_seed() == "7"
    monkeypatch.delenv("PYTHONHASHSEED")
    assert lmcache_seed() == VLLM_SEED


def test_namespaces_that_share_nothing_for_their_keys_alone_can_be_told() -> None:
    one = lmcache_namespace("m", 0x01000100, algorithm="sha256_cbor", seed="0")
    two = lmcache_namespace("m", 0x01000100, algorithm="sha256_cbor", seed=VLLM_SEED)
    assert one != two
    assert same_but_for_keys(one, two)
    assert same_but_for_keys(one, one)
    assert same_but_for_keys(one, lmcache_namespace("m", 0x01000100))
    assert same_but_for_keys(one, lmcache_namespace("m", 0x01000100, block_tokens=16))
    assert not same_but_for_keys(one, lmcache_namespace("n", 0x01000100, algorithm="sha256_cbor"))
    assert not same_but_for_keys(one, lmcache_namespace("m", 0x01000100, dtype="float8"))
    assert not same_but_for_keys(one, lmcache_engine_namespace("m", 1, 0, "bfloat16"))
    assert not same_but_for_keys(one, Namespace("m", scheme="mine", block_tokens=256))


# Namespaces of the server


@settings(deadline=None)
@given(
    model=models.filter(lambda name: "@" not in name),
    ranks=st.tuples(*[st.integers(0, 255)] * 4),
    group=st.integers(0, 99),
    salt=names.filter(lambda name: not set(name) & set("@/\\\0")),
)
def test_an_object_keys_fields_come_back_from_its_namespace(
    model: str, ranks: tuple[int, int, int, int], group: int, salt: str
) -> None:
    key_of = import_module("lmcache.v1.distributed.api").ObjectKey
    kv_rank = lmcache_kv_rank(*ranks)
    rank, world, local_rank, local_world = ranks
    assert kv_rank == key_of.ComputeKVRank(world, rank, local_world, local_rank)
    key = key_of(b"\1" * 32, model, kv_rank, group, salt)
    namespace = lmcache_namespace(key.model_name, key.kv_rank, key.object_group_id, key.cache_salt)
    assert key_of(b"\1" * 32, *lmcache_object_fields(namespace)) == key


def test_a_server_namespace_says_what_it_holds() -> None:
    namespace = lmcache_namespace(
        "meta/Llama", 0x08030803, 1, "tenantA", block_tokens=16, dtype="bfloat16", layout="NB"
    )
    found = fingerprint(lmcache_chunk_hashes, 16, "blake3")
    assert namespace == Namespace(
        model="meta/Llama",
        block_tokens=16,
        dtype="bfloat16",
        layout="NB",
        group="1",
        shard="3/8",
        salt="tenantA",
        scheme=f"lmcache-blake3:{found}",
    )
    assert lmcache_namespace("m", lmcache_kv_rank(5, 8, 1, 4)).shard == "5/8:1/4"
    assert lmcache_namespace("m", lmcache_kv_rank(0, 1)).scheme == "lmcache-blake3:5092e599"


def test_a_rank_that_lmcache_would_mix_with_its_neighbour_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="256; give 0 to 255"):
        lmcache_kv_rank(0, 256)
    with pytest.raises(InvalidRequest, match="-1; give 0 to 255"):
        lmcache_kv_rank(-1, 8)
    for kv_rank in (-1, 1 << 32):
        with pytest.raises(InvalidRequest, match=f"kv_rank is {kv_rank}; give 0 to"):
            lmcache_namespace("m", kv_rank)
    with pytest.raises(InvalidRequest, match="object_group_id is -1"):
        lmcache_namespace("m", 1, -1)
    with pytest.raises(InvalidRequest, match="block_tokens"):
        lmcache_namespace("m", 1, block_tokens=1 << 40)


@pytest.mark.parametrize(
    "namespace",
    [
        Namespace(model="m"),
        Namespace(model="m", scheme="vllm-sha256:00000000"),
        Namespace(model="m", scheme="lmcache-blake3:5092e599", shard="all"),
        Namespace(model="m", scheme="lmcache-blake3:5092e599", shard="300/400"),
        Namespace(model="m", scheme="lmcache-blake3:5092e599", group="sliding"),
        lmcache_engine_namespace("m", 1, 0, "half"),
    ],
)
def test_foreign_namespaces_have_no_object_fields(namespace: Namespace) -> None:
    with pytest.raises(InvalidRequest):
        lmcache_object_fields(namespace)


# Namespaces inside the engine


def engine_key_of(layer_id: int | None, *values: Any) -> Any:
    utils = import_module("lmcache.utils")
    if layer_id is None:
        return utils.CacheEngineKey(*values)
    return utils.LayerCacheEngineKey(*values, layer_id=layer_id)


@settings(deadline=None)
@given(
    model=models,
    world=st.integers(1, 64),
    worker=st.integers(0, 63),
    chunk_hash=st.integers(-(2**63), 2**64 - 1) | st.integers(-(2**255), 2**256 - 1),
    dtype=st.sampled_from(["half", "bfloat16", "float", "uint8", "fp8_e4m3fn"]),
    tags=st.dictionaries(tag_words, tag_words, max_size=3),
    layer_id=st.none() | st.integers(0, 65535),
)
def test_an_engine_keys_string_comes_back_from_its_namespace_and_key(
    model: str,
    world: int,
    worker: int,
    chunk_hash: int,
    dtype: str,
    tags: dict[str, str],
    layer_id: int | None,
) -> None:
    torch_dtype = import_module("lmcache.utils").STR_DTYPE_TO_TORCH_DTYPE[dtype]
    configs = {f"lmcache.tag.{name}": value for name, value in tags.items()}
    theirs = engine_key_of(layer_id, model, world, worker, chunk_hash, torch_dtype, {"other": "1", **configs})
    namespace = lmcache_engine_namespace(model, world, worker, dtype, theirs.tags or ())
    key = lmcache_engine_key(chunk_hash, layer_id)
    check_keys([key])
    assert lmcache_engine_string(namespace, key) == theirs.to_string()


def test_an_engine_namespace_says_what_it_holds() -> None:
    namespace = lmcache_engine_namespace(
        "m", 8, 3, "half", [("user", "a")], algorithm="sha256_cbor", layout="NB"
    )
    assert namespace == Namespace(
        model="m",
        dtype="half",
        layout="NB",
        shard="3/8",
        salt="user=a",
        scheme="lmcache-engine-sha256_cbor:18563fb8",
    )


def test_a_tag_cannot_imitate_two() -> None:
    def salt(*tags: tuple[str, str]) -> str:
        return lmcache_engine_namespace("m", 1, 0, "half", tags).salt

    assert salt(("a", "b@c%d")) != salt(("a", "b"), ("c", "d"))
    assert salt(("a", "b&c=d")) != salt(("a", "b"), ("c", "d"))
    assert salt(("a", "")) != salt()


@given(
    numbers=st.lists(
        st.tuples(
            st.integers(-(2**63), 2**64 - 1) | st.integers(-(2**255), 2**256 - 1),
            st.none() | st.integers(0, 65535),
        ),
        unique=True,
    )
)
def test_different_chunks_and_layers_have_different_keys(numbers: Sequence[tuple[int, int | None]]) -> None:
    assert len({lmcache_engine_key(*number) for number in numbers}) == len(numbers)
    for chunk_hash, layer_id in numbers:
        if -(2**63) <= chunk_hash < 2**64:
            assert int.from_bytes(lmcache_engine_key(chunk_hash, layer_id)[1:9], "big") == chunk_hash % 2**64


def test_numbers_that_no_engine_key_holds_are_refused() -> None:
    for chunk_hash in (1 << 256, -(1 << 255) - 1):
        with pytest.raises(InvalidRequest, match=r"chunk_hash is .*; give a number from"):
            lmcache_engine_key(chunk_hash)
    with pytest.raises(InvalidRequest, match="layer_id is 65536; give 0 to 65535"):
        lmcache_engine_key(1, 65536)
    with pytest.raises(InvalidRequest, match="worker_id is -1"):
        lmcache_engine_namespace("m", 1, -1, "half")
    namespace = lmcache_engine_namespace("m", 1, 0, "half")
    with pytest.raises(InvalidRequest, match="key of 32 bytes"):
        lmcache_engine_string(namespace, bytes(32))
    with pytest.raises(InvalidRequest, match="scheme"):
        lmcache_engine_string(lmcache_namespace("m", 1), bytes(9))


def test_hashing_needs_no_engine() -> None:
    code = "import sys; lmcache_chunk_hashes([1], 1, 'sha256_cbor')\n"
    assert (
        in_process(f"{code}print({{'lmcache', 'vllm', 'torch', 'cbor2', 'blake3'}} & set(sys.modules))")
        == "set()"
    )
