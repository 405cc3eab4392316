"""LMCache's server (MP mode) on this store: an L2 adapter, loaded as a plugin.

    lmcache server ... --l2-adapter '{"type": "plugin", "module_path": "connectors.lmcache",
        "class_name": "KVStoreL2Adapter", "adapter_params": {"address": "unix:/run/kvstore/node.sock",
        "dtype": "bfloat16", "layout": "LNHC"}}'

The interface is that of LMCache 0.5.6, v1/distributed/l2_adapters/base.py: tasks are submitted, end some time
later, and are asked about. Here every task ends within its deadline; a task that the daemon does not serve is
a miss, or a store that failed. Bytes are copied once, between LMCache's buffers and the daemon's memory.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from types import MappingProxyType
from typing import Any, Final, TypeVar

from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed.api import KeyListPage, MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.internal_api import L1MemoryDesc, L2StoreResult
from lmcache.v1.distributed.l2_adapters.base import AdapterUsage, L2AdapterInterface
from lmcache.v1.memory_management import MemoryObj
from lmcache.v1.multiprocess.cache_control.errors import Unavailable
from lmcache.v1.platform import create_event_notifier

from connectors.batches import Batches
from connectors.copying import Pairs, bytes_of
from connectors.daemon import Daemon
from connectors.listing import key_page
from connectors.locks import Locks
from connectors.namespaces import Namespaces
from connectors.parameters import Parameters
from connectors.tasks import Tasks
from kvstore.block import Namespace
from kvstore.client import KEYS_MAX, EachLease, Item, StoreClient
from kvstore.errors import InvalidRequest, KVStoreError, TierError
from kvstore.hashing import lmcache_kv_rank, lmcache_namespace, lmcache_object_fields, lmcache_seed

logger = logging.getLogger(__name__)

R = TypeVar("R")
# A part of the name that LMCache's thread has by Python's default.
_EVICTION_THREAD: Final = "eviction_loop"
# Totals since the adapter was made, in objects unless they are bytes.
_COUNTED: Final = (
    *("stored", "stored_bytes", "failed_stores", "looked_up", "found"),
    *("loaded", "loaded_bytes", "failed_loads"),
)


class KVStoreL2Adapter(L2AdapterInterface):  # type: ignore[misc]
    """Objects of LMCache as blocks of the daemon: `ObjectKey`s by `hashing.lmcache_namespace` and their hash.

    What a lookup finds in the daemon's memory is pinned until it is unlocked; what it finds on disk is not,
    and is loaded when it is asked for. The daemon makes room by itself, so LMCache's eviction has nothing to
    do here. Objects that the daemon evicts are not announced to LMCache: its lookups tell.

    Raises:
        InvalidRequest: a parameter is unknown or out of range.
    """

    def __init__(self, params: dict[str, Any], l1_memory_desc: L1MemoryDesc | None = None) -> None:
        super().__init__()
        self._parameters = parameters = Parameters.of(params)
        if not parameters.dtype or not parameters.layout:
            raise InvalidRequest(
                f"dtype is {parameters.dtype!r} and layout {parameters.layout!r}; name what the bytes are, "
                "say bfloat16 and LNHC: LMCache's keys do not, and others would load them as theirs"
            )
        make = partial(
            lmcache_namespace,
            block_tokens=parameters.block_tokens,
            dtype=parameters.dtype,
            layout=parameters.layout,
            algorithm=parameters.hash_algorithm,
            seed=lmcache_seed(),
        )
        like = make("any", lmcache_kv_rank(0, 1))

        def ours(there: Namespace) -> bool:
            fields = there.block_tokens, there.dtype, there.layout, there.scheme
            if fields != (like.block_tokens, like.dtype, like.layout, like.scheme):
                return False
            try:
                ObjectKey(b"any", *lmcache_object_fields(there))
            except ValueError:  # it only looks like one of LMCache's
                return False
            return True

        self._scheme = like.scheme
        self._counters = Counter(dict.fromkeys(_COUNTED, 0))
        self._counting = threading.Lock()
        self._pinning = threading.Lock()  # of two lookups, the second must know what the first has pinned
        self._usage = AdapterUsage(0, 0)
        self._closed = threading.Event()
        with ExitStack() as opened:  # which end in the other order: those that use others first
            self._daemon = Daemon(parameters.address, timeout_s=parameters.silence_s, token=parameters.secret)
            opened.callback(self._daemon.close)
            self._namespaces = Namespaces(self._daemon, make, ours)
            opened.callback(self._namespaces.close)
            self._locks: Locks[ObjectKey] = Locks(parameters.lock_age_max_s)
            opened.callback(self._locks.clear)
            self._batches = Batches(self._daemon, parameters.threads)
            opened.callback(self._batches.close)
            self._stores: Tasks[L2StoreResult] = Tasks("store", parameters.threads, create_event_notifier())
            opened.callback(self._stores.close)
            self._lookups: Tasks[Bitmap] = Tasks("lookup", parameters.threads, create_event_notifier())
            opened.callback(self._lookups.close)
            self._loads: Tasks[Bitmap] = Tasks("load", parameters.threads, create_event_notifier())
            opened.callback(self._loads.close)
            threading.Thread(target=self._expire_locks, name="kvstore-locks", daemon=True).start()
            self._opened = opened.pop_all()

    def get_store_event_fd(self) -> int:
        """See LMCache's L2AdapterInterface, as for all methods here."""
        return self._stores.fileno()

    def get_lookup_and_lock_event_fd(self) -> int:
        return self._lookups.fileno()

    def get_load_event_fd(self) -> int:
        return self._loads.fileno()

    # Stores.

    def submit_store_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        work = partial(self._store, keys, objects, self._deadline(self._parameters.transfer_timeout_s))
        return self._submit(self._stores, work, L2StoreResult(False, 0))

    def pop_completed_store_tasks(self) -> dict[int, L2StoreResult]:
        return self._stores.take_all()

    def _store(self, keys: list[ObjectKey], objects: list[MemoryObj], deadline: float) -> L2StoreResult:
        sources = [bytes_of(each.byte_array) for each in objects]
        try:
            nbytes = self._batches.store(self._items(keys), [[source] for source in sources], deadline)
        except KVStoreError:
            self._count(failed_stores=len(keys))
            raise
        self._count(stored=len(keys), stored_bytes=nbytes)
        self._notify_keys_stored(keys, list(map(len, sources)))
        return L2StoreResult(True, nbytes)

    # Lookups and locks.

    def submit_lookup_and_lock_task(
        self, keys: list[ObjectKey], group_layout_descs: dict[int, MemoryLayoutDesc]
    ) -> int:
        work = partial(self._lookup, keys, self._deadline(self._parameters.timeout_s))
        return self._submit(self._lookups, work, Bitmap(len(keys)))

    def query_lookup_and_lock_result(self, task_id: int) -> Bitmap | None:
        return self._lookups.take(task_id)

    def submit_unlock(self, keys: list[ObjectKey]) -> None:
        self._locks.unlock(keys)

    def _lookup(self, keys: list[ObjectKey], deadline: float) -> Bitmap:
        bitmap = Bitmap(len(keys))
        items = self._items(keys)
        for start in range(0, len(keys), KEYS_MAX):
            if time.monotonic() > deadline:
                break
            try:
                part = slice(start, start + KEYS_MAX)
                found = self._lock_found(keys[part], items[part], deadline)
            except KVStoreError as error:  # what was found before is locked, and counts
                self._daemon.complain(error)
                break
            for index in found:
                bitmap.set(start + index)
        self._count(looked_up=len(keys), found=bitmap.popcount())
        return bitmap

    def _lock_found(self, keys: Sequence[ObjectKey], items: Sequence[Item], deadline: float) -> list[int]:
        """Lock what is here; the indices of it."""
        with self._daemon.asking() as store:
            if not self._pinning.acquire(timeout=max(0.0, deadline - time.monotonic())):
                return []
            try:
                removals = self._locks.removals
                lease, pinned = self._pin(store, items, deadline)
                self._locks.add(lease, {keys[index]: view for index, view in pinned.items()}, (), removals)
            finally:
                self._pinning.release()
            others = [index for index in range(len(keys)) if index not in pinned]
            if not others or time.monotonic() > deadline:
                return list(pinned)
            try:
                wait_s = max(0.0, min(self._parameters.ask_s, deadline - time.monotonic()))
                here = store.hit_each([items[index] for index in others], wait_s=wait_s)
            except KVStoreError:
                self._locks.unlock([keys[index] for index in pinned])
                raise
        unpinned = [index for index, found in zip(others, here, strict=True) if found]
        self._locks.add(None, {}, [keys[index] for index in unpinned])
        return [*pinned, *unpinned]

    def _pin(
        self, store: StoreClient, items: Sequence[Item], deadline: float
    ) -> tuple[EachLease | None, dict[int, memoryview]]:
        """Pin what is in the arena, up to half of what we may pin; the other half is for loads from below.

        Over TCP nothing can be pinned, and its bytes would come at once.
        """
        if not store.shares_memory:
            return None, {}
        room_bytes = store.limits.pinned_bytes // 2 - self._locks.pinned_bytes
        lease = store.acquire_each(items)
        pinned = {index: view for index, view in enumerate(lease.views) if view is not None}
        fitting = []
        for index, view in pinned.items():
            room_bytes -= len(view)
            if room_bytes < 0:
                break
            fitting.append(index)
        if len(fitting) == len(pinned):
            return lease, pinned
        lease.end_quietly()
        if not fitting or time.monotonic() > deadline:
            return None, {}
        lease = store.acquire_each([items[index] for index in fitting])
        views = zip(fitting, lease.views, strict=True)
        return lease, {index: view for index, view in views if view is not None}

    # Loads.

    def submit_load_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        work = partial(self._load, keys, objects, self._deadline(self._parameters.transfer_timeout_s))
        return self._submit(self._loads, work, Bitmap(len(keys)))

    def query_load_result(self, task_id: int) -> Bitmap | None:
        return self._loads.take(task_id)

    def _load(self, keys: list[ObjectKey], objects: list[MemoryObj], deadline: float) -> Bitmap:
        targets = [bytes_of(each.byte_array) for each in objects]

        def place(index: int, block: memoryview) -> Pairs | None:
            return [(targets[index], block)] if len(block) == len(targets[index]) else None

        with self._locks.reading(keys) as views:
            pinned = {index: views[key] for index, key in enumerate(keys) if key in views}
            loaded = self._batches.load(self._items(keys), place, deadline, pinned)
        bitmap = Bitmap(len(keys))
        here = [index for index, is_loaded in enumerate(loaded) if is_loaded]
        for index in here:
            bitmap.set(index)
        loaded_bytes = sum(len(targets[index]) for index in here)
        self._count(loaded=len(here), loaded_bytes=loaded_bytes, failed_loads=len(keys) - len(here))
        self._notify_keys_accessed([keys[index] for index in here])
        return bitmap

    # Everything else.

    def delete(self, keys: list[ObjectKey]) -> None:
        """Hide these objects now, in all tiers; what is locked is freed when it is unlocked.

        Raises:
            KVStoreError: the daemon is away. LMCache's eviction, which would end with it for good, is told
                nothing: it finds the same objects again in its next round.
        """
        try:
            self._delete(keys)
        except KVStoreError as error:
            if _EVICTION_THREAD not in threading.current_thread().name:
                raise
            self._daemon.complain(error)

    def _delete(self, keys: list[ObjectKey]) -> None:
        items = self._items(keys)
        for start in range(0, len(items), KEYS_MAX):
            part = items[start : start + KEYS_MAX]
            by_namespace: dict[Namespace, list[bytes]] = {}
            for namespace, key in part:
                by_namespace.setdefault(namespace, []).append(key)
            with self._daemon.asking() as store:
                lengths = store.length_each(part)
                try:
                    for namespace, names in by_namespace.items():
                        try:
                            store.remove(namespace, names)
                        except TierError as error:  # hidden all the same
                            logger.warning("%s", error)
                finally:
                    self._locks.hide(keys[start : start + KEYS_MAX])
            gone = [keys[start + index] for index, length in enumerate(lengths) if length]
            # The lengths are for sums that `get_usage` does not use, and that know what this process stored.
            self._notify_keys_deleted(gone, [0] * len(gone))

    def list_l2_keys(
        self, model_name: str | None = None, page_size: int = 500, cursor: str | None = None
    ) -> KeyListPage:
        if page_size <= 0:
            raise ValueError(f"page_size is {page_size}; give 1 or more")
        try:
            with self._daemon.asking() as store:
                return key_page(store, self._namespaces, model_name, page_size, cursor)
        except KVStoreError as error:  # what LMCache's HTTP has an answer for
            raise Unavailable(str(error)) from error

    def get_usage(self) -> AdapterUsage:
        """The bytes in the daemon's largest medium, in all and of each salt.

        While the daemon is away only the sum is told, as last known: nobody is to be evicted then.
        """
        by_salt: dict[str, int] = {}
        capacities: dict[str, int] = {}
        try:
            with self._daemon.asking() as store:
                for tier in store.statistics().tiers:
                    capacities[tier.medium] = capacities.get(tier.medium, 0) + tier.capacity_bytes
                for use in self._namespaces.used(store):
                    salt = use.namespace.salt
                    by_salt[salt] = by_salt.get(salt, 0) + use.block_bytes
        except KVStoreError:
            return self._usage
        nbytes, capacity_bytes = sum(by_salt.values()), max(capacities.values())
        self._usage = AdapterUsage(nbytes, capacity_bytes)
        return AdapterUsage(nbytes, capacity_bytes, MappingProxyType(by_salt))

    def report_status(self) -> dict[str, Any]:
        away = self._daemon.away
        return {
            "is_healthy": away is None and not self._closed.is_set(),
            "type": type(self).__name__,
            "address": self._parameters.address,
            "away": away,
            "scheme": self._scheme,
            **self._counters,
            **asdict(self._locks.statistics()),
        }

    def close(self) -> None:
        """End once the tasks under way have: until then they use LMCache's buffers."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._batches.stop()
        self._opened.close()

    # Helpers.

    def _submit(self, tasks: Tasks[R], work: Callable[[], R], failed: R) -> int:
        """A task that ends with `failed` where the daemon does not serve it."""

        def run() -> R:
            if self._closed.is_set():
                return failed
            try:
                return work()
            except KVStoreError as error:
                self._daemon.complain(error)
                return failed

        return tasks.submit(run, failed)

    def _count(self, **added: int) -> None:
        with self._counting:
            self._counters.update(added)

    def _expire_locks(self) -> None:
        """The thread that ends forgotten locks though nothing more is asked."""
        while not self._closed.wait(self._parameters.lock_age_max_s / 4):
            self._locks.expire()

    def _deadline(self, timeout_s: float) -> float:
        """Until when to begin calls: the last may stay unanswered."""
        return time.monotonic() + timeout_s - self._parameters.silence_s

    def _items(self, keys: Sequence[ObjectKey]) -> list[Item]:
        of = self._namespaces.of
        return [
            (of(key.model_name, key.kv_rank, key.object_group_id, key.cache_salt), key.chunk_hash)
            for key in keys
        ]
