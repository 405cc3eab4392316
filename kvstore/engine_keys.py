"""Keys of engines' own blocks in the index: from what an engine publishes, and from a prompt's tokens.

The two meet. Where an engine's hash can be reproduced (`kvstore.engine_hashes`, `kvstore.hashing`), it is the
key: the low 60 bits of the 64 that engines publish, a number that Python holds in 32 bytes. Where it cannot,
the key is of a chain of our own over the same tokens, LoRA, salt and media (scheme "tokens"). A collision
costs a wrong hint: these are no keys of data.

Schemes of namespaces, and what their keys are made with:

    vllm-ALGORITHM[:FINGERPRINT][/EVERY]    blocks of EVERY hash blocks; without a fingerprint, the seed of a
                                            vLLM with this process's environment
    sglang, sglang-eagle                    pages; with EAGLE of pairs of tokens
    tokens, tokens-eagle                    `content_keys`
    lmcache[-engine]-ALGORITHM:FINGERPRINT  `kvstore.hashing`; these keys are bytes
"""

import os
import re
import struct
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

from kvstore.block import Namespace
from kvstore.content_keys import KEY_MASK, content_keys
from kvstore.engine_hashes import (
    VLLM_ALGORITHMS,
    MediaItem,
    sglang_page_hashes,
    vllm_block_hashes,
    vllm_none_hash,
)
from kvstore.errors import InvalidRequest
from kvstore.hashing import VLLM_SEED, fingerprint, lmcache_chunk_hashes, lmcache_engine_keys

# What engines publish: 64 bits, signed or not, or a digest.
_HASH_RANGE: Final = (-(1 << 63), (1 << 64) - 1)
_DIGEST_BYTES: Final = range(8, 33)
_VLLM: Final = re.compile(rf"vllm-({'|'.join(VLLM_ALGORITHMS)})(?::([0-9a-f]{{8}}))?(?:/([1-9]\d{{0,6}}))?")
_OWN: Final = re.compile(r"(sglang|tokens)(-eagle)?")
_LMCACHE: Final = re.compile(
    r"lmcache-(?:(blake3|sha256_cbor|builtin)|engine-(sha256_cbor|builtin)):([0-9a-f]{8})"
)


def keys_for(
    namespace: Namespace,
    tokens: Sequence[int],
    *,
    lora: str = "",
    salt: str = "",
    media: Sequence[MediaItem] = (),
) -> list[int] | list[bytes] | None:
    """Return the keys of a prompt's complete blocks in a namespace's scheme; None where they cannot be known.

    That is: an unknown scheme; one made with a seed that is neither vLLM's own nor this process's; blocks of
    a LoRA adapter but in "tokens", since engines hash its path or a number of their own. SGLang and LMCache
    replace the tokens of media, so their keys end where the first item begins.

    `salt` enters where `scheme_holds_salt`; elsewhere it is for the caller to look at the namespace's.

    Raises:
        InvalidRequest: a token is out of range, or the package of a hash is not installed.
    """
    block_tokens = namespace.block_tokens
    own = _OWN.fullmatch(namespace.scheme)
    if own and own[1] == "tokens":
        return content_keys(tokens, block_tokens, lora=lora, salt=salt, media=media, eagle=own[2] is not None)
    if lora:
        return None
    if match := _VLLM.fullmatch(namespace.scheme):
        digests = _vllm_digests(match, tokens, block_tokens, salt, media)
        return None if digests is None else engine_keys(digests)
    plain = tokens[: min(item.offset for item in media)] if media else tokens
    if own:
        return engine_keys(sglang_page_hashes(plain, block_tokens, salt=salt, eagle=own[2] is not None))
    if match := _LMCACHE.fullmatch(namespace.scheme):
        return _lmcache_keys(match, plain, block_tokens)
    return None


def data_keys(
    namespace: Namespace,
    tokens: Sequence[int],
    *,
    lora: str = "",
    salt: str = "",
    media: Sequence[MediaItem] = (),
) -> list[bytes] | None:
    """Return the keys under which stores have a prompt's blocks; None where they cannot be known.

    As `keys_for`, but whole: of vLLM's schemes the digests. The others' numbers name no data.

    Raises:
        InvalidRequest: a token is out of range, or the package of a hash is not installed.
    """
    if lora:
        return None
    if match := _VLLM.fullmatch(namespace.scheme):
        return _vllm_digests(match, tokens, namespace.block_tokens, salt, media)
    if match := _LMCACHE.fullmatch(namespace.scheme):
        plain = tokens[: min(item.offset for item in media)] if media else tokens
        return _lmcache_keys(match, plain, namespace.block_tokens)
    return None


def scheme_holds_salt(namespace: Namespace) -> bool:
    """Say whether the keys of a namespace's scheme differ with the salt of the request."""
    return bool(_VLLM.fullmatch(namespace.scheme) or _OWN.fullmatch(namespace.scheme))


def vllm_scheme(algorithm: str = "sha256", seed: str = VLLM_SEED, every: int = 1) -> str:
    """Return the scheme of a vLLM that makes NONE_HASH from `seed` and blocks of `every` hash blocks.

    Raises:
        InvalidRequest: the algorithm is unknown or not installed.
    """
    found = vllm_none_hash(algorithm, seed)[:4].hex()
    return f"vllm-{algorithm}:{found}" + (f"/{every}" if every > 1 else "")


def engine_key(published: int | bytes) -> int:
    """Return the key of a block that an engine publishes under a number of 64 bits or a digest.

    Raises:
        InvalidRequest: it is neither.
    """
    return engine_hash64(published) & KEY_MASK


def engine_hash64(published: int | bytes) -> int:
    """Return what an engine publishes as an unsigned number of 64 bits.

    Of a digest it is the end, as in vLLM's own numbers.

    Raises:
        InvalidRequest: it is neither such a number nor a digest.
    """
    if isinstance(published, bytes) and len(published) in _DIGEST_BYTES:
        return int.from_bytes(published[-8:], "big")
    if isinstance(published, int) and _HASH_RANGE[0] <= published <= _HASH_RANGE[1]:
        return published & _HASH_RANGE[1]
    raise InvalidRequest(f"block hash is {published!r:.80}; give a number of 64 bits or 8 to 32 bytes")


def engine_keys(published: Sequence[int | bytes]) -> list[int]:
    """Return `engine_key` of each, in half the time where all are numbers or digests of one length."""
    hashes: Sequence[Any] = published
    with suppress(TypeError, ValueError, struct.error):
        if isinstance(hashes[0] if hashes else 0, bytes):
            (size,) = set(map(len, hashes))
            if size in _DIGEST_BYTES:
                numbers = struct.iter_unpack(f">{size - 8}xQ", b"".join(hashes))
                return [number & KEY_MASK for (number,) in numbers]
        elif _HASH_RANGE[0] <= min(hashes, default=0) and max(hashes, default=0) <= _HASH_RANGE[1]:
            return [number & KEY_MASK for number in hashes]
    return [engine_key(one) for one in hashes]


def _vllm_digests(
    match: re.Match[str], tokens: Sequence[int], block_tokens: int, salt: str, media: Sequence[MediaItem]
) -> list[bytes] | None:
    algorithm, found, every = match[1], match[2], int(match[3] or 1)
    seed = _vllm_seed(algorithm, found)
    if seed is None or block_tokens % every:
        return None
    hashes = vllm_block_hashes(tokens, block_tokens // every, algorithm, seed, salt=salt, media=media)
    return hashes[every - 1 :: every]


def _vllm_seed(algorithm: str, found: str | None) -> str | None:
    own = os.environ.get("PYTHONHASHSEED")
    if found is None:
        return VLLM_SEED if own is None and algorithm.startswith("sha256") else own
    seeds = (VLLM_SEED,) if own is None else (VLLM_SEED, own)
    return next((seed for seed in seeds if vllm_none_hash(algorithm, seed)[:4].hex() == found), None)


def _lmcache_keys(match: re.Match[str], tokens: Sequence[int], chunk_tokens: int) -> list[bytes] | None:
    scheme, algorithm = (lmcache_chunk_hashes, match[1]) if match[1] else (lmcache_engine_keys, match[2])
    for seed in (VLLM_SEED, os.environ.get("PYTHONHASHSEED"), None):
        if fingerprint(scheme, chunk_tokens, algorithm, seed) == match[3]:
            return scheme(tokens, chunk_tokens, algorithm, seed)
    return None
