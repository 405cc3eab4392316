"""What one daemon's feed makes of the index: in step, behind, filled anew, silent. It opens no socket.

Pure: who has the socket hands over frames and the time, and sends what is `due`. What the feed says is in
`kvstore.index.feed`. Whatever is wrong ends in the same question, "what followed seq?", or where that cannot
help "all there is":

    a gap                        what followed; all, if the answer has a gap in the same place
    other digests, a bad frame   all, into a holding that is shown once its digests are right
    another epoch                all; nothing of the epoch before answers any more
    no answer, half a snapshot   the same again, less and less often
    silence                      what followed; until then the node is muted

Until a daemon has proved again that it says what is there, each question waits longer than the last.
"""

import logging
import math
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Final

from kvstore.block import Namespace
from kvstore.errors import ProtocolError
from kvstore.index import feed
from kvstore.index.holding import Holding
from kvstore.index.inquiry import Inquiry
from kvstore.index.lag import Lag
from kvstore.index.locality import Locality
from kvstore.index.node_copy import NodeCopy, Spaces
from kvstore.index.node_state import NodeStreamCounters, NodeStreamStatistics
from kvstore.index.saved import SavedNode

logger = logging.getLogger(__name__)

SILENT_S: Final = 2.0
# A name that another daemon answers to may be free again by then.
_REFUSED_S: Final = 3.0
# A node, where it is, what it has measured, and when that came.
Measured = Callable[[str, str, feed.Measures | None, float], None]


class Names(dict[str, "NodeStream"]):
    """Which feed has which name: all streams into one Locality share one. No daemon may have the name of an
    engine, of which `engines` are those that there are at the time."""

    def __init__(self, engines: Collection[str] = ()) -> None:
        super().__init__()
        self.engines = engines


class NodeStream:
    """The feed of the daemon at one address.

    A daemon is known by its address and answers for the name in its Hello, which must be `expected` where
    that is given. Of two with one name the first that is heard keeps it until it is silent: another's claim
    harms nobody, and a node that has moved has its name back after SILENT_S.

    `on_measured` and `on_held` are called with what it says beside that. It `takes_holds` if it says so.
    """

    def __init__(
        self, locality: Locality, names: Names, address: str, now_s: float, expected: str | None = None
    ) -> None:
        self.address = address
        self.name: str | None = None
        self.engines: tuple[str, ...] = ()
        self.topology = ""
        self.takes_holds = False
        self.on_measured: Measured = lambda *_: None
        self.on_held: Callable[[str, feed.Held], None] = lambda *_: None
        self.silent = False
        self.heard_s = now_s
        self._locality = locality
        self._names = names
        self._expected = expected
        self._refused = ""
        self._deaf_until_s = -math.inf
        self._epoch: int | None = None
        self._seq = 0
        self._spaces = Spaces()
        self._copy: NodeCopy | None = None
        self._filling: NodeCopy | None = None
        self._filling_seq = 0
        self._inquiry = Inquiry(now_s)
        self._resumed_at: int | None = None
        self._known_s = -math.inf
        self._lag = Lag()
        self._counters = NodeStreamCounters()

    # What the owner of the socket calls.

    def received(self, frame: bytes, now_s: float, wall_s: float) -> None:
        """Apply a frame; `wall_s` is the time of day. Raises nothing, whatever it is."""
        if now_s < self._deaf_until_s:
            self.heard_s = now_s
            return
        try:
            message = feed.decode_to_index(frame)
            self._apply(message, now_s, wall_s)
        except ProtocolError as error:
            self._malformed(error, now_s)
            return
        self.heard_s = now_s

    def tick(self, now_s: float) -> None:
        """Notice silence. Call it several times a second."""
        if self.silent or now_s - self.heard_s <= SILENT_S:
            return
        self.silent = True
        logger.warning("feed %s (%s): silent for %.1f s", self.address, self.name, now_s - self.heard_s)
        if self.name is not None:
            self._locality.mute(self.name)
        self._inquiry.open(now_s)

    def lost(self, now_s: float) -> None:
        """The connection is a new one: of what was asked no answer will come."""
        self._drop_filling()
        self._inquiry.repeat(now_s)

    def due(self, now_s: float) -> feed.Subscribe | None:
        """What to send now, if anything; tell `asked` when it went out."""
        if not self._inquiry.is_due(now_s):
            return None
        if self._inquiry.everything and not self._refused:
            return feed.Subscribe(feed.VERSION)
        return feed.Subscribe(feed.VERSION, self._epoch, self._seq)

    def asked(self, now_s: float) -> None:
        """What was due has been sent."""
        self._drop_filling()
        self._inquiry.asked(now_s)

    def close(self) -> None:
        """Answer no more for the node."""
        self._forget()
        self._leave_name()

    def age_s(self, now_s: float) -> float:
        """How long ago all that the daemon had was known; infinite for never."""
        return now_s - self._known_s

    @property
    def epoch(self) -> int | None:
        """Of the life of the daemon that is answered for."""
        return self._epoch if self._copy else None

    def canonicals(self, namespace: Namespace) -> list[bytes]:
        """How the daemon calls a namespace of shard RANK/WORLD, where it may say more of the rank."""
        return self._spaces.local.get(namespace) or [namespace.canonical]

    @property
    def over(self) -> bool:
        """Whether the daemon has more than there is room for here."""
        return self._copy is not None and self._copy.holding.over

    def statistics(self, now_s: float) -> NodeStreamStatistics:
        """All of it now."""
        copy = self._copy
        return NodeStreamStatistics(
            address=self.address,
            name=self.name,
            epoch=self.epoch,
            seq=self._seq if copy else None,
            engines=self.engines,
            blocks=copy.holding.blocks if copy else 0,
            over=self.over,
            silent=self.silent,
            filling=self._filling is not None,
            refused=self._refused,
            age_s=self.age_s(now_s),
            lag_s=self._lag.now_s,
            lags=self._lag.events,
            counters=replace(self._counters, skipped=self._spaces.skipped),
        )

    def save(self) -> SavedNode | None:
        """What to go on from after a restart, beside the holding; None where nothing is known."""
        if self._copy is None or self.name is None or self._epoch is None:
            return None
        return SavedNode(self.address, self.name, self._epoch, self._seq, *self._copy.save())

    def restore(self, saved: SavedNode, holding: Holding) -> None:
        """Be as silent as a daemon that was heard before: it answers when it has resumed from there."""
        self._copy = NodeCopy(holding, self._spaces, saved)
        self.name, self._epoch, self._seq = saved.name, saved.epoch, saved.seq
        self._names[saved.name] = self
        self.silent = True
        self._locality.mute(saved.name)
        self._locality.show(holding)
        self._inquiry.everything = False

    # Messages.

    def _apply(self, message: feed.ToIndex, now_s: float, wall_s: float) -> None:
        match message:
            case feed.Events():
                self._apply_events(message, now_s, wall_s)
            case feed.Heartbeat():
                self._compare(message, now_s, wall_s)
            case feed.Hello():
                self._greet(message, now_s)
            case feed.Part():
                self._fill(message, now_s)
            case feed.End():
                self._finish(message, now_s)
            case feed.Held() if self.name is not None:
                self.on_held(self.name, message)

    def _greet(self, hello: feed.Hello, now_s: float) -> None:
        feed.check_hello(hello)
        self._drop_filling()
        if hello.node != self.name or hello.epoch != self._epoch:
            self._meet(hello)
        if not self._claim(hello, now_s):
            return
        self.engines = tuple(hello.engines)
        self.topology, self.takes_holds = hello.topology, hello.takes_holds
        self.on_measured(hello.node, hello.topology, None, now_s)
        if not hello.resumed:
            self._filling = NodeCopy(self._locality.open(hello.node), self._spaces)
            self._filling_seq = hello.seq
            self._inquiry.go_on(now_s)
        elif self._copy is not None and not self._inquiry.everything and hello.seq <= self._seq:
            self._inquiry.answered()
            self._resumed_at = self._seq
            self._speak()
        else:  # an answer to what was asked before, or to a daemon that another has replaced
            self._inquiry.open(now_s, everything=True)

    def _meet(self, hello: feed.Hello) -> None:
        """A daemon that has started anew, or is another: nothing of before answers any more."""
        if self._epoch not in (None, hello.epoch):
            self._counters.restarts += 1
            logger.info("feed %s: %s started anew", self.address, hello.node)
        self._forget()
        if hello.node != self.name:
            self._leave_name()
        self._epoch, self._seq = hello.epoch, hello.seq

    def _claim(self, hello: feed.Hello, now_s: float) -> bool:
        """Answer for the name in the Hello, unless another does or it is not the one expected."""
        holder = self._names.get(hello.node)
        reason = ""
        if self._expected not in (None, hello.node):
            reason = f"it is {hello.node!r}, and {self._expected!r} was expected"
        elif holder is not None and holder is not self and not holder.silent:
            reason = f"{holder.address} is {hello.node!r} too"
        elif hello.node in self._names.engines:
            reason = f"an engine is {hello.node!r} too"
        if reason:
            self._refuse(reason, now_s)
            return False
        if holder is not None and holder is not self:
            holder.close()
        if self._refused:
            self._refused = ""
            self._inquiry.forgive()
        self._names[hello.node] = self
        self.name = hello.node
        return True

    def _refuse(self, reason: str, now_s: float) -> None:
        if reason != self._refused:
            logger.warning("feed %s is refused: %s", self.address, reason)
        self._refused = reason
        self._deaf_until_s = now_s + _REFUSED_S
        self._inquiry.repeat(self._deaf_until_s)

    def _apply_events(self, message: feed.Events, now_s: float, wall_s: float) -> None:
        copy = self._copy
        if copy is None or self._filling is not None:
            return  # what is missed so shows as a gap
        if message.seq <= self._seq:
            self._counters.duplicates += 1
        elif message.seq != self._seq + 1:
            self._miss(now_s)
        else:
            copy.apply(message.events)
            self._seq = message.seq
            self._lag.happened(message.at_s, wall_s)
            self._know(now_s)

    def _compare(self, beat: feed.Heartbeat, now_s: float, wall_s: float) -> None:
        copy = self._copy
        if beat.measures is not None and self.name is not None:
            self.on_measured(self.name, self.topology, beat.measures, now_s)
        if copy is None or self._filling is not None:
            return
        if beat.epoch != self._epoch:
            self._inquiry.open(now_s)
        elif beat.seq < self._seq:
            self._counters.duplicates += 1
        elif beat.seq > self._seq:
            self._miss(now_s)
        elif copy.agrees(beat.digests):
            self._inquiry.answered()
            self._inquiry.forgive()
            self._resumed_at = None
            self._lag.beat(beat.at_s, wall_s)
            self._know(now_s)
        else:
            self._diverge(now_s)

    def _fill(self, part: feed.Part, now_s: float) -> None:
        if self._filling is not None:
            self._filling.apply(part.stored)
            self._inquiry.go_on(now_s)

    def _finish(self, end: feed.End, now_s: float) -> None:
        filling = self._filling
        if filling is None:
            return
        if end.seq < self._filling_seq:
            raise ProtocolError(f"feed: a snapshot of seq {end.seq} that began at {self._filling_seq}")
        if not filling.agrees(end.digests):
            self._drop_filling()
            self._diverge(now_s)
            return
        self._filling = None
        self._counters.resyncs += self._copy is not None
        self._locality.show(filling.holding)  # which closes the one before
        self._copy, self._seq = filling, end.seq
        self._resumed_at = None
        self._inquiry.answered()
        self._know(now_s)
        logger.info("feed %s: %s has %d blocks", self.address, self.name, filling.holding.blocks)

    # What follows from them.

    def _miss(self, now_s: float) -> None:
        """Events between those that were applied and those that came are missing."""
        if not self._inquiry.is_open:
            self._counters.gaps += 1
        self._inquiry.open(now_s, everything=self._resumed_at == self._seq)

    def _diverge(self, now_s: float) -> None:
        """What is here is not what the daemon has, though nothing is missing."""
        self._counters.divergences += 1
        self._inquiry.open(now_s, everything=True)

    def _malformed(self, error: ProtocolError, now_s: float) -> None:
        if not self._counters.malformed:
            logger.warning(
                "feed %s sent what is no message; from now on it is counted: %s", self.address, error
            )
        self._counters.malformed += 1
        self._drop_filling()
        self._inquiry.open(now_s, everything=True)

    def _know(self, now_s: float) -> None:
        """All that the daemon had a moment ago is here, unless something is to be begun anew."""
        if not self._inquiry.everything:
            self._known_s = now_s
        self._speak()

    def _speak(self) -> None:
        if self.silent:
            self.silent = False
            logger.info("feed %s (%s): heard again", self.address, self.name)
            if self.name is not None:
                self._locality.unmute(self.name)

    def _drop_filling(self) -> None:
        if self._filling is not None:
            self._locality.close(self._filling.holding)
            self._filling = None

    def _forget(self) -> None:
        self._drop_filling()
        if self._copy is not None:
            self._locality.close(self._copy.holding)
            self._copy = None
        self._inquiry.everything = True

    def _leave_name(self) -> None:
        if self.name is None:
            return
        if self.silent:
            self._locality.unmute(self.name)
        if self._names.get(self.name) is self:
            del self._names[self.name]
        self.name = None
