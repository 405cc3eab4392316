"""Announcements to other people's routers: for each engine identity a topic, as if the engine published it.

vLLM's protocol (`vllm/distributed/kv_events.py`): a PUB socket for batches, numbered in each topic, and
a ROUTER that sends again what somebody has missed, from a number on. Nothing is encrypted.

A new process of vLLM's numbers from 0 again, which routers do not notice, or take for something old: they go
on believing what the one before had announced. So a daemon numbers from its epoch on, and the first thing
that it says of an engine is that all is cleared, once routers have had time to connect anew.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Final

import zmq

from kvstore.block import Namespace
from kvstore.index.events import AllBlocksCleared, BlockStored, Event, encode_batch
from kvstore.index.outbox import Event as Told
from kvstore.index.vllm_terms import TOKENS_MAX, TokensOf, VllmTerms
from kvstore.index.wire import Wire, bind

logger = logging.getLogger(__name__)

# vLLM's buffer_steps; and bytes, since ours may have more blocks each.
BATCHES_MAX: Final = 10_000
BYTES_MAX: Final = 64 << 20
# A seq that nobody is to take up again is kept of each.
MODELS_MAX: Final = 256
# Batches queued for a router that does not read; then it misses some.
_QUEUED: Final = 1000
_REQUEST_BYTES_MAX: Final = 4096
_REPLAYS_MAX: Final = 64
_REPLAYS_QUEUED: Final = 32
# Spent on replays before others have their turn; and how long one waits for its reader.
_TURN_S: Final = 0.001
_RETRY_S: Final = 0.005
_PATIENCE_S: Final = 5.0
# libzmq's subscribers connect anew after 0.1 s.
_GRACE_S: Final = 1.0
_END: Final = (-1).to_bytes(8, "big", signed=True)


@dataclass(slots=True, eq=False)
class _Replay:
    """Answers on their way to one router; `answer` is the one that it has not taken yet."""

    answers: Iterator[list[bytes]]
    answer: list[bytes] | None = None
    stuck_until: float = 0.0


@dataclass(slots=True, eq=False)
class _Door:
    """Where the topics of some engines are published."""

    engines: list[str]  # ADDRESS or ADDRESS@MODEL
    publish: "zmq.Socket[bytes]"
    replay: Wire
    endpoints: tuple[str, str]
    replays: dict[bytes, _Replay] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _Stream:
    """The batches of a model, the same under each of its topics."""

    topics: list[tuple[_Door, bytes]]
    seq: int


class Announcer:
    """Listens from the start. `close` it on the loop that it was made on."""

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        engines: Sequence[str],
        tokens_of: TokensOf,
        *,
        publish: tuple[str, int],
        replay: tuple[str, int],
        each: bool = False,
        arrays: bool = False,
        first_seq: int = 0,
        clear: bool = True,
    ) -> None:
        """`engines` are ADDRESS or ADDRESS@MODEL; with `each`, every address has ports of its own.

        With `clear` nothing is told for the first second; then that all is cleared, and what has happened.

        Raises:
            ConfigError: an address cannot be listened on.
        """
        self._context = context
        self._arrays = arrays
        self._terms = VllmTerms(tokens_of, arrays=arrays)
        self._first_seq = first_seq
        self._streams: dict[str, _Stream] = {}
        self._history: deque[tuple[_Stream, int, bytes]] = deque()
        self._history_bytes = 0
        self._doors: list[_Door] = []
        self._loop = asyncio.get_running_loop()
        self._going_on: asyncio.Handle | None = None
        self._warned = False
        self.refused = 0
        # What happens before routers are told anything.
        self._held: list[tuple[Sequence[Told], float]] | None = [] if clear else None
        self._beginning = self._loop.call_later(_GRACE_S, self._begin)
        addresses = list(dict.fromkeys(engine.partition("@")[0] for engine in engines))
        shares = [[e for e in engines if e.partition("@")[0] == a] for a in addresses]
        try:
            for number, share in enumerate(shares if each else [list(engines)]):
                self._open(share, _counted_up(publish, number), _counted_up(replay, number))
        except BaseException:
            self.close()
            raise

    @property
    def endpoints(self) -> tuple[str, str]:
        """HOST:PORT for publishing and for replays; with ports for each engine, one after the other."""
        published, replayed = zip(*[door.endpoints for door in self._doors], strict=True)
        return ",".join(published), ",".join(replayed)

    @property
    def topics(self) -> int:
        """Those announced so far."""
        return sum(len(stream.topics) for stream in self._streams.values())

    def announce(self, told: Sequence[Told], at_s: float) -> None:
        """Tell the routers. What is of no engine is not told."""
        if self._held is not None:
            self._held.append((told, at_s))
            return
        by_model: dict[str, list[Event]] = {}
        for event in told:
            model, events = self._terms.say(event)
            if events:
                by_model.setdefault(model, []).extend(events)
        for model, events in by_model.items():
            if (stream := self._stream(model)) is not None:
                for batch in _batches(events):
                    self._publish(stream, encode_batch(batch, at_s, arrays=self._arrays, rank=0))

    def close(self) -> None:
        """Tell nobody anything more."""
        self._beginning.cancel()
        if self._going_on is not None:
            self._going_on.cancel()
        for door in self._doors:
            door.publish.close(linger=0)
            door.replay.close()

    # Publishing.

    def _open(self, engines: list[str], publish: tuple[str, int], replay: tuple[str, int]) -> None:
        socket = self._socket(zmq.PUB, _QUEUED)
        router = self._socket(zmq.ROUTER, _REPLAYS_QUEUED)
        router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        wire = Wire(router, lambda frames: self._on_request(door, frames))
        door = _Door(engines, socket, wire, ("", ""))
        self._doors.append(door)
        door.endpoints = bind(socket, *publish, "events.publish"), bind(router, *replay, "events.replay")

    def _socket(self, kind: int, queued: int) -> "zmq.Socket[bytes]":
        # No pings: not every implementation that routers are written with answers them.
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, queued)
        socket.setsockopt(zmq.MAXMSGSIZE, _REQUEST_BYTES_MAX)
        socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
        socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 30)
        return socket

    def _begin(self) -> None:
        """Clear every topic that is known by now, or one of no model; then tell what was held."""
        held, self._held = self._held, None
        if held is None:
            return
        models = [engine.partition("@")[2] for door in self._doors for engine in door.engines]
        models += [Namespace.from_canonical(event.namespace).model for told, _ in held for event in told]
        for model in dict.fromkeys(filter(None, models)) or [""]:
            if (stream := self._stream(model)) is not None:
                cleared = encode_batch([AllBlocksCleared()], time.time(), arrays=self._arrays, rank=0)
                self._publish(stream, cleared)
        for told, at_s in held:
            self.announce(told, at_s)

    def _stream(self, model: str) -> _Stream | None:
        stream = self._streams.get(model)
        if stream is None:
            found = [
                (door, f"kv@{engine.partition('@')[0]}@{model}".encode())
                for door in self._doors
                for engine in door.engines
                if engine.partition("@")[2] in ("", model)
            ]
            topics = list(dict.fromkeys(found))
            if not topics:
                return None
            if len(self._streams) >= MODELS_MAX:
                self._warn(model)
                return None
            stream = self._streams[model] = _Stream(topics, self._first_seq)
        return stream

    def _warn(self, model: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning("%d models are announced, which is the limit: %.80s is not", MODELS_MAX, model)

    def _publish(self, stream: _Stream, payload: bytes) -> None:
        seq, stream.seq = stream.seq, stream.seq + 1
        for door, topic in stream.topics:
            door.publish.send_multipart([topic, seq.to_bytes(8, "big"), payload], zmq.NOBLOCK)
        self._history.append((stream, seq, payload))
        self._history_bytes += len(payload)
        while len(self._history) > BATCHES_MAX or self._history_bytes > BYTES_MAX:
            self._history_bytes -= len(self._history.popleft()[2])

    # Replays.

    def _on_request(self, door: _Door, frames: Sequence[bytes]) -> None:
        """`[router, "", seq]`, as vLLM has it; a topic may follow, or else all are meant."""
        if len(frames) not in (3, 4) or len(frames[2]) > 8:
            self.refused += 1
            return
        router, start = frames[0], int.from_bytes(frames[2], "big")
        answers = self._answers(door, router, start, frames[3] if len(frames) == 4 else None)
        there = door.replays.get(router)
        if there is not None:
            there.answers = chain(there.answers, answers)
        elif len(door.replays) < _REPLAYS_MAX:
            door.replays[router] = _Replay(answers)
        else:
            self.refused += 1
        self._go_on_soon(0)

    def _answers(self, door: _Door, router: bytes, start: int, wanted: bytes | None) -> Iterator[list[bytes]]:
        for stream, seq, payload in tuple(self._history):
            if seq >= start:
                for through, topic in stream.topics:
                    if through is door and wanted in (None, topic):
                        yield [router, b"", topic, seq.to_bytes(8, "big"), payload]
        yield [router, b"", b"", _END, b""]

    def _go_on_soon(self, after_s: float) -> None:
        if self._going_on is None:
            self._going_on = self._loop.call_later(after_s, self._go_on)

    def _go_on(self) -> None:
        """Send answers for a while, of all replays in turn."""
        self._going_on = None
        until = time.monotonic() + _TURN_S
        moving = True
        while moving and time.monotonic() < until:
            moving = False
            for door in self._doors:
                for router, replay in list(door.replays.items()):
                    moving |= self._send_one(door, router, replay)
        if any(door.replays for door in self._doors):
            self._go_on_soon(0 if moving else _RETRY_S)

    def _send_one(self, door: _Door, router: bytes, replay: _Replay) -> bool:
        """Whether there was something to send, and it went."""
        if replay.answer is None:
            replay.answer = next(replay.answers, None)
            replay.stuck_until = time.monotonic() + _PATIENCE_S
        if replay.answer is None or time.monotonic() > replay.stuck_until:
            del door.replays[router]
            return False
        if not door.replay.send(replay.answer):
            return False
        replay.answer = None
        return True


def _batches(events: Sequence[Event]) -> Iterator[list[Event]]:
    """The events in as many lists as they need batches."""
    together: list[Event] = []
    tokens = 0
    for event in events:
        more = event.block_size * len(event.block_hashes) if isinstance(event, BlockStored) else 0
        if together and tokens + more > TOKENS_MAX:
            yield together
            together, tokens = [], 0
        together.append(event)
        tokens += more
    if together:
        yield together


def _counted_up(address: tuple[str, int], number: int) -> tuple[str, int]:
    host, port = address
    return host, port + number if port else 0
