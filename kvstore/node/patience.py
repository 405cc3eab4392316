"""The verbs that wait: decide, wait until something has changed, decide anew. They keep no state."""

import asyncio
import time
from collections.abc import Sequence

from kvstore.node.directory import Shelf
from kvstore.node.lease import Grant, Holder, ReadLease
from kvstore.node.store import ROOM, Store


async def reserve(
    store: Store,
    holder: Holder,
    shelf: Shelf,
    keys: Sequence[bytes],
    lengths: Sequence[int],
    wait_s: float,
    *,
    parent: bytes | None,
    tokens: bytes | None,
) -> Grant:
    """Like `Store.reserve`, but wait up to `wait_s` for room. While it waits it holds nothing.

    What more than the holder's limit or the arena would be needed for is not waited for. Cancelling
    reserves nothing.
    """
    deadline = time.monotonic() + wait_s
    possible = sum(lengths) <= min(holder.reserved_bytes_max, store.tier.capacity_bytes)
    while True:
        grant = store.reserve(holder, shelf, keys, lengths, parent=parent, tokens=tokens)
        remaining = deadline - time.monotonic()
        if b"r" not in grant.status or remaining <= 0 or not possible:
            return grant
        store.undo(holder, grant.lease)
        await store.waiting.wait(ROOM, remaining)


async def acquire(
    store: Store, holder: Holder, shelf: Shelf, keys: Sequence[bytes], wait_s: float
) -> ReadLease:
    """Like `Store.acquire`, but wait up to `wait_s` for keys that are being written now.

    What is ready is pinned at once. Ends early at a key that nobody has announced. Cancelling releases
    what was pinned.
    """
    deadline = time.monotonic() + wait_s
    lease = store.acquire_nothing(keys)
    store.extend(holder, shelf, lease, keys)
    try:
        while len(lease.blocks) < len(keys) and not lease.limited:
            pending = shelf.pending.get(keys[len(lease.blocks)])
            remaining = deadline - time.monotonic()
            if pending is None or remaining <= 0:
                break
            await store.waiting.wait(pending, remaining)
            store.extend(holder, shelf, lease, keys)
    except asyncio.CancelledError:
        if lease.id in holder.reads:
            store.release(holder, lease.id)
        raise
    store.count_hits(lease, keys)
    return lease
