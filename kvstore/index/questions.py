"""What routers ask again and again: where a prompt is looked for, found once for many lookups. Pure.

Keys come packed, end to end, and are made into the index's own only where somebody looks at them: a lookup
that bisects touches a few.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, overload

import numpy as np

from kvstore.block import KEY_BYTES_MAX, Namespace
from kvstore.content_keys import KEY_MASK
from kvstore.errors import InvalidRequest
from kvstore.index.compact import Compact, Groups
from kvstore.index.keytable import Key
from kvstore.index.locality import Locality
from kvstore.index.masks import SLOT_BITS
from kvstore.index.query import Query, are_numbers, keys_of, search_of

_NUMBER_BYTES: Final = 8
_DIGEST_BYTES_MAX: Final = 32
# Tokens times ways of hashing them: more takes too long beside other lookups.
_EFFORT_MAX: Final = 1 << 15
_ALL_MEDIA: Final = (1 << SLOT_BITS) - 1


class Question:
    """What is asked, but for the prompt. `engines` are addresses, or names of ranks; None: all there are.

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
        self._spaces: Sequence[Namespace] = ()
        self._spaces_at = self._wanted_at = -1
        self._wanted = 0

    def find(self, compact: Compact, locality: Locality, keys: bytes, width: int) -> Groups:
        """Which engines have how much of the prompt whose keys these are, each `width` bytes long.

        Raises:
            InvalidRequest: they are none.
        """
        if self._by_tokens.lora:
            raise InvalidRequest("lora beside keys, which hold it; give tokens, or keys alone")
        packed = _packed(keys, width, self._are_numbers)
        if self._spaces_at != locality.namespace_changes:
            self._spaces = search_of(self._by_keys, locality).spaces
            self._spaces_at = locality.namespace_changes
        return self._chosen(compact.groups(dict.fromkeys(self._spaces, packed)), locality)

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
        return self._chosen(compact.groups(keys_of(query, search.spaces)), locality)

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


class _Packed(Sequence[Key]):
    """Keys of equal length, each made when it is looked at."""

    def __init__(self, joined: bytes, width: int) -> None:
        self._joined = joined
        self._width = width
        self._count = len(joined) // width

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Key]:
        width = self._width
        return iter([self._joined[at : at + width] for at in range(0, len(self._joined), width)])

    @overload
    def __getitem__(self, place: int) -> Key: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Key]: ...
    def __getitem__(self, place: int | slice) -> Key | Sequence[Key]:
        if isinstance(place, slice):
            return list(self)[place]
        at = (place if place >= 0 else place + self._count) * self._width
        return self._joined[at : at + self._width]


class _Numbers(_Packed):
    """The same for numbers of 64 bits, of which the index has the lower ones."""

    def __init__(self, joined: bytes) -> None:
        super().__init__(joined, _NUMBER_BYTES)
        self._numbers = memoryview(joined).cast("Q")

    def __iter__(self) -> Iterator[Key]:
        return iter((np.frombuffer(self._joined, np.uint64) & KEY_MASK).data)

    def __getitem__(self, place: int | slice) -> Any:
        if isinstance(place, slice):
            return list(self)[place]
        return self._numbers[place] & KEY_MASK


def _packed(joined: bytes, width: int, are_numbers: bool) -> Sequence[Key]:
    """The keys as the index has them."""
    if not 1 <= width <= KEY_BYTES_MAX or len(joined) % width:
        raise InvalidRequest(
            f"{len(joined)} bytes of keys of {width} bytes; give whole keys of 1 to {KEY_BYTES_MAX} bytes"
        )
    if not are_numbers:
        return _Packed(joined, width)
    if width == _NUMBER_BYTES:
        return _Numbers(joined)
    if not _NUMBER_BYTES < width <= _DIGEST_BYTES_MAX:
        raise InvalidRequest(f"keys of {width} bytes where keys are numbers; give 8, or digests of 9 to 32")
    ends = np.frombuffer(joined, np.uint8).reshape(-1, width)[:, -_NUMBER_BYTES:]
    return _Numbers(np.ascontiguousarray(ends[:, ::-1]).tobytes())
