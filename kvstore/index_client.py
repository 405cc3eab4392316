"""The client of the index: who has how much of a prompt. Synchronous and thread-safe.

It holds one connection, which threads take in turns. When the index goes away, calls raise `Unavailable` at
once, and a thread connects anew in the background. A forked child must connect for itself.
"""

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from kvstore.engine_hashes import little_endian
from kvstore.errors import (
    DeadlineExceeded,
    KVStoreError,
    ProtocolError,
    Unavailable,
    UnknownNamespace,
)
from kvstore.hits import MEDIA, NUMBER_BYTES, Hits
from kvstore.hits import HitGroups as HitGroups
from kvstore.hits import Question as Question
from kvstore.hits import pack_keys as pack_keys
from kvstore.index_link import IndexLink
from kvstore.lookup_messages import (
    Engines,
    Find,
    FindTokens,
    Found,
    ListEngines,
    Named,
    NameQuestion,
    Request,
)
from kvstore.tokens import token_array

_RECONNECT_FIRST_S: Final = 0.02
_RECONNECT_MAX_S: Final = 2.0
Packed = bytes | memoryview
T = TypeVar("T")


class IndexClient:
    """A connection to one index. Make it with `connect`; it is a context manager that closes itself."""

    def __init__(self, address: str, timeout_s: float, token: str | None) -> None:
        self._address = address
        self._timeout_s = timeout_s
        self._token = token
        self._pid = os.getpid()
        self._turn = threading.Lock()  # of the one that talks
        self._closed = threading.Event()
        self._away = ""
        self._names: tuple[str, ...] = ()
        self._generation = 0
        self._questions: dict[Question, int] = {}
        self._connecting: threading.Thread | None = None
        self._link: IndexLink | None = IndexLink.open(address, timeout_s, token)

    @classmethod
    def connect(
        cls, address: str = "tcp://127.0.0.1:7406", *, timeout_s: float = 1.0, token: str | None = None
    ) -> "IndexClient":
        """Connect to `tcp://host:port`. Every call is over within `timeout_s`, its wait for others included.

        Raises:
            Unavailable: no index answers.
            Unauthorized: the index wants a token, or another one.
            ProtocolError: it is none, or speaks another version.
        """
        return cls(address, timeout_s, token)

    def lookup(
        self,
        model: str,
        keys: Sequence[int] | Sequence[bytes],
        *,
        salt: str = "",
        namespace: Mapping[str, Any] | None = None,
        engines: Iterable[str] | None = None,
    ) -> Hits:
        """Who has how much of a prompt whose keys these are: numbers of 64 bits, or bytes of equal length.

        They are looked for in namespaces that have the values of `namespace`, as block_tokens and scheme.

        Raises:
            InvalidRequest: an argument is out of its limits.
            Unavailable: the index is away.
            DeadlineExceeded: it does not answer in time.
        """
        fields = tuple(sorted(namespace.items(), key=repr)) if namespace else ()
        question = Question(model, salt, "", fields, None if engines is None else tuple(engines))
        return self.find(question, *pack_keys(keys)).hits()

    def lookup_tokens(
        self,
        model: str,
        tokens: Sequence[int],
        *,
        salt: str = "",
        lora: str = "",
        engines: Iterable[str] | None = None,
    ) -> Hits:
        """Who has how much of a prompt of at most 32,768 tokens, which the index hashes.

        Raises as `lookup` does; also where several schemes and block sizes make that too much work.
        """
        question = Question(model, salt, lora, (), None if engines is None else tuple(engines))
        return self.find_tokens(question, little_endian(token_array(tokens), False)).hits()

    def find(self, question: Question, keys: Packed, width: int = NUMBER_BYTES) -> HitGroups:
        """The same for keys that are packed: end to end, `width` bytes each, numbers little endian."""
        return self._found(lambda number: Find(number, width), question, keys)

    def find_tokens(self, question: Question, tokens: Packed) -> HitGroups:
        """The same for tokens that are packed: 4 bytes each, little endian."""
        return self._found(FindTokens, question, tokens)

    def engines(self) -> tuple[str, ...]:
        """The engines that the index knows; raises Unavailable and DeadlineExceeded as `lookup` does."""
        return self._talk(self._list_engines)

    def close(self) -> None:
        """Hang up; every call raises Unavailable from now on."""
        self._closed.set()
        self._away = "the client is closed"
        link = self._link
        if link is not None:
            link.hang_up()
        if self._pid == os.getpid():
            with self._turn:
                self._drop()

    # Calls, each by the thread whose turn it is.

    def _found(self, request_of: Callable[[int], Request], question: Question, payload: Packed) -> HitGroups:
        return self._talk(lambda link, until_s: self._ask(link, until_s, request_of, question, payload))

    def _talk(self, work: Callable[[IndexLink, float], T]) -> T:
        """Do it once it is this thread's turn. A connection that fails is given up."""
        until_s = time.monotonic() + self._timeout_s
        if self._pid != os.getpid():
            raise Unavailable(
                "this client belongs to the parent process; call IndexClient.connect in the child"
            )
        if not self._turn.acquire(timeout=self._timeout_s):
            raise DeadlineExceeded(
                f"other threads' lookups took {self._timeout_s} s; give each its own client"
            )
        try:
            return work(self._connected(), until_s)
        except (DeadlineExceeded, Unavailable, ProtocolError) as error:
            self._lose(error)
            raise
        finally:
            self._turn.release()

    def _ask(
        self,
        link: IndexLink,
        until_s: float,
        request_of: Callable[[int], Request],
        question: Question,
        payload: Packed,
    ) -> HitGroups:
        while True:
            number = self._questions.get(question) or self._name(link, until_s, question)
            try:
                found = link.call(request_of(number), Found, until_s, payload)
            except UnknownNamespace:  # for others that were named since
                del self._questions[question]
                continue
            if found.generation != self._generation:
                self._list_engines(link, until_s)
            if found.generation == self._generation:  # else its numbers are those of before
                break
        groups = zip(found.tokens, found.firsts, found.engines, strict=True)
        return HitGroups(
            tuple([(some, int.from_bytes(bits, "little") << MEDIA * first) for some, first, bits in groups]),
            self._names,
            found.age_ms / 1000,
        )

    def _name(self, link: IndexLink, until_s: float, question: Question) -> int:
        if len(self._questions) >= link.questions_max:
            self._questions.clear()
        engines = None if question.engines is None else list(question.engines)
        message = NameQuestion(question.model, question.salt, question.lora, dict(question.fields), engines)
        number = self._questions[question] = link.call(message, Named, until_s).question
        return number

    def _list_engines(self, link: IndexLink, until_s: float) -> tuple[str, ...]:
        answer = link.call(ListEngines(), Engines, until_s)
        self._generation, self._names = answer.generation, tuple(answer.names)
        return self._names

    # The connection.

    def _connected(self) -> IndexLink:
        if self._link is None:
            if not self._closed.is_set() and (self._connecting is None or not self._connecting.is_alive()):
                self._begin_to_reconnect()
            raise Unavailable(self._away)
        return self._link

    def _lose(self, error: KVStoreError) -> None:
        if self._link is not None:
            self._drop()
            if not self._closed.is_set():
                self._away = f"the index at {self._address} is away ({error})"
                self._begin_to_reconnect()

    def _drop(self) -> None:
        link, self._link = self._link, None
        self._questions.clear()
        self._generation, self._names = 0, ()
        if link is not None:
            link.close()

    def _begin_to_reconnect(self) -> None:
        thread = threading.Thread(target=self._reconnect, name="kvstore-index-reconnect", daemon=True)
        with suppress(RuntimeError):  # no more threads can be had: the next call tries again
            thread.start()
            self._connecting = thread

    def _reconnect(self) -> None:
        pause_s = _RECONNECT_FIRST_S
        while not self._closed.wait(pause_s):
            pause_s = min(2 * pause_s, _RECONNECT_MAX_S)
            try:
                link = IndexLink.open(self._address, self._timeout_s, self._token)
            except KVStoreError as exc:  # whatever it is, it may have passed by the next attempt
                self._away = f"the index at {self._address} is away ({exc})"
                continue
            with self._turn:
                if self._closed.is_set():
                    link.close()
                else:
                    self._link = link
            return

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
