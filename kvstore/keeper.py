"""What keeps a client connected: one link at a time, another when it breaks, and the ends of leases sent.

It owns the threads a client has beside its callers': one that connects anew while the daemon is away, and
one that tells the daemon of ended leases when no further request does. Neither is on a request's way.
"""

import contextlib
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

from kvstore import protocol
from kvstore.channel import TRANSFER_S
from kvstore.errors import KVStoreError, Unavailable, UnknownNamespace
from kvstore.leases import Lease, WriteLease
from kvstore.link import Link

_RECONNECT_FIRST_S: Final = 0.02
_RECONNECT_MAX_S: Final = 2.0
# How long the end of a lease may wait for a request to travel with.
_FLUSH_S: Final = 0.005
# Ended leases told in one message, well below what the daemon takes.
_ENDS_MAX: Final = protocol.KEYS_MAX // 2
# Lost sessions named at reconnecting; of more, the leases stay in quarantine until this process ends.
_LOST_MAX: Final = 1000
# How often a request is made anew whose namespaces the daemon has forgotten. For a second time, other threads
# must have named 60,000 between its naming and the request.
_RENAMINGS_MAX: Final = 3
# A daemon that hangs does not keep a client from closing for longer.
_GOODBYE_S: Final = 0.2
L = TypeVar("L", bound=Lease)
_keepers: "weakref.WeakSet[Keeper]" = weakref.WeakSet()

# Opens a link that resumes lost sessions (their ids) and still uses some leases (their ids).
Dial = Callable[[Sequence[bytes], Sequence[int]], Link]


class Keeper:
    """A client's link and its leases; the owner of the leases. `dial` is called from threads of its own."""

    def __init__(self, address: str, dial: Dial) -> None:
        self._address = address
        self._dial = dial
        self._link: Link | None = dial((), ())
        self._away = ""
        self._leases: dict[int, weakref.ref[Lease]] = {}
        self._lost: list[bytes] = []  # sessions whose leases may not all be given up
        self._ended: deque[tuple[int, bool]] = deque()  # leases that the daemon does not know to have ended
        self._unsent = threading.Event()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._nobody_reconnects = threading.Event()  # though there is no link
        self._pid = os.getpid()
        _keepers.add(self)
        weakref.finalize(self, self._unsent.set).atexit = False
        arguments = weakref.ref(self), self._unsent
        ends = threading.Thread(target=_send_ends, args=arguments, name="kvstore-ends", daemon=True)
        try:
            ends.start()
        except RuntimeError as exc:
            self._link.close()
            raise Unavailable(
                f"the client cannot have its thread ({exc}); let the process have more"
            ) from exc

    def close(self) -> None:
        """End all leases and the connection."""
        for lease in self._live_leases():
            lease.end_quietly()
        if self._link is not None and self._link.shares_memory:
            self.send_ends()
        self._closed.set()
        self._unsent.set()
        with self._lock:
            link, self._link, self._away = self._link, None, "the client is closed"
        if link is not None:
            # A daemon that was asked in vain may still answer: what it grants then is nobody's. Over TCP the
            # end of the connection says so, and a payload may be under way.
            if link.shares_memory:
                # Its answer is waited for: what the daemon sends to a closed socket would end the connection
                # there before it has read this.
                with contextlib.suppress(KVStoreError):
                    link.channel.call(protocol.Goodbye(), min(link.timeout_s, _GOODBYE_S))
            link.close()

    @property
    def closed(self) -> bool:
        """Whether `close` was called, or this is a forked child."""
        return self._closed.is_set()

    def connected(self) -> Link:
        """The link, or Unavailable with what is known of why there is none."""
        link = self._link
        if link is None or link.channel.broken is not None:
            if link is not None:
                self._lose(link)
            elif self._nobody_reconnects.is_set() and not self._closed.is_set():
                self._nobody_reconnects.clear()
                self._begin_to_reconnect()
            raise Unavailable(self._away)
        return link

    def call(
        self,
        link: Link,
        request: protocol.Request,
        wait_s: float = 0.0,
        payload: Sequence[memoryview] = (),
        transfer_s: float = TRANSFER_S,
    ) -> Any:
        """The reply to a request that the daemon may wait `wait_s` before it answers."""
        try:
            ahead = self._ends() if self._ended else b""
            timeout_s = link.timeout_s + wait_s
            return link.channel.call(request, timeout_s, payload, transfer_s=transfer_s, ahead=ahead)
        finally:
            if link.channel.broken is not None:
                self._lose(link)

    def call_named(
        self,
        link: Link,
        request_of: Callable[[], protocol.Request],
        wait_s: float = 0.0,
        transfer_s: float = TRANSFER_S,
    ) -> Any:
        """`call` for a request that names namespaces; `request_of` makes it, anew if they are forgotten."""
        for _ in range(_RENAMINGS_MAX):
            try:
                return self.call(link, request_of(), wait_s, transfer_s=transfer_s)
            except UnknownNamespace:
                link.forget_handles()
        return self.call(link, request_of(), wait_s, transfer_s=transfer_s)

    def hold(self, lease: L) -> L:
        """Take a new lease into account."""
        if lease.id:
            self._leases[lease.id] = weakref.ref(lease)
        return lease

    # Owner of the leases.

    def lease_ended(self, lease: Lease) -> bool:
        return self._leases.pop(lease.id, None) is not None

    def lease_alive(self, lease: Lease) -> bool:
        return self._link is lease.link and lease.link.channel.broken is None and self._pid == os.getpid()

    def lease_dropped(self, lease: Lease) -> None:
        if self.lease_ended(lease):
            self.send_end(lease)

    def send_end(self, lease: Lease) -> None:
        # It goes with the next request, which saves the daemon and us a wake-up, or a little later without.
        self._ended.append((lease.id, isinstance(lease, WriteLease)))
        if not self._unsent.is_set():
            self._unsent.set()

    def send_commit(self, lease: WriteLease[Any], indices: Sequence[int] | None, transfer_s: float) -> None:
        payload: Sequence[memoryview] = ()
        if not lease.link.shares_memory:
            views = lease.views
            payload = lease.open_views() if indices is None else [views[index] for index in sorted(indices)]
        request = protocol.Commit(lease.id, None if indices is None else [*indices])
        self.call(lease.link, request, payload=payload, transfer_s=transfer_s)

    def send_ends(self) -> None:
        """Tell the daemon of all leases that have ended."""
        while self._ended:
            link = self._link
            if link is None or self._pid != os.getpid():
                self._ended.clear()  # the next hello says what is still held
                return
            try:
                link.channel.send(self._ends())
            except Unavailable:
                self._lose(link)

    # Helpers.

    def _ends(self) -> bytes:
        """The messages that end leases, for one go."""
        reads: list[int] = []
        frames = b""
        with contextlib.suppress(IndexError):  # another thread takes them too
            for _ in range(_ENDS_MAX):
                lease_id, writes = self._ended.popleft()
                if writes:
                    frames += protocol.frame(0, protocol.Abort(lease_id))
                else:
                    reads.append(lease_id)
        return frames + protocol.frame(0, protocol.Release(reads)) if reads else frames

    def _live_leases(self) -> list[Lease]:
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
        self._begin_to_reconnect()

    def _begin_to_reconnect(self) -> None:
        thread = threading.Thread(target=self._reconnect, name="kvstore-reconnect", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no more threads can be had: the next call tries again
            self._nobody_reconnects.set()

    def _reconnect(self) -> None:
        pause_s = _RECONNECT_FIRST_S
        while not self._closed.wait(pause_s):
            pause_s = min(2 * pause_s, _RECONNECT_MAX_S)
            held = list(self._leases)
            try:
                link = self._dial(self._lost, held)
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
            self.send_ends()
            return

    def abandon_in_child(self) -> None:
        """In a forked child: keep neither socket nor memory nor leases."""
        self._closed.set()
        link, self._link = self._link, None
        self._away = "this client belongs to the parent process; call StoreClient.connect in the child"
        self._lock = threading.Lock()
        for lease in self._live_leases():
            lease.let_go()
        if link is not None:
            link.abandon_in_child()


def _send_ends(reference: "weakref.ref[Keeper]", unsent: threading.Event) -> None:
    """The thread that tells the daemon of ended leases while its client makes no request."""
    pause = threading.Event()
    while True:
        unsent.wait()
        unsent.clear()
        pause.wait(_FLUSH_S)
        keeper = reference()
        if keeper is None or keeper.closed:
            return
        keeper.send_ends()
        del keeper


def _abandon_all_in_child() -> None:
    for keeper in list(_keepers):
        keeper.abandon_in_child()


os.register_at_fork(after_in_child=_abandon_all_in_child)
