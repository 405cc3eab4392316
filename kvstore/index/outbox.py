"""What happened to a daemon's blocks, in its order, as the frames that indexes are sent. It opens no socket.

Whoever tells it is not held up: it is made into Events a turn of the loop later, or where that was done just
before, a millisecond later, together with what else happens by then.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, TypeVar
from zlib import crc32

from kvstore.block import Medium, Namespace
from kvstore.index.feed import KEYS_MAX, Digest, Events, Removed, Stored, encode

# Kept for those who have missed something: at 500 frames a second, 20 s.
FRAMES_MAX: Final = 10_000
BYTES_MAX: Final = 64 << 20
# Between two frames: at 8,000 commits a second, half the CPU that one for each commit takes.
_APART_S: Final = 0.001
# Of a frame, roughly: namespaces may have 4 KiB each.
_FRAME_BYTES: Final = 1 << 20
_EVENT_BYTES: Final = 80
_KEY_BYTES: Final = 66

Event = Stored | Removed
_Event = TypeVar("_Event", bound=Event)
# Namespace, medium, keys, and what each of them follows; None there: they were removed.
_Told = tuple[Namespace, Medium, Sequence[bytes], Sequence[bytes | None] | None]


class Outbox:
    """Numbers what happens, keeps the last of it, and counts what there is."""

    def __init__(self) -> None:
        self.seq = 0
        self.frames: deque[bytes] = deque()  # up to that of `seq`
        self.frames_bytes = 0
        self.stored_blocks = self.removed_blocks = 0
        self._media: dict[Medium, tuple[int, int]] = {}  # blocks, and the sum of their keys' CRC-32
        self._told: list[_Told] = []
        self._told_at_s = 0.0
        self._due_s = 0.0
        self._flushing: asyncio.Handle | None = None
        self._sinks: list[Callable[[Sequence[Event], float], None]] = []
        self._flushed: list[Callable[[], None]] = []

    def follow(self, call: Callable[[Sequence[Event], float], None]) -> None:
        """Call this with the events of each frame, and when the first of them happened."""
        self._sinks.append(call)

    def on_flush(self, call: Callable[[], None]) -> None:
        """Call this when there are more frames."""
        self._flushed.append(call)

    def stored(
        self,
        namespace: Namespace,
        medium: Medium,
        keys: Sequence[bytes],
        predecessors: Sequence[bytes | None],
    ) -> None:
        """These can be read in the medium; each follows its predecessor, b"" is that of a prompt's first."""
        self.stored_blocks += len(keys)
        self._tell((namespace, medium, keys, predecessors))

    def removed(self, namespace: Namespace, medium: Medium, keys: Sequence[bytes]) -> None:
        """These can be read in the medium no longer."""
        self.removed_blocks += len(keys)
        self._tell((namespace, medium, keys, None))

    def flush(self) -> None:
        """Make frames of all that has happened."""
        if self._flushing is not None:
            self._flushing.cancel()
            self._flushing = None
        if not self._told:
            return
        self._due_s = time.monotonic() + _APART_S
        told, self._told = self._told, []
        for events in packed(_events(told)):
            for event in events:
                self._count(event)
            self.seq += 1
            self._keep(encode(Events(self.seq, self._told_at_s, events)))
            for sink in self._sinks:
                sink(events, self._told_at_s)
        for call in self._flushed:
            call()

    def reaches(self, seq: int) -> bool:
        """Whether everything that followed `seq` is kept."""
        return self.seq - len(self.frames) <= seq <= self.seq

    def frame(self, seq: int) -> bytes | None:
        """The frame of that number, if it is kept."""
        place = seq - self.seq - 1
        return self.frames[place] if -len(self.frames) <= place < 0 else None

    def digests(self) -> dict[Medium, Digest]:
        """What there is after `seq`."""
        return {medium: Digest(*counted) for medium, counted in self._media.items()}

    def close(self) -> None:
        """Make no more frames."""
        if self._flushing is not None:
            self._flushing.cancel()

    def _tell(self, told: _Told) -> None:
        if not self._told:
            self._told_at_s = time.time()
            loop = asyncio.get_running_loop()
            self._flushing = loop.call_later(max(0.0, self._due_s - time.monotonic()), self.flush)
        self._told.append(told)

    def _count(self, event: Event) -> None:
        blocks, crc_sum = self._media.get(event.medium, (0, 0))
        sign = 1 if isinstance(event, Stored) else -1
        self._media[event.medium] = (
            blocks + sign * len(event.keys),
            (crc_sum + sign * sum(map(crc32, event.keys))) % (1 << 64),
        )

    def _keep(self, frame: bytes) -> None:
        self.frames.append(frame)
        self.frames_bytes += len(frame)
        while len(self.frames) > FRAMES_MAX or (self.frames_bytes > BYTES_MAX and len(self.frames) > 1):
            self.frames_bytes -= len(self.frames.popleft())


def chains(
    keys: Sequence[bytes], predecessors: Sequence[bytes | None]
) -> Iterator[tuple[bytes | None, Sequence[bytes]]]:
    """The keys in runs that follow each other, each run with what it follows; or in runs of unknown ones."""
    if predecessors[0] is not None and predecessors[1:] == keys[:-1]:  # the usual case
        yield predecessors[0], keys
        return
    start = 0
    for place in range(1, len(keys)):
        follows = predecessors[place] == (None if predecessors[start] is None else keys[place - 1])
        if not follows:
            yield predecessors[start], keys[start:place]
            start = place
    yield predecessors[start], keys[start:]


def packed(events: Iterable[_Event], keys_max: int = KEYS_MAX) -> Iterator[list[_Event]]:
    """The events in as many lists as they need frames."""
    together: list[_Event] = []
    keys = nbytes = 0
    for event in events:
        event_bytes = _EVENT_BYTES + len(event.namespace) + _KEY_BYTES * len(event.keys)
        if together and (keys + len(event.keys) > keys_max or nbytes + event_bytes > _FRAME_BYTES):
            yield together
            together, keys, nbytes = [], 0, 0
        together.append(event)
        keys += len(event.keys)
        nbytes += event_bytes
    if together:
        yield together


def _events(told: Iterable[_Told]) -> Iterator[Event]:
    """What was told, with what goes on where it left off together."""
    last: Event | None = None
    for namespace, medium, keys, predecessors in told:
        for event in _events_of(namespace.canonical, medium, keys, predecessors):
            if last is not None and _goes_on(last, event):
                last.keys.extend(event.keys)
                continue
            if last is not None:
                yield last
            last = event
    if last is not None:
        yield last


def _events_of(
    namespace: bytes, medium: Medium, keys: Sequence[bytes], predecessors: Sequence[bytes | None] | None
) -> Iterator[Event]:
    for start in range(0, len(keys), KEYS_MAX):
        some = keys[start : start + KEYS_MAX]
        if predecessors is None:
            yield Removed(namespace, medium, list(some))
            continue
        for parent, run in chains(some, predecessors[start : start + KEYS_MAX]):
            yield Stored(namespace, medium, parent, list(run))


def _goes_on(last: Event, event: Event) -> bool:
    """Whether two events are one."""
    if last.medium is not event.medium or last.namespace != event.namespace:
        return False
    if len(last.keys) + len(event.keys) > KEYS_MAX:
        return False
    if isinstance(last, Stored) and isinstance(event, Stored):
        return event.parent == (None if last.parent is None else last.keys[-1])
    return isinstance(last, Removed) and isinstance(event, Removed)
