"""A daemon with an NVMe tier, as its users see it: what comes back, how fast, and what it says of itself."""

import hashlib
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from kvstore.block import HitLength, Namespace
from kvstore.client import StoreClient, copy
from kvstore.errors import ConfigError
from kvstore.statistics import TierState
from tests.node import Node, wait_for
from tests.test_client import MIB, keys

KIB = 1 << 10
BLOCK = 2 * MIB
# What a busy machine may add to a call's deadline.
NOISE_S = 1.0


@pytest.fixture
def disk() -> Iterator[Path]:
    """A directory for a tier; nothing of it stays."""
    with tempfile.TemporaryDirectory(prefix="kvstore-disk-") as folder:
        yield Path(folder) / "nvme"


def noise(key: bytes, nbytes: int) -> bytes:
    """A block's bytes: every key's are others, and at every place."""
    seed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest())
    return np.random.Generator(np.random.SFC64(seed)).bytes(nbytes)


def publish(store: StoreClient, namespace: Namespace, names: Sequence[bytes], nbytes: int = BLOCK) -> None:
    """Store blocks in chains that fit, as many at once as there is room for."""
    deadline = time.monotonic() + 30
    missing = list(names)
    while missing:
        assert time.monotonic() < deadline, f"no room for {len(missing)} blocks of {nbytes} bytes"
        count = max(1, min(256, 4 * MIB // nbytes))
        with store.reserve(namespace, missing[:count], nbytes, wait_s=1.0) as write:
            for key, view in zip(write.granted, write.views, strict=True):
                copy(view, memoryview(noise(key, nbytes)))
            if write.granted:
                write.commit()
            missing = missing[len(write.granted) :]


def nvme(store: StoreClient, number: int = 1) -> TierState:
    """What the daemon says of its tier below the arena."""
    return store.statistics().tiers[number]


def written(store: StoreClient) -> bool:
    """Whether nothing waits to be written, nor is being written."""
    return all(t.backlog_blocks + t.pending_blocks == 0 for t in store.statistics().tiers[1:])


def restart(node: Node) -> None:
    """SIGKILL and start."""
    node.kill()
    node.start()


def alive(store: StoreClient) -> bool:
    """Whether the client has found its daemon again."""
    try:
        store.statistics()
    except ConnectionError:
        return False
    return True


def wrong(store: StoreClient, namespace: Namespace, names: Sequence[bytes], nbytes: int) -> list[bytes]:
    """Which of these blocks come back as anything but what they were."""
    return [key for key in names if store.get(namespace, key, timeout_s=20) != noise(key, nbytes)]


def metrics(node: Node) -> dict[str, float]:
    """All samples of /metrics."""
    with urllib.request.urlopen(f"http://{node.endpoint('http')}/metrics", timeout=20) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, _, value in (x.rpartition(" ") for x in lines if x[0] != "#")}


def config(folder: Path, text: str) -> str:
    path = folder / "node.toml"
    path.write_text(text)
    return str(path)


def listed(store: StoreClient, namespace: Namespace) -> list[bytes]:
    """All pages of a listing."""
    names: list[bytes] = []
    page = store.list(namespace)
    names += page.keys
    while page.cursor is not None:
        page = store.list(namespace, page.cursor)
        names += page.keys
    return names


# What comes back.


def test_a_hundred_blocks_survive_sigkill_bit_for_bit(disk: Path, namespace: Namespace) -> None:
    names = keys(100)
    with Node("64MiB", "--nvme", f"{disk}:512MiB") as node:
        with node.client() as store:
            for key in names:
                store.put(namespace, key, noise(key, BLOCK), timeout_s=30)
            wait_for(lambda: written(store), 60)
        restart(node)
        with node.client() as store:
            assert nvme(store).counters.recovered_blocks == 100
            assert store.hit_length(namespace, names) == HitLength(0, 0, 100, 100)
            assert wrong(store, namespace, names, BLOCK) == []
            assert nvme(store).counters.damaged_blocks == 0
        node.check()


def test_waiting_loads_a_prefix_in_order_and_not_waiting_loads_nothing(
    disk: Path, namespace: Namespace
) -> None:
    names = keys(12)
    faults = disk.parent / "faults"
    environ = {"KVSTORE_FAULTS": str(faults)}
    flags = ("64MiB", "--nvme", f"{disk}:64MiB")
    with Node(*flags, environ=environ, module="tests.faulty_daemon") as node:
        with node.client() as store:
            publish(store, namespace, names)
            wait_for(lambda: written(store))
        restart(node)
        with node.client() as store:
            faults.write_text("reading 0.3\n")
            with store.acquire(namespace, names, wait_s=0) as read:
                assert read.hit_length == 0
            assert store.hit_each([(namespace, key) for key in names]) == [True] * 12
            assert store.hit_length(namespace, names) == HitLength(0, 0, 12, 12)
            with store.acquire_each([(namespace, key) for key in names]) as each:
                assert list(each.views) == [None] * 12
            assert nvme(store).counters.read_blocks == nvme(store).pinned_blocks == 0
            # Twelve one after the other would take 3.6 s; four threads take 0.9 s for 64 MiB / 4 at a time.
            started = time.monotonic()
            with store.acquire(namespace, names, wait_s=30) as read:
                took_s = time.monotonic() - started
                assert [bytes(view) for view in read.views] == [noise(key, BLOCK) for key in names]
            assert 0.3 <= took_s < 3
            assert nvme(store).counters.read_blocks == 12
        node.check()


def test_a_wait_that_is_too_short_gives_the_head_and_the_rest_arrives(
    disk: Path, namespace: Namespace
) -> None:
    names = keys(24)
    faults = disk.parent / "faults"
    environ = {"KVSTORE_FAULTS": str(faults)}
    flags = ("128MiB", "--nvme", f"{disk}:64MiB")
    with Node(*flags, environ=environ, module="tests.faulty_daemon") as node:
        with node.client() as store:
            publish(store, namespace, names, MIB)
            wait_for(lambda: written(store))
        restart(node)
        with node.client() as store:
            faults.write_text("reading 0.5\n")
            started = time.monotonic()
            with store.acquire(namespace, names, wait_s=0.8) as read:
                assert time.monotonic() - started < 0.8 + NOISE_S
                assert 1 <= read.hit_length < 24
                assert [bytes(view) for view in read.views] == [
                    noise(key, MIB) for key in names[: read.hit_length]
                ]
            wait_for(lambda: store.hit_length(namespace, names).dram == 24)
        node.check()


def test_many_readers_of_one_prefix_load_it_once(disk: Path, namespace: Namespace) -> None:
    names = keys(16)
    with Node("128MiB", "--nvme", f"{disk}:64MiB") as node:
        with node.client() as store:
            publish(store, namespace, names)
            wait_for(lambda: written(store))
        restart(node)
        found: list[bool] = []

        def read() -> None:
            with node.client() as store, store.acquire(namespace, names, wait_s=20) as lease:
                found.append([bytes(view) for view in lease.views] == [noise(key, BLOCK) for key in names])

        readers = [threading.Thread(target=read) for _ in range(6)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        assert found == [True] * 6
        with node.client() as store:
            assert nvme(store).counters.read_blocks == 16
        node.check()


def test_hits_get_acquire_each_and_list_see_both_tiers(disk: Path, namespace: Namespace) -> None:
    names = keys(64)
    with Node("16MiB", "--nvme", f"{disk}:128MiB") as node, node.client() as store:
        publish(store, namespace, names, MIB)
        wait_for(lambda: written(store))
        hits = store.hit_length(namespace, names)
        assert (hits.gpu, hits.dram, hits.nvme, hits.remote) == (0, 0, 64, 64)
        assert wrong(store, namespace, names[:3], MIB) == []
        hits = store.hit_length(namespace, names)
        assert 3 <= hits.dram <= hits.nvme == 64
        items = [(namespace, key) for key in [names[0], b"nobody", names[60], names[30]]]
        with store.acquire_each(items, wait_s=20) as each:
            seen = [None if view is None else bytes(view) for view in each.views]
        assert seen == [noise(names[0], MIB), None, noise(names[60], MIB), noise(names[30], MIB)]
        assert store.hit_each(items) == [True, False, True, True]
        assert set(listed(store, namespace)) == set(names)
        assert store.remove(namespace, names[:32]) == 32
        assert set(listed(store, namespace)) == set(names[32:])
        assert store.hit_length(namespace, names) == HitLength()
        node.check()


def test_a_listing_has_every_key_also_while_blocks_move_between_tiers(
    disk: Path, namespace: Namespace
) -> None:
    names = keys(9000)
    with Node("16MiB", "--nvme", f"{disk}:64MiB") as node, node.client() as store:
        publish(store, namespace, names, 4096)
        wait_for(lambda: written(store), 60)
        assert set(listed(store, namespace)) == set(names)
        seen: list[bytes] = []
        cursor: int | None = 0
        pages = 0
        while cursor is not None:
            page = store.list(namespace, cursor)
            assert set(page.lengths) <= {4096}
            seen += page.keys
            cursor = page.cursor
            # What has not been listed comes up, and what has been goes down for it.
            start = (pages * 1777) % 8800
            with store.acquire_each([(namespace, key) for key in names[start : start + 200]], wait_s=20):
                pass
            pages += 1
            assert pages < 20
        assert set(seen) == set(names)
        node.check()


def test_it_is_the_same_over_tcp(disk: Path, namespace: Namespace) -> None:
    names = keys(40)
    with Node("32MiB", "--nvme", f"{disk}:256MiB", "--data", "127.0.0.1:0") as node:
        address = f"tcp://{node.endpoint('data')}"
        with StoreClient.connect(address) as store:
            for key in names:
                store.put(namespace, key, noise(key, BLOCK), timeout_s=30)
            wait_for(lambda: written(store))
        restart(node)
        with StoreClient.connect(f"tcp://{node.endpoint('data')}") as store:
            assert store.hit_length(namespace, names) == HitLength(0, 0, 40, 40)
            with store.acquire(namespace, names[:6]) as read:
                assert read.hit_length == 0
            with store.acquire(namespace, names[:6], wait_s=20) as read:
                assert [bytes(view) for view in read.views] == [noise(key, BLOCK) for key in names[:6]]
            with store.acquire_each([(namespace, names[33]), (namespace, b"?")], wait_s=20) as each:
                assert each.views[1] is None
                assert bytes(each.views[0] or b"") == noise(names[33], BLOCK)
            assert wrong(store, namespace, names, BLOCK) == []
            assert set(listed(store, namespace)) == set(names)
            assert store.remove(namespace, names) == 40
        node.check()


# Prefixes that do not fit.


def test_a_prefix_bigger_than_the_arena_gives_what_can_be_pinned_in_time(
    disk: Path, namespace: Namespace
) -> None:
    names = keys(300)
    with Node("64MiB", "--nvme", f"{disk}:512MiB") as node, node.client() as store:
        publish(store, namespace, names, MIB)
        wait_for(lambda: written(store), 60)
        for wait_s in (2.0, 2.0):
            started = time.monotonic()
            with store.acquire(namespace, names, wait_s=wait_s) as read:
                took_s = time.monotonic() - started
                assert took_s < wait_s + NOISE_S
                # Half of the arena is what one client may pin.
                assert 24 <= read.hit_length <= 32
                assert [bytes(view) for view in read.views] == [
                    noise(key, MIB) for key in names[: read.hit_length]
                ]
        assert store.put(namespace, b"more", noise(b"more", MIB)) is None
        node.check()


def test_a_reader_of_4096_small_blocks_gets_them_all_piece_by_piece(disk: Path, namespace: Namespace) -> None:
    names = keys(4096)
    with Node("64MiB", "--nvme", f"{disk}:320MiB") as node, node.client() as store:
        publish(store, namespace, names, 64 * KIB)
        wait_for(lambda: written(store), 60)
        assert store.hit_length(namespace, names).nvme == 4096
        started = time.monotonic()
        with store.acquire(namespace, names, wait_s=2) as read:
            assert time.monotonic() - started < 2 + NOISE_S
            assert read.hit_length <= 512
        for start in range(0, 4096, 256):
            part = names[start : start + 256]
            with store.acquire(namespace, part, wait_s=20) as read:
                assert read.hit_length == 256, start
                for key, view in zip(part[::16], list(read.views)[::16], strict=True):
                    assert bytes(view) == noise(key, 64 * KIB)
        node.check()


# What was removed.


@pytest.mark.parametrize("write", ["behind", "on-eviction"])
def test_what_was_removed_stays_removed_over_a_kill_right_after(
    disk: Path, tmp_path: Path, namespace: Namespace, write: str
) -> None:
    text = f'[dram]\ncapacity = "16MiB"\n[nvme]\ndirectories = ["{disk}:128MiB"]\nwrite = "{write}"\n'
    names = keys(40)
    removed, kept = names[::2], names[1::2]
    with Node("16MiB", "--config", config(tmp_path, text)) as node:
        with node.client() as store:
            for key in names:
                store.put(namespace, key, noise(key, MIB), timeout_s=30)
            if write == "behind":
                wait_for(lambda: written(store))
            below = {key for key in names if store.hit_length(namespace, [key]).nvme}
            assert below == set(names)
            # Some of them are being loaded just now.
            with store.acquire(namespace, names[:4], wait_s=0):
                pass
            count = store.remove(namespace, removed)
            node.kill()
            assert count == 20
        node.start()
        with node.client() as store:
            assert set(listed(store, namespace)) <= set(kept)
            assert [key for key in removed if store.get(namespace, key, timeout_s=1) is not None] == []
            back = [key for key in kept if store.hit_length(namespace, [key]).nvme]
            assert len(back) >= (20 if write == "behind" else 8)
            assert wrong(store, namespace, back, MIB) == []
            # And a new life of a removed key is not confused with the old one.
            store.put(namespace, removed[0], b"anew")
            assert store.get(namespace, removed[0]) == b"anew"
        node.check()


def test_what_is_removed_while_it_is_written_does_not_come_back(disk: Path, namespace: Namespace) -> None:
    names = keys(24)
    with Node("64MiB", "--nvme", f"{disk}:128MiB") as node:
        with node.client() as store:
            for turn in range(3):
                publish(store, namespace, names, BLOCK)
                store.remove(namespace, names)
                if turn == 1:
                    wait_for(lambda: written(store))
            node.kill()
        node.start()
        with node.client() as store:
            assert listed(store, namespace) == []
            assert store.hit_length(namespace, names) == HitLength()
        node.check()


# What it says of itself.


def test_statistics_of_both_tiers_add_up_and_are_metrics(disk: Path, namespace: Namespace) -> None:
    names = keys(96)
    with Node("16MiB", "--nvme", f"{disk}:64MiB") as node, node.client() as store:
        publish(store, namespace, names, MIB)
        wait_for(lambda: written(store))
        dram, below = store.statistics().tiers
        assert (below.name, below.medium, below.capacity_bytes) == ("nvme", "nvme", 64 * MIB)
        assert below.ready_bytes == below.capacity_bytes
        assert below.counters.written_blocks == 96
        assert below.counters.written_bytes == 96 * MIB
        assert below.counters.evicted_blocks == 96 - below.blocks
        assert below.counters.evicted_bytes == 96 * MIB - below.block_bytes
        assert below.used_bytes == below.block_bytes == below.blocks * MIB
        assert dram.counters.evicted_blocks == 96 - dram.blocks
        assert (below.backlog_blocks, below.backlog_bytes) == (0, 0)
        assert below.counters.dropped_blocks == 0
        assert not below.breaker_open
        assert 0 < below.eviction_age_s < 60
        assert sum(below.writes.counts) >= 96 * MIB // BLOCK
        assert below.writes.sum_s > 0
        assert sum(below.reads.counts) == 0

        there = [key for key in names if store.hit_length(namespace, [key]).nvme]
        for key in there:
            assert store.get(namespace, key) == noise(key, MIB)
        assert store.get(namespace, names[0]) is None
        dram_after, after = store.statistics().tiers
        asked = len(there) + 1
        loaded = after.counters.read_blocks
        assert loaded == after.counters.hit_blocks
        assert loaded == sum(after.reads.counts)  # one call a block of a MiB
        assert after.counters.read_bytes == loaded * MIB
        assert after.counters.missed_blocks - below.counters.missed_blocks == 1
        hits = dram_after.counters.hit_blocks - dram.counters.hit_blocks
        misses = dram_after.counters.missed_blocks - dram.counters.missed_blocks
        assert hits + misses == asked
        assert misses == loaded + 1
        assert store.statistics().counters.hit_blocks >= len(there)

        samples = metrics(node)
        final = nvme(store)
        label = '{medium="nvme",tier="nvme"}'
        for name in ("blocks", "block_bytes", "used_bytes", "capacity_bytes", "backlog_blocks"):
            assert samples[f"kvstore_tier_{name}{label}"] == getattr(final, name), name
        assert samples[f"kvstore_tier_breaker_open{label}"] == 0
        for name in (
            *("hit_blocks", "missed_blocks", "evicted_blocks", "evicted_bytes", "read_blocks", "read_bytes"),
            *("written_blocks", "written_bytes", "dropped_blocks", "damaged_blocks", "failed_calls"),
            *("late_calls", "breaker_opened", "recovered_blocks"),
        ):
            assert samples[f"kvstore_tier_{name}_total{label}"] == getattr(final.counters, name), name
        assert samples[f"kvstore_tier_reads_seconds_count{label}"] == sum(final.reads.counts)
        assert samples[f"kvstore_tier_writes_seconds_count{label}"] == sum(final.writes.counts)
        node.check()


# Configurations.


def test_two_directories_share_the_blocks(disk: Path, namespace: Namespace) -> None:
    names = keys(60)
    one, two = disk.with_name("one"), disk.with_name("two")
    with Node("32MiB", "--nvme", f"{one}:128MiB", "--nvme", f"{two}:128MiB") as node:
        with node.client() as store:
            publish(store, namespace, names, MIB)
            wait_for(lambda: written(store))
            first, second = store.statistics().tiers[1:]
            assert (first.name, second.name) == ("nvme0", "nvme1")
            assert first.blocks + second.blocks == 60
            assert min(first.blocks, second.blocks) >= 15
        restart(node)
        with node.client() as store:
            assert store.hit_length(namespace, names) == HitLength(0, 0, 60, 60)
            assert wrong(store, namespace, names, MIB) == []
            assert sorted(listed(store, namespace)) == sorted(names)
            assert store.remove(namespace, names) == 60
        restart(node)
        with node.client() as store:
            assert store.hit_length(namespace, names) == HitLength()
        node.check()


def test_a_smaller_capacity_on_restart_keeps_what_fits(disk: Path, namespace: Namespace) -> None:
    names = keys(60)
    with Node("32MiB", "--nvme", f"{disk}:64MiB") as node, node.client() as store:
        publish(store, namespace, names, MIB)
        wait_for(lambda: written(store))
    with Node("32MiB", "--nvme", f"{disk}:24MiB") as node, node.client() as store:
        kept = [key for key in names if store.hit_length(namespace, [key]).nvme]
        assert 20 <= len(kept) <= 24
        assert nvme(store).capacity_bytes == 24 * MIB
        assert (disk / "blocks").stat().st_size < 25 * MIB
        assert wrong(store, namespace, kept, MIB) == []
        publish(store, namespace, keys(30, "new"), MIB)
        wait_for(lambda: written(store))
        node.check()
    with Node("32MiB", "--nvme", f"{disk}:96MiB") as node, node.client() as store:
        assert nvme(store).capacity_bytes == 96 * MIB
        back = listed(store, namespace)
        assert 20 <= len(back) <= 24
        assert wrong(store, namespace, back, MIB) == []
        node.check()


def test_on_eviction_writes_only_what_the_arena_has_no_room_for(
    disk: Path, tmp_path: Path, namespace: Namespace
) -> None:
    text = f'[nvme]\ndirectories = ["{disk}:256MiB"]\nwrite = "on-eviction"\n'
    names = keys(96)
    with Node("64MiB", "--config", config(tmp_path, text)) as node, node.client() as store:
        publish(store, namespace, names[:32], MIB)
        assert nvme(store).counters.written_blocks == 0
        publish(store, namespace, names[32:], MIB)
        # The rest follows once nothing lies above the watermark any more.
        wait_for(lambda: nvme(store).pending_blocks == 0)
        assert store.hit_length(namespace, names).nvme == 96
        written_blocks = nvme(store).counters.written_blocks
        assert 32 <= written_blocks < 96
        assert nvme(store).counters.dropped_blocks == 0
        assert wrong(store, namespace, names, MIB) == []
        node.check()


def test_an_exclusive_tier_gives_up_what_it_has_given(
    disk: Path, tmp_path: Path, namespace: Namespace
) -> None:
    text = f'[nvme]\ndirectories = ["{disk}:256MiB"]\nwrite = "on-eviction"\nexclusive = true\n'
    names = keys(96)
    with Node("64MiB", "--config", config(tmp_path, text)) as node, node.client() as store:
        publish(store, namespace, names, MIB)
        wait_for(lambda: nvme(store).pending_blocks == 0)
        below = nvme(store).blocks
        with store.acquire(namespace, names[:8], wait_s=20) as read:
            assert read.hit_length == 8
        assert nvme(store).counters.read_blocks > 0
        # Twice round: none is lost on the way.
        for _ in range(2):
            assert wrong(store, namespace, names, MIB) == []
        wait_for(lambda: nvme(store).pending_blocks == 0)
        dram, tier = store.statistics().tiers
        # A block is in both only if it was read while it was on its way down.
        assert below > 0
        assert 96 <= dram.blocks + tier.blocks < 96 + dram.blocks
        assert sorted(listed(store, namespace)) == sorted(names)
        node.check()


def test_only_blocks_that_were_hit_often_enough_are_admitted(
    disk: Path, tmp_path: Path, namespace: Namespace
) -> None:
    text = f'[nvme]\ndirectories = ["{disk}:64MiB"]\nadmit_hits = 2\n'
    names = keys(12)
    with Node("64MiB", "--config", config(tmp_path, text)) as node, node.client() as store:
        publish(store, namespace, names, MIB)
        assert wrong(store, namespace, names, MIB) == []
        assert nvme(store).counters.written_blocks + nvme(store).backlog_blocks == 0
        assert wrong(store, namespace, names[:5], MIB) == []
        wait_for(lambda: nvme(store).counters.written_blocks == 5 and written(store))
        restart(node)
        wait_for(lambda: alive(store))
        assert sorted(listed(store, namespace)) == sorted(names[:5])
        node.check()


def test_a_second_daemon_on_the_same_directory_is_refused_and_the_first_goes_on(
    disk: Path, tmp_path: Path, namespace: Namespace
) -> None:
    with Node("16MiB", "--nvme", f"{disk}:16MiB") as node, node.client() as store:
        publish(store, namespace, keys(4), MIB)
        wait_for(lambda: written(store))
        command = [sys.executable, "-m", "kvstore", "serve", "--dram", "16MiB", "--http", "127.0.0.1:0"]
        command += ["--nvme", f"{disk}:16MiB", "--socket", str(tmp_path / "second.sock")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert (
            f"kvstore: nvme tier: {disk} is used by process {node.pid}; stop it, or give another directory"
            in (done.stderr)
        )
        assert not (tmp_path / "second.sock").exists()
        restart(node)
        wait_for(lambda: alive(store))
        assert wrong(store, namespace, keys(4), MIB) == []
        node.check()


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("{disk}:4KiB", "capacity is 4096 bytes; the least is 1048576"),
        ("{file}:4MiB", "is a file; give a directory"),
        ("{file}/below:4MiB", "is no directory; give another one"),
        ("{disk}:900TiB", "900 TiB asked, "),
    ],
    ids=["too small", "a file", "below a file", "larger than the disk"],
)
def test_a_directory_that_cannot_be_is_one_line_of_error(
    disk: Path, tmp_path: Path, place: str, message: str
) -> None:
    file = tmp_path / "file"
    file.write_text("precious")
    command = [sys.executable, "-m", "kvstore", "serve", "--dram", "16MiB", "--http", "127.0.0.1:0"]
    command += ["--nvme", place.format(disk=disk, file=file), "--socket", str(tmp_path / "node.sock")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("kvstore: "), done.stderr
    assert message in last
    assert "Traceback" not in done.stderr
    assert file.read_text() == "precious"
    assert issubclass(ConfigError, ValueError)
