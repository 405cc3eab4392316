"""The client of the store: what connectors and scripts use. Synchronous and thread-safe.

A client connects to the daemon of its node over a unix socket and shares its memory, or over TCP, where
blocks are copied. When the daemon goes away, calls raise `Unavailable` at once, and a thread connects anew
in the background; leases from before are invalid. A forked child must connect for itself.
"""

import contextlib
import os
import ssl
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Final, NamedTuple, Self, TypeVar

import numpy as np

from kvstore import packing, protocol
from kvstore.block import HitLength, Namespace
from kvstore.errors import DeadlineExceeded, InvalidRequest, KVStoreError, Unavailable
from kvstore.leases import EachLease, Lease, ReadLease, WriteLease, map_views, split_payload
from kvstore.link import Link
from kvstore.statistics import NodeStatistics

_RECONNECT_FIRST_S: Final = 0.02
_RECONNECT_MAX_S: Final = 2.0
# How long the end of a lease may wait for a request to travel with.
_FLUSH_S: Final = 0.005
# Lost sessions named at reconnecting; of more, the leases stay in quarantine until this process ends.
_LOST_MAX: Final = 1000
L = TypeVar("L", bound=Lease)
_clients: "weakref.WeakSet[StoreClient]" = weakref.WeakSet()


class KeyPage(NamedTuple):
    """Some keys of a namespace, their blocks' lengths in bytes, and where to go on; None at the end."""

    keys: Sequence[bytes]
    lengths: Sequence[int]
    cursor: int | None


class StoreClient:
    """A connection to one daemon. Make it with `connect`; it is a context manager that closes itself."""

    def __init__(
        self, address: str, link: Link, *, timeout_s: float, token: str | None, tls: ssl.SSLContext | None
    ) -> None:
        self._address = address
        self._timeout_s = timeout_s
        self._token = token
        self._tls = tls
        self._link: Link | None = link
        self._away = ""
        self._leases: dict[int, weakref.ref[Lease]] = {}
        self._lost: list[bytes] = []  # sessions whose leases may not all be given up
        self._ended: deque[tuple[int, bool]] = deque()  # leases that the daemon does not know to have ended
        self._unsent = threading.Event()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._pid = os.getpid()
        _clients.add(self)
        threading.Thread(target=self._flush_later, name="kvstore-flush", daemon=True).start()

    @classmethod
    def connect(
        cls,
        address: str = "unix:/run/kvstore/node.sock",
        *,
        timeout_s: float = 5.0,
        token: str | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> "StoreClient":
        """Connect to `unix:/path` or `tcp://host:port`. Every call is over within `timeout_s` and its wait.

        Raises:
            Unavailable: no daemon answers.
            Unauthorized: the daemon wants a token, or another one.
            ProtocolError: the daemon speaks another version.
        """
        link = Link.open(address, timeout_s, token=token, tls=tls)
        return cls(address, link, timeout_s=timeout_s, token=token, tls=tls)

    def close(self) -> None:
        """End all leases and the connection."""
        for lease in self._live_leases():
            lease.end_quietly()
        self._flush()
        self._closed.set()
        self._unsent.set()
        with self._lock:
            link, self._link, self._away = self._link, None, "the client is closed"
        if link is not None:
            link.close()

    # Leases.

    def reserve(
        self,
        namespace: Namespace,
        keys: Sequence[bytes],
        nbytes: int | Sequence[int],
        *,
        parent: bytes | None = None,
        tokens: Sequence[int] | None = None,
        wait_s: float = 0.0,
    ) -> WriteLease:
        """Reserve memory for blocks that continue `parent` in the order of `keys`, `nbytes` long each.

        With `wait_s=0` it never waits; otherwise up to `wait_s` for room. `tokens` are the blocks' token
        ids, for those who follow the daemon's events.

        Raises:
            InvalidRequest: keys or lengths are out of their limits, or a key is here with another length.
        """
        packed = packing.pack_keys(keys)
        lengths = packing.check_lengths(nbytes, len(keys))
        token_bytes = packing.pack_tokens(tokens)
        packing.check_wait(wait_s)
        link = self._connected()
        request = protocol.Reserve(link.handle(namespace), packed, lengths, parent, token_bytes, wait_s)
        answer = self._call(link, request, wait_s).answer
        assert isinstance(answer, protocol.Granted)
        slots = answer.slots
        views: list[memoryview] = []
        if link.shares_memory and slots.offsets:
            views = map_views(link, slots, writable=True)
        elif answer.lease:
            granted = answer.status.count(b"g")
            views = [memoryview(bytearray(n)) for n in packing.spread(slots.lengths, granted)]
        return self._hold(WriteLease(self, link, answer.lease, keys, answer.status, views))

    def acquire(self, namespace: Namespace, keys: Sequence[bytes], *, wait_s: float = 0.0) -> ReadLease:
        """Pin the leading keys that are here.

        With `wait_s` it waits for keys that are being written now; a key that nobody has announced ends
        the hit at once.
        """
        packed = packing.pack_keys(keys)
        packing.check_wait(wait_s)
        link = self._connected()
        reply = self._call(link, protocol.Acquire(link.handle(namespace), packed, wait_s), wait_s)
        answer = reply.answer
        assert isinstance(answer, protocol.Acquired)
        if link.shares_memory:
            views = map_views(link, answer.slots, writable=False)
        else:
            views = split_payload(reply.payload, answer.slots.lengths)
        return self._hold(ReadLease(self, link, answer.lease, views, limited=answer.limited))

    def acquire_each(self, items: Sequence[tuple[Namespace, bytes]]) -> EachLease:
        """Pin every item that is here; holes are allowed."""
        link = self._connected()
        request = protocol.AcquireEach(*_packed_items(link, items))
        reply = self._call(link, request)
        answer = reply.answer
        assert isinstance(answer, protocol.Acquired)
        if link.shares_memory:
            present = iter(map_views(link, answer.slots, writable=False))
        else:
            present = iter(split_payload(reply.payload, answer.slots.lengths))
        views = [next(present) if found else None for found in answer.found]
        return self._hold(EachLease(self, link, answer.lease, views, limited=answer.limited))

    # Questions.

    def hit_length(self, namespace: Namespace, keys: Sequence[bytes]) -> HitLength:
        """How many leading keys are here, cumulative per medium. Pins nothing: acquire is the truth."""
        packed = packing.pack_keys(keys)
        link = self._connected()
        answer = self._call(link, protocol.HitLengthOf(link.handle(namespace), packed)).answer
        assert isinstance(answer, protocol.Hits)
        return HitLength(answer.gpu, answer.dram, answer.nvme, answer.remote)

    def hit_each(self, items: Sequence[tuple[Namespace, bytes]]) -> Sequence[bool]:
        """For every item, whether it is here."""
        link = self._connected()
        answer = self._call(link, protocol.HitEach(*_packed_items(link, items))).answer
        assert isinstance(answer, protocol.Found)
        return list(map(bool, answer.found))

    def list(self, namespace: Namespace, cursor: int | None = None) -> "KeyPage":
        """A page of what the namespace has, in the order of sealing; begin with no cursor.

        A block that is here all the while is listed at least once.
        """
        link = self._connected()
        answer = self._call(link, protocol.ListKeys(link.handle(namespace), cursor or 0)).answer
        assert isinstance(answer, protocol.Page)
        keys = packing.unpack_keys(answer.keys) if answer.lengths else []
        return KeyPage(keys, answer.lengths, answer.after or None)

    def statistics(self) -> NodeStatistics:
        """The daemon's."""
        answer = self._call(self._connected(), protocol.GetStatistics()).answer
        assert isinstance(answer, protocol.Statistics)
        return answer.statistics

    def check(self) -> Sequence[str]:
        """Let the daemon recount everything: what is wrong, one line each. Stalls it for 1 us a block."""
        answer = self._call(self._connected(), protocol.Check()).answer
        assert isinstance(answer, protocol.Report)
        return answer.wrong

    # Whole blocks, copied.

    def put(self, namespace: Namespace, key: bytes, data: Any, *, timeout_s: float = 5.0) -> None:
        """Store a copy of `data` (bytes, an array: any contiguous buffer), waiting for room.

        A key that is here already, or that somebody else stores meanwhile, is left as it is.

        Raises:
            DeadlineExceeded: no room within `timeout_s`.
        """
        source = memoryview(data).cast("B")
        deadline = time.monotonic() + timeout_s
        while (wait_s := deadline - time.monotonic()) > 0:
            with self.reserve(namespace, [key], len(source), wait_s=wait_s) as write:
                if write.granted:
                    copy(write.views[0], source)
                    write.commit()
                if write.granted or write.present:
                    return
                refused = bool(write.refused)
            if refused:
                break
            with self.acquire(namespace, [key], wait_s=max(0.0, deadline - time.monotonic())) as read:
                if read.hit_length:
                    return
        raise DeadlineExceeded(
            f"no room for {len(source)} bytes within {timeout_s} s: all else is pinned or being written, or "
            "over this client's limit; release leases, or give the arena more memory"
        )

    def get(self, namespace: Namespace, key: bytes, *, timeout_s: float = 5.0) -> bytes | None:
        """A copy of the block, or None. Waits up to `timeout_s` if it is being written now."""
        with self.acquire(namespace, [key], wait_s=timeout_s) as read:
            return bytes(read.views[0]) if read.hit_length else None

    def remove(self, namespace: Namespace, keys: Sequence[bytes]) -> int:
        """Hide these blocks now, everywhere; how many were here. Pinned ones are freed at their release."""
        packed = packing.pack_keys(keys)
        link = self._connected()
        answer = self._call(link, protocol.Remove(link.handle(namespace), packed)).answer
        assert isinstance(answer, protocol.Count)
        return answer.count

    # Owner of the leases.

    def lease_ended(self, lease: Lease) -> bool:
        return self._leases.pop(lease.id, None) is not None

    def lease_alive(self, lease: Lease) -> bool:
        link = self._link
        return (
            link is lease.link and link is not None and not link.channel.broken and self._pid == os.getpid()
        )

    def lease_dropped(self, lease: Lease) -> None:
        if self._leases.pop(lease.id, None) is not None:
            self.send_end(lease)

    def send_end(self, lease: Lease) -> None:
        # It goes with the next request, which saves the daemon and us a wake-up, or a little later without.
        self._ended.append((lease.id, isinstance(lease, WriteLease)))
        if not self._unsent.is_set():
            self._unsent.set()

    def send_commit(self, lease: WriteLease, indices: Sequence[int] | None) -> None:
        link = lease.link
        payload: Sequence[memoryview] = ()
        if not link.shares_memory:
            views = lease.views
            payload = lease.open_views() if indices is None else [views[index] for index in sorted(indices)]
        self._call(link, protocol.Commit(lease.id, None if indices is None else [*indices]), payload=payload)

    # Helpers.

    def _call(
        self, link: Link, request: protocol.Request, wait_s: float = 0.0, payload: Sequence[memoryview] = ()
    ) -> Any:
        try:
            ahead = self._ended_frames() if self._ended else b""
            return link.channel.call(request, self._timeout_s + wait_s, payload, ahead=ahead)
        finally:
            if link.channel.broken is not None:
                self._lose(link)

    def _connected(self) -> Link:
        link = self._link
        if link is None or link.channel.broken is not None:
            if link is not None:
                self._lose(link)
            raise Unavailable(self._away)
        return link

    def _hold(self, lease: L) -> L:
        if lease.id:
            self._leases[lease.id] = weakref.ref(lease)
        return lease

    def _ended_frames(self) -> bytes:
        """The messages that end what has ended since the last request, to be sent ahead of the next."""
        reads: list[int] = []
        frames = b""
        with contextlib.suppress(IndexError):  # another thread takes them too
            while self._ended:
                lease_id, writes = self._ended.popleft()
                if writes:
                    frames += protocol.frame(0, protocol.Abort(lease_id))
                else:
                    reads.append(lease_id)
        return frames + protocol.frame(0, protocol.Release(reads)) if reads else frames

    def _flush(self) -> None:
        """Tell the daemon now."""
        link = self._link
        if link is None or self._pid != os.getpid():
            self._ended.clear()  # the next hello says what is still held
            return
        if self._ended:
            try:
                link.channel.send(self._ended_frames())
            except Unavailable:
                self._lose(link)

    def _flush_later(self) -> None:
        """The thread that ends leases of a client that makes no further request."""
        while not self._closed.is_set():
            self._unsent.wait()
            self._unsent.clear()
            self._closed.wait(_FLUSH_S)
            self._flush()

    def _live_leases(self) -> Sequence[Lease]:
        return [lease for reference in list(self._leases.values()) if (lease := reference()) is not None]

    def _lose(self, link: Link) -> None:
        """The link is broken: remember it once, and begin to connect anew."""
        with self._lock:
            if self._link is not link or self._pid != os.getpid():
                return
            self._link = None
            self._away = f"the daemon at {self._address} is away ({link.channel.broken})"
            if link.shares_memory:
                self._lost = [*self._lost, link.welcome.session][-_LOST_MAX:]
        link.close()
        threading.Thread(target=self._reconnect, name="kvstore-reconnect", daemon=True).start()

    def _reconnect(self) -> None:
        pause_s = _RECONNECT_FIRST_S
        while not self._closed.wait(pause_s):
            pause_s = min(2 * pause_s, _RECONNECT_MAX_S)
            held = list(self._leases)
            try:
                link = Link.open(
                    self._address,
                    self._timeout_s,
                    token=self._token,
                    tls=self._tls,
                    resume=self._lost,
                    held=held,
                )
            except (KVStoreError, OSError) as exc:  # whatever it is, it may have passed by the next attempt
                self._away = f"the daemon at {self._address} is away ({exc})"
                continue
            with self._lock:
                if self._closed.is_set():
                    link.close()
                    return
                self._link = link
                if not held:
                    self._lost.clear()
            # Those that ended while the hello was under way are given up now.
            for lease_id in set(held) - set(self._leases):
                self._ended += ((lease_id, False), (lease_id, True))
            self._flush()
            return

    def _abandon_in_child(self) -> None:
        self._closed.set()
        link, self._link = self._link, None
        self._away = "this client belongs to the parent process; call StoreClient.connect in the child"
        self._lock = threading.Lock()
        for lease in self._live_leases():
            lease.let_go()
        if link is not None:
            link.abandon_in_child()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def copy(target: memoryview, source: memoryview) -> None:
    """Copy bytes without holding the GIL, which assigning to a memoryview's slice does.

    Raises:
        InvalidRequest: the lengths differ.
    """
    if len(target) != len(source):
        raise InvalidRequest(f"copy of {len(source)} bytes into {len(target)}; give equal lengths")
    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))


def _packed_items(link: Link, items: Sequence[tuple[Namespace, bytes]]) -> tuple[list[int], protocol.Keys]:
    keys = packing.pack_keys([key for _, key in items])
    return [link.handle(namespace) for namespace, _ in items], keys


def _abandon_all_in_child() -> None:
    for client in list(_clients):
        client._abandon_in_child()


os.register_at_fork(after_in_child=_abandon_all_in_child)
