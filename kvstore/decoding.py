"""JSON of a request as a value: what is wrong with it in a sentence, and long lists in slices.

Decoding a million tokens takes 75 ms, in which a thread would hold the interpreter as well. So long lists of
long bodies are cut out and decoded in slices, between turns of the loop; of token ids there are then 4 bytes
each, and no objects that somebody has to free.
"""

import asyncio
import re
from array import array
from collections.abc import Iterator, MutableSequence
from contextlib import suppress
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Final, Generic, TypeVar, Union, get_args, get_origin

import msgspec

from kvstore.errors import InvalidRequest

# Bodies up to this are decoded at once, which takes 1.5 ms; lists longer than a slice are cut out of others.
LONG_BYTES: Final = 256 << 10
# 0.3 ms of numbers.
_SLICE_BYTES: Final = 32 << 10
# Lists that are looked at in one body; more than these, and none is cut out.
_LISTS_MAX: Final = 256
_PATH: Final = re.compile(r"`\$((?:\.\w+|\[\d+\])+)`$")
_STEP: Final = re.compile(r"\.(\w+)|\[(\d+)\]")
_ITEM: Final = re.compile(r"`\$\[(\d+)\]")

Q = TypeVar("Q")


class NotJson(ValueError):
    """A body is no JSON, or no UTF-8."""


@dataclass(frozen=True, slots=True)
class _List:
    """How a field's list is decoded; `small`: its items are numbers of 32 bits."""

    name: str
    decoder: msgspec.json.Decoder[list[Any]]
    small: bool


class RequestDecoder(Generic[Q]):
    """Decodes one type of requests, a Struct."""

    def __init__(self, request: type[Q]) -> None:
        self._decoder = msgspec.json.Decoder(request)
        self._lists = dict(_lists_of(request))

    async def decode(self, body: bytes) -> Q:
        """The request.

        Raises:
            NotJson, InvalidRequest: it is none.
        """
        if len(body) <= LONG_BYTES:
            return self._whole(body)
        sliced = await self._sliced(body)
        if sliced is not None:
            return sliced
        return await asyncio.get_running_loop().run_in_executor(None, self._whole, body)

    def _whole(self, body: bytes) -> Q:
        try:
            return self._decoder.decode(body)
        except msgspec.ValidationError as exc:
            raise InvalidRequest(_refused(body, f"{exc}{_value_at(str(exc), body)}")) from exc
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise NotJson(f"a body of {len(body)} bytes that is no JSON: {exc}") from exc

    async def _sliced(self, body: bytes) -> Q | None:
        """The request, None where it is none, or not of the shape that can be sliced: to be decoded whole."""
        spans = list(_long_lists(body))
        if not spans:
            return None
        with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            marked = _without(body, spans, [b'["%d"]' % number for number in range(len(spans))])
            fields = msgspec.json.decode(marked, type=dict[str, msgspec.Raw])
            names = {bytes(raw): name for name, raw in fields.items()}
            lists = [self._lists[names[b'["%d"]' % number]] for number in range(len(spans))]
            request = self._decoder.decode(_without(body, spans, [b"[]"] * len(spans)))
            for span, each in zip(spans, lists, strict=True):
                items = await _items(body, span, each)
                if items is None:
                    return None
                msgspec.structs.force_setattr(request, each.name, items)  # type: ignore[arg-type]
            return request
        return None


async def _items(body: bytes, span: tuple[int, int], each: _List) -> MutableSequence[Any] | None:
    """What a list holds; None where it is none.

    Raises:
        InvalidRequest: an item is none.
    """
    items: MutableSequence[Any] = array("I") if each.small else []
    at, end = span[0] + 1, span[1]
    while True:
        cut = end if end - at <= _SLICE_BYTES else body.rfind(b",", at, at + _SLICE_BYTES)
        piece = body[at:cut]
        if cut < 0 or not piece.strip():
            return None
        try:
            items.extend(each.decoder.decode(b"[%b]" % piece))
        except msgspec.ValidationError as exc:
            text = _in_list(str(exc), each.name, len(items)) + _value_at(str(exc), b"[%b]" % piece)
            raise InvalidRequest(_refused(body, text)) from exc
        if cut == end:
            return items
        at = cut + 1
        await asyncio.sleep(0)


def _in_list(message: str, name: str, before: int) -> str:
    """What is said of an item of a slice, of the whole list."""
    return _ITEM.sub(lambda found: f"`$.{name}[{before + int(found[1])}]", message)


def _long_lists(body: bytes) -> Iterator[tuple[int, int]]:
    """Where long lists of no lists begin and end."""
    at = 0
    for _ in range(_LISTS_MAX):
        end = body.find(b"]", at)
        if end < 0:
            return
        begin = body.rfind(b"[", at, end)
        if begin >= 0 and end - begin > _SLICE_BYTES:
            yield begin, end
        at = end + 1


def _without(body: bytes, spans: list[tuple[int, int]], instead: list[bytes]) -> bytes:
    """The body with something else for some lists."""
    pieces, at = [], 0
    for (begin, end), other in zip(spans, instead, strict=True):
        pieces += [body[at:begin], other]
        at = end + 1
    return b"".join([*pieces, body[at:]])


def _refused(body: bytes, why: str) -> str:
    return f"a body of {len(body)} bytes that is no such request: {why}"


def _value_at(message: str, body: bytes) -> str:
    """The value that a message is about, which it names by its path alone."""
    path = _PATH.search(message)
    if path is None or len(body) > LONG_BYTES:
        return ""
    try:
        value = msgspec.json.decode(body)
        for name, number in _STEP.findall(path[1]):
            value = value[name] if name else value[int(number)]
    except (msgspec.DecodeError, LookupError, TypeError, RecursionError):
        return ""
    return f"; it is {value!r:.40}"


def _lists_of(request: Any) -> Iterator[tuple[str, _List]]:
    """Fields that are lists, by their names in JSON."""
    for field in msgspec.structs.fields(request):
        hint = _list_in(field.type)
        if hint is not None:
            yield field.encode_name, _List(field.name, msgspec.json.Decoder(hint), _is_small(hint))


def _list_in(hint: Any) -> Any:
    """The list among what a field may be, or None."""
    if get_origin(hint) is list:
        return hint
    inner: tuple[Any, ...] = ()
    if get_origin(hint) is Annotated:
        inner = get_args(hint)[:1]
    elif get_origin(hint) in (Union, UnionType):
        inner = get_args(hint)
    return next((found for each in inner if (found := _list_in(each)) is not None), None)


def _is_small(hint: Any) -> bool:
    """Whether all items fit into 32 bits."""
    item = get_args(hint)[0]
    limits = [each for each in get_args(item)[1:] if isinstance(each, msgspec.Meta)]
    fits = any(each.ge == 0 and each.le is not None and each.le < 1 << 32 for each in limits)
    return fits and get_args(item)[0] is int
