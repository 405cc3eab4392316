"""The Redis tier: blocks that all nodes share, in one Redis, behind Sentinel, or in a cluster; Valkey too.

A block is some parts and a header that is written last (see `tiers.header`): the first header under a name
stands, and whoever comes second deletes its own parts. Parts expire unless a header came to stand, so a
writer that dies leaves nothing behind. What leaves to make room is Redis's to decide (`maxmemory-policy`):
of a block that has lost a part the header goes too, as soon as somebody notices.

How that is said to Redis is in `tiers.redis_blocks`; here is who waits for it.
"""

import asyncio
import re
import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final

from msgspec.structs import replace

from kvstore.block import Medium, Namespace
from kvstore.errors import TierError
from tiers.base import Found, Slot, TierStatistics, Transfer
from tiers.header import Header, Names
from tiers.jobs import Jobs
from tiers.ledger import Ledger
from tiers.redis_blocks import SLOWEST_BYTES_PER_S, RedisBlocks
from tiers.redis_servers import FAILURES
from tiers.redis_servers import RedisPlace as RedisPlace
from tiers.redis_servers import RedisServers as RedisServers
from tiers.resp import ServerError

_ASKING_THREADS: Final = 2
# What moves bytes gives way to the event loop, on which everybody waits (benchmarks redis).
_NICENESS: Final = 10

# What redis-py says of each server that it tried: other words every time, and no new line of the log each.
_DETAILS: Final = re.compile(r" <.*> -|(?<=node:) .* connecting to \S+")
# What the text of a failure holds -> what to do about it.
_REMEDIES: Final = {
    "maxmemory": "raise its maxmemory, or set a maxmemory-policy that evicts",
    "read only": "it is a replica: name the primary, or use redis+sentinel://",
    "readonly": "it is a replica: name the primary, or use redis+sentinel://",
    "password": "check redis.username and redis.password_file",
    "authentication": "check redis.username and redis.password_file",
    "permission": "allow that user GET, SET, MGET, DEL, STRLEN, PERSIST, PEXPIRE, EVAL, PING, in a cluster "
    "CLUSTER and COMMAND too",
    "certificate": "check its certificate and redis.tls_ca",
    "_ssl.c": "see whether it speaks TLS, and check redis.tls_certificate if it asks for one",
    "loading": "it will be back once it has loaded its data",
}


class RedisTier:
    """A storage tier that other nodes use too: see `SharedTier`.

    Its space is for knowing blocks (see `Ledger`), its records are headers. One call is the work of one
    thread, with a connection of its own.
    """

    medium = Medium.REMOTE
    slowest_bytes_per_s = SLOWEST_BYTES_PER_S

    def __init__(
        self,
        servers: RedisServers,
        *,
        name: str = "redis",
        prefix: str = "kvstore",
        ttl_s: float = 0.0,
        known_blocks: int = 1 << 18,
        threads: int = 4,
        timeout_s: float = 2.0,
    ) -> None:
        self.name = name
        self._servers = servers
        self._blocks = RedisBlocks(
            servers, Names(prefix), tier=name, ttl_ms=int(ttl_s * 1000), timeout_s=timeout_s
        )
        self._ledger = Ledger(known_blocks)
        self.capacity_bytes = self._ledger.capacity_bytes
        place = str(servers)
        self._open = 2  # kinds of threads that still use the servers
        self._closing = threading.Lock()
        threads_of = partial(
            Jobs, translate=self._translated, give_back=self._close_servers, niceness=_NICENESS
        )
        self._bulk = threads_of(name, place, threads)
        # Questions do not wait behind blocks' bytes.
        self._asking = threads_of(f"{name}-asking", place, _ASKING_THREADS)
        self._writing: dict[asyncio.Future[None], Sequence[Transfer]] = {}
        self._forgotten: list[Header] = []
        self._deleting = asyncio.Lock()

    # Blocks: see StorageTier and SharedTier.

    async def recover(self) -> list[Transfer]:
        under_way = self._bulk.running + self._asking.running
        if under_way:
            raise TierError(
                f"{self.name} tier: {under_way} calls are under way at {self._servers}; try later"
            )
        await asyncio.shield(self._asking.start("connecting", self._connect))
        self._ledger.clear()
        return []

    async def find(self, blocks: Sequence[tuple[Namespace, bytes]]) -> list[Found | None]:
        names = [(namespace.id, key) for namespace, key in blocks]
        headers = await asyncio.shield(
            self._asking.start(f"asking for {len(blocks)} blocks", partial(self._blocks.headers, names))
        )
        # Headers share what the asker has: each namespace and key of their own would be 600 bytes.
        return [
            None if h is None else Found(h.length, h.checksum, replace(h, namespace=namespace, key=key))
            for h, (namespace, key) in zip(headers, blocks, strict=True)
        ]

    async def write(self, transfers: Sequence[Transfer]) -> None:
        if self._forgotten or self._deleting.locked():
            await self._delete(())  # or their headers would be taken for others' that stand
        job = self._bulk.start(f"writing {len(transfers)} blocks", partial(self._blocks.write, transfers))
        self._writing[job] = transfers
        job.add_done_callback(self._writing.pop)
        await asyncio.shield(job)

    async def read(self, transfers: Sequence[Transfer]) -> None:
        work = partial(self._blocks.read, transfers)
        await asyncio.shield(self._bulk.start(f"reading {len(transfers)} blocks", work))

    def evict(self, records: Sequence[Any]) -> None:
        """Nothing: this node knows them no longer, and Redis keeps them."""

    def forget(self, records: Sequence[Any]) -> None:
        self._forgotten += [record for record in records if record is not None]

    async def flush(self, names: Sequence[tuple[bytes, bytes]] = ()) -> None:
        self._blocks.check_open()
        # A header that is on its way would come to stand behind this.
        late = [job for job, transfers in self._writing.items() if any(t.dropped for t in transfers)]
        if late:
            await asyncio.wait(late)
        await self._delete(names)

    async def same(self) -> bool:
        if self._servers.client is None:
            return False
        same = await asyncio.shield(self._asking.start("looking", self._look))
        with suppress(TierError):  # what cannot be deleted now is tried again: that says nothing of the rest
            await self._delete(())
        return same

    def interrupt(self) -> None:
        self._servers.interrupt()

    async def probe(self) -> None:
        await asyncio.shield(self._asking.start("writing a little", self._blocks.probe))

    def close(self) -> None:
        """Close the connections, or leave that to the last thread; does not wait for it."""
        self._bulk.close()
        self._asking.close()

    # Space: entries for blocks that are known.

    def slot_length(self, length: int) -> int:
        return self._ledger.slot_length(length)

    def take(self, length: int, owner: object, within: Slot | None = None) -> Slot | None:
        return self._ledger.take(length, owner, within)

    def free(self, slot: Slot) -> Slot:
        return self._ledger.free(slot)

    def largest(self, count: int) -> list[Slot]:
        return self._ledger.largest(count)

    @property
    def free_bytes(self) -> int:
        return self._ledger.free_bytes

    def statistics(self) -> TierStatistics:
        return TierStatistics(
            name=self.name,
            medium=self.medium.value,
            capacity_bytes=self.capacity_bytes,
            ready_bytes=self.capacity_bytes,
            used_bytes=self.capacity_bytes - self.free_bytes,
            largest_free_bytes=self.free_bytes,
        )

    def check(self) -> list[str]:
        return []

    # On the event loop.

    async def _delete(self, names: Sequence[tuple[bytes, bytes]]) -> None:
        async with self._deleting:
            forgotten, self._forgotten = self._forgotten, []
            if not forgotten and not names:
                return
            try:
                work = partial(self._blocks.delete, forgotten, names)
                await asyncio.shield(self._asking.start("deleting blocks", work))
            except TierError:
                self._forgotten += forgotten
                raise

    # In a thread.

    def _connect(self) -> None:
        self._servers.open()
        self._blocks.mark()

    def _look(self) -> bool:
        self._servers.ping()
        return self._blocks.marked()

    # Helpers.

    def _translated(self, action: str, exc: Exception) -> TierError | None:
        if not isinstance(exc, (*FAILURES, ServerError)):
            return None
        text = _DETAILS.sub("", str(exc)).strip() or type(exc).__name__
        found = (remedy for sign, remedy in _REMEDIES.items() if sign in text.lower())
        remedy = next(found, "see whether it is up and can be reached")
        return TierError(f"{self.name} tier: {action} at {self._servers} failed: {text}; {remedy}")

    def _close_servers(self) -> None:
        with self._closing:
            self._open -= 1
            last = not self._open
        if last:
            self._servers.close()
