"""The NVMe tier on a disk that is damaged, full, taken away, or holds what somebody else put there."""

import asyncio
import logging
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvstore.block import Namespace
from kvstore.errors import ConfigError, TierError
from tests.test_storage_contract import KIB, MIB, NAMESPACE, block, blocks, drop, expected, pages, read
from tiers.base import Transfer
from tiers.nvme import NvmeTier, Recovered
from tiers.table import RECORD_BYTES
from tiers.volume import FORMAT, SUPERBLOCK_BYTES, Head

CAPACITY_BYTES = 4 * MIB
OTHER = Namespace(model="other")
LENGTHS = (4096, 20_000, 64 * KIB, 300 * KIB, 1, 5000)
Damage = Callable[[Path], None]


async def opened(folder: Path, capacity_bytes: int = CAPACITY_BYTES) -> tuple[NvmeTier, list[Transfer]]:
    tier = NvmeTier(folder, capacity_bytes)
    return tier, await tier.recover()


def fill(folder: Path, prefix: str = "", capacity_bytes: int = CAPACITY_BYTES) -> list[Transfer]:
    """Store blocks of all these lengths in one namespace and one more in another; close."""

    async def scenario() -> list[Transfer]:
        tier, _ = await opened(folder, capacity_bytes)
        stored = [*blocks(tier, LENGTHS, prefix), block(tier, f"{prefix}other".encode(), 9000, OTHER)]
        await tier.write(stored)
        tier.close()
        return stored

    return asyncio.run(scenario())


def survivors(folder: Path, capacity_bytes: int = CAPACITY_BYTES) -> tuple[set[bytes], set[bytes], Recovered]:
    """What is whole and what is damaged there. In any case the tier goes on, and finds it mended after."""

    async def scenario() -> tuple[set[bytes], set[bytes], Recovered]:
        tier, found = await opened(folder, capacity_bytes)
        assert tier.found.blocks == len(found)
        assert tier.check() == []
        seen = dict(zip([t.key for t in found], await read(tier, found), strict=True))
        whole = {key for key, content in seen.items() if content is not None}
        assert all(
            content == pattern
            for content, pattern in zip(seen.values(), expected(found), strict=True)
            if content
        )
        await tier.write(new := blocks(tier, LENGTHS, f"after-{len(found)}-"))
        assert await read(tier, new) == expected(new)
        await drop(tier, new)
        await tier.flush()
        assert tier.check() == []
        tier.close()
        again, found = await opened(folder, capacity_bytes)
        assert {transfer.key for transfer in found} == set(seen)
        assert again.found.damaged_records == again.found.beyond_capacity == again.found.set_aside_files == 0
        again.close()
        return whole, set(seen) - whole, tier.found

    return asyncio.run(scenario())


def flip(path: Path, position: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1 << bit]))


def keys(stored: Sequence[Transfer]) -> set[bytes]:
    return {transfer.key for transfer in stored}


@contextmanager
def mounted(kind: str, folder: Path, options: str = "rw", source: str = "none") -> Iterator[Path]:
    """A file system of its own, where this user may mount one."""
    folder.mkdir()
    command = ["mount", "-t", kind, "-o", options, source, str(folder)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mounting is not permitted")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def frozen(folder: Path) -> Iterator[None]:
    """Whoever writes to this file system waits until it is over, and cannot be stopped."""
    if subprocess.run(["fsfreeze", "-f", str(folder)], check=False, capture_output=True).returncode:
        pytest.skip("freezing is not permitted")
    try:
        yield
    finally:
        subprocess.run(["fsfreeze", "-u", str(folder)], check=True)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writes beyond this position fail, as those to a full disk do."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# What it makes of its directory.


def test_it_takes_its_whole_capacity_at_once_and_for_nobody_elses_eyes(tmp_path: Path) -> None:
    async def scenario() -> None:
        folder = tmp_path / "not" / "yet"
        tier = NvmeTier(folder, CAPACITY_BYTES + 4095)
        assert tier.capacity_bytes == CAPACITY_BYTES
        assert not folder.exists()
        await tier.recover()
        there = (folder / "blocks").stat()
        assert (there.st_size, there.st_blocks * 512 >= there.st_size) == (
            SUPERBLOCK_BYTES + CAPACITY_BYTES,
            True,
        )
        assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == dict.fromkeys(
            ("blocks", "lock", "namespaces", "table"), 0o600
        )
        assert folder.stat().st_mode & 0o777 == 0o700
        assert int((folder / "lock").read_text()) == os.getpid()
        tier.close()

    asyncio.run(scenario())


def test_what_cannot_be_a_tier_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nvme tier: capacity is 1048575 bytes; the least is 1048576"):
        NvmeTier(tmp_path, MIB - 1)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cold tier: .*/file is a file; give a directory"):
        NvmeTier(tmp_path / "file", MIB, name="cold")
    with pytest.raises(ConfigError, match="is no directory; give another one"):
        asyncio.run(opened(tmp_path / "file" / "below"))
    with pytest.raises(
        ConfigError, match=r"nvme tier: 1024 TiB asked, [\d.]+ .iB free on .*; lower its capacity"
    ):
        asyncio.run(opened(tmp_path / "large", 1 << 50))
    assert not (tmp_path / "large" / "blocks").stat().st_size


@pytest.mark.parametrize("name", ["blocks", "table", "namespaces", "lock"])
def test_what_is_no_file_and_has_the_name_of_one_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(ConfigError, match=f"{name} is a directory where a file belongs; move it away"):
        asyncio.run(opened(tmp_path))
    (tmp_path / name).rmdir()
    os.mkfifo(tmp_path / name)
    with pytest.raises(ConfigError, match=f"{name} is not a regular file; move it away"):
        asyncio.run(opened(tmp_path))
    (tmp_path / name).unlink()
    fill(tmp_path)


def test_other_peoples_files_are_left_alone_and_leftovers_are_not(tmp_path: Path) -> None:
    (tmp_path / "blocks.new").write_text("somebody's")
    (tmp_path / "notes").write_text("somebody's")
    (tmp_path / "namespaces.new").write_text("ours")
    fill(tmp_path)
    names = {"blocks", "blocks.new", "lock", "namespaces", "notes", "table"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_a_killed_owner_has_let_go(tmp_path: Path) -> None:
    program = (
        "import asyncio, sys, pathlib; from tiers.nvme import NvmeTier; "
        "tier = NvmeTier(pathlib.Path(sys.argv[1]), 1 << 22); asyncio.run(tier.recover()); "
        "print('open', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"open\n"
        with pytest.raises(ConfigError, match=f"is used by process {owner.pid}; stop it, or give another"):
            asyncio.run(opened(tmp_path))
        owner.kill()
        owner.wait()
        fill(tmp_path)


# Damage: each costs the blocks it belongs to, and nothing else.


def test_nothing_is_wrong_with_what_nobody_damaged(tmp_path: Path) -> None:
    stored = fill(tmp_path)
    assert survivors(tmp_path) == (keys(stored), set(), Recovered(blocks=len(stored)))


def test_a_flipped_bit_of_the_data_costs_its_block(tmp_path: Path) -> None:
    stored = fill(tmp_path)
    victim = stored[3]
    flip(tmp_path / "blocks", SUPERBLOCK_BYTES + victim.slot.offset + victim.length - 1, 7)
    whole, damaged, found = survivors(tmp_path)
    assert (whole, damaged) == (keys(stored) - {victim.key}, {victim.key})
    assert found == Recovered(blocks=len(stored))


def test_a_flipped_bit_of_the_padding_costs_nothing(tmp_path: Path) -> None:
    stored = fill(tmp_path)
    flip(tmp_path / "blocks", SUPERBLOCK_BYTES + stored[1].slot.offset + stored[1].length)
    assert survivors(tmp_path)[0] == keys(stored)


def test_truncated_data_costs_what_is_lost(tmp_path: Path) -> None:
    stored = fill(tmp_path)
    end = stored[3].slot.offset + 100_001
    os.truncate(tmp_path / "blocks", SUPERBLOCK_BYTES + end)
    whole, damaged, _ = survivors(tmp_path)
    assert whole == {t.key for t in stored if t.slot.offset + t.length <= end}
    assert damaged == keys(stored) - whole
    assert (tmp_path / "blocks").stat().st_size == SUPERBLOCK_BYTES + CAPACITY_BYTES


def test_data_truncated_while_it_is_open_is_damaged(tmp_path: Path) -> None:
    async def scenario() -> None:
        tier, found = await opened(tmp_path)
        assert await tier.same()
        os.truncate(tmp_path / "blocks", SUPERBLOCK_BYTES + 4097)
        assert await read(tier, found) == [*expected(found[:1]), *[None] * (len(found) - 1)]
        assert not await tier.same()
        tier.close()

    fill(tmp_path)
    asyncio.run(scenario())


@pytest.mark.parametrize("position", [0, 9, 13, 30, 40])
@pytest.mark.parametrize("name", ["blocks", "table"])
def test_a_damaged_head_begins_anew(
    tmp_path: Path, name: str, position: int, caplog: pytest.LogCaptureFixture
) -> None:
    stored = fill(tmp_path)
    flip(tmp_path / name, position, 3)
    dropped = len(stored) if name == "blocks" else 0
    assert survivors(tmp_path) == (set(), set(), Recovered(damaged_records=dropped))
    assert [f"begins anew, {dropped} blocks dropped" in record.getMessage() for record in caplog.records] == [
        True
    ]


def test_a_damaged_record_costs_its_block_and_is_cleared(tmp_path: Path) -> None:
    stored = fill(tmp_path)
    for position in (0, 2, 50, 100, 118, 127):
        flip(tmp_path / "table", RECORD_BYTES * 3 + position)
        stored = [transfer for transfer in stored if transfer.record != 2]
        assert survivors(tmp_path) == (keys(stored), set(), Recovered(len(stored), damaged_records=1))
        assert (tmp_path / "table").read_bytes()[RECORD_BYTES * 3 :][:RECORD_BYTES] == bytes(RECORD_BYTES)


def test_a_truncated_table_costs_the_blocks_whose_records_are_gone(tmp_path: Path) -> None:
    stored = fill(tmp_path)
    os.truncate(tmp_path / "table", RECORD_BYTES * 4 + 77)
    assert survivors(tmp_path) == (keys(stored[:3]), set(), Recovered(3, damaged_records=1))


def test_a_damaged_namespace_costs_its_blocks(tmp_path: Path) -> None:
    stored = fill(tmp_path)
    text = (tmp_path / "namespaces").read_text()
    assert text.count("\n") == 2
    flip(tmp_path / "namespaces", text.index("other"))
    assert survivors(tmp_path) == (keys(stored[:-1]), set(), Recovered(len(stored) - 1, damaged_records=1))
    assert (tmp_path / "namespaces").read_text().count("\n") == 1


@pytest.mark.parametrize("content", [b"", b"\xff\x00" * 5000, b"[" * 100_000 + b"\n", b"{}\n"])
def test_without_namespaces_there_are_no_blocks(tmp_path: Path, content: bytes) -> None:
    stored = fill(tmp_path)
    (tmp_path / "namespaces").write_bytes(content)
    assert survivors(tmp_path) == (set(), set(), Recovered(damaged_records=len(stored)))


def test_a_torn_namespace_is_written_over(tmp_path: Path) -> None:
    stored = fill(tmp_path)
    with (tmp_path / "namespaces").open("ab") as file:
        file.write(b'{"model":"to')
    more = fill(tmp_path, "more-")
    assert survivors(tmp_path)[0] == keys(stored) | keys(more)


@pytest.mark.parametrize("name", ["blocks", "table"])
@pytest.mark.parametrize("content", [b"", b"x", os.urandom(10_000), bytes(10_000)])
def test_files_of_others_under_our_names_begin_anew(tmp_path: Path, name: str, content: bytes) -> None:
    fill(tmp_path)
    (tmp_path / name).write_bytes(content)
    whole, damaged, _ = survivors(tmp_path)
    assert whole == damaged == set()


def test_a_missing_file_begins_anew(tmp_path: Path) -> None:
    for name in ("blocks", "table", "namespaces", "lock"):
        stored = fill(tmp_path, name)
        (tmp_path / name).unlink()
        assert survivors(tmp_path)[0] == (keys(stored) if name == "lock" else set())


@pytest.mark.parametrize("name", ["blocks", "table"])
def test_files_that_belong_to_two_directories_begin_anew(tmp_path: Path, name: str) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    fill(one)
    fill(two)
    (one / name).rename(tmp_path / name)
    (two / name).rename(one / name)
    (tmp_path / name).rename(two / name)
    for folder in (one, two):
        assert survivors(folder) == (set(), set(), Recovered(damaged_records=len(LENGTHS) + 1))


def test_files_that_have_each_others_names_begin_anew(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "blocks").rename(tmp_path / "once")
    (tmp_path / "table").rename(tmp_path / "blocks")
    (tmp_path / "once").rename(tmp_path / "table")
    assert survivors(tmp_path)[:2] == (set(), set())


def test_a_whole_directory_may_be_moved(tmp_path: Path) -> None:
    stored = fill(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    assert survivors(tmp_path / "there")[0] == keys(stored)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_damaged_never_gives_a_wrong_byte(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    stored = fill(tmp_path)
    for _ in range(chance.randrange(1, 6)):
        path = tmp_path / chance.choice(("blocks", "table", "namespaces"))
        size = min(path.stat().st_size, 600 * KIB)
        if size:
            damage = chance.randrange(4)
            if damage == 0:
                os.truncate(path, chance.randrange(size))
            else:
                for _ in range(damage**3):
                    flip(path, chance.randrange(size), chance.randrange(8))
    whole, damaged, _ = survivors(tmp_path)
    assert whole | damaged <= keys(stored)


# Versions and capacities.


@pytest.mark.parametrize("names", [("blocks",), ("table",), ("blocks", "table")])
def test_files_of_a_later_format_are_set_aside(
    tmp_path: Path, names: Sequence[str], caplog: pytest.LogCaptureFixture
) -> None:
    magic = {"blocks": b"kvblocks", "table": b"kvtables"}
    for suffix in ("format-9", "format-9-2"):
        fill(tmp_path)
        for name in names:
            with (tmp_path / name).open("r+b") as file:
                file.write(Head(9, b"i" * 16, CAPACITY_BYTES).pack(magic[name]))
        before = {name: (tmp_path / name).read_bytes() for name in ("blocks", "table", "namespaces")}
        caplog.clear()
        assert survivors(tmp_path) == (set(), set(), Recovered(set_aside_files=3))
        assert [
            f"holds format 9, this release knows {FORMAT}; 3 files are set aside as *.{suffix}"
            in r.getMessage()
            for r in caplog.records
        ] == [True]
        assert {name: (tmp_path / f"{name}.{suffix}").read_bytes() for name in before} == before


def test_a_lower_capacity_costs_what_is_beyond_and_a_higher_one_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        tier, _ = await opened(tmp_path, 4 * MIB)
        stored = blocks(tier, [256 * KIB] * 16)
        await tier.write(stored)
        tier.close()

        tier, found = await opened(tmp_path, 2 * MIB - 4096)
        assert keys(found) == {t.key for t in stored if t.slot.offset + t.slot.length <= 2 * MIB - 4096}
        assert tier.found == Recovered(7, beyond_capacity=9)
        assert await read(tier, found) == expected(found)
        assert (tmp_path / "blocks").stat().st_size == SUPERBLOCK_BYTES + 2 * MIB - 4096
        assert tier.check() == []
        tier.close()

        tier, found = await opened(tmp_path, 8 * MIB)
        assert tier.found == Recovered(7)
        assert await read(tier, found) == expected(found)
        assert (tmp_path / "blocks").stat().st_blocks * 512 >= 8 * MIB
        await tier.write(more := blocks(tier, [MIB] * 6, "more"))
        assert await read(tier, more) == expected(more)
        tier.close()

    asyncio.run(scenario())


# Disks that are full, away, read-only or of another kind.


def test_it_works_in_memory(tmp_path: Path) -> None:
    folder = Path("/dev/shm") / f"kvstore-{os.getpid()}"
    try:
        stored = fill(folder)
        assert survivors(folder) == (keys(stored), set(), Recovered(len(stored)))
    finally:
        shutil.rmtree(folder)


def test_without_direct_access_and_allocation_it_says_so_once_and_works(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        caplog.set_level(logging.INFO)
        tier, _ = await opened(folder)
        assert not tier.direct
        await tier.recover()
        assert [record.getMessage() for record in caplog.records] == [
            f"no O_DIRECT on {folder}: reads and writes go through the page cache",
            f"no fallocate on {folder}: writes fail once others have filled it",
        ]
        tier.close()

    # A ramfs has neither.
    with mounted("ramfs", tmp_path / "ram") as folder:
        asyncio.run(scenario())
        stored = fill(folder)
        assert survivors(folder) == (keys(stored), set(), Recovered(len(stored)))


def test_a_disk_that_others_fill_does_not_stop_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        tier, _ = await opened(folder)
        with (folder / "somebody's").open("wb") as file, pytest.raises(OSError, match="No space"):
            file.write(bytes(8 * MIB))
        await tier.probe()
        lengths = [64 * KIB] * 60
        for turn in range(3):
            stored = [
                block(tier, b"%d" % n, length, Namespace(f"{turn}-{n}")) for n, length in enumerate(lengths)
            ]
            await tier.write(stored)
            assert await read(tier, stored) == expected(stored)
            if turn < 2:
                await drop(tier, stored)
            await tier.flush()
        tier.close()
        again, found = await opened(folder)
        assert keys(found) == keys(stored)
        assert await read(again, found) == expected(found)
        again.close()

    with mounted("tmpfs", tmp_path / "full", "size=8m") as folder:
        with pytest.raises(
            ConfigError, match=r"nvme tier: 8 MiB asked, 7\.\d+ MiB free on .*full; lower its capacity"
        ):
            asyncio.run(opened(folder, 8 * MIB))
        asyncio.run(scenario())
        with pytest.raises(
            ConfigError, match=r"nvme tier: 6 MiB asked, 4\.\d+ MiB free on .*; lower its capacity"
        ):
            asyncio.run(opened(folder, 6 * MIB))
        assert len(asyncio.run(opened(folder))[1]) == 60


def test_a_read_only_disk_is_tried_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        tier = NvmeTier(folder, CAPACITY_BYTES)
        with pytest.raises(TierError, match=r"opening it in .* failed: .*Read-only.*; mount it writable"):
            await tier.recover()
        assert tier.check() == []
        assert not await tier.same()
        with pytest.raises(TierError, match="is not open"):
            await tier.write([])
        subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
        found = await tier.recover()
        assert await read(tier, found) == expected(found)
        assert len(found) == len(stored)
        tier.close()

    with mounted("tmpfs", tmp_path / "read-only", "size=8m") as folder:
        stored = fill(folder)
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        asyncio.run(scenario())


@pytest.mark.parametrize("limit", [SUPERBLOCK_BYTES, SUPERBLOCK_BYTES + 5000, SUPERBLOCK_BYTES + 8192])
def test_a_failed_write_leaves_nothing_and_the_next_one_goes_on(tmp_path: Path, limit: int) -> None:
    async def scenario() -> None:
        tier, _ = await opened(tmp_path / "tier")
        stored = blocks(tier, [4096] * 120)
        await tier.write(stored)
        # The next two get the lowest slots, a low and a high record: the last limit stops only the latter.
        await drop(tier, [*stored[101:], stored[1], stored[100], stored[0]])
        stored = stored[2:100]
        await tier.flush()
        one, two = blocks(tier, [4096, 4096], "new")
        assert (one.slot.offset, two.slot.offset) == (0, 4096)
        with (
            file_size_limit(limit),
            pytest.raises(TierError, match=r"writing 2 blocks in .* failed: .*; see the kernel's log"),
        ):
            await tier.write([one, two])
        assert (one.record, two.record) == (None, None)
        shutil.copytree(tmp_path / "tier", tmp_path / "as if killed")
        killed, found = await opened(tmp_path / "as if killed")
        assert keys(found) == keys(stored)
        killed.close()
        assert tier.check() == []
        # To forget them once more is no harm: the store may not know of the failure yet.
        tier.forget([one.record, two.record])
        await tier.write([two])
        assert await read(tier, [two, *stored]) == expected([two, *stored])
        assert tier.check() == []
        tier.close()
        again, found = await opened(tmp_path / "tier")
        assert keys(found) == keys([two, *stored])
        again.close()

    asyncio.run(scenario())


def test_what_could_not_be_forgotten_is_forgotten_later(tmp_path: Path) -> None:
    async def scenario() -> None:
        tier, _ = await opened(tmp_path)
        stored = blocks(tier, [4096] * 6)
        await tier.write(stored)
        await drop(tier, stored[:1])
        with file_size_limit(RECORD_BYTES):
            with pytest.raises(TierError, match="forgetting blocks"):
                await tier.flush()
            # Nor are its slot and its record used again before.
            with pytest.raises(TierError, match="writing 1 blocks"):
                await tier.write(blocks(tier, [4096], "new"))
        await tier.flush()
        await drop(tier, stored[1:2])
        with file_size_limit(RECORD_BYTES), pytest.raises(TierError, match="forgetting blocks"):
            await tier.flush()
        # Opened again it knows of that still, and of what is forgotten while nothing is open.
        (tmp_path / "namespaces").rename(tmp_path / "away")
        (tmp_path / "namespaces").mkdir()
        with pytest.raises(ConfigError):
            await tier.recover()
        tier.forget([stored[2].record])
        (tmp_path / "namespaces").rmdir()
        (tmp_path / "away").rename(tmp_path / "namespaces")
        assert keys(await tier.recover()) == keys(stored[3:])
        tier.close()
        again, found = await opened(tmp_path)
        assert keys(found) == keys(stored[3:])
        again.close()

    asyncio.run(scenario())


def remove(folder: Path) -> None:
    shutil.rmtree(folder)


def replace(name: str) -> Damage:
    def damage(folder: Path) -> None:
        shutil.copy(folder / name, folder / "copy")
        (folder / "copy").rename(folder / name)

    return damage


def truncate(name: str) -> Damage:
    return lambda folder: os.truncate(folder / name, 200)


def threads_that_hang() -> int:
    states = [
        path.read_text().rpartition(")")[2].split()[0] for path in Path("/proc/self/task").glob("*/stat")
    ]
    return states.count("D")


def test_a_disk_that_hangs_stops_neither_the_event_loop_nor_closing(tmp_path: Path) -> None:
    async def scenario() -> None:
        tier, _ = await opened(folder)
        await tier.write(stored := blocks(tier, LENGTHS))
        held = blocks(tier, [4096] * 2, "held")
        with frozen(folder):
            hanging = [asyncio.ensure_future(tier.write([transfer])) for transfer in held]
            hanging.append(asyncio.ensure_future(tier.probe()))
            deadline = time.monotonic() + 20
            while threads_that_hang() < 3:
                assert time.monotonic() < deadline
                await asyncio.sleep(0)
            held[1].dropped = True
            tier.forget([held[1].record])
            # Reading goes on, in the thread that is left.
            assert await read(tier, stored) == expected(stored)
            assert tier.check() == []
            assert not any(call.done() for call in hanging)
            with pytest.raises(TierError, match="3 calls are under way"):
                await tier.recover()
            tier.close()
            with pytest.raises(ConfigError, match="is used by process"):
                await opened(folder)
        await asyncio.gather(*hanging)
        again, found = await opened(folder)
        assert keys(found) == keys([*stored, held[0]])
        assert await read(again, found) == expected(found)
        again.close()

    with (tmp_path / "disk").open("wb") as disk:
        disk.truncate(32 * MIB)
    if subprocess.run(["mkfs.ext4", "-q", disk.name], check=False).returncode:
        pytest.skip("there is no mkfs.ext4")
    with mounted("ext4", tmp_path / "mounted", "loop", disk.name) as folder:
        asyncio.run(scenario())


DAMAGES: dict[str, Damage] = {
    "removed": remove,
    "blocks replaced": replace("blocks"),
    "table replaced": replace("table"),
    "namespaces replaced": replace("namespaces"),
    "lock replaced": replace("lock"),
    "blocks truncated": truncate("blocks"),
    "table truncated": truncate("table"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_files_changed_behind_its_back_are_noticed_and_opened_again(tmp_path: Path, damage: Damage) -> None:
    async def scenario() -> None:
        folder = tmp_path / "tier"
        tier, _ = await opened(folder)
        await tier.write(blocks(tier, LENGTHS))
        assert await tier.same()
        damage(folder)
        assert not await tier.same()
        found = await tier.recover()
        assert await tier.same()
        for transfer, content in zip(found, await read(tier, found), strict=True):
            assert content in (None, *expected([transfer]))
        await tier.write(stored := blocks(tier, LENGTHS, "new"))
        assert await read(tier, stored) == expected(stored)
        assert tier.check() == []
        tier.close()

    asyncio.run(scenario())


def test_a_directory_that_somebody_else_took_meanwhile_is_not_taken_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        tier, _ = await opened(tmp_path / "tier")
        shutil.rmtree(tmp_path / "tier")
        other, _ = await opened(tmp_path / "tier")
        assert not await tier.same()
        with pytest.raises(ConfigError, match="is used by process"):
            await tier.recover()
        tier.close()
        await other.write(stored := blocks(other, LENGTHS))
        assert await read(other, stored) == expected(stored)
        other.close()

    asyncio.run(scenario())


def test_ten_thousand_blocks_are_there_again_at_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        tier, _ = await opened(tmp_path, 64 * MIB)
        memory = pages(4096)
        for turn in range(20):
            made = []
            for number in range(500):
                key = random.Random(turn * 500 + number).randbytes(32)
                slot = tier.take(4096, key)
                assert slot is not None
                made.append(Transfer(NAMESPACE, key, 4096, slot=slot, memory=memory))
            await tier.write(made)
        tier.close()
        again = NvmeTier(tmp_path, 64 * MIB)
        begun = time.perf_counter()
        found = await again.recover()
        took_s = time.perf_counter() - begun
        assert len(found) == 10_000
        assert again.check() == []
        assert took_s < 2
        again.close()

    asyncio.run(scenario())
