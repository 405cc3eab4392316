"""A daemon whose disk is damaged, full, taken away, slow, hanging or failing, and one that is killed.

Through all of it no wrong byte is read, no call outlasts its deadline, memory goes on at its usual speed, the
log says once that the tier fails and once that it is back, and afterwards blocks are kept again.
"""

import os
import random
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median

import pytest

from kvstore.block import Namespace
from kvstore.client import StoreClient
from kvstore.errors import DeadlineExceeded, TierError, Unavailable
from tests.node import Node, open_files, private_bytes, threads, wait_for
from tests.test_client import MIB, keys
from tests.test_nvme_node import (
    KIB,
    NOISE_S,
    alive,
    config,
    disk,
    listed,
    metrics,
    noise,
    nvme,
    publish,
    restart,
    written,
    wrong,
)

__all__ = ["disk"]

KILLS = int(os.environ.get("KVSTORE_KILLS", "5"))
FAULTS_S = float(os.environ.get("KVSTORE_FAULTS_S", "3"))
NAMESPACE = Namespace(model="faults")
OTHER = Namespace(model="faults", salt="other")
LENGTHS = (4096, 5000, 64 * KIB, 300 * KIB, MIB)
FAILS = "fails and is left alone until it is back"
BACK = "is back"
OPEN = 'kvstore_tier_breaker_open{medium="nvme",tier="nvme"}'


def command(*words: str) -> None:
    """Run a command that must succeed; skip the test where it is not permitted."""
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode:
        pytest.skip(f"{' '.join(words)}: {done.stderr.strip()}")


@contextmanager
def mounted(folder: Path, *words: str) -> Iterator[Path]:
    """A file system of its own."""
    folder.mkdir(exist_ok=True)
    command("mount", *words, str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, timeout=60)


@contextmanager
def ext4(folder: Path, megabytes: int, *options: str) -> Iterator[Path]:
    """An ext4 of its own in a file."""
    image = folder.with_suffix(".img")
    with image.open("wb") as file:
        file.truncate(megabytes * MIB)
    command("mkfs.ext4", "-q", "-F", *options, str(image))
    with mounted(folder, "-o", "loop", str(image)):
        yield folder


def transitions(node: Node) -> list[str]:
    """What the log says of the tier's state, in order."""
    return re.findall(f"tier nvme (?:{FAILS}|{BACK})", node.log)


def reason(node: Node) -> str:
    """Why the tier failed last, as the log has it."""
    return re.findall(f"{FAILS}: (.*)", node.log)[-1]


def mixed(names: Sequence[bytes]) -> list[tuple[bytes, int]]:
    """Keys, and lengths of all kinds for them."""
    return [(key, LENGTHS[index % len(LENGTHS)]) for index, key in enumerate(names)]


def put_all(store: StoreClient, items: Sequence[tuple[bytes, int]], namespace: Namespace = NAMESPACE) -> None:
    for key, nbytes in items:
        store.put(namespace, key, noise(key, nbytes), timeout_s=20)


def read_all(store: StoreClient, items: Sequence[tuple[bytes, int]], namespace: Namespace = NAMESPACE) -> int:
    """How many of these are there; each must be right."""
    found = 0
    for key, nbytes in items:
        started = time.monotonic()
        data = store.get(namespace, key, timeout_s=5)
        assert time.monotonic() - started < 5 + NOISE_S
        assert data is None or data == noise(key, nbytes), f"wrong bytes for {key!r}"
        found += data is not None
    return found


def healthy(store: StoreClient) -> bool:
    """Whether the tier is trusted."""
    return not nvme(store).breaker_open


def assert_keeps_blocks(node: Node, tag: str) -> None:
    """What is stored from now on is there after a SIGKILL."""
    items = mixed(keys(15, tag))
    with node.client() as store:
        put_all(store, items)
        wait_for(lambda: written(store))
    restart(node)
    with node.client() as store:
        assert read_all(store, items) == len(items)
    node.check()


class Pace:
    """How long a get of a block in memory takes: before, and while something else goes wrong."""

    def __init__(self, store: StoreClient) -> None:
        self._store = store
        store.put(NAMESPACE, b"in memory", noise(b"in memory", 64 * KIB))
        self._usual_s = self._measure()

    def _measure(self) -> float:
        taken = []
        for _ in range(60):
            started = time.monotonic()
            assert self._store.get(NAMESPACE, b"in memory") == noise_in_memory
            taken.append(time.monotonic() - started)
        return median(taken)

    def check(self) -> None:
        """It is as before; a busy machine may make it some times slower."""
        assert self._measure() < 5 * self._usual_s + 0.002


noise_in_memory = noise(b"in memory", 64 * KIB)


def promptly(call: Callable[[], object], within_s: float) -> object:
    """The call's result, which must be here in time."""
    started = time.monotonic()
    try:
        return call()
    finally:
        took_s = time.monotonic() - started
        assert took_s < within_s + NOISE_S, f"{took_s:.2f} s in place of {within_s} s"


# Killed.


class Load:
    """Two writers and a reader, until the daemon is gone; what they know to be on the disk."""

    def __init__(self, node: Node, turn: int) -> None:
        self._node = node
        self._turn = turn
        self.safe: dict[bytes, int] = {}
        self.all: dict[bytes, int] = {}
        self.wrong: list[str] = []
        self._threads = [threading.Thread(target=self._write, args=(n,)) for n in range(2)]
        self._threads.append(threading.Thread(target=self._read))
        for thread in self._threads:
            thread.start()

    def _write(self, number: int) -> None:
        chance = random.Random(f"{self._turn}-{number}")
        mine: dict[bytes, int] = {}
        with suppress(Unavailable), self._node.client() as store:
            for index in range(400):
                key = f"turn{self._turn}-{number}-{index}".encode()
                nbytes = chance.choice([1, *LENGTHS])
                self.all[key] = nbytes
                try:
                    store.put(NAMESPACE, key, noise(key, nbytes), timeout_s=2)
                except DeadlineExceeded:
                    continue
                mine[key] = nbytes
                if chance.random() < 0.3 and written(store):
                    self.safe.update(mine)

    def _read(self) -> None:
        chance = random.Random(self._turn)
        with suppress(Unavailable), self._node.client() as store:
            while True:
                key, nbytes = chance.choice([*list(self.all.items()), (b"nobody", 1)])
                data = store.get(NAMESPACE, key, timeout_s=0.5)
                if data is not None and data != noise(key, nbytes):
                    self.wrong.append(f"{key!r}")

    def join(self) -> None:
        """Wait until all have noticed."""
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()


@pytest.mark.timeout(60 + 10 * KILLS)
def test_sigkill_at_any_moment_loses_nothing_that_was_written(disk: Path) -> None:
    seed = time.time_ns() % 1_000_000
    print(f"seed {seed}")
    chance = random.Random(seed)
    verified = 0
    with Node("32MiB", "--nvme", f"{disk}:1GiB") as node:
        for turn in range(KILLS):
            load = Load(node, turn)
            time.sleep(chance.uniform(0.02, 0.8))  # the random moment
            node.kill()
            load.join()
            assert load.wrong == []
            node.start()
            with node.client() as store:
                assert nvme(store).counters.damaged_blocks == 0
                assert store.check() == []
                names = set(listed(store, NAMESPACE))
                assert names <= set(load.all), "what was removed is back"
                lost = set(load.safe) - names
                assert not lost, f"{len(lost)} of {len(load.safe)} are lost"
                items = [(key, load.all[key]) for key in names]
                assert read_all(store, items) == len(items)
                verified += len(load.safe)
                assert nvme(store).counters.damaged_blocks == 0
                assert store.remove(NAMESPACE, sorted(names)) == len(names) if names else True
        print(f"{KILLS} kills, {verified} blocks known to be written, all back")
        assert "Traceback" not in node.log
        node.check()


# Damaged files.


def flip(path: Path, chance: random.Random, count: int) -> None:
    """Flip bits anywhere."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        for _ in range(count):
            position = chance.randrange(size)
            file.seek(position)
            byte = file.read(1)[0]
            file.seek(position)
            file.write(bytes([byte ^ 1 << chance.randrange(8)]))


def flip_all(disk: Path, other: Path) -> None:
    chance = random.Random(7)
    flip(disk / "blocks", chance, 2000)
    flip(disk / "table", chance, 200)
    flip(disk / "namespaces", chance, 2)


def flip_blocks(disk: Path, other: Path) -> None:
    flip(disk / "blocks", random.Random(8), 3000)


def truncate(disk: Path, other: Path) -> None:
    for name in ("blocks", "table"):
        os.truncate(disk / name, (disk / name).stat().st_size * 3 // 5)


def empty(disk: Path, other: Path) -> None:
    for name in ("blocks", "table", "namespaces"):
        os.truncate(disk / name, 0)


def empty_table(disk: Path, other: Path) -> None:
    os.truncate(disk / "table", 0)


def swap_blocks(disk: Path, other: Path) -> None:
    (disk / "blocks").rename(disk / "aside")
    shutil.copy(other / "blocks", disk / "blocks")
    (disk / "aside").unlink()


def swap_tables(disk: Path, other: Path) -> None:
    shutil.copy(other / "table", disk / "new")
    (disk / "new").rename(disk / "table")


def overwrite_with_others(disk: Path, other: Path) -> None:
    """In place: the same file, another's bytes."""
    data = (other / "blocks").read_bytes()[4096:]
    with (disk / "blocks").open("r+b") as file:
        file.seek(4096)
        file.write(data)


def newer_format(disk: Path, other: Path) -> None:
    from tiers.volume import FORMAT, Head

    for name, magic in (("blocks", b"kvblocks"), ("table", b"kvtables")):
        head = Head.read(disk / name, magic)
        assert head is not None
        data = Head(FORMAT + 1, head.identity, head.capacity_bytes).pack(magic)
        with (disk / name).open("r+b") as file:
            file.write(data)


def foreign(disk: Path, other: Path) -> None:
    for name in ("blocks", "table", "namespaces"):
        (disk / name).write_bytes(os.urandom(70_000))
    (disk / "photo.jpg").write_bytes(b"precious")


def remove_folder(disk: Path, other: Path) -> None:
    shutil.rmtree(disk)


DAMAGES = [
    *(flip_all, flip_blocks, truncate, empty, empty_table, swap_blocks, swap_tables, overwrite_with_others),
    *(newer_format, foreign, remove_folder),
]


@pytest.fixture(scope="module")
def another(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The directory of another daemon, with other blocks under the same keys' neighbours."""
    folder = tmp_path_factory.mktemp("another") / "nvme"
    with Node("16MiB", "--nvme", f"{folder}:24MiB") as node, node.client() as store:
        put_all(store, mixed(keys(60, "another")), OTHER)
        put_all(store, mixed(keys(10)[::-1]), OTHER)
        wait_for(lambda: written(store))
    yield folder
    shutil.rmtree(folder)


def ids(damage: Callable[[Path, Path], None]) -> str:
    return damage.__name__.replace("_", " ")


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, Path]]:
    """A daemon whose files are damaged again and again, and its directory."""
    disk = tmp_path_factory.mktemp("victim") / "nvme"
    with Node("8MiB", "--nvme", f"{disk}:24MiB") as node:
        yield node, disk
        assert "Traceback" not in node.log
    shutil.rmtree(disk)


@pytest.mark.parametrize("damage", DAMAGES, ids=ids)
def test_damage_while_it_is_stopped_costs_blocks_and_never_gives_wrong_bytes(
    victim: tuple[Node, Path], another: Path, damage: Callable[[Path, Path], None]
) -> None:
    node, disk = victim
    items = mixed(keys(40, f"stopped {damage.__name__}"))
    with node.client() as store:
        put_all(store, items)
        wait_for(lambda: written(store))
    node.kill()
    damage(disk, another)
    node.start()
    with node.client() as store:
        found = read_all(store, items)
        print(f"{found} of {len(items)} blocks are left")
        assert found == 0 or damage in (flip_all, flip_blocks, truncate, overwrite_with_others)
        assert read_all(store, mixed(keys(60, "another"))) == 0
        assert healthy(store)
        if damage is foreign:
            assert (disk / "photo.jpg").read_bytes() == b"precious"
        if damage is newer_format:
            assert (disk / "blocks.format-2").exists()
    assert_keeps_blocks(node, f"stopped {damage.__name__} after")


@pytest.mark.parametrize("damage", DAMAGES, ids=ids)
def test_damage_while_it_runs_costs_blocks_and_heals(
    victim: tuple[Node, Path], another: Path, damage: Callable[[Path, Path], None]
) -> None:
    node, disk = victim
    items = mixed(keys(40, f"running {damage.__name__}"))
    before = len(transitions(node))
    with node.client() as store:
        opened = nvme(store).counters.breaker_opened
        put_all(store, items)
        wait_for(lambda: written(store))
        damage(disk, another)
        found = read_all(store, items)
        print(f"{found} of {len(items)} blocks are left")
        assert read_all(store, mixed(keys(60, "another"))) == 0
        # Files that are not there any more, or shorter, are noticed within a second or so.
        if damage in (truncate, empty, empty_table, swap_blocks, swap_tables, remove_folder, foreign):
            wait_for(lambda: nvme(store).counters.breaker_opened == opened + 1)
        wait_for(lambda: healthy(store))
        read_all(store, items)
        if damage in (flip_all, newer_format):
            # What says which blocks are here is damaged: nobody notices before the next start.
            restart(node)
    assert_keeps_blocks(node, f"running {damage.__name__} after")
    assert len(transitions(node)) - before in (0, 2), node.log


def test_many_damaged_blocks_are_not_a_line_in_the_log_each(disk: Path) -> None:
    names = keys(40)
    with Node("8MiB", "--nvme", f"{disk}:24MiB") as node, node.client() as store:
        publish(store, NAMESPACE, names, 64 * KIB)
        wait_for(lambda: written(store))
        publish(store, NAMESPACE, keys(12, "other"), MIB)
        wait_for(lambda: written(store))
        below = [key for key in names if not store.hit_length(NAMESPACE, [key]).dram]
        assert len(below) > 20
        with (disk / "blocks").open("r+b") as file:
            file.seek(4096)
            file.write(os.urandom(24 * MIB))
        assert read_all(store, [(key, 64 * KIB) for key in below]) == 0
        assert nvme(store).counters.damaged_blocks == len(below)
        assert node.log.count("a block is damaged") == 1


def test_blocks_stored_after_the_directory_was_removed_survive_a_restart(disk: Path) -> None:
    names = keys(8)
    with Node("64MiB", "--nvme", f"{disk}:64MiB") as node, node.client() as store:
        publish(store, NAMESPACE, names, MIB)
        wait_for(lambda: written(store))
        pace = Pace(store)
        shutil.rmtree(disk)
        assert wrong(store, NAMESPACE, names, MIB) == [], "what is in memory is not touched"
        wait_for(lambda: nvme(store).counters.breaker_opened == 1 and healthy(store))
        pace.check()
        assert (disk / "blocks").exists()
        assert transitions(node) == [f"tier nvme {FAILS}", f"tier nvme {BACK}"]
        assert "gone, or not the same" in reason(node)
        assert_keeps_blocks(node, "after")
        wait_for(lambda: alive(store))
        assert read_all(store, [(key, MIB) for key in names]) == len(names), "DRAM had them, and wrote them"


# No space, no writing.


def test_a_disk_that_others_fill_up_does_not_stop_what_has_its_space(tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=48M", "tmpfs") as small:
        with Node("16MiB", "--nvme", f"{small}/nvme:32MiB") as node, node.client() as store:
            publish(store, NAMESPACE, keys(20), MIB)
            wait_for(lambda: written(store))
            with suppress(OSError), (small / "others").open("wb") as others:
                while True:
                    others.write(bytes(MIB))
                    others.flush()
            publish(store, NAMESPACE, keys(40, "more"), MIB)
            wait_for(lambda: written(store))
            assert nvme(store).counters.failed_calls == 0
            assert wrong(store, NAMESPACE, keys(20, "more")[10:], MIB) == []
            # Blocks so small that the table must grow, which it cannot any more.
            pace = Pace(store)
            tiny = [(key, 512) for key in keys(3000, "tiny")]
            for start in range(0, 3000, 250):
                part = tiny[start : start + 250]
                with store.reserve(NAMESPACE, [key for key, _ in part], 512, wait_s=5) as write:
                    for key, view in zip(write.granted, write.views, strict=True):
                        view[:] = noise(key, 512)
                    write.commit()
            wait_for(lambda: nvme(store).backlog_blocks == 0 or not healthy(store))
            pace.check()
            read_all(store, tiny[::10])
            lines = len(transitions(node))
            print(f"{lines} transitions, {nvme(store).counters}")
            (small / "others").unlink()
            wait_for(lambda: healthy(store) and written(store), 30)
            assert_keeps_blocks(node, "after")
            assert len(transitions(node)) <= lines + 1
            assert "Traceback" not in node.log
        with suppress(OSError), (small / "others").open("wb") as others:
            while True:
                others.write(bytes(MIB))
                others.flush()


def test_a_disk_without_fallocate_that_fills_up_fails_and_heals(tmp_path: Path) -> None:
    with ext4(tmp_path / "old", 64, "-t", "ext2", "-m", "0") as old:
        path = config(tmp_path, f'[nvme]\ndirectories = ["{old}/nvme:40MiB"]\n')
        with Node("64MiB", "--config", path) as node, node.client() as store:
            if "no fallocate" not in node.log:
                pytest.skip("this ext4 has fallocate without extents")
            publish(store, NAMESPACE, keys(4), MIB)
            wait_for(lambda: written(store))
            with suppress(OSError), (old / "others").open("wb", buffering=0) as others:
                while True:
                    others.write(bytes(64 * KIB))
            pace = Pace(store)
            publish(store, NAMESPACE, keys(20, "more"), MIB)
            wait_for(lambda: not healthy(store))
            pace.check()
            assert "free space there" in reason(node)
            assert metrics(node)[OPEN] == 1
            assert wrong(store, NAMESPACE, [*keys(4), *keys(20, "more")], MIB) == []
            (old / "others").unlink()
            wait_for(lambda: healthy(store) and written(store))
            assert metrics(node)[OPEN] == 0
            lines = transitions(node)
            assert lines[0].endswith(FAILS)
            assert lines[-1].endswith(BACK)
            assert_keeps_blocks(node, "after")
            assert "Traceback" not in node.log


def test_a_directory_that_becomes_read_only_heals_when_it_is_writable_again(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=64M", "tmpfs") as where:
        folder = where / "nvme"
        with Node("64MiB", "--nvme", f"{folder}:32MiB") as node, node.client() as store:
            publish(store, NAMESPACE, keys(8), MIB)
            wait_for(lambda: written(store))
            pace = Pace(store)
            # A file system with open files cannot be remounted read-only; this one is put in its place.
            with mounted(folder, "-t", "tmpfs", "-o", "ro,size=64M", "tmpfs"):
                wait_for(lambda: not healthy(store))
                assert metrics(node)[OPEN] == 1
                publish(store, NAMESPACE, keys(8, "meanwhile"), MIB)
                pace.check()
                assert wrong(store, NAMESPACE, [*keys(8), *keys(8, "meanwhile")], MIB) == []
                wait_for(lambda: "mount it writable" in node.log)
                with pytest.raises(TierError, match="are hidden, but tier nvme fails"):
                    promptly(lambda: store.remove(NAMESPACE, keys(1)), 2)
            wait_for(lambda: healthy(store) and written(store), 30)
            assert metrics(node)[OPEN] == 0
            assert transitions(node) == [f"tier nvme {FAILS}", f"tier nvme {BACK}"]
            restart(node)
            wait_for(lambda: alive(store))
            kept = [*keys(8)[1:], *keys(8, "meanwhile")]
            assert sorted(set(listed(store, NAMESPACE)) - {b"in memory"}) == sorted(kept)
            assert wrong(store, NAMESPACE, kept, MIB) == []


def test_a_daemon_starts_on_a_read_only_disk_and_uses_it_once_it_is_writable(tmp_path: Path) -> None:
    with (
        mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "ro,size=64M", "tmpfs") as where,
        Node("64MiB", "--nvme", f"{where}/nvme:32MiB") as node,
        node.client() as store,
    ):
        assert not healthy(store)
        publish(store, NAMESPACE, keys(8), MIB)
        assert wrong(store, NAMESPACE, keys(8), MIB) == []
        command("mount", "-o", "remount,rw", str(where))
        wait_for(lambda: healthy(store), 30)
        wait_for(lambda: nvme(store).blocks == 8)
        assert transitions(node) == [f"tier nvme {FAILS}", f"tier nvme {BACK}"]
        assert_keeps_blocks(node, "after")


# Slow, hanging, failing.


@contextmanager
def frozen(folder: Path) -> Iterator[None]:
    """Whoever writes there hangs in the kernel, killed or not; reading goes on."""
    command("fsfreeze", "-f", str(folder))
    try:
        yield
    finally:
        subprocess.run(["fsfreeze", "-u", str(folder)], check=True, timeout=60)


def test_a_disk_on_which_writes_hang_costs_nothing_and_heals(tmp_path: Path) -> None:
    with ext4(tmp_path / "disk", 96) as where:
        text = f'[nvme]\ndirectories = ["{where}/nvme:32MiB"]\ntimeout_s = 0.5\n'
        with Node("64MiB", "--config", config(tmp_path, text)) as node, node.client() as store:
            publish(store, NAMESPACE, keys(8), MIB)
            wait_for(lambda: written(store))
            pace = Pace(store)
            wait_for(lambda: written(store))
            with frozen(where):
                publish(store, NAMESPACE, keys(16, "meanwhile"), MIB)
                wait_for(lambda: not healthy(store))
                pace.check()
                assert metrics(node)[OPEN] == 1
                assert "no answer within 0.5 s" in reason(node)
                with pytest.raises(TierError, match="are hidden, but tier nvme fails"):
                    promptly(lambda: store.remove(NAMESPACE, keys(1)), 0.5)
                # All of the arena can be used for what is new, though nothing of it gets below.
                promptly(lambda: publish(store, NAMESPACE, keys(60, "new"), MIB), 5)
                assert wrong(store, NAMESPACE, keys(60, "new")[30:], MIB) == []
            wait_for(lambda: healthy(store) and written(store), 30)
            assert metrics(node)[OPEN] == 0
            assert transitions(node) == [f"tier nvme {FAILS}", f"tier nvme {BACK}"]
            restart(node)
            wait_for(lambda: alive(store))
            assert store.get(NAMESPACE, keys(1)[0]) is None
            there = [key for key in listed(store, NAMESPACE) if key != b"in memory"]
            assert len(there) >= 24
            assert wrong(store, NAMESPACE, there, MIB) == []
            node.check()


def test_a_daemon_starts_though_its_disk_hangs(tmp_path: Path) -> None:
    with ext4(tmp_path / "disk", 96) as where:
        text = f'[nvme]\ndirectories = ["{where}/nvme:32MiB"]\ntimeout_s = 0.5\n'
        with Node("64MiB", "--config", config(tmp_path, text)) as node:
            with node.client() as store:
                publish(store, NAMESPACE, keys(8), MIB)
                wait_for(lambda: written(store))
            node.stop()
            with frozen(where):
                promptly(node.start, 15)
                with node.client() as store:
                    assert not healthy(store)
                    publish(store, NAMESPACE, keys(8, "meanwhile"), MIB)
                    assert promptly(lambda: store.get(NAMESPACE, keys(1)[0], timeout_s=1), 1) is None
            with node.client() as store:
                wait_for(lambda: healthy(store) and written(store), 30)
                names = [*keys(8), *keys(8, "meanwhile")]
                assert wrong(store, NAMESPACE, names, MIB) == []
                node.check()


@contextmanager
def faulty(disk: Path, tmp_path: Path, dram: str = "16MiB", **rules: object) -> Iterator[tuple[Node, Path]]:
    """A daemon whose disk does as a file says, and that file."""
    faults = tmp_path / "faults"
    settings = {"timeout_s": 0.5, **rules}
    text = f'[nvme]\ndirectories = ["{disk}:64MiB"]\n'
    text += "".join(f"{name} = {value}\n" for name, value in settings.items())
    environ = {"KVSTORE_FAULTS": str(faults)}
    with Node(
        dram, "--config", config(tmp_path, text), environ=environ, module="tests.faulty_daemon"
    ) as node:
        try:
            yield node, faults
        finally:
            faults.unlink(missing_ok=True)


@pytest.mark.parametrize("fault", ["reading hang", " hang", "reading 1.5", "reading error", " error"])
def test_a_disk_that_fails_readers_costs_one_deadline_once_and_heals(
    disk: Path, tmp_path: Path, fault: str
) -> None:
    with faulty(disk, tmp_path) as (node, faults), node.client() as store:
        names = keys(40)
        publish(store, NAMESPACE, names, MIB)
        wait_for(lambda: written(store))
        pace = Pace(store)
        wait_for(lambda: written(store))
        faults.write_text(f"{fault}\n")
        # Whoever is first waits at most as long as it said, or until the tier is late.
        for key in names[:4]:
            assert promptly(lambda key=key: store.get(NAMESPACE, key, timeout_s=1.0), 1.0) is None
        wait_for(lambda: not healthy(store))
        assert metrics(node)[OPEN] == 1
        # From now on nobody waits at all.
        for key in names[4:12]:
            assert promptly(lambda key=key: store.get(NAMESPACE, key, timeout_s=5.0), 0) is None
        pace.check()
        publish(store, NAMESPACE, keys(8, "meanwhile"), MIB)
        assert wrong(store, NAMESPACE, keys(8, "meanwhile"), MIB) == []
        faults.unlink()
        wait_for(lambda: healthy(store), 30)
        assert metrics(node)[OPEN] == 0
        wait_for(lambda: written(store))
        lines = transitions(node)
        # Where only reads fail, a tier that can be written is tried again.
        assert lines[:2] == [f"tier nvme {FAILS}", f"tier nvme {BACK}"]
        assert len(lines) == 2 or fault.startswith("reading"), node.log
        assert wrong(store, NAMESPACE, [*names, *keys(8, "meanwhile")], MIB) == []
        node.check()
        assert "Traceback" not in node.log


def test_a_disk_that_cannot_be_read_is_not_called_back_while_that_is_so(disk: Path, tmp_path: Path) -> None:
    with faulty(disk, tmp_path) as (node, faults), node.client() as store:
        names = keys(40)
        publish(store, NAMESPACE, names, MIB)
        wait_for(lambda: written(store))
        faults.write_text("reading error\n")
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            for key in names[:20]:
                assert promptly(lambda key=key: store.get(NAMESPACE, key, timeout_s=1.0), 1.0) is None
        assert transitions(node) == [f"tier nvme {FAILS}"]


@pytest.mark.parametrize("fault", ["writing hang", "writing error", "writing 1.5"])
def test_a_disk_that_fails_writers_holds_them_up_for_a_moment_only_and_heals(
    disk: Path, tmp_path: Path, fault: str
) -> None:
    with faulty(disk, tmp_path) as (node, faults), node.client() as store:
        pace = Pace(store)
        wait_for(lambda: written(store))
        faults.write_text(f"{fault}\n")
        names = keys(48)
        started = time.monotonic()
        for key in names:
            promptly(lambda key=key: store.put(NAMESPACE, key, noise(key, MIB), timeout_s=5.0), 5.0)
        assert time.monotonic() - started < 5 + NOISE_S
        wait_for(lambda: not healthy(store))
        store.put(NAMESPACE, b"in memory", noise_in_memory)
        pace.check()
        assert wrong(store, NAMESPACE, names[-8:], MIB) == []
        faults.unlink()
        wait_for(lambda: healthy(store) and written(store), 30)
        lines = transitions(node)
        assert lines[:1] == [f"tier nvme {FAILS}"]
        assert lines[-1:] == [f"tier nvme {BACK}"]
        assert_keeps_blocks(node, "after")
        assert "Traceback" not in node.log


def test_a_slow_disk_that_is_in_time_is_not_given_up_however_much_is_asked_of_it(
    disk: Path, tmp_path: Path
) -> None:
    # Each call takes 0.2 s of the 0.8 s that it may; calls that wait for their turn are not late.
    with faulty(disk, tmp_path, "64MiB", timeout_s=0.8) as (node, faults):
        names = keys(32)
        with node.client() as store:
            publish(store, NAMESPACE, names, MIB)
            wait_for(lambda: written(store))
        restart(node)
        with node.client() as store:
            faults.write_text("reading 0.2\n")
            assert wrong(store, NAMESPACE, names[:4], MIB) == []
            with store.acquire(NAMESPACE, names, wait_s=20) as read:
                assert read.hit_length == 32, node.log
            assert nvme(store).counters.late_calls == 0
            assert transitions(node) == []


# Clocks and leaks.


def test_a_clock_that_is_set_back_changes_nothing(disk: Path) -> None:
    names = keys(8)
    environ = {"KVSTORE_CLOCK_SHIFT_S": str(-10 * 365 * 86400)}
    with Node("16MiB", "--nvme", f"{disk}:32MiB") as node, node.client() as store:
        publish(store, NAMESPACE, names, MIB)
        wait_for(lambda: written(store))
        epoch = store.statistics().epoch
        kept = (node.folder / "node.epoch").read_text()
    with Node("16MiB", "--nvme", f"{disk}:32MiB", environ=environ, module="tests.faulty_daemon") as node:
        with node.client() as store:
            assert store.statistics().epoch < epoch, "the clock is set back"
        node.stop()
        (node.folder / "node.epoch").write_text(kept)
        node.start()
        with node.client() as store:
            assert store.statistics().epoch == epoch + 1
            assert wrong(store, NAMESPACE, names, MIB) == []
            # What is stored now is newer than what the clock says is newer.
            store.remove(NAMESPACE, names[:4])
            store.put(NAMESPACE, names[0], b"anew")
            publish(store, NAMESPACE, keys(30, "new"), MIB)
            wait_for(lambda: written(store))
        node.check()
    with Node("16MiB", "--nvme", f"{disk}:32MiB") as node, node.client() as store:
        there = listed(store, NAMESPACE)
        assert not set(names[1:4]) & set(there)
        assert wrong(store, NAMESPACE, [k for k in keys(30, "new") if k in there], MIB) == []
        assert len(set(keys(30, "new")) & set(there)) >= 28, "the oldest have left first"
        node.check()


def test_no_wall_clock_is_read_but_for_the_epoch() -> None:
    # Events carry it, as engines' do, and lag is measured with it; the index acts by the clock of its loop.
    root = Path(__file__).parent.parent
    uses = [
        f"{path.relative_to(root)}: {line.strip()}"
        for folder in ("kvstore", "tiers")
        for path in sorted((root / folder).rglob("*.py"))
        if "index" not in path.parts
        for line in path.read_text().splitlines()
        if re.search(r"\btime\.(time|time_ns|localtime|gmtime)\(|\b(now|utcnow|today)\(|st_[mac]time", line)
    ]
    assert uses == ["kvstore/serve.py: epoch = max(time.time_ns(), last + 1)"]


@pytest.mark.timeout(120 + 3 * FAULTS_S)
def test_faults_and_heals_leave_nothing_behind(disk: Path, tmp_path: Path) -> None:
    chance = random.Random(11)
    with faulty(disk, tmp_path, timeout_s=0.3) as (node, faults), node.client() as store:

        def work(turn: int) -> None:
            for index in range(30):
                key = f"leak{turn}-{index}".encode()
                nbytes = chance.choice(LENGTHS)
                with suppress(DeadlineExceeded):
                    promptly(lambda: store.put(NAMESPACE, key, noise(key, nbytes), timeout_s=2), 2)  # noqa: B023
                old = f"leak{max(0, turn - 1)}-{chance.randrange(30)}".encode()
                promptly(lambda: store.get(NAMESPACE, old, timeout_s=0.5), 0.5)  # noqa: B023
            with suppress(TierError):
                store.remove(NAMESPACE, [f"leak{turn}-{index}".encode() for index in range(0, 30, 3)])

        def round_of_faults(turn: int) -> None:
            fault = chance.choice([" hang", " error", "writing hang", "reading hang", "writing 0.4", "gone"])
            before = nvme(store).counters.breaker_opened
            if fault == "gone":
                shutil.rmtree(disk)
            else:
                faults.write_text(f"{fault}\n")
            work(turn)
            if fault == "gone":
                wait_for(lambda: nvme(store).counters.breaker_opened > before)
            faults.unlink(missing_ok=True)
            wait_for(lambda: healthy(store) and written(store), 30)

        for turn in range(3):
            round_of_faults(turn)
        before = open_files(node.pid), threads(node.pid)
        private_before = private_bytes(node.pid)
        deadline = time.monotonic() + FAULTS_S
        turn = 3
        while time.monotonic() < deadline:
            round_of_faults(turn)
            turn += 1
        wait_for(lambda: open_files(node.pid) <= before[0] and threads(node.pid) <= before[1])
        grown = private_bytes(node.pid) - private_before
        print(f"{turn} rounds, {grown >> 10} KiB more, {nvme(store).counters}")
        assert grown < 8 * MIB
        assert "Traceback" not in node.log
        node.check()
