"""64 clients on random operations: kills, forks and cut connections among them, every byte checked."""

import os
import random
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

import pytest

from kvstore.block import Namespace
from kvstore.client import StoreClient
from tests.forked import FORKS
from tests.node import Node, open_files, private_bytes, threads, wait_for
from tests.stress_client import CHAINS, NAMESPACES, chain, content, length_of, live
from tests.test_client import MIB, fill, keys

STRESS_S = float(os.environ.get("KVSTORE_STRESS_S", "30"))
# Beside a tier below.
STRESS_NVME_S = STRESS_S / 6
PROCESSES = 16
CLIENTS_EACH = 4


class Worker:
    """A process of `tests.stress_client`."""

    def __init__(self, address: str, seed: str, log: Path) -> None:
        # Forked from one that has imported all there is: replacing a dead one takes milliseconds.
        self.pipe, theirs = FORKS.Pipe()
        self.process = FORKS.Process(target=live, args=(address, seed, CLIENTS_EACH, str(log), theirs))
        self.process.start()
        theirs.close()

    def ready(self) -> None:
        """Wait until all its clients are at work."""
        assert self.pipe.poll(60), "a worker did not get ready"
        assert self.pipe.recv() == "ready"

    def kill(self) -> None:
        """SIGKILL, whatever it is doing."""
        self.process.kill()
        self.stop()

    def stop(self) -> int | None:
        """Tell it to end, and wait until it has; its exit code."""
        self.pipe.close()
        self.process.join(90)
        return self.process.exitcode


class Crowd:
    """Many of them; what they write into `log` is what is wrong."""

    def __init__(self, address: str, log: Path, seed: int) -> None:
        self._address = address
        self._log = log
        self._seed = seed
        self._started = 0
        self._random = random.Random(seed)
        log.touch()
        self._workers = [self._start() for _ in range(PROCESSES)]
        for worker in self._workers:
            worker.ready()

    def rage(self, duration_s: float) -> None:
        """Let them work, and kill one now and then; another takes its place."""
        deadline = time.monotonic() + duration_s
        while (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, self._random.expovariate(2.0)))
            index = self._random.randrange(PROCESSES)
            self._workers[index].kill()
            self._workers[index] = self._start()
            assert self.findings() == ""

    def stop(self) -> None:
        """Let them end what they hold; each must do so without complaint."""
        while self._workers:
            status = self._workers.pop().stop()
            assert (status, self.findings()) == (0, "")

    def findings(self) -> str:
        """What they have found wrong."""
        return self._log.read_text()

    def _start(self) -> Worker:
        self._started += 1
        return Worker(self._address, f"{self._seed}-{self._started}", self._log)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.kill()


def footprint(node: Node) -> tuple[int, int]:
    """Descriptors and threads of the daemon."""
    return open_files(node.pid), threads(node.pid)


def settle(store: StoreClient) -> None:
    """Wait until nobody holds anything, and see that the daemon finds no fault in itself."""

    def idle() -> bool:
        now = store.statistics()
        held = sum(tier.pinned_blocks + tier.pending_blocks + tier.doomed_blocks for tier in now.tiers)
        return now.connections == 1 and now.leases + now.quarantined_leases + held == 0

    try:
        wait_for(idle)
    except AssertionError:
        pytest.fail(f"somebody still holds something: {store.statistics()}")
    assert store.check() == []


def verify_all(store: StoreClient) -> int:
    """Read all there is and compare it with what it must be; how many blocks that are."""
    found = 0
    known = {key for number in range(CHAINS) for key in chain(number)}
    below = len(store.statistics().tiers) > 1
    for namespace in NAMESPACES:
        cursor: int | None = 0
        while cursor is not None:
            page = store.list(namespace, cursor)
            cursor = page.cursor
            assert cursor is None or below
            for key, length in zip(page.keys, page.lengths, strict=True):
                assert key in known
                assert length == length_of(namespace, key)
                data = store.get(namespace, key)
                # What the tier below has dropped leaves for good when others are loaded.
                assert data == content(namespace, key).tobytes() or (data is None and below)
                found += data is not None
    return found


@pytest.mark.timeout(240 + 2 * STRESS_S)
def test_64_clients_that_die_fork_and_lose_connections_see_only_what_was_committed(tmp_path: Path) -> None:
    # As the lease limits of one client are parts of the arena, this is a tight place for 64.
    with Node("128MiB") as node, node.client() as store:
        seed = time.time_ns() % 1_000_000
        print(f"seed {seed}")
        with Crowd(node.address, tmp_path / "warm", seed) as crowd:
            crowd.rage(STRESS_S / 4)
            crowd.stop()
        settle(store)
        before, private_before = footprint(node), private_bytes(node.pid)
        with Crowd(node.address, tmp_path / "findings", seed + 1) as crowd:
            crowd.rage(STRESS_S)
            crowd.stop()
        settle(store)
        assert verify_all(store) > 0
        settle(store)
        assert footprint(node) == before
        grown = private_bytes(node.pid) - private_before
        counters = store.statistics().counters
        print(f"{grown >> 10} KiB more; {counters}")
        # What the heap keeps for later varies by some 3 MiB; a buffer left over from each connection, by 20.
        assert grown < 8 * MIB
        assert min(counters.evicted_blocks, counters.moved_blocks, counters.hit_blocks) > 0
        assert "Traceback" not in node.log


@pytest.mark.timeout(240 + 2 * STRESS_NVME_S)
def test_64_clients_on_an_arena_a_quarter_of_what_they_use_and_a_disk_below_it(tmp_path: Path) -> None:
    # Some 300 MiB are in use, of which the disk has room for half.
    # The machine's disk is shared, so it may be late.
    with TemporaryDirectory(prefix="kvstore-disk-") as disk:
        path = tmp_path / "node.toml"
        path.write_text(f'[nvme]\ndirectories = ["{disk}:160MiB"]\ntimeout_s = 60\n')
        with Node("72MiB", "--config", str(path)) as node, node.client(timeout_s=60) as store:
            seed = time.time_ns() % 1_000_000
            print(f"seed {seed}")
            with Crowd(node.address, tmp_path / "findings", seed) as crowd:
                crowd.rage(STRESS_NVME_S)
                crowd.stop()
            wait_for(lambda: store.statistics().tiers[1].backlog_blocks == 0, 60)
            settle(store)
            assert verify_all(store) > 0
            settle(store)
            below = store.statistics().tiers[1]
            print(below.counters)
            assert min(below.counters.written_blocks, below.counters.read_blocks) > 100
            assert (below.counters.damaged_blocks, below.counters.failed_calls) == (0, 0)
            assert below.counters.breaker_opened == 0
            node.kill()
            node.start()
            wait_for(lambda: _answers(store))
            assert store.statistics().tiers[1].counters.recovered_blocks > 0
            assert verify_all(store) > 0
            assert store.statistics().tiers[1].counters.damaged_blocks == 0
            settle(store)
            assert "Traceback" not in node.log


def test_a_lease_from_before_a_restart_ends_no_lease_from_after_it(node: Node, namespace: Namespace) -> None:
    with node.client() as store:
        fill(store, namespace, keys(1))
        old = store.acquire(namespace, keys(1))
        node.kill()
        node.start()
        wait_for(lambda: not old.valid)
        wait_for(lambda: _answers(store))
        fill(store, namespace, keys(1))
        leases = [store.acquire(namespace, keys(1)) for _ in range(8)]
        assert old.id < leases[0].id, "numbers of leases go on where the last daemon stopped, and above"
        old.release()
        assert store.statistics().leases == len(leases)
        for lease in leases:
            lease.release()
        wait_for(lambda: store.statistics().leases == 0)


def _answers(store: StoreClient) -> bool:
    try:
        store.statistics()
    except ConnectionError:
        return False
    return True
