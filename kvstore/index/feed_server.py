"""The daemon's end of the feed: whoever subscribes gets all there is, and then what happens, in order.

Each subscriber has a place in the outbox's frames and gets them as fast as it takes them, so that nothing is
queued for one that does not read. Who is so slow that the frames it needs are gone starts over. What it asks
to be held is `kvstore.index.feed_holds`'s.
"""

import asyncio
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol
from zlib import crc32

import zmq

from kvstore.block import Medium, Namespace
from kvstore.errors import ProtocolError
from kvstore.index import feed
from kvstore.index.feed_holds import FeedHolds
from kvstore.index.outbox import Outbox, chains, packed
from kvstore.index.wire import Wire, allow, bind, serve_curve, watched

SUBSCRIBERS_MAX: Final = 64
# Frames that wait in its queue, of 1 MB at most; the others wait in the outbox.
_QUEUED: Final = 8
# Frames of one that wait for us, where they may be long.
_UNREAD: Final = 32
# Frames sent, and time spent on a snapshot, before others have their turn.
_TURN: Final = 64
_TURN_S: Final = 0.001
# Keys looked up and sorted into chains at once: 0.3 ms, or 1 ms where none follows another.
_PART_KEYS: Final = 1024
# When a full queue is tried again, and how long a snapshot waits for one subscriber on behalf of all.
_RETRY_S: Final = 0.005
_PATIENCE_S: Final = 2.0
# Between two snapshots, for which all that is there is listed.
_PAUSE_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class Held:
    """Keys of a namespace that can be read in a medium. The list is theirs who asked."""

    namespace: Namespace
    medium: Medium
    keys: list[bytes]


class Inventory(Protocol):
    """What a daemon has."""

    def held(self) -> list[Held]:
        """All of it, as of now."""

    def predecessors(self, namespace: Namespace, keys: Sequence[bytes]) -> list[bytes | None]:
        """What each of the keys follows, where that is known; b"" where it starts a prompt."""


@dataclass(slots=True)
class _Subscriber:
    """`seq` is that of the last frame it was sent; None while it has yet to get all there is.

    `measured_s` is when it was told last what has been measured.
    """

    heard_s: float
    seq: int | None = None
    measured_s: float = -math.inf


@dataclass(slots=True)
class _Snapshot:
    """On its way to all who have asked for one by then; `unsent` are those who lack the present frame."""

    seq: int
    members: set[bytes]
    frames: Iterator[bytes]
    frame: bytes = b""
    unsent: set[bytes] = field(default_factory=set)
    stuck_until: float = 0.0


class FeedServer:
    """Listens from the start. `close` it on the loop that it was made on."""

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        address: tuple[str, int],
        outbox: Outbox,
        inventory: Inventory,
        *,
        node: str,
        epoch: int,
        engines: Sequence[str] = (),
        topology: str = "",
        secret: bytes | None = None,
        measure: Callable[[], feed.Measures | None] = lambda: None,
        holds: FeedHolds | None = None,
    ) -> None:
        """With a `secret` only those are let in who have it. `measure` is asked every few seconds.

        Raises:
            ConfigError: the address cannot be listened on.
        """
        self._outbox = outbox
        self._inventory = inventory
        self._node, self._epoch, self._engines, self._topology = node, epoch, list(engines), topology
        self._measure, self._holds = measure, holds
        self._gate = None if secret is None else allow(context, secret)
        long = holds is not None and not holds.refusal()
        socket = watched(context, zmq.ROUTER, feed.HOLD_BYTES_MAX if long else feed.SAID_BYTES_MAX)
        if long:
            socket.setsockopt(zmq.RCVHWM, _UNREAD)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.SNDHWM, _QUEUED)
        if secret is not None:
            serve_curve(socket, secret)
        self._wire = Wire(socket, self._on_message)
        try:
            self.endpoint = bind(socket, *address, "feed")
        except BaseException:
            self.close()
            raise
        self._subscribers: dict[bytes, _Subscriber] = {}
        self._snapshot: _Snapshot | None = None
        self.dropped = self.refused = 0
        self._loop = asyncio.get_running_loop()
        self._again: asyncio.Handle | None = None
        self._going_on: asyncio.Handle | None = None
        self._beat = self._loop.call_later(feed.HEARTBEAT_S, self._on_beat)
        outbox.on_flush(self._pump)

    @property
    def subscribers(self) -> int:
        """Those who are served now."""
        return len(self._subscribers)

    def close(self) -> None:
        """Tell nobody anything more."""
        for name in ("_beat", "_again", "_going_on"):
            handle = getattr(self, name, None)
            if handle is not None:
                handle.cancel()
        self._wire.close()
        if self._gate is not None:
            self._gate.close()

    # What subscribers say.

    def _on_message(self, frames: Sequence[bytes]) -> None:
        try:
            identity, frame = frames
            message = feed.decode_to_daemon(frame)
            if len(frame) > feed.SAID_BYTES_MAX and not isinstance(message, feed.Hold):
                raise ProtocolError(f"feed: a frame of {len(frame)} bytes from an index")
        except (ValueError, ProtocolError):
            self.refused += 1
            return
        now = time.monotonic()
        if isinstance(message, feed.Subscribe):
            if message.version != feed.VERSION or not self._may_enter(identity, now):
                self.refused += 1
                return
            self._enter(identity, message, now)
        elif (subscriber := self._subscribers.get(identity)) is not None:
            subscriber.heard_s = now
            self._hold(identity, message, now)

    def _hold(self, identity: bytes, message: feed.ToDaemon, now: float) -> None:
        if self._holds is None:
            self.refused += not isinstance(message, feed.Alive)
        elif isinstance(message, feed.Hold):
            self._wire.send([identity, feed.encode(self._holds.hold(identity, message, now))])
        elif isinstance(message, feed.Unhold):
            self._holds.end(identity, message)

    def _may_enter(self, identity: bytes, now: float) -> bool:
        if identity in self._subscribers or len(self._subscribers) < SUBSCRIBERS_MAX:
            return True
        silent = min(self._subscribers, key=lambda name: self._subscribers[name].heard_s)
        if now - self._subscribers[silent].heard_s <= 2 * feed.ALIVE_S:
            return False
        self._forget(silent)
        return True

    def _enter(self, identity: bytes, wish: feed.Subscribe, now: float) -> None:
        self._leave_snapshot(identity)
        self._outbox.flush()
        subscriber = self._subscribers[identity] = _Subscriber(now)
        known = wish.seq if wish.epoch == self._epoch else None
        if known is None or not self._outbox.reaches(known):
            self._go_on_soon()
        elif self._wire.send([identity, self._hello(known, resumed=True)]):
            subscriber.seq = known
            self._pump_one(identity, subscriber)

    def _hello(self, seq: int, *, resumed: bool) -> bytes:
        takes_holds = self._holds is not None and not self._holds.refusal()
        place = self._engines, self._topology, takes_holds
        return feed.encode(feed.Hello(feed.VERSION, self._node, self._epoch, seq, resumed, *place))

    def _forget(self, identity: bytes) -> None:
        del self._subscribers[identity]
        self._leave_snapshot(identity)
        if self._holds is not None:
            self._holds.forget(identity)
        self.dropped += 1

    # What happens.

    def _pump(self) -> None:
        """Send everybody the frames that it lacks, as far as it takes them."""
        if self._again is not None:
            self._again.cancel()
            self._again = None
        for identity, subscriber in self._subscribers.items():
            if subscriber.seq is not None:
                self._pump_one(identity, subscriber)

    def _pump_one(self, identity: bytes, subscriber: _Subscriber) -> None:
        assert subscriber.seq is not None
        for _ in range(max(1, _TURN // len(self._subscribers))):
            if subscriber.seq == self._outbox.seq:
                return
            frame = self._outbox.frame(subscriber.seq + 1)
            if frame is None:  # it was too slow
                self.dropped += 1
                subscriber.seq = None
                self._go_on_soon()
                return
            if not self._wire.send([identity, frame]):
                self._pump_again(_RETRY_S)
                return
            subscriber.seq += 1
        self._pump_again(0)

    def _pump_again(self, after_s: float) -> None:
        if self._again is None:
            self._again = self._loop.call_later(after_s, self._pump)

    def _on_beat(self) -> None:
        now = time.monotonic()
        self._beat = self._loop.call_later(feed.HEARTBEAT_S, self._on_beat)
        for identity in [i for i, s in self._subscribers.items() if now - s.heard_s > feed.SUBSCRIBER_S]:
            self._forget(identity)
        self._outbox.flush()
        self._pump()
        there = [(i, s) for i, s in self._subscribers.items() if s.seq == self._outbox.seq]
        due = {i for i, s in there if now - s.measured_s >= feed.MEASURES_S}
        beat, full = self._heartbeat(None), self._heartbeat(self._measure()) if due else b""
        for identity, subscriber in there:
            if self._wire.send([identity, full if identity in due else beat]) and identity in due:
                subscriber.measured_s = now

    def _heartbeat(self, measures: feed.Measures | None) -> bytes:
        outbox = self._outbox
        beat = feed.Heartbeat(self._epoch, outbox.seq, time.time(), outbox.digests(), measures)
        return feed.encode(beat)

    # Snapshots: one at a time, to all who wait for one.

    def _go_on_soon(self, after_s: float = 0.0) -> None:
        if self._going_on is None:
            self._going_on = self._loop.call_later(after_s, self._go_on)

    def _go_on(self) -> None:
        self._going_on = None
        if self._snapshot is None:
            self._begin()
        until = time.monotonic() + _TURN_S
        while (snapshot := self._snapshot) is not None and time.monotonic() < until:
            if not snapshot.unsent and not self._next(snapshot):
                self._finish(snapshot)
                return
            self._send(snapshot)
            if snapshot.unsent:
                self._wait_for(snapshot)
                return
        if self._snapshot is not None:
            self._go_on_soon()

    def _begin(self) -> None:
        members = {identity for identity, s in self._subscribers.items() if s.seq is None}
        if members:
            self._outbox.flush()
            frames = self._snapshot_frames(self._outbox.seq, self._inventory.held())
            self._snapshot = _Snapshot(self._outbox.seq, members, frames)

    def _next(self, snapshot: _Snapshot) -> bool:
        """Take the next frame; False where there is none, or nobody to get it."""
        frame = next(snapshot.frames, None) if snapshot.members else None
        if frame is None:
            return False
        snapshot.frame, snapshot.unsent = frame, set(snapshot.members)
        snapshot.stuck_until = time.monotonic() + _PATIENCE_S
        return True

    def _send(self, snapshot: _Snapshot) -> None:
        sent = [i for i in snapshot.unsent if self._wire.send([i, snapshot.frame])]
        snapshot.unsent.difference_update(sent)

    def _wait_for(self, snapshot: _Snapshot) -> None:
        if time.monotonic() > snapshot.stuck_until:
            for identity in list(snapshot.unsent):
                self._forget(identity)
        self._go_on_soon(_RETRY_S)

    def _finish(self, snapshot: _Snapshot) -> None:
        self._snapshot = None
        for identity in snapshot.members:
            subscriber = self._subscribers[identity]
            subscriber.seq = snapshot.seq
            self._pump_one(identity, subscriber)
        if any(subscriber.seq is None for subscriber in self._subscribers.values()):
            self._go_on_soon(_PAUSE_S)

    def _leave_snapshot(self, identity: bytes) -> None:
        if self._snapshot is not None:
            self._snapshot.members.discard(identity)
            self._snapshot.unsent.discard(identity)

    def _snapshot_frames(self, seq: int, held: Iterable[Held]) -> Iterator[bytes]:
        yield self._hello(seq, resumed=False)
        digests: dict[Medium, feed.Digest] = {}
        for stored in packed(self._stored(held), _PART_KEYS):
            for each in stored:
                was = digests.get(each.medium, feed.Digest(0, 0))
                crc_sum = (was.crc_sum + sum(map(crc32, each.keys))) % (1 << 64)
                digests[each.medium] = feed.Digest(was.blocks + len(each.keys), crc_sum)
            yield feed.encode(feed.Part(stored))
        yield feed.encode(feed.End(seq, digests))

    def _stored(self, held: Iterable[Held]) -> Iterator[feed.Stored]:
        for some in held:
            canonical = some.namespace.canonical
            some.keys.reverse()
            while some.keys:
                keys = some.keys[: -_PART_KEYS - 1 : -1]
                del some.keys[-_PART_KEYS:]  # bit by bit: letting go of 1M keys takes 10 ms
                predecessors = self._inventory.predecessors(some.namespace, keys)
                for parent, run in chains(keys, predecessors):
                    yield feed.Stored(canonical, some.medium, parent, list(run))
