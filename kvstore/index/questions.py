"""What routers ask again and again: where a prompt is looked for, found once for many lookups. Pure."""

from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from sys import getsizeof
from typing import Any, Final

from kvstore.block import Namespace
from kvstore.errors import InvalidRequest
from kvstore.index.compact import Compact, Groups
from kvstore.index.keytable import Key
from kvstore.index.locality import Locality
from kvstore.index.masks import SLOT_BITS
from kvstore.index.packed import packed
from kvstore.index.query import Query, are_numbers, keys_of, search_of
from kvstore.index.searching import search

# Tokens times ways of hashing them: more takes too long beside other lookups.
_EFFORT_MAX: Final = 1 << 15
_ALL_MEDIA: Final = (1 << SLOT_BITS) - 1


class Question:
    """What is asked, but for the prompt. `engines` are addresses, or names of ranks; None: all there are.

    `names_bytes` is the memory that their names take.

    Raises:
        InvalidRequest: a value is out of its limits.
    """

    def __init__(
        self,
        model: str,
        *,
        salt: str = "",
        lora: str = "",
        fields: Mapping[str, Any] | None = None,
        engines: Iterable[str] | None = None,
    ) -> None:
        self._by_keys = Query(model, keys=(), fields=fields or {}, salt=salt)
        self._by_tokens = Query(model, tokens=(), salt=salt, lora=lora)
        self._are_numbers = are_numbers(str(self._by_keys.fields.get("scheme", "")))
        self._names = None if engines is None else set(engines)
        self.names_bytes = _bytes_of(self._names or ())
        self._spaces: Sequence[Namespace] = ()
        self._spaces_at = self._wanted_at = -1
        self._wanted = 0

    def find(self, compact: Compact, locality: Locality, keys: bytes, width: int) -> Groups:
        """Which engines have how much of the prompt whose keys, of `width` bytes each, these are.

        Raises:
            InvalidRequest: they are none.
        """
        return self._found(compact, locality, self._wanted_keys(locality, keys, width))

    def find_in_steps(
        self, compact: Compact, locality: Locality, keys: bytes, width: int
    ) -> Generator[None, None, Groups]:
        """The same for many keys; others may act between steps."""
        found = yield from search(locality, self._wanted_keys(locality, keys, width))
        return self._chosen(compact.groups(found), locality)

    def find_tokens(self, compact: Compact, locality: Locality, tokens: bytes) -> Groups:
        """Which engines have how much of the prompt whose tokens these are, 4 bytes each.

        Raises:
            InvalidRequest: they are none, or to hash them takes too long.
        """
        if self._by_keys.fields or len(tokens) % 4:
            raise InvalidRequest(
                f"{len(tokens)} bytes of tokens; give 4 for each, and a question without a namespace"
            )
        query = replace(self._by_tokens, tokens=memoryview(tokens).cast("I"))
        search = search_of(query, locality)
        effort = search.effort(len(tokens) // 4)
        if effort > _EFFORT_MAX:
            raise InvalidRequest(
                f"{len(tokens) // 4} tokens take as long as {effort} to hash, in several ways; the limit is "
                f"{_EFFORT_MAX}: ask over HTTP, or by keys"
            )
        return self._found(compact, locality, keys_of(query, search.spaces))

    def _wanted_keys(self, locality: Locality, keys: bytes, width: int) -> dict[Namespace, Sequence[Key]]:
        if self._by_tokens.lora:
            raise InvalidRequest("lora beside keys, which hold it; give tokens, or keys alone")
        made = packed(keys, width, are_numbers=self._are_numbers)
        if self._spaces_at != locality.namespace_changes:
            self._spaces = search_of(self._by_keys, locality).spaces
            self._spaces_at = locality.namespace_changes
        return dict.fromkeys(self._spaces, made)

    def _found(self, compact: Compact, locality: Locality, keys: Mapping[Namespace, Sequence[Key]]) -> Groups:
        found = {space: locality.depths(space, each) for space, each in keys.items()}
        return self._chosen(compact.groups(found), locality)

    def _chosen(self, groups: Groups, locality: Locality) -> Groups:
        """Of these engines alone."""
        if self._names is None:
            return groups
        if self._wanted_at != locality.holder_changes:
            self._wanted = self._bits(locality, self._names)
            self._wanted_at = locality.holder_changes
        return [(tokens, bits & self._wanted) for tokens, bits in groups if bits & self._wanted]

    def _bits(self, locality: Locality, names: set[str]) -> int:
        bits = 0
        for number, engine in enumerate(locality.engines):
            if not names.isdisjoint({engine.name, engine.name.partition("#")[0]}):
                bits |= _ALL_MEDIA << SLOT_BITS * number
        return bits


def _bytes_of(names: Collection[str]) -> int:
    return getsizeof(names) + sum(map(getsizeof, names))
