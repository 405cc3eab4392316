"""LMCache's side of the L2 adapter for tests: its keys, its buffers, its factory, and its way to wait.

Everything here is LMCache's own but the contents, which follow from the key, so that a wrong byte is seen.
"""

import argparse
import hashlib
import json
import os
import select
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Self, TypeVar

import numpy as np

os.environ.setdefault("LMCACHE_TRACK_USAGE", "false")
# LMCache's logger, as it is made at import.
IGNORED: Final = "ignore:`LoggingHandler` in `opentelemetry-sdk`:DeprecationWarning"

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "`LoggingHandler` in `opentelemetry-sdk`", DeprecationWarning)
    import torch
    from lmcache.v1.distributed.api import ObjectKey
    from lmcache.v1.distributed.config import EvictionConfig as EvictionConfig
    from lmcache.v1.distributed.internal_api import L2AdapterListener, L2StoreResult
    from lmcache.v1.distributed.l2_adapters import create_l2_adapter

    # Named first, it is found without trying all others.
    from lmcache.v1.distributed.l2_adapters import plugin_l2_adapter as _first  # noqa: F401
    from lmcache.v1.distributed.l2_adapters.config import parse_args_to_l2_adapters_config
    from lmcache.v1.distributed.quota_manager import QuotaManager as QuotaManager
    from lmcache.v1.distributed.storage_controllers import eviction_controller
    from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj
    from lmcache.v1.multiprocess.cache_control.errors import Unavailable as Unavailable
    from lmcache.v1.platform import consume_fd

    from connectors.lmcache import KVStoreL2Adapter

L2AdapterEvictionState = eviction_controller.L2AdapterEvictionState
L2EvictionController = eviction_controller.L2EvictionController
# What tests say of their bytes, unless they say something else.
BYTES_ARE: Final = {"dtype": "uint8", "layout": "any"}
KIB: Final = 1 << 10
MIB: Final = 1 << 20
# What a buffer has before it is loaded.
UNTOUCHED: Final = 0xA5
R = TypeVar("R")


def rank(number: int = 0, world: int = 1) -> int:
    """LMCache's `kv_rank`."""
    value: int = ObjectKey.ComputeKVRank(world, number, world, number)
    return value


def key(
    index: int,
    *,
    model: str = "meta/Llama",
    kv_rank: int | None = None,
    group: int = 0,
    salt: str = "",
) -> ObjectKey:
    """The key of chunk `index`; the hash has LMCache's length."""
    digest = hashlib.blake2b(b"%d" % index, digest_size=32).digest()
    return ObjectKey(digest, model, rank() if kv_rank is None else kv_rank, group, salt)


def keys(count: int, start: int = 0, **fields: Any) -> list[ObjectKey]:
    """The keys of some chunks."""
    return [key(index, **fields) for index in range(start, start + count)]


def content(key: ObjectKey, nbytes: int, version: int = 0) -> bytes:
    """An object's bytes: every key's are others, at every place and of every length."""
    seed = hashlib.blake2b(repr((key, nbytes, version)).encode(), digest_size=8).digest()
    return np.random.Generator(np.random.SFC64(int.from_bytes(seed))).bytes(nbytes)


def memory(nbytes: int, data: bytes | None = None) -> TensorMemoryObj:
    """A buffer of LMCache, untouched or with these bytes."""
    # By numpy, since torch would wake its threads for it, which takes 5 ms for 1 MiB on busy cores.
    filled = np.full(nbytes, UNTOUCHED, np.uint8) if data is None else np.frombuffer(data, np.uint8).copy()
    raw = torch.from_numpy(filled)
    metadata = MemoryObjMetadata(
        shape=raw.shape,
        dtype=raw.dtype,
        address=raw.data_ptr(),
        phy_size=nbytes,
        fmt=MemoryFormat.KV_2LTD,
        ref_count=1,
    )
    return TensorMemoryObj(raw, metadata, parent_allocator=None)


def bytes_in(buffer: TensorMemoryObj) -> bytes:
    """What a buffer has now."""
    data: bytes = buffer.raw_data.numpy().tobytes()
    return data


def lengths_of(nbytes: int | Sequence[int], count: int) -> list[int]:
    """One length for each."""
    return [nbytes] * count if isinstance(nbytes, int) else list(nbytes)


def adapter_for(address: str, **parameters: Any) -> KVStoreL2Adapter:
    """An adapter, made as LMCache's server makes it from its command line."""
    spec = {
        "type": "plugin",
        "module_path": "connectors.lmcache",
        "class_name": "KVStoreL2Adapter",
        "adapter_params": {"address": address, **BYTES_ARE, **parameters},
    }
    arguments = argparse.Namespace(l2_adapter=[json.dumps(spec)])
    (config,) = parse_args_to_l2_adapters_config(arguments).adapters
    adapter = create_l2_adapter(config)
    assert isinstance(adapter, KVStoreL2Adapter)
    return adapter


class Heard(L2AdapterListener):
    """What an adapter has told its listeners."""

    def __init__(self) -> None:
        self.stored: dict[ObjectKey, int] = {}
        self.accessed: list[ObjectKey] = []
        self.deleted: list[ObjectKey] = []

    def on_l2_keys_stored(self, keys: list[ObjectKey], sizes: list[int]) -> None:
        self.stored |= dict(zip(keys, sizes, strict=True))

    def on_l2_keys_accessed(self, keys: list[ObjectKey]) -> None:
        self.accessed += keys

    def on_l2_keys_deleted(self, keys: list[ObjectKey]) -> None:
        self.deleted += keys


class Controllers:
    """What LMCache's controllers do with one adapter: submit, wait for the descriptor, take the result.

    From any number of threads. Every wait has a deadline.
    """

    def __init__(self, address: str, *, patience_s: float = 20.0, **parameters: Any) -> None:
        self.adapter = adapter_for(address, **parameters)
        self._patience_s = patience_s
        self._stored: dict[int, L2StoreResult] = {}
        self._lock = threading.Lock()

    def store(self, keys: list[ObjectKey], nbytes: int | Sequence[int], version: int = 0) -> L2StoreResult:
        """Store objects with their contents, and wait."""
        return self.stored(self.submit_store(keys, nbytes, version))

    def submit_store(self, keys: list[ObjectKey], nbytes: int | Sequence[int], version: int = 0) -> int:
        """Begin to store objects with their contents."""
        sizes = lengths_of(nbytes, len(keys))
        objects = [memory(size, content(each, size, version)) for each, size in zip(keys, sizes, strict=True)]
        return self.adapter.submit_store_task(keys, objects)

    def stored(self, task: int) -> L2StoreResult:
        """Wait for a store."""

        def taken() -> L2StoreResult | None:
            with self._lock:
                self._stored |= self.adapter.pop_completed_store_tasks()
                return self._stored.pop(task, None)

        return self._when(taken, self.adapter.get_store_event_fd())

    def lookup(self, keys: list[ObjectKey]) -> list[bool]:
        """Look up and lock, and wait: for each key whether it was found."""
        return self.found(self.adapter.submit_lookup_and_lock_task(keys, {}), len(keys))

    def found(self, task: int, count: int) -> list[bool]:
        """Wait for a lookup."""
        take = self.adapter.query_lookup_and_lock_result
        bitmap = self._when(lambda: take(task), self.adapter.get_lookup_and_lock_event_fd())
        return [bitmap.test(index) for index in range(count)]

    def unlock(self, keys: list[ObjectKey]) -> None:
        """Undo one lookup of each."""
        self.adapter.submit_unlock(keys)

    def load(self, keys: list[ObjectKey], nbytes: int | Sequence[int]) -> list[bytes | None]:
        """Load, and wait: each object's bytes, None for those that are not loaded."""
        loaded, buffers = self.load_into(keys, nbytes)
        return [bytes_in(each) if is_in else None for each, is_in in zip(buffers, loaded, strict=True)]

    def load_into(
        self, keys: list[ObjectKey], nbytes: int | Sequence[int]
    ) -> tuple[list[bool], list[TensorMemoryObj]]:
        """Load into fresh buffers, and wait: which were loaded, and all the buffers."""
        buffers = [memory(size) for size in lengths_of(nbytes, len(keys))]
        return self.loaded(self.adapter.submit_load_task(keys, buffers), len(keys)), buffers

    def loaded(self, task: int, count: int) -> list[bool]:
        """Wait for a load."""
        take = self.adapter.query_load_result
        bitmap = self._when(lambda: take(task), self.adapter.get_load_event_fd())
        return [bitmap.test(index) for index in range(count)]

    def fetch(self, keys: list[ObjectKey], nbytes: int | Sequence[int]) -> list[bytes | None]:
        """Look up, load what was found, unlock it: as a prefetch of LMCache."""
        found = self.lookup(keys)
        sizes = lengths_of(nbytes, len(keys))
        locked = [each for each, here in zip(keys, found, strict=True) if here]
        there = self.load(locked, [size for size, here in zip(sizes, found, strict=True) if here])
        self.unlock(locked)
        results = iter(there)
        return [next(results) if here else None for here in found]

    def listed(self, **options: Any) -> dict[ObjectKey, int]:
        """All pages of a listing; no key may come twice."""
        entries = []
        page = self.adapter.list_l2_keys(**options)
        entries += page.entries
        while page.next_page_token is not None:
            page = self.adapter.list_l2_keys(cursor=page.next_page_token, **options)
            entries += page.entries
        found = {entry.key.to_object_key(): entry.size_bytes for entry in entries}
        assert len(found) == len(entries)
        return found

    def close(self) -> None:
        """Close the adapter."""
        self.adapter.close()

    def _when(self, take: Callable[[], R | None], fd: int) -> R:
        ready = select.poll()
        ready.register(fd, select.POLLIN)
        deadline = time.monotonic() + self._patience_s
        while (result := take()) is None:
            assert time.monotonic() < deadline, f"no result within {self._patience_s} s"
            if ready.poll(5):  # where several threads wait, another one may take the signal
                consume_fd(fd)
        return result

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def contents(keys: Sequence[ObjectKey], nbytes: int | Sequence[int], version: int = 0) -> list[bytes]:
    """What `load` should bring."""
    sizes = lengths_of(nbytes, len(keys))
    return [content(each, size, version) for each, size in zip(keys, sizes, strict=True)]


def wrong(
    keys: Sequence[ObjectKey], got: Sequence[bytes | None], nbytes: int | Sequence[int]
) -> list[ObjectKey]:
    """The keys of what was loaded with other bytes than were stored; what was not loaded is not wrong."""
    expected = contents(keys, nbytes)
    return [each for each, a, b in zip(keys, got, expected, strict=True) if a is not None and a != b]


@contextmanager
def threads_of(*bodies: Callable[[], None]) -> Iterator[None]:
    """Run each in a thread; what any of them raises is raised at the end."""
    errors: list[BaseException] = []

    def guarded(body: Callable[[], None]) -> None:
        try:
            body()
        except BaseException as error:  # noqa: BLE001  it is raised below
            errors.append(error)

    running = [threading.Thread(target=guarded, args=(body,)) for body in bodies]
    for thread in running:
        thread.start()
    try:
        yield
    finally:
        for thread in running:
            thread.join()
    for error in errors:
        raise error
