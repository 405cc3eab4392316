"""The sockets of an engine's stream: SUB for its batches, a DEALER for each replay. It knows no event.

All of it runs on the event loop it was made on, in turns of `Wire`. What the batches mean is
`kvstore.index.engine_stream`'s.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

import zmq
from zmq.utils.monitor import parse_monitor_message

from kvstore.errors import ConfigError
from kvstore.index.engine_source import EngineSource, SourceStatistics
from kvstore.index.engine_stream import EngineStream
from kvstore.index.locality import Locality
from kvstore.index.resolver import Endpoint, Resolver
from kvstore.index.wire import Wire, watched

logger = logging.getLogger(__name__)

_TICK_S: Final = 0.25
# Engines answer between two batches, within 0.1 s.
_ANSWER_S: Final = 1.5
# libzmq connects anew by itself, but not after a frame that was too long or bytes that were none of ZeroMQ's.
_DIAL_S: Final = 2.0
# An engine that has a name may be somewhere else by then, though who is where it was does answer.
_MOVED_S: Final = 60.0
# Of one batch, which is applied in one turn of the loop: vLLM's step of 128,000 tokens has 0.6 MB.
_FRAME_BYTES_MAX: Final = 4 << 20
# Batches that wait here. Of a replay all: what an engine cannot send at once, it drops.
_BATCHES_MAX: Final = 64
_REPLAY_BATCHES_MAX: Final = 20_000
_SEQ_BYTES: Final = 8
_END: Final = b"\xff" * _SEQ_BYTES
_WATCHED: Final = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED

_Context = zmq.Context[zmq.Socket[bytes]]


class EngineSubscriber:
    """Listens to one engine until it is closed, and connects anew by itself. `resolver` knows where it is.

    Raises:
        ConfigError: an endpoint is none, or there are too many sockets.
    """

    def __init__(
        self, context: _Context, source: EngineSource, locality: Locality, resolver: Resolver
    ) -> None:
        self._events = Endpoint.of(source.endpoint)
        self._replays = Endpoint.of(source.replay) if source.replay else None
        self._context = context
        self._source = source
        self._resolver = resolver
        # Where it is connected to, or connecting; and which of several addresses has its turn.
        self._place: str | None = None
        self._turn = 0
        socket, monitor = _opened(context, source)
        self.stream = EngineStream(source, locality)
        self._replay: Wire | None = None
        self._replay_heard_s = 0.0
        self._monitor = Wire(monitor, self._noticed)
        self._batches = Wire(socket, self._received)
        # Since when there is no connection, or was none when it was asked for again.
        self._away_s: float | None = time.monotonic()
        self._dial(self._away_s)
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(_TICK_S, self._tick)

    def statistics(self) -> SourceStatistics:
        """The state and the counts of now."""
        return self.stream.statistics()

    def age_s(self) -> float:
        """How long ago all that the engine had was known; infinite for never."""
        return self.stream.age_s(time.monotonic())

    @property
    def incomplete(self) -> bool:
        """Whether the engine has more than is known here."""
        blocks = self.stream.blocks
        return blocks.incomplete or blocks.holding.over

    def close(self) -> None:
        """End it, and forget the engine; from the loop that it runs on."""
        self._timer.cancel()
        self._end_replay()
        if not self._batches.socket.closed:
            self._batches.socket.disable_monitor()
        self._monitor.close()
        self._batches.close()
        self.stream.close()

    def _noticed(self, frames: Sequence[bytes]) -> None:
        now_s = time.monotonic()
        if parse_monitor_message(list(frames))["event"] == zmq.EVENT_DISCONNECTED:
            logger.info("engine %s: lost %s", self._source.name, self._source.endpoint)
            self.stream.disconnected(now_s)
            self._away_s = now_s
            self._end_replay()
        else:
            logger.info("engine %s: connected to %s", self._source.name, self._source.endpoint)
            self.stream.connected(now_s)
            self._away_s = None
        self._ask(now_s)

    def _received(self, frames: Sequence[bytes]) -> None:
        if len(frames) != 3 or len(frames[1]) != _SEQ_BYTES:
            self.stream.malformed()
            return
        topic, seq, payload = frames
        now_s = time.monotonic()
        self.stream.batch(int.from_bytes(seq, "big"), topic, payload, now_s)
        self._ask(now_s)

    def _replayed(self, frames: Sequence[bytes]) -> None:
        now_s = self._replay_heard_s = time.monotonic()
        if len(frames) != 4 or len(frames[2]) != _SEQ_BYTES:
            self.stream.malformed()
            return
        _, topic, seq, payload = frames
        if seq == _END:
            self._end_replay()
            self.stream.replay_ended(now_s)
        else:
            self.stream.replayed(int.from_bytes(seq, "big"), topic, payload, now_s)
        self._ask(now_s)

    def _tick(self) -> None:
        self._timer = self._loop.call_later(_TICK_S, self._tick)
        now_s = time.monotonic()
        if self._replay is not None and now_s - self._replay_heard_s >= _ANSWER_S:
            self._end_replay()
            self.stream.replay_failed(now_s)
        self.stream.tick(now_s)
        self._ask(now_s)
        self._dial(now_s)

    def _dial(self, now_s: float) -> None:
        """Connect to where the engine is now; where it does not answer, to the next of its addresses."""
        if self._away_s is None and self._events.place is not None:
            return
        places = self._resolver.places(self._events, _MOVED_S if self._away_s is None else _DIAL_S)
        in_vain = self._away_s is not None and now_s - self._away_s >= _DIAL_S
        if not places or (self._place in places and not in_vain):
            return
        if self._place is not None:
            with suppress(zmq.ZMQError):
                self._batches.socket.disconnect(self._place)
            self._turn += in_vain
        if self._away_s is None:
            logger.info("engine %s: is no longer at %s", self._source.name, self._place)
            self.stream.disconnected(now_s)
            self._end_replay()
        self._away_s = now_s
        self._place = places[self._turn % len(places)]
        self._batches.socket.connect(self._place)

    def _ask(self, now_s: float) -> None:
        """Ask for what is due. Each replay has a socket: nothing of an older one comes in between."""
        start = self.stream.due(now_s)
        if start is None:
            return
        self._end_replay()
        socket = self._dealer()
        places = self._resolver.places(self._replays, _MOVED_S) if self._replays else ()
        if places:  # else it is as one that does not answer
            socket.connect(places[self._turn % len(places)])
        self._replay = Wire(socket, self._replayed)
        self._replay.send((b"", start.to_bytes(_SEQ_BYTES, "big")))
        self._replay_heard_s = now_s
        self.stream.asked(now_s)

    def _dealer(self) -> zmq.Socket[bytes]:
        socket = watched(self._context, zmq.DEALER, _FRAME_BYTES_MAX)
        socket.setsockopt(zmq.RCVHWM, _REPLAY_BATCHES_MAX)
        return socket

    def _end_replay(self) -> None:
        if self._replay is not None:
            self._replay.close()
            self._replay = None


def _opened(context: _Context, source: EngineSource) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
    """A socket for batches, and what tells of its connections."""
    try:
        socket = watched(context, zmq.SUB, _FRAME_BYTES_MAX)
        socket.setsockopt(zmq.RCVHWM, _BATCHES_MAX)
        socket.setsockopt(zmq.SUBSCRIBE, (source.topic or "").encode())
        try:
            return socket, socket.get_monitor_socket(_WATCHED)
        except zmq.ZMQError:
            socket.close(0)
            raise
    except zmq.ZMQError as exc:
        raise ConfigError(f"engine {source.name}: {exc.strerror}; follow fewer, or allow more files") from exc
