"""The messages between a router and the index: their shapes. `kvstore.protocol` frames them.

A connection begins as a daemon's does, with Hello, whose `mark` says which of the known tokens it has, and
Proof where one is wanted; the answer is `LookupWelcome`. A question is named once. Then lookups name it, and
their payload is a prompt:

    keys      end to end, `width` bytes each; in schemes whose keys are numbers 8 bytes are a number, little
              endian, and 9 to 32 bytes a digest
    tokens    ids of 4 bytes each, little endian

The answer is in groups of engines, by numbers; their names travel only when the generation is another one.
"""

from collections.abc import Callable
from typing import Final

import msgspec

from kvstore.block import KEY_BYTES_MAX
from kvstore.errors import ProtocolError
from kvstore.messages import Challenge as Challenge
from kvstore.messages import Failure as Failure
from kvstore.messages import Hello, Message, Proof
from kvstore.protocol import HEADER

KEYS_MAX: Final = 1 << 16
# Longer prompts take too long to hash beside other lookups: HTTP has a thread for those.
TOKENS_MAX: Final = 1 << 15
# Questions that a connection has named, those named last; and engines that one of them may name.
QUESTIONS_MAX: Final = 4096
ENGINES_MAX: Final = 8192
# Before a connection is welcome it may send only so much, and then what names a question's engines.
HELLO_BYTES_MAX: Final = 64 << 10
BODY_BYTES_MAX: Final = 4 << 20
PAYLOAD_BYTES_MAX: Final = KEYS_MAX * KEY_BYTES_MAX

# Requests, beside Hello and Proof.


class NameQuestion(Message, tag=40):
    """Whose prompt it is: see `kvstore.index.query.Query`. Of `engines` alone, or of all."""

    model: str
    salt: str = ""
    lora: str = ""
    fields: dict[str, str | int] = msgspec.field(default_factory=dict)
    engines: list[str] | None = None


class Find(Message, tag=41):
    """Who has the prompt whose keys are the payload."""

    question: int
    width: int = 8


class FindTokens(Message, tag=42):
    """Who has the prompt whose tokens are the payload; for questions without fields."""

    question: int


class ListEngines(Message, tag=43):
    """Which names the engines have whose numbers answers have."""


# Answers, beside Challenge and Failure.


class LookupWelcome(Message, tag=120):
    """The connection stands."""

    major: int
    minor: int
    keys_max: int
    tokens_max: int
    questions_max: int


class Named(Message, tag=121):
    question: int


class Found(Message, tag=122):
    """Groups, most tokens first. Nothing here is an estimate: leading tokens that need not be computed.

    Of each group: `tokens`, the number of the engine it begins with, and as little-endian bytes four bits for
    each engine from there on, one for each medium, fastest first. An engine has of a medium, or a faster one,
    what the only group says that has its bit. `age_ms` is the age of the oldest knowledge that lookups use.
    """

    generation: int
    age_ms: float
    tokens: list[int]
    firsts: list[int]
    engines: list[bytes]


class Engines(Message, tag=123):
    generation: int
    names: list[str]


Request = Hello | Proof | NameQuestion | Find | FindTokens | ListEngines
Answer = Failure | Challenge | LookupWelcome | Named | Found | Engines

_encode = msgspec.msgpack.Encoder().encode
_decode_request: Callable[[bytes | memoryview], Request] = msgspec.msgpack.Decoder(Request).decode
_decode_answer: Callable[[bytes | memoryview], Answer] = msgspec.msgpack.Decoder(Answer).decode


def frame(request_id: int, message: Request | Answer, payload: bytes | memoryview = b"") -> bytes:
    """Header, body and payload."""
    body = _encode(message)
    return b"".join((HEADER.pack(len(body), request_id, len(payload)), body, payload))


def decode_request(body: bytes | memoryview) -> Request:
    """Raises ProtocolError when the body is no request."""
    try:
        return _decode_request(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ProtocolError(f"no request of an index: {exc}") from None


def decode_answer(body: bytes | memoryview) -> Answer:
    """Raises ProtocolError when the body is no answer."""
    try:
        return _decode_answer(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ProtocolError(f"no answer of an index: {exc}") from None
