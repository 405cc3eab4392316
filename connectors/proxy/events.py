"""Server-sent events as engines stream their answers in. Pure: bytes in, events out."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from kvstore.errors import ProtocolError

DONE: Final = b"data: [DONE]\n\n"
# Logarithms of many choices make an event long, but never so long.
EVENT_BYTES_MAX: Final = 4 << 20
_decode: Final = msgspec.json.Decoder().decode


@dataclass(frozen=True, slots=True)
class Event:
    """One event as it came, and what it says: a JSON object, or None of comments and what is none."""

    raw: bytes
    said: dict[str, Any] | None
    is_last: bool = False

    @property
    def error_status(self) -> int | None:
        """Of an event that ends the answer with an error, its status."""
        error = None if self.said is None else self.said.get("error")
        if not isinstance(error, dict):
            return None
        code = error.get("code")
        return code if isinstance(code, int) else 500


class Events:
    """Cuts what comes into events."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[Event]:
        """The events that are complete with these bytes.

        Raises:
            ProtocolError: an event is too long.
        """
        *complete, self._rest = (self._rest + data).replace(b"\r\n", b"\n").split(b"\n\n")
        if len(self._rest) > EVENT_BYTES_MAX:
            raise ProtocolError(f"an event of over {EVENT_BYTES_MAX} bytes; ask for fewer logprobs")
        for raw in complete:
            if raw:
                yield _event(raw)


def event_of(said: Any) -> bytes:
    """An object as an event."""
    return b"data: " + msgspec.json.encode(said) + b"\n\n"


def _event(raw: bytes) -> Event:
    lines = [line[5:].lstrip() for line in raw.split(b"\n") if line.startswith(b"data:")]
    data = b"\n".join(lines).strip()
    if data == b"[DONE]":
        return Event(DONE, None, is_last=True)
    try:
        said = _decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        said = None
    return Event(raw + b"\n\n", said if isinstance(said, dict) else None)
