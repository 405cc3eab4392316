"""The NVMe tier alone, without a store above it: how fast blocks go down and come back, and how soon what is
down is known again after a start.

One job is one call, of as many blocks as make up 8 MiB and at least of one; the limit has a thread for each
job. Everybody's blocks lie in files of the same file system, which are overwritten where they can be.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack, closing
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np
import uvloop
import xxhash

from benchmarks.disk import (
    FILE_PER_BLOCK,
    HASHED,
    RAW,
    Blocks,
    Disk,
    FilePerBlock,
    HashedFile,
    RawFile,
    chosen_directory,
    describe,
    in_threads,
)
from benchmarks.harness import (
    KIB,
    MIB,
    OURS,
    BenchmarkError,
    Report,
    Row,
    Settings,
    Target,
    judge,
    medians,
    row,
    seconds,
)
from benchmarks.peers.base import filled_buffer, touched_buffer
from benchmarks.written import NAMESPACE, Written, block_key, written_tier
from tiers.base import StorageTier, Transfer
from tiers.nvme import NvmeTier

BENCH: Final = "nvme"
BLOCK_SIZES: Final = {
    "64KiB": 64 * KIB,
    "256KiB": 256 * KIB,
    "2MiB": 2 * MIB,
    "8MiB": 8 * MIB,
    "32MiB": 32 * MIB,
}
QUICK_SIZES: Final = ("2MiB",)
JOBS: Final = (1, 2, 4)
NO_CHECKSUM: Final = "no checksum"
RECOVERED_SIZES: Final = {"64KiB": 64 * KIB, "2MiB": 2 * MIB}
RECOVERED_BLOCKS: Final = 10_000
READ_TABLE: Final = "reading the table"

_JUDGED: Final = tuple(
    f"{verb} {size}, {jobs} under way"
    for size in ("2MiB", "8MiB")
    for verb in ("store", "load")
    for jobs in JOBS
)
TARGETS: Final = (
    Target(_JUDGED, "limit", 0.90),
    Target(tuple(f"recover {size}" for size in RECOVERED_SIZES), None, 2.0),
)
MISSING: Final = {
    "mooncake": (
        "it has a disk tier, but none that can be timed: it writes in the background by a heartbeat, some"
        " 80 MB/s, and of 512 MiB put into a segment of 300 MiB a half was gone before it was written"
    )
}


class OurTier:
    """The tier as the store uses it: slots of its own, transfers, and calls on one event loop."""

    def __init__(self, tier: StorageTier) -> None:
        self._runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self._tier = tier
        self._runner.run(self._tier.recover())
        self._blocks: Blocks | None = None
        self._transfers: list[Transfer] = []
        self._sources: list[memoryview] = []
        self._destinations: list[memoryview] = []
        self._checksums: list[int] = []

    def prepare(self, blocks: Blocks) -> Blocks:
        self.clear()
        for transfer in self._transfers:
            self._tier.free(transfer.slot)
        self._blocks = blocks
        self._sources, self._destinations = blocks.views(blocks.source), blocks.views(blocks.destination)
        self._checksums = [xxhash.xxh3_64_intdigest(view) for view in self._sources]
        self._transfers = [self._placed(number) for number in range(len(blocks))]
        return blocks

    def clear(self) -> None:
        """Forget the blocks and keep their slots."""
        self._tier.forget([transfer.record for transfer in self._transfers])
        self._transfers = [
            Transfer(NAMESPACE, old.key, old.length, slot=old.slot, memory=source)
            for old, source in zip(self._transfers, self._sources, strict=True)
        ]

    def store(self, jobs: int) -> None:
        self._move(jobs, self._tier.write, shuffled=False)

    def store_with_checksums(self, jobs: int) -> None:
        """Store what has its checksum already, as a block that was loaded or is stored again."""
        for transfer, checksum in zip(self._transfers, self._checksums, strict=True):
            transfer.checksum = checksum
        self.store(jobs)

    def load(self, jobs: int) -> None:
        for transfer, memory in zip(self._transfers, self._destinations, strict=True):
            transfer.memory = memory
        self._move(jobs, self._tier.read, shuffled=True)
        if lost := sum(not transfer.arrived for transfer in self._transfers):
            raise BenchmarkError(f"{lost} blocks came back damaged, or not at all")

    def hash(self, jobs: int) -> None:
        """Only the checksums of what is loaded."""

        def work(number: int) -> None:
            xxhash.xxh3_64_intdigest(self._destinations[number])

        assert self._blocks is not None
        in_threads(jobs, self._blocks.batches(shuffled=True), work)

    def close(self) -> None:
        self._tier.close()
        self._runner.close()

    def _placed(self, number: int) -> Transfer:
        assert self._blocks is not None
        length = self._blocks.block_bytes
        slot = self._tier.take(length, self)
        if slot is None:
            raise BenchmarkError(f"no room for block {number} of {length} bytes")
        return Transfer(NAMESPACE, block_key(number), length, slot=slot, memory=self._sources[number])

    def _move(
        self, jobs: int, call: Callable[[Sequence[Transfer]], Awaitable[None]], *, shuffled: bool
    ) -> None:
        assert self._blocks is not None
        left = iter(self._blocks.batches(shuffled=shuffled))

        async def work() -> None:
            for batch in left:
                await call([self._transfers[number] for number in batch])

        async def all_work() -> None:
            await asyncio.gather(*(work() for _ in range(jobs)))

        self._runner.run(all_work())


def run(settings: Settings) -> Report:
    """Measure every size at every number of jobs, then recovery."""
    with TemporaryDirectory(prefix="kvbench-", dir=chosen_directory()) as name:
        directory = Path(name)
        rows = [*_bandwidth_rows(directory, settings), *_recovery_rows(directory, settings)]
        caption = _caption(directory, settings)
    return Report(BENCH, rows, judge(rows, TARGETS), caption, {"xxhash": version("xxhash")}, MISSING)


def _bandwidth_rows(directory: Path, settings: Settings) -> list[Row]:
    size_bytes = settings.pick(256, 32) * MIB
    source, destination = filled_buffer(size_bytes), touched_buffer(size_bytes)
    rows = []
    with ExitStack() as exits:
        tier = exits.enter_context(closing(OurTier(NvmeTier(directory / "tier", size_bytes))))
        peers: dict[str, Disk] = {
            RAW: RawFile(directory),
            HASHED: HashedFile(directory),
            FILE_PER_BLOCK: FilePerBlock(directory),
        }
        disks: dict[str, Disk] = {OURS: tier, **peers}
        for disk in peers.values():
            exits.enter_context(closing(disk))
        for size, block_bytes in BLOCK_SIZES.items():
            if settings.quick and size not in QUICK_SIZES:
                continue
            blocks = Blocks(block_bytes, source, destination)
            stored = {name: disk.prepare(blocks) for name, disk in disks.items()}
            for jobs in JOBS:
                rows += _size_rows(f"{size}, {jobs} under way", tier, disks, stored, jobs, settings.rounds)
    return rows


def _size_rows(
    label: str, tier: OurTier, disks: dict[str, Disk], blocks: dict[str, Blocks], jobs: int, rounds: int
) -> list[Row]:
    ours = blocks[OURS]
    stores = {
        name: partial(_bandwidth, blocks[name], jobs, disk.store, disk.clear) for name, disk in disks.items()
    }
    stores[NO_CHECKSUM] = partial(_bandwidth, ours, jobs, tier.store_with_checksums, tier.clear)
    stored = medians(stores, rounds)
    for name, disk in disks.items():
        _check(name, disk, blocks[name])
    loads = {name: partial(_bandwidth, blocks[name], jobs, disk.load) for name, disk in disks.items()}
    loads[NO_CHECKSUM] = partial(_bandwidth, ours, jobs, tier.hash)
    loaded = medians(loads, rounds)
    # No tier reads without checking; this is what would be left if its threads had not.
    loaded[NO_CHECKSUM] = 1 / max(1 / loaded[OURS] - 1 / loaded[NO_CHECKSUM], 1e-9)
    return [
        row(BENCH, f"store {label}", "MB/s", "higher", stored, RAW),
        row(BENCH, f"load {label}", "MB/s", "higher", loaded, RAW),
    ]


def _bandwidth(
    blocks: Blocks, jobs: int, move: Callable[[int], None], before: Callable[[], None] | None = None
) -> float:
    if before is not None:
        before()
    return blocks.source.size / seconds(partial(move, jobs)) / 1e6


def _check(name: str, disk: Disk, blocks: Blocks) -> None:
    """Who gives back something else is not fast."""
    blocks.destination.fill(0)
    disk.load(1)
    if not np.array_equal(blocks.source, blocks.destination):
        raise BenchmarkError(f"{name} does not give back what was stored, at {blocks.block_bytes} bytes")


def _recovery_rows(directory: Path, settings: Settings) -> list[Row]:
    rows = []
    blocks = settings.pick(RECOVERED_BLOCKS, RECOVERED_BLOCKS // 10)
    for size, block_bytes in RECOVERED_SIZES.items():
        if settings.quick and size != "64KiB":
            continue
        with written_tier(directory, blocks, block_bytes) as written:
            table = written.folder / "table"
            samplers = {OURS: partial(_recovery_s, written), READ_TABLE: partial(seconds, table.read_bytes)}
            figures = medians(samplers, settings.rounds)
        rows.append(row(BENCH, f"recover {size}", "s", "lower", figures, READ_TABLE))
    return rows


def _recovery_s(written: Written) -> float:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        tier = NvmeTier(written.folder, written.capacity_bytes)
        with closing(tier):
            found: list[Transfer] = []
            taken_s = seconds(lambda: found.extend(runner.run(tier.recover())))
    if len(found) != written.blocks:
        raise BenchmarkError(f"{len(found)} of {written.blocks} blocks recovered")
    return taken_s


def _caption(directory: Path, settings: Settings) -> str:
    recovered = settings.pick(RECOVERED_BLOCKS, RECOVERED_BLOCKS // 10)
    return (
        f"Files in {describe(directory)}; {settings.pick(256, 32)} MiB of blocks, stored in order, loaded in"
        f" random order, on cores {sorted(settings.cores.all)} as the kernel places them. The limit is one"
        " system call a block in one file that is there in full, with a thread for each job; + xxh3: and each"
        " block's checksum, before or after. File per block: create, write and rename, or open and read, past"
        " the page cache where the limit is, 4,096 files at most. No checksum: ours stored with checksums"
        " that are known, or loaded, less the time that xxh3 of as many bytes takes in as many threads."
        f" Recovery: {recovered:,} blocks."
    )
