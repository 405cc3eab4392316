"""Who follows a daemon's feed or its announcements by hand: raw sockets, and what they were told."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Final, Self
from zlib import crc32

import zmq

from kvstore.block import Medium, Namespace
from kvstore.index import feed
from kvstore.index.wire import join_curve

_PATIENCE_S: Final = 20.0
Place = tuple[bytes, Medium]


@contextmanager
def sockets() -> Iterator["zmq.Context[Any]"]:
    """Sockets of this are closed at the end."""
    context: zmq.Context[Any] = zmq.Context()
    try:
        yield context
    finally:
        context.destroy(linger=0)


class Follower:
    """An index in miniature: it believes what it is told, and notes what cannot be.

    `keys` has what is where by that, and `told` every event in its order.
    """

    def __init__(self, endpoint: str, *, secret: bytes | None = None, queued: int = 1000) -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVHWM, queued)
        self.socket.setsockopt(zmq.IPV6, 1)
        if secret is not None:
            join_curve(self.socket, secret)
        self.socket.connect(f"tcp://{endpoint}")
        self.hello: feed.Hello | None = None
        self.keys: dict[Place, set[bytes]] = {}
        self.complete = False
        self._parents: dict[bytes, dict[bytes, bytes | None]] = {}
        self.told: list[feed.Stored | feed.Removed] = []
        self.seq = -1
        self.snapshots = self.resumed = self.parts = self.beats = 0
        self.held: list[feed.Held] = []
        self.measures: list[feed.Measures] = []
        self.wrong: list[str] = []
        self._alive_at = 0.0

    def subscribe(self, epoch: int | None = None, seq: int | None = None) -> None:
        self.say(feed.Subscribe(feed.VERSION, epoch, seq))

    def say(self, message: feed.ToDaemon) -> None:
        self.socket.send(feed.encode(message))

    def until(self, condition: Callable[[], object], timeout_s: float = _PATIENCE_S) -> None:
        """Take messages until the condition holds; fails when it does not within the time."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"not so in time; at {self.seq}, {self.hello}"
            self.take(20)

    def take(self, wait_ms: int = 0) -> bool:
        """Take one message, if there is one within the time."""
        now = time.monotonic()
        if self.hello is not None and now > self._alive_at + feed.ALIVE_S:
            self._alive_at = now
            self.say(feed.Alive())
        if not self.socket.poll(wait_ms):
            return False
        self._hear(feed.decode_to_index(self.socket.recv()))
        return True

    def has(self, namespace: Namespace, *media: Medium) -> list[set[bytes]]:
        """What is in these media."""
        return [self.keys.get((namespace.canonical, medium), set()) for medium in media]

    def parents(self, namespace: Namespace) -> dict[bytes, bytes | None]:
        """What each key was said to follow, of those that are somewhere."""
        there = set().union(*self.has(namespace, *Medium))
        return {key: b for key, b in self._parents.get(namespace.canonical, {}).items() if key in there}

    def digest(self, medium: Medium) -> feed.Digest:
        every = [keys for (_, where), keys in self.keys.items() if where is medium]
        crc_sum = sum(crc32(key) for keys in every for key in keys)
        return feed.Digest(sum(map(len, every)), crc_sum % (1 << 64))

    def _hear(self, message: feed.ToIndex) -> None:
        match message:
            case feed.Hello():
                self.hello, self.seq = message, message.seq
                self.resumed += message.resumed
                self.snapshots += not message.resumed
                self.complete = message.resumed
                if not message.resumed:
                    self.keys.clear()
            case feed.Part():
                self.parts += 1
                if sum(len(stored.keys) for stored in message.stored) > feed.KEYS_MAX:
                    self.wrong.append("a part is too long")
                for stored in message.stored:
                    self._apply(stored)
            case feed.End():
                self.complete = True
                self._compare("the end", message.digests, message.seq)
            case feed.Events():
                if message.seq != self.seq + 1:
                    self.wrong.append(f"{message.seq} follows {self.seq}")
                if sum(len(event.keys) for event in message.events) > feed.KEYS_MAX:
                    self.wrong.append("a frame is too long")
                self.seq = message.seq
                for event in message.events:
                    self.told.append(event)
                    self._apply(event)
            case feed.Heartbeat():
                self.beats += 1
                if message.measures is not None:
                    self.measures.append(message.measures)
                self._compare("a heartbeat", message.digests, message.seq)
            case feed.Held():
                self.held.append(message)

    def _apply(self, event: feed.Stored | feed.Removed) -> None:
        keys = self.keys.setdefault((event.namespace, event.medium), set())
        there = keys.intersection(event.keys)
        if isinstance(event, feed.Removed):
            if len(there) < len(event.keys):
                self.wrong.append(f"{set(event.keys) - there} are removed from {event.medium} and not there")
            keys.difference_update(event.keys)
            return
        if there:
            self.wrong.append(f"{there} are stored in {event.medium} again")
        keys.update(event.keys)
        before, parents = event.parent, self._parents.setdefault(event.namespace, {})
        for key in event.keys:
            parents[key] = before
            before = None if event.parent is None else key

    def _compare(self, what: str, digests: dict[Medium, feed.Digest], seq: int) -> None:
        if seq != self.seq:
            self.wrong.append(f"{what} of {seq} after {self.seq}")
        self.wrong += [
            f"{what} says {digests.get(medium)} of {medium}, and there is {self.digest(medium)}"
            for medium in Medium
            if digests.get(medium, feed.Digest(0, 0)) != self.digest(medium)
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._context.destroy(linger=0)
        assert error is not None or not self.wrong, self.wrong[:5]
