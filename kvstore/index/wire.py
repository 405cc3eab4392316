"""ZeroMQ sockets on an event loop, read in turns, so that a flood holds up nobody; and CURVE by a key file.

It knows no message. pyzmq's own asyncio sockets cost a future for every message, some 30 us; engines send one
for every block.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from socket import SOCK_STREAM, getaddrinfo
from typing import Any, Final

import zmq
from zmq.utils import z85

from kvstore.errors import ConfigError

logger = logging.getLogger(__name__)

# Frames read before others have their turn, unless they take longer.
_TURN: Final = 64
_TURN_S: Final = 0.001
_KEY_CHARS: Final = 40
# libzmq's own pings find a peer that vanished without a word.
_PING_MS: Final = 1000
_GONE_MS: Final = 3000


class Wire:
    """A socket that calls `on_message` with the frames of each message, on the loop that it was made on.

    What `on_message` raises is logged and ends nothing. `close` from the same loop.
    """

    def __init__(self, socket: "zmq.Socket[bytes]", on_message: Callable[[Sequence[bytes]], None]) -> None:
        self.socket = socket
        self._on_message = on_message
        self._loop = asyncio.get_running_loop()
        self._again: asyncio.Handle | None = None
        self._loop.add_reader(socket.fileno(), self._read)
        self._again = self._loop.call_soon(self._read)

    def send(self, frames: Sequence[bytes]) -> bool:
        """Send a message, or do not where the other side takes none now. Whether it went."""
        # Sending, even in vain, may swallow the edge that announces something to read.
        self._schedule()
        try:
            self.socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.ZMQError:  # full, or nobody there
            return False
        return True

    @property
    def writable(self) -> bool:
        """Whether the other side takes messages now; with zmq.IMMEDIATE also whether it is connected."""
        events = int(self.socket.getsockopt(zmq.EVENTS))
        # As with sending.
        self._schedule()
        return bool(events & zmq.POLLOUT)

    def close(self) -> None:
        """End it; what was sent may still be lost."""
        if not self.socket.closed:
            self._loop.remove_reader(self.socket.fileno())
            self.socket.close(linger=0)
        if self._again is not None:
            self._again.cancel()

    def _schedule(self) -> None:
        if self._again is None:
            self._again = self._loop.call_soon(self._read)

    def _read(self) -> None:
        # The descriptor tells of an edge only: read until there is nothing more, in turns.
        if self._again is not None:
            self._again.cancel()
            self._again = None
        until_s = self._loop.time() + _TURN_S
        for _ in range(_TURN):
            if self.socket.closed:
                return
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            except zmq.ZMQError as error:
                logger.warning("a socket of the index failed: %s", error)
                return
            try:
                self._on_message(frames)
            except Exception:  # whoever sent it must not end what others use
                logger.exception("a message of %d frames could not be handled", len(frames))
            if self._loop.time() > until_s:
                break
        if not self.socket.closed:
            self._schedule()


def watched(
    context: "zmq.Context[zmq.Socket[bytes]]", kind: int, frame_bytes_max: int
) -> "zmq.Socket[bytes]":
    """A socket that notices when the other side is gone, and takes no longer frames than that."""
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, frame_bytes_max)
    socket.setsockopt(zmq.HEARTBEAT_IVL, _PING_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _GONE_MS)
    socket.setsockopt(zmq.HEARTBEAT_TTL, _GONE_MS)
    socket.setsockopt(zmq.RECONNECT_IVL, 100)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
    socket.setsockopt(zmq.IPV6, 1)
    return socket


def bind(socket: "zmq.Socket[bytes]", host: str, port: int, name: str) -> str:
    """Listen there; the answer is HOST:PORT with the port that it is.

    Raises:
        ConfigError: the address is taken, or none of this machine's.
    """
    try:
        number = str(getaddrinfo(host, port, type=SOCK_STREAM)[0][4][0])
        socket.setsockopt(zmq.IPV6, ":" in number)  # or IPv4 addresses would look like IPv6 ones
        socket.bind(f"tcp://[{number}]:{port or '*'}" if ":" in number else f"tcp://{number}:{port or '*'}")
    except (zmq.ZMQError, OSError, UnicodeError) as exc:
        reason = getattr(exc, "strerror", None) or exc
        raise ConfigError(f"{name} address {host}:{port}: {reason}; give another, or port 0") from exc
    return socket.getsockopt_string(zmq.LAST_ENDPOINT).removeprefix("tcp://")


def load_key(path: str) -> bytes:
    """The secret key that all our own parts share, 40 characters in a file.

    Raises:
        ConfigError: the file cannot be read, or holds none.
    """
    try:
        text = Path(path).read_text("ascii").strip()
        if len(text) != _KEY_CHARS:
            raise ValueError(f"it has {len(text)} characters")
        zmq.curve_public(text.encode())
    except (OSError, ValueError, zmq.ZMQError) as exc:
        raise ConfigError(
            f"key_file {path}: {getattr(exc, 'strerror', None) or exc}; `kvstore key > FILE` makes one"
        ) from exc
    return text.encode()


def new_key() -> str:
    """A fresh secret key."""
    return zmq.curve_keypair()[1].decode()


def serve_curve(socket: "zmq.Socket[bytes]", secret: bytes) -> None:
    """Let only those in who have the same key; `allow` must answer on the socket's context."""
    socket.curve_secretkey = secret
    socket.curve_publickey = zmq.curve_public(secret)
    socket.curve_server = True
    socket.zap_domain = b"kvstore"


def join_curve(socket: "zmq.Socket[bytes]", secret: bytes) -> None:
    """Speak only to who has the same key."""
    public = zmq.curve_public(secret)
    socket.curve_secretkey = secret
    socket.curve_publickey = public
    socket.curve_serverkey = public


def allow(context: "zmq.Context[Any]", secret: bytes) -> "Wire":
    """Answer libzmq's questions who may connect (ZAP, ZeroMQ RFC 27): who has the public key of `secret`."""
    public = z85.decode(zmq.curve_public(secret))
    socket = context.socket(zmq.REP)
    socket.bind("inproc://zeromq.zap.01")

    def answer(frames: Sequence[bytes]) -> None:
        version, request_id, _domain, _address, _identity, mechanism, *credentials = frames
        known = mechanism == b"CURVE" and credentials == [public]
        status = (b"200", b"OK") if known else (b"400", b"another key")
        socket.send_multipart([version, request_id, *status, b"", b""])

    return Wire(socket, answer)
