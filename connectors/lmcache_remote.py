"""LMCache inside the engine (LMCacheConnectorV1) on this store: a remote connector, loaded as a plugin.

    remote_storage_plugins: ["kvstore"]
    extra_config:
      remote_storage_plugin.kvstore.module_path: connectors.lmcache_remote
      remote_storage_plugin.kvstore.class_name: KVStoreRemoteConnector
      kvstore.address: unix:/run/kvstore/node.sock

The interface is that of LMCache 0.5.6, v1/storage_backend/connector/base_connector.py. A block is a chunk's
bytes, behind LMCache's description of them unless `save_chunk_meta` is off. Nothing here raises because the
daemon is away: then nothing is there, and what is put is dropped.
"""

import asyncio
import math
import struct
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import takewhile
from operator import truth
from typing import Any, Final, TypeVar

from lmcache.utils import TORCH_DTYPE_TO_STR_DTYPE, CacheEngineKey
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.memory_management import MemoryFormat, MemoryObj
from lmcache.v1.protocol import RemoteMetadata
from lmcache.v1.storage_backend.connector.base_connector import RemoteConnector
from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend

from connectors import pools
from connectors.batches import Batches
from connectors.copying import Pairs, bytes_of
from connectors.daemon import Daemon
from connectors.namespaces import Namespaces
from connectors.parameters import Parameters
from kvstore.block import Namespace
from kvstore.client import KEYS_MAX, Item
from kvstore.errors import InvalidRequest, KVStoreError
from kvstore.hashing import (
    lmcache_engine_key,
    lmcache_engine_namespace,
    lmcache_engine_string,
    lmcache_seed,
)

R = TypeVar("R")
_PREFIX: Final = "kvstore."
# Parameters that LMCache's own configuration or keys hold, or that have no use here.
_OTHERS: Final = frozenset(("block_tokens", "dtype", "hash_algorithm", "lock_age_max_s"))
# Questions wait for no transfer.
_QUESTION_THREADS: Final = 2


class KVStoreRemoteConnector(RemoteConnector):  # type: ignore[misc]
    """Chunks of LMCache as blocks of the daemon, in namespaces by `hashing.lmcache_engine_namespace`.

    `extra_config` may hold any of `Parameters` behind "kvstore."; the chunk size and the hash are LMCache's
    own. Coroutines run on `loop`, and what they wait for in threads.

    Raises:
        InvalidRequest: a parameter is unknown or out of range, or so many threads cannot be had.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, local_cpu_backend: LocalCPUBackend, config: LMCacheEngineConfig
    ) -> None:
        super().__init__(config, local_cpu_backend.metadata)
        given = {
            name.removeprefix(_PREFIX): value
            for name, value in (config.extra_config or {}).items()
            if name.startswith(_PREFIX)
        }
        for name in given.keys() & _OTHERS:
            raise InvalidRequest(f"{_PREFIX}{name} is {given[name]!r}; leave it out: LMCache says what it is")
        hashed = {"block_tokens": config.chunk_size, "hash_algorithm": config.pre_caching_hash_algorithm}
        self._parameters = parameters = Parameters.of({**given, **hashed})
        self._memory = local_cpu_backend
        # Blocks with and without a description are not interchangeable.
        layout = f"{parameters.layout}+meta" if self.save_chunk_meta else parameters.layout
        seed = lmcache_seed()

        def make(model: str, world_size: int, worker_id: int, dtype: str, tags: Any) -> Namespace:
            return lmcache_engine_namespace(
                model,
                world_size,
                worker_id,
                dtype,
                tags,
                block_tokens=parameters.block_tokens,
                layout=layout,
                algorithm=parameters.hash_algorithm,
                seed=seed,
            )

        scheme = make("any", 1, 0, "", ()).scheme

        def ours(there: Namespace) -> bool:
            fields = there.block_tokens, there.layout, there.scheme
            return fields == (parameters.block_tokens, layout, scheme)

        self._closed = False
        with ExitStack() as opened:  # which end in the other order: those that use others first
            self._daemon = Daemon(parameters.address, timeout_s=parameters.silence_s, token=parameters.secret)
            opened.callback(self._daemon.close)
            self._namespaces = Namespaces(self._daemon, make, ours)
            opened.callback(self._namespaces.close)
            self._batches = Batches(self._daemon, parameters.threads)
            opened.callback(self._batches.close)
            self._puts = pools.start("put", parameters.threads)
            opened.callback(self._puts.shutdown)
            self._gets = pools.start("get", parameters.threads)
            opened.callback(self._gets.shutdown)
            self._questions = pools.start("question", _QUESTION_THREADS)
            opened.callback(self._questions.shutdown)
            self._opened = opened.pop_all()

    # Questions.

    def exists_sync(self, key: CacheEngineKey) -> bool:
        """See LMCache's RemoteConnector, as for all methods here."""
        return self.batched_contains([key]) == 1

    async def exists(self, key: CacheEngineKey) -> bool:
        return await self._in_thread(lambda: self.exists_sync(key), False)

    def support_batched_contains(self) -> bool:
        return True

    def batched_contains(self, keys: list[CacheEngineKey]) -> int:
        """How many leading keys are here, in whatever tier; 0 while the daemon is away."""
        found = 0
        try:
            items = self._items(keys)
            for start in range(0, len(items), KEYS_MAX):
                part = items[start : start + KEYS_MAX]
                with self._daemon.asking() as store:
                    here = store.hit_each(part, wait_s=self._parameters.ask_s)
                    leading = sum(takewhile(truth, here))
                found += leading
                if leading < len(part):
                    break
        except KVStoreError as error:
            self._daemon.complain(error)
        return found

    async def batched_async_contains(
        self, lookup_id: str, keys: list[CacheEngineKey], pin: bool = False
    ) -> int:
        return await self._in_thread(lambda: self.batched_contains(keys), 0)

    # Puts.

    async def put(self, key: CacheEngineKey, memory_obj: MemoryObj) -> None:
        await self.batched_put([key], [memory_obj])

    def support_batched_put(self) -> bool:
        return True

    async def batched_put(self, keys: list[CacheEngineKey], memory_objs: list[MemoryObj]) -> None:
        """Store all of these chunks, or none."""
        if self._closed:
            return
        deadline = self._deadline()
        for each in memory_objs:
            each.ref_count_up()  # ours: LMCache drops its own when it gives up waiting

        def work() -> None:
            try:
                parts = [self._parts(each) for each in memory_objs]
                self._batches.store(self._items(keys), parts, deadline)
            except KVStoreError as error:
                self._daemon.complain(error)

        def done(_: "Future[None]") -> None:
            for each in memory_objs:
                each.ref_count_down()

        future = self._puts.submit(work)
        future.add_done_callback(done)
        await asyncio.wrap_future(future)

    def _parts(self, memory_obj: MemoryObj) -> list[memoryview]:
        data = bytes_of(memory_obj.byte_array)
        if not self.save_chunk_meta:
            return [data]
        about = RemoteMetadata(
            len(data), memory_obj.get_shapes(), memory_obj.get_dtypes(), memory_obj.get_memory_format()
        )
        return [memoryview(about.serialize()), data]

    # Gets.

    async def get(self, key: CacheEngineKey) -> MemoryObj | None:
        return (await self.batched_get([key]))[0]

    def support_batched_get(self) -> bool:
        return True

    async def batched_get(self, keys: list[CacheEngineKey]) -> list[MemoryObj | None]:
        nothing: list[MemoryObj | None] = [None] * len(keys)
        deadline = self._deadline()
        return await self._in_thread(lambda: self._get(keys, deadline), nothing, self._gets, _give_up)

    async def batched_get_non_blocking(self, lookup_id: str, keys: list[CacheEngineKey]) -> list[MemoryObj]:
        """The leading chunks, up to the first that is missing."""
        found = await self.batched_get(keys)
        leading = list(takewhile(lambda each: each is not None, found))
        _give_up(found[len(leading) :])
        return leading

    def _get(self, keys: Sequence[CacheEngineKey], deadline: float) -> list[MemoryObj | None]:
        chunks: list[MemoryObj | None] = [None] * len(keys)

        def place(index: int, block: memoryview) -> Pairs | None:
            chunk, data = self._allocate(block)
            if chunk is None:
                return None
            chunks[index] = chunk
            return [(bytes_of(chunk.byte_array)[: len(data)], data)]

        try:
            loaded = self._batches.load(self._items(keys), place, deadline)
        except BaseException:
            _give_up(chunks)
            raise
        for index, is_loaded in enumerate(loaded):
            if not is_loaded:
                _give_up(chunks[index : index + 1])
                chunks[index] = None
        return chunks

    def _allocate(self, block: memoryview) -> tuple[MemoryObj | None, memoryview]:
        """LMCache's memory for a block's data, of its length; None when there is none, or it is no chunk."""
        if not self.save_chunk_meta:
            chunk = self._room(self.meta_shapes, self.meta_dtypes, self.meta_fmt)
            return (None if chunk is None else self._shortened(chunk, len(block))), block
        data = block[self.remote_metadata_bytes :]
        try:
            about = RemoteMetadata.deserialize(bytes(block[: self.remote_metadata_bytes]))
        except (struct.error, KeyError, ValueError):
            return None, data
        if _described_bytes(about) != len(data):
            return None, data
        return self._room(about.shapes, about.dtypes, about.fmt), data

    def _room(self, shapes: list[Any], dtypes: list[Any], fmt: Any) -> MemoryObj | None:
        """LMCache's memory, as far as it has some now: it would wait for more without end."""
        return self._memory.allocate(shapes, dtypes, fmt, busy_loop=False)

    def _shortened(self, chunk: MemoryObj, nbytes: int) -> MemoryObj | None:
        try:
            return self.reshape_partial_chunk(chunk, nbytes)
        except ValueError:  # another model's, by its length
            chunk.ref_count_down()
            return None

    # Everything else.

    def support_ping(self) -> bool:
        return True

    async def ping(self) -> int:
        """0 while the daemon answers, 1 while it is away."""

        def ask() -> int:
            try:
                with self._daemon.asking() as store:
                    store.statistics()
            except KVStoreError:
                return 1
            return 0

        return await self._in_thread(ask, 1)

    def remove_sync(self, key: CacheEngineKey) -> bool:
        try:
            [(namespace, name)] = self._items([key])
            with self._daemon.asking() as store:
                return store.remove(namespace, [name]) == 1
        except KVStoreError as error:
            self._daemon.complain(error)
            return False

    async def close(self) -> None:
        """End once the calls under way have: until then they use LMCache's memory. Then nothing is there."""
        if not self._closed:
            self._closed = True
            await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._batches.stop()
        self._opened.close()

    # Helpers.

    async def _in_thread(
        self,
        work: Callable[[], R],
        nothing: R,
        threads: ThreadPoolExecutor | None = None,
        abandon: Callable[[R], None] = lambda _: None,
    ) -> R:
        """What `work` returns, given to `abandon` when nobody waits any more; `nothing` once closed."""
        if self._closed:
            return nothing
        future = (threads or self._questions).submit(work)
        try:
            return await asyncio.shield(asyncio.wrap_future(future))
        except asyncio.CancelledError:
            future.add_done_callback(lambda done: None if done.exception() else abandon(done.result()))
            raise

    def _deadline(self) -> float:
        """Until when to begin calls: the last may stay unanswered."""
        return time.monotonic() + self._parameters.transfer_timeout_s - self._parameters.silence_s

    def _items(self, keys: Sequence[CacheEngineKey]) -> list[Item]:
        of = self._namespaces.of
        return [
            (
                of(
                    key.model_name,
                    key.world_size,
                    key.worker_id,
                    TORCH_DTYPE_TO_STR_DTYPE[key.dtype],
                    key.tags or (),
                ),
                lmcache_engine_key(key.chunk_hash, getattr(key, "layer_id", None)),
            )
            for key in keys
        ]

    # Last, since from here on `list` is a method.

    def _names(self) -> list[str]:
        names = []
        try:
            with self._daemon.asking() as store:
                for use in self._namespaces.used(store):
                    cursor: int | None = 0
                    while cursor is not None:
                        page = store.list(use.namespace, cursor)
                        names += [lmcache_engine_string(use.namespace, key) for key in page.keys]
                        cursor = page.cursor
        except KVStoreError as error:
            self._daemon.complain(error)
        return names

    async def list(self) -> list[str]:
        """The names of all chunks of this configuration, of all models and workers."""
        return await self._in_thread(self._names, [])


def _described_bytes(about: RemoteMetadata) -> int | None:
    """How long a chunk of this description is; None if it describes none."""
    if about.fmt in (MemoryFormat.BINARY, MemoryFormat.BINARY_BUFFER):
        return int(about.shapes[0][0])
    nbytes = 0
    for shape, dtype in zip(about.shapes, about.dtypes, strict=True):
        if dtype is None or min(shape) <= 0:
            return None
        nbytes += math.prod(shape) * dtype.itemsize
    return nbytes


def _give_up(chunks: Sequence[MemoryObj | None]) -> None:
    """Let go of memory that nobody will ask for."""
    for chunk in chunks:
        if chunk is not None:
            chunk.ref_count_down()
