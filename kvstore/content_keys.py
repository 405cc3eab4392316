"""Keys of blocks by what they hold, for engines whose hashes cannot be reproduced: a chain of our own.

A prompt's tokens, LoRA, salt and media give a block's key, and so does the event with which an engine
announces it. The formulas are those of Dynamo's indexer (1.6.1) and of Mooncake's, so that what their routers
hash is answered from the same table:

    local(i)     xxh3_64(u32le(token)... || u64le(item)..., seed), of one block alone
    sequence(i)  xxh3_64(u64le(sequence(i-1)) || u64le(local(i)), 1337); sequence(0) = local(0)
    key(i)       the low 60 bits of sequence(i), which Python holds in 32 bytes

`seed` is 1337, plus xxh3_64(LoRA's name, 0) and xxh3_64(salt, 1) where there are such. An `item` is a number
of each of the block's media, in ascending order, wherever in the block it begins. There is no secret: a
collision costs a wrong hint. The keys name no data.
"""

import re
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, lru_cache
from types import NoneType
from typing import Final

from kvstore.engine_hashes import Extra, MediaItem, block_extras, little_endian
from kvstore.errors import InvalidRequest
from kvstore.tokens import TOKEN_MAX, token_array

KEY_MASK: Final = (1 << 60) - 1
_SEED: Final = 1337
_U64_MAX: Final = (1 << 64) - 1
_TOKEN_BYTES: Final = 4
_LINK: Final = struct.Struct("<QQ")
# How vLLM identifies media; of a digest Dynamo takes the first 64 bits.
_DIGEST: Final = re.compile(r"([0-9a-fA-F]{16})[0-9a-fA-F]{48}")


def content_keys(
    tokens: Sequence[int],
    block_tokens: int,
    *,
    lora: str = "",
    salt: str = "",
    media: Sequence[MediaItem] = (),
    eagle: bool = False,
) -> list[int]:
    """Return the keys of a prompt's complete blocks in our own chain.

    With EAGLE (`eagle`) a block holds the token after it as well, so the last token of a prompt ends none.

    Raises:
        InvalidRequest: a token is out of range.
    """
    hashes = local_hashes(tokens, block_tokens, lora=lora, salt=salt, media=media, eagle=eagle)
    return [sequence & KEY_MASK for sequence in sequence_hashes(None, hashes)]


def local_hashes(
    tokens: Sequence[int],
    block_tokens: int,
    *,
    lora: str = "",
    salt: str = "",
    media: Sequence[MediaItem] = (),
    eagle: bool = False,
) -> list[int]:
    """Return the hash of each complete block of a prompt alone, whatever precedes it.

    Raises:
        InvalidRequest: a token is out of range.
    """
    data, width = little_endian(token_array(tokens)), _width(block_tokens)
    extras = block_extras(len(data) // width, block_tokens, (), "", media) if media else ()
    return _hashes(data, width, eagle, extras, lora, salt)


def event_hashes(
    tokens: Sequence[int], block_tokens: int, extras: Sequence[Extra] = (), *, lora: str = "", salt: str = ""
) -> list[int]:
    """Return `local_hashes` of blocks that an engine announces.

    `tokens` may be pairs, as SGLang with EAGLE publishes them. `extras` are `event_extras` of the first of
    these blocks; `lora` and `salt` those of blocks whose extras name none.

    Raises:
        InvalidRequest: a token is out of range, or the package xxhash is not installed.
    """
    in_pairs = len(tokens) > 0 and isinstance(tokens[0], (list, tuple))
    ids = token_array(list(_window(tokens)) if in_pairs else tokens)
    return _hashes(little_endian(ids), _width(block_tokens), in_pairs, extras, lora, salt)


def sequence_hashes(parent: int | None, hashes: Iterable[int]) -> list[int]:
    """Return the hashes, of 64 bits, of the prefixes that end with the blocks of these local hashes.

    The first block follows the prefix whose hash is `parent`; with None it begins a prompt.
    """
    new, pack = _xxh3_64(), _LINK.pack
    sequence, sequences = parent, []
    for local in hashes:
        sequence = local if sequence is None else new(pack(sequence, local), _SEED)
        sequences.append(sequence)
    return sequences


def event_extras(lora_name: object, cache_salt: object, extra_keys: object, first: bool) -> Extra:
    """Return what a block that an engine announces holds beside its tokens, as `block_extras` has it.

    `lora_name` and `cache_salt` are the event's fields of these names, `extra_keys` what vLLM's event has
    for this block: the adapter's name, (identifier, offset) of media, the salt on a prompt's first block
    (`first`), a digest of embeddings, without a word that says which is which.

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
    return (*tagged, *([("cache_salt", salt)] if salt else []), *digests) or None


def salt_of(extra: Extra) -> str:
    """Return the salt that a block's extras name; empty for none."""
    return next((str(word[1]) for word in extra or () if word[0] == "cache_salt"), "")


def _hashes(
    data: bytes, stride: int, overlap: bool, extras: Sequence[Extra], lora: str, salt: str
) -> list[int]:
    """The local hashes; blocks that `overlap` hold the first token of the next as well."""
    new, seed = _xxh3_64(), _seed(lora, salt)
    width = stride + (_TOKEN_BYTES if overlap else 0)
    starts = range(0, len(data) - width + 1, stride)
    hashes = []
    for start, extra in zip(starts, extras, strict=False):
        items, own_seed = _beside(extra, lora, salt)
        hashes.append(new(data[start : start + width] + items, own_seed))
    return hashes + [new(data[start : start + width], seed) for start in starts[len(hashes) :]]


def _beside(extra: Extra, lora: str, salt: str) -> tuple[bytes, int]:
    """What is hashed after a block's tokens, and the seed."""
    items = []
    for word, value, *_ in extra or ():
        match word, value:
            case "lora", str():
                lora = value
            case "cache_salt", str():
                salt = value
            case _, str():
                items.append(_media_number(value))
            case _, bytes():
                items.append(_xxh3_64()(value))
    return struct.pack(f"<{len(items)}Q", *sorted(items)), _seed(lora, salt)


@lru_cache(maxsize=1024)
def _seed(lora: str, salt: str) -> int:
    new = _xxh3_64()
    seed = _SEED + (new(_utf8(lora), 0) if lora else 0) + (new(_utf8(salt), 1) if salt else 0)
    return seed & _U64_MAX


def _media_number(identifier: str) -> int:
    digest = _DIGEST.fullmatch(identifier)
    return int(digest[1], 16) if digest else _xxh3_64()(_utf8(identifier))


@cache
def _xxh3_64() -> Callable[..., int]:
    try:
        from xxhash import xxh3_64_intdigest
    except ImportError:
        raise InvalidRequest('scheme "tokens" needs the package xxhash; install it') from None
    return xxh3_64_intdigest


def _width(block_tokens: int) -> int:
    """The bytes of a block's tokens."""
    if block_tokens < 1:
        raise InvalidRequest(f"block_tokens is {block_tokens}; give at least 1")
    return block_tokens * _TOKEN_BYTES


def _utf8(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


def _text(name: str, value: object) -> str:
    if not isinstance(value, (str, NoneType)):
        raise InvalidRequest(f"{name} is {value!r:.40}; give a string or nothing")
    return value or ""


def _window(pairs: Sequence[object]) -> Iterator[int]:
    """The tokens that these pairs of a token and the next are made of."""
    after: list[int] = []
    for position, pair in enumerate(pairs):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise InvalidRequest(f"token {position} is {pair!r:.40}; give a pair, as the first is one")
        yield pair[0]
        after = [pair[1]]
    yield from after
