"""One connection of a client: requests out, answers in, shared by any number of threads.

There is no reader thread. A thread that waits for its answer reads the socket itself, and hands on what
belongs to others; when it has its own, the next one reads. So a client with one thread pays for no hand-off,
and one that waits long blocks nobody.
"""

import contextlib
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Sequence
from typing import Final

import numpy as np

from kvstore import protocol
from kvstore.errors import DeadlineExceeded, KVStoreError, ProtocolError, Unavailable
from kvstore.protocol import HEADER, frame

_BUFFER_BYTES: Final = 64 << 10
_FRAME_BYTES_MAX: Final = protocol.BODY_BYTES_MAX + HEADER.size


class Reply:
    """The answer to one request, with what came along: a descriptor, or the bytes of blocks.

    `wake` is there when its thread waits while another one reads: a lock that is released to wake it.
    """

    __slots__ = ("answer", "fd", "payload", "wake")

    def __init__(self) -> None:
        self.wake: threading.Lock | None = None
        self.answer: protocol.Answer | None = None
        self.fd: int | None = None
        self.payload: memoryview | None = None


class Channel:
    """Owns the socket. Once `broken` names a reason, every call raises Unavailable with it."""

    def __init__(self, sock: socket.socket, timeout_s: float) -> None:
        self._sock = sock
        self._tls = sock if isinstance(sock, ssl.SSLSocket) else None
        # Bounds a send to a daemon that has stopped reading, and the rest of a frame that has begun. The
        # kernel's own timeouts, for Python's poll before every call: two system calls a request, not five.
        self._timeout_s = timeout_s
        if self._tls is None:
            sock.settimeout(None)
            limit = struct.pack("ll", int(timeout_s), int(timeout_s % 1 * 1e6))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        else:
            sock.settimeout(timeout_s)
        self._io_lock = threading.Lock()  # TLS only: a session may not be read and written at once
        self._send_lock = threading.Lock()
        self._reader = threading.Lock()  # held by the thread that reads the socket
        self._replies: dict[int, Reply] = {}
        self._next_id = 0
        self._fds_wanted = False
        self._fds: list[int] = []
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        self._readable = select.poll()
        self._readable.register(sock, select.POLLIN)
        self.broken: str | None = None
        self.refusal: KVStoreError | None = None  # why the daemon ended the connection, if it said so

    def call(
        self,
        request: protocol.Request,
        timeout_s: float,
        payload: Sequence[memoryview] = (),
        *,
        ahead: bytes = b"",
        with_fd: bool = False,
    ) -> Reply:
        """Send a request and wait for its answer. `ahead` are frames to send before it, in one go.

        `with_fd` is for a channel that one thread has to itself.

        When the time is over the request may still be carried out; a lease that comes of it is given up.

        Raises:
            KVStoreError: what the daemon answered, as the child that it is.
            DeadlineExceeded: no answer within `timeout_s`.
            Unavailable: the connection is broken.
        """
        reply = Reply()
        self._fds_wanted = with_fd
        request_id = self._send(request, payload, reply, ahead)
        # From here on: sending many bytes takes its time, for which the daemon owes no answer.
        deadline = time.monotonic() + timeout_s
        while reply.answer is None:
            self._read_or_wait(request_id, reply, deadline)
        if isinstance(reply.answer, protocol.Failure):
            raise protocol.error_of(reply.answer)
        return reply

    def send(self, frames: bytes) -> None:
        """Send frames that want no answer."""
        with self._send_lock:
            self._send_or_close((frames,))

    def close(self, reason: str = "the client is closed") -> None:
        """End the connection; everyone who waits gets Unavailable."""
        if self.broken is None:
            self.broken = reason
        if self._reader.acquire(blocking=False):
            self._sock.close()
            self._reader.release()
        else:  # the thread that reads wakes up, and closes
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)
        self._wake_all()

    def lost(self) -> bool:
        """Whether the connection is broken, also if no call has noticed yet."""
        if self.broken is None:
            hangup = select.poll()
            hangup.register(self._sock, select.POLLRDHUP)
            return bool(hangup.poll(0))
        return True

    def abandon_in_child(self) -> None:
        """In a forked child: let go of the descriptor without a word to the daemon."""
        self.broken = "this client belongs to the parent process"
        socket.close(self._sock.detach())

    # Sending.

    def _send(
        self, request: protocol.Request, payload: Sequence[memoryview], reply: Reply, ahead: bytes
    ) -> int:
        payload_bytes = sum(map(len, payload)) if payload else 0
        with self._send_lock:
            self._next_id = request_id = self._next_id % 0xFFFF_FFFF + 1
            self._replies[request_id] = reply
            try:
                self._send_or_close((ahead + frame(request_id, request, payload_bytes), *payload))
            except Unavailable:
                self._replies.pop(request_id, None)
                raise
        return request_id

    def _send_or_close(self, pieces: Sequence[bytes | memoryview]) -> None:
        try:
            for piece in pieces:
                self._send_all(piece)
        except (OSError, ValueError) as exc:
            self._read_refusal()
            self.close(f"sending failed: {exc or type(exc).__name__}")
            raise Unavailable(self._reason()) from exc

    def _send_all(self, data: bytes | memoryview) -> None:
        if self.broken is not None:
            raise Unavailable(self._reason())
        if self._tls is None:
            self._sock.sendall(data)
        else:
            with self._io_lock:
                self._sock.sendall(data)

    # Receiving.

    def _read_or_wait(self, request_id: int, reply: Reply, deadline: float) -> None:
        """Read until the reply is there if nobody else reads; else wait for it, or for the reading to end."""
        if not self._reader.acquire(blocking=False):
            if reply.wake is None:
                reply.wake = threading.Lock()
                reply.wake.acquire()
                return  # and try once more: from here on we are seen by the one who ends reading
            if not reply.wake.acquire(timeout=max(0.0, deadline - time.monotonic())):
                self._give_up(request_id)
            return
        try:
            if self.broken is not None:
                raise Unavailable(self._reason())
            while reply.answer is None:
                if not self._read_frame(deadline):
                    self._give_up(request_id)
        except DeadlineExceeded:
            raise
        except (OSError, ValueError, KVStoreError) as exc:
            if self.broken is None:
                self.broken = f"the connection failed: {exc or type(exc).__name__}"
            raise Unavailable(self._reason()) from exc
        finally:
            if self.broken is not None:
                self._sock.close()
            self._reader.release()
            if self._replies:
                self._wake_all()

    def _read_frame(self, deadline: float) -> bool:
        """Take one frame and give it to whom it belongs; False when the time is over before it is here."""
        while True:
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
                    payload = self._read_payload(payload_bytes) if payload_bytes else None
                    if self._start == self._end:
                        self._start = self._end = 0
                    self._deliver(request_id, answer, payload)
                    return True
                self._make_space(size)
            if not self._receive(deadline):
                return False

    def _receive(self, deadline: float) -> bool:
        if self._tls is None or not self._tls.pending():
            remaining_s = deadline - time.monotonic()
            # Close to the usual timeout the kernel's own will do.
            patient = self._tls is None and abs(remaining_s - self._timeout_s) < 0.1
            if not patient and not self._readable.poll(max(0.0, remaining_s * 1000)):
                return False
        if self.broken is not None:
            raise Unavailable(self._reason())
        if self._end == len(self._buffer):
            self._make_space(2 * len(self._buffer))
        try:
            nbytes = self._receive_into(self._view[self._end :])
        except BlockingIOError:
            return False
        self._end += nbytes
        return True

    def _receive_into(self, view: memoryview) -> int:
        if self._fds_wanted:
            data, fds, _, _ = socket.recv_fds(self._sock, len(view), 1)
            view[: len(data)] = data
            self._fds.extend(fds)
            nbytes = len(data)
        elif self._tls is not None:
            with self._io_lock:
                nbytes = self._sock.recv_into(view)
        else:
            nbytes = self._sock.recv_into(view)
        if nbytes == 0:
            raise ConnectionResetError("the daemon closed the connection")
        return nbytes

    def _read_payload(self, payload_bytes: int) -> memoryview:
        """The bytes behind a body, in fresh memory."""
        payload = np.empty(payload_bytes, np.uint8).data
        have = min(self._end - self._start, payload_bytes)
        payload[:have] = self._view[self._start : self._start + have]
        self._start += have
        while have < payload_bytes:
            have += self._receive_into(payload[have:])
        return payload

    def _deliver(self, request_id: int, answer: protocol.Answer, payload: memoryview | None) -> None:
        fd = self._fds.pop() if self._fds else None
        reply = self._replies.pop(request_id, None)
        if reply is not None:
            reply.payload = payload
            reply.fd = fd
            reply.answer = answer
            if reply.wake is not None:
                _wake(reply.wake)
        elif request_id == 0 and isinstance(answer, protocol.Failure):
            self.refusal = protocol.error_of(answer)
            raise self.refusal
        else:
            self._undo(answer)

    def _undo(self, answer: protocol.Answer) -> None:
        """Give up the lease that came for somebody who no longer waits."""
        if isinstance(answer, protocol.Acquired) and answer.lease:
            self.send(frame(0, protocol.Release([answer.lease])))
        elif isinstance(answer, protocol.Granted) and answer.lease:
            self.send(frame(0, protocol.Abort(answer.lease)))

    def _give_up(self, request_id: int) -> None:
        if self._replies.pop(request_id, None) is not None:
            raise DeadlineExceeded("no answer from the daemon in time; it is busy, stopped or gone")

    def _read_refusal(self) -> None:
        """The daemon has closed the connection: if it said why, note it."""
        if self._reader.acquire(blocking=False):
            with contextlib.suppress(OSError, ValueError, KVStoreError):
                while self._read_frame(time.monotonic() + 0.1):
                    pass
            self._reader.release()

    def _make_space(self, size: int) -> None:
        if self._start + size <= len(self._buffer):
            return
        unread = self._view[self._start : self._end]
        buffer = bytearray(max(size, _BUFFER_BYTES))
        buffer[: len(unread)] = unread
        self._buffer, self._view = buffer, memoryview(buffer)
        self._start, self._end = 0, len(unread)

    def _wake_all(self) -> None:
        """Let those who wait look again: their answer may never come, or it is their turn to read."""
        for reply in list(self._replies.values()):
            if reply.wake is not None:
                _wake(reply.wake)

    def _reason(self) -> str:
        return f"the daemon is away: {self.refusal or self.broken}"


def _wake(lock: threading.Lock) -> None:
    with contextlib.suppress(RuntimeError):  # it is awake already
        lock.release()
