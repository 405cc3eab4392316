"""The index's port for compact lookups: who is connected, and for how long. It knows no bits.

Everything happens on the index's own event loop, where lookups are answered as their frames come.
"""

import asyncio
import math
import socket
from collections.abc import Callable
from typing import Final

from kvstore.callers import Callers
from kvstore.errors import ProtocolError
from kvstore.index.compact import Compact
from kvstore.index.locality import Locality
from kvstore.index.lookup_connection import LookupConnection
from kvstore.index.lookup_session import Session
from kvstore.index.placement import Engine
from kvstore.rate import Rate

# A frame must be complete, answers taken and hello said within this time.
FRAME_TIMEOUT_S: Final = 5.0
# Routers, and apart from them those who have not said hello yet, of whom the one that came first goes.
CONNECTIONS_MAX: Final = 256
STRANGERS_MAX: Final = 256
_KEEPALIVE: Final = {socket.TCP_KEEPIDLE: 30, socket.TCP_KEEPINTVL: 10, socket.TCP_KEEPCNT: 3}
_SWEEP_S: Final = 0.5
# To ask all publishers for their ages takes longer than a lookup: that is done so often.
_AGE_S: Final = 0.05


class LookupServer:
    """Answers out of a Locality from `listen` to `close`; implements `kvstore.index.lookup_session.Host`.

    `age_s` gives the age of the oldest knowledge there. Lookups count in `rate`, by callers. `lookups` and
    `refused` requests are counted.
    """

    def __init__(self, locality: Locality, age_s: Callable[[], float], callers: Callers, rate: Rate) -> None:
        self.callers = callers
        self.rate = rate
        self.locality = locality
        self.compact = Compact(locality)
        self.lookups = self.refused = 0
        self._age_s = age_s
        self._looked_s, self._heard_s = -math.inf, 0.0
        self._engines: tuple[Engine, ...] | None = None
        self._generation = self._names = 0
        self._loop = asyncio.get_running_loop()
        self._sessions: dict[Session, LookupConnection] = {}
        self._strangers: dict[Session, LookupConnection] = {}  # of those, in the order in which they came
        self._routers: set[Session] = set()
        self._server: asyncio.AbstractServer | None = None
        self._sweeping: asyncio.TimerHandle | None = None

    async def listen(self, sock: socket.socket) -> None:
        """Answer who connects to a bound socket, which is this server's from now on."""
        # Connections inherit it. Else a router whose machine is gone would be connected for ever.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE.items():
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
        self._server = await self._loop.create_server(self._accept, sock=sock, backlog=512)
        self._sweep()

    def close(self) -> None:
        """End all connections."""
        if self._sweeping is not None:
            self._sweeping.cancel()
        if self._server is not None:
            self._server.close()
        for connection in self._sessions.values():
            connection.abort()

    @property
    def connections(self) -> int:
        """How many there are."""
        return len(self._sessions)

    # Host of the sessions.

    def oldest_ms(self) -> float:
        """The age of the oldest knowledge that lookups use, or up to 50 ms more."""
        now_s = self._loop.time()
        if now_s - self._looked_s > _AGE_S:
            self._looked_s = now_s
            self._heard_s = now_s - self._age_s()
        return 1000 * (now_s - self._heard_s)

    def generation(self) -> int:
        """Of the numbers that engines have."""
        if self._engines is not self.locality.engines:
            self._engines = self.locality.engines
            self._generation += 1
        return self._generation

    def welcome(self, session: Session) -> None:
        """A session is a router's.

        Raises:
            ProtocolError: there are too many.
        """
        if len(self._routers) >= CONNECTIONS_MAX:
            raise ProtocolError(f"{len(self._routers)} routers are connected; the limit is {CONNECTIONS_MAX}")
        self._strangers.pop(session, None)
        self._routers.add(session)

    def leave(self, session: Session) -> None:
        """A session is over."""
        self._sessions.pop(session, None)
        self._strangers.pop(session, None)
        self._routers.discard(session)

    # Helpers.

    def _accept(self) -> LookupConnection:
        self._names += 1
        session = Session(self, f"router {self._names}")
        connection = self._sessions[session] = self._strangers[session] = LookupConnection(session)
        self._loop.call_soon(self._make_room)  # once those before it have their transports
        return connection

    def _make_room(self) -> None:
        while len(self._strangers) > STRANGERS_MAX:
            first = next(iter(self._strangers))
            error = ProtocolError(f"{STRANGERS_MAX} others came while no hello did; send it at once")
            self._strangers.pop(first).fail(error)

    def _sweep(self) -> None:
        now_s = self._loop.time()
        for session, connection in list(self._sessions.items()):
            connection.expire(now_s, FRAME_TIMEOUT_S, welcome=session.welcome)
        self._sweeping = self._loop.call_later(_SWEEP_S, self._sweep)
