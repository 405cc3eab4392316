"""Keys of blocks by what they hold, for engines whose hashes cannot be reproduced: a chain of our own.

A prompt's tokens, LoRA, salt and media give a block's key, and so does the event with which an engine
announces it. Keys have 60 bits, which Python holds in 32 bytes, and no secret: a collision costs a wrong
hint. They name no data.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache
from types import NoneType
from typing import Final

from kvstore.engine_hashes import Extra, MediaItem, block_extras, little_endian
from kvstore.errors import InvalidRequest
from kvstore.tokens import TOKEN_MAX, cbor, token_array

KEY_MASK: Final = (1 << 60) - 1
# The parent of first blocks; no key, since it has more than 60 bits.
_ROOT: Final = 1 << 63


def content_keys(
    tokens: Sequence[int],
    block_tokens: int,
    *,
    lora: str = "",
    salt: str = "",
    media: Sequence[MediaItem] = (),
    eagle: bool = False,
) -> list[int]:
    """Return the keys of a prompt's complete blocks in our own chain; `eagle` as in `sglang_page_hashes`.

    Raises:
        InvalidRequest: a token is out of range.
    """
    data, width = little_endian(token_array(tokens), eagle), _width(block_tokens, eagle)
    extras = block_extras(len(data) // width, block_tokens, (lora,) if lora else (), salt, media)
    return _content_chain(None, data, width, extras)


def content_chain(
    parent: int | None, tokens: Sequence[int], block_tokens: int, extras: Sequence[Extra] = ()
) -> list[int]:
    """Return the keys of blocks after the one whose key is `parent`; None where they begin a prompt.

    `tokens` may be pairs, as SGLang with EAGLE publishes them. `extras` are `event_extras` of the first of
    these blocks; the others have none.

        key = low 60 bits of xxh3_64(parent as u64le || u32le(token)..., seed)

    `seed` is 0 without an extra, else the first 8 bytes (little-endian) of blake2b of the extra's CBOR.

    Raises:
        InvalidRequest: a token is out of range, or the package xxhash is not installed.
    """
    in_pairs = len(tokens) > 0 and isinstance(tokens[0], (list, tuple))
    ids = token_array(list(_flat(tokens)) if in_pairs else tokens)
    return _content_chain(parent, little_endian(ids), _width(block_tokens, in_pairs), extras)


def event_extras(lora_name: object, cache_salt: object, extra_keys: object, first: bool) -> Extra:
    """Return what a block that an engine announces holds beside its tokens, as `block_extras` has it.

    `lora_name` and `cache_salt` are the event's fields of these names, `extra_keys` what vLLM's event has
    for this block: the adapter's name, (identifier, offset) of media, the salt on a prompt's first block
    (`first`), a digest of embeddings, without a word that says which is which. SGLang names the salt with
    every block; it counts on the first.

    Raises:
        InvalidRequest: they are none of these.
    """
    lora, salt = _text("lora_name", lora_name), _text("cache_salt", cache_salt)
    if not isinstance(extra_keys, (list, tuple, NoneType)):
        raise InvalidRequest(f"extra keys are {extra_keys!r:.40}; give a list for each block, or nothing")
    words: list[str] = []
    tagged: list[tuple[str | int | bytes, ...]] = [("lora", lora)] if lora else []
    digests: list[tuple[str, bytes]] = []
    for key in extra_keys or ():
        match key:
            case str():
                words.append(key)
            case bytes():
                digests.append(("prompt_embeds", key))
            case [str() as identifier, int() as offset] if abs(offset) <= TOKEN_MAX:
                tagged.append(("mm", identifier, offset))
            case _:
                raise InvalidRequest(
                    f"extra key is {key!r:.40}; give a name, a salt, (identifier, offset) or a digest"
                )
    if lora and words[:1] == [lora]:
        del words[0]
    if len(words) > first:
        raise InvalidRequest(f"extra key is {words[-1]!r:.40}; give one salt, on a prompt's first block")
    salt = words[0] if words else salt
    return (*tagged, *([("cache_salt", salt)] if salt and first else []), *digests) or None


def _content_chain(parent: int | None, data: bytes, width: int, extras: Sequence[Extra]) -> list[int]:
    new = _xxh3_64()
    previous, keys = _ROOT if parent is None else parent, []
    blocks = iter(range(0, len(data) - len(data) % width, width))
    for extra, start in zip(extras, blocks, strict=False):
        block = previous.to_bytes(8, "little") + data[start : start + width]
        previous = new(block, _seed(extra) if extra else 0) & KEY_MASK
        keys.append(previous)
    for start in blocks:
        previous = new(previous.to_bytes(8, "little") + data[start : start + width]) & KEY_MASK
        keys.append(previous)
    return keys


@cache
def _xxh3_64() -> Callable[..., int]:
    try:
        from xxhash import xxh3_64_intdigest
    except ImportError:
        raise InvalidRequest('scheme "tokens" needs the package xxhash; install it') from None
    return xxh3_64_intdigest


@lru_cache(maxsize=1024)
def _seed(extra: Extra) -> int:
    return int.from_bytes(hashlib.blake2b(cbor(extra), digest_size=8).digest(), "little")


def _width(block_tokens: int, in_pairs: bool) -> int:
    """The bytes of a block's tokens."""
    if block_tokens < 1:
        raise InvalidRequest(f"block_tokens is {block_tokens}; give at least 1")
    return block_tokens * (8 if in_pairs else 4)


def _text(name: str, value: object) -> str:
    if not isinstance(value, (str, NoneType)):
        raise InvalidRequest(f"{name} is {value!r:.40}; give a string or nothing")
    return value or ""


def _flat(pairs: Sequence[object]) -> Iterator[int]:
    for position, pair in enumerate(pairs):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise InvalidRequest(f"token {position} is {pair!r:.40}; give a pair, as the first is one")
        yield from pair
