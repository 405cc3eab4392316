"""What a client asks without holding anything: hits, lists, statistics, checks. For one connection."""

from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from kvstore import packing, protocol
from kvstore.errors import InvalidRequest
from kvstore.node import listing
from kvstore.node.handles import Handles
from kvstore.node.host import Host
from kvstore.node.verification import Verification
from kvstore.protocol import LIST_PAGE_MAX

Verb = Callable[[int, Any], protocol.Answer | None]


class Questions:
    """The verbs that ask. `answer_later` takes what is to be awaited for the answer to a request."""

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
        self._listings = listing.Listings()
        self._verifications: dict[int, Verification] = {}  # by tier

    def verbs(self) -> dict[type, Verb]:
        """What answers each request."""
        return {
            protocol.HitLengthOf: self._hit_length,
            protocol.HitEach: self._hit_each,
            protocol.ListKeys: self._list,
            protocol.ListNamespaces: self._list_namespaces,
            protocol.GetStatistics: lambda _, __: protocol.Statistics(self._host.statistics()),
            protocol.Check: lambda _, __: protocol.Report(self._host.check()),
            protocol.Verify: self._verify,
        }

    def _hit_length(self, request_id: int, request: protocol.HitLengthOf) -> protocol.Answer | None:
        keys = packing.unpack_keys(request.keys)
        shelves = self._handles.shelves(request.namespace)
        packing.check_wait(request.wait_s)

        def answer() -> protocol.Answer:
            hits = self._store.readers.hit_length(shelves, keys)
            return protocol.Hits(hits.gpu, hits.dram, hits.nvme, hits.remote)

        movements = self._store.movements
        worth = request.wait_s and any(movements.may_find(shelves, key) for key in keys)
        asking = partial(movements.find_prefix, shelves, keys, request.wait_s)
        return self._once_asked(request_id, asking if worth else None, answer)

    def _hit_each(self, request_id: int, request: protocol.HitEach) -> protocol.Answer | None:
        items = self._handles.items(request.namespaces, request.keys)
        packing.check_wait(request.wait_s)

        def answer() -> protocol.Answer:
            lengths = self._store.readers.length_each(items)
            return protocol.Found(bytes(map(bool, lengths)), [length for length in lengths if length])

        movements = self._store.movements
        worth = request.wait_s and any(movements.may_find(shelves, key) for shelves, key in items)
        asking = partial(movements.find, items, request.wait_s)
        return self._once_asked(request_id, asking if worth else None, answer)

    def _once_asked(
        self,
        request_id: int,
        asking: Callable[[], Coroutine[Any, Any, None]] | None,
        answer: Callable[[], protocol.Answer],
    ) -> protocol.Answer | None:
        """The answer; or None, and the answer once `asking` is over."""
        if asking is None:
            return answer()

        async def wait() -> protocol.Answer:
            await asking()
            return answer()

        self._answer_later(request_id, wait())
        return None

    def _list(self, _: int, request: protocol.ListKeys) -> protocol.Answer:
        shelves = self._handles.shelves(request.namespace)
        limit = min(request.limit, LIST_PAGE_MAX) if request.limit > 0 else LIST_PAGE_MAX
        blocks, cursor = self._listings.page(shelves, request.after, limit)
        keys = packing.pack_keys([block.key for block in blocks]) if blocks else protocol.Keys(b"", [])
        return protocol.Page(keys, [block.length for block in blocks], cursor)

    def _list_namespaces(self, _: int, request: protocol.ListNamespaces) -> protocol.Answer:
        page, after = listing.namespaces(self._store.directory, request.after, LIST_PAGE_MAX)
        return protocol.NamespacePage(
            [shelves[0].namespace for shelves in page],
            [listing.most_in_a_medium(shelves, lambda shelf: len(shelf.sealed)) for shelves in page],
            [listing.most_in_a_medium(shelves, lambda shelf: shelf.sealed_bytes) for shelves in page],
            after,
        )

    def _verify(self, request_id: int, request: protocol.Verify) -> None:
        lowers = self._store.movements.lowers
        if not 1 <= request.tier <= len(lowers):
            raise InvalidRequest(f"tier {request.tier} has no checksums; those of 1 to {len(lowers)} have")
        if request.after == 0:
            self._verifications[request.tier] = Verification(lowers[request.tier - 1])
        verification = self._verifications.get(request.tier)
        if verification is None or request.after < 0:
            raise InvalidRequest(f"verify after {request.after}; begin after 0")
        self._answer_later(request_id, verification.page(request.after))
