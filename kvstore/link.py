"""A client's standing connection: greeted, with its namespaces opened and its arenas mapped.

A link is never repaired. When its channel breaks, its leases are invalid and a new link takes its place.
"""

import hmac
import os
import secrets
import socket
import ssl
import threading
from collections.abc import Sequence
from itertools import product
from urllib.parse import urlsplit

from kvstore import protocol
from kvstore.block import Namespace
from kvstore.channel import TRANSFER_S, Channel
from kvstore.errors import InvalidRequest, ProtocolError, Unauthorized, Unavailable
from kvstore.memory import MADV_POPULATE_READ, MADV_POPULATE_WRITE, POPULATE_STEP_BYTES, Mapping, backed_bytes
from kvstore.protocol import NAMESPACES_MAX

DEFAULT_PORT = 7401


class Link:
    """One greeted connection. `shares_memory` says whether blocks are mapped, or copied over TCP."""

    def __init__(self, channel: Channel, welcome: protocol.Welcome, timeout_s: float) -> None:
        self.channel = channel
        self.welcome = welcome
        self.timeout_s = timeout_s
        self.shares_memory = bool(welcome.arena_bytes)
        self._handles: dict[Namespace, int] = {}
        self._maps: dict[tuple[int, bool], Mapping] = {}
        self._descriptors: dict[tuple[int, bool], int] = {}  # of what is not mapped yet
        self._populating: set[int] = set()  # descriptors of what is
        self._lock = threading.Lock()
        self._closing = threading.Event()

    @classmethod
    def open(
        cls,
        address: str,
        timeout_s: float,
        *,
        token: str | None = None,
        tls: ssl.SSLContext | None = None,
        resume: Sequence[bytes] = (),
        held: Sequence[int] = (),
    ) -> "Link":
        """Connect and greet. Mapping and populating come later, so this never waits for memory.

        Raises:
            InvalidRequest: the address is none.
            Unavailable: nobody answers there.
            ProtocolError, Unauthorized: the daemon refuses this client, or does not know the token.
        """
        channel = Channel(_dial(address, timeout_s, tls), timeout_s)
        welcome = _greet(channel, address, timeout_s, token, resume, held)
        link = cls(channel, welcome, timeout_s)
        # Now, while one thread has the channel to itself: a descriptor comes with the bytes of an answer, and
        # later any thread may be reading those.
        try:
            for arena, writable in product(range(len(welcome.arena_bytes)), (False, True)):
                fd = channel.call(protocol.OpenArena(arena, writable), timeout_s, with_fd=True).fd
                if fd is None:
                    raise ProtocolError(f"the daemon at {address} sent no descriptor of arena {arena}")
                link._descriptors[arena, writable] = fd
        except BaseException:
            link.close()
            raise
        return link

    def handle(self, namespace: Namespace, transfer_s: float = TRANSFER_S) -> int:
        """What stands for the namespace on this link."""
        handle = self._handles.get(namespace)
        return self.handles([namespace], transfer_s)[0] if handle is None else handle

    def handles(self, namespaces: Sequence[Namespace], transfer_s: float = TRANSFER_S) -> list[int]:
        """What stands for each of these namespaces; all that are new are named in one go."""
        known = self._handles  # may be replaced by another thread meanwhile, but nothing ever leaves it
        new = list(dict.fromkeys(namespace for namespace in namespaces if namespace not in known))
        if new:
            if len(known) + len(new) > NAMESPACES_MAX:
                # The daemon forgets some now. What it keeps is cheap to name again, and keeps its handle.
                known = self._handles = {}
                new = list(dict.fromkeys(namespaces))
            request = protocol.OpenNamespaces([namespace.id for namespace in new], new)
            answer = self.channel.call(request, self.timeout_s, transfer_s=transfer_s).answer
            assert isinstance(answer, protocol.Opened)
            known.update(zip(new, answer.handles, strict=True))
        return [known[namespace] for namespace in namespaces]

    def forget_handles(self) -> None:
        """The daemon does not know one of them any more: name anew what is used."""
        self._handles = {}

    def memory(self, arena: int, *, writable: bool) -> memoryview:
        """The arena's bytes, mapped at first use."""
        mapping = self._maps.get((arena, writable))
        if mapping is None:
            with self._lock:
                mapping = self._maps.get((arena, writable)) or self._map(arena, writable=writable)
        return mapping.view

    def close(self) -> None:
        """End the connection. What is mapped stays for as long as somebody looks at it."""
        self._closing.set()
        self.channel.close()
        with self._lock:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    def abandon_in_child(self) -> None:
        """In a forked child: keep neither socket nor memory."""
        self._closing.set()
        self.channel.abandon_in_child()
        for fd in (*self._descriptors.values(), *self._populating):
            os.close(fd)
        for mapping in self._maps.values():
            mapping.forbid()

    def _map(self, arena: int, *, writable: bool) -> Mapping:
        fd = self._descriptors.pop((arena, writable))
        size = self.welcome.arena_bytes[arena]
        mapping = self._maps[arena, writable] = Mapping(fd, size, writable=writable)
        self._populating.add(fd)
        name = f"kvstore-populate-{arena}"
        populate = threading.Thread(target=self._populate, args=(mapping, fd), name=name, daemon=True)
        try:
            populate.start()
        except RuntimeError:  # no more threads can be had: the first copies are slower, that is all
            self._populating.discard(fd)
            os.close(fd)
        return mapping

    def _populate(self, mapping: Mapping, fd: int) -> None:
        """Enter into our page tables what the daemon has populated, so that no copy pays for it."""
        advice = MADV_POPULATE_WRITE if mapping.writable else MADV_POPULATE_READ
        done = 0
        try:
            while done < mapping.size and not self._closing.is_set():
                step = min(backed_bytes(fd), mapping.size, done + POPULATE_STEP_BYTES) - done
                if step <= 0:
                    self._closing.wait(0.02)
                elif mapping.advise(advice, done, step):
                    done += step
                else:
                    return  # an old kernel: the first copies are slower, that is all
        finally:
            self._populating.discard(fd)
            os.close(fd)


def _greet(
    channel: Channel,
    address: str,
    timeout_s: float,
    token: str | None,
    resume: Sequence[bytes],
    held: Sequence[int],
) -> protocol.Welcome:
    """Say hello, and prove the token where the daemon asks for it. Closes the channel when it fails."""
    nonce = secrets.token_bytes(32)
    name = f"pid {os.getpid()}"
    hello = protocol.Hello(protocol.MAJOR, protocol.MINOR, nonce, name, list(resume), list(held))
    try:
        answer = channel.call(hello, timeout_s).answer
        if isinstance(answer, protocol.Challenge):
            if token is None:
                raise Unauthorized(f"the daemon at {address} wants a token; give token=")
            wanted = protocol.token_proof(token, "daemon", nonce, answer.nonce)
            if not hmac.compare_digest(wanted, answer.proof):
                raise Unauthorized(f"the daemon at {address} does not know this token")
            proof = protocol.token_proof(token, "client", nonce, answer.nonce)
            answer = channel.call(protocol.Proof(proof), timeout_s).answer
        if not isinstance(answer, protocol.Welcome):
            raise ProtocolError(f"{type(answer).__name__} from {address} in place of a welcome")
    except Unavailable:
        channel.close()
        if channel.refusal is not None:
            raise channel.refusal from None
        raise
    except BaseException:
        channel.close()
        raise
    return answer


def _dial(address: str, timeout_s: float, tls: ssl.SSLContext | None) -> socket.socket:
    try:
        parts = urlsplit(address)
        port = parts.port or DEFAULT_PORT
    except ValueError as exc:
        raise InvalidRequest(
            f"address {address!r}; give unix:/path/to/node.sock or tcp://host:{DEFAULT_PORT} ({exc})"
        ) from exc
    try:
        if parts.scheme == "unix" and parts.path:
            sock = socket.socket(socket.AF_UNIX)
            try:
                sock.settimeout(timeout_s)
                sock.connect(parts.path)
            except BaseException:
                sock.close()
                raise
            return sock
        if parts.scheme == "tcp" and parts.hostname:
            sock = socket.create_connection((parts.hostname, port), timeout_s)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock if tls is None else tls.wrap_socket(sock, server_hostname=parts.hostname)
    except (OSError, UnicodeError) as exc:
        raise Unavailable(f"no daemon at {address}: {exc}; is `kvstore serve` running?") from exc
    raise InvalidRequest(f"address {address!r}; give unix:/path/to/node.sock or tcp://host:{DEFAULT_PORT}")
