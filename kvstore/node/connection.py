"""One connection's bytes: frames in, answers out, in order and bounded. It knows no message's meaning.

Payloads go straight from the socket into the memory that the handler names, and from memory to the
socket; what is being sent stays pinned until it has been sent, since `after` is called only then.
"""

import asyncio
import contextlib
import logging
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Protocol, cast

from kvstore.errors import KVStoreError, ProtocolError
from kvstore.protocol import HEADER, failure, frame

logger = logging.getLogger(__name__)

_BUFFER_BYTES: Final = 64 << 10
# Read no further requests while more answers than this wait for a client that does not read them.
_ANSWERS_MAX: Final = 1024
# Handed to the transport at once: long enough for full speed, short enough to be fair between clients.
_CHUNK_BYTES: Final = 1 << 20


class Handler(Protocol):
    """What a connection delivers to."""

    body_bytes_max: int

    def received(self, request_id: int, body: memoryview, payload_bytes: int) -> Sequence[memoryview]:
        """A frame is here. Where it has a payload, the answer is the memory to put it into, of just that
        length together. `body` is valid during the call.

        Raises:
            ProtocolError: the connection cannot go on.
        """

    def payload_received(self) -> None:
        """The payload of the last frame is where the handler wanted it."""

    def lost(self) -> None:
        """The connection is gone; nothing is read into the handler's memory any more."""


class _Outgoing:
    """One answer on its way out: chunks, perhaps a descriptor, and what to do once all has been sent."""

    __slots__ = ("after", "chunks", "fd")

    def __init__(
        self, chunks: list[bytes | memoryview], fd: int | None, after: Callable[[], None] | None
    ) -> None:
        self.chunks = chunks
        self.fd = fd
        self.after = after


class Connection(asyncio.BufferedProtocol):
    """Frames over a stream transport. Single-threaded: everything happens on the event loop."""

    def __init__(self, accepted: Callable[["Connection"], Handler]) -> None:
        self._accepted = accepted
        self._handler: Handler
        self._transport: asyncio.Transport
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        self._targets: deque[memoryview] = deque()
        self._outgoing: deque[_Outgoing] = deque()
        self._blocked = False
        self._closing = False
        self._clock = asyncio.get_running_loop().time
        self._incomplete_since: float | None = None
        self._blocked_since: float | None = None
        self._waiting_bytes = 0
        self._made_at = self._clock()
        self.failed = False
        self.bytes_received = self.bytes_sent = 0

    # What the transport calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        # The transport says when it holds any byte, and when it holds none. Over TLS a limit counts as passed
        # once it is reached, so that with 0 it would pause for good; there the bytes are copies anyway.
        tls = transport.get_extra_info("ssl_object") is not None
        self._transport.set_write_buffer_limits(high=1 if tls else 0, low=0)
        self._handler = self._accepted(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._targets:
            return self._targets[0]
        if self._end == len(self._buffer):
            self._compact(len(self._buffer) * 2 if self._start == 0 else 0)
        return self._view[self._end :]

    def buffer_updated(self, nbytes: int) -> None:
        self.bytes_received += nbytes
        try:
            if self._targets:
                self._fill(nbytes)
            else:
                self._end += nbytes
                self._parse()
        except KVStoreError as error:
            self.fail(error)
        except Exception:  # a mistake of ours must not end the daemon for everyone else
            logger.exception("a request failed; its connection ends")
            self.fail(KVStoreError("the daemon failed on this request; its log says why"))
        incomplete = bool(self._targets) or self._start < self._end
        if self._targets or not incomplete:
            self._incomplete_since = self._clock() if incomplete else None
        elif self._incomplete_since is None:
            self._incomplete_since = self._clock()

    def connection_lost(self, exc: Exception | None) -> None:
        self._closing = True
        self._targets.clear()
        while self._outgoing:
            _ended(self._outgoing.popleft())
        self._handler.lost()
        del self._handler  # which refers to this connection: without it both go at once

    def pause_writing(self) -> None:
        self._blocked = True
        self._blocked_since = self._clock()

    def resume_writing(self) -> None:
        self._blocked = False
        self._blocked_since = None
        self._pump()

    # What the handler calls.

    def send(
        self,
        data: bytes,
        payload: Sequence[memoryview] = (),
        *,
        fd: int | None = None,
        after: Callable[[], None] | None = None,
    ) -> None:
        """Send a frame, then its payload; call `after` once they are sent or the connection is lost."""
        if self._closing:
            _ended(_Outgoing([], None, after))
            return
        if not (payload or fd or after or self._outgoing or self._blocked):
            self.bytes_sent += len(data)
            self._transport.write(data)
            return
        chunks: list[bytes | memoryview] = [data]
        for view in payload:
            chunks.extend(view[at : at + _CHUNK_BYTES] for at in range(0, len(view), _CHUNK_BYTES))
        self._outgoing.append(_Outgoing(chunks, fd, after))
        self._pump()
        if len(self._outgoing) >= _ANSWERS_MAX:
            with contextlib.suppress(RuntimeError):  # it is paused already
                self._transport.pause_reading()

    def fail(self, error: KVStoreError) -> None:
        """Send the error as the answer to no request in particular, and end the connection."""
        if not self._closing:
            self.failed = True
            self._targets.clear()
            self._start = self._end = 0
            self.send(frame(0, failure(error)))
            self._closing = True
            self._transport.close()

    def abort(self) -> None:
        """End the connection at once."""
        self._closing = True
        self._transport.abort()

    def expire(self, limit_s: float, *, welcomed: bool) -> None:
        """End the connection if a frame, a hello or the taking of an answer is overdue."""
        before = self._clock() - limit_s
        waiting = self._transport.get_write_buffer_size()
        if waiting != self._waiting_bytes:  # slow, but it goes on
            self._waiting_bytes = waiting
            self._blocked_since = self._clock() if waiting else None
        if self._blocked_since is not None and self._blocked_since < before:
            self.failed = True
            self.abort()  # an error would not be taken either
        elif self._incomplete_since is not None and self._incomplete_since < before:
            self.fail(ProtocolError(f"a frame was incomplete for {limit_s} s, which is the limit"))
        elif not welcomed and self._made_at < before:
            self.fail(ProtocolError(f"no hello for {limit_s} s, which is the limit"))

    @property
    def socket(self) -> socket.socket:
        """A duplicate of the connection's socket; the caller closes it."""
        return socket.socket(fileno=socket.dup(self._transport.get_extra_info("socket").fileno()))

    # Frames in.

    def _parse(self) -> None:
        while self._end - self._start >= HEADER.size and not self._closing:
            body_bytes, request_id, payload_bytes = HEADER.unpack_from(self._buffer, self._start)
            if body_bytes > self._handler.body_bytes_max:
                raise ProtocolError(
                    f"frame of {body_bytes} bytes; the limit is {self._handler.body_bytes_max} bytes here"
                )
            size = HEADER.size + body_bytes
            if self._end - self._start < size:
                if self._start + size > len(self._buffer):
                    self._compact(size)
                return
            body = self._view[self._start + HEADER.size : self._start + size]
            self._start += size
            self._incomplete_since = None  # what follows is another frame, with a time of its own
            targets = self._handler.received(request_id, body, payload_bytes)
            if payload_bytes:
                self._targets.extend(target for target in targets if len(target))
                self._take_read_ahead()
                if self._targets:
                    return
        if self._start == self._end:
            self._start = self._end = 0
            if len(self._buffer) > _BUFFER_BYTES and not self._closing:
                self._compact(_BUFFER_BYTES)

    def _take_read_ahead(self) -> None:
        """Move what was read behind the body to where the payload belongs."""
        while self._targets and self._start < self._end:
            target = self._targets[0]
            taken = min(len(target), self._end - self._start)
            target[:taken] = self._view[self._start : self._start + taken]
            self._start += taken
            self._advance(taken)

    def _fill(self, nbytes: int) -> None:
        self._advance(nbytes)
        if not self._targets:
            self._parse()

    def _advance(self, nbytes: int) -> None:
        target = self._targets.popleft()
        if nbytes < len(target):
            self._targets.appendleft(target[nbytes:])
        elif not self._targets:
            self._handler.payload_received()

    def _compact(self, size: int) -> None:
        """Move what is unread to the front of a buffer of at least `size` bytes."""
        unread = self._view[self._start : self._end]
        buffer = bytearray(max(size, _BUFFER_BYTES))
        buffer[: len(unread)] = unread
        self._buffer, self._view = buffer, memoryview(buffer)
        self._start, self._end = 0, len(unread)

    # Answers out.

    def _pump(self) -> None:
        while self._outgoing and not self._blocked:
            outgoing = self._outgoing[0]
            if outgoing.fd is not None and not self._send_descriptor(outgoing):
                return
            while outgoing.chunks and not self._blocked:
                chunk = outgoing.chunks.pop(0)
                self.bytes_sent += len(chunk)
                self._transport.write(chunk)
            if self._blocked:
                return
            self._outgoing.popleft()
            _ended(outgoing)
        if not self._outgoing and not self._closing and not self._transport.is_reading():
            self._transport.resume_reading()

    def _send_descriptor(self, outgoing: _Outgoing) -> bool:
        """Send the first chunk with its descriptor, past the transport, which holds no byte now."""
        assert outgoing.fd is not None
        with self.socket as sock:
            try:
                socket.send_fds(sock, [outgoing.chunks[0]], [outgoing.fd])
            except BlockingIOError:
                asyncio.get_running_loop().call_later(0.001, self._pump)
                return False
            except OSError:
                self.abort()
                return False
        outgoing.chunks.clear()
        outgoing.fd = None
        return True


def _ended(outgoing: _Outgoing) -> None:
    """Do what was to be done. A mistake in it must keep neither what comes next nor the handler's `lost`."""
    if outgoing.after is not None:
        try:
            outgoing.after()
        except Exception:
            logger.exception("what was to be done after an answer failed")


def discarding(nbytes: int) -> list[memoryview]:
    """Memory for bytes that nobody wants, the same piece again and again."""
    scratch = memoryview(bytearray(min(nbytes, 1 << 16)))
    whole, rest = divmod(nbytes, len(scratch))
    return [scratch] * whole + [scratch[:rest]]
