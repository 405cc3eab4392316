"""Requests over kept connections to a server on loopback, one at a time on each: bytes out, bytes in.

All servers are asked by this client, whatever they speak; it knows of an answer only where it ends. It judges
none.
"""

import select
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.harness import BenchmarkError
from kvstore.protocol import HEADER

_BUFFER_BYTES: Final = 1 << 20
_ANSWER_S_MAX: Final = 30.0
_LENGTH: Final = b"content-length: "  # as uvicorn writes it, and hyper
_OK: Final = (b"HTTP/1.1 200", b"HTTP/1.1 201")

# The bytes of a whole answer at the front of some, or 0.
End = Callable[[bytearray, int], int]


def frame_end(buffer: bytearray, have: int) -> int:
    """Of a frame."""
    if have < HEADER.size:
        return 0
    body_bytes, _, payload_bytes = HEADER.unpack_from(buffer)
    size: int = HEADER.size + body_bytes + payload_bytes
    return size if have >= size else 0


def http_end(buffer: bytearray, have: int) -> int:
    """Of an answer to HTTP that says its length."""
    head = buffer.find(b"\r\n\r\n", 0, have)
    if head < 0:
        return 0
    at = buffer.find(_LENGTH, 0, head) + len(_LENGTH)
    size = head + 4 + int(buffer[at : buffer.find(b"\r", at)])
    return size if have >= size else 0


def http_request(path: str, body: bytes, method: str = "POST") -> bytes:
    """A request as it travels."""
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


@dataclass(frozen=True, slots=True)
class Asked:
    """How one sample of requests went. `cpu_s` is the server's, for each request."""

    rate: float
    p50_s: float
    cpu_s: float


class Caller:
    """Connections to a server's port that are greeted with `hello` and then send requests in turns."""

    def __init__(self, port: int, pid: int, end: End, connections: int, hello: Sequence[bytes] = ()) -> None:
        self._pid = pid
        self._end = end
        self._sockets = [_connect(port) for _ in range(connections)]
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        for sock in self._sockets:
            for request in hello:
                self._ask(sock, request)

    def ask(self, request: bytes) -> bytes:
        """Its answer.

        Raises:
            BenchmarkError: over HTTP, that it has none.
        """
        size = self._ask(self._sockets[0], request)
        answer = bytes(self._view[:size])
        if self._end is http_end and not answer.startswith(_OK):
            raise BenchmarkError(f"{request[:40]!r}: {answer[:300]!r}")
        return answer

    def one_by_one(self, requests: Sequence[bytes], count: int) -> Asked:
        """So many on one connection."""
        sock, taken = self._sockets[0], []
        cpu_s, began = cpu_of(self._pid), time.perf_counter()
        for number in range(count):
            start = time.perf_counter()
            self._ask(sock, requests[number % len(requests)])
            taken.append(time.perf_counter() - start)
        took_s = time.perf_counter() - began
        return Asked(count / took_s, sorted(taken)[count // 2], (cpu_of(self._pid) - cpu_s) / count)

    def at_once(self, requests: Sequence[bytes], count: int) -> Asked:
        """So many on all connections, each of which always has one under way."""
        poll = select.epoll()
        by_fd = {sock.fileno(): sock for sock in self._sockets}
        for fd in by_fd:
            poll.register(fd, select.EPOLLIN)
        cpu_s, began = cpu_of(self._pid), time.perf_counter()
        sent = answered = 0
        for sock in self._sockets:
            sock.sendall(requests[sent % len(requests)])
            sent += 1
        while answered < count:
            for fd, _ in poll.poll(_ANSWER_S_MAX):
                self._receive(by_fd[fd])
                answered += 1
                if sent < count:
                    by_fd[fd].sendall(requests[sent % len(requests)])
                    sent += 1
        took_s = time.perf_counter() - began
        poll.close()
        return Asked(count / took_s, 0.0, (cpu_of(self._pid) - cpu_s) / count)

    def close(self) -> None:
        """Hang up."""
        for sock in self._sockets:
            sock.close()

    def _ask(self, sock: socket.socket, request: bytes) -> int:
        sock.sendall(request)
        return self._receive(sock)

    def _receive(self, sock: socket.socket) -> int:
        have = 0
        while True:
            nbytes = sock.recv_into(self._view[have:])
            if not nbytes:
                raise BenchmarkError("the server has closed the connection")
            have += nbytes
            if size := self._end(self._buffer, have):
                return size


def cpu_of(pid: int) -> float:
    """CPU seconds of a process's threads so far, to the nanosecond."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def _connect(port: int) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port), _ANSWER_S_MAX)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.settimeout(None)
    return sock
