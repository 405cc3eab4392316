"""What comes over a client's socket: answers, with the payloads behind them. It knows nothing of requests.

One thread at a time reads, for as long as it has time; what has come of a frame by then stays here, and the
next one goes on with it.
"""

import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from kvstore import protocol
from kvstore.errors import ProtocolError
from kvstore.protocol import HEADER

_BUFFER_BYTES: Final = 64 << 10
_FRAME_BYTES_MAX: Final = protocol.BODY_BYTES_MAX + HEADER.size

# A request's id, the answer, and its payload.
Arrival = tuple[int, protocol.Answer, memoryview | None]


@dataclass(slots=True)
class _Payload:
    """The bytes of blocks behind an answer, and how many of them are here."""

    request_id: int
    answer: protocol.Answer
    data: memoryview
    have_bytes: int
    begun: float


class Incoming:
    """Reads a socket whose own timeout is `timeout_s`. `turn` is taken for a read where TLS needs that.

    `payload` is the one that is being received, `flowed_at` when bytes of any came, or went, last.
    """

    def __init__(self, sock: socket.socket, timeout_s: float, turn: threading.Lock) -> None:
        self._sock = sock
        self._tls = sock if isinstance(sock, ssl.SSLSocket) else None
        self._timeout_s = timeout_s
        self._turn = turn
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        self._fds: list[int] = []
        self._readable = select.poll()
        self._readable.register(sock, select.POLLIN)
        self.fds_wanted = False
        self.payload: _Payload | None = None
        self.flowed_at = float("-inf")

    def next(self, until: Callable[[], float]) -> Arrival | None:
        """One answer; None when it is not here by the time of `until`, which moves while bytes flow.

        Raises:
            OSError: the connection is lost.
            ProtocolError: what has come is no answer.
        """
        while (payload := self.payload) is None:
            have = self._end - self._start
            if have >= HEADER.size:
                body_bytes, request_id, payload_bytes = HEADER.unpack_from(self._buffer, self._start)
                size = HEADER.size + body_bytes
                if size > _FRAME_BYTES_MAX:
                    raise ProtocolError(
                        f"frame of {size} bytes from the daemon; the limit is {_FRAME_BYTES_MAX}"
                    )
                if have >= size:
                    body = self._view[self._start + HEADER.size : self._start + size]
                    answer = protocol.decode_answer(body)
                    self._start += size
                    if payload_bytes:
                        self.payload = self._begin(request_id, answer, payload_bytes)
                    if self._start == self._end:
                        self._start = self._end = 0
                    if payload_bytes:
                        continue
                    return request_id, answer, None
                self._make_space(size)
            if self._end == len(self._buffer):
                self._make_space(2 * len(self._buffer))
            nbytes = self._receive(self._view[self._end :], until)
            if not nbytes:
                return None
            self._end += nbytes
        return self._rest(payload, until)

    def take_fd(self) -> int | None:
        """The descriptor that came with the last answer."""
        return self._fds.pop() if self._fds else None

    def close(self) -> None:
        """Close the socket, and descriptors that nobody will take."""
        self._sock.close()
        while self._fds:
            os.close(self._fds.pop())

    # Helpers.

    def _begin(self, request_id: int, answer: protocol.Answer, payload_bytes: int) -> _Payload:
        data = np.empty(payload_bytes, np.uint8).data
        have = min(self._end - self._start, payload_bytes)
        data[:have] = self._view[self._start : self._start + have]
        self._start += have
        self.flowed_at = time.monotonic()
        return _Payload(request_id, answer, data, have, self.flowed_at)

    def _rest(self, payload: _Payload, until: Callable[[], float]) -> Arrival | None:
        while payload.have_bytes < len(payload.data):
            if time.monotonic() >= until():
                return None
            nbytes = self._receive(payload.data[payload.have_bytes :], until)
            if not nbytes:
                return None
            payload.have_bytes += nbytes
            self.flowed_at = time.monotonic()
        self.payload = None
        return payload.request_id, payload.answer, payload.data

    def _receive(self, view: memoryview, until: Callable[[], float]) -> int:
        """How many bytes have come; 0 when the time is over."""
        if self._tls is None or not self._tls.pending():
            left_s = until() - time.monotonic()
            # Close to the usual timeout the kernel's own will do.
            patient = self._tls is None and abs(left_s - self._timeout_s) < 0.1
            if not patient and not self._readable.poll(max(0.0, left_s * 1000)):
                return 0
        try:
            nbytes = self._receive_into(view)
        except BlockingIOError:
            return 0
        if nbytes == 0:
            raise ConnectionResetError("the daemon closed the connection")
        return nbytes

    def _receive_into(self, view: memoryview) -> int:
        if self.fds_wanted:
            data, fds, _, _ = socket.recv_fds(self._sock, len(view), 1)
            view[: len(data)] = data
            self._fds.extend(fds)
            return len(data)
        if self._tls is None:
            return self._sock.recv_into(view)
        with self._turn:
            return self._sock.recv_into(view)

    def _make_space(self, size: int) -> None:
        if self._start + size <= len(self._buffer):
            return
        unread = self._view[self._start : self._end]
        buffer = bytearray(max(size, _BUFFER_BYTES))
        buffer[: len(unread)] = unread
        self._buffer, self._view = buffer, memoryview(buffer)
        self._start, self._end = 0, len(unread)
