"""What one engine's batches make of the index: in order, each once, from one process. It opens no socket.

Pure: who has the sockets hands over messages and the time, and asks the replay socket for what is `due`.
Batches are numbered from 0 by each process of the engine, and say nothing else about it:

    the next number        it counts
    a higher one           held, until what lies between has come late or in a replay; else that is lost
    a lower one            dropped, if it is the batch that was here or an older one; else another process
    a lost connection      nothing counts until a replay has shown that it is the same process; without a
                           replay nothing can, whatever its next number is, and all is forgotten
    silence                a replay shows whether the last batches got lost

A replay begins with batches that are known, so that each of them tells another process from this one. What
another process has begins anew: nothing of the one before answers any more. Where there may be another one,
nothing answers until it has proved to be the same, or those who could tell have not answered. What is lost
leaves the rest as it was, marked incomplete, unless the connection was lost too: then all of it is forgotten.
"""

import math
from dataclasses import asdict, dataclass
from typing import Final

from kvstore.errors import ProtocolError
from kvstore.index.engine_blocks import EngineBlocks
from kvstore.index.engine_source import EngineSource, SourceStatistics, StreamCounts
from kvstore.index.events import decode_batch
from kvstore.index.held import Held
from kvstore.index.holding import Holding
from kvstore.index.locality import Locality
from kvstore.index.marks import Marks
from kvstore.index.saved import SavedEngine
from kvstore.index.standing import Standing

# After so long without a batch one replay looks for those that nobody missed.
QUIET_S: Final = 2.0
# How far, and how long, a batch may be late where nobody can be asked for it.
_LATE_MAX: Final = 16
_LATE_S: Final = 0.5
# Known batches that a replay begins with.
_CHECKED: Final = 8
# Replays in vain until the stream goes on without, and for how long.
_TRIES: Final = 3
_ALONE_S: Final = 10.0
_SEQ_MAX: Final = (1 << 62) - 1
# Between two replays, whatever the answers are.
_EVERY_S: Final = 0.05


@dataclass(slots=True)
class _Replay:
    """A replay under way, asked for when `expected` was the next number; `beyond` is what follows a hole."""

    expected: int
    checked: bool = False
    progressed: bool = False
    beyond: int | None = None


class EngineStream:
    """The stream of one source, into a holding of its name."""

    def __init__(self, source: EngineSource, locality: Locality) -> None:
        self.source = source
        self._locality = locality
        self._topic: bytes | None = None
        self.blocks = EngineBlocks(source, self._fresh())
        self._counts = StreamCounts()
        self._standing = Standing(locality, source.name)
        self._next = 0
        self._published_s = -math.inf
        self._marks = Marks()
        self._held = Held()
        # Known to be the process whose batches were applied.
        self._settled = False
        self._connected = False
        self._heard_s = -math.inf
        self._last_batch_s: float | None = None
        self._replay: _Replay | None = None
        self._behind = False
        self._looked = False
        # Its replays have brought what is known: it keeps some.
        self._remembers = False
        self._failures = 0
        # Nobody can be asked, for good or until then.
        self._alone = not source.replay
        self._ask_at_s = math.inf if self._alone else -math.inf

    # What the owner of the sockets calls.

    def connected(self, now_s: float) -> None:
        """The publisher is there, whichever process it is."""
        if self._connected:  # nobody has said that the one before was lost
            self.disconnected(now_s)
        if self.source.replay:
            self._unsettle()
            self._doubt()
        self._connected = True
        self._heard_s = now_s
        self._looked = False
        self._failures = 0
        self._alone = not self.source.replay
        self._ask_at_s = math.inf if self._alone else now_s

    def disconnected(self, now_s: float) -> None:
        """The publisher is away."""
        self._note(now_s)
        self._unsettle()
        if self._next and not self.source.replay:
            self._begin()
        self._connected = False
        self._topic = None
        self._standing.lost(now_s)

    def tick(self, now_s: float) -> None:
        """Time has passed. To be called several times a second."""
        self._standing.tick(now_s)
        self._go_on_alone(now_s)

    def age_s(self, now_s: float) -> float:
        """How long ago all that the engine had was known here; infinite for never."""
        self._note(now_s)
        return self._standing.age_s(now_s)

    def batch(self, seq: int, topic: bytes, payload: bytes, now_s: float) -> None:
        """A batch has come. Raises nothing, whatever it is."""
        if not self._is_ours(topic):
            self.blocks.pass_over(topic)
            return
        if seq > _SEQ_MAX:
            self.malformed()
            return
        self._note(now_s)
        self._heard_s, self._looked = now_s, False
        if seq < self._next:
            if not self._is_another(seq, payload):
                self._counts.duplicates += 1
                return
            self._restart()
        if seq == self._next and (self._settled or not seq):
            self._settle()
            self._apply(seq, payload, now_s)
            self._follow(now_s)
        else:
            self._hold(seq, payload, now_s)
            self._go_on_alone(now_s)

    def due(self, now_s: float) -> int | None:
        """The number that a replay should begin with; None if none is needed, or one is under way."""
        if not self._connected or self._replay is not None or now_s < self._ask_at_s:
            return None
        quiet = not self._looked and now_s - self._heard_s >= QUIET_S
        if self._settled and not self._held and not self._behind and not quiet:
            return None
        return max(0, self._next - _CHECKED)

    def asked(self, now_s: float) -> None:
        """The replay that is due has been asked for."""
        self._note(now_s)
        self._replay = _Replay(self._next)
        self._alone = False
        self._ask_at_s = now_s + _EVERY_S
        self._behind = False
        self._looked = True
        self._counts.resyncs += 1

    def replayed(self, seq: int, topic: bytes, payload: bytes, now_s: float) -> None:
        """The replay has brought a batch. Raises nothing, whatever it is."""
        replay = self._replay
        if replay is None:
            return
        if not self._is_ours(topic):
            self.blocks.pass_over(topic)
        elif seq > _SEQ_MAX:
            self.malformed()
        elif seq < replay.expected:
            self._check(replay, seq, payload)
        else:
            self._catch_up(replay, seq, payload, now_s)

    def replay_ended(self, now_s: float) -> None:
        """The replay has brought all it could."""
        replay, self._replay = self._replay, None
        if replay is None:
            return
        self._failures = 0
        if not replay.expected:
            self._settle()
        elif not replay.checked and (self._remembers or not self._settled):
            self._restart()  # the process before would have had its last batch
        self._behind = replay.beyond is not None
        missing = [seq for seq in (replay.beyond, self._held.first) if seq is not None]
        if missing and self._settled and not replay.progressed:
            self._skip(min(missing))
            self._follow(now_s)

    def replay_failed(self, now_s: float) -> None:
        """The replay has ended before its end, or was never answered."""
        replay, self._replay = self._replay, None
        if replay is None:
            return
        self._behind = True
        self._failures = 0 if replay.progressed else self._failures + 1
        if self._failures >= _TRIES:
            self._failures = 0
            self._behind = False
            self._alone = True
            self._ask_at_s = now_s + _ALONE_S
            self._go_on_alone(now_s)

    def malformed(self) -> None:
        """A message has come that is no batch."""
        self._counts.undecodable += 1

    def close(self) -> None:
        """Forget the engine."""
        self._standing.trust()
        self._locality.close(self.blocks.holding)

    def statistics(self) -> SourceStatistics:
        """The state and the counts of now."""
        blocks = self.blocks
        return SourceStatistics(
            name=self.source.name,
            kind=self.source.kind,
            connected=self._connected,
            muted=self._standing.muted,
            incomplete=blocks.incomplete,
            seq=self._next - 1 if self._next else None,
            last_batch_s=self._last_batch_s,
            published_s=self._published_s if self._published_s > -math.inf else None,
            blocks=blocks.holding.blocks,
            over=blocks.holding.over,
            **asdict(self._counts),
            orphans=blocks.orphans,
            ignored={str(why): number for why, number in blocks.ignored.items()},
        )

    def save(self) -> SavedEngine | None:
        """What to go on from after a restart, beside the holding; None where nobody could confirm it."""
        if not self.source.replay or not self._next:
            return None
        return SavedEngine(
            self.source.name,
            self.source.canonical,
            self._next,
            self._marks.entries,
            self._published_s,
            self.blocks.incomplete,
            self.blocks.save(),
        )

    def restore(self, saved: SavedEngine, holding: Holding) -> None:
        """Be as one whose connection is lost: it answers when a replay has shown the same process."""
        self.blocks.restore(saved.groups, holding, incomplete=saved.incomplete)
        self._next, self._published_s = saved.next_seq, saved.published_s
        self._marks = Marks(saved.marks)
        self._standing.doubt()
        self._locality.show(holding)

    # In order.

    def _apply(self, seq: int, payload: bytes, now_s: float) -> None:
        self._next = seq + 1
        self._marks.set(seq, payload)
        self._last_batch_s = now_s
        self._counts.batches += 1
        try:
            batch = decode_batch(payload)
        except ProtocolError:
            self._counts.undecodable += 1
            self.blocks.incomplete = True
            return
        self._published_s = batch.at_s
        self._counts.events += len(batch.events)
        self.blocks.apply(batch)

    def _follow(self, now_s: float) -> None:
        """Apply what was held for what has come now."""
        while (payload := self._held.pop(self._next)) is not None:
            self._apply(self._next, payload, now_s)
        if self._settled and not self._held:
            self._standing.trust()

    def _hold(self, seq: int, payload: bytes, now_s: float) -> None:
        if not self._held:
            self._counts.gaps += self._settled
        self._behind |= not self._held.add(seq, payload, now_s)
        self._doubt()

    def _skip(self, seq: int) -> None:
        """What is before this number is lost."""
        if seq > self._next:
            self._counts.lost += seq - self._next
            self.blocks.incomplete = True
            self._next = seq

    def _go_on_alone(self, now_s: float) -> None:
        """Go on with what is held, where there is nobody to ask for what is missing."""
        first = self._held.first
        if first is None or not self._alone:
            return
        if not self._settled:
            if self._next:
                held = self._held
                self._restart()
                self._held = held
            self._settle()
        elif len(self._held) <= _LATE_MAX and not self._held.full and now_s - self._held.since_s < _LATE_S:
            return
        self._behind = False
        self._skip(first)
        self._follow(now_s)

    # Which process.

    def _is_ours(self, topic: bytes) -> bool:
        """Whether it is the topic that counts: the first one that may be."""
        if self._topic is None and self.source.may_use(topic):
            self._topic = topic
        return topic == self._topic

    def _is_another(self, seq: int, payload: bytes) -> bool:
        """Whether a batch with a number that is over is of another process."""
        same = self._marks.matches(seq, payload)
        if same is not None:
            return not same
        try:
            return decode_batch(payload).at_s > self._published_s
        except ProtocolError:
            return False

    def _check(self, replay: _Replay, seq: int, payload: bytes) -> None:
        """A replay has brought a batch that was here when it was asked for."""
        same = self._marks.matches(seq, payload)
        if same is False:
            self._restart()
        elif same:
            replay.checked = self._remembers = True
            self._settle()

    def _catch_up(self, replay: _Replay, seq: int, payload: bytes, now_s: float) -> None:
        """A replay has brought a batch that was missing when it was asked for."""
        if not replay.checked:  # it does not reach back to what is known
            replay.checked = True
            if replay.expected and not self._settled:
                self._begin()
            self._settle()
            first = self._held.first
            self._skip(seq if first is None else min(seq, first))
            self._follow(now_s)
        if seq == self._next:
            replay.progressed = True
            self._heard_s, self._looked = now_s, False
            self._held.pop(seq)
            self._apply(seq, payload, now_s)
            self._follow(now_s)
        elif seq > self._next and replay.beyond is None:
            replay.beyond = seq  # senders drop what a slow connection does not take

    def _settle(self) -> None:
        self._settled = True
        self._standing.trust()

    def _unsettle(self) -> None:
        self._settled = False
        self._replay = None
        self._behind = False
        self._held = Held()

    def _doubt(self) -> None:
        """It may be another process: what is known is left out of answers until that is clear."""
        if self._next:
            self._standing.doubt()

    def _note(self, now_s: float) -> None:
        """Nothing is missing or in doubt, if that is so."""
        waits = self._held or self._behind or self._replay is not None
        if self._connected and self._settled and not waits:
            self._standing.current(now_s)

    def _restart(self) -> None:
        """It is another process than before."""
        self._counts.restarts += 1
        self._unsettle()
        self._begin()

    def _begin(self) -> None:
        """Forget all that is known."""
        self.blocks.begin(self._fresh())
        self._next = 0
        self._marks = Marks()
        self._published_s = -math.inf
        self._held = Held()

    def _fresh(self) -> Holding:
        holding = self._locality.open(self.source.name)
        self._locality.show(holding)
        return holding
