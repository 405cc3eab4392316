"""What one router has asked over the port for compact lookups, and what it is told. It knows no sockets."""

from collections import OrderedDict
from typing import Final, Protocol

from kvstore import protocol
from kvstore.block import KEY_BYTES_MAX
from kvstore.errors import InvalidRequest, KVStoreError, ProtocolError, Unauthorized, UnknownNamespace
from kvstore.greeting import Greeting
from kvstore.index.compact import Compact, Groups
from kvstore.index.locality import Locality
from kvstore.index.masks import SLOT_BITS
from kvstore.index.questions import Question
from kvstore.lookup_messages import (
    BODY_BYTES_MAX,
    ENGINES_MAX,
    HELLO_BYTES_MAX,
    KEYS_MAX,
    QUESTIONS_MAX,
    TOKENS_MAX,
    Answer,
    Engines,
    Find,
    FindTokens,
    Found,
    ListEngines,
    LookupWelcome,
    Named,
    NameQuestion,
    Request,
    decode_request,
    frame,
)

_TOKEN_BYTES: Final = 4


class Host(Protocol):
    """What a session needs of the server that it belongs to."""

    locality: Locality
    compact: Compact
    lookups: int
    refused: int

    def oldest_ms(self) -> float:
        """The age of the oldest knowledge that lookups use."""

    def generation(self) -> int:
        """Of the numbers that engines have."""

    def leave(self, session: "Session") -> None:
        """The session is over."""


class Session:
    """A connection's. `token` is None where none is wanted; `refusal` is why nothing is answered at all."""

    def __init__(self, host: Host, token: str | None, name: str, refusal: str = "") -> None:
        self.body_bytes_max = HELLO_BYTES_MAX
        self.payload_bytes_max = 0
        self._host = host
        self._refusal = refusal
        self._greeting = Greeting(token, name)
        self._questions: OrderedDict[int, Question] = OrderedDict()
        self._last = 0

    @property
    def welcome(self) -> bool:
        """Whether it has said hello, and shown the token."""
        return self._greeting.done

    def answer(self, request_id: int, body: memoryview, payload: bytes) -> bytes:
        """The frame that answers a request.

        Raises:
            ProtocolError, Unauthorized: the connection cannot go on.
        """
        request = decode_request(body)
        try:
            return frame(request_id, self._answer(request, payload))
        except (ProtocolError, Unauthorized):
            self._host.refused += 1
            raise
        except KVStoreError as error:
            self._host.refused += 1
            return frame(request_id, protocol.failure(error))

    def lost(self) -> None:
        """The connection is gone."""
        self._host.leave(self)

    def _answer(self, request: Request, payload: bytes) -> Answer:
        if not self._greeting.done:
            return self._greet(request)
        match request:
            case Find():
                keys, width = self._question(request.question), request.width
                if len(payload) > KEYS_MAX * width:
                    raise InvalidRequest(
                        f"{len(payload)} bytes of keys of {width} bytes; give at most {KEYS_MAX} keys"
                    )
                return self._found(keys.find(self._host.compact, self._host.locality, payload, width))
            case FindTokens():
                if len(payload) > TOKENS_MAX * _TOKEN_BYTES:
                    raise InvalidRequest(
                        f"{len(payload)} bytes of tokens; give at most {TOKENS_MAX} tokens, or ask over HTTP"
                    )
                tokens = self._question(request.question)
                return self._found(tokens.find_tokens(self._host.compact, self._host.locality, payload))
            case NameQuestion():
                return self._name(request)
            case ListEngines():
                names = [engine.name for engine in self._host.locality.engines]
                return Engines(self._host.generation(), names)
            case _:
                raise ProtocolError(f"{type(request).__name__} twice; send it once")

    def _greet(self, request: Request) -> Answer:
        if self._refusal:
            raise ProtocolError(self._refusal)
        challenge = self._greeting.receive(request)
        if challenge is not None:
            return challenge
        self.body_bytes_max = BODY_BYTES_MAX
        self.payload_bytes_max = KEYS_MAX * KEY_BYTES_MAX
        return LookupWelcome(protocol.MAJOR, protocol.MINOR, KEYS_MAX, TOKENS_MAX, QUESTIONS_MAX)

    def _name(self, named: NameQuestion) -> Named:
        if named.engines is not None and len(named.engines) > ENGINES_MAX:
            raise InvalidRequest(f"{len(named.engines)} engines; give at most {ENGINES_MAX}")
        question = Question(
            named.model, salt=named.salt, lora=named.lora, fields=named.fields, engines=named.engines
        )
        self._last += 1
        self._questions[self._last] = question
        if len(self._questions) > QUESTIONS_MAX:
            self._questions.popitem(last=False)
        return Named(self._last)

    def _question(self, number: int) -> Question:
        question = self._questions.get(number)
        if question is None:
            raise UnknownNamespace(
                f"question {number} is none of the last {QUESTIONS_MAX} of this connection; name it anew"
            )
        return question

    def _found(self, groups: Groups) -> Found:
        host = self._host
        host.lookups += 1
        tokens, firsts, engines = [], [], []
        for some, bits in groups:
            first = ((bits & -bits).bit_length() - 1) // SLOT_BITS
            bits >>= SLOT_BITS * first
            tokens.append(some)
            firsts.append(first)
            engines.append(bits.to_bytes(bits.bit_length() + 7 >> 3, "little"))
        return Found(host.generation(), host.oldest_ms(), tokens, firsts, engines)
