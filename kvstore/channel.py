"""One connection of a client: requests out, answers in, shared by any number of threads.

There is no reader thread. A thread that waits for its answer reads the socket itself, and hands on what
belongs to others; when it has its own, the next one reads. So a client with one thread pays for no hand-off,
and one that waits long blocks nobody.

Two clocks bound a call: silence ends it after its `timeout_s`, and while bytes of blocks flow, its own or
those of others before it, after `transfer_s` more.
"""

import contextlib
import fcntl
import select
import socket
import ssl
import struct
import sys
import termios
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Final, NoReturn

from kvstore import protocol
from kvstore.errors import DeadlineExceeded, KVStoreError, TransferTooSlow, Unavailable
from kvstore.incoming import Incoming
from kvstore.protocol import frame

# How long the bytes of blocks may take over TCP in all, unless a caller says otherwise.
TRANSFER_S: Final = 60.0
# TLS: sent under the lock that readers wait for; four records.
_TLS_PIECE_BYTES: Final = 64 << 10


class Reply:
    """The answer to one request, with what came along: a descriptor, or the bytes of blocks.

    `wake` is there when its thread waits while another one reads: a lock that is released to wake it.
    `answer_by` is when silence ends its patience, and `transfer_s` how long bytes that flow may extend that.
    """

    __slots__ = ("answer", "answer_by", "fd", "payload", "request_id", "transfer_s", "wake")

    def __init__(self, transfer_s: float) -> None:
        self.transfer_s = transfer_s
        self.answer_by = 0.0
        self.request_id = 0
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
        self._incoming = Incoming(sock, timeout_s, self._io_lock)
        self._unsent = 0  # of payloads, when it was last looked at
        self._owed: deque[bytes] = deque()  # frames for whoever has the lock to send
        self._writable = select.poll()
        self._writable.register(sock, select.POLLOUT)
        self.broken: str | None = None
        self.refusal: KVStoreError | None = None  # why the daemon ended the connection, if it said so

    def call(
        self,
        request: protocol.Request,
        timeout_s: float,
        payload: Sequence[memoryview] = (),
        *,
        transfer_s: float = TRANSFER_S,
        ahead: bytes = b"",
        with_fd: bool = False,
    ) -> Reply:
        """Send a request and wait for its answer. `ahead` are frames to send before it, in one go.

        `with_fd` is for a channel that one thread has to itself. `transfer_s` is for bytes of blocks in all:
        to wait for one's turn to send, to send, to wait for the answer behind those of others, to receive.

        When the time is over the request may still be carried out; a lease that comes of it is given up. If
        that is in the middle of its payload, the stream is of no use any more, and the channel is closed.

        Raises:
            KVStoreError: what the daemon answered, as the child that it is.
            DeadlineExceeded: no answer, or no further byte, within `timeout_s`.
            TransferTooSlow: bytes flowed, but longer than `transfer_s`.
            Unavailable: the connection is broken.
        """
        begun = time.monotonic()
        reply = Reply(transfer_s)
        self._incoming.fds_wanted = with_fd
        self._send(request, payload, reply, ahead, begun)
        # From here on: sending many bytes takes its time, for which the daemon owes no answer.
        sent = time.monotonic()
        reply.answer_by = sent + timeout_s
        reply.transfer_s = max(0.0, transfer_s - (sent - begun))
        while reply.answer is None:
            self._read_or_wait(reply)
        if isinstance(reply.answer, protocol.Failure):
            raise protocol.error_of(reply.answer)
        return reply

    def send(self, frames: bytes) -> None:
        """Send frames that want no answer; behind a payload that is being sent, unless that is soon done."""
        self._owed.append(frames)
        self._send_owed(self._timeout_s)

    def close(self, reason: str = "the client is closed") -> None:
        """End the connection; everyone who waits gets Unavailable."""
        if self.broken is None:
            self.broken = reason
        with contextlib.suppress(OSError):  # wakes the threads that read and send
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)  # TLS's own would change what others use
        if self._reader.acquire(blocking=False):  # else the one that reads closes
            self._incoming.close()
            self._reader.release()
        self._wake_all()

    def lost(self) -> bool:
        """Whether the connection is broken, also if no call has noticed yet."""
        if self.broken is None:
            hangup = select.poll()
            with contextlib.suppress(ValueError):  # closed just now
                hangup.register(self._sock, select.POLLRDHUP)
                return bool(hangup.poll(0))
        return True

    def abandon_in_child(self) -> None:
        """In a forked child: let go of the descriptor without a word to the daemon."""
        self.broken = "this client belongs to the parent process"
        fd = self._sock.detach()
        if fd >= 0:  # else it was closed before
            socket.close(fd)

    # Sending.

    def _send(
        self,
        request: protocol.Request,
        payload: Sequence[memoryview],
        reply: Reply,
        ahead: bytes,
        begun: float,
    ) -> None:
        payload_bytes = sum(map(len, payload)) if payload else 0
        # A turn that comes soon is no transfer, which may have no time left.
        if not self._send_lock.acquire(blocking=False) and not self._send_lock.acquire(
            timeout=max(reply.transfer_s, self._timeout_s)
        ):
            raise TransferTooSlow("other blocks' bytes were being sent for all of the time; give it more")
        try:
            self._next_id = request_id = reply.request_id = self._next_id % 0xFFFF_FFFF + 1
            self._replies[request_id] = reply
            try:
                self._send_or_close(ahead + frame(request_id, request, payload_bytes))
                if payload:
                    self._send_payload(payload, begun + reply.transfer_s)
            except KVStoreError:
                self._replies.pop(request_id, None)
                raise
        finally:
            self._send_lock.release()
        if self._owed:
            self._send_owed()

    def _send_owed(self, wait_s: float = 0.0) -> None:
        """Send them, unless another thread is sending: it looks once more when it is done."""
        while self._owed and self._send_lock.acquire(timeout=wait_s):
            try:
                frames = b""
                while self._owed:
                    frames += self._owed.popleft()
                self._send_or_close(frames)
            finally:
                self._send_lock.release()

    def _send_or_close(self, data: bytes) -> None:
        try:
            self._send_all(data)
        except (OSError, ValueError) as exc:
            self._sending_failed(exc)

    def _send_all(self, data: bytes) -> None:
        if self.broken is not None:
            raise Unavailable(self._reason())
        if self._tls is None:
            self._sock.sendall(data)
        else:
            with self._io_lock:
                self._sock.sendall(data)

    def _send_payload(self, payload: Sequence[memoryview], until: float) -> None:
        try:
            for view in payload:
                sent = 0
                while sent < len(view):
                    sent += self._send_some(view[sent:], until)
            self._unsent = self._unsent_bytes()
        except KVStoreError:
            raise
        except (OSError, ValueError) as exc:
            self._sending_failed(exc)

    def _send_some(self, data: memoryview, until: float) -> int:
        """Send what the socket takes, if it takes any in time."""
        if self.broken is not None:
            raise Unavailable(self._reason())
        left_s = until - time.monotonic()
        unsent = self._unsent_bytes()
        if left_s <= 0 or not self._writable.poll(min(left_s, self._timeout_s) * 1000):
            if left_s <= self._timeout_s:
                self.close("sending blocks took too long")
                raise TransferTooSlow(f"{self.broken}; give it more time, or send fewer at once")
            if self._unsent_bytes() >= unsent:
                self.close("the daemon takes no byte")
                raise DeadlineExceeded(f"{self.broken} within {self._timeout_s} s; it is stopped or gone")
            return 0
        self._incoming.flowed_at = time.monotonic()
        if self._tls is None:
            with contextlib.suppress(BlockingIOError):
                return self._sock.send(data, socket.MSG_DONTWAIT)
            return 0
        with self._io_lock:
            return self._sock.send(data[:_TLS_PIECE_BYTES])

    def _unsent_bytes(self) -> int:
        """What the kernel has of ours and the other side has not, which may take longer than an answer."""
        try:
            return int.from_bytes(fcntl.ioctl(self._sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
        except (OSError, ValueError):  # closed meanwhile
            return 0

    def _sending_failed(self, error: OSError | ValueError) -> NoReturn:
        self._read_refusal()
        self.close(f"sending failed: {error or type(error).__name__}")
        raise Unavailable(self._reason()) from error

    # Receiving.

    def _until(self, reply: Reply) -> float:
        """Until when its caller waits on, as far as is known."""
        flowing = self._incoming.flowed_at + self._timeout_s
        payload = self._incoming.payload
        if payload is None or payload.request_id != reply.request_id:
            return max(reply.answer_by, min(flowing, reply.answer_by + reply.transfer_s))
        return min(flowing, min(payload.begun, reply.answer_by) + reply.transfer_s)

    def _read_or_wait(self, reply: Reply) -> None:
        """Read until the reply is there if nobody else reads; else wait for it, or for the reading to end."""
        if not self._reader.acquire(blocking=False):
            if reply.wake is None:
                reply.wake = threading.Lock()
                reply.wake.acquire()
                return  # and try once more: from here on we are seen by the one who ends reading
            if not reply.wake.acquire(timeout=max(0.0, self._until(reply) - time.monotonic())):
                self._give_up(reply)
            return
        try:
            if self.broken is not None:
                raise Unavailable(self._reason())
            while reply.answer is None:
                if not self._read_answer(reply):
                    self._give_up(reply)
        except DeadlineExceeded:
            raise
        except (OSError, ValueError, KVStoreError) as exc:
            if self.broken is None:
                self.broken = f"the connection failed: {exc or type(exc).__name__}"
            raise Unavailable(self._reason()) from exc
        finally:
            if self.broken is not None:
                self._incoming.close()
            self._reader.release()
            if self._replies:
                self._wake_all()

    def _read_answer(self, reply: Reply) -> bool:
        """Take one answer and give it to whom it belongs; False when `reply`'s time is over before that."""
        arrival = self._incoming.next(lambda: self._until(reply))
        if arrival is None:
            return False
        self._deliver(*arrival)
        return True

    def _deliver(self, request_id: int, answer: protocol.Answer, payload: memoryview | None) -> None:
        fd = self._incoming.take_fd()
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
            self._owed.append(frame(0, protocol.Release([answer.lease])))
        elif isinstance(answer, protocol.Granted) and answer.lease:
            self._owed.append(frame(0, protocol.Abort(answer.lease)))
        self._send_owed()

    def _give_up(self, reply: Reply) -> None:
        if self._unsent:
            before, self._unsent = self._unsent, self._unsent_bytes()
            if self._unsent < before:
                self._incoming.flowed_at = time.monotonic()
        if time.monotonic() < self._until(reply):
            return  # bytes flow after all
        request_id = reply.request_id
        if self._replies.pop(request_id, None) is None:
            return  # the answer has come just now
        payload = self._incoming.payload
        if payload is not None and payload.request_id == request_id:
            self.close("receiving blocks took too long")
        if time.monotonic() < self._incoming.flowed_at + self._timeout_s:
            raise TransferTooSlow("blocks' bytes took too long; give it more time, or ask for fewer at once")
        raise DeadlineExceeded("no answer from the daemon in time; it is busy, stopped or gone")

    def _read_refusal(self) -> None:
        """The daemon has closed the connection: if it said why, note it."""
        if self._reader.acquire(blocking=False):
            last = Reply(0.0)
            last.answer_by = time.monotonic() + 0.1
            with contextlib.suppress(OSError, ValueError, KVStoreError):
                while self._read_answer(last):
                    pass
            self._reader.release()

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
