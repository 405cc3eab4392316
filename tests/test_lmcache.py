"""The L2 adapter in LMCache's hands, against a real daemon: objects, locks, lists, and what it is told."""

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from connectors.locks import Locks
from kvstore.block import Namespace
from kvstore.client import StoreClient
from kvstore.errors import InvalidRequest, Unavailable
from kvstore.hashing import lmcache_namespace
from kvstore.protocol import KEYS_MAX
from tests.lmcache_objects import (
    BYTES_ARE,
    IGNORED,
    KIB,
    MIB,
    UNTOUCHED,
    Controllers,
    EvictionConfig,
    Heard,
    KVStoreL2Adapter,
    L2AdapterEvictionState,
    L2EvictionController,
    ObjectKey,
    QuotaManager,
    adapter_for,
    bytes_in,
    content,
    contents,
    key,
    keys,
    memory,
    rank,
    threads_of,
)
from tests.node import SLACK_S, Node, empty, idle, node_with_disk, own_threads, pinned, wait_for, written

pytestmark = pytest.mark.filterwarnings(IGNORED)

TOKEN = "a-token-that-stays-at-home"


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    """A daemon with an arena of 64 MiB for all tests, which keep out of each other's way by their models."""
    with Node("64MiB", "--data", "127.0.0.1:0", environ={"KVSTORE_TOKEN": TOKEN}) as node:
        yield node
        assert node.stop() == 0
        assert "Traceback" not in node.log, node.log


@pytest.fixture
def store(node: Node) -> Iterator[StoreClient]:
    """Somebody else's client of it."""
    with node.client() as store:
        yield store


@pytest.fixture
def engine(node: Node) -> Iterator[Controllers]:
    """LMCache with the adapter."""
    with Controllers(node.address) as engine:
        yield engine


@pytest.fixture
def model(request: pytest.FixtureRequest) -> str:
    """A model of the test's own."""
    name: str = request.node.name
    return name


@pytest.fixture(autouse=True)
def nothing_is_left(node: Node) -> Iterator[None]:
    """In the end nothing is pinned or reserved, and a recount finds nothing wrong."""
    yield
    with node.client() as store:
        wait_for(lambda: idle(store))
        assert store.check() == []


@pytest.fixture(scope="module")
def node_and_disk() -> Iterator[Node]:
    """A daemon with an arena of 32 MiB and a disk, for all tests of what is on disk."""
    with node_with_disk("32MiB") as node:
        yield node


@pytest.fixture
def disk_node(node_and_disk: Node) -> Iterator[Node]:
    """The same, emptied after each of them."""
    yield node_and_disk
    with node_and_disk.client() as store:
        wait_for(lambda: idle(store) and written(store))
        assert store.check() == []
        empty(store)


def push_out(store: StoreClient) -> None:
    """Store twice the arena of other data."""
    namespace = Namespace(model=f"flood-{os.urandom(8).hex()}")
    for index in range(2 * store.statistics().tiers[0].capacity_bytes // MIB):
        store.put(namespace, b"%d" % index, bytes(MIB), timeout_s=20)


def namespace_of(key: ObjectKey, **options: Any) -> Namespace:
    """Where the adapter should put it."""
    fields = key.model_name, key.kv_rank, key.object_group_id, key.cache_salt
    return lmcache_namespace(*fields, **{**BYTES_ARE, **options})


# What was stored comes back.


@pytest.mark.parametrize("nbytes", [1, 4095, 70_001, 3 * MIB])
def test_objects_come_back_byte_for_byte(engine: Controllers, model: str, nbytes: int) -> None:
    names = keys(8, model=model)
    assert engine.lookup(names) == [False] * 8
    result = engine.store(names, nbytes)
    assert result.is_successful()
    assert result.bytes_transferred() == 8 * nbytes
    assert engine.lookup(names) == [True] * 8
    assert engine.load(names, nbytes) == contents(names, nbytes)
    engine.unlock(names)
    assert engine.load(names, nbytes) == contents(names, nbytes)


def test_a_batch_mixes_ranks_groups_salts_models_and_sizes(engine: Controllers, model: str) -> None:
    names = [
        key(index, model=f"{model}{index % 3}", kv_rank=rank(index % 4, 4), group=index % 2, salt="t" * shade)
        for index in range(20)
        for shade in range(3)
    ]
    sizes = [1 + 977 * index for index in range(len(names))]
    assert engine.store(names, sizes).bytes_transferred() == sum(sizes)
    absent = [replace(each, cache_salt="nobody") for each in names[::7]]
    asked, lengths = [*absent, *reversed(names)], [*[100] * len(absent), *reversed(sizes)]
    expected = [None] * len(absent) + contents(names, sizes)[::-1]
    assert engine.lookup(asked) == [each is not None for each in expected]
    assert engine.load(asked, lengths) == expected
    engine.unlock(names)
    assert engine.load(asked, lengths) == expected


def test_an_object_is_where_its_key_says_for_every_other_client(
    engine: Controllers, store: StoreClient, model: str
) -> None:
    name = key(1, model=model, kv_rank=rank(2, 4), group=1, salt="tenant")
    engine.store([name], 5000)
    assert store.get(namespace_of(name), name.chunk_hash, timeout_s=0) == content(name, 5000)


@pytest.mark.parametrize(
    "other",
    [{"model": "another"}, {"kv_rank": rank(1, 2)}, {"kv_rank": rank(0, 2)}, {"group": 1}, {"salt": "t"}],
    ids=lambda other: next(iter(other)),
)
def test_the_same_hash_elsewhere_is_another_object(
    engine: Controllers, model: str, other: dict[str, Any]
) -> None:
    name, stranger = key(1, model=model), key(1, **{"model": model, **other})
    engine.store([name], 100)
    assert engine.lookup([stranger, name, stranger]) == [False, True, False]
    engine.unlock([name])
    engine.store([stranger], 200)
    assert engine.load([name, stranger], [100, 200]) == [content(name, 100), content(stranger, 200)]


@pytest.mark.parametrize(
    "strange",
    [
        {"kv_rank": 0},
        {"kv_rank": ObjectKey.ComputeKVRank(8, 5, 4, 1)},
        {"kv_rank": ObjectKey.ComputeKVRank(255, 254, 255, 254)},
        {"salt": "ü%: &=+\n" * 16},
        {"group": 4_000_000_000},
        {"model": "/mnt/models/q:7%b##dcp " + "m" * 400},
    ],
    ids=lambda strange: next(iter(strange)),
)
def test_strange_keys_come_back_as_they_are(engine: Controllers, model: str, strange: dict[str, Any]) -> None:
    name = key(1, **{"model": model, **strange})
    assert engine.store([name], 100).is_successful()
    assert engine.fetch([name], 100) == [content(name, 100)]
    assert engine.listed(model_name=name.model_name) == {name: 100}


def test_hashes_of_all_lengths_that_lmcache_has_are_keys(engine: Controllers, model: str) -> None:
    names = [ObjectKey(b"\x01" * length, model, rank()) for length in (4, 8, 32, 64)]
    assert engine.store(names, 50).is_successful()
    assert engine.fetch(names, 50) == contents(names, 50)


def test_a_task_may_name_more_keys_than_a_request(
    engine: Controllers, store: StoreClient, model: str
) -> None:
    names = keys(2 * KEYS_MAX + 100, model=model)
    assert engine.store(names, 64).bytes_transferred() == 64 * len(names)
    missing = [key(-1, model=model), *keys(KEYS_MAX, 100_000, model=model)]
    asked = [*missing, *names]
    expected = [None] * len(missing) + contents(names, 64)
    assert engine.lookup(asked) == [each is not None for each in expected]
    assert engine.load(asked, 64) == expected
    assert pinned(store) == len(names)
    engine.unlock(names)
    wait_for(lambda: pinned(store) == 0)
    assert engine.load(asked, 64) == expected
    assert engine.listed(model_name=model) == dict.fromkeys(names, 64)
    engine.adapter.delete(asked)
    assert engine.lookup(names) == [False] * len(names)
    assert engine.listed(model_name=model) == {}


def test_a_key_may_come_twice_in_a_batch(engine: Controllers, store: StoreClient, model: str) -> None:
    a, b = keys(2, model=model)
    batch = [a, b, a, a]
    assert engine.store(batch, 100).is_successful()
    assert engine.lookup(batch) == [True] * 4
    assert engine.load(batch, 100) == contents(batch, 100)
    engine.unlock(batch)
    wait_for(lambda: pinned(store) == 0)
    assert engine.load(batch, 100) == contents(batch, 100)
    engine.adapter.delete(batch)
    assert engine.listed(model_name=model) == {}


def test_an_empty_batch_is_a_task_too(engine: Controllers) -> None:
    assert engine.store([], 1).is_successful()
    assert engine.lookup([]) == []
    assert engine.load([], 1) == []
    engine.unlock([])
    engine.adapter.delete([])


@pytest.mark.parametrize(
    "bad",
    [
        ObjectKey(b"", "m", rank()),
        ObjectKey(b"x" * 65, "m", rank()),
        ObjectKey(b"x", "m", -1),
        ObjectKey(b"x", "m", 1 << 40),
        ObjectKey(b"x", "m" * 600, rank()),
        ObjectKey(b"x", "", rank()),
    ],
    ids=["no hash", "long hash", "negative rank", "large rank", "long model", "no model"],
)
def test_a_key_that_is_none_fails_its_task_and_no_other(
    engine: Controllers, model: str, bad: ObjectKey
) -> None:
    good = key(1, model=model)
    assert not engine.store([bad, good], 100).is_successful()
    assert not engine.lookup([bad])[0]
    assert engine.load([bad], 100) == [None]
    engine.unlock([bad])
    assert engine.store([good], 100).is_successful()
    assert engine.fetch([good], 100) == [content(good, 100)]
    assert engine.adapter.report_status()["is_healthy"]


def test_lists_of_different_lengths_fail_and_harm_nothing(engine: Controllers, model: str) -> None:
    names = keys(3, model=model)
    task = engine.adapter.submit_store_task(names, [memory(100)])
    assert not engine.stored(task).is_successful()
    assert engine.lookup(names) == [False] * 3


# Locks.


def test_what_was_looked_up_survives_twice_the_arena(
    engine: Controllers, store: StoreClient, model: str
) -> None:
    names = keys(8, model=model)
    engine.store(names, MIB)
    assert engine.lookup(names) == [True] * 8
    push_out(store)
    assert engine.load(names, MIB) == contents(names, MIB)
    assert pinned(store) == 8
    engine.unlock(names)
    wait_for(lambda: pinned(store) == 0)
    push_out(store)
    assert engine.lookup(names) == [False] * 8


def test_locks_are_counted_per_lookup(engine: Controllers, store: StoreClient, model: str) -> None:
    names = keys(4, model=model)
    engine.store(names, MIB)
    for _ in range(2):
        assert engine.lookup(names) == [True] * 4
    engine.unlock(names)
    push_out(store)
    assert engine.load(names, MIB) == contents(names, MIB)
    assert pinned(store) == 4
    engine.unlock(names)
    wait_for(lambda: pinned(store) == 0)
    push_out(store)
    assert engine.load(names, MIB) == [None] * 4


def test_what_is_still_locked_of_a_lookup_stays_when_the_rest_is_unlocked(
    engine: Controllers, store: StoreClient, model: str
) -> None:
    names = keys(6, model=model)
    engine.store(names, MIB)
    assert engine.lookup(names[:4]) == [True] * 4
    assert engine.lookup(names[2:]) == [True] * 4
    engine.unlock(names[:3])
    engine.unlock(names[4:])
    push_out(store)
    assert engine.load(names[2:4], MIB) == contents(names[2:4], MIB)
    engine.unlock([names[3]])
    push_out(store)
    assert engine.load(names[2:4], MIB) == contents(names[2:4], MIB)
    engine.unlock(names[2:4])
    wait_for(lambda: pinned(store) == 0)


def test_unlocking_what_nobody_has_locked_undoes_nobodys_lock(
    engine: Controllers, store: StoreClient, model: str
) -> None:
    names = keys(4, model=model)
    engine.store(names[:3], MIB)
    engine.unlock(names)
    assert engine.lookup([names[0], names[3]]) == [True, False]
    engine.unlock(names[1:])
    push_out(store)
    assert engine.load(names, MIB) == [content(names[0], MIB), None, None, None]
    engine.unlock(names)
    engine.unlock(names)
    wait_for(lambda: pinned(store) == 0)


def test_locks_of_one_adapter_are_not_undone_by_another(
    node: Node, engine: Controllers, store: StoreClient, model: str
) -> None:
    names = keys(4, model=model)
    engine.store(names, MIB)
    engine.lookup(names)
    with Controllers(node.address) as other:
        assert other.lookup(names) == [True] * 4
        other.unlock(names)
        other.unlock(names)
        push_out(store)
        assert other.load(names, MIB) == contents(names, MIB)
        assert other.lookup(names) == [True] * 4
    assert engine.load(names, MIB) == contents(names, MIB)
    engine.unlock(names)


def test_closing_ends_all_locks(node: Node, store: StoreClient, model: str) -> None:
    names = keys(4, model=model)
    with Controllers(node.address) as engine:
        engine.store(names, MIB)
        engine.lookup(names)
        engine.lookup(names)
        assert pinned(store) == 4
    wait_for(lambda: pinned(store) == 0)
    engine.close()


def test_all_that_a_lookup_finds_can_be_loaded_while_it_is_locked(engine: Controllers, model: str) -> None:
    # They are more than one client may pin, and all in memory.
    names = keys(48, model=model)
    for start in range(0, 48, 8):
        assert engine.store(names[start : start + 8], MIB).is_successful()
    found = engine.lookup(names)
    loaded, buffers = engine.load_into(names, MIB)
    here = [each for each, is_in in zip(names, found, strict=True) if is_in]
    engine.unlock(here)
    assert found == [True] * 48
    assert [bytes_in(each) for each, is_in in zip(buffers, loaded, strict=True) if is_in] == [
        content(each, MIB) for each, is_in in zip(names, loaded, strict=True) if is_in
    ]
    assert loaded == found


def test_more_than_a_client_may_pin_is_loaded_in_one_task(engine: Controllers, model: str) -> None:
    names = keys(48, model=model)
    for start in range(0, 48, 8):
        assert engine.store(names[start : start + 8], MIB).is_successful()
    got = engine.load(names, MIB)
    assert sum(each is not None for each in got) == 48
    assert got == contents(names, MIB)


def test_locks_that_are_forgotten_end_when_they_are_old(node: Node, store: StoreClient, model: str) -> None:
    names = keys(4, model=model)
    with Controllers(node.address, lock_age_max_s=0.2) as engine:
        engine.store(names, MIB)
        for _ in range(3):
            assert engine.lookup(names) == [True] * 4
        assert pinned(store) == 4
        # Lookups go on, of something else.
        wait_for(lambda: engine.lookup([key(1, model="absent")]) == [False] and pinned(store) == 0, 2)
        status = engine.adapter.report_status()
        assert (status["locks"], status["leases"], status["expired_leases"]) == (0, 0, 3)
        engine.unlock(names)
        assert engine.load(names, MIB) == contents(names, MIB)


def test_locks_that_are_forgotten_end_though_the_engine_asks_for_nothing_more(
    node: Node, store: StoreClient, model: str
) -> None:
    names = keys(4, model=model)
    with Controllers(node.address, lock_age_max_s=0.2) as engine:
        engine.store(names, MIB)
        assert engine.lookup(names) == [True] * 4
        wait_for(lambda: pinned(store) == 0, 2)


# The tier below.


def test_what_is_only_on_disk_is_found_loaded_and_unlocked(disk_node: Node) -> None:
    names = [*keys(12, kv_rank=rank(0, 2)), *keys(12, kv_rank=rank(1, 2))]
    with disk_node.client() as store, Controllers(disk_node.address) as engine:
        assert engine.store(names, 500 * KIB).is_successful()
        wait_for(lambda: written(store))
        push_out(store)
        assert store.hit_length(namespace_of(names[0]), [names[0].chunk_hash]).dram == 0
        absent = keys(2, 500)
        assert engine.lookup([*names, *absent]) == [True] * 24 + [False] * 2
        assert engine.load([*names, *absent], 500 * KIB) == [*contents(names, 500 * KIB), None, None]
        # Both kinds of locks are undone, also of what has come up meanwhile.
        assert engine.lookup(names) == [True] * 24
        engine.unlock(names)
        engine.unlock(names)
        wait_for(lambda: pinned(store) == 0)
        status = engine.adapter.report_status()
        assert (status["locks"], status["leases"]) == (0, 0)


def test_more_than_the_arena_is_loaded_from_disk_in_one_task(disk_node: Node) -> None:
    names = keys(96)
    with disk_node.client() as store, Controllers(disk_node.address) as engine:
        for start in range(0, 96, 8):
            assert engine.store(names[start : start + 8], MIB).is_successful()
        wait_for(lambda: written(store))
        found = engine.lookup(names)
        loaded = engine.load(names, MIB)
        engine.unlock(names)
        assert found == [True] * 96
        assert loaded == contents(names, MIB)
        wait_for(lambda: pinned(store) == 0)


def test_a_restart_brings_back_what_is_on_disk_and_nothing_that_was_deleted(disk_node: Node) -> None:
    names = keys(16)
    with disk_node.client() as store, Controllers(disk_node.address) as engine:
        engine.store(names, 100 * KIB)
        wait_for(lambda: written(store))
        engine.adapter.delete(names[::2])
    disk_node.kill()
    disk_node.start()
    with Controllers(disk_node.address) as engine:
        expected = [None if index % 2 == 0 else content(each, 100 * KIB) for index, each in enumerate(names)]
        assert engine.fetch(names, 100 * KIB) == expected
        assert engine.listed() == dict.fromkeys(names[1::2], 100 * KIB)


def test_forgotten_locks_of_what_is_on_disk_end_too(disk_node: Node) -> None:
    names = keys(4)
    with disk_node.client() as store, Controllers(disk_node.address, lock_age_max_s=0.2) as engine:
        engine.store(names, MIB)
        wait_for(lambda: written(store))
        push_out(store)
        assert engine.lookup(names) == [True] * 4

        def forgotten() -> bool:
            engine.lookup([key(1, model="absent")])
            return bool(engine.adapter.report_status()["locks"] == 0)

        wait_for(forgotten, 2)


# All or nothing.


@pytest.mark.parametrize("worlds", [[1], [2, 2]], ids=["one namespace", "two namespaces"])
def test_a_batch_beyond_the_clients_limit_leaves_nothing_behind(
    node: Node, store: StoreClient, model: str, worlds: list[int]
) -> None:
    names = [
        name
        for number, world in enumerate(worlds)
        for name in keys(40 // len(worlds), model=model, kv_rank=rank(number, world))
    ]
    with Controllers(node.address, transfer_timeout_s=2.0) as engine:
        assert engine.store(names[:1], MIB).is_successful()
        started = time.monotonic()
        assert not engine.store(names, MIB).is_successful()
        assert time.monotonic() - started < 2.0 + SLACK_S
        wait_for(lambda: store.statistics().tiers[0].pending_blocks == 0)
        assert engine.listed(model_name=model) == {names[0]: MIB}
        assert engine.fetch(names[:1], MIB) == [content(names[0], MIB)]
        # Half of it fits.
        assert engine.store(names[:20], MIB).is_successful()


def test_an_object_larger_than_the_arena_fails_with_its_batch(engine: Controllers, model: str) -> None:
    names = keys(3, model=model)
    assert not engine.store(names, [100, 65 * MIB, 100]).is_successful()
    assert engine.lookup(names) == [False] * 3
    assert engine.store(names, 100).is_successful()


def test_a_batch_that_finds_the_arena_pinned_fails_by_its_deadline_and_leaves_nothing(
    node: Node, store: StoreClient, model: str
) -> None:
    namespace = Namespace(f"{model}-pinned")
    blocks = [b"%d" % index for index in range(48)]
    with (
        node.client() as other,
        Controllers(node.address, timeout_s=1.0, transfer_timeout_s=1.5) as engine,
    ):
        for block in blocks[:24]:
            store.put(namespace, block, bytes(MIB))
        mine = store.acquire(namespace, blocks[:24])
        for block in blocks[24:]:
            store.put(namespace, block, bytes(MIB))
        theirs = other.acquire(namespace, blocks[24:])
        assert mine.hit_length == theirs.hit_length == 24
        started = time.monotonic()
        names = keys(20, model=model)
        assert not engine.store(names, MIB).is_successful()
        assert 0.5 < time.monotonic() - started < 1.5 + SLACK_S
        assert engine.listed(model_name=model) == {}
        assert store.statistics().tiers[0].pending_blocks == 0
        # As soon as there is room, a store that waits goes on.
        task = engine.submit_store(names, MIB)
        mine.release()
        assert engine.stored(task).is_successful()
        theirs.release()


def test_stores_that_fit_one_after_another_do_not_starve_each_other(engine: Controllers, model: str) -> None:
    # Each names two ranks, in either order, and has 24 of the 32 MiB that a client may reserve.
    for turn in range(3):
        batches = []
        for number in range(4):
            halves = [
                keys(3, 100 * turn + 10 * number, model=model, kv_rank=rank(half, 2)) for half in (0, 1)
            ]
            batches.append([*halves[number % 2], *halves[1 - number % 2]])
        started = time.monotonic()
        tasks = [engine.submit_store(names, 4 * MIB) for names in batches]
        assert [engine.stored(task).is_successful() for task in tasks] == [True] * 4
        assert time.monotonic() - started < 5


def test_a_store_waits_for_a_key_that_somebody_else_writes(
    engine: Controllers, store: StoreClient, model: str
) -> None:
    names = keys(3, model=model)
    for commits in (True, False):
        version = 1 if commits else 0
        write = store.reserve(namespace_of(names[1]), [names[1].chunk_hash], 5000)
        task = engine.submit_store(names, 5000)
        wait_for(lambda: engine.load([names[0]], 5000) == [content(names[0], 5000)])
        assert engine.adapter.pop_completed_store_tasks() == {}
        if commits:
            write.views[0][:] = content(names[1], 5000, version)
            write.commit()
        else:
            write.abort()
        assert engine.stored(task).is_successful()
        expected = [content(each, 5000, version if each is names[1] else 0) for each in names]
        assert engine.fetch(names, 5000) == expected
        engine.adapter.delete(names)


def test_a_store_of_a_key_that_stays_busy_fails_by_its_deadline(
    node: Node, store: StoreClient, model: str
) -> None:
    names = keys(3, model=model)
    with Controllers(node.address, timeout_s=0.4, transfer_timeout_s=1.0) as engine:
        with store.reserve(namespace_of(names[1]), [names[1].chunk_hash], 5000):
            started = time.monotonic()
            assert not engine.store(names, 5000).is_successful()
            assert 0.5 < time.monotonic() - started < 1.0 + SLACK_S
            assert engine.adapter.report_status()["is_healthy"]
            assert engine.fetch([names[1]], 5000) == [None]
        assert engine.store(names, 5000).is_successful()
        assert engine.fetch(names, 5000) == contents(names, 5000)


def test_adapters_that_store_the_same_in_other_orders_both_succeed(node: Node, model: str) -> None:
    with Controllers(node.address) as one, Controllers(node.address) as two:
        for turn in range(4):
            names = [
                *keys(20, 100 * turn, model=model, kv_rank=rank(0, 2)),
                *keys(20, 100 * turn, model=model, kv_rank=rank(1, 2)),
            ]
            tasks = one.submit_store(names, 200 * KIB), two.submit_store(names[::-1], 200 * KIB)
            assert one.stored(tasks[0]).is_successful()
            assert two.stored(tasks[1]).is_successful()
            assert one.fetch(names, 200 * KIB) == two.fetch(names, 200 * KIB) == contents(names, 200 * KIB)


def test_what_is_here_already_is_not_copied_again(engine: Controllers, model: str) -> None:
    names = keys(4, model=model)
    assert engine.store(names[:2], 1000).bytes_transferred() == 2000
    assert engine.store(names, 1000, version=1).bytes_transferred() == 2000
    assert engine.fetch(names, 1000) == contents(names[:2], 1000) + contents(names[2:], 1000, version=1)


def test_a_key_that_is_here_with_another_length_is_replaced(engine: Controllers, model: str) -> None:
    names = keys(3, model=model)
    engine.store(names, 1000)
    assert engine.store(names, [1000, 3000, 500]).is_successful()
    assert engine.fetch(names, [1000, 3000, 500]) == contents(names, [1000, 3000, 500])
    assert engine.listed(model_name=model) == dict(zip(names, [1000, 3000, 500], strict=True))


@pytest.mark.parametrize("locked", [True, False], ids=["locked", "not locked"])
@pytest.mark.parametrize("nbytes", [999, 1001, 1, 5000])
def test_a_load_into_a_buffer_of_another_size_is_a_miss_and_writes_nothing(
    engine: Controllers, model: str, nbytes: int, locked: bool
) -> None:
    names = keys(3, model=model)
    engine.store(names, 1000)
    if locked:
        engine.lookup(names)
    loaded, buffers = engine.load_into(names, [1000, nbytes, 1000])
    assert loaded == [True, False, True]
    assert bytes_in(buffers[1]) == bytes([UNTOUCHED]) * nbytes
    if locked:
        engine.unlock(names)


def test_a_replaced_object_is_loaded_though_the_old_one_is_still_locked(
    engine: Controllers, model: str
) -> None:
    names = keys(2, model=model)
    engine.store(names, 1000)
    assert engine.lookup(names) == [True, True]
    assert engine.store(names, 2000).is_successful()
    assert engine.lookup(names) == [True, True]
    loaded = engine.load(names, 2000)
    stale = engine.load(names, 1000)
    engine.unlock(names)
    engine.unlock(names)
    assert loaded == contents(names, 2000)
    assert stale == [None, None]


# Deleting.


def test_what_is_deleted_is_hidden_at_once_and_freed_when_it_is_unlocked(
    engine: Controllers, store: StoreClient, model: str
) -> None:
    names = keys(6, model=model)
    engine.store(names, MIB)
    assert engine.lookup(names[:3]) == [True] * 3
    engine.adapter.delete(names[1:5])
    assert engine.lookup(names) == [True, False, False, False, False, True]
    assert engine.listed(model_name=model) == {names[0]: MIB, names[5]: MIB}
    assert engine.load(names[3:], MIB) == [None, None, content(names[5], MIB)]
    push_out(store)
    # The bytes of a locked object are what they were, or a miss.
    locked = engine.load(names[:3], MIB)
    assert locked[0] == content(names[0], MIB)
    assert all(got in (None, content(each, MIB)) for each, got in zip(names[1:3], locked[1:], strict=True))
    assert store.statistics().tiers[0].doomed_blocks == 2
    engine.unlock(names[:3])
    engine.unlock([names[0], names[5]])
    wait_for(lambda: store.statistics().tiers[0].doomed_blocks == 0)
    engine.adapter.delete(names)
    assert engine.listed(model_name=model) == {}


def test_what_is_stored_anew_after_a_delete_is_what_is_loaded(engine: Controllers, model: str) -> None:
    name = key(1, model=model)
    engine.store([name], 1000)
    assert engine.lookup([name]) == [True]  # and never unlocked before the end
    engine.adapter.delete([name])
    assert engine.lookup([name]) == [False]
    assert engine.store([name], 1000, version=1).is_successful()
    assert engine.lookup([name]) == [True]
    got = engine.load([name], 1000)
    engine.unlock([name])
    engine.unlock([name])
    assert got == [content(name, 1000, version=1)]


def test_what_is_deleted_while_a_lookup_finds_it_is_not_loaded_any_more(
    engine: Controllers, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = key(1, model=model)
    engine.store([name], 1000)
    add = Locks.add

    def deleted_before(*arguments: Any) -> None:
        monkeypatch.undo()
        engine.adapter.delete([name])
        add(*arguments)

    monkeypatch.setattr(Locks, "add", deleted_before)
    assert engine.lookup([name]) == [True]
    assert engine.load([name], 1000) == [None]
    engine.store([name], 1000, version=1)
    assert engine.load([name], 1000) == [content(name, 1000, version=1)]
    engine.unlock([name])


def test_listeners_hear_what_was_stored_loaded_and_deleted(engine: Controllers, model: str) -> None:
    heard, deaf = Heard(), Heard()
    engine.adapter.register_listener(heard)
    names = [key(index, model=model, salt=f"s{index % 2}") for index in range(4)]
    sizes = [100, 2000, 30_000, 400_000]
    engine.store(names, sizes)
    assert heard.stored == dict(zip(names, sizes, strict=True))
    absent = key(99, model=model)
    assert engine.fetch([*names[:2], absent], [*sizes[:2], 1]) == [*contents(names[:2], sizes[:2]), None]
    assert engine.load(names[2:3], 7) == [None]
    assert heard.accessed == names[:2]
    engine.adapter.delete([names[3], absent, names[0]])
    assert sorted(heard.deleted, key=names.index) == [names[0], names[3]]
    engine.adapter.delete(names)
    assert sorted(heard.deleted, key=names.index) == names
    assert not deaf.stored


def test_deleting_what_another_process_stored_is_no_error_in_lmcaches_sums(
    engine: Controllers, node: Node, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    complaints: list[Any] = []
    monkeypatch.setattr(
        "lmcache.v1.distributed.l2_adapters.base.logger.warning", lambda *text: complaints.append(text)
    )
    names = keys(2, model=model)
    with Controllers(node.address) as other:
        other.store(names, 1000)
    heard = Heard()
    engine.adapter.register_listener(heard)
    engine.adapter.delete(names)
    assert sorted(heard.deleted, key=names.index) == names
    assert not complaints


def test_lmcaches_eviction_outlives_a_daemon_that_dies_under_it() -> None:
    names = keys(4, salt="x")
    with Node() as node, Controllers(node.address) as engine:
        config = EvictionConfig("IsolatedLRU", trigger_watermark=0.5, eviction_ratio=0.5)
        state = L2AdapterEvictionState(0, engine.adapter, config)
        choose = state.eviction_policy.get_eviction_actions
        chosen = []

        def choose_and_kill(*arguments: Any, **options: Any) -> Any:
            if node.process.poll() is None and not chosen:
                node.kill()
            chosen.append(choose(*arguments, **options))
            return chosen[-1]

        state.eviction_policy.get_eviction_actions = choose_and_kill
        controller = L2EvictionController([state], QuotaManager())  # a salt without a quota is evicted whole
        engine.store(names, 1000)
        controller.start()
        try:
            wait_for(lambda: chosen)
            with pytest.raises(Unavailable):
                engine.adapter.delete(names)
            node.start()
            wait_for(lambda: engine.adapter.report_status()["is_healthy"])
            engine.store(names, 1000)
            wait_for(lambda: engine.listed() == {})
        finally:
            controller.stop()


def test_listeners_hear_nothing_of_a_store_that_failed(engine: Controllers, model: str) -> None:
    heard = Heard()
    engine.adapter.register_listener(heard)
    assert not engine.store(keys(2, model=model), [100, 65 * MIB]).is_successful()
    assert heard.stored == {}


# Listing.


@pytest.mark.parametrize("page_size", [1, 2, 7, 30, 31, 500, 1 << 40, 1 << 64])
def test_a_listing_has_everything_once_in_pages_of_any_size(
    engine: Controllers, model: str, page_size: int
) -> None:
    names = [
        key(index, model=model, kv_rank=rank(index % 3, 3), salt="s" * (index % 2)) for index in range(30)
    ]
    sizes = [100 + index for index in range(30)]
    engine.store(names, sizes)
    page = engine.adapter.list_l2_keys(model_name=model, page_size=page_size)
    assert len(page.entries) == min(page_size, 30)
    assert engine.listed(model_name=model, page_size=page_size) == dict(zip(names, sizes, strict=True))
    everything = engine.listed(page_size=max(page_size, 7))
    assert set(names) <= set(everything)
    assert engine.listed(model_name=f"not {model}", page_size=page_size) == {}


def test_a_listing_goes_on_though_what_it_had_reached_is_gone(engine: Controllers, model: str) -> None:
    names = [key(index, model=model, kv_rank=rank(index % 4, 4)) for index in range(40)]
    engine.store(names, 100)
    seen: set[ObjectKey] = set()
    page = engine.adapter.list_l2_keys(model_name=model, page_size=7)
    while True:
        these = [entry.key.to_object_key() for entry in page.entries]
        assert not seen & set(these)
        seen |= set(these)
        engine.adapter.delete(these)
        if page.next_page_token is None:
            break
        page = engine.adapter.list_l2_keys(model_name=model, page_size=7, cursor=page.next_page_token)
    assert seen == set(names)


@pytest.mark.parametrize(
    "cursor", ["", ":", "a", "zz:1", "00:", ":1:", "00:1:2", "00:x", "é:1", "ID:-1", f"ID:{1 << 70}", "0:0"]
)
def test_a_cursor_that_is_none_is_refused(engine: Controllers, model: str, cursor: str) -> None:
    name = key(1, model=model)
    engine.store([name], 100)
    cursor = cursor.replace("ID", namespace_of(name).id.hex())
    with pytest.raises(ValueError, match="cursor"):
        engine.adapter.list_l2_keys(cursor=cursor)
    assert engine.adapter.report_status()["is_healthy"]


@pytest.mark.parametrize("page_size", [0, -1])
def test_a_page_of_nothing_is_refused(engine: Controllers, page_size: int) -> None:
    with pytest.raises(ValueError, match=f"page_size is {page_size}"):
        engine.adapter.list_l2_keys(page_size=page_size)


@pytest.mark.parametrize(
    "strange", [{"shard": "whole"}, {"group": "all"}, {"shard": "300/301"}, {"model": "m@1"}, {"salt": "a/b"}]
)
def test_blocks_that_no_lmcache_made_are_not_listed_and_disturb_nobody(
    node: Node, engine: Controllers, store: StoreClient, model: str, strange: dict[str, str]
) -> None:
    name = key(1, model=model)
    engine.store([name], 100)
    other = replace(namespace_of(name), **strange)
    store.put(other, b"k", b"x")
    try:
        assert name in engine.listed()
        assert engine.listed(model_name=model) == {name: 100}
        assert engine.adapter.get_usage().total_bytes_used > 0
    finally:
        store.remove(other, [b"k"])


# Usage and status.


def test_usage_is_the_daemons_truth_also_for_a_fresh_adapter(
    node: Node, store: StoreClient, model: str
) -> None:
    salts = [f"{model}-{number}" for number in range(3)]
    mine = [key(index, model=model, kv_rank=rank(index % 2, 2), salt=salts[index % 3]) for index in range(12)]

    def used(engine: Controllers) -> list[int]:
        usage = engine.adapter.get_usage()
        assert usage.total_bytes_used == sum(usage.bytes_by_cache_salt.values())
        assert usage.total_capacity_bytes == 64 * MIB
        assert 0 <= usage.usage_fraction <= 1
        assert all(value > 0 for value in usage.bytes_by_cache_salt.values())
        return [usage.bytes_by_cache_salt.get(salt, 0) for salt in salts]

    with Controllers(node.address) as engine, Controllers(node.address) as other:
        assert used(engine) == [0, 0, 0]
        engine.store(mine, 10_000)
        other.store(mine, 10_000)
        assert used(engine) == used(other) == [40_000] * 3
        engine.adapter.delete(mine[:3])
        store.remove(namespace_of(mine[3]), [mine[3].chunk_hash])
        assert used(engine) == used(other) == [20_000, 30_000, 30_000]
    with Controllers(node.address) as fresh, Controllers(node.address, dtype="int8") as stranger:
        assert used(fresh) == [20_000, 30_000, 30_000]
        assert used(stranger) == [0, 0, 0]
        fresh.adapter.delete(mine)
        assert used(fresh) == [0, 0, 0]


def test_an_object_in_memory_and_on_disk_counts_once(disk_node: Node, model: str) -> None:
    with Controllers(disk_node.address) as engine, disk_node.client() as store:
        names = keys(8, model=model)
        engine.store(names, MIB)
        wait_for(lambda: store.statistics().tiers[1].blocks == 8)
        usage = engine.adapter.get_usage()
        assert dict(usage.bytes_by_cache_salt) == {"": 8 * MIB}
        assert usage.total_capacity_bytes == store.statistics().tiers[1].capacity_bytes


def test_lookups_of_what_is_not_here_leave_nothing(engine: Controllers, model: str) -> None:
    for start in range(0, 3000, 100):
        assert engine.lookup(keys(100, start, model=model)) == [False] * 100
    assert engine.adapter._locks.check() == []
    assert len(engine.adapter._locks._holds) == 0


def test_lookups_side_by_side_lock_no_more_than_their_share(
    node: Node, store: StoreClient, model: str
) -> None:
    names = keys(30, model=model)
    with Controllers(node.address, threads=8) as engine:
        engine.store(names, MIB)
        tasks = [
            engine.adapter.submit_lookup_and_lock_task(names[start : start + 6], {})
            for start in (0, 6, 12, 18, 24) * 4
        ]
        results = {}

        def all_ended() -> bool:
            for task in tasks:
                if task not in results:
                    bitmap = engine.adapter.query_lookup_and_lock_result(task)
                    if bitmap is not None:
                        results[task] = bitmap.popcount()
            return len(results) == len(tasks)

        wait_for(all_ended)
        assert set(results.values()) == {6}
        assert engine.adapter.report_status()["pinned_bytes"] <= store.limits.pinned_bytes // 2


def test_a_usage_is_a_snapshot_that_nobody_can_change(engine: Controllers, model: str) -> None:
    engine.store([key(1, model=model, salt=model)], 100)
    before = engine.adapter.get_usage()
    with pytest.raises(TypeError):
        before.bytes_by_cache_salt[model] = 0
    engine.store([key(2, model=model, salt=model)], 100)
    assert before.bytes_by_cache_salt[model] == 100


def test_the_status_counts_what_was_done(node: Node, model: str) -> None:
    names = keys(4, model=model)
    with Controllers(node.address) as engine:
        engine.store(names, 100)
        engine.store([key(8, model=model)], 65 * MIB)
        engine.lookup([*names, key(9, model=model)])
        engine.load([*names, key(9, model=model)], 100)
        status = engine.adapter.report_status()
        assert status["is_healthy"] is True
        assert status["away"] is None
        assert status["address"] == node.address
        counted = ("stored", "stored_bytes", "failed_stores", "looked_up", "found", "loaded", "loaded_bytes")
        assert [status[name] for name in counted] == [4, 400, 1, 5, 4, 4, 400]
        assert (status["failed_loads"], status["locks"], status["leases"]) == (1, 4, 1)
        engine.unlock(names)
        assert engine.adapter.report_status()["locks"] == 0
    assert engine.adapter.report_status()["is_healthy"] is False


def test_lmcache_does_not_evict_for_it(engine: Controllers) -> None:
    assert not engine.adapter.supports_global_eviction


# Tasks.


def test_three_descriptors_are_signalled_once_for_each_completion(engine: Controllers, model: str) -> None:
    adapter = engine.adapter
    stores, lookups, loads = (
        adapter.get_store_event_fd(),
        adapter.get_lookup_and_lock_event_fd(),
        adapter.get_load_event_fd(),
    )
    assert len({stores, lookups, loads}) == 3
    names = keys(2, model=model)

    def silent(*fds: int) -> bool:
        return all(_signals(fd) == 0 for fd in fds)

    assert silent(stores, lookups, loads)
    tasks = [adapter.submit_store_task(names, [memory(100), memory(100)]) for _ in range(5)]
    done: dict[int, Any] = {}
    wait_for(lambda: done.update(adapter.pop_completed_store_tasks()) or len(done) == 5)
    assert sorted(done) == sorted(tasks)
    _signals_come(stores, 5)
    assert silent(lookups, loads)
    for count in (1, 3):
        tasks = [adapter.submit_lookup_and_lock_task(names, {}) for _ in range(count)]
        _signals_come(lookups, count)
        assert all(adapter.query_lookup_and_lock_result(task) is not None for task in tasks)
        assert silent(stores, loads)
        tasks = [adapter.submit_load_task(names, [memory(100), memory(100)]) for _ in range(count)]
        _signals_come(loads, count)
        assert all(adapter.query_load_result(task) is not None for task in tasks)
        assert silent(stores, lookups)
    for _ in range(4):
        adapter.submit_unlock(names)


def _signals(fd: int) -> int:
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


def _signals_come(fd: int, count: int) -> None:
    seen = 0

    def enough() -> bool:
        nonlocal seen
        seen += _signals(fd)
        return seen >= count

    wait_for(enough)
    assert seen == count


def test_two_adapters_share_no_descriptor(node: Node) -> None:
    with Controllers(node.address) as one, Controllers(node.address) as two:
        fds = [
            ask()
            for each in (one.adapter, two.adapter)
            for ask in (each.get_store_event_fd, each.get_lookup_and_lock_event_fd, each.get_load_event_fd)
        ]
        assert len(set(fds)) == 6


def test_a_result_is_handed_out_once(engine: Controllers, model: str) -> None:
    adapter = engine.adapter
    names = keys(2, model=model)
    task = adapter.submit_store_task(names, [memory(100), memory(100)])
    wait_for(lambda: task in adapter.pop_completed_store_tasks())
    assert adapter.pop_completed_store_tasks() == {}
    task = adapter.submit_lookup_and_lock_task(names, {})
    wait_for(lambda: adapter.query_lookup_and_lock_result(task) is not None)
    assert adapter.query_lookup_and_lock_result(task) is None
    task = adapter.submit_load_task(names, [memory(100), memory(100)])
    wait_for(lambda: adapter.query_load_result(task) is not None)
    assert adapter.query_load_result(task) is None
    for unknown in (0, -1, task + 1, 1 << 70):
        assert adapter.query_load_result(unknown) is None
        assert adapter.query_lookup_and_lock_result(unknown) is None
    adapter.submit_unlock(names)


def test_many_tasks_at_once_end_each_with_its_own_result(
    engine: Controllers, store: StoreClient, model: str
) -> None:
    batches = [keys(1 + number % 5, 100 * number, model=model) for number in range(100)]
    tasks = [engine.submit_store(names, 1000) for names in batches[::2]]
    assert len(set(tasks)) == 50
    assert all(engine.stored(task).bytes_transferred() % 1000 == 0 for task in tasks)
    tasks = [engine.adapter.submit_lookup_and_lock_task(names, {}) for names in batches]
    for number in reversed(range(100)):
        assert engine.found(tasks[number], len(batches[number])) == [number % 2 == 0] * len(batches[number])
    buffers = [[memory(1000) for _ in names] for names in batches]
    tasks = [engine.adapter.submit_load_task(*each) for each in zip(batches, buffers, strict=True)]
    for number, names in enumerate(batches):
        assert engine.loaded(tasks[number], len(names)) == [number % 2 == 0] * len(names)
        if number % 2 == 0:
            assert list(map(bytes_in, buffers[number])) == contents(names, 1000)
    with threads_of(*(lambda names=names: engine.unlock(names) for names in batches[::2])):  # type: ignore[misc]
        pass
    wait_for(lambda: pinned(store) == 0)


# What it is made with.


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"adress": "unix:/x"}, "adress.*known are address, token, block_tokens, dtype, layout"),
        ({"address": 7}, "address"),
        ({"address": ""}, "address ''"),
        ({"address": "http://x"}, "address 'http://x'"),
        ({"threads": 0}, "threads is 0; give 1 to 64"),
        ({"threads": 65}, "threads is 65; give 1 to 64"),
        ({"threads": "4"}, "threads"),
        ({"timeout_s": 0}, "timeout_s is 0"),
        ({"timeout_s": -1.0}, "timeout_s is -1"),
        ({"timeout_s": float("nan")}, "timeout_s is nan"),
        ({"transfer_timeout_s": 1e9}, "transfer_timeout_s is 1000000000"),
        ({"transfer_timeout_s": 240.5}, "transfer_timeout_s is 240.5; give 0.01 to 240 seconds"),
        ({"lock_age_max_s": 0}, "lock_age_max_s is 0"),
        ({"block_tokens": 0}, "tokens is 0; give"),
        ({"block_tokens": 1 << 30}, "block_tokens is 1073741824; give"),
        ({"hash_algorithm": "md5"}, "hash algorithm is 'md5'; give one of blake3, sha256_cbor, builtin"),
        ({"dtype": "d" * 513}, "dtype is 'd+'; give"),
        ({"layout": None}, "layout"),
    ],
)
def test_a_parameter_that_is_none_is_named(node: Node, values: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        KVStoreL2Adapter({"address": node.address, **BYTES_ARE, **values})
    wait_for(lambda: not own_threads(), 5)


def test_without_names_for_its_bytes_it_says_why_it_needs_them(node: Node) -> None:
    for missing in BYTES_ARE:
        with pytest.raises(InvalidRequest, match="name what the bytes are"):
            KVStoreL2Adapter({"address": node.address, **BYTES_ARE, missing: ""})


def test_without_an_address_it_says_what_it_needs() -> None:
    with pytest.raises(InvalidRequest, match=r"address.*known are"):
        KVStoreL2Adapter({})


@pytest.mark.parametrize(
    "other",
    [{"dtype": "float8"}, {"layout": "HND"}, {"block_tokens": 16}, {"hash_algorithm": "sha256_cbor"}],
    ids=lambda other: next(iter(other)),
)
def test_adapters_for_other_bytes_or_keys_share_nothing(
    node: Node, model: str, other: dict[str, Any]
) -> None:
    names = keys(4, model=model)
    with Controllers(node.address) as one, Controllers(node.address, **other) as two:
        one.store(names[:3], 100)
        assert two.lookup(names) == [False] * 4
        assert two.listed(model_name=model) == {}
        two.store(names[2:], 100, version=1)
        assert one.fetch(names, 100) == [*contents(names[:3], 100), None]
        assert two.fetch(names, 100) == [None, None, *contents(names[2:], 100, version=1)]
        two.adapter.delete(names)
        assert one.listed(model_name=model) == dict.fromkeys(names[:3], 100)
        assert one.fetch(names[:3], 100) == contents(names[:3], 100)


def test_a_process_that_makes_other_keys_for_the_same_model_is_warned_of_once(
    node: Node, store: StoreClient, model: str, caplog: pytest.LogCaptureFixture
) -> None:
    name = key(1, model=model)
    ours = namespace_of(name)
    algorithm = ours.scheme.partition(":")[0]
    for other in (
        replace(ours, scheme=f"{algorithm}:00000000", shard="3/8", salt="theirs", group="1"),
        replace(ours, model="another", scheme=f"{algorithm}:11111111"),
        replace(ours, scheme="lmcache-engine-builtin:22222222"),
        replace(ours, scheme=f"{algorithm}:33333333", dtype="int8"),
    ):
        store.put(other, b"k", b"x")
    with Controllers(node.address) as engine:
        engine.lookup([name])
        wait_for(lambda: warned_of(caplog, model), 5)
        engine.store([replace(name, cache_salt="s"), key(1, model=model, kv_rank=rank(1, 2))], 100)
        engine.lookup([key(1, model="another yet")])  # so that others are looked at again
        time.sleep(1.5)
    (warning,) = warned_of(caplog, model)
    assert f"{model} has blocks whose keys are made by {algorithm}:00000000" in warning
    assert f"makes them by {ours.scheme}" in warning
    assert "PYTHONHASHSEED" in warning


@pytest.mark.parametrize("other", [{"hash_algorithm": "sha256_cbor"}, {"block_tokens": 16}], ids=str)
def test_two_processes_that_start_together_and_share_nothing_both_say_so(
    node: Node, model: str, other: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    names = keys(2, model=model)
    with Controllers(node.address) as one, Controllers(node.address, **other) as two:
        assert one.lookup(names) == two.lookup(names) == [False] * 2
        one.store(names, 100)
        two.store(names, 100)
        wait_for(lambda: len(warned_of(caplog, model)) == 2, 5)
    assert len(set(warned_of(caplog, model))) == 2


def warned_of(caplog: pytest.LogCaptureFixture, model: str) -> list[str]:
    """The warnings about a model's blocks."""
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    return [line for line in lines if line.startswith(f"{model} has blocks")]


# TCP, where bytes are copied.


def over_tcp(node: Node, **parameters: Any) -> Controllers:
    return Controllers(f"tcp://{node.endpoint('data')}", **{"token": TOKEN, **parameters})


def test_over_tcp_with_the_token_all_is_the_same(node: Node, model: str) -> None:
    names = [key(index, model=model, kv_rank=rank(index % 2, 2)) for index in range(8)]
    sizes = [1 + 99_991 * index for index in range(8)]
    with over_tcp(node) as engine, Controllers(node.address) as local:
        assert engine.store(names, sizes).bytes_transferred() == sum(sizes)
        assert engine.lookup([*names, key(99, model=model)]) == [True] * 8 + [False]
        assert engine.load(names, sizes) == contents(names, sizes)
        assert local.fetch(names, sizes) == contents(names, sizes)
        engine.unlock(names)
        assert engine.load(names, sizes) == contents(names, sizes)
        assert engine.listed(model_name=model) == dict(zip(names, sizes, strict=True))
        engine.adapter.delete(names)
        assert engine.fetch(names, sizes) == [None] * 8


def test_over_tcp_a_lookup_moves_no_blocks(node: Node, store: StoreClient, model: str) -> None:
    names = keys(8, model=model)
    with over_tcp(node) as engine:
        engine.store(names, MIB)
        before = store.statistics().bytes_sent
        assert engine.lookup(names) == [True] * 8
        assert engine.load(names, MIB) == contents(names, MIB)
        engine.unlock(names)
        # Once each, by the load or, if it keeps them, by the lookup.
        assert store.statistics().bytes_sent - before < 9 * MIB


def test_the_token_may_come_from_the_environment(
    node: Node, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVSTORE_TOKEN", TOKEN)
    with Controllers(f"tcp://{node.endpoint('data')}") as engine:
        assert engine.adapter.report_status()["is_healthy"]


@pytest.mark.parametrize("token", ["wrong", None])
def test_without_the_right_token_the_daemon_is_away_and_it_is_said(
    node: Node,
    model: str,
    token: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.delenv("KVSTORE_TOKEN", raising=False)
    names = keys(2, model=model)
    with over_tcp(node, token=token) as engine:
        assert not engine.store(names, 100).is_successful()
        assert engine.lookup(names) == [False, False]
        assert engine.load(names, 100) == [None, None]
        status = engine.adapter.report_status()
        assert status["is_healthy"] is False
        assert "token" in status["away"]
    assert sum("token" in record.getMessage() for record in caplog.records) == 1
    assert TOKEN not in caplog.text


def test_the_address_of_nobody_is_an_adapter_that_misses(tmp_path: Path, model: str) -> None:
    adapter = adapter_for(f"unix:{tmp_path}/none.sock")
    assert "none.sock" in adapter.report_status()["away"]
    adapter.close()
    adapter.close()
