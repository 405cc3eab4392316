"""Keys end to end in one piece of memory, each made when it is looked at: to bisect takes a few. Pure."""

import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, Final, overload

import numpy as np

from kvstore.block import KEY_BYTES_MAX
from kvstore.content_keys import KEY_MASK
from kvstore.engine_keys import engine_keys
from kvstore.errors import InvalidRequest
from kvstore.index.keytable import Key

_NUMBER_BYTES: Final = 8
_DIGEST_BYTES_MAX: Final = 32


def packed(joined: bytes, width: int, *, are_numbers: bool) -> Sequence[Key]:
    """Keys of `width` bytes, as the index has them: numbers of 64 bits, or digests of such, or bytes.

    Raises:
        InvalidRequest: they are none.
    """
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


def numbers(published: Sequence[int | bytes]) -> Sequence[Key]:
    """What `engine_keys` makes of what engines publish; of numbers that are all signed, or all not, sooner.

    Raises:
        InvalidRequest: one is none.
    """
    for each in "Qq":
        with suppress(struct.error):
            return _Numbers(struct.pack(f"{len(published)}{each}", *published))
    return engine_keys(published)


class _Packed(Sequence[Key]):
    """Keys of equal length."""

    def __init__(self, joined: bytes, width: int) -> None:
        self._joined = joined
        self._width = width
        self._count = len(joined) // width

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Key]:
        width = self._width
        return iter([self._joined[at : at + width] for at in range(0, len(self._joined), width)])

    def __reversed__(self) -> Iterator[Key]:
        return reversed(list(self))

    @overload
    def __getitem__(self, place: int) -> Key: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Key]: ...
    def __getitem__(self, place: int | slice) -> Key | Sequence[Key]:
        if isinstance(place, slice):
            return self._part(place)
        at = (place if place >= 0 else place + self._count) * self._width
        return self._joined[at : at + self._width]

    def _part(self, place: slice) -> Sequence[Key]:
        start, stop, step = place.indices(self._count)
        if step != 1:
            return list(self)[place]
        return self._of(self._joined[start * self._width : stop * self._width])

    def _of(self, joined: bytes) -> Sequence[Key]:
        return _Packed(joined, self._width)


class _Numbers(_Packed):
    """The same for numbers of 64 bits, of which the index has the lower ones."""

    def __init__(self, joined: bytes) -> None:
        super().__init__(joined, _NUMBER_BYTES)
        self._numbers = memoryview(joined).cast("Q")

    def __iter__(self) -> Iterator[Key]:
        return iter((np.frombuffer(self._joined, np.uint64) & KEY_MASK).data)

    def __getitem__(self, place: int | slice) -> Any:
        if isinstance(place, slice):
            return self._part(place)
        return self._numbers[place] & KEY_MASK

    def _of(self, joined: bytes) -> Sequence[Key]:
        return _Numbers(joined)
