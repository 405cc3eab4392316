"""Batches of blocks between an engine's buffers and the daemon: stores of all or none, loads of what is here.

It holds no lease beyond a call, and locks nothing. Calls block, so engines make them from threads; each is
over by its deadline (a time of `time.monotonic`).
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Final

from connectors import pools
from connectors.copying import Copier, Pairs
from connectors.daemon import Daemon
from kvstore.block import Namespace
from kvstore.client import KEYS_MAX, Item, StoreClient, WriteLease, copy
from kvstore.errors import DeadlineExceeded, InvalidRequest, KVStoreError, TierError

# What a block's bytes are made of, end to end.
Parts = Sequence[memoryview]
# What of a block (by its index in the batch) is to be copied where; None when it is not what was expected.
Place = Callable[[int, memoryview], Pairs | None]

# Blocks of tiers below are fetched in windows, so that what has come is copied while the disk reads on; all
# windows together are a part of what this client may pin.
_WINDOW_BYTES: Final = 32 << 20
_WINDOWS_OF_PINNED: Final = 4
# How long the daemon is asked to wait at a time: one that hangs is noticed soon after.
_PATIENCE_S: Final = 1.0
# Between two looks at a block that somebody else is writing.
_LOOK_S: Final = 0.005
# How long the daemon may ask tiers that it shares with others for what it does not know.
_ASK_S: Final = 0.5


class Batches:
    """Stores and loads for one connector. `threads` copy, and as many wait for what is on its way.

    Raises:
        InvalidRequest: so many threads cannot be had.
    """

    def __init__(self, daemon: Daemon, threads: int) -> None:
        self._daemon = daemon
        self._threads = threads
        self._copier = Copier(threads)
        try:
            self._waiters = pools.start("wait", threads)
        except InvalidRequest:
            self._copier.close()
            raise
        self._closed = threading.Event()

    def store(self, items: Sequence[Item], sources: Sequence[Parts], deadline: float) -> int:
        """Store all of these blocks, whose parts are `sources`, or none; how many bytes were copied.

        What is here already is left as it is, unless it has another length: then it is replaced. What
        somebody else is writing is waited for, and ours are in place meanwhile; they are removed again if it
        comes to nothing, as far as the daemon answers then.

        Raises:
            DeadlineExceeded: somebody else is still writing some of them.
            InvalidRequest: they are more than the daemon lets one client reserve.
            TierError: there is no room for all of them.
            Unavailable: the daemon is away, or has gone.
        """
        wanted = dict(zip(items, sources, strict=True))
        copied = 0
        in_place: list[Item] = []
        with ExitStack() as undo:
            undo.callback(self._take_back, in_place)
            while wanted:
                with self._daemon.moving() as store:
                    _check_room(store, wanted)
                    busy, nbytes = self._publish(store, wanted, in_place, deadline)
                copied += nbytes
                wanted = {item: wanted[item] for item in busy}
                if wanted and (time.monotonic() > deadline or self._closed.wait(_LOOK_S)):
                    raise DeadlineExceeded(f"{len(wanted)} blocks are still being written by somebody else")
            undo.pop_all()
        return copied

    def load(
        self,
        items: Sequence[Item],
        place: Place,
        deadline: float,
        pinned: Mapping[int, memoryview] | None = None,
    ) -> list[bool]:
        """Copy these blocks to where `place` says; for each whether it is there. An absence is no error.

        `pinned` are the bytes of those that the caller holds, by index.
        """
        loaded = [False] * len(items)
        pairs: list[tuple[memoryview, memoryview]] = []
        for index, block in (pinned or {}).items():
            placed = place(index, block)
            if placed is not None:
                pairs += placed
                loaded[index] = True
        missing = [index for index, is_placed in enumerate(loaded) if not is_placed]

        def fetch(window: Sequence[int]) -> None:
            for index in self._fetch(items, window, place, deadline):
                loaded[index] = True

        if len(missing) == len(items) == 1:
            fetch(missing)
            return loaded
        # Whatever happens, nobody writes into the caller's buffers after this.
        windows = self._windows(items, missing, deadline)
        pools.share(self._waiters, fetch, windows, partial(self._copier.copy, pairs))
        return loaded

    def stop(self) -> None:
        """Let calls under way wait for nothing more."""
        self._closed.set()

    def close(self) -> None:
        """End the threads. No call may be under way."""
        self._waiters.shutdown(wait=True)
        self._copier.close()

    # Stores.

    def _publish(
        self, store: StoreClient, wanted: Mapping[Item, Parts], in_place: list[Item], deadline: float
    ) -> tuple[list[Item], int]:
        """Reserve and copy all of it, or nothing, and commit; what is busy, and how many bytes were copied.

        What may be readable from now on, even when this raises, is added to `in_place`.
        """
        busy: list[Item] = []
        pairs: list[tuple[memoryview, memoryview]] = []
        items = list(wanted)
        with ExitStack() as leases:
            writes = []
            for start in range(0, len(items), KEYS_MAX):
                part = items[start : start + KEYS_MAX]
                write = leases.enter_context(self._reserve(store, part, wanted, deadline))
                if write.refused:
                    raise TierError(
                        f"no room in time for {len(write.refused)} of {len(wanted)} blocks: too much is "
                        "pinned, reserved or not yet on disk; give the daemon more memory or a faster disk"
                    )
                for item, view in zip(write.granted, write.views, strict=True):
                    pairs += _laid_out(view, wanted[item])
                busy += write.busy
                writes.append(write)
            nbytes = self._copier.copy(pairs)
            for write in writes:
                in_place += write.granted
                write.commit(transfer_s=_left_s(deadline))
        return busy, nbytes

    def _take_back(self, in_place: Sequence[Item]) -> None:
        """Remove what a store that has failed had put in place, for as long as that may still take."""
        until = time.monotonic() + _PATIENCE_S
        try:
            for namespace, keys in _by_namespace(in_place):
                if time.monotonic() > until:
                    raise DeadlineExceeded("the daemon is slow: part of a store that failed stays")
                with self._daemon.asking() as store:
                    store.remove(namespace, keys, lasting=False)
        except KVStoreError as error:
            self._daemon.complain(error)

    def _reserve(
        self, store: StoreClient, items: Sequence[Item], wanted: Mapping[Item, Parts], deadline: float
    ) -> WriteLease[Item]:
        lengths = [_length(wanted[item]) for item in items]
        while True:
            left_s = _left_s(deadline)
            write = self._reserve_once(store, items, lengths, deadline)
            if not write.refused or left_s <= _PATIENCE_S or self._closed.is_set():
                return write
            write.end_quietly()

    def _reserve_once(
        self, store: StoreClient, items: Sequence[Item], lengths: list[int], deadline: float
    ) -> WriteLease[Item]:
        def reserve() -> WriteLease[Item]:
            wait_s, transfer_s = _waits(store, _left_s(deadline))
            return store.reserve_each(items, lengths, wait_s=wait_s, transfer_s=transfer_s)

        try:
            return reserve()
        except InvalidRequest:
            with self._daemon.asking() as questions:
                here = questions.length_each(items)
                there = zip(items, here, lengths, strict=True)
                other = [item for item, old, new in there if old not in (0, new)]
                if not other:
                    raise
                for namespace, keys in _by_namespace(other):
                    if not _left_s(deadline):
                        raise
                    questions.remove(namespace, keys, lasting=False)  # a crash may bring it back
            return reserve()

    # Loads.

    def _fetch(
        self, items: Sequence[Item], window: Sequence[int], place: Place, deadline: float
    ) -> Iterator[int]:
        """Wait for these blocks and copy them; the indices of those that have come."""
        while window and _left_s(deadline) and not self._closed.is_set():
            try:
                wanted = [items[index] for index in window]
                with self._daemon.moving() as store:
                    wait_s, transfer_s = _waits(store, _left_s(deadline))
                    with store.acquire_each(wanted, wait_s=wait_s, transfer_s=transfer_s) as lease:
                        views = dict(zip(window, lease.views, strict=True))
                        for index, block in views.items():
                            placed = None if block is None else place(index, block)
                            if placed is not None:
                                for target, source in placed:
                                    copy(target, source)
                                yield index
                missing = [index for index, block in views.items() if block is None]
                if len(missing) == len(window) and not lease.limited:
                    with self._daemon.asking() as store:
                        if not any(store.hit_each(wanted)):
                            return
            except KVStoreError as error:
                self._daemon.complain(error)
                return
            if len(missing) == len(window):
                self._closed.wait(_LOOK_S)  # the disk is slow, or others of ours have pinned too much
            window = missing

    def _windows(self, items: Sequence[Item], missing: Sequence[int], deadline: float) -> list[list[int]]:
        """The missing blocks that are here at all, in windows of some bytes."""
        windows: list[list[int]] = []
        window_bytes = room_bytes = 0
        for start in range(0, len(missing), KEYS_MAX):
            part = missing[start : start + KEYS_MAX]
            try:
                with self._daemon.asking() as store:
                    share = store.limits.pinned_bytes // _WINDOWS_OF_PINNED // self._threads
                    window_bytes = min(_WINDOW_BYTES, share)
                    wait_s = min(_ASK_S, _left_s(deadline))
                    lengths = store.length_each([items[index] for index in part], wait_s=wait_s)
            except KVStoreError:
                break
            for index, length in zip(part, lengths, strict=True):
                if not length:
                    continue
                if length > room_bytes or len(windows[-1]) == KEYS_MAX:
                    windows.append([])
                    room_bytes = max(window_bytes, length)
                windows[-1].append(index)
                room_bytes -= length
        return windows


def _by_namespace(items: Iterable[Item]) -> Iterator[tuple[Namespace, list[bytes]]]:
    """The keys of each namespace, as many at a time as a request may name."""
    groups: dict[Namespace, list[bytes]] = {}
    for namespace, key in items:
        groups.setdefault(namespace, []).append(key)
    for namespace, keys in groups.items():
        for start in range(0, len(keys), KEYS_MAX):
            yield namespace, keys[start : start + KEYS_MAX]


def _length(parts: Parts) -> int:
    return sum(map(len, parts))


def _laid_out(block: memoryview, parts: Parts) -> Iterator[tuple[memoryview, memoryview]]:
    """Each part with its place in the block."""
    start = 0
    for part in parts:
        yield block[start : start + len(part)], part
        start += len(part)


def _check_room(store: StoreClient, wanted: Mapping[Item, Parts]) -> None:
    nbytes, limit = sum(map(_length, wanted.values())), store.limits.reserved_bytes
    if nbytes > limit:
        raise InvalidRequest(
            f"{len(wanted)} blocks of {nbytes} bytes in one batch, and the daemon lets one client reserve "
            f"{limit}: give it more memory, or a larger client_reserved_fraction"
        )


def _left_s(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())


def _waits(store: StoreClient, left_s: float) -> tuple[float, float]:
    """How long the daemon may wait before it answers, and how long the bytes may take over TCP after that.

    They have half of the time or more, for other bytes may be ahead of them.
    """
    wait_s = min(left_s if store.shares_memory else left_s / 2, _PATIENCE_S)
    return wait_s, left_s - wait_s
