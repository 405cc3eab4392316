"""The client of the store: what connectors and scripts use. Synchronous and thread-safe.

A client connects to the daemon of its node over a unix socket and shares its memory, or over TCP, where
blocks are copied. When the daemon goes away, calls raise `Unavailable` at once, and a thread connects anew
in the background; leases from before are invalid. A forked child must connect for itself.
"""

import ssl
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Final, NamedTuple, Self, TypeVar

import numpy as np

from kvstore import packing, protocol
from kvstore.block import Namespace
from kvstore.channel import TRANSFER_S
from kvstore.errors import DeadlineExceeded, InvalidRequest, Unavailable
from kvstore.index_client import IndexClient as IndexClient
from kvstore.keeper import Keeper
from kvstore.leases import EachLease as EachLease
from kvstore.leases import ReadLease, map_views, split_payload
from kvstore.leases import WriteLease as WriteLease
from kvstore.link import Link
from kvstore.questions import Item as Item
from kvstore.questions import KeyPage as KeyPage
from kvstore.questions import NamespaceUse as NamespaceUse
from kvstore.questions import packed_items
from kvstore.upkeep import Hold as Hold
from kvstore.upkeep import Upkeep

# What a request may name.
KEYS_MAX: Final = protocol.KEYS_MAX
N = TypeVar("N")
# How long the daemon may take, beside an answer's usual time, until its disks promise that what was removed
# stays away; a disk that takes longer is given up on before.
_LASTING_S: Final = 5.0


class Limits(NamedTuple):
    """How many bytes a client may have pinned, and reserved."""

    pinned_bytes: int
    reserved_bytes: int


class StoreClient(Upkeep):
    """A connection to one daemon. Make it with `connect`; it is a context manager that closes itself."""

    def __init__(self, keeper: Keeper) -> None:
        super().__init__(keeper)
        self._keeper = keeper
        self._hold = keeper.hold

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

        Over TCP the bytes of blocks take their time beside, at most the `transfer_s` of the call that sends,
        receives or stays behind them on this connection.

        Raises:
            Unavailable: no daemon answers.
            Unauthorized: the daemon wants a token, or another one.
            ProtocolError: the daemon speaks another version.
        """

        def dial(resume: Sequence[bytes], held: Sequence[int]) -> Link:
            return Link.open(address, timeout_s, token=token, tls=tls, resume=resume, held=held)

        return cls(Keeper(address, dial))

    def close(self) -> None:
        """End all leases and the connection."""
        self._keeper.close()

    @property
    def lost(self) -> str | None:
        """Why the connection is no more, also if no call has noticed yet; None while it stands."""
        try:
            channel = self._connected().channel
        except Unavailable as error:
            return str(error)
        return "the daemon has closed the connection" if channel.lost() else None

    @property
    def shares_memory(self) -> bool:
        """Whether views are the daemon's own memory, and not copies; raises Unavailable while it is away."""
        return self._connected().shares_memory

    @property
    def limits(self) -> Limits:
        """What the daemon allows this client at once; raises Unavailable while it is away."""
        welcome = self._connected().welcome
        return Limits(welcome.pinned_bytes_max, welcome.reserved_bytes_max)

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
        transfer_s: float = TRANSFER_S,
    ) -> WriteLease[bytes]:
        """Reserve memory for blocks that continue `parent` in the order of `keys`, `nbytes` long each.

        With `wait_s=0` it never waits; otherwise up to `wait_s` for room. `parent` is the key before the
        first: b"" where that starts a prompt, None where it is not known. `tokens` are the blocks' token ids.
        Both are for those who follow the daemon's events.

        Raises:
            InvalidRequest: keys or lengths are out of their limits, or a key is here with another length.
        """
        packed = packing.pack_keys(keys)
        lengths = packing.check_lengths(nbytes, len(keys))
        token_bytes = packing.pack_tokens(tokens)
        packing.check_wait(wait_s)
        link = self._connected()

        def request() -> protocol.Reserve:
            handle = link.handle(namespace, transfer_s)
            return protocol.Reserve(handle, packed, lengths, parent, token_bytes, wait_s)

        return self._granted(link, request, keys, wait_s, transfer_s)

    def reserve_each(
        self,
        items: Sequence[Item],
        nbytes: int | Sequence[int],
        *,
        wait_s: float = 0.0,
        transfer_s: float = TRANSFER_S,
    ) -> WriteLease[Item]:
        """Reserve memory for blocks of several namespaces, in no order; else as `reserve` does.

        What the lease has in place of keys are items.
        """
        lengths = packing.check_lengths(nbytes, len(items))
        packing.check_wait(wait_s)
        link = self._connected()
        names, packed = packed_items(items)

        def request() -> protocol.ReserveEach:
            return protocol.ReserveEach(link.handles(names, transfer_s), packed, lengths, wait_s)

        return self._granted(link, request, items, wait_s, transfer_s)

    def acquire(
        self,
        namespace: Namespace,
        keys: Sequence[bytes],
        *,
        wait_s: float = 0.0,
        transfer_s: float = TRANSFER_S,
    ) -> ReadLease:
        """Pin the leading keys that are in the arena.

        With `wait_s` it waits for keys that are in a tier below, or are being written now; a key that
        nobody has announced ends the hit at once. Over TCP their bytes come now, within `transfer_s`.

        Raises:
            TransferTooSlow: it took longer; where they had begun to come, the connection is lost.
        """
        packed = packing.pack_keys(keys)
        packing.check_wait(wait_s)
        link = self._connected()

        def request() -> protocol.Acquire:
            return protocol.Acquire(link.handle(namespace, transfer_s), packed, wait_s)

        reply = self._call_named(link, request, wait_s, transfer_s)
        answer = reply.answer
        assert isinstance(answer, protocol.Acquired)
        if link.shares_memory:
            views = map_views(link, answer.slots, writable=False)
        else:
            views = split_payload(reply.payload, answer.slots.lengths)
        return self._hold(ReadLease(self._keeper, link, answer.lease, views, limited=answer.limited))

    def acquire_each(
        self, items: Sequence[Item], *, wait_s: float = 0.0, transfer_s: float = TRANSFER_S
    ) -> EachLease:
        """Pin every item that is here; holes are allowed. Else as `acquire` does."""
        packing.check_wait(wait_s)
        link = self._connected()
        names, packed = packed_items(items)

        def request() -> protocol.AcquireEach:
            return protocol.AcquireEach(link.handles(names, transfer_s), packed, wait_s)

        reply = self._call_named(link, request, wait_s, transfer_s)
        answer = reply.answer
        assert isinstance(answer, protocol.Acquired)
        if link.shares_memory:
            present = iter(map_views(link, answer.slots, writable=False))
        else:
            present = iter(split_payload(reply.payload, answer.slots.lengths))
        views = [next(present) if found else None for found in answer.found]
        return self._hold(EachLease(self._keeper, link, answer.lease, views, limited=answer.limited))

    # Whole blocks, copied.

    def put(self, namespace: Namespace, key: bytes, data: Any, *, timeout_s: float = 5.0) -> None:
        """Store a copy of `data` (bytes, an array: any contiguous buffer), waiting for room.

        A key that is here already, or that somebody else stores meanwhile, is left as it is.

        Raises:
            DeadlineExceeded: no room within `timeout_s`, or never, as where the node drains; or over TCP the
                bytes took longer.
        """
        source = memoryview(data).cast("B")
        deadline = time.monotonic() + timeout_s
        while (wait_s := deadline - time.monotonic()) > 0:
            with self.reserve(namespace, [key], len(source), wait_s=wait_s) as write:
                if write.granted:
                    copy(write.views[0], source)
                    write.commit(transfer_s=timeout_s)
                if write.granted or write.present:
                    return
                refused = bool(write.refused)
            if refused and self.statistics().draining:
                raise DeadlineExceeded(
                    "the node drains and takes nothing new; use another, or `kvstore drain --cancel`"
                )
            if refused:
                break
            with self.acquire(namespace, [key], wait_s=max(0.0, deadline - time.monotonic())) as read:
                if [len(view) for view in read.views] == [len(source)]:  # else reserve says what is wrong
                    return
        raise DeadlineExceeded(
            f"no room for {len(source)} bytes within {timeout_s} s, or never: all else is pinned or being "
            "written, or this client's limit or the salt's quota is less; release leases, or give the arena "
            "more memory"
        )

    def get(self, namespace: Namespace, key: bytes, *, timeout_s: float = 5.0) -> bytes | None:
        """A copy of the block, or None. Waits up to `timeout_s` if it is below, or being written.

        Over TCP its bytes may take as long again, or as long as an answer.
        """
        transfer_s = max(timeout_s, self._connected().timeout_s)
        with self.acquire(namespace, [key], wait_s=timeout_s, transfer_s=transfer_s) as read:
            return bytes(read.views[0]) if read.hit_length else None

    def remove(self, namespace: Namespace, keys: Sequence[bytes], *, lasting: bool = True) -> int:
        """Hide these blocks now, everywhere; how many were here. Pinned ones are freed at their release.

        When it returns no restart of the daemon brings them back. Without `lasting` that is not waited for.

        Raises:
            TierError: they are hidden, but a tier that fails now may bring them back with a restart.
        """
        packed = packing.pack_keys(keys)
        link = self._connected()
        wait_s = _LASTING_S if lasting else 0.0
        reply = self._call_named(
            link, lambda: protocol.Remove(link.handle(namespace), packed, lasting), wait_s
        )
        answer = reply.answer
        assert isinstance(answer, protocol.Count)
        return answer.count

    def _granted(
        self,
        link: Link,
        request: Callable[[], protocol.Reserve | protocol.ReserveEach],
        names: Sequence[N],
        wait_s: float,
        transfer_s: float,
    ) -> WriteLease[N]:
        answer = self._call_named(link, request, wait_s, transfer_s).answer
        assert isinstance(answer, protocol.Granted)
        slots = answer.slots
        views: list[memoryview] = []
        if link.shares_memory and slots.offsets:
            views = map_views(link, slots, writable=True)
        elif answer.lease:
            granted = answer.status.count(b"g")
            views = [memoryview(bytearray(n)) for n in packing.spread(slots.lengths, granted)]
        return self._hold(WriteLease(self._keeper, link, answer.lease, names, answer.status, views))

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
