"""The socket of one daemon's feed: it connects, asks, keeps in touch, and begins anew when nothing comes.

What the messages mean is `kvstore.index.node_stream`'s.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Final

import zmq

from kvstore.index.feed import ALIVE_S, FRAME_BYTES_MAX, Alive, Hold, Unhold, encode
from kvstore.index.locality import Locality
from kvstore.index.node_state import NodeStreamStatistics
from kvstore.index.node_stream import Names, NodeStream
from kvstore.index.wire import Wire, join_curve, watched

logger = logging.getLogger(__name__)

_TICK_S: Final = 0.25
# A connection that takes longer, or on which nothing has come for so long, is given up: a link may swallow
# what its end believes sent.
_CONNECT_S: Final = 1.0
_FRESH_S: Final = 3.0
# Frames that wait here; more wait at the daemon, which keeps the last of them for who asks again.
_QUEUE: Final = 32
_ALIVE: Final = encode(Alive())


class NodeSubscriber:
    """Follows the daemon whose feed is at `address` ("HOST:PORT", HOST an IP address) from `start` on.

    `names` is one for all subscribers of a Locality, `secret` of `kvstore.index.wire.load_key`. All methods
    are for the event loop that it was started on. `context` needs room for a socket for each daemon.
    """

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        locality: Locality,
        names: Names,
        address: str,
        *,
        expected: str | None = None,
        secret: bytes | None = None,
    ) -> None:
        self._context = context
        self._secret = secret
        self._loop = asyncio.get_running_loop()
        self.stream = NodeStream(locality, names, address, self._loop.time(), expected)
        self._wire: Wire | None = None
        self._connected = False
        self._opened_s = self._alive_s = 0.0
        self._ticking: asyncio.Handle | None = None

    def start(self) -> None:
        """Connect; never waits."""
        self._open()
        self._tick()

    def close(self) -> None:
        """Leave: the node is no longer answered for."""
        if self._ticking is not None:
            self._ticking.cancel()
        self._hang_up()
        self.stream.close()

    @property
    def heard(self) -> bool:
        """Whether the daemon has been there lately."""
        return not self.stream.silent and self.stream.name is not None

    def age_s(self) -> float:
        """How long ago all that the daemon had was known; infinite for never."""
        return self.stream.age_s(self._loop.time())

    def say(self, message: Hold | Unhold) -> bool:
        """Send it, or do not where the daemon takes nothing now. Whether it went."""
        return self.stream.takes_holds and self._send(encode(message))

    def statistics(self) -> NodeStreamStatistics:
        """All of it now."""
        return self.stream.statistics(self._loop.time())

    def _open(self) -> None:
        self._hang_up()
        self._opened_s = self._loop.time()
        self._connected = False
        try:
            socket = watched(self._context, zmq.DEALER, FRAME_BYTES_MAX)
            socket.setsockopt(zmq.RCVHWM, _QUEUE)
            # One connection for each socket: nothing that one daemon was asked, or has said, is for the next.
            socket.setsockopt(zmq.IMMEDIATE, 1)
            socket.setsockopt(zmq.RECONNECT_IVL, -1)
            if self._secret is not None:
                join_curve(socket, self._secret)
            socket.connect(f"tcp://{self.stream.address}")
        except zmq.ZMQError as error:  # too many sockets, say
            logger.warning("feed %s cannot be followed now: %s", self.stream.address, error)
            return
        self._wire = Wire(socket, self._receive)

    def _hang_up(self) -> None:
        if self._wire is not None:
            self._wire.close()
            self._wire = None

    def _receive(self, frames: Sequence[bytes]) -> None:
        frame = frames[0] if len(frames) == 1 else b""
        self.stream.received(frame, self._loop.time(), time.time())
        self._ask()

    def _tick(self) -> None:
        self._ticking = self._loop.call_later(_TICK_S, self._tick)
        now_s = self._loop.time()
        self.stream.tick(now_s)
        self._connect(now_s)
        self._ask()
        if now_s - self._alive_s >= ALIVE_S and self._send(_ALIVE):
            self._alive_s = now_s

    def _connect(self, now_s: float) -> None:
        """See whether the connection is there, and make another where it is no longer, or of no use."""
        connected = self._wire is not None and self._wire.writable
        if connected and not self._connected:
            self.stream.lost(now_s)
        waited_s = now_s - max(self._opened_s, self.stream.heard_s if connected else 0.0)
        if waited_s > (_FRESH_S if connected else _CONNECT_S) or (self._connected and not connected):
            self._open()
        else:
            self._connected = connected

    def _ask(self) -> None:
        now_s = self._loop.time()
        subscribe = self.stream.due(now_s)
        if subscribe is not None and self._send(encode(subscribe)):
            self.stream.asked(now_s)

    def _send(self, frame: bytes) -> bool:
        return self._wire is not None and self._wire.send([frame])
