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
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvstore.block import Namespace
from kvstore.client import StoreClient
from kvstore.errors import DeadlineExceeded
from tests.lmcache_objects import (
    IGNORED,
    KIB,
    MIB,
    SLACK_S,
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
from tests.node import Node, child, open_files, wait_for

pytestmark = pytest.mark.filterwarnings(IGNORED)


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
        wait_for(lambda: pinned(store) == store.statistics().tiers[0].pending_blocks == 0, 5)
        assert store.check() == []
    wait_for(lambda: own_threads() == [], 5)


@contextmanager
def stopped(node: Node) -> Iterator[None]:
    """The daemon does nothing for a while."""
    os.kill(node.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(node.pid, signal.SIGCONT)


def healthy(engine: Controllers) -> bool:
    """What the adapter says of itself."""
    return bool(engine.adapter.report_status()["is_healthy"])


def pinned(store: StoreClient) -> int:
    """Blocks that somebody has pinned."""
    return store.statistics().tiers[0].pinned_blocks


def own_threads() -> list[str]:
    """Threads of ours in this process."""
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("kvstore-"))


def timed(work: Callable[[], object]) -> float:
    """How long it takes."""
    started = time.monotonic()
    work()
    return time.monotonic() - started


# Killed.


def test_a_daemon_that_is_killed_at_any_moment_costs_misses_and_never_a_wrong_byte(node: Node) -> None:
    rng = random.Random()
    batches = [keys(14, 100 * number, kv_rank=rank(number % 2, 2)) for number in range(3)]
    expected = {each: content(each, MIB) for names in batches for each in names}
    with Controllers(node.address, timeout_s=1.0, transfer_timeout_s=2.0, patience_s=10) as engine:
        over = threading.Event()
        loaded = itertools.count()
        done = [0, 0]

        def writes() -> None:
            for names in itertools.cycle(batches):
                if over.is_set():
                    return
                seconds = timed(lambda names=names: engine.store(names, MIB))  # type: ignore[misc]
                assert seconds < 2.0 + 1.0 + SLACK_S
                done[0] += 1

        def reads() -> None:
            for names in itertools.cycle(batches):
                if over.is_set():
                    return
                started = time.monotonic()
                found = engine.lookup(names)
                assert time.monotonic() - started < 1.0 + SLACK_S
                is_in, buffers = engine.load_into(names, MIB)
                assert time.monotonic() - started < 3.0 + SLACK_S
                engine.unlock([each for each, here in zip(names, found, strict=True) if here])
                for each, here, buffer in zip(names, is_in, buffers, strict=True):
                    if here:
                        next(loaded)
                        assert bytes_in(buffer) == expected[each]
                done[1] += 1

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
        with stopped(node):
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
            wait_for(lambda: pinned(store) == store.statistics().tiers[0].pending_blocks == 0, 5)


def test_a_first_lookup_of_a_daemon_that_hangs_ends_in_time_too(node: Node) -> None:
    # Its namespaces have not been opened yet, nor compared.
    with Controllers(node.address, timeout_s=0.6) as engine, stopped(node):
        names = [key(index, kv_rank=rank(index % 4, 4), salt=f"s{index}") for index in range(16)]
        assert timed(lambda: engine.lookup(names)) < 0.6 + SLACK_S
        assert not healthy(engine)


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
        for _ in range(50):
            engine.adapter.submit_lookup_and_lock_task(names, {})
            engine.adapter.submit_load_task(names, [memory(MIB) for _ in names])
        assert timed(engine.close) < 2.0 + SLACK_S
        wait_for(lambda: own_threads() == ["kvstore-ends"], 5)  # the other client's
        wait_for(lambda: pinned(store) == store.statistics().tiers[0].pending_blocks == 0, 5)
    engine.close()


def test_closing_is_bounded_when_the_daemon_hangs() -> None:
    names = keys(8)
    wait_for(lambda: own_threads() == [], 5)
    with Node() as node:
        descriptors = open_files(os.getpid())
        engine = Controllers(node.address, timeout_s=0.6, transfer_timeout_s=1.0)
        engine.store(names, MIB)
        engine.lookup(names[:4])
        with stopped(node):
            for _ in range(10):
                engine.adapter.submit_lookup_and_lock_task(names, {})
                engine.adapter.submit_load_task(names, [memory(MIB) for _ in names])
                engine.adapter.submit_store_task(keys(2, 100), [memory(MIB), memory(MIB)])
            assert timed(engine.close) < 1.0 + 0.6 + SLACK_S
            wait_for(lambda: own_threads() == [], 5)
        wait_for(lambda: open_files(os.getpid()) <= descriptors, 5)


@pytest.mark.parametrize("kind", ["lookup", "load", "store"])
def test_what_a_closed_adapter_had_asked_a_hanging_daemon_for_is_given_back(kind: str) -> None:
    # Its process lives on: LMCache's server may remove an adapter and add another one.
    names = keys(8)
    with Node() as node, node.client() as store:
        engine = Controllers(node.address, timeout_s=0.4, transfer_timeout_s=0.6)
        engine.store(names, MIB)
        with stopped(node):
            for number in range(3):
                if kind == "lookup":
                    engine.adapter.submit_lookup_and_lock_task(names, {})
                elif kind == "load":
                    engine.adapter.submit_load_task(names, [memory(MIB) for _ in names])
                else:
                    engine.adapter.submit_store_task(keys(1, 100 + number), [memory(MIB)])
            engine.close()
        wait_for(lambda: store.statistics().connections == 1)
        wait_for(lambda: pinned(store) == 0, 2)
        wait_for(lambda: store.statistics().quarantined_leases == 0, 2)


def test_what_a_closing_client_still_waited_for_is_granted_to_nobody() -> None:
    namespace = Namespace(model="goodbye")
    with Node() as node, node.client() as store:
        other = node.client(timeout_s=0.2)
        held = other.reserve(namespace, [b"held"], 24 * MIB)
        assert held.granted
        with node.client() as third:
            full = third.reserve(namespace, [b"full"], 28 * MIB)
            with stopped(node), pytest.raises(DeadlineExceeded):
                other.reserve(namespace, [b"waited for"], 20 * MIB, wait_s=0.1)
            with stopped(node), pytest.raises(DeadlineExceeded):
                other.acquire(namespace, [b"full"], wait_s=0.1)
            other.close()
            wait_for(lambda: store.statistics().connections == 2)
            full.abort()
        wait_for(lambda: store.statistics().quarantined_leases == 0, 2)
        wait_for(lambda: store.statistics().tiers[0].used_bytes == 0, 2)


def test_fifty_adapters_opened_and_closed_leave_nothing(node: Node) -> None:
    names = keys(2)
    Controllers(node.address).close()
    wait_for(lambda: own_threads() == [], 5)
    before, theirs = open_files(os.getpid()), open_files(node.pid)
    for number in range(50):
        with Controllers(node.address) as engine:
            if number % 5 == 0:
                engine.store(names, 1000)
                assert engine.lookup(names) == [True, True]
                assert engine.load(names, 1000) == contents(names, 1000)
    wait_for(lambda: own_threads() == [], 5)
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
            wait_for(lambda: pinned(store) == store.statistics().tiers[0].pending_blocks == 0, 5)
            status = engine.adapter.report_status()
            assert (status["locks"], status["leases"]) == (0, 0)
            assert status["is_healthy"]
        node.check()
        assert "Traceback" not in node.log, node.log
