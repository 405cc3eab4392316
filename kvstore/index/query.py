"""What is asked of the index: a prompt, and which of its keys are looked for in which namespaces. Pure.

Salts keep tenants apart, whichever publisher a block is from. A salted prompt is looked for in namespaces of
its salt, and in those without one where the salt is in the keys; an unsalted one in those without one alone.
A LoRA adapter counts wherever keys can tell of it, and nothing is found elsewhere.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from heapq import nlargest
from typing import Any, Final

from kvstore.block import NAMESPACE_FIELD_CHARS_MAX, Namespace, check_keys
from kvstore.engine_hashes import MediaItem
from kvstore.engine_keys import keys_for, scheme_holds_salt
from kvstore.errors import InvalidRequest
from kvstore.index.holding import set_of
from kvstore.index.keytable import Key
from kvstore.index.locality import Locality
from kvstore.index.packed import numbers

logger = logging.getLogger(__name__)

TOKENS_MAX: Final = 1 << 20
KEYS_MAX: Final = 1 << 16
MEDIA_MAX: Final = 4096
# Namespaces that one prompt is looked for in, and ways of making keys there: schemes with block sizes.
SPACES_MAX: Final = 32
WAYS_MAX: Final = 16
_FIELDS: Final = frozenset(knob.name for knob in fields(Namespace)) - {"model", "salt"}
# Schemes whose keys the index has as numbers, beside vLLM's.
_NUMBERED: Final = frozenset({"sglang", "sglang-eagle", "tokens", "tokens-eagle"})
# What schemes begin with that keys may be made in.
_MADE: Final = ("vllm-", "sglang", "tokens", "lmcache-")
# Making a key takes about as long as reading so many tokens.
_KEY_TOKENS: Final = 16
_Way = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Query:
    """A prompt, by its tokens or by keys that somebody has made of them, which hold LoRA and media.

    Keys are numbers or digests as engines publish them, or whatever bytes the store's users take. They are
    looked for in namespaces that have the values of `fields`; without a `scheme` there, in those that have
    none. A `shard` there stands for all shards of its set.

    Raises:
        InvalidRequest: a value is out of its limits, or does not go with another.
    """

    model: str
    tokens: Sequence[int] | None = None
    keys: Sequence[int] | Sequence[bytes] | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    salt: str = ""
    lora: str = ""
    media: Sequence[MediaItem] = ()

    def __post_init__(self) -> None:
        _check_length("model", self.model)
        _check_length("salt", self.salt)
        _check_length("lora", self.lora)
        if not self.model:
            raise InvalidRequest("model is empty; give the model's name")
        if (self.tokens is None) == (self.keys is None):
            raise InvalidRequest("a lookup needs tokens or keys; give one of them")
        if self.tokens is not None and len(self.tokens) > TOKENS_MAX:
            raise InvalidRequest(f"{len(self.tokens)} tokens; give at most {TOKENS_MAX}")
        if len(self.media) > MEDIA_MAX:
            raise InvalidRequest(f"{len(self.media)} media; give at most {MEDIA_MAX}")
        if self.keys is not None:
            self._check_keys(self.keys)
        elif self.fields:
            raise InvalidRequest("a namespace without keys; give keys, or the model alone with tokens")

    def _check_keys(self, keys: Sequence[int] | Sequence[bytes]) -> None:
        if len(keys) > KEYS_MAX:
            raise InvalidRequest(f"{len(keys)} keys; give at most {KEYS_MAX}")
        if self.lora or self.media:
            raise InvalidRequest("lora and media beside keys, which hold them; give tokens, or keys alone")
        unknown = sorted(self.fields.keys() - _FIELDS)
        if unknown:
            known = ", ".join(sorted(_FIELDS))
            raise InvalidRequest(f"a namespace has no field {unknown[0]!r:.40}; give some of {known}")
        Namespace(self.model, **self.fields)  # which checks them


@dataclass(frozen=True, slots=True)
class Search:
    """The namespaces that a prompt is looked for in; `left_out` counts those that there was no room for."""

    spaces: Sequence[Namespace]
    left_out: int = 0

    def effort(self, tokens: int) -> int:
        """What the time for the keys of so many tokens grows with, in tokens."""
        ways = set(map(_way, self.spaces))
        return sum([tokens * max(1, _KEY_TOKENS // block_tokens) for _, block_tokens in ways])


def search_of(query: Query, locality: Locality) -> Search:
    """Where to look for the prompt, of the namespaces of which somebody has blocks.

    Whoever publishes in very many must not hold lookups up: where there are too many, those with most blocks
    are looked in.
    """
    spaces = list(locality.namespaces(query.model, query.salt))
    if query.salt:
        spaces += filter(scheme_holds_salt, locality.namespaces(query.model, ""))
    if query.keys is not None:
        spaces = _wanted(query, spaces)
    elif len(spaces) > WAYS_MAX:
        spaces = [space for space in spaces if space.scheme.startswith(_MADE)]
    if len(spaces) <= WAYS_MAX:
        return Search(spaces)
    kept = _fullest(spaces, locality)
    if len(kept) < len(spaces):
        _say_many(query.model)
    return Search(kept, len(spaces) - len(kept))


def _wanted(query: Query, spaces: Iterable[Namespace]) -> list[Namespace]:
    """Those that have the values that were given."""
    wanted = {"scheme": "", **query.fields}
    if "shard" in wanted:
        wanted["shard"] = set_of(Namespace(query.model, shard=wanted["shard"])).shard
    return [space for space in spaces if all(getattr(space, name) == value for name, value in wanted.items())]


def _fullest(spaces: Iterable[Namespace], locality: Locality) -> list[Namespace]:
    """Those with most blocks, within both limits."""
    fullest = nlargest(SPACES_MAX, spaces, key=locality.blocks_of)
    ways = set(list(dict.fromkeys(map(_way, fullest)))[:WAYS_MAX])
    return [space for space in fullest if _way(space) in ways]


def _way(space: Namespace) -> _Way:
    """How keys are made there."""
    return space.scheme, space.block_tokens


def keys_of(query: Query, spaces: Iterable[Namespace]) -> dict[Namespace, Sequence[Key]]:
    """The prompt's keys in each namespace that it has some in. Safe in any thread.

    A namespace whose keys cannot be made here is left out: somebody's odd scheme must not end all lookups.

    Raises:
        InvalidRequest: a key is none.
    """
    if query.keys is not None:
        return dict.fromkeys(spaces, _given(str(query.fields.get("scheme", "")), query.keys))
    made: dict[_Way, Sequence[Key]] = {}
    for space in spaces:
        way = _way(space)
        if way not in made:
            made[way] = _made(query, space)
    return {space: keys for space in spaces if (keys := made[_way(space)])}


def _made(query: Query, space: Namespace) -> Sequence[Key]:
    assert query.tokens is not None
    keys: Sequence[Key] | None
    reason = "its seed or its scheme is not known here"
    try:
        keys = keys_for(space, query.tokens, lora=query.lora, salt=query.salt, media=query.media)
    except InvalidRequest as error:  # as of a hash that is not installed
        keys, reason = None, str(error)
    if keys is None and not query.lora:
        _say_unknown(space.scheme, space.model, reason)
    return keys or ()


def are_numbers(scheme: str) -> bool:
    """Whether the index has keys of a scheme as numbers, and not as the bytes that they are."""
    return scheme.startswith("vllm-") or scheme in _NUMBERED


@lru_cache(1024)
def _say_many(model: str) -> None:
    logger.warning(
        "%s: too many namespaces; a prompt is looked for in %d of them at most, with %d schemes and block "
        "sizes, in which most blocks are",
        model,
        SPACES_MAX,
        WAYS_MAX,
    )


@lru_cache(1024)
def _say_unknown(scheme: str, model: str, reason: str) -> None:
    logger.warning("%s, scheme %r: nothing is found there by tokens: %s", model, scheme, reason)


def _given(scheme: str, keys: Sequence[int] | Sequence[bytes]) -> Sequence[Key]:
    if are_numbers(scheme):
        return numbers(keys)
    check_keys(keys)  # type: ignore[arg-type]
    return keys


def _check_length(name: str, value: str) -> None:
    if len(value) > NAMESPACE_FIELD_CHARS_MAX:
        raise InvalidRequest(
            f"{name} is {value[:40]!r}...; give at most {NAMESPACE_FIELD_CHARS_MAX} characters"
        )
