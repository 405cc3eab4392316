"""What a client has a daemon do with blocks that it neither reads nor writes. For one connection.

What is begun so goes on without the client: see `kvstore.node.holds` and `kvstore.node.drain`.
"""

from collections.abc import Callable, Coroutine
from typing import Any

from kvstore import packing, protocol
from kvstore.errors import LeaseError
from kvstore.node.clear import Scope, clear
from kvstore.node.handles import Handles
from kvstore.node.host import Host
from kvstore.node.questions import Verb


class Upkeep:
    """Its verbs. `answer_later` takes what is to be awaited for the answer to a request."""

    def __init__(
        self,
        host: Host,
        handles: Handles,
        answer_later: Callable[[int, Coroutine[Any, Any, protocol.Answer | None]], None],
    ) -> None:
        self._host = host
        self._store = host.store
        self._handles = handles
        self._answer_later = answer_later

    def verbs(self) -> dict[type, Verb]:
        """What answers each request."""
        return {
            protocol.Drain: self._drain,
            protocol.Prefetch: lambda _, request: self._hold(request.namespace, request.keys, 0.0),
            protocol.Pin: lambda _, request: self._hold(request.namespace, request.keys, request.ttl_s),
            protocol.Unpin: self._unpin,
            protocol.Clear: self._clear,
        }

    def _hold(self, handle: int, packed: protocol.Keys, ttl_s: float) -> protocol.Answer:
        namespace = self._handles.shelves(handle)[0].namespace
        hold = self._store.holds.hold(namespace, packing.unpack_keys(packed), ttl_s)
        return protocol.Held(hold.id, hold.pinned, hold.loading, hold.missing)

    def _unpin(self, _: int, request: protocol.Unpin) -> protocol.Answer:
        if not self._store.holds.end(request.id):
            raise LeaseError(f"hold {request.id} is over, or was never there")
        return protocol.Done()

    def _clear(self, request_id: int, request: protocol.Clear) -> None:
        scope = Scope(request.namespace, request.model, request.salt)
        wait_s = packing.check_wait(request.wait_s)

        async def wait() -> protocol.Answer:
            return protocol.Count(await clear(self._store, scope, wait_s))

        self._answer_later(request_id, wait())

    def _drain(self, request_id: int, request: protocol.Drain) -> None:
        wait_s, drain = packing.check_wait(request.wait_s), self._store.drain
        (drain.cancel if request.cancel else drain.begin)()

        async def wait() -> protocol.Answer:
            remains = await drain.wait(self._host.open_writes, wait_s)
            tiers = len(self._store.movements.lowers)
            blocks, nbytes, leases = remains.blocks, remains.block_bytes, remains.leases
            owed, away = remains.owed_blocks, list(remains.away)
            over = remains.over
            return protocol.Drained(drain.under_way, tiers, blocks, nbytes, leases, owed, away, over)

        self._answer_later(request_id, wait())
