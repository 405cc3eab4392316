"""The daemon's sockets: who is connected, whose leases are whose, and what happens when they go."""

import asyncio
import contextlib
import logging
import os
import socket
import ssl
import stat
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from kvstore.errors import ConfigError, InvalidRequest, ProtocolError, Unauthorized
from kvstore.node.connection import Connection
from kvstore.node.handover import Heir, same_user
from kvstore.node.holds import HELD_FRACTION
from kvstore.node.lease import Holder
from kvstore.node.quarantine import Quarantine, peer_pidfd
from kvstore.node.session import Session
from kvstore.node.store import Store
from kvstore.statistics import EventsState, NodeStatistics
from tiers.base import SlotTier

logger = logging.getLogger(__name__)

# A frame must be complete, and a sent byte taken, within this time; so must hello.
FRAME_TIMEOUT_S: Final = 5.0
_SOCKET_PATH_BYTES_MAX: Final = 107
_TICK_S: Final = 0.02
# How long the ends of connections may take, which take no time at all.
_CLOSE_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What one client may hold and what all holds may, as fractions of the arena, and how many clients."""

    client_pinned_fraction: float = 0.5
    client_reserved_fraction: float = 0.5
    clients: int = 4096
    held_fraction: float = HELD_FRACTION


class Events(Protocol):
    """Who tells others what comes and goes."""

    def statistics(self) -> EventsState:
        """What it has told."""

    def check(self) -> list[str]:
        """What is wrong in that."""


class Server:
    """Sessions over a store; implements `kvstore.node.host.Host`."""

    def __init__(
        self,
        store: Store,
        arenas: Sequence[SlotTier],
        *,
        node: str,
        epoch: int,
        stop: Callable[[], None],
        token: str | None = None,
        limits: Limits | None = None,
    ) -> None:
        """`stop` is called when `heir` is to have the arena."""
        self.store = store
        self.node = node
        self.epoch = epoch
        self.token = token
        self._arenas = tuple(arenas)
        self.limits = limits or Limits()
        store.holds.fraction = self.limits.held_fraction
        self.quarantine = Quarantine(store)
        self.heir: Heir | None = None
        self.events: Events | None = None
        self._stop = stop
        self._sessions: dict[Session, tuple[Connection, int | None]] = {}
        self._servers: list[asyncio.AbstractServer] = []
        self._started = time.monotonic()
        self._late_max_s = self._stall_max_s = self._cpu_s = 0.0
        self._refused_frames = 0
        self._bytes_received = self._bytes_sent = 0
        self._names = 0
        self._tick: asyncio.TimerHandle | None = None
        self._next_sweep = 0.0
        self._socket_path: Path | None = None
        self._hanging_up = False

    # Life.

    async def listen_unix(self, path: Path, *, mode: int = 0o660) -> None:
        """Listen on a unix socket. The file appears only once connections are accepted.

        Raises:
            ConfigError: the path cannot be made into a socket.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        hidden = path.with_name(f".{os.getpid()}")
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.bind(str(hidden))
        except OSError as exc:
            raise ConfigError(f"socket {path}: {exc.strerror or exc}; give another path") from exc
        hidden.chmod(mode)
        loop = asyncio.get_running_loop()
        self._servers.append(
            await loop.create_unix_server(self._connection(maps=True), sock=sock, backlog=512)
        )
        hidden.rename(path)
        self._socket_path = path

    async def listen_tcp(self, host: str, port: int, tls: ssl.SSLContext | None = None) -> int:
        """Listen for clients off the node, which share no memory. The answer is the port."""
        loop = asyncio.get_running_loop()
        server = await loop.create_server(self._connection(maps=False), host, port, ssl=tls)
        self._servers.append(server)
        return int(server.sockets[0].getsockname()[1])

    def set_limits(self, limits: Limits) -> None:
        """Have these limits from now on, for clients that are connected too; nothing is taken from them."""
        self.limits = limits
        self.store.holds.fraction = limits.held_fraction
        for session in self._sessions:
            session.holder.pinned_bytes_max, session.holder.reserved_bytes_max = self._allowed()

    def start(self) -> None:
        """Begin to watch over connections and over the event loop itself."""
        self._tick = asyncio.get_running_loop().call_later(_TICK_S, self._watch, time.monotonic() + _TICK_S)

    async def hang_up(self) -> bool:
        """Accept no more, and end all connections and holds. Whether the connections have ended."""
        if self._socket_path is not None:
            self._socket_path.unlink(missing_ok=True)
        if self._tick is not None:
            self._tick.cancel()
        for server in self._servers:
            server.close()
        self._hanging_up = True
        self.store.holds.close()
        for connection, _ in list(self._sessions.values()):
            connection.abort()
        until = time.monotonic() + _CLOSE_S
        while self._sessions and time.monotonic() < until:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.001)  # what waited on their behalf ends, too
        if self._sessions:
            logger.error("%d sessions have not ended within %s s", len(self._sessions), _CLOSE_S)
        return not self._sessions

    def close(self) -> None:
        """Give up all leases, once the connections have ended."""
        self.quarantine.close()

    # Host of the sessions.

    def open_arena(self, arena: int, *, writable: bool) -> int:
        if not 0 <= arena < len(self._arenas):
            raise InvalidRequest(f"arena {arena}; this daemon has {len(self._arenas)}")
        return self._arenas[arena].open(writable=writable)

    def arena_bytes(self) -> list[int]:
        return [arena.capacity_bytes for arena in self._arenas]

    def hand_over(self, connection: Connection, request_id: int) -> None:
        with connection.socket as sock:
            if not same_user(sock):
                raise Unauthorized(
                    f"this daemon is user {os.geteuid()}'s; only that one, or root, may have it"
                )
            self.heir = self.heir or Heir(sock.dup(), request_id)
        self._stop()

    def reclaim(self, resume: Sequence[bytes], held: Sequence[int]) -> list[Holder]:
        back = [self.quarantine.reclaim(session_id, set(held)) for session_id in resume]
        return [holder for holder in back if holder is not None]

    def leave(self, session: Session) -> None:
        connection, pidfd = self._sessions.pop(session)
        if pidfd is not None:
            asyncio.get_running_loop().remove_reader(pidfd)
        self._refused_frames += connection.failed
        self._bytes_received += connection.bytes_received
        self._bytes_sent += connection.bytes_sent
        self.quarantine.admit(session.id, session.holder, pidfd)

    def emptied(self, holder: Holder) -> None:
        self.quarantine.emptied(holder)

    def statistics(self) -> NodeStatistics:
        connections = [connection for connection, _ in self._sessions.values()]
        quarantined = self.quarantine.holders()
        held = self.store.holds.statistics()
        return NodeStatistics(
            node=self.node,
            epoch=self.epoch,
            uptime_s=time.monotonic() - self._started,
            connections=len(connections),
            leases=sum(len(session.holder.lease_ids()) for session in self._sessions),
            quarantined_leases=sum(len(holder.lease_ids()) for holder in quarantined),
            refused_frames=self._refused_frames,
            loop_late_max_s=self._late_max_s,
            loop_stall_max_s=self._stall_max_s,
            bytes_received=self._bytes_received + sum(c.bytes_received for c in connections),
            bytes_sent=self._bytes_sent + sum(c.bytes_sent for c in connections),
            tiers=self.store.statistics(),
            counters=self.store.counters,
            salts=self.store.salts.statistics(),
            draining=self.store.drain.under_way,
            events=None if self.events is None else self.events.statistics(),
            holds=held.holds,
            held_bytes=held.pinned_bytes,
        )

    def open_writes(self) -> int:
        return sum(len(session.holder.writes) for session in self._sessions)

    def check(self) -> list[str]:
        holders = [session.holder for session in self._sessions]
        wrong = self.store.check([*holders, *self.quarantine.holders()])
        return wrong if self.events is None else [*wrong, *self.events.check()]

    # Helpers.

    def _connection(self, *, maps: bool) -> Any:
        def accepted(connection: Connection) -> Session:
            self._names += 1
            pid, pidfd = 0, None
            if maps:
                with connection.socket as sock:
                    pid, pidfd = peer_pidfd(sock)
            pinned_bytes_max, reserved_bytes_max = self._allowed()
            holder = Holder(
                name=f"client {self._names} (pid {pid})" if maps else f"client {self._names} (tcp)",
                pinned_bytes_max=pinned_bytes_max,
                reserved_bytes_max=reserved_bytes_max,
                maps=maps,
            )
            session = Session(self, connection, holder)
            self._sessions[session] = connection, pidfd
            if pidfd is not None:
                # A socket may outlive its process, in a child that was forked at a bad moment.
                asyncio.get_running_loop().add_reader(pidfd, connection.abort)
            if self._hanging_up:  # the last that was let in
                connection.abort()
            elif len(self._sessions) > self.limits.clients:
                connection.fail(
                    ProtocolError(f"{len(self._sessions)} clients; the limit is {self.limits.clients}")
                )
            return session

        return lambda: Connection(accepted)

    def _allowed(self) -> tuple[int, int]:
        """Bytes that a client may have pinned, and reserved."""
        usable = self.store.arena.room.limit_bytes
        fractions = self.limits.client_pinned_fraction, self.limits.client_reserved_fraction
        return int(usable * fractions[0]), int(usable * fractions[1])

    def _watch(self, expected: float) -> None:
        now, cpu_s = time.monotonic(), time.thread_time()
        late_s = now - expected
        self._late_max_s = max(self._late_max_s, late_s)
        self._stall_max_s = max(self._stall_max_s, min(late_s, cpu_s - self._cpu_s))
        self._cpu_s = cpu_s
        if now >= self._next_sweep:
            self._next_sweep = now + FRAME_TIMEOUT_S / 10
            self.store.sample()
            self.store.salts.keep_quotas()
            self.store.movements.trim()
            for session, (connection, _) in list(self._sessions.items()):
                connection.expire(FRAME_TIMEOUT_S, welcomed=session.welcomed)
        self._tick = asyncio.get_running_loop().call_later(_TICK_S, self._watch, time.monotonic() + _TICK_S)


async def clear_stale_socket(path: Path) -> None:
    """Remove a socket that nobody listens on.

    Raises:
        ConfigError: another daemon listens there, or the path is taken by something else.
    """
    if len(os.fsencode(path)) > _SOCKET_PATH_BYTES_MAX:
        raise ConfigError(
            f"socket {path}: a path has at most {_SOCKET_PATH_BYTES_MAX} bytes; give a shorter one"
        )
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ConfigError(f"socket {path} is taken by a file that is no socket; give another path")
        try:
            _, writer = await asyncio.open_unix_connection(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        writer.close()
        raise ConfigError(f"another daemon listens on {path}; stop it, or give another path")
