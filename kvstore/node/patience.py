"""The verbs that wait: decide, wait until something has changed, decide anew. They keep no state."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from kvstore.node.accounts import Together
from kvstore.node.arena import ROOM
from kvstore.node.blocks import Block
from kvstore.node.lease import Grant, Holder, ReadLease
from kvstore.node.promote import Shelves

if TYPE_CHECKING:
    from kvstore.node.store import Store


async def reserve(
    store: "Store", holder: Holder, attempt: Callable[[], Grant], nbytes: int, wait_s: float
) -> Grant:
    """Reserve by `attempt`, `nbytes` in all; wait up to `wait_s` for room. While it waits it holds nothing.

    What more than the holder's limit, a quota or the arena would be needed for is not waited for. Cancelling
    reserves nothing.
    """
    deadline = time.monotonic() + wait_s
    possible = nbytes <= min(holder.reserved_bytes_max, store.arena.tier.capacity_bytes)
    while True:
        grant = attempt()
        remaining = deadline - time.monotonic()
        if b"r" not in grant.status or remaining <= 0 or not possible or grant.hopeless:
            return grant
        store.writers.undo(holder, grant.lease)
        await store.waiting.wait(ROOM, remaining)


async def acquire(
    store: "Store", holder: Holder, shelves: Shelves, keys: Sequence[bytes], wait_s: float
) -> ReadLease:
    """Like `Readers.acquire`, but wait up to `wait_s` for keys that are below, or being written now.

    What is ready is pinned at once; for what is not here shared tiers are asked once. Ends early at a key
    that nobody has announced. Cancelling releases what was pinned; what is being loaded arrives all the same.
    """
    readers = store.readers
    lease = readers.acquire_nothing(keys)
    readers.extend(holder, shelves[0], lease, keys)
    readers.looked(len(lease.blocks), len(keys))
    try:
        await extend(store, holder, lease, shelves, keys, wait_s)
    except asyncio.CancelledError:
        if lease.id in holder.reads:
            readers.release(holder, lease.id)
        raise
    following = keys[len(lease.blocks) :][:1]
    if following and _beyond_limit(store, holder, Together(lease.blocks), shelves, following[0]):
        readers.limit(lease)
    readers.count_hits(shelves[0], lease, keys)
    return lease


async def extend(
    store: "Store", holder: Holder, lease: ReadLease, shelves: Shelves, keys: Sequence[bytes], wait_s: float
) -> None:
    """Pin more of the keys as they come, for up to `wait_s`; shared tiers are asked once.

    Cancelling leaves the lease with what it has by then.
    """
    if len(lease.blocks) == len(keys) or lease.limited:
        return
    deadline = time.monotonic() + wait_s
    missing = keys[len(lease.blocks) :]
    _prefix_under_way(store, holder, lease, shelves, missing)  # meanwhile
    await store.movements.find_prefix(shelves, missing, wait_s)
    store.readers.extend(holder, shelves[0], lease, keys)
    while len(lease.blocks) < len(keys) and not lease.limited:
        remaining = deadline - time.monotonic()
        subject = _prefix_under_way(store, holder, lease, shelves, keys[len(lease.blocks) :])
        if subject is None or remaining <= 0:
            break
        await store.waiting.wait(subject, remaining)
        store.readers.extend(holder, shelves[0], lease, keys)


async def acquire_each(
    store: "Store", holder: Holder, items: Sequence[tuple[Shelves, bytes]], wait_s: float
) -> tuple[ReadLease, bytes]:
    """Like `Readers.acquire_each`, but wait up to `wait_s` for what is below, or being written now.

    What is ready is pinned at once, and shared tiers are asked once. Cancelling releases what was pinned.
    """
    deadline = time.monotonic() + wait_s
    readers = store.readers
    lease, found = readers.acquire_nothing([]), bytearray(len(items))
    readers.extend_each(holder, lease, items, found)
    readers.looked(len(lease.blocks), len(items))
    try:
        missing = [item for item, here in zip(items, found, strict=True) if not here]
        if missing and not lease.limited:
            _under_way(store, holder, lease, missing)  # meanwhile
            await store.movements.find(missing, wait_s)
            readers.extend_each(holder, lease, items, found)
        while not lease.limited and (remaining := deadline - time.monotonic()) > 0:
            missing = [item for item, here in zip(items, found, strict=True) if not here]
            subject = _under_way(store, holder, lease, missing)
            if subject is None:
                break
            await store.waiting.wait(subject, remaining)
            readers.extend_each(holder, lease, items, found)
    except asyncio.CancelledError:
        if lease.id in holder.reads:
            readers.release(holder, lease.id)
        raise
    return readers.finish_each(lease, items, found)


def _prefix_under_way(
    store: "Store", holder: Holder, lease: ReadLease, shelves: Shelves, keys: Sequence[bytes]
) -> Block | str | None:
    """Begin to load what can be had of these leading keys; what to wait for until the first may be here."""
    arena = shelves[0]
    if _beyond_limit(store, holder, Together(lease.blocks), shelves, keys[0]):
        return None
    items = []
    for key in keys:
        if key not in arena.sealed and key not in arena.pending and not store.movements.below(shelves, key):
            break
        items.append((shelves, key))
    return _under_way(store, holder, lease, items)


def _under_way(
    store: "Store", holder: Holder, lease: ReadLease, items: Sequence[tuple[Shelves, bytes]]
) -> Block | str | None:
    """Begin to load what is below; what to wait for until more may be here. None when there is nothing."""
    store.movements.promoter.load(items, holder.pinned_bytes_max - holder.pinned_bytes, lease.blocks)
    for shelves, key in items:
        if (pending := shelves[0].pending.get(key)) is not None:
            return pending
    together = Together(lease.blocks)
    for shelves, key in items:
        is_below = key not in shelves[0].sealed and store.movements.below(shelves, key)
        if is_below and not _beyond_limit(store, holder, together, shelves, key):
            return ROOM
    return None


def _beyond_limit(store: "Store", holder: Holder, together: Together, shelves: Shelves, key: bytes) -> bool:
    """Whether the block is below, and longer than what this client may still pin, or its salt still have."""
    found = store.movements.promoter.source(shelves, key)
    if found is None:
        return False
    length = found[1].length
    beyond = length > holder.pinned_bytes_max - holder.pinned_bytes
    return beyond or not together.fits(shelves[0].account, length)
