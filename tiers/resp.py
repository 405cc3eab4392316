"""Bulk bytes over a Redis connection: sent from slots and received into slots, with no copy in between.

Knows as much of RESP2 as SET, GET and EVAL need, and of Redis nothing else: who connected the socket, and to
whom, is not its business. Every call is over by the deadline that was given with the socket.
"""

import socket
import ssl
import struct
import time
from collections.abc import Sequence
from itertools import islice
from typing import Final

# Received ahead of a value: its length, and the end of the value before it.
_AHEAD_BYTES: Final = 64
# Longer lines than errors have do not come from Redis.
_LINE_BYTES_MAX: Final = 64 << 10
# Longer values have a place to go to.
_VALUE_BYTES_MAX: Final = 64 << 10
# The kernel takes so many pieces at once (IOV_MAX).
_PIECES_MAX: Final = 1024

Piece = bytes | memoryview


class ServerError(Exception):
    """What the server answered instead, such as "MOVED 866 10.0.0.2:6379"; the connection is good."""


class Wire:
    """One connection's socket, for a while, by one thread.

    Raises from all methods:
        OSError: the connection is lost, or the deadline is over (TimeoutError); disconnect it.
    """

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock = sock
        self._deadline = deadline
        self._ahead = bytearray()
        self._tls = isinstance(sock, ssl.SSLSocket)
        if not self._tls:
            sock.settimeout(None)  # the kernel's own timeouts let one call take a whole value

    def send(self, pieces: Sequence[Piece]) -> None:
        """Send all pieces, one after another."""
        if self._tls:
            for piece in pieces:
                self._limit(socket.SO_SNDTIMEO)
                self._sock.sendall(piece)
            return
        rest = iter(pieces)
        while views := [memoryview(piece) for piece in islice(rest, _PIECES_MAX)]:
            while views:
                self._limit(socket.SO_SNDTIMEO)
                try:
                    sent = self._sock.sendmsg(views)
                except BlockingIOError as exc:
                    raise TimeoutError("it takes no more bytes in time") from exc
                while views and sent >= len(views[0]):
                    sent -= len(views.pop(0))
                if sent:
                    views[0] = views[0][sent:]

    def reply(self) -> int | bytes | None:
        """The next answer: a number, a status, a value's first 64 KiB, or None for none.

        Raises:
            ServerError: it is an error.
        """
        line = self._line()
        kind, text = line[:1], line[1:]
        if kind == b"-":
            raise ServerError(text.decode(errors="replace"))
        if kind == b":":
            return _number(text)
        if kind == b"$":
            return self._value(_number(text))
        if kind == b"+":
            return text
        raise ConnectionError(f"{line[:40]!r} is no answer that was asked for")

    def value_into(self, view: memoryview) -> int | None:
        """Receive the next answer, a value, into `view`: its length, or None where there is none.

        A value of any other length than the view's is thrown away, and the view left as it was.

        Raises:
            ServerError: it is an error.
        """
        line = self._line(len(b"$%d\r\n" % len(view)))  # and none of the value, which goes into the view
        if line[:1] == b"-":
            raise ServerError(line[1:].decode(errors="replace"))
        if line[:1] != b"$":
            raise ConnectionError(f"{line[:40]!r} is no value")
        length = _number(line[1:])
        if length < 0:
            return None
        if length == len(view):
            self._fill(view)
        else:
            self._discard(length)
        if self._exactly(2) != b"\r\n":
            raise ConnectionError("a value has no end where it should")
        return length

    # Receiving.

    def _value(self, length: int) -> bytes | None:
        if length < 0:
            return None
        value = bytearray(min(length, _VALUE_BYTES_MAX))
        self._fill(memoryview(value))
        self._discard(length - len(value))
        self._exactly(2)
        return bytes(value)

    def _discard(self, length: int) -> None:
        waste = memoryview(bytearray(min(length, 1 << 20)))
        while length:
            piece = waste[: min(length, len(waste))]
            self._fill(piece)
            length -= len(piece)

    def _line(self, ahead_bytes: int = _AHEAD_BYTES) -> bytes:
        while (end := self._ahead.find(b"\r\n")) < 0:
            if len(self._ahead) > _LINE_BYTES_MAX:
                raise ConnectionError(f"an answer's first line is above {_LINE_BYTES_MAX} bytes")
            self._more(ahead_bytes)
        line = bytes(self._ahead[:end])
        del self._ahead[: end + 2]
        return line

    def _exactly(self, nbytes: int) -> bytearray:
        while len(self._ahead) < nbytes:
            self._more()
        data = self._ahead[:nbytes]
        del self._ahead[:nbytes]
        return data

    def _more(self, ahead_bytes: int = _AHEAD_BYTES) -> None:
        self._limit(socket.SO_RCVTIMEO)
        try:
            data = self._sock.recv(ahead_bytes)
        except BlockingIOError as exc:
            raise TimeoutError("no answer in time") from exc
        if not data:
            raise ConnectionResetError("it has closed the connection")
        self._ahead += data

    def _fill(self, view: memoryview) -> None:
        got = min(len(self._ahead), len(view))
        view[:got] = self._ahead[:got]
        del self._ahead[:got]
        # One call for all of it, where the kernel can: what other threads do waits for none of this.
        flags = 0 if self._tls else socket.MSG_WAITALL
        while got < len(view):
            self._limit(socket.SO_RCVTIMEO)
            try:
                received = self._sock.recv_into(view[got:], 0, flags)
            except BlockingIOError as exc:
                raise TimeoutError("no answer in time") from exc
            if not received:
                raise ConnectionResetError("it has closed the connection in the middle of a value")
            got += received

    def _limit(self, option: int) -> None:
        remaining_s = self._deadline - time.monotonic()
        if remaining_s <= 0:
            raise TimeoutError("no answer in time")
        if self._tls:
            self._sock.settimeout(remaining_s)
        else:
            microseconds = max(1, int(remaining_s % 1 * 1e6))
            timeval = struct.pack("ll", int(remaining_s), microseconds)
            self._sock.setsockopt(socket.SOL_SOCKET, option, timeval)


def _number(text: bytes) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConnectionError(f"{text[:40]!r} is no number") from None


def command(*words: Piece | str | int) -> list[Piece]:
    """One command as pieces to send; a memoryview stays what it is and is not copied."""
    pieces: list[Piece] = [b"*%d\r\n" % len(words)]
    for word in words:
        piece = word if isinstance(word, bytes | memoryview) else str(word).encode()
        head = b"$%d\r\n" % len(piece)
        if isinstance(piece, memoryview):
            pieces += [head, piece, b"\r\n"]
        else:
            pieces.append(head + piece + b"\r\n")
    return pieces
