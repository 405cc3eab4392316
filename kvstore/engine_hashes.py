"""The hashes under which engines publish their own caches: tokens to hashes, one function per engine.

Whoever has a prompt's tokens can ask an index for these blocks, with no table of the engine's hashes beside
its own. Nothing of an engine is imported. The formulas are those of vLLM 0.32 (files named below are under
its `vllm/`) and SGLang 0.5.23 (`sglang/srt/`). LMCache's are in `kvstore.hashing`.
"""

import hashlib
import pickle
import struct
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from kvstore.errors import InvalidRequest
from kvstore.hashing import VLLM_SEED
from kvstore.tokens import cbor, cbor_chunks, cbor_head, token_array

VLLM_ALGORITHMS: Final = ("sha256", "sha256_cbor", "xxhash", "xxhash_cbor")
# What a block's key holds beside its tokens: ("lora", name...), ("mm", identifier, offset in the block),
# ("cache_salt", salt), ("prompt_embeds", digest), in this order; None where there is nothing.
Extra = tuple[tuple[str | int | bytes, ...], ...] | None
# A constructor of hashlib's kind.
_Hash = Callable[[bytes], Any]

# HIGHEST_PROTOCOL of every Python that vLLM 0.32 runs on.
_PICKLE_PROTOCOL: Final = 5
_SGLANG_SALT: Final = b"sglang-cache-salt-v1\0"


@dataclass(frozen=True, slots=True)
class MediaItem:
    """An image, a clip: its placeholder tokens in a prompt, and vLLM's `identifier` of its content."""

    identifier: str
    offset: int
    length: int


def vllm_block_hashes(
    tokens: Sequence[int],
    block_tokens: int,
    algorithm: str = "sha256",
    seed: str = VLLM_SEED,
    *,
    lora: tuple[str, str] | None = None,
    salt: str = "",
    media: Sequence[MediaItem] = (),
) -> list[bytes]:
    """Return the hash of each complete block as vLLM has it (v1/core/kv_cache_utils.py).

        H(i) = f((H(i-1), (token...), extra)); H(-1) = f(seed); extra = `block_extras`

    f is sha256 or xxh3_128 over the pickle (protocol 5) or, in *_cbor, the canonical CBOR of its argument.
    `seed` is PYTHONHASHSEED of vLLM's process; without it vLLM takes VLLM_SEED for sha256* and a secret of
    the process for xxhash*. `lora` is name and path, `block_tokens` vLLM's hash block.

    Pickle writes an object that it meets again as a reference. The words "mm" of one block are one object, as
    in vLLM; no other strings are, since vLLM's come out of a message.

    Raises:
        InvalidRequest: a token or the block size is out of range, or the algorithm unknown or not installed.
    """
    ids = _checked(tokens, block_tokens)
    extras = block_extras(len(ids) // block_tokens, block_tokens, lora or (), salt, media)
    digest = vllm_none_hash(algorithm, seed)
    if algorithm.endswith("_cbor"):
        return list(_cbor_chain(ids, block_tokens, digest, extras, _hash(algorithm)))
    # Tokens of a list are pickled as they are: unlike `array`, vLLM would tell True from 1.
    numbers = tokens if isinstance(tokens, list) else ids
    return list(_pickle_chain(numbers, block_tokens, digest, extras, _hash(algorithm)))


@lru_cache
def vllm_none_hash(algorithm: str, seed: str) -> bytes:
    """Return vLLM's NONE_HASH, the parent of every first block.

    Raises:
        InvalidRequest: the algorithm is unknown or not installed.
    """
    if algorithm not in VLLM_ALGORITHMS:
        raise InvalidRequest(f"hash algorithm is {algorithm!r}; give one of {', '.join(VLLM_ALGORITHMS)}")
    data = cbor(seed) if algorithm.endswith("_cbor") else pickle.dumps(seed, _PICKLE_PROTOCOL)
    return bytes(_hash(algorithm)(data).digest())


def sglang_page_hashes(
    tokens: Sequence[int], page_tokens: int, *, salt: str | None = None, eagle: bool = False
) -> list[int]:
    """Return the hash of each complete page as SGLang publishes it (mem_cache/events.py), signed, of 64 bits.

        D(i) = sha256(D(i-1) || u32le(token)...); the hash is the first 8 bytes, big-endian

    D(-1) is nothing, or sha256("sglang-cache-salt-v1" || 0 || salt); an empty salt is none. With EAGLE
    (`eagle`) a page is of pairs (token, next token), so the last token of a prompt begins none. A request's
    `extra_key` enters only with a LoRA adapter, and then holds a number of SGLang's own; also in the format
    for Dynamo, whose hashes of salted pages differ, too.

    Raises:
        InvalidRequest: a token or the page size is out of range.
    """
    data, width = little_endian(_checked(tokens, page_tokens), eagle), 4 * page_tokens * (2 if eagle else 1)
    digest = hashlib.sha256(_SGLANG_SALT + _utf8(salt)).digest() if salt else b""
    digests = []
    for start in range(0, len(data) - len(data) % width, width):
        digest = hashlib.sha256(digest + data[start : start + width]).digest()
        digests.append(digest)
    return [number for (number,) in struct.iter_unpack(">q24x", b"".join(digests))]


def block_extras(
    blocks: int, block_tokens: int, lora: tuple[str, ...], salt: str, media: Sequence[MediaItem]
) -> list[Extra]:
    """Return what the first blocks of a prompt hold beside tokens; those after the list's end hold nothing.

    `lora` is on every block, the salt on the first alone, an item on every block that it overlaps.
    """
    # Each string is a new object in each block: see `vllm_block_hashes` for what pickle makes of identity.
    items = sorted(media, key=lambda item: item.offset)
    special_tokens = max(items[-1].offset + items[-1].length if items else 0, 1 if salt else 0)
    extras: list[Extra] = []
    for found in _media_of_blocks(items, min(blocks, -(-special_tokens // block_tokens)), block_tokens):
        extra: list[tuple[str | int | bytes, ...]] = [("lora", *map(_fresh, lora))] if lora else []
        extra += [("mm", _fresh(item.identifier), offset) for item, offset in found]
        extra += [("cache_salt", _fresh(salt))] if salt and not extras else []
        extras.append(tuple(extra) or None)
    return extras + [(("lora", *map(_fresh, lora)),)] * (blocks - len(extras)) if lora else extras


def little_endian(ids: "array[int]", in_pairs: bool = False) -> bytes:
    """Return the tokens, or the pairs of each and the next, as numbers of 32 bits."""
    if in_pairs:
        pairs = array("I", bytes(8 * max(len(ids) - 1, 0)))
        pairs[0::2], pairs[1::2] = ids[:-1], ids[1:]
        ids = pairs
    if sys.byteorder == "big":
        ids = ids[:]
        ids.byteswap()
    return ids.tobytes()


def _checked(tokens: Sequence[int], block_tokens: int) -> "array[int]":
    if block_tokens < 1:
        raise InvalidRequest(f"block_tokens is {block_tokens}; give at least 1, the engine's block size")
    return token_array(tokens)


def _hash(algorithm: str) -> _Hash:
    if algorithm.startswith("sha256"):
        return hashlib.sha256
    try:
        from xxhash import xxh3_128
    except ImportError:
        raise InvalidRequest(f"hash algorithm {algorithm} needs the package xxhash; install it") from None
    return xxh3_128


def _pickle_chain(
    tokens: Sequence[int], block_tokens: int, digest: bytes, extras: list[Extra], new: _Hash
) -> Iterator[bytes]:
    # Pickles put together from parts save 15 % of the time and cost 30 lines.
    blocks = zip(*[iter(tokens)] * block_tokens, strict=False)
    for extra, block in zip(extras, blocks, strict=False):
        digest = new(pickle.dumps((digest, block, extra), _PICKLE_PROTOCOL)).digest()
        yield digest
    for block in blocks:
        digest = new(pickle.dumps((digest, block, None), _PICKLE_PROTOCOL)).digest()
        yield digest


def _cbor_chain(
    ids: "array[int]", block_tokens: int, digest: bytes, extras: list[Extra], new: _Hash
) -> Iterator[bytes]:
    opening = cbor_head(4, block_tokens)
    for i, block in enumerate(cbor_chunks(ids, block_tokens)):
        extra = cbor(extras[i] if i < len(extras) else None)
        digest = new(b"\x83" + cbor(digest) + opening + block + extra).digest()
        yield digest


def _media_of_blocks(
    items: Sequence[MediaItem], blocks: int, block_tokens: int
) -> Iterator[list[tuple[MediaItem, int]]]:
    """The items in each block with their offsets in it; of overlapping ones, those that vLLM's walk meets."""
    end_of_last = items[-1].offset + items[-1].length if items else 0
    position = 0
    for start in range(0, blocks * block_tokens, block_tokens):
        end, found = start + block_tokens, []
        while start < end_of_last and position < len(items) and items[position].offset < end:
            item = items[position]
            if start < item.offset + item.length:
                found.append((item, item.offset - start))
                if end < item.offset + item.length:
                    break
            position += 1
        yield found


def _utf8(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


def _fresh(text: str) -> str:
    """The same text in an object of its own, as a message's decoder makes it."""
    return _utf8(text).decode(errors="surrogatepass")
