"""One client's conversation: hello, then requests to the store. It holds what the client holds.

Requests are answered as they come; those that have to wait are answered later, and block no other.
"""

import asyncio
import hmac
import logging
import os
import secrets
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, Protocol

from kvstore import packing, protocol
from kvstore.block import Namespace
from kvstore.errors import (
    InvalidRequest,
    KVStoreError,
    LeaseError,
    ProtocolError,
    Unauthorized,
)
from kvstore.node import patience
from kvstore.node.connection import Connection, discarding
from kvstore.node.directory import Shelf
from kvstore.node.lease import Grant, Holder, ReadLease
from kvstore.node.store import Store
from kvstore.protocol import BODY_BYTES_MAX, HELLO_BYTES_MAX, LIST_PAGE_MAX, frame
from kvstore.statistics import NodeStatistics
from tiers.base import Slot

logger = logging.getLogger(__name__)

# Salts make namespaces, so one engine may use many; this bounds what a runaway costs to some 10 MB.
NAMESPACES_MAX: Final = 65_536
# How long a write lease lives whose slots no client maps.
LEASE_TTL_S: Final = 30.0
# Waiting requests of one client; each holds a task of some KB.
_WAITING_MAX: Final = 256


class Host(Protocol):
    """What a session needs of the server that it belongs to."""

    node: str
    epoch: int
    token: str | None
    store: Store

    def open_arena(self, arena: int, *, writable: bool) -> int:
        """A descriptor that the caller closes. Raises InvalidRequest when there is no such arena."""

    def arena_bytes(self) -> list[int]:
        """The size of each arena."""

    def statistics(self) -> NodeStatistics:
        """The node's."""

    def check(self) -> list[str]:
        """What is wrong in the node."""

    def reclaim(self, resume: Sequence[bytes], held: Sequence[int]) -> list[Holder]:
        """A client is back: those of its lost sessions that still hold some of the leases `held`."""

    def leave(self, session: "Session") -> None:
        """The session's connection is lost."""

    def emptied(self, holder: Holder) -> None:
        """A quarantined holder may hold nothing any more."""


class Session:
    """The handler of one connection."""

    def __init__(self, host: Host, connection: Connection, holder: Holder) -> None:
        self._host = host
        self._store = host.store
        self._connection = connection
        self.holder = holder
        self.id = secrets.token_bytes(16)
        self.body_bytes_max = HELLO_BYTES_MAX
        self._earlier: list[Holder] = []  # what this client holds of connections it lost
        self._hello: protocol.Hello | None = None
        self._daemon_nonce = b""
        self.welcomed = False
        self._shelves: list[Shelf] = []
        self._handles: dict[Namespace, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._committing: tuple[int, protocol.Commit, KVStoreError | None] | None = None
        self._verbs: dict[type, Callable[[int, Any], protocol.Answer | None]] = {
            protocol.OpenNamespace: self._open_namespace,
            protocol.OpenArena: self._open_arena,
            protocol.Reserve: self._reserve,
            protocol.Commit: self._commit,
            protocol.Abort: self._abort,
            protocol.Acquire: self._acquire,
            protocol.AcquireEach: self._acquire_each,
            protocol.Release: self._release,
            protocol.HitLengthOf: self._hit_length,
            protocol.HitEach: self._hit_each,
            protocol.Remove: self._remove,
            protocol.ListKeys: self._list,
            protocol.GetStatistics: lambda _, __: protocol.Statistics(self._host.statistics()),
            protocol.Check: lambda _, __: protocol.Report(self._host.check()),
        }

    # Handler of the connection.

    def received(self, request_id: int, body: memoryview, payload_bytes: int) -> Sequence[memoryview]:
        request = protocol.decode_request(body)
        if not self.welcomed:
            if payload_bytes:
                raise ProtocolError(
                    f"{payload_bytes} bytes of payload after {type(request).__name__}; give none"
                )
            self._greet(request_id, request)
            return ()
        if payload_bytes:
            return self._receive_payload(request_id, request, payload_bytes)
        verb = self._verbs.get(type(request))
        if verb is None:
            raise ProtocolError(f"{type(request).__name__} after the connection was welcomed")
        try:
            answer = verb(request_id, request)
        except KVStoreError as error:
            answer = protocol.failure(error)
        if answer is not None:
            self._answer(request_id, answer)
        return ()

    def payload_received(self) -> None:
        assert self._committing is not None
        (request_id, request, error), self._committing = self._committing, None
        try:
            if error is not None:
                raise error
            self._answer(request_id, self._seal(request))
        except KVStoreError as late:
            self._answer(request_id, protocol.failure(late))

    def lost(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._verbs = {}  # they refer to this session: without them it goes at once
        self._host.leave(self)

    # Hello.

    def _greet(self, request_id: int, request: protocol.Request) -> None:
        if isinstance(request, protocol.Hello) and self._hello is None:
            if request.major != protocol.MAJOR:
                raise ProtocolError(
                    f"protocol {request.major}.{request.minor} asked for; this daemon speaks "
                    f"{protocol.MAJOR}.{protocol.MINOR}: use a client of the daemon's version"
                )
            self._hello = request
            token = self._host.token
            if token is None or self.holder.maps:
                self._welcome(request_id, request)
                return
            self._daemon_nonce = secrets.token_bytes(32)
            proof = protocol.token_proof(token, "daemon", request.nonce, self._daemon_nonce)
            self._answer(request_id, protocol.Challenge(self._daemon_nonce, proof))
        elif isinstance(request, protocol.Proof) and self._hello is not None:
            token = self._host.token or ""
            wanted = protocol.token_proof(token, "client", self._hello.nonce, self._daemon_nonce)
            if not hmac.compare_digest(wanted, request.proof):
                logger.warning("refused a client without the right token: %s", self.holder.name)
                raise Unauthorized("the token is wrong; give the daemon's token")
            self._welcome(request_id, self._hello)
        else:
            due = "Hello" if self._hello is None else "Proof"
            raise ProtocolError(f"{type(request).__name__} before {due}; send {due} first")

    def _welcome(self, request_id: int, hello: protocol.Hello) -> None:
        self.welcomed = True
        self.body_bytes_max = BODY_BYTES_MAX
        self._earlier = self._host.reclaim(hello.resume, hello.held)
        arena_bytes = self._host.arena_bytes() if self.holder.maps else []
        self._answer(
            request_id,
            protocol.Welcome(
                protocol.MAJOR, protocol.MINOR, self._host.node, self._host.epoch, self.id, arena_bytes
            ),
        )

    def _open_namespace(self, _: int, request: protocol.OpenNamespace) -> protocol.Answer:
        namespace = request.namespace
        # Compared with the namespace of that id first: two that claim one id are the graver mistake.
        for tier in self._store.directory.tiers:
            tier.compare(request.id, namespace)
        if namespace.id != request.id:
            raise InvalidRequest(
                f"namespace id {request.id.hex()} is not the digest of {namespace!r}, which is "
                f"{namespace.id.hex()}; use a client of the daemon's version"
            )
        handle = self._handles.get(namespace)
        if handle is None:
            if len(self._shelves) >= NAMESPACES_MAX:
                raise InvalidRequest(
                    f"{len(self._shelves)} namespaces on one connection; the limit is {NAMESPACES_MAX}: "
                    "open another connection"
                )
            handle = self._handles[namespace] = len(self._shelves)
            self._shelves.append(self._store.directory.tiers[0].shelf(namespace))
        return protocol.Opened(handle)

    def _open_arena(self, request_id: int, request: protocol.OpenArena) -> None:
        if not self.holder.maps:
            raise InvalidRequest("arenas are not mapped over TCP; connect over the unix socket")
        fd = self._host.open_arena(request.arena, writable=request.writable)
        self._connection.send(frame(request_id, protocol.Done()), fd=fd, after=lambda: os.close(fd))

    # Writers.

    def _reserve(self, request_id: int, request: protocol.Reserve) -> protocol.Answer | None:
        shelf = self._shelf(request.namespace)
        keys = packing.unpack_keys(request.keys)
        lengths = packing.spread(request.lengths, len(keys))
        wait_s = packing.check_wait(request.wait_s)
        arguments = {"parent": request.parent, "tokens": request.tokens}
        grant = self._store.reserve(self.holder, shelf, keys, lengths, **arguments)
        if wait_s == 0 or b"r" not in grant.status:
            return self._granted(grant)
        self._store.undo(self.holder, grant.lease)

        async def wait() -> protocol.Answer:
            waited = patience.reserve(self._store, self.holder, shelf, keys, lengths, wait_s, **arguments)
            return self._granted(await waited)

        self._answer_later(request_id, wait())
        return None

    def _granted(self, grant: Grant) -> protocol.Answer:
        lease_id = grant.lease.id if grant.slots else 0
        if lease_id and not self.holder.maps:
            self._expire_later(lease_id)
        lengths = [block.length for block in grant.lease.open if block is not None]
        return protocol.Granted(lease_id, grant.status, self._slots(grant.slots, lengths))

    def _commit(self, _: int, request: protocol.Commit) -> protocol.Answer:
        if not self.holder.maps:
            raise InvalidRequest("commit without the blocks' bytes; over TCP they follow as payload")
        return self._seal(request)

    def _seal(self, request: protocol.Commit) -> protocol.Answer:
        return protocol.Count(self._store.commit(self.holder, request.lease, request.indices))

    def _abort(self, _: int, request: protocol.Abort) -> protocol.Answer:
        earlier = next((h for h in self._earlier if request.lease in h.writes), None)
        self._store.abort(earlier or self.holder, request.lease)
        if earlier is not None:
            self._host.emptied(earlier)
        return protocol.Done()

    def _receive_payload(
        self, request_id: int, request: protocol.Request, payload_bytes: int
    ) -> Sequence[memoryview]:
        """Where the bytes of a commit go: into their slots, or nowhere when they may not."""
        limit = self.holder.reserved_bytes_max
        if self.holder.maps or not isinstance(request, protocol.Commit) or payload_bytes > limit:
            raise ProtocolError(
                f"{payload_bytes} bytes of payload after {type(request).__name__}; only Commit over TCP has "
                f"any, at most {limit} bytes"
            )
        error: KVStoreError | None = None
        views: list[memoryview] = []
        try:
            views = self._store.writable(self.holder, request.lease, request.indices)
            size = sum(map(len, views))
            if size != payload_bytes:
                error = InvalidRequest(f"payload is {payload_bytes} bytes; the blocks have {size}")
        except KVStoreError as failed:
            error = failed
        self._committing = (request_id, request, error)
        return views if error is None else discarding(payload_bytes)

    def _expire_later(self, lease_id: int) -> None:
        """Nobody maps these slots, so a writer that forgets them, or is cut off, loses them in time."""
        asyncio.get_running_loop().call_later(LEASE_TTL_S, self._expire, lease_id)

    def _expire(self, lease_id: int) -> None:
        if self._committing is not None and self._committing[1].lease == lease_id:
            self._expire_later(lease_id)
        elif lease_id in self.holder.writes:
            self._store.abort(self.holder, lease_id)

    # Readers.

    def _acquire(self, request_id: int, request: protocol.Acquire) -> protocol.Answer | None:
        shelf = self._shelf(request.namespace)
        keys = packing.unpack_keys(request.keys)
        wait_s = packing.check_wait(request.wait_s)
        if wait_s == 0 or next((key for key in keys if key not in shelf.sealed), None) not in shelf.pending:
            return self._acquired(request_id, self._store.acquire(self.holder, shelf, keys))

        async def wait() -> protocol.Answer | None:
            lease = await patience.acquire(self._store, self.holder, shelf, keys, wait_s)
            return self._acquired(request_id, lease)

        self._answer_later(request_id, wait())
        return None

    def _acquire_each(self, request_id: int, request: protocol.AcquireEach) -> protocol.Answer | None:
        lease, found = self._store.acquire_each(self.holder, self._items(request))
        return self._acquired(request_id, lease, found)

    def _acquired(self, request_id: int, lease: ReadLease, found: bytes = b"") -> protocol.Answer | None:
        blocks = lease.blocks
        slots = self._slots([block.slot for block in blocks], [block.length for block in blocks])
        held = lease.id if blocks and self.holder.maps else 0
        answer = protocol.Acquired(held, slots, lease.limited, found)
        if self.holder.maps or not blocks:
            return answer
        # No memory is shared: send the bytes, and unpin once they are sent.
        views = [self._store.tier.view(block.slot)[: block.length] for block in blocks]
        data = frame(request_id, answer, lease.block_bytes)
        self._connection.send(data, views, after=lambda: self._store.release(self.holder, lease.id))
        return None

    def _release(self, _: int, request: protocol.Release) -> protocol.Answer:
        missing = 0
        for lease_id in request.leases:
            if lease_id in self.holder.reads:
                self._store.release(self.holder, lease_id)
            elif (earlier := next((h for h in self._earlier if lease_id in h.reads), None)) is not None:
                self._store.release(earlier, lease_id)
                self._host.emptied(earlier)
            else:
                missing = lease_id
        if missing:
            raise LeaseError(f"read lease {missing} is not held by this connection; it may have ended")
        return protocol.Done()

    def _hit_length(self, _: int, request: protocol.HitLengthOf) -> protocol.Answer:
        keys = packing.unpack_keys(request.keys)
        hits = self._store.hit_length([self._shelf(request.namespace)], keys)
        return protocol.Hits(hits.gpu, hits.dram, hits.nvme, hits.remote)

    def _hit_each(self, _: int, request: protocol.HitEach) -> protocol.Answer:
        return protocol.Found(self._store.hit_each(self._items(request)))

    def _remove(self, _: int, request: protocol.Remove) -> protocol.Answer:
        keys = packing.unpack_keys(request.keys)
        return protocol.Count(self._store.remove(self._shelf(request.namespace), keys))

    def _list(self, _: int, request: protocol.ListKeys) -> protocol.Answer:
        entries, after = self._store.page(self._shelf(request.namespace), request.after, LIST_PAGE_MAX)
        if not entries:
            return protocol.Page(protocol.Keys(b"", []), [], 0)
        keys = packing.pack_keys([key for key, _ in entries])
        return protocol.Page(keys, [length for _, length in entries], after or 0)

    # Helpers.

    def _answer(self, request_id: int, answer: protocol.Answer) -> None:
        if request_id:
            self._connection.send(frame(request_id, answer))

    def _answer_later(self, request_id: int, wait: Coroutine[Any, Any, protocol.Answer | None]) -> None:
        if len(self._tasks) >= _WAITING_MAX:
            wait.close()
            raise InvalidRequest(f"{len(self._tasks)} requests are waiting; the limit is {_WAITING_MAX}")

        async def run() -> None:
            try:
                answer = await wait
            except KVStoreError as error:
                answer = protocol.failure(error)
            if answer is not None:
                self._answer(request_id, answer)

        task = asyncio.get_running_loop().create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _shelf(self, handle: int) -> Shelf:
        if not 0 <= handle < len(self._shelves):
            raise InvalidRequest(
                f"namespace handle {handle}; this connection has opened {len(self._shelves)}: open it first"
            )
        return self._shelves[handle]

    def _items(self, request: protocol.AcquireEach | protocol.HitEach) -> list[tuple[Shelf, bytes]]:
        keys = packing.unpack_keys(request.keys)
        handles = packing.spread(request.namespaces, len(keys))
        return [(self._shelf(handle), key) for handle, key in zip(handles, keys, strict=True)]

    def _slots(self, slots: Sequence[Slot], lengths: Sequence[int]) -> protocol.Slots:
        if not self.holder.maps:
            return protocol.Slots(0, [], packing.gather(lengths))
        arena = self._store.tier.arena
        return protocol.Slots(arena, [slot.offset for slot in slots], packing.gather(lengths))
