"""What one router has asked over the port for compact lookups, and what it is told. It knows no sockets."""

import time
from collections import OrderedDict
from collections.abc import Generator
from typing import Final, Protocol

from kvstore import protocol
from kvstore.callers import Callers
from kvstore.errors import (
    InvalidRequest,
    KVStoreError,
    ProtocolError,
    TooManyRequests,
    Unauthorized,
    UnknownNamespace,
)
from kvstore.greeting import Greeting
from kvstore.index.compact import Compact, Groups
from kvstore.index.locality import Locality
from kvstore.index.masks import SLOT_BITS
from kvstore.index.questions import Question
from kvstore.index.searching import KEYS_AT_ONCE
from kvstore.lookup_messages import (
    BODY_BYTES_MAX,
    ENGINES_MAX,
    HELLO_BYTES_MAX,
    KEYS_MAX,
    PAYLOAD_BYTES_MAX,
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
from kvstore.messages import Hello
from kvstore.rate import Rate

_TOKEN_BYTES: Final = 4
# What engines' names may take in all questions of a connection, but for the last one's.
NAMES_BYTES_MAX: Final = 16 << 20

# A lookup that is answered some turns later, with a frame.
Steps = Generator[None, None, bytes]


class Host(Protocol):
    """What a session needs of the server that it belongs to."""

    callers: Callers
    rate: Rate
    locality: Locality
    compact: Compact
    lookups: int
    refused: int

    def oldest_ms(self) -> float:
        """The age of the oldest knowledge that lookups use."""

    def generation(self) -> int:
        """Of the numbers that engines have."""

    def welcome(self, session: "Session") -> None:
        """The session is a router's; raises ProtocolError where there are too many."""

    def leave(self, session: "Session") -> None:
        """The session is over."""


class Session:
    """A connection's."""

    def __init__(self, host: Host, name: str) -> None:
        self.body_bytes_max = HELLO_BYTES_MAX
        self.payload_bytes_max = 0
        self._host = host
        self._router = name
        self._caller = ""
        self._greeting = Greeting(None, name)  # of nobody, until a Hello says whose token it is
        self._questions: OrderedDict[int, Question] = OrderedDict()
        self._names_bytes = 0  # of all of them
        self._last = 0

    @property
    def welcome(self) -> bool:
        """Whether it has said hello, and shown the token."""
        return self._greeting.done

    def answer(self, request_id: int, body: memoryview, payload: bytes) -> bytes | Steps:
        """The frame that answers a request, or, for very many keys, steps that end with it.

        Raises:
            ProtocolError, Unauthorized: the connection cannot go on.
        """
        request = decode_request(body)
        if isinstance(request, Find) and self.welcome and len(payload) > KEYS_AT_ONCE * request.width:
            return self._find_in_steps(request_id, request, payload)
        try:
            return frame(request_id, self._answer(request, payload))
        except (ProtocolError, Unauthorized):
            self._host.refused += 1
            raise
        except KVStoreError as error:
            self._host.refused += 1
            return frame(request_id, protocol.failure(error))

    def _find_in_steps(self, request_id: int, request: Find, payload: bytes) -> Steps:
        try:
            question = self._asked(request, payload)
            host = self._host
            groups = yield from question.find_in_steps(host.compact, host.locality, payload, request.width)
            return frame(request_id, self._found(groups))
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
                keys = self._asked(request, payload)
                return self._found(keys.find(self._host.compact, self._host.locality, payload, request.width))
            case FindTokens():
                self._admit()
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
        if isinstance(request, Hello) and self._greeting.hello is None:
            caller, token = self._host.callers.marked(request.mark)
            self._caller = caller.name
            self._greeting = Greeting(token, self._router)
        challenge = self._greeting.receive(request)
        if challenge is not None:
            return challenge
        self._host.welcome(self)
        self.body_bytes_max = BODY_BYTES_MAX
        self.payload_bytes_max = PAYLOAD_BYTES_MAX
        return LookupWelcome(protocol.MAJOR, protocol.MINOR, KEYS_MAX, TOKENS_MAX, QUESTIONS_MAX)

    def _admit(self) -> None:
        """One more lookup of this caller, if it may have one now."""
        rate = self._host.rate
        wait_s = rate.wait_s(self._caller, time.monotonic())
        if wait_s:
            raise TooManyRequests(f"more than {rate.per_s:g} requests a second; ask again in {wait_s:.3f} s")

    def _name(self, named: NameQuestion) -> Named:
        if named.engines is not None and len(named.engines) > ENGINES_MAX:
            raise InvalidRequest(f"{len(named.engines)} engines; give at most {ENGINES_MAX}")
        question = Question(
            named.model, salt=named.salt, lora=named.lora, fields=named.fields, engines=named.engines
        )
        self._last += 1
        self._questions[self._last] = question
        self._names_bytes += question.names_bytes
        while len(self._questions) > (QUESTIONS_MAX if self._names_bytes <= NAMES_BYTES_MAX else 1):
            _, oldest = self._questions.popitem(last=False)
            self._names_bytes -= oldest.names_bytes
        return Named(self._last)

    def _asked(self, request: Find, payload: bytes) -> Question:
        """The question of a lookup by keys, which may be answered."""
        self._admit()
        question = self._question(request.question)
        if len(payload) > KEYS_MAX * request.width:
            raise InvalidRequest(
                f"{len(payload)} bytes of keys of {request.width} bytes; give at most {KEYS_MAX} keys"
            )
        return question

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
