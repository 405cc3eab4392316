"""The engines' chained prefix hashes: tokens to keys, one function per scheme, and the namespaces of these.

A scheme computes and names; it stores nothing, asks no daemon and never imports the engine whose formula it
repeats. Connectors (which are handed the engine's keys) and routers (which have tokens) meet here: both get
the same namespace and keys, or namespaces whose fingerprints differ, and can say why nothing is shared.

All schemes have one shape, `(tokens, chunk_tokens, algorithm, seed) -> keys`: the token ids of one prompt
from its first on, tokens per chunk, the engine's name of the hash, and what vLLM makes its NONE_HASH from;
out comes one key for each complete chunk. `seed` is None where LMCache runs without vLLM: whatever algorithm
but blake3 it is configured with, it then hashes by Python's `hash`, and from another start. The formulas are
those of LMCache 0.5.6 (files named below are under its `lmcache/`) and vLLM 0.32.
"""

import hashlib
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from importlib.util import find_spec
from typing import Final
from urllib.parse import parse_qsl, urlencode

from kvstore.block import SHARD, Namespace
from kvstore.errors import InvalidRequest
from kvstore.tokens import cbor, cbor_chunks, cbor_head, token_array

# What vLLM makes NONE_HASH from where PYTHONHASHSEED is not set: vllm/v1/core/kv_cache_utils.py.
VLLM_SEED: Final = "vllm-none-hash"
Scheme = Callable[[Sequence[int], int, str, str | None], list[bytes]]

_U32_MAX: Final = (1 << 32) - 1
# LMCache packs four numbers of 8 bits into a kv_rank and checks none of them.
_RANK_MAX: Final = 255
_LAYER_MAX: Final = (1 << 16) - 1
# Python's hash is signed and the head of a digest is not: 9 bytes hold both, and the last 8 of them are the
# number as events carry it. LMCache's own checks use whole digests.
_ENGINE_HASH_BYTES: Final = (9, 33)
# Names of schemes up to their algorithm: LMCache's server (its multiprocess mode), LMCache inside an engine.
_SERVER: Final = "lmcache"
_ENGINE: Final = "lmcache-engine"


def lmcache_chunk_hashes(
    tokens: Sequence[int], chunk_tokens: int = 256, algorithm: str = "blake3", seed: str | None = VLLM_SEED
) -> list[bytes]:
    """Return the `ObjectKey.chunk_hash`es of LMCache's server (v1/multiprocess/token_hasher.py).

        blake3       H(i) = blake3(H(i-1) || u32be(token)...); H(-1) = blake3(12 zero bytes); 32 bytes
        sha256_cbor  H(i) = sha256(cbor([H(i-1), [token...], null])); H(-1) = sha256(cbor(seed)); 32 bytes
        builtin      H(i) = hash((H(i-1), (token...), None)); H(-1) = hash(seed), without vLLM
                     hash((0, (0,), None)); 8 bytes, big-endian, signed

    Before Python 3.12 `hash(None)` is an address, which moves from process to process: builtin then agrees
    with no other, whatever PYTHONHASHSEED says.

    Raises:
        InvalidRequest: a token or the chunk size is out of range, or the algorithm unknown or not installed.
    """
    ids = _checked(tokens, chunk_tokens, algorithm, ("blake3", "sha256_cbor", "builtin"))
    if algorithm == "blake3":
        return _blake3_chain(ids, chunk_tokens)
    if algorithm == "sha256_cbor" and seed is not None:
        return list(_cbor_chain(ids, chunk_tokens, seed, lambda digest: b"\x58\x20" + digest, b"\xf6"))
    start = hash((0, (0,), None)) if seed is None else hash(seed)
    return [
        number.to_bytes(8, "big", signed=True) for number in _builtin_chain(tokens, chunk_tokens, start, None)
    ]


def lmcache_engine_keys(
    tokens: Sequence[int], chunk_tokens: int = 256, algorithm: str = "builtin", seed: str | None = VLLM_SEED
) -> list[bytes]:
    """Return `lmcache_engine_key` of each `CacheEngineKey.chunk_hash` of an LMCache inside the engine.

        sha256_cbor  h(i) = head(sha256(cbor([h(i-1), [token...], []]))); h(-1) = head(sha256(cbor(seed)));
                     head = the first 8 bytes as a big-endian number
        builtin      h(i) = hash((h(i-1), (token...), ())); h(-1) = hash(seed), without vLLM 0

    From v1/token_database.py. The short last chunk that LMCache can be told to save (`save_unfull_chunk`)
    has none here.

    Raises:
        InvalidRequest: a token or the chunk size is out of range, or the algorithm unknown.
    """
    ids = _checked(tokens, chunk_tokens, algorithm, ("sha256_cbor", "builtin"))
    if algorithm == "sha256_cbor" and seed is not None:
        digests = _cbor_chain(ids, chunk_tokens, seed, lambda digest: cbor(_first64(digest)), b"\x80")
        return [lmcache_engine_key(_first64(digest)) for digest in digests]
    start = 0 if seed is None else hash(seed)
    return [lmcache_engine_key(number) for number in _builtin_chain(tokens, chunk_tokens, start, ())]


def lmcache_seed() -> str | None:
    """Return the `seed` of an LMCache in this process: PYTHONHASHSEED or vLLM's own; None without vLLM."""
    return os.environ.get("PYTHONHASHSEED", VLLM_SEED) if find_spec("vllm") else None


@lru_cache
def fingerprint(
    scheme: Scheme, chunk_tokens: int = 256, algorithm: str = "blake3", seed: str | None = VLLM_SEED
) -> str:
    """Return 8 hex characters that two processes have in common if their keys of a scheme agree.

    They are the first 4 bytes (after an engine key's sign) of the first key of a fixed prompt, token i of
    which is (7i + 3) % 1000 + 5: the same everywhere for blake3, and for sha256_cbor with the same seed.
    """
    key = scheme([(i * 7 + 3) % 1000 + 5 for i in range(chunk_tokens)], chunk_tokens, algorithm, seed)[0]
    return key[len(key) % 8 :][:4].hex()


def same_but_for_keys(a: Namespace, b: Namespace) -> bool:
    """Say whether a and b agree in all but algorithm, fingerprint and chunk size, by which keys are made.

    If they are not equal, their processes store the same content under different keys.
    """
    return _without_keys(a) == _without_keys(b)


def lmcache_kv_rank(
    rank: int, world: int, local_rank: int | None = None, local_world: int | None = None
) -> int:
    """Return `ObjectKey.ComputeKVRank` (v1/distributed/api.py), by default with local numbers as the global.

    It is world << 24 | rank << 16 | local_world << 8 | local_rank; 0x08030803 is rank 3 of 8.

    Raises:
        InvalidRequest: a number does not fit its 8 bits, where LMCache would mix it with its neighbour.
    """
    numbers = (
        world,
        rank,
        world if local_world is None else local_world,
        rank if local_rank is None else local_rank,
    )
    for number in numbers:
        _check_number("rank or world size", number, _RANK_MAX)
    return int.from_bytes(bytes(numbers), "big")


def lmcache_namespace(
    model: str,
    kv_rank: int,
    object_group_id: int = 0,
    cache_salt: str = "",
    *,
    block_tokens: int = 256,
    dtype: str = "",
    layout: str = "",
    algorithm: str = "blake3",
    seed: str | None = VLLM_SEED,
) -> Namespace:
    """Return where the blocks of LMCache's `ObjectKey`s lie that differ in `chunk_hash`, which is the key.

    `shard` is "rank/world", or "rank/world:local_rank/local_world" where the local numbers differ; `scheme`
    is "lmcache-ALGORITHM:FINGERPRINT". What LMCache's key does not hold (`dtype`, `layout`) the caller knows.

    Raises:
        InvalidRequest: a value is out of its limits.
    """
    _check_number("kv_rank", kv_rank, _U32_MAX)
    _check_number("object_group_id", object_group_id, _U32_MAX)
    world, rank, local_world, local_rank = kv_rank.to_bytes(4, "big")
    shard, local_shard = f"{rank}/{world}", f"{local_rank}/{local_world}"
    namespace = Namespace(
        model=model,
        block_tokens=block_tokens,
        dtype=dtype,
        layout=layout,
        group=str(object_group_id),
        shard=shard if local_shard == shard else f"{shard}:{local_shard}",
        salt=cache_salt,
        scheme=f"{_SERVER}-{algorithm}",
    )
    return _with_fingerprint(namespace, lmcache_chunk_hashes, algorithm, seed)


def lmcache_object_fields(namespace: Namespace) -> tuple[str, int, int, str]:
    """Undo `lmcache_namespace`: what an `ObjectKey` has after its `chunk_hash`, in its order.

    Raises:
        InvalidRequest: the namespace is not one of LMCache's server.
    """
    _check_scheme(namespace, _SERVER)
    if not namespace.group.isdecimal():
        raise InvalidRequest(f"namespace group is {namespace.group!r}; give LMCache's object_group_id")
    return namespace.model, lmcache_kv_rank(*_ranks(namespace)), int(namespace.group), namespace.salt


def lmcache_engine_namespace(
    model: str,
    world_size: int,
    worker_id: int,
    dtype: str,
    tags: Iterable[tuple[str, str]] = (),
    *,
    block_tokens: int = 256,
    layout: str = "",
    algorithm: str = "builtin",
    seed: str | None = VLLM_SEED,
) -> Namespace:
    """Return where the blocks of LMCache's `CacheEngineKey`s lie that differ in chunk and layer (utils.py).

    `dtype` is LMCache's word for it ("half", "bfloat16"), `tags` are the request's "lmcache.tag.*" without
    that prefix, in the key's order. They are the salt, quoted, since a value may hold the "@" and "%" of
    LMCache's strings and come from a request. `scheme` is "lmcache-engine-ALGORITHM:FINGERPRINT".

    Raises:
        InvalidRequest: a value is out of its limits.
    """
    _check_number("worker_id", worker_id, _U32_MAX)
    _check_number("world_size", world_size, _U32_MAX)
    namespace = Namespace(
        model=model,
        block_tokens=block_tokens,
        dtype=dtype,
        layout=layout,
        shard=f"{worker_id}/{world_size}",
        salt=urlencode(list(tags)),
        scheme=f"{_ENGINE}-{algorithm}",
    )
    return _with_fingerprint(namespace, lmcache_engine_keys, algorithm, seed)


def lmcache_engine_key(chunk_hash: int, layer_id: int | None = None) -> bytes:
    """Return the key of a `CacheEngineKey`: its hash, signed, big-endian, in 9 bytes or, if it must be, 33.

    A `LayerCacheEngineKey` has 2 bytes more.

    Raises:
        InvalidRequest: the hash is longer than 256 bits, or the layer not in 0 .. 65535.
    """
    for size in _ENGINE_HASH_BYTES:
        if -(1 << 8 * size - 9) <= chunk_hash < 1 << 8 * size - 8:
            key = chunk_hash.to_bytes(size, "big", signed=True)
            break
    else:
        raise InvalidRequest(f"chunk_hash is {chunk_hash:#x}; give a number from -2**255 to 2**256 - 1")
    if layer_id is None:
        return key
    _check_number("layer_id", layer_id, _LAYER_MAX)
    return key + layer_id.to_bytes(2, "big")


def lmcache_engine_string(namespace: Namespace, key: bytes) -> str:
    """Undo `lmcache_engine_namespace` and `lmcache_engine_key`: `to_string()` of LMCache's key.

    Raises:
        InvalidRequest: the namespace or the key is not one of an LMCache inside the engine.
    """
    _check_scheme(namespace, _ENGINE)
    size = next((size for size in _ENGINE_HASH_BYTES if len(key) in (size, size + 2)), None)
    if size is None:
        raise InvalidRequest(f"key of {len(key)} bytes; an LMCache engine's has 9 or 33, and 2 for a layer")
    worker_id, world_size = _ranks(namespace)[:2]
    chunk_hash = int.from_bytes(key[:size], "big", signed=True)
    layer = [str(int.from_bytes(key[size:], "big"))] if key[size:] else []
    tags = [f"{name}%{value}" for name, value in parse_qsl(namespace.salt, keep_blank_values=True)]
    fields = [namespace.model, str(world_size), str(worker_id), f"{chunk_hash:x}", namespace.dtype]
    return "@".join(fields + layer + tags)


def _checked(
    tokens: Sequence[int], chunk_tokens: int, algorithm: str, algorithms: Sequence[str]
) -> "array[int]":
    """The tokens as 32-bit numbers."""
    if algorithm not in algorithms:
        raise InvalidRequest(f"hash algorithm is {algorithm!r}; give one of {', '.join(algorithms)}")
    if chunk_tokens < 1:
        raise InvalidRequest(f"chunk_tokens is {chunk_tokens}; give at least 1, LMCache's chunk size")
    return token_array(tokens)


def _blake3_chain(ids: "array[int]", chunk_tokens: int) -> list[bytes]:
    import numpy as np

    try:
        from blake3 import blake3
    except ImportError:
        raise InvalidRequest("hash algorithm blake3 needs the package blake3; install it") from None

    data = np.asarray(ids).astype(">u4").tobytes()
    width = 4 * chunk_tokens
    digest, digests = blake3(bytes(12)).digest(), []
    for start in range(0, len(data) - len(data) % width, width):
        digest = blake3(digest + data[start : start + width]).digest()
        digests.append(digest)
    return digests


def _cbor_chain(
    ids: "array[int]", chunk_tokens: int, seed: str, link: Callable[[bytes], bytes], extra: bytes
) -> Iterator[bytes]:
    """sha256 of [previous, [token...], extra] in canonical CBOR, which `link` writes `previous` in."""
    digest = hashlib.sha256(cbor(seed)).digest()
    opening = cbor_head(4, chunk_tokens)
    for chunk in cbor_chunks(ids, chunk_tokens):
        digest = hashlib.sha256(b"\x83" + link(digest) + opening + chunk + extra).digest()
        yield digest


def _first64(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "big")


def _builtin_chain(tokens: Sequence[int], chunk_tokens: int, start: int, extra: object) -> Iterator[int]:
    number = start
    for end in range(chunk_tokens, len(tokens) + 1, chunk_tokens):
        number = hash((number, tuple(tokens[end - chunk_tokens : end]), extra))
        yield number


def _with_fingerprint(namespace: Namespace, scheme: Scheme, algorithm: str, seed: str | None) -> Namespace:
    found = fingerprint(scheme, namespace.block_tokens, algorithm, seed)
    return replace(namespace, scheme=f"{namespace.scheme}:{found}")


def _without_keys(namespace: Namespace) -> Namespace:
    return replace(namespace, scheme=_kind(namespace.scheme), block_tokens=1)


def _kind(scheme: str) -> str:
    """What is before -ALGORITHM:FINGERPRINT; nothing in front of a scheme that is none of ours."""
    return scheme.partition(":")[0].rpartition("-")[0]


def _check_scheme(namespace: Namespace, prefix: str) -> None:
    if _kind(namespace.scheme) != prefix:
        raise InvalidRequest(f"namespace scheme is {namespace.scheme!r}; give {prefix}-ALGORITHM:FINGERPRINT")


def _ranks(namespace: Namespace) -> list[int]:
    """The numbers of `shard`: rank, world and, if they differ, their local fellows."""
    match = SHARD.fullmatch(namespace.shard)
    if match is None:
        raise InvalidRequest(f"namespace shard is {namespace.shard!r}; give RANK/WORLD")
    return [int(number) for number in match.groups() if number is not None]


def _check_number(name: str, number: int, most: int) -> None:
    if not 0 <= number <= most:
        raise InvalidRequest(f"{name} is {number}; give 0 to {most}")
