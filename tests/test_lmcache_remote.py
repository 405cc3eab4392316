"""The connector for an LMCache inside an engine, made by LMCache, with its own memory, on a real daemon."""

import asyncio
import gc
import os
import struct
import time
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from threading import Thread
from typing import Any, Final, TypeVar

import numpy as np
import pytest

from kvstore.client import StoreClient
from kvstore.errors import InvalidRequest
from kvstore.hashing import lmcache_engine_key, lmcache_engine_namespace, lmcache_seed
from kvstore.protocol import KEYS_MAX
from tests.lmcache_processes import ENVIRON
from tests.node import SLACK_S, Node, empty, idle, own_threads, wait_for

os.environ.update(ENVIRON)
pytestmark = [
    pytest.mark.skipif(find_spec("lmcache") is None, reason="LMCache is not installed"),
    # LMCache's logger, and two packages of Google's that it looks into for connectors, as they are imported.
    pytest.mark.filterwarnings("ignore:`LoggingHandler` in `opentelemetry-sdk`:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You are using a Python version:FutureWarning"),
    pytest.mark.filterwarnings("ignore:grpcio < :FutureWarning"),
]

MODEL: Final = "meta/Llama"
WORKERS: Final = 2
TOKEN_BYTES: Final = 2 * 2 * 256 * 2  # keys and values of 2 layers, of 256 numbers of 2 bytes
CHUNK_TOKENS: Final = 256
CHUNK_BYTES: Final = CHUNK_TOKENS * TOKEN_BYTES
MEMORY_BYTES: Final = 16 * CHUNK_BYTES
# For questions and for transfers: half of the first is how long the daemon may leave a call unanswered.
TIMEOUT_S: Final = 0.6
TRANSFER_TIMEOUT_S: Final = 2.0
IN_TIME_S: Final = TRANSFER_TIMEOUT_S + SLACK_S

R = TypeVar("R")


class Engine:
    """A worker with LMCache inside: its memory, its event loop in a thread, and the connector it has made."""

    def __init__(
        self,
        address: str,
        *,
        worker_id: int = 0,
        chunk_tokens: int = CHUNK_TOKENS,
        algorithm: str = "builtin",
        save_chunk_meta: bool = True,
    ) -> None:
        import torch
        from lmcache.v1.check.utils import EventLoopManager
        from lmcache.v1.config import LMCacheEngineConfig
        from lmcache.v1.metadata import LMCacheMetadata
        from lmcache.v1.storage_backend.connector import CreateConnector
        from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend

        config = LMCacheEngineConfig.from_defaults(
            chunk_size=chunk_tokens,
            local_cpu=True,
            max_local_cpu_size=MEMORY_BYTES / 2**30,
            pre_caching_hash_algorithm=algorithm,
            remote_storage_plugins=["kvstore"],
            extra_config={
                "remote_storage_plugin.kvstore.module_path": "connectors.lmcache_remote",
                "remote_storage_plugin.kvstore.class_name": "KVStoreRemoteConnector",
                "kvstore.address": address,
                "kvstore.timeout_s": TIMEOUT_S,
                "kvstore.transfer_timeout_s": TRANSFER_TIMEOUT_S,
                "save_chunk_meta": save_chunk_meta,
            },
        )
        metadata = LMCacheMetadata(
            model_name=MODEL,
            world_size=WORKERS,
            local_world_size=WORKERS,
            worker_id=worker_id,
            local_worker_id=worker_id,
            kv_dtype=torch.bfloat16,
            kv_shape=(2, 2, chunk_tokens, 2, 128),
            chunk_size=chunk_tokens,
        )
        self._worker_id = worker_id
        self._loops = EventLoopManager()
        self._loops.start()
        self.memory = LocalCPUBackend(config=config, metadata=metadata, dst_device="cpu")
        arguments = "plugin://kvstore", self._loops.get_loop(), self.memory, config, metadata
        self.connect = partial(CreateConnector, *arguments, plugin_name="kvstore")
        # With LMCache's wrapper around it, which gives up its own reference to what was put.
        self.connector = self.connect()

    def key(self, chunk_hash: int, **tags: str) -> Any:
        """LMCache's name of a chunk of this worker's."""
        import torch
        from lmcache.utils import CacheEngineKey

        configs = {f"lmcache.tag.{name}": value for name, value in tags.items()}
        return CacheEngineKey(MODEL, WORKERS, self._worker_id, chunk_hash, torch.bfloat16, configs)

    def keys(self, *chunk_hashes: int) -> list[Any]:
        """As many names."""
        return [self.key(each) for each in chunk_hashes]

    def chunk(self, content: bytes) -> Any:
        """A chunk of LMCache's with these bytes, as many tokens of them as they are."""
        import torch

        shape = torch.Size([2, 2, len(content) // TOKEN_BYTES, 256])
        chunk = self.memory.allocate(shape, torch.bfloat16, busy_loop=False)
        assert chunk is not None
        memoryview(chunk.byte_array).cast("B")[:] = content
        return chunk

    def start(self, work: Coroutine[Any, Any, R]) -> "Future[R]":
        """Let the event loop do this."""
        return asyncio.run_coroutine_threadsafe(work, self._loops.get_loop())

    def call(self, work: Coroutine[Any, Any, R]) -> R:
        """What it returns; it is over in the time that the connector was given."""
        return self.start(work).result(IN_TIME_S)

    def put(self, keys: Sequence[Any], contents: Sequence[bytes]) -> None:
        """Store chunks."""
        self.call(self.connector.batched_put(keys, [self.chunk(each) for each in contents]))

    def get(self, keys: Sequence[Any]) -> list[bytes | None]:
        """Load chunks, and give their memory back."""
        return [taken(each) for each in self.call(self.connector.batched_get(keys))]

    @property
    def used_bytes(self) -> int:
        """Of LMCache's memory."""
        return int(self.memory.memory_allocator.pin_allocator.total_allocated_size)

    def close(self) -> None:
        """As LMCache does it."""
        self.call(self.connector.close())
        self._loops.stop()
        self.memory.close()


def taken(chunk: Any) -> bytes | None:
    """What a chunk holds. It is given back."""
    if chunk is None:
        return None
    assert chunk.is_valid()
    assert chunk.get_ref_count() == 1
    content = bytes(chunk.byte_array)
    chunk.ref_count_down()
    assert not chunk.is_valid()
    return content


def content(seed: int, tokens: int = CHUNK_TOKENS) -> bytes:
    """Bytes that no other seed gives."""
    return np.random.default_rng(seed).bytes(tokens * TOKEN_BYTES)


@contextmanager
def engine_of(node: Node, **options: Any) -> Iterator[Engine]:
    """An engine that leaves no memory in use."""
    engine = Engine(node.address, **options)
    try:
        yield engine
        wait_for(lambda: engine.used_bytes == 0)
        assert engine.memory.memory_allocator.memcheck()
    finally:
        engine.close()


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    """One daemon for all tests, that some of them start again."""
    with Node() as node:
        yield node


@pytest.fixture(autouse=True)
def _nothing_is_left(node: Node, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Close ends all threads, and nobody has forgotten a chunk; then the daemon is well, and emptied."""
    before = own_threads()
    yield
    wait_for(lambda: own_threads() <= before, TIMEOUT_S + SLACK_S)
    gc.collect()  # which is when LMCache frees what was forgotten, and says so
    for record in [*caplog.get_records("setup"), *caplog.get_records("call"), *caplog.records]:
        assert "ref_count_down()" not in record.getMessage()
        assert "Double free" not in record.getMessage()
    node.check()
    with node.client() as store:
        wait_for(lambda: idle(store))
        empty(store)


@pytest.fixture(params=[True, False], ids=["with-meta", "without-meta"])
def engine(node: Node, request: pytest.FixtureRequest) -> Iterator[Engine]:
    """An engine on the daemon, that describes its chunks or does not."""
    with engine_of(node, save_chunk_meta=request.param) as engine:
        yield engine


def test_a_chunk_comes_back_byte_for_byte(engine: Engine) -> None:
    connector, key, other = engine.connector, engine.key(-0x7BE5), engine.key(2**63)
    assert not connector.exists_sync(key)
    assert engine.call(connector.get(key)) is None
    engine.call(connector.put(key, engine.chunk(content(1))))
    assert connector.exists_sync(key)
    assert engine.call(connector.exists(key)) is True
    assert engine.call(connector.exists(other)) is False
    chunk = engine.call(connector.get(key))
    assert (list(chunk.get_shape()), str(chunk.get_dtype())) == ([2, 2, CHUNK_TOKENS, 256], "torch.bfloat16")
    assert taken(chunk) == content(1)


def test_batches_may_have_holes(engine: Engine) -> None:
    connector, keys = engine.connector, engine.keys(*range(6))
    engine.put([*keys[:2], *keys[3:]], [content(1), content(2), content(4), content(5), content(6)])
    assert connector.batched_contains(keys) == 2
    assert connector.batched_contains(keys[2:]) == 0
    assert connector.batched_contains(keys[3:]) == 3
    assert connector.batched_contains([]) == 0
    assert engine.call(connector.batched_async_contains("lookup", keys)) == 2
    assert engine.get(keys) == [content(1), content(2), None, content(4), content(5), content(6)]
    assert engine.get(keys[3:4] * 3) == [content(4)] * 3
    assert engine.get([]) == []


def test_a_hole_ends_a_prefix_of_many_requests(engine: Engine) -> None:
    keys = engine.keys(*range(KEYS_MAX + 2))
    engine.put([keys[0], keys[-2], keys[-1]], [content(1, 1)] * 3)
    assert engine.connector.batched_contains(keys) == 1
    there = engine.get(keys)
    assert [index for index, each in enumerate(there) if each] == [0, KEYS_MAX, KEYS_MAX + 1]


def test_only_the_prefix_is_loaded_for_a_lookup(engine: Engine) -> None:
    connector, keys = engine.connector, engine.keys(*range(6))
    engine.put([*keys[:2], *keys[3:]], [content(1), content(2), content(4), content(5), content(6)])
    wait_for(lambda: engine.used_bytes == 0)
    chunks = engine.call(connector.batched_get_non_blocking("lookup", keys))
    assert engine.used_bytes == 2 * CHUNK_BYTES  # what came from behind the hole is given back
    assert [taken(each) for each in chunks] == [content(1), content(2)]
    assert engine.call(connector.batched_get_non_blocking("lookup", keys[2:])) == []


def test_the_last_chunk_of_a_prompt_may_be_short(engine: Engine) -> None:
    for tokens in (1, 100, CHUNK_TOKENS - 1):
        key = engine.key(tokens)
        engine.put([key], [content(7, tokens)])
        chunk = engine.call(engine.connector.get(key))
        assert list(chunk.get_shape()) == [2, 2, tokens, 256]
        assert taken(chunk) == content(7, tokens)


def test_what_is_removed_is_gone(engine: Engine) -> None:
    keys = engine.keys(1, 2)
    engine.put(keys, [content(1), content(2)])
    assert engine.connector.remove_sync(keys[0]) is True
    assert engine.connector.remove_sync(keys[0]) is False
    assert engine.get(keys) == [None, content(2)]


def test_chunks_are_listed_by_lmcaches_names(node: Node, store: StoreClient) -> None:
    with engine_of(node) as engine, engine_of(node, worker_id=1) as other:
        mine = [
            *engine.keys(5, -5, 2**64 - 1),
            engine.key(5, user="a@b%c", app=""),
            *engine.key(6).split_layers(2),
        ]
        theirs = other.keys(5)
        assert engine.call(engine.connector.list()) == []
        engine.put(mine, [content(number) for number in range(len(mine))])
        other.put(theirs, [content(99)])
        names = [key.to_string() for key in mine + theirs]
        assert sorted(engine.call(engine.connector.list())) == sorted(names)
        assert engine.get(mine) == [content(number) for number in range(len(mine))]
        # And they lie where a router looks for them.
        layout = {"block_tokens": CHUNK_TOKENS, "layout": "+meta", "seed": lmcache_seed()}
        namespace = lmcache_engine_namespace(MODEL, WORKERS, 1, "bfloat16", **layout)
        block = store.get(namespace, lmcache_engine_key(5))
        assert block is not None
        assert block[-CHUNK_BYTES:] == content(99)


def test_workers_do_not_mix(node: Node) -> None:
    with engine_of(node) as one, engine_of(node, worker_id=1) as two:
        one.put(one.keys(1), [content(1)])
        assert two.get(two.keys(1)) == [None]
        two.put(two.keys(1), [content(2)])
        assert one.get([*one.keys(1), *two.keys(1)]) == [content(1), content(2)]


def test_tags_keep_users_apart(engine: Engine) -> None:
    keys = [engine.key(1), engine.key(1, user="a"), engine.key(1, user="b"), engine.key(1, user="a", app="x")]
    engine.put(keys[1:3], [content(1), content(2)])
    assert engine.get(keys) == [None, content(1), content(2), None]
    assert [engine.connector.exists_sync(key) for key in keys] == [False, True, True, False]


@pytest.mark.parametrize(
    "options", [{"chunk_tokens": 128}, {"algorithm": "sha256_cbor"}, {"save_chunk_meta": False}]
)
def test_another_configuration_sees_nothing(node: Node, options: dict[str, Any]) -> None:
    with engine_of(node) as engine, engine_of(node, **options) as other:
        engine.put(engine.keys(1, 2), [content(1), content(2)])
        assert other.connector.batched_contains(other.keys(1, 2)) == 0
        assert other.get(other.keys(1, 2)) == [None, None]
        assert other.call(other.connector.list()) == []
        assert other.connector.remove_sync(other.key(1)) is False
        assert engine.get(engine.keys(1, 2)) == [content(1), content(2)]


def nothing_is_there(engine: Engine, within_s: float) -> None:
    """Ask everything once; all of it is a miss, and all together it takes no longer than this."""
    connector, keys = engine.connector, engine.keys(1, 2)
    started = time.monotonic()
    assert connector.exists_sync(keys[0]) is False
    assert engine.call(connector.exists(keys[0])) is False
    assert connector.batched_contains(keys) == 0
    assert engine.call(connector.batched_async_contains("lookup", keys)) == 0
    assert engine.call(connector.get(keys[0])) is None
    assert engine.get(keys) == [None, None]
    assert engine.call(connector.batched_get_non_blocking("lookup", keys)) == []
    engine.call(connector.put(keys[0], engine.chunk(content(3))))
    engine.put(keys, [content(3), content(4)])
    assert connector.remove_sync(keys[0]) is False
    assert engine.call(connector.list()) == []
    assert engine.call(connector.ping()) == 1
    assert time.monotonic() - started < within_s


def is_back(engine: Engine) -> bool:
    """Whether the connector has found the daemon again."""
    return engine.call(engine.connector.ping()) == 0


def test_a_daemon_that_is_gone_is_a_miss(node: Node) -> None:
    with engine_of(node) as engine:
        assert is_back(engine)
        engine.put(engine.keys(1), [content(1)])
        node.kill()
        nothing_is_there(engine, SLACK_S)
        node.start()
        wait_for(lambda: is_back(engine))
        engine.put(engine.keys(1), [content(2)])
        assert engine.get(engine.keys(1)) == [content(2)]


def test_an_engine_may_start_before_its_daemon(node: Node) -> None:
    node.kill()
    with engine_of(node) as engine:
        nothing_is_there(engine, SLACK_S)
        node.start()
        wait_for(lambda: is_back(engine))
        engine.put(engine.keys(1), [content(1)])
        assert engine.get(engine.keys(1)) == [content(1)]


def test_a_daemon_that_hangs_costs_one_deadline(node: Node) -> None:
    with engine_of(node) as engine:
        engine.put(engine.keys(1), [content(1)])
        with node.stopped():
            nothing_is_there(engine, TIMEOUT_S + SLACK_S)
        wait_for(lambda: is_back(engine))
        assert engine.get(engine.keys(1)) == [content(1)]


def give_up(engine: Engine, work: Coroutine[Any, Any, object]) -> None:
    """Wait for work for next to no time, as LMCache does when its patience ends."""

    async def impatiently() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(work, 0.001)

    engine.call(impatiently())


def fill(engine: Engine) -> list[Any]:
    """All that is left of LMCache's memory, in chunks of bytes 0xAA."""
    chunks = []
    while engine.used_bytes + CHUNK_BYTES <= MEMORY_BYTES:
        chunks.append(engine.chunk(b"\xaa" * CHUNK_BYTES))
    return chunks


def let_go(chunks: list[Any]) -> None:
    """Give them back; nobody else has written into them."""
    assert all(taken(each) == b"\xaa" * CHUNK_BYTES for each in chunks)


@pytest.mark.parametrize("until_lost", [False, True], ids=["answered-late", "lost"])
def test_a_get_that_is_given_up_leaves_nothing(node: Node, store: StoreClient, until_lost: bool) -> None:
    with engine_of(node) as engine:
        connector, keys = engine.connector, engine.keys(1, 2, 3)
        engine.put(keys, [content(1), content(2), content(3)])
        wait_for(lambda: engine.used_bytes == 0)
        held = fill(engine)
        with node.stopped():
            give_up(engine, connector.get(keys[0]))
            give_up(engine, connector.batched_get(keys))
            give_up(engine, connector.batched_get_non_blocking("lookup", keys))
            let_go([held.pop() for _ in range(7)])  # room for what is still to come, and for nothing else
            if until_lost:
                wait_for(lambda: not is_back(engine))
        wait_for(lambda: is_back(engine))
        wait_for(lambda: store.statistics().tiers[0].pinned_blocks == 0)
        wait_for(lambda: engine.used_bytes == len(held) * CHUNK_BYTES)
        let_go(held)
        assert engine.get(keys) == [content(1), content(2), content(3)]


@pytest.mark.parametrize("until_lost", [False, True], ids=["answered-late", "lost"])
def test_a_put_that_is_given_up_stores_what_it_was_given(node: Node, until_lost: bool) -> None:
    with engine_of(node) as engine:
        keys = engine.keys(*range(8))
        with node.stopped():
            for number in range(6):
                give_up(engine, engine.connector.put(keys[number], engine.chunk(content(number))))
            chunks = [engine.chunk(content(6)), engine.chunk(content(7))]
            give_up(engine, engine.connector.batched_put(keys[6:], chunks))
            # LMCache has forgotten the chunks and takes what is free: nothing that is still to be read.
            held = fill(engine)
            if until_lost:
                wait_for(lambda: not is_back(engine))
        wait_for(lambda: is_back(engine))
        wait_for(lambda: engine.used_bytes == len(held) * CHUNK_BYTES)
        let_go(held)
        there = engine.get(keys)
        assert all(each in (None, content(number)) for number, each in enumerate(there))
        assert until_lost or any(there)


def test_impatience_leaves_nothing_at_whatever_moment(node: Node, store: StoreClient) -> None:
    with engine_of(node) as engine:
        keys = engine.keys(1, 2, 3)
        engine.put(keys, [content(1), content(2), content(3)])

        async def impatiently(within_s: float) -> list[Any]:
            with suppress(TimeoutError):
                return await asyncio.wait_for(engine.connector.batched_get(keys), within_s)
            return []

        for step in range(100):
            chunks = engine.call(impatiently(step * 5e-5))
            assert [taken(each) for each in chunks] in ([], [content(1), content(2), content(3)])
        wait_for(lambda: store.statistics().tiers[0].pinned_blocks == 0)


@pytest.mark.parametrize("room", [0, 2])
def test_more_than_lmcaches_memory_takes_is_a_miss(node: Node, room: int) -> None:
    with engine_of(node) as engine:
        keys = engine.keys(1, 2, 3, 4)
        engine.put(keys, [content(1), content(2), content(3), content(4)])
        wait_for(lambda: engine.used_bytes == 0)
        held = fill(engine)
        let_go([held.pop() for _ in range(room)])
        got = engine.start(engine.connector.batched_get(keys))
        try:
            in_time = list(got.result(IN_TIME_S))
        finally:
            let_go(held)
            there = [taken(each) for each in got.result(IN_TIME_S)]
        assert sum(each is not None for each in in_time) == room
        assert all(each in (None, content(number)) for number, each in enumerate(there, 1))


def described(*numbers: int) -> bytes:
    """What LMCache puts before a chunk: its length, format, type and shape."""
    return struct.pack("7i", *numbers)


def test_a_block_that_is_no_chunk_is_a_miss(node: Node, store: StoreClient) -> None:
    with engine_of(node) as engine:
        keys = engine.keys(1, 2, 3)
        engine.put(keys, [content(1), content(2), content(3)])
        (use,) = store.namespaces()
        for block in (
            b"short",
            described(8, 1, 1, 2, 2, 256, 256) + bytes(8),  # another length
            described(8, 99, 1, 2, 2, 1, 256) + bytes(8),  # no format
            described(8, 1, 99, 2, 2, 1, 256) + bytes(8),  # no type
            described(8, 1, 0, 2, 2, 1, 256) + bytes(8),
            described(8, 1, 1, -2, 2, 1, 256) + bytes(8),  # no shape
            bytes(100),
        ):
            store.remove(use.namespace, [lmcache_engine_key(2)])
            store.put(use.namespace, lmcache_engine_key(2), block)
            assert engine.get(keys) == [content(1), None, content(3)]


def test_puts_that_hang_hold_up_no_question(node: Node, store: StoreClient) -> None:
    with engine_of(node) as engine:
        connector, here, absent = engine.connector, engine.key(100), engine.key(101)
        busy = engine.keys(*range(12))  # more than there are threads of any kind
        engine.put([here], [content(100)])
        (use,) = store.namespaces()
        names = [lmcache_engine_key(key.chunk_hash) for key in busy]
        with store.reserve(use.namespace, names, use.block_bytes) as write:
            assert len(write.granted) == len(busy)
            chunks = [engine.chunk(content(number)) for number in range(12)]
            puts = [engine.start(connector.put(*each)) for each in zip(busy, chunks, strict=True)]
            wait_for(lambda: all(each.get_ref_count() == 2 for each in chunks))
            started = time.monotonic()
            assert connector.exists_sync(here) is True
            assert engine.call(connector.exists(here)) is True
            assert engine.call(connector.exists(absent)) is False
            assert engine.call(connector.batched_async_contains("lookup", [here, absent])) == 1
            assert is_back(engine)
            assert engine.get([here, absent]) == [content(100), None]
            assert time.monotonic() - started < SLACK_S
            assert not any(put.done() for put in puts)
        for put in puts:
            put.result(IN_TIME_S)
        assert engine.get(busy) == [content(number) for number in range(12)]


def test_close_ends_all_threads_while_the_daemon_hangs(node: Node) -> None:
    before = own_threads()
    with engine_of(node) as engine, node.stopped():
        give_up(engine, engine.connector.get(engine.key(1)))
        started = time.monotonic()
        engine.call(engine.connector.close())
        assert time.monotonic() - started < TIMEOUT_S + SLACK_S
        wait_for(lambda: own_threads() <= before, TIMEOUT_S + SLACK_S)


@pytest.mark.parametrize("name", ["copy_1", "wait_3", "put_2", "get_0", "question_1"])
def test_a_connector_that_cannot_have_its_threads_says_so_and_leaves_nothing(
    node: Node, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = Thread.start

    def start_or_not(thread: Thread) -> None:
        if thread.name == f"kvstore-{name}":
            raise RuntimeError("can't start new thread")
        start(thread)

    with engine_of(node) as engine:
        before = own_threads()
        monkeypatch.setattr(Thread, "start", start_or_not)
        with pytest.raises(InvalidRequest, match=r"threads kvstore-\w+ wanted, \d started"):
            engine.connect()
        wait_for(lambda: own_threads() <= before, TIMEOUT_S + SLACK_S)


def test_after_close_nothing_is_there(node: Node) -> None:
    with engine_of(node) as engine:
        engine.put(engine.keys(1, 2), [content(1), content(2)])
        engine.call(engine.connector.close())
        engine.call(engine.connector.close())
        nothing_is_there(engine, SLACK_S)
