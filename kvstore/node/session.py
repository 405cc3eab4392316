"""One client's conversation: hello, then requests to the store. It holds what the client holds.

Requests are answered as they come; those that have to wait are answered later, and block no other.
"""

import asyncio
import logging
import os
import secrets
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, Final

from kvstore import packing, protocol
from kvstore.errors import InvalidRequest, KVStoreError, LeaseError, ProtocolError, Unauthorized
from kvstore.greeting import Greeting
from kvstore.node import patience
from kvstore.node.connection import Connection, discarding
from kvstore.node.handles import Handles
from kvstore.node.handover import FORMAT
from kvstore.node.host import Host
from kvstore.node.lease import Grant, Holder, ReadLease
from kvstore.node.promote import Shelves
from kvstore.node.questions import Questions, Verb
from kvstore.node.upkeep import Upkeep
from kvstore.protocol import BODY_BYTES_MAX, HELLO_BYTES_MAX, frame
from tiers.base import Slot

logger = logging.getLogger(__name__)

# How long a write lease lives whose slots no client maps.
LEASE_TTL_S: Final = 30.0
# Waiting requests of one client; each holds a task of some KB.
_WAITING_MAX: Final = 256


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
        # Whoever may open the socket needs no token.
        self._greeting = Greeting(None if holder.maps else host.token, holder.name)
        self._handles = Handles(self._store.directory)
        self._tasks: set[asyncio.Task[None]] = set()
        self._committing: tuple[int, protocol.Commit, KVStoreError | None] | None = None
        questions = Questions(host, self._handles, self._answer_later)
        upkeep = Upkeep(host, self._handles, self._answer_later)
        self._verbs: dict[type, Verb] = {
            protocol.OpenNamespaces: self._open_namespaces,
            protocol.OpenArena: self._open_arena,
            protocol.Reserve: self._reserve,
            protocol.ReserveEach: self._reserve_each,
            protocol.Commit: self._commit,
            protocol.Abort: self._abort,
            protocol.Acquire: self._acquire,
            protocol.AcquireEach: self._acquire_each,
            protocol.Release: self._release,
            protocol.Remove: self._remove,
            protocol.HandOver: self._hand_over,
            protocol.Goodbye: self._goodbye,
            **questions.verbs(),
            **upkeep.verbs(),
        }

    @property
    def welcomed(self) -> bool:
        """Whether hello is over."""
        return self._greeting.done

    # Handler of the connection.

    def received(self, request_id: int, body: memoryview, payload_bytes: int) -> Sequence[memoryview]:
        request = protocol.decode_request(body)
        if not self._greeting.done:
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
        challenge = self._greeting.receive(request)
        if challenge is not None:
            self._answer(request_id, challenge)
            return
        hello = self._greeting.hello
        assert hello is not None
        self.body_bytes_max = BODY_BYTES_MAX
        self._earlier = self._host.reclaim(hello.resume, hello.held)
        arena_bytes = self._host.arena_bytes() if self.holder.maps else []
        self._answer(
            request_id,
            protocol.Welcome(
                protocol.MAJOR,
                protocol.MINOR,
                self._host.node,
                self._host.epoch,
                self.id,
                arena_bytes,
                self.holder.pinned_bytes_max,
                self.holder.reserved_bytes_max,
            ),
        )

    def _open_namespaces(self, _: int, request: protocol.OpenNamespaces) -> protocol.Answer:
        return protocol.Opened(self._handles.open(request.ids, request.namespaces))

    def _open_arena(self, request_id: int, request: protocol.OpenArena) -> None:
        if not self.holder.maps:
            raise InvalidRequest("arenas are not mapped over TCP; connect over the unix socket")
        fd = self._host.open_arena(request.arena, writable=request.writable)
        self._connection.send(frame(request_id, protocol.Done()), fd=fd, after=lambda: os.close(fd))

    # Writers.

    def _reserve(self, request_id: int, request: protocol.Reserve) -> protocol.Answer | None:
        shelves = self._handles.shelves(request.namespace)
        keys = packing.unpack_keys(request.keys)
        lengths = packing.spread(request.lengths, len(keys))
        chain = {"parent": request.parent, "tokens": request.tokens}
        attempt = partial(self._store.writers.reserve, self.holder, shelves, keys, lengths, **chain)
        return self._grant(request_id, attempt, sum(lengths), packing.check_wait(request.wait_s))

    def _reserve_each(self, request_id: int, request: protocol.ReserveEach) -> protocol.Answer | None:
        items = self._handles.items(request.namespaces, request.keys)
        lengths = packing.spread(request.lengths, len(items))
        attempt = partial(self._store.writers.reserve_each, self.holder, items, lengths)
        return self._grant(request_id, attempt, sum(lengths), packing.check_wait(request.wait_s))

    def _grant(
        self, request_id: int, attempt: Callable[[], Grant], nbytes: int, wait_s: float
    ) -> protocol.Answer | None:
        grant = attempt()
        if wait_s == 0 or b"r" not in grant.status:
            return self._granted(grant)
        self._store.writers.undo(self.holder, grant.lease)

        async def wait() -> protocol.Answer:
            return self._granted(await patience.reserve(self._store, self.holder, attempt, nbytes, wait_s))

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
        return protocol.Count(self._store.writers.commit(self.holder, request.lease, request.indices))

    def _abort(self, _: int, request: protocol.Abort) -> protocol.Answer:
        earlier = next((h for h in self._earlier if request.lease in h.writes), None)
        self._store.writers.abort(earlier or self.holder, request.lease)
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
            views = self._store.writers.writable(self.holder, request.lease, request.indices)
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
            self._store.writers.abort(self.holder, lease_id)

    # Readers.

    def _acquire(self, request_id: int, request: protocol.Acquire) -> protocol.Answer | None:
        shelves = self._handles.shelves(request.namespace)
        keys = packing.unpack_keys(request.keys)
        wait_s = packing.check_wait(request.wait_s)
        if wait_s == 0 or not self._worth_waiting(shelves, keys):
            return self._acquired(request_id, self._store.readers.acquire(self.holder, shelves[0], keys))

        async def wait() -> protocol.Answer | None:
            lease = await patience.acquire(self._store, self.holder, shelves, keys, wait_s)
            return self._acquired(request_id, lease)

        self._answer_later(request_id, wait())
        return None

    def _acquire_each(self, request_id: int, request: protocol.AcquireEach) -> protocol.Answer | None:
        items = self._handles.items(request.namespaces, request.keys)
        wait_s = packing.check_wait(request.wait_s)
        if wait_s == 0 or all(key in shelves[0].sealed for shelves, key in items):
            lease, found = self._store.readers.acquire_each(self.holder, items)
            return self._acquired(request_id, lease, found)

        async def wait() -> protocol.Answer | None:
            lease, found = await patience.acquire_each(self._store, self.holder, items, wait_s)
            return self._acquired(request_id, lease, found)

        self._answer_later(request_id, wait())
        return None

    def _acquired(self, request_id: int, lease: ReadLease, found: bytes = b"") -> protocol.Answer | None:
        blocks = lease.blocks
        slots = self._slots([block.slot for block in blocks], [block.length for block in blocks])
        held = lease.id if blocks and self.holder.maps else 0
        answer = protocol.Acquired(held, slots, lease.limited, found)
        if self.holder.maps or not blocks:
            return answer
        # No memory is shared: send the bytes, and unpin once they are sent.
        views = [self._store.arena.tier.view(block.slot)[: block.length] for block in blocks]
        data = frame(request_id, answer, lease.block_bytes)
        self._connection.send(data, views, after=lambda: self._store.readers.release(self.holder, lease.id))
        return None

    def _release(self, _: int, request: protocol.Release) -> protocol.Answer:
        missing = 0
        for lease_id in request.leases:
            if lease_id in self.holder.reads and self.holder.maps:
                self._store.readers.release(self.holder, lease_id)
            elif (earlier := next((h for h in self._earlier if lease_id in h.reads), None)) is not None:
                self._store.readers.release(earlier, lease_id)
                self._host.emptied(earlier)
            else:
                missing = lease_id
        if missing:
            raise LeaseError(f"read lease {missing} is not held by this connection; it may have ended")
        return protocol.Done()

    def _remove(self, request_id: int, request: protocol.Remove) -> protocol.Answer | None:
        keys = packing.unpack_keys(request.keys)
        count, lasting = self._store.remove(self._handles.shelves(request.namespace), keys)
        if lasting is None:
            return protocol.Count(count)
        if not request.lasting:
            lasting.close()
            return protocol.Count(count)

        async def wait() -> protocol.Answer:
            await lasting
            return protocol.Count(count)

        try:
            self._answer_later(request_id, wait())
        except InvalidRequest:
            lasting.close()
            raise
        return None

    def _hand_over(self, request_id: int, request: protocol.HandOver) -> None:
        if request.format != FORMAT:
            raise InvalidRequest(f"format {request.format} asked for; this daemon hands over in {FORMAT}")
        if not self.holder.maps:
            raise Unauthorized("an arena is handed over on the unix socket alone")
        self._host.hand_over(self._connection, request_id)

    def _goodbye(self, _: int, __: protocol.Goodbye) -> protocol.Answer:
        for task in self._tasks:  # or what is freed now would be granted to them
            task.cancel()
        # What is being sent stays pinned until it is sent.
        for lease_id in self.holder.lease_ids() if self.holder.maps else [*self.holder.writes]:
            self._store.end_lease(self.holder, lease_id)
        for earlier in self._earlier:
            self._store.end(earlier)
            self._host.emptied(earlier)
        return protocol.Done()

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
            except Exception:  # a mistake of ours must not leave a client waiting
                logger.exception("%s: a request failed by a mistake", self.holder.name)
                answer = protocol.failure(KVStoreError("a mistake in the daemon; its log says which"))
            if answer is not None:
                self._answer(request_id, answer)

        task = asyncio.get_running_loop().create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _worth_waiting(self, shelves: Shelves, keys: Sequence[bytes]) -> bool:
        """Whether the first key that is not in the arena may be there soon."""
        arena = shelves[0]
        missing = next((key for key in keys if key not in arena.sealed), None)
        if missing is None:
            return False
        movements = self._store.movements
        return (
            missing in arena.pending
            or movements.below(shelves, missing)
            or movements.may_find(shelves, missing)
        )

    def _slots(self, slots: Sequence[Slot], lengths: Sequence[int]) -> protocol.Slots:
        if not self.holder.maps:
            return protocol.Slots(0, [], packing.gather(lengths))
        arena = self._store.arena.tier.arena
        return protocol.Slots(arena, [slot.offset for slot in slots], packing.gather(lengths))
