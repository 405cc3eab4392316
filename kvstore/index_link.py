"""A client's connection to the index: one call at a time, each within its time. It is never repaired.

Whatever goes wrong in the middle of a call ends the connection: what comes later would be another's answer.
"""

import contextlib
import hmac
import os
import secrets
import socket
import struct
import time
from typing import Final, TypeVar
from urllib.parse import urlsplit

from kvstore import protocol
from kvstore.errors import DeadlineExceeded, InvalidRequest, ProtocolError, Unauthorized, Unavailable
from kvstore.lookup_messages import (
    BODY_BYTES_MAX,
    PAYLOAD_BYTES_MAX,
    Answer,
    Challenge,
    Failure,
    LookupWelcome,
    Request,
    decode_answer,
    frame,
)
from kvstore.messages import Hello, Proof
from kvstore.protocol import HEADER

A = TypeVar("A", bound=Answer)
DEFAULT_PORT: Final = 7406
_BUFFER_BYTES: Final = 64 << 10
_ANSWER_BYTES_MAX: Final = 64 << 20


class IndexLink:
    """One greeted connection. For one thread at a time; `close` is for any."""

    def __init__(self, sock: socket.socket, timeout_s: float) -> None:
        sock.settimeout(None)
        self._sock = sock
        self._timeout_s = timeout_s
        self._limit_s = 0.0
        self._last = 0
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self.questions_max = 0  # until it is welcome

    @classmethod
    def open(cls, address: str, timeout_s: float, token: str | None) -> "IndexLink":
        """Connect to `tcp://host:port` and greet.

        Raises:
            InvalidRequest: the address is none.
            Unavailable, DeadlineExceeded: nobody answers there.
            ProtocolError, Unauthorized: the index refuses this client, or does not know the token.
        """
        link = cls(_dial(address, timeout_s), timeout_s)
        try:
            link.questions_max = _greet(link, address, timeout_s, token).questions_max
        except BaseException:
            link.close()
            raise
        return link

    def call(self, request: Request, kind: type[A], until_s: float, payload: bytes | memoryview = b"") -> A:
        """The answer to a request, which must be of this kind; else as `exchange`."""
        answer = self.exchange(request, until_s, payload)
        if not isinstance(answer, kind):
            raise ProtocolError(f"{type(answer).__name__} from the index in place of {kind.__name__}")
        return answer

    def exchange(self, request: Request, until_s: float, payload: bytes | memoryview = b"") -> Answer:
        """The answer to a request.

        Raises:
            InvalidRequest: it is too long; it was not sent.
            KVStoreError: what the index answered; the connection stands.
            DeadlineExceeded, Unavailable, ProtocolError: the connection is of no use any more.
        """
        self._last = self._last % 0xFFFF_FFFF + 1
        asked = frame(self._last, request, payload)
        if len(payload) > PAYLOAD_BYTES_MAX or len(asked) - len(payload) - HEADER.size > BODY_BYTES_MAX:
            raise InvalidRequest(
                f"{len(asked)} bytes; send at most {BODY_BYTES_MAX}, and {PAYLOAD_BYTES_MAX} of prompts"
            )
        try:
            self._limit(until_s)
            self._sock.sendall(asked)
            answer = self._receive(until_s)
        except BlockingIOError:
            raise DeadlineExceeded(
                f"no answer from the index within {self._timeout_s} s; it is busy, stopped or gone"
            ) from None
        except OSError as exc:
            raise Unavailable(f"the connection to the index failed: {exc or type(exc).__name__}") from exc
        if isinstance(answer, Failure):
            raise protocol.error_of(answer)
        return answer

    def hang_up(self) -> None:
        """Let the call that is under way fail. From any thread."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()

    def _limit(self, until_s: float) -> None:
        """Let no system call take much longer. The kernel's own timeouts save Python's poll before each."""
        left_s = until_s - time.monotonic()
        if left_s <= 0:
            raise BlockingIOError
        if not 0.9 * self._limit_s <= left_s <= 1.1 * self._limit_s:
            self._limit_s = left_s
            limit = struct.pack("ll", int(left_s), int(left_s % 1 * 1e6) or 1)
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    def _receive(self, until_s: float) -> Answer:
        have = request_id = 0
        size = HEADER.size
        while have < size:
            if have:
                self._limit(until_s)
            nbytes = self._sock.recv_into(self._view[have:])
            if not nbytes:
                raise ConnectionResetError("the index closed the connection")
            have += nbytes
            if size == HEADER.size <= have:
                body_bytes, request_id, payload_bytes = HEADER.unpack_from(self._buffer)
                size += body_bytes
                if request_id not in (0, self._last) or payload_bytes or size > _ANSWER_BYTES_MAX:
                    raise ProtocolError(
                        f"answer {request_id} of {size} bytes to request {self._last}; it is no index"
                    )
                self._have_room(size)
        answer = decode_answer(self._view[HEADER.size : size])
        if not request_id and isinstance(answer, Failure) and self.questions_max:
            raise ConnectionAbortedError(answer.text)  # after the welcome
        return answer

    def _have_room(self, size: int) -> None:
        if size > len(self._buffer):
            buffer = bytearray(size)
            buffer[: len(self._buffer)] = self._buffer
            self._buffer, self._view = buffer, memoryview(buffer)


def _greet(link: IndexLink, address: str, timeout_s: float, token: str | None) -> LookupWelcome:
    until_s, nonce = time.monotonic() + timeout_s, secrets.token_bytes(32)
    mark = b"" if token is None else protocol.token_mark(token)
    hello = Hello(protocol.MAJOR, protocol.MINOR, nonce, f"pid {os.getpid()}", mark=mark)
    answer = link.exchange(hello, until_s)
    if isinstance(answer, Challenge):
        if token is None:
            raise Unauthorized(f"the index at {address} wants a token; give token=")
        wanted = protocol.token_proof(token, "daemon", nonce, answer.nonce)
        if not hmac.compare_digest(wanted, answer.proof):
            raise Unauthorized(f"the index at {address} does not know this token")
        answer = link.exchange(Proof(protocol.token_proof(token, "client", nonce, answer.nonce)), until_s)
    if not isinstance(answer, LookupWelcome):
        raise ProtocolError(f"{type(answer).__name__} from {address} in place of a welcome")
    return answer


def _dial(address: str, timeout_s: float) -> socket.socket:
    try:
        parts = urlsplit(address)
        port = parts.port or DEFAULT_PORT
    except ValueError as exc:
        raise InvalidRequest(f"address {address!r}; give tcp://host:{DEFAULT_PORT} ({exc})") from exc
    if parts.scheme != "tcp" or not parts.hostname:
        raise InvalidRequest(f"address {address!r}; give tcp://host:{DEFAULT_PORT}")
    try:
        sock = socket.create_connection((parts.hostname, port), timeout_s)
    except (OSError, UnicodeError) as exc:
        raise Unavailable(f"no index at {address}: {exc}; is `kvstore index` running?") from exc
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock
