"""What no Redis tier can pass, and what is there without one: blocks moved between memory and a redis-server
by as many threads, each with a connection of its own. Nothing says whether the bytes are the right ones.
"""

import queue
import socket
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import redis

from benchmarks.disk import Blocks, in_threads
from benchmarks.harness import BenchmarkError

RAW: Final = "raw RESP"
REDIS_PY: Final = "redis-py"
# Under way on a connection: the limit is whichever is faster.
WINDOWS: Final = (1, 2)
_END: Final = b"\r\n"


class _Connected:
    """Stores and loads batches of blocks, by the two methods that it lacks. Its names begin with `prefix`."""

    def __init__(self, prefix: str, url: str, connect: Callable[[], Any]) -> None:
        self._prefix = prefix
        self._control = redis.Redis.from_url(url)
        self._connect = connect
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._opened: list[Any] = []
        self._names: list[bytes] = []
        self._batches: list[list[int]] = []
        self._shuffled: list[list[int]] = []
        self._sources: list[memoryview] = []
        self._destinations: list[memoryview] = []

    def prepare(self, blocks: Blocks) -> Blocks:
        self.clear()
        self._names = [b"%s:%d" % (self._prefix.encode(), number) for number in range(len(blocks))]
        self._sources, self._destinations = blocks.views(blocks.source), blocks.views(blocks.destination)
        self._batches = blocks.batches(shuffled=False)
        self._shuffled = blocks.batches(shuffled=True)
        return blocks

    def clear(self) -> None:
        if self._names:
            self._control.delete(*self._names)

    def store(self, jobs: int) -> None:
        self._in_threads(jobs, self._batches, self._store)

    def load(self, jobs: int) -> None:
        self._in_threads(jobs, self._shuffled, self._load)

    def close(self) -> None:
        self.clear()
        for connection in self._opened:
            connection.close()
        self._control.close()

    def _in_threads(
        self, jobs: int, batches: Sequence[Sequence[int]], move: Callable[[Any, Sequence[int]], None]
    ) -> None:
        while len(self._opened) < jobs:
            self._opened.append(self._connect())
            self._idle.put(self._opened[-1])

        def work(number: int) -> None:
            connection = self._idle.get()
            move(connection, batches[number])
            self._idle.put(connection)

        in_threads(jobs, [[number] for number in range(len(batches))], work)

    def _store(self, connection: Any, batch: Sequence[int]) -> None:
        raise NotImplementedError

    def _load(self, connection: Any, batch: Sequence[int]) -> None:
        raise NotImplementedError


class RawResp(_Connected):
    """The limit: a call or two of the kernel a block, straight from and to the caller's memory."""

    def __init__(self, url: str, window: int) -> None:
        super().__init__(f"raw{window}", url, partial(_connected_socket, url))
        self._window = window

    def _store(self, connection: socket.socket, batch: Sequence[int]) -> None:
        for place, number in enumerate(batch):
            view, name = self._sources[number], self._names[number]
            head = b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(name), name, len(view))
            pieces = [memoryview(head), view, memoryview(_END)]
            while pieces:
                sent = connection.sendmsg(pieces)
                while pieces and sent >= len(pieces[0]):
                    sent -= len(pieces.pop(0))
                if sent:
                    pieces[0] = pieces[0][sent:]
            if place >= self._window - 1:
                self._heard_ok(connection)
        for _ in range(min(len(batch), self._window - 1)):
            self._heard_ok(connection)

    def _load(self, connection: socket.socket, batch: Sequence[int]) -> None:
        asked = 0
        for place, number in enumerate(batch):
            while asked < min(len(batch), place + self._window):
                name = self._names[batch[asked]]
                connection.sendall(b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(name), name))
                asked += 1
            view = self._destinations[number]
            head = b"$%d\r\n" % len(view)
            _receive(connection, memoryview(bytearray(len(head))), head)
            _receive(connection, view)
            _receive(connection, memoryview(bytearray(len(_END))), _END)

    @staticmethod
    def _heard_ok(connection: socket.socket) -> None:
        _receive(connection, memoryview(bytearray(5)), b"+OK\r\n")


class RedisPy(_Connected):
    """redis-py with hiredis at its best: stores `bytes` made beforehand, for it copies others once more, and
    leaves what it loads in the `bytes` that it makes."""

    def __init__(self, url: str) -> None:
        super().__init__("py", url, partial(redis.Redis.from_url, url, single_connection_client=True))
        self._values: list[bytes] = []

    def prepare(self, blocks: Blocks) -> Blocks:
        super().prepare(blocks)
        self._values = [bytes(view) for view in self._sources]
        return blocks

    def _store(self, connection: redis.Redis, batch: Sequence[int]) -> None:
        for number in batch:
            connection.set(self._names[number], self._values[number])

    def _load(self, connection: redis.Redis, batch: Sequence[int]) -> None:
        for number in batch:
            connection.get(self._names[number])


def _connected_socket(url: str) -> socket.socket:
    scheme, _, place = url.partition("://")
    if scheme == "unix":
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(place)
        return connection
    host, _, port = place.partition(":")
    connection = socket.create_connection((host, int(port)))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _receive(connection: socket.socket, view: memoryview, wanted: bytes | None = None) -> None:
    got = 0
    while got < len(view):
        received = connection.recv_into(view[got:], 0, socket.MSG_WAITALL)
        if not received:
            raise BenchmarkError("redis-server has closed the connection")
        got += received
    if wanted is not None and view != wanted:
        raise BenchmarkError(f"redis-server answers {bytes(view)!r}")
