"""The L2 adapter while its daemon is killed, stopped, absent or another one: LMCache goes on without it."""

import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from connectors.copying import bytes_of
from kvstore.block import Namespace
from kvstore.client import KEYS_MAX, StoreClient, WriteLease, copy
from kvstore.errors import DeadlineExceeded, TierError
from kvstore.hashing import lmcache_namespace
from kvstore.keeper import Keeper
from tests.lmcache_objects import (
    BYTES_ARE,
    IGNORED,
    KIB,
    MIB,
    UNTOUCHED,
    Controllers,
    ObjectKey,
    Unavailable,
    bytes_in,
    content,
    contents,
    key,
    keys,
    memory,
    rank,
    threads_of,
    wrong,
)
from tests.node import (
    SLACK_S,
    Node,
    child,
    empty,
    idle,
    node_with_bad_disk,
    open_files,
    own_threads,
    pinned,
    wait_for,
    written,
)
from tests.proxy import Proxy

pytestmark = pytest.mark.filterwarnings(IGNORED)
# Whose threads do an adapter's work.
POOLS: Final = ("copy", "load", "lookup", "store", "wait")
TOKEN: Final = "a-token-that-stays-at-home"


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    """A daemon that every test leaves running, with nothing pinned or reserved."""
    with Node() as node:
        yield node
        node.check()


@pytest.fixture(autouse=True)
def nothing_is_left(node: Node) -> Iterator[None]:
    """As it says, and no thread of ours."""
    yield
    if node.process.poll() is not None:  # the test has failed before it could
        node.start()
    with node.client() as store:
        wait_for(lambda: idle(store), 5)
        assert store.check() == []
    wait_for(lambda: not own_threads(), 5)


@pytest.fixture(scope="module")
def node_and_faults() -> Iterator[tuple[Node, Path]]:
    """A daemon with an arena of 16 MiB and a disk, and the file that says what the disk does."""
    with node_with_bad_disk() as both:
        yield both


@pytest.fixture
def bad_disk(node_and_faults: tuple[Node, Path]) -> Iterator[tuple[Node, Path]]:
    """The same, which every test leaves running."""
    yield node_and_faults
    if node_and_faults[0].process.poll() is not None:
        node_and_faults[0].start()


def healthy(engine: Controllers) -> bool:
    """What the adapter says of itself."""
    return bool(engine.adapter.report_status()["is_healthy"])


def timed(work: Callable[[], object]) -> float:
    """How long it takes."""
    started = time.monotonic()
    work()
    return time.monotonic() - started


# Threads.


def test_work_needs_no_thread_that_did_not_run_before(
    node: Node, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    names = keys(24, model="threads")
    start = threading.Thread.start

    def start_or_not(thread: threading.Thread) -> None:
        if thread.name.startswith(tuple(f"kvstore-{pool}_" for pool in POOLS)):
            raise RuntimeError("can't start new thread")
        start(thread)

    with Controllers(node.address) as engine, monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start_or_not)
        tasks = [engine.submit_store(names[part::4], MIB) for part in range(4)]
        assert all(engine.stored(task).is_successful() for task in tasks)
        assert engine.load(names, MIB) == contents(names, MIB)
        assert engine.fetch(names, MIB) == contents(names, MIB)
    assert not any(record.exc_info for record in caplog.records)


@pytest.mark.parametrize("kind", ["store", "load"])
def test_nobody_copies_on_when_a_task_has_failed(
    node: Node, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = keys(24, model=f"over {kind}")
    over, late = threading.Event(), []
    submit, given = ThreadPoolExecutor.submit, itertools.count()

    def copy_slowly(target: memoryview, source: memoryview) -> None:
        time.sleep(0.02)
        if over.is_set():
            late.append(len(target))
        copy(target, source)

    def refuse(pool: Any, *work: Any) -> Any:
        if pool._thread_name_prefix in ("kvstore-copy", "kvstore-wait") and next(given) == 1:
            raise RuntimeError("no more")
        return submit(pool, *work)

    with Controllers(node.address) as engine:
        assert engine.store(names, MIB).is_successful()
        monkeypatch.setattr("connectors.copying.copy", copy_slowly)
        monkeypatch.setattr("connectors.batches.copy", copy_slowly)
        monkeypatch.setattr(ThreadPoolExecutor, "submit", refuse)
        if kind == "store":
            assert not engine.store(keys(8, 100, model=f"over {kind}"), MIB).is_successful()
        else:
            assert engine.load(names, MIB) == [None] * 24
        over.set()
    assert late == []


def test_a_request_that_makes_no_sense_is_refused_or_ends_with_misses(node: Node) -> None:
    nothing: Any = None
    no_keys: Any = ["no", "keys"]
    with Controllers(node.address) as engine:
        with pytest.raises(TypeError):
            engine.adapter.submit_lookup_and_lock_task(nothing, {})
        with pytest.raises(TypeError):
            engine.adapter.submit_load_task(nothing, [])
        assert engine.lookup(no_keys) == [False, False]
        assert engine.load(no_keys, 1) == [None, None]


# All or none.


def all_found(node: Node, names: list[ObjectKey]) -> list[bool]:
    """Which of them are there, as another process sees it."""
    with Controllers(node.address) as other:
        found = other.lookup(names)
        other.unlock([each for each, here in zip(names, found, strict=True) if here])
        return found


def test_a_store_that_waits_in_vain_for_a_busy_key_leaves_nothing_of_it(node: Node) -> None:
    names = [key(index, model="busy", kv_rank=rank(index % 2, 2)) for index in range(7)]
    present, busy = names[2], names[3]
    with Controllers(node.address, timeout_s=0.4, transfer_timeout_s=0.8) as engine, node.client() as store:
        assert engine.store([present], 5000).is_successful()
        namespace = lmcache_namespace(busy.model_name, busy.kv_rank, **BYTES_ARE)
        with store.reserve(namespace, [busy.chunk_hash], 5000) as write:
            assert write.granted
            results = []
            assert timed(lambda: results.append(engine.store(names, 5000))) < 0.8 + SLACK_S
            assert not results[0].is_successful()
            assert all_found(node, names) == [each == present for each in names]
        assert engine.fetch([present], 5000) == contents([present], 5000)
        # And nothing of it is in the way.
        assert engine.store(names, 5000).bytes_transferred() == 6 * 5000
        assert engine.fetch(names, 5000) == contents(names, 5000)


def test_a_store_of_many_requests_that_fails_between_two_of_them_leaves_nothing(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = keys(KEYS_MAX + 10, model="many requests")
    commit, commits = WriteLease.commit, itertools.count()

    def commit_once(*arguments: Any, **options: Any) -> None:
        if next(commits):
            raise TierError("no more")
        commit(*arguments, **options)

    with Controllers(node.address) as engine:
        assert engine.store(names[5:6], 100).is_successful()
        with monkeypatch.context() as patched:
            patched.setattr(WriteLease, "commit", commit_once)
            assert not engine.store(names, 100).is_successful()
        assert next(commits) == 2
        assert all_found(node, names) == [index == 5 for index in range(len(names))]
        assert engine.store(names, 100).bytes_transferred() == (KEYS_MAX + 9) * 100


# Killed.


def test_a_daemon_that_is_killed_at_any_moment_costs_misses_and_never_a_wrong_byte(node: Node) -> None:
    rng = random.Random()
    batches = [keys(14, 100 * number, kv_rank=rank(number % 2, 2)) for number in range(3)]
    expected = {each: content(each, MIB) for names in batches for each in names}
    untouched = bytes([UNTOUCHED]) * MIB
    with Controllers(node.address, timeout_s=1.0, transfer_timeout_s=2.0, patience_s=10) as engine:
        over = threading.Event()
        loaded = itertools.count()
        done = [0, 0]

        def writes() -> None:
            sources = [[memory(MIB, expected[each]) for each in names] for names in batches]
            for names, objects in itertools.cycle(zip(batches, sources, strict=True)):
                if over.is_set():
                    return
                started = time.monotonic()
                result = engine.stored(engine.adapter.submit_store_task(names, objects))
                assert time.monotonic() - started < 2.0 + 1.0 + SLACK_S
                done[0] += 1
                if not result.is_successful():
                    over.wait(0.005)  # or this process would take the cores from a daemon that starts

        def reads() -> None:
            buffers = [memory(MIB) for _ in batches[0]]
            for names in itertools.cycle(batches):
                if over.is_set():
                    return
                for buffer in buffers:
                    copy(bytes_of(buffer.byte_array), memoryview(untouched))
                started = time.monotonic()
                found = engine.lookup(names)
                assert time.monotonic() - started < 1.0 + SLACK_S
                is_in = engine.loaded(engine.adapter.submit_load_task(names, buffers), len(names))
                assert time.monotonic() - started < 3.0 + SLACK_S
                engine.unlock([each for each, here in zip(names, found, strict=True) if here])
                for each, here, buffer in zip(names, is_in, buffers, strict=True):
                    if here:
                        next(loaded)
                        assert bytes_in(buffer) == expected[each]
                done[1] += 1
                if not any(found):
                    over.wait(0.005)

        with threads_of(writes, reads, reads):
            try:
                for _ in range(2):
                    before = list(done)
                    wait_for(lambda before=before: done[0] > before[0] and done[1] > before[1])  # type: ignore[misc]
                    moment = time.monotonic() + rng.uniform(0, 0.05)
                    wait_for(lambda moment=moment: time.monotonic() > moment)  # type: ignore[misc]
                    node.kill()
                    wait_for(lambda: not healthy(engine))
                    node.start()
                    wait_for(lambda: healthy(engine))
            finally:
                over.set()
        assert next(loaded) > 0
        # It works again without being told.
        assert engine.store(batches[0], MIB).is_successful()
        assert engine.fetch(batches[0], MIB) == contents(batches[0], MIB)
        with node.client() as store:
            wait_for(lambda: pinned(store) == 0)


def kill_in_a_copy(node: Node, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let the daemon be killed when so many blocks have been copied, by whomever."""
    numbers, counting = itertools.count(), threading.Lock()

    def copy_or_kill(target: memoryview, source: memoryview) -> None:
        with counting:
            if next(numbers) == number:
                node.kill()
        copy(target, source)

    monkeypatch.setattr("connectors.copying.copy", copy_or_kill)
    monkeypatch.setattr("connectors.batches.copy", copy_or_kill)


@pytest.mark.parametrize("number", [0, 5])
def test_a_daemon_that_is_killed_in_the_middle_of_a_store_has_none_of_it(
    bad_disk: tuple[Node, Path],
    number: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    node, _ = bad_disk
    model = f"store{number}"
    old, new = keys(4, model=model), keys(8, 100, model=model)
    with Controllers(node.address, timeout_s=1.0, transfer_timeout_s=2.0) as engine:
        assert engine.store(old, 500 * KIB).is_successful()
        with node.client() as store:
            wait_for(lambda: written(store))
        kill_in_a_copy(node, monkeypatch, number)
        results = []
        assert timed(lambda: results.append(engine.store([*new, *old], 500 * KIB))) < 2.0 + SLACK_S
        assert not results[0].is_successful()
        monkeypatch.undo()
        assert node.process.poll() is not None
        assert engine.fetch([*old, *new], 500 * KIB) == [None] * 12
        node.start()
        wait_for(lambda: healthy(engine))
        # What was on disk is back, and nothing else.
        assert engine.fetch([*old, *new], 500 * KIB) == [*contents(old, 500 * KIB), *[None] * 8]
        assert engine.store([*new, *old], 500 * KIB).bytes_transferred() == 8 * 500 * KIB
        assert engine.fetch([*old, *new], 500 * KIB) == contents([*old, *new], 500 * KIB)
    assert_all_is_well(node, caplog)


@pytest.mark.parametrize("locked", [True, False], ids=["locked", "not locked"])
def test_a_daemon_that_is_killed_in_the_middle_of_a_load_costs_misses_and_no_wrong_byte(
    bad_disk: tuple[Node, Path],
    locked: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    node, _ = bad_disk
    names = keys(12, model=f"load{locked}")
    # One thread, so that what is not locked comes in windows of four, one after the other.
    with Controllers(node.address, timeout_s=1.0, transfer_timeout_s=2.0, threads=1) as engine:
        assert engine.store(names, 500 * KIB).is_successful()
        with node.client() as store:
            wait_for(lambda: written(store))
        if locked:
            assert engine.lookup(names) == [True] * 12
        kill_in_a_copy(node, monkeypatch, 2)
        got: list[bytes | None] = []
        assert timed(lambda: got.extend(engine.load(names, 500 * KIB))) < 2.0 + SLACK_S
        monkeypatch.undo()
        assert node.process.poll() is not None
        assert wrong(names, got, 500 * KIB) == []
        # What was locked is copied though the daemon is dead; of what was not, only what had been asked for.
        assert locked or None in got
        assert engine.adapter.report_status()["failed_loads"] == got.count(None)
        engine.unlock(names)
        node.start()
        wait_for(lambda: healthy(engine))
        assert engine.fetch(names, 500 * KIB) == contents(names, 500 * KIB)
        status = engine.adapter.report_status()
        assert (status["locks"], status["leases"]) == (0, 0)
    assert_all_is_well(node, caplog)


def assert_all_is_well(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is held, a recount finds nothing wrong, and no task has raised anything."""
    with node.client() as store:
        wait_for(lambda: idle(store), 5)
        assert store.check() == []
    assert not any(record.exc_info for record in caplog.records)
    assert "Traceback" not in node.log, node.log


def test_locks_of_before_a_restart_are_undone_and_promise_nothing(node: Node) -> None:
    names = keys(4)
    with Controllers(node.address) as engine:
        engine.store(names, MIB)
        assert engine.lookup(names) == [True] * 4
        node.kill()
        # What the arena had is still mapped, but nobody vouches for it.
        got = engine.load(names, MIB)
        assert wrong(names, got, MIB) == []
        node.start()
        wait_for(lambda: healthy(engine))
        assert engine.load(names, MIB) == [None] * 4
        assert engine.lookup(names) == [False] * 4
        assert engine.store(names, MIB).is_successful()
        assert engine.lookup(names) == [True] * 4
        assert engine.load(names, MIB) == contents(names, MIB)
        engine.unlock(names)
        engine.unlock(names)
        with node.client() as store:
            wait_for(lambda: pinned(store) == 0)
        status = engine.adapter.report_status()
        assert (status["locks"], status["leases"]) == (0, 0)


def test_an_adapter_may_be_made_before_the_daemon_runs(node: Node) -> None:
    node.kill()
    names = keys(3)
    with Controllers(node.address) as engine:
        assert not healthy(engine)
        assert "node.sock" in engine.adapter.report_status()["away"]
        assert not engine.store(names, 100).is_successful()
        assert engine.lookup(names) == [False] * 3
        assert engine.load(names, 100) == [None] * 3
        engine.unlock(names)
        usage = engine.adapter.get_usage()
        assert (usage.total_bytes_used, usage.total_capacity_bytes) == (0, 0)
        with pytest.raises(ConnectionError):
            engine.adapter.delete(names)
        with pytest.raises(Unavailable, match=r"node\.sock"):  # LMCache answers 503
            engine.adapter.list_l2_keys()
        node.start()
        wait_for(lambda: healthy(engine))
        assert engine.store(names, 100).is_successful()
        assert engine.fetch(names, 100) == contents(names, 100)
        before = engine.adapter.get_usage()
        assert before.total_bytes_used == 300
        node.kill()
        # Nobody is to be evicted while that cannot be done: to fail at it would end LMCache's eviction.
        while_away = engine.adapter.get_usage()
        assert (while_away.total_bytes_used, dict(while_away.bytes_by_cache_salt)) == (300, {})
        node.start()


# Stopped.


def test_a_daemon_that_hangs_costs_its_deadline_once_and_then_nothing(
    node: Node, capsys: pytest.CaptureFixture[str]
) -> None:
    names = keys(8)
    with Controllers(node.address, timeout_s=0.6, transfer_timeout_s=1.2) as engine:
        engine.store(names, 100 * KIB)
        assert engine.lookup(names[:4]) == [True] * 4
        with node.stopped():
            tasks = {
                "lookup": lambda: engine.lookup(names),
                "store": lambda: engine.store(keys(8, 100), 100 * KIB),
                "load": lambda: engine.load(names[4:], 100 * KIB),
            }
            seconds: dict[str, float] = {}

            def run(name: str, task: Callable[[], object]) -> None:
                seconds[name] = timed(task)

            with threads_of(*(lambda each=each: run(*each) for each in tasks.items())):  # type: ignore[misc]
                pass
            assert seconds["lookup"] < 0.6 + SLACK_S
            assert seconds["store"] < 1.2 + SLACK_S
            assert seconds["load"] < 1.2 + SLACK_S
            assert not healthy(engine)
            lookup_s = timed(lambda: [engine.lookup(names) for _ in range(1000)]) / 1000
            store_s = timed(lambda: [engine.store(names[:1], 100) for _ in range(200)]) / 200
            load_s = timed(lambda: [engine.load(names[4:5], 100) for _ in range(200)]) / 200
            with capsys.disabled():
                print(
                    f"\nan absent daemon costs a lookup of 8 {lookup_s * 1e6:.0f} us, "
                    f"a store {store_s * 1e6:.0f} us, a load {load_s * 1e6:.0f} us; "
                    f"its hanging cost them {seconds}"
                )
            assert lookup_s < 1e-3
            assert store_s < 2e-3
            assert load_s < 2e-3
            # What is locked is here: nobody need be asked for it.
            assert engine.load(names[:4], 100 * KIB) == contents(names[:4], 100 * KIB)
        wait_for(lambda: healthy(engine), 5)
        assert engine.fetch(names, 100 * KIB) == contents(names, 100 * KIB)
        engine.unlock(names[:4])
        # What came of the calls that nobody waited for is undone.
        with node.client() as store:
            wait_for(lambda: idle(store), 5)


def test_a_first_lookup_of_a_daemon_that_hangs_ends_in_time_too(node: Node) -> None:
    # Its namespaces have not been opened yet, nor compared.
    with Controllers(node.address, timeout_s=0.6) as engine, node.stopped():
        names = [key(index, kv_rank=rank(index % 4, 4), salt=f"s{index}") for index in range(16)]
        assert timed(lambda: engine.lookup(names)) < 0.6 + SLACK_S
        assert not healthy(engine)


def test_a_daemon_that_hangs_is_noticed_by_a_store_that_waits_for_room(node: Node) -> None:
    namespace, names = Namespace("full"), [b"%d" % number for number in range(30)]
    with (
        Controllers(node.address, timeout_s=0.4, transfer_timeout_s=5.0) as engine,
        node.client() as one,
        node.client() as two,
        one.reserve(namespace, names, MIB, wait_s=5) as mine,
        two.reserve(Namespace("full too"), names, MIB, wait_s=5) as theirs,
    ):
        assert (mine.granted, theirs.granted) == (names, names)
        refused = one.statistics().counters.refused_blocks
        task = engine.submit_store(keys(8, model="waiting"), MIB)
        wait_for(lambda: one.statistics().counters.refused_blocks > refused)
        with node.stopped():
            started = time.monotonic()
            assert not engine.stored(task).is_successful()
            # It asks anew every second, and an answer may be 0.2 s late.
            assert time.monotonic() - started < 1.2 + SLACK_S
            assert not healthy(engine)
        wait_for(lambda: healthy(engine))


# A slow disk.


def test_lookups_at_a_daemon_that_is_slow_but_not_away_are_over_in_time(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, delay_s = Keeper.call, 0.0

    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(delay_s)
        return call(*arguments, **options)

    monkeypatch.setattr(Keeper, "call", slow)
    names = keys(80)
    with Controllers(node.address, timeout_s=0.8, threads=8) as engine:
        assert engine.store(names, 1000).is_successful()
        delay_s = 0.35
        parts = [names[start : start + 10] for start in range(0, 80, 10)]
        started = time.monotonic()
        tasks = [engine.adapter.submit_lookup_and_lock_task(part, {}) for part in parts]
        found = [engine.found(task, 10) for task in tasks]
        assert time.monotonic() - started < 0.8 + SLACK_S / 4
        assert [True] * 10 in found
        assert healthy(engine)


@pytest.mark.parametrize("fault", ["1.0", "hang", "error"])
def test_replacing_blocks_of_another_length_waits_for_no_disk(
    bad_disk: tuple[Node, Path], fault: str
) -> None:
    node, faults = bad_disk
    names = keys(4, model=f"forgetting {fault}")
    with Controllers(node.address, timeout_s=0.6, transfer_timeout_s=1.2) as engine:
        assert engine.store(names, 1000).is_successful()
        with node.client() as store:
            wait_for(lambda: written(store))
        faults.write_text(f"forgetting {fault}\n")
        try:
            results = []
            assert timed(lambda: results.append(engine.store(names, 2000))) < 1.2
            assert results[0].bytes_transferred() == 8000
            assert engine.fetch(names, 2000) == contents(names, 2000)
        finally:
            faults.unlink()
    with node.client() as store:
        wait_for(lambda: not store.statistics().tiers[1].breaker_open, 10)


def test_replacing_blocks_of_another_length_takes_one_request_for_each_namespace(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove, removed = StoreClient.remove, []

    def slow(store: StoreClient, namespace: Namespace, names: list[bytes], **options: Any) -> int:
        time.sleep(delay_s)
        removed.append(len(names))
        return remove(store, namespace, names, **options)

    names = [key(index, model="lengths", salt=f"s{index % 8}") for index in range(80)]
    with Controllers(node.address, timeout_s=0.4, transfer_timeout_s=1.0) as engine:
        assert engine.store(names, 1000).is_successful()
        monkeypatch.setattr(StoreClient, "remove", slow)
        delay_s = 0.0
        assert engine.store(names, 2000).bytes_transferred() == 80 * 2000
        assert removed == [10] * 8
        assert engine.fetch(names, 2000) == contents(names, 2000)
        # And looks at its deadline in between.
        delay_s = 0.3
        results = []
        assert timed(lambda: results.append(engine.store(names, 3000))) < 1.0 + 0.3
        assert not results[0].is_successful()
        assert healthy(engine)


def test_what_comes_from_a_slow_disk_is_asked_for_until_it_is_here(
    bad_disk: tuple[Node, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each question waits for a part only of the time that the disk takes.
    monkeypatch.setattr("connectors.batches._PATIENCE_S", 0.1)
    node, faults = bad_disk
    names = keys(8, model="slow disk")
    with Controllers(node.address) as engine, node.client() as store:
        assert engine.store(names, 256 * KIB).is_successful()
        wait_for(lambda: written(store))
        for number in range(20):
            store.put(Namespace("flood"), b"%d" % number, bytes(MIB))
        wait_for(lambda: written(store))
        faults.write_text("reading 0.4\n")
        try:
            started = time.monotonic()
            assert engine.load(names, 256 * KIB) == contents(names, 256 * KIB)
            assert time.monotonic() - started > 0.4
        finally:
            faults.unlink()
        assert healthy(engine)


# A slow network.


@pytest.fixture(scope="module")
def node_with_port() -> Iterator[Node]:
    """A daemon with a data port, that every test leaves running, with nothing pinned or reserved."""
    with Node("64MiB", "--data", "127.0.0.1:0", environ={"KVSTORE_TOKEN": TOKEN}) as node:
        yield node
        with node.client() as store:
            wait_for(lambda: idle(store), 5)
        node.check()


@contextmanager
def far_away(node: Node, bytes_per_s: float) -> Iterator[Controllers]:
    """An adapter at the other end of a slow network."""
    host, port = node.endpoint("data").rsplit(":", 1)
    with (
        Proxy((host, int(port)), bytes_per_s) as proxy,
        Controllers(proxy.address, token=TOKEN, timeout_s=1.6, transfer_timeout_s=2.0) as engine,
    ):
        yield engine


def lookups_meanwhile(engine: Controllers, names: list[ObjectKey], over: threading.Event) -> list[float]:
    """How long lookups take until it is over."""
    seconds = []
    while not over.is_set():
        seconds.append(timed(lambda: engine.lookup(names)))
        engine.unlock(names)
    return seconds


@pytest.mark.parametrize("kind", ["store", "load"])
def test_over_a_slow_network_bytes_have_their_time_and_questions_do_not_wait_for_them(
    node_with_port: Node, kind: str
) -> None:
    names, few, over = keys(32, model=f"slow {kind}"), keys(2, 100, model=f"slow {kind}"), threading.Event()
    with Controllers(node_with_port.address) as local, far_away(node_with_port, 8e6) as engine:
        assert local.store(few, MIB).is_successful()
        if kind == "load":
            assert local.store(names, MIB).is_successful()
        seconds: list[float] = []
        with threads_of(lambda: seconds.extend(lookups_meanwhile(engine, few, over))):
            try:
                # Of 32 MiB, 9 can be there in time.
                started = time.monotonic()
                if kind == "store":
                    assert not engine.store(names, MIB).is_successful()
                else:
                    got = engine.load(names, MIB)
                    assert None in got
                    assert wrong(names, got, MIB) == []
                assert time.monotonic() - started < 2.0 + SLACK_S / 4
            finally:
                over.set()
        assert max(seconds) < 0.8
        assert healthy(engine)
        if kind == "store":
            assert all_found(node_with_port, names) == [False] * 32
        # And less, in the time that it has: the connection that was closed amid a block is back at once.
        wait_for(lambda: engine.fetch(few, MIB) == contents(few, MIB), 2.0 + SLACK_S)
        assert engine.store(few, MIB + 1).is_successful()
        assert local.fetch(few, MIB + 1) == contents(few, MIB + 1)


# Another version.


@contextmanager
def daemon_of_another_version(node: Node) -> Iterator[None]:
    """In the place of the node's daemon, which must be dead."""
    code = "import kvstore.protocol; kvstore.protocol.MAJOR += 1; from kvstore.__main__ import main; main()"
    command = [sys.executable, "-c", code, "serve", "--dram", "16MiB", "--socket", str(node.socket)]
    with subprocess.Popen([*command, "--http", "127.0.0.1:0"], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert "kvstore ready" in process.stdout.readline()
            yield
        finally:
            process.kill()


def test_a_daemon_of_another_version_is_away_until_the_right_one_is_back(node: Node) -> None:
    names = keys(3)
    with Controllers(node.address, timeout_s=1.0) as engine:
        assert engine.store(names, 100).is_successful()
        node.kill()
        with daemon_of_another_version(node):
            assert engine.lookup(names) == [False] * 3
            wait_for(lambda: "protocol" in str(engine.adapter.report_status()["away"]))
            assert "use a client of the daemon's version" in engine.adapter.report_status()["away"]
            assert not engine.store(names, 100).is_successful()
            assert engine.load(names, 100) == [None] * 3
            with Controllers(node.address, timeout_s=1.0) as fresh:
                assert "use a client of the daemon's version" in fresh.adapter.report_status()["away"]
                assert fresh.lookup(names) == [False] * 3
        node.start()
        wait_for(lambda: healthy(engine))
        assert engine.store(names, 100).is_successful()
        assert engine.fetch(names, 100) == contents(names, 100)


# Ranks.


def test_a_hole_in_one_rank_is_a_hole_of_that_rank_only(node: Node) -> None:
    ranks = [keys(10, kv_rank=rank(number, 2)) for number in range(2)]
    with Controllers(node.address) as one, Controllers(node.address) as two:
        one.store(ranks[0], 1000)
        two.store([each for index, each in enumerate(ranks[1]) if index != 4], 1000)
        expected = [True] * 10 + [index != 4 for index in range(10)]
        names = [*ranks[0], *ranks[1]]
        assert one.lookup(names) == expected
        got = one.load(names, 1000)
        assert [each is not None for each in got] == expected
        assert wrong(names, got, 1000) == []
        one.unlock([each for each, here in zip(names, expected, strict=True) if here])
        with node.client() as store:
            wait_for(lambda: pinned(store) == 0)


# Closing.


def test_closing_waits_for_the_tasks_under_way_and_no_longer(node: Node) -> None:
    names = keys(20)
    engine = Controllers(node.address, timeout_s=0.6, transfer_timeout_s=2.0)
    with node.client() as store:
        buffers = [memory(MIB, content(each, MIB)) for each in names]
        for start in range(0, 20, 5):
            engine.adapter.submit_store_task(names[start : start + 5], buffers[start : start + 5])
        targets = [memory(MIB) for _ in names]
        for _ in range(50):
            engine.adapter.submit_lookup_and_lock_task(names, {})
            engine.adapter.submit_load_task(names, targets)
        assert timed(engine.close) < 2.0 + SLACK_S
        wait_for(lambda: [each.name for each in own_threads()] == ["kvstore-ends"], 5)  # the other client's
        wait_for(lambda: idle(store), 5)
    engine.close()


def test_closing_is_bounded_when_the_daemon_hangs(node: Node) -> None:
    names, more = keys(8, model="closing"), keys(2, 100, model="closing")
    wait_for(lambda: not own_threads(), 5)
    descriptors = open_files(os.getpid())
    engine = Controllers(node.address, timeout_s=0.4, transfer_timeout_s=0.6)
    engine.store(names, MIB)
    engine.lookup(names[:4])
    with node.stopped():
        for _ in range(10):
            engine.adapter.submit_lookup_and_lock_task(names, {})
            engine.adapter.submit_load_task(names, [memory(MIB) for _ in names])
            engine.adapter.submit_store_task(more, [memory(MIB), memory(MIB)])
        assert timed(engine.close) < 0.6 + 0.4 + SLACK_S
        wait_for(lambda: not own_threads(), 5)
    wait_for(lambda: open_files(os.getpid()) <= descriptors, 5)


@pytest.mark.parametrize("kind", ["lookup", "load", "store"])
def test_what_a_closed_adapter_had_asked_a_hanging_daemon_for_is_given_back(node: Node, kind: str) -> None:
    # Its process lives on: LMCache's server may remove an adapter and add another one.
    names = keys(8, model=kind)
    with node.client() as store:
        engine = Controllers(node.address, timeout_s=0.4, transfer_timeout_s=0.6)
        engine.store(names, MIB)
        with node.stopped():
            for number in range(3):
                if kind == "lookup":
                    engine.adapter.submit_lookup_and_lock_task(names, {})
                elif kind == "load":
                    engine.adapter.submit_load_task(names, [memory(MIB) for _ in names])
                else:
                    engine.adapter.submit_store_task(keys(1, 100 + number, model=kind), [memory(MIB)])
            engine.close()
        wait_for(lambda: store.statistics().connections == 1)
        wait_for(lambda: pinned(store) == 0, 2)
        wait_for(lambda: store.statistics().quarantined_leases == 0, 2)


def test_what_a_closing_client_still_waited_for_is_granted_to_nobody(node: Node) -> None:
    namespace = Namespace(model="goodbye")
    with node.client() as store:
        empty(store)
        other = node.client(timeout_s=0.2)
        held = other.reserve(namespace, [b"held"], 24 * MIB)
        assert held.granted
        with node.client() as third:
            full = third.reserve(namespace, [b"full"], 28 * MIB)
            with node.stopped(), pytest.raises(DeadlineExceeded):
                other.reserve(namespace, [b"waited for"], 20 * MIB, wait_s=0.1)
            with node.stopped(), pytest.raises(DeadlineExceeded):
                other.acquire(namespace, [b"full"], wait_s=0.1)
            other.close()
            wait_for(lambda: store.statistics().connections == 2)
            full.abort()
        wait_for(lambda: store.statistics().quarantined_leases == 0, 2)
        wait_for(lambda: store.statistics().tiers[0].used_bytes == 0, 2)


def test_fifty_adapters_opened_and_closed_leave_nothing(node: Node) -> None:
    names = keys(2)
    Controllers(node.address).close()
    wait_for(lambda: not own_threads(), 5)
    before, theirs = open_files(os.getpid()), open_files(node.pid)
    for number in range(50):
        with Controllers(node.address) as engine:
            if number % 5 == 0:
                engine.store(names, 1000)
                assert engine.lookup(names) == [True, True]
                assert engine.load(names, 1000) == contents(names, 1000)
    wait_for(lambda: not own_threads(), 5)
    wait_for(lambda: open_files(os.getpid()) <= before, 5)
    wait_for(lambda: open_files(node.pid) <= theirs, 5)


# Those who forget.


def test_ten_thousand_lookups_without_an_unlock_hold_at_most_half_and_die_with_their_process(
    node: Node, tmp_path: Path
) -> None:
    names = keys(60)
    with node.client() as store:
        with Controllers(node.address) as engine:
            for start in range(0, 60, 10):
                assert engine.store(names[start : start + 10], MIB).is_successful()

        def forget() -> None:
            engine = Controllers(node.address)
            for number in range(10_000):
                engine.lookup([names[number % 60]])
            (tmp_path / "done").touch()
            signal.pause()

        with child(forget) as pid:
            wait_for((tmp_path / "done").exists, 60)
            tier = store.statistics().tiers[0]
            assert 0 < tier.pinned_bytes <= tier.capacity_bytes // 2
            for index in range(100):
                store.put(Namespace("others"), b"%d" % index, bytes(MIB), timeout_s=5)
            with Controllers(node.address) as engine:
                assert engine.store(keys(16, 500), MIB).is_successful()
                assert engine.fetch(keys(16, 500), MIB) == contents(keys(16, 500), MIB)
            os.kill(pid, signal.SIGKILL)
            killed = time.monotonic()
            os.waitpid(pid, 0)
            wait_for(lambda: pinned(store) == 0)
            assert time.monotonic() - killed < 1.0


# All at once.


@pytest.mark.parametrize("nvme", [False, True], ids=["memory", "memory and disk"])
def test_threads_that_do_everything_at_once_see_only_right_bytes(tmp_path: Path, nvme: bool) -> None:
    names = [key(index, kv_rank=rank(index % 2, 2), salt="s" * (index % 3 == 0)) for index in range(48)]
    sizes = {each: (1 + index % 4) * 200 * KIB + index for index, each in enumerate(names)}
    expected = {each: content(each, sizes[each]) for each in names}
    flags = ["--nvme", f"{tmp_path}/nvme:256MiB"] if nvme else []
    with Node("16MiB", *flags) as node:
        with Controllers(node.address, threads=3) as engine, node.client() as store:
            over = time.monotonic() + 1.0
            done = {"store": 0, "load": 0, "delete": 0, "loaded": 0}

            def some(rng: random.Random) -> tuple[list[ObjectKey], list[int]]:
                chosen = rng.sample(names, rng.randint(1, 8))
                return chosen, [sizes[each] for each in chosen]

            def writes(rng: random.Random) -> None:
                while time.monotonic() < over:
                    chosen, lengths = some(rng)
                    buffers = [memory(sizes[each], expected[each]) for each in chosen]
                    engine.stored(engine.adapter.submit_store_task(chosen, buffers))
                    done["store"] += 1
                    assert [len(bytes_in(each)) for each in buffers] == lengths

            def reads(rng: random.Random) -> None:
                while time.monotonic() < over:
                    chosen, lengths = some(rng)
                    found = engine.lookup(chosen)
                    is_in, buffers = engine.load_into(chosen, lengths)
                    engine.unlock([each for each, here in zip(chosen, found, strict=True) if here])
                    for each, here, buffer in zip(chosen, is_in, buffers, strict=True):
                        if here:
                            done["loaded"] += 1
                            assert bytes_in(buffer) == expected[each], each
                    done["load"] += 1

            def deletes(rng: random.Random) -> None:
                pause = threading.Event()
                while time.monotonic() < over:
                    engine.adapter.delete(some(rng)[0])
                    done["delete"] += 1
                    pause.wait(0.02)

            roles = [writes, writes, reads, reads, reads, deletes]
            with threads_of(
                *(lambda role=role, seed=seed: role(random.Random(seed)) for seed, role in enumerate(roles))  # type: ignore[misc]
            ):
                pass
            assert min(done.values()) > 5, done
            wait_for(lambda: idle(store), 5)
            status = engine.adapter.report_status()
            assert (status["locks"], status["leases"]) == (0, 0)
            assert status["is_healthy"]
        node.check()
        assert "Traceback" not in node.log, node.log
