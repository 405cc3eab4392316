"""One router's connection for compact lookups: frames in, answers out, in order and bounded.

What one read brings is answered with one write, but a connection has the loop for a millisecond at a time:
then others have their turn. It knows neither tables nor keys.
"""

import asyncio
import logging
from collections.abc import Generator
from typing import Final, Protocol, cast

from kvstore.errors import KVStoreError, ProtocolError
from kvstore.lookup_messages import frame
from kvstore.protocol import HEADER, failure

logger = logging.getLogger(__name__)

_TURN_S: Final = 0.001
# Of answers that a router does not take; then nothing of it is read.
_UNSENT_BYTES_MAX: Final = 1 << 20


class Handler(Protocol):
    """What a connection delivers to."""

    body_bytes_max: int
    payload_bytes_max: int

    def answer(
        self, request_id: int, body: memoryview, payload: bytes
    ) -> bytes | Generator[None, None, bytes]:
        """The frame that answers a request, or steps that end with it, each in a turn of its own.

        Raises:
            ProtocolError, Unauthorized: the connection cannot go on.
        """

    def lost(self) -> None:
        """The connection is gone."""


class LookupConnection(asyncio.Protocol):
    """Frames over a stream transport, from when it is made until `Handler.lost`."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._transport: asyncio.Transport
        self._loop = asyncio.get_running_loop()
        self._clock = self._loop.time
        self._unread = bytearray()
        self._wanted = 0  # bytes of the frame that is not whole yet
        self._later = b""  # whole frames for another turn
        self._steps: Generator[None, None, bytes] | None = None  # a lookup before those, which is under way
        self._next_turn: asyncio.Handle | None = None
        self._closing = False
        self._incomplete_since: float | None = None
        self._blocked_since: float | None = None
        self.made_s = self._clock()

    # What the transport calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(_UNSENT_BYTES_MAX)

    def data_received(self, data: bytes) -> None:
        if self._unread:
            self._unread += data
            if len(self._unread) < self._wanted:
                return
            data = bytes(self._unread)
            self._unread.clear()
        self._take(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._closing = True
        if self._next_turn is not None:
            self._next_turn.cancel()
        self._handler.lost()

    def pause_writing(self) -> None:
        self._blocked_since = self._clock()
        self._pause()

    def resume_writing(self) -> None:
        self._blocked_since = None
        if self._next_turn is None:
            self._go_on()

    # What the server calls.

    def expire(self, now_s: float, limit_s: float, *, welcome: bool) -> None:
        """End the connection if a frame, a hello or the taking of answers is overdue."""
        before = now_s - limit_s
        if self._closing:
            self._transport.abort()  # it does not take why it ends
        elif self._blocked_since is not None and self._blocked_since < before:
            self.abort()  # an error would not be taken either
        elif self._incomplete_since is not None and self._incomplete_since < before:
            self.fail(ProtocolError(f"a frame was incomplete for {limit_s} s, which is the limit"))
        elif not welcome and self.made_s < before:
            self.fail(ProtocolError(f"no hello for {limit_s} s, which is the limit"))

    def fail(self, error: KVStoreError) -> None:
        """Send the error as the answer to no request in particular, and end the connection."""
        if not self._closing:
            self._closing = True
            self._transport.write(frame(0, failure(error)))
            self._transport.close()

    def abort(self) -> None:
        """End the connection at once."""
        self._closing = True
        self._transport.abort()

    # Helpers.

    def _take(self, data: bytes) -> None:
        answers: list[bytes] = []
        error: KVStoreError | None = None
        rest, late = 0, self._steps is not None
        try:
            if late:
                self._advance(answers)
            else:
                rest = self._answer_all(data, answers)
        except KVStoreError as exc:
            error = exc
        except Exception:  # a mistake of ours must not end the index for everyone else
            logger.exception("a lookup failed; its connection ends")
            error = KVStoreError("the index failed on this request; its log says why")
        if answers:
            self._transport.write(answers[0] if len(answers) == 1 else b"".join(answers))
        if error is not None:
            self.fail(error)
        elif late or rest < len(data) or self._steps is not None:
            self._keep(data[rest:])
        else:
            self._incomplete_since = None

    def _advance(self, answers: list[bytes]) -> None:
        """One more step of what is under way; what came after it waits."""
        assert self._steps is not None
        try:
            next(self._steps)
        except StopIteration as end:
            self._steps = None
            answers.append(end.value)

    def _answer_all(self, data: bytes, answers: list[bytes]) -> int:
        """Answer whole frames until the turn is over; where what is left of them begins."""
        handler, view, at, size = self._handler, memoryview(data), 0, len(data)
        turn_ends = 0.0
        while size - at >= HEADER.size:
            body_bytes, request_id, payload_bytes = HEADER.unpack_from(data, at)
            if body_bytes > handler.body_bytes_max or payload_bytes > handler.payload_bytes_max:
                raise ProtocolError(
                    f"frame of {body_bytes} and {payload_bytes} bytes; the limits are "
                    f"{handler.body_bytes_max} and {handler.payload_bytes_max} bytes here"
                )
            payload_at = at + HEADER.size + body_bytes
            end: int = payload_at + payload_bytes
            if end > size:
                self._wanted = end - at
                return at
            if not turn_ends:
                turn_ends = self._clock() + _TURN_S
            elif self._clock() > turn_ends or self._closing:
                self._wanted = 0
                return at
            answer = handler.answer(request_id, view[at + HEADER.size : payload_at], data[payload_at:end])
            at = end
            if not isinstance(answer, bytes):
                self._steps = answer
                self._wanted = 0
                return at
            answers.append(answer)
        self._wanted = HEADER.size
        return at

    def _keep(self, data: bytes) -> None:
        """What is not answered yet: frames for another turn, or the beginning of one."""
        if not self._wanted:
            self._later = data
            self._pause()
            self._next_turn = self._loop.call_soon(self._go_on)
            return
        self._unread += data
        self._incomplete_since = self._clock()

    def _go_on(self) -> None:
        self._next_turn = None
        data, self._later = self._later, b""
        if self._closing or self._blocked_since is not None:
            self._later = data
            return
        if self._steps is None and not self._transport.is_reading():
            self._transport.resume_reading()
        if data or self._steps is not None:
            self._take(data)

    def _pause(self) -> None:
        if self._transport.is_reading():
            self._transport.pause_reading()
