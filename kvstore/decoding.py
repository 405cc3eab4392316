"""JSON of a request as a value: what is wrong with it in a sentence, and long lists in slices.

Decoding a million tokens takes 75 ms, in which a thread would hold the interpreter as well. So long lists of
long bodies are cut out and decoded in slices, between turns of the loop; of token ids there are then 4 bytes
each, and no objects that somebody has to free. What is not in such lists must be short.
"""

import asyncio
import re
import secrets
from array import array
from collections.abc import Iterator, MutableSequence
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Final, Generic, TypeVar, Union, get_args, get_origin

import msgspec

from kvstore.errors import InvalidRequest

# Bodies up to this are decoded at once, which takes 1.5 ms; lists longer than a slice are cut out of others.
LONG_BYTES: Final = 256 << 10
# What cannot be decoded in slices: 20 ms of small objects, in which the loop would wait for a thread.
WHOLE_BYTES_MAX: Final = 1 << 20
# 0.3 ms of numbers.
_SLICE_BYTES: Final = 32 << 10
# Lists that are looked at in one body, in 2 ms; those after them are not cut out.
_LISTS_MAX: Final = 4096
# Stands where a list was cut out: a list of two numbers, of which nobody knows the first.
_NONCE: Final = secrets.randbits(63)
_PATH: Final = re.compile(r"`\$((?:\.\w+|\[\d+\])+)`$")
_STEP: Final = re.compile(r"\.(\w+)|\[(\d+)\]")
_ITEM: Final = re.compile(r"`\$\[(\d+)\]")

Q = TypeVar("Q")
_Span = tuple[int, int]


class NotJson(ValueError):
    """A body is no JSON, or no UTF-8."""


class _Unsliceable(ValueError):
    """A list cannot be decoded in slices; it may be one all the same."""


@dataclass(frozen=True, slots=True)
class _List:
    """How a field's list is decoded; `small`: its items are numbers of 32 bits; `items_max`: or None."""

    name: str
    decoder: msgspec.json.Decoder[list[Any]]
    small: bool
    items_max: int | None


class RequestDecoder(Generic[Q]):
    """Decodes one type of requests, a Struct."""

    def __init__(self, request: type[Q]) -> None:
        self._decoder = msgspec.json.Decoder(request)
        self._lists = dict(_lists_of(request))
        self._finder = msgspec.json.Decoder(_lists_alone(self._lists))

    async def decode(self, body: bytes) -> Q:
        """The request.

        Raises:
            NotJson, InvalidRequest: it is none, or none that can be decoded in slices.
        """
        if len(body) <= LONG_BYTES:
            return self._whole(body)
        try:
            return await self._sliced(body)
        except _Unsliceable:
            _check_short(len(body), len(body))
            return await self._aside(body, len(body))

    async def _sliced(self, body: bytes) -> Q:
        cut = self._cut(body)
        rest = _without(body, list(cut), [b"[]"] * len(cut))
        _check_short(len(rest), len(body))
        if len(rest) <= LONG_BYTES:
            request = self._whole(rest, len(body))
        else:
            request = await self._aside(rest, len(body))
        for span, each in cut.items():
            items = await _items(body, span, each)
            msgspec.structs.force_setattr(request, each.name, items)  # type: ignore[arg-type]
        return request

    def _cut(self, body: bytes) -> dict[_Span, _List]:
        """Lists that can be decoded by themselves, in their order."""
        spans = list(_long_lists(body))
        marked = _without(body, spans, [b"[%d,%d]" % (_NONCE, number) for number in range(len(spans))])
        if not spans or len(marked) > WHOLE_BYTES_MAX:
            return {}
        try:
            found = self._finder.decode(marked)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return {}
        numbers = {b"[%d,%d]" % (_NONCE, number): number for number in range(len(spans))}
        fields = {numbers.get(bytes(getattr(found, each.name))): each for each in self._lists.values()}
        return {span: fields[number] for number, span in enumerate(spans) if number in fields}

    async def _aside(self, rest: bytes, nbytes: int) -> Q:
        return await asyncio.get_running_loop().run_in_executor(None, self._whole, rest, nbytes)

    def _whole(self, rest: bytes, nbytes: int | None = None) -> Q:
        """What is left of a body of `nbytes`."""
        nbytes = len(rest) if nbytes is None else nbytes
        try:
            return self._decoder.decode(rest)
        except msgspec.ValidationError as exc:
            raise InvalidRequest(_refused(nbytes, f"{exc}{_value_at(str(exc), rest)}")) from exc
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            counted = "" if nbytes == len(rest) else "; bytes of long lists are not counted"
            raise NotJson(f"{_not_json(nbytes)}: {exc}{counted}") from exc


async def _items(body: bytes, span: _Span, each: _List) -> MutableSequence[Any]:
    """What a list holds.

    Raises:
        InvalidRequest, NotJson: an item is none.
        _Unsliceable: there may be a comma in an item.
    """
    items: MutableSequence[Any] = array("I") if each.small else []
    at, end = span[0] + 1, span[1]
    while True:
        cut = end if end - at <= _SLICE_BYTES else body.rfind(b",", at, at + _SLICE_BYTES)
        if cut < 0:
            raise _Unsliceable
        _extend(items, body[at:cut], each, len(body))
        if each.items_max is not None and len(items) > each.items_max:
            count = len(items) + body.count(b",", cut, end)
            raise InvalidRequest(f"{count} {each.name}; give at most {each.items_max}")
        if cut == end:
            return items
        at = cut + 1
        await asyncio.sleep(0)


def _extend(items: MutableSequence[Any], piece: bytes, each: _List, nbytes: int) -> None:
    try:
        some = each.decoder.decode(b"[%b]" % piece)
    except msgspec.ValidationError as exc:
        text = _in_list(str(exc), each.name, len(items)) + _value_at(str(exc), b"[%b]" % piece)
        raise InvalidRequest(_refused(nbytes, text)) from exc
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        if b'"' in piece:
            raise _Unsliceable from exc
        raise NotJson(f"{_not_json(nbytes)}: after item {len(items)} of `$.{each.name}`: {exc}") from exc
    if not some:
        raise NotJson(f"{_not_json(nbytes)}: item {len(items)} of `$.{each.name}` is missing")
    items.extend(some)


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


def _check_short(nbytes: int, of_nbytes: int) -> None:
    """Raise InvalidRequest where what cannot be decoded in slices is long."""
    if nbytes > WHOLE_BYTES_MAX:
        raise InvalidRequest(
            f"a body of {of_nbytes} bytes, of which {nbytes} are not in long lists of numbers or plain "
            f"strings; give at most {WHOLE_BYTES_MAX} beside them"
        )


def _not_json(nbytes: int) -> str:
    return f"a body of {nbytes} bytes that is no JSON"


def _refused(nbytes: int, why: str) -> str:
    return f"a body of {nbytes} bytes that is no such request: {why}"


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
    """Fields that are lists of numbers or strings, by their names in JSON."""
    for field in msgspec.structs.fields(request):
        hint = _list_in(field.type)
        if hint is not None and _is_flat(hint):
            decoder = msgspec.json.Decoder(hint)
            yield field.encode_name, _List(field.name, decoder, _is_small(hint), _items_max(field.type))


def _lists_alone(lists: dict[str, _List]) -> type[msgspec.Struct]:
    """A request of which nothing but these is looked at, and nothing is checked."""
    fields = [(each.name, msgspec.Raw, msgspec.Raw(b"")) for each in lists.values()]
    return msgspec.defstruct("Lists", fields, rename={each.name: name for name, each in lists.items()})


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


def _items_max(hint: Any) -> int | None:
    """How many items the document says that there may be."""
    inner = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return next((most for each in inner if (most := _items_max(each)) is not None), None)
    schemas = [each.extra_json_schema or {} for each in inner[1:] if isinstance(each, msgspec.Meta)]
    return next((schema["maxItems"] for schema in schemas if "maxItems" in schema), None)


def _is_flat(hint: Any) -> bool:
    """Whether no item has commas of its own, but in strings."""
    (item,) = get_args(hint)
    if get_origin(item) is Annotated:
        item = get_args(item)[0]
    kinds = get_args(item) if get_origin(item) in (Union, UnionType) else (item,)
    return set(kinds) <= {int, float, str, bool}


def _is_small(hint: Any) -> bool:
    """Whether all items fit into 32 bits."""
    item = get_args(hint)[0]
    limits = [each for each in get_args(item)[1:] if isinstance(each, msgspec.Meta)]
    fits = any(each.ge == 0 and each.le is not None and each.le < 1 << 32 for each in limits)
    return fits and get_args(item)[0] is int
