"""A daemon whose working set is four times its arena, the rest on NVMe: what readers of DRAM feel of it, how
fast blocks come up, what a killed daemon still has, and how soon a started one is ready with it.

Nothing is pinned: there are more processes than a small machine has cores. So readers who load as much as
they can and look at nothing are told from readers who check every byte, each beside the same processes when
NVMe has nothing to do.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np

from benchmarks.daemon import Daemon, Place, tier_of
from benchmarks.disk import RAW, Blocks, RawFile, chosen_directory, describe
from benchmarks.harness import (
    KIB,
    MIB,
    OURS,
    BenchmarkError,
    Limit,
    Report,
    Row,
    Settings,
    Target,
    interleaved,
    judge,
    medians,
    row,
    seconds,
)
from benchmarks.nvme import RECOVERED_BLOCKS, RECOVERED_SIZES
from benchmarks.peers.base import filled_buffer
from benchmarks.readers import Choice, popularity
from benchmarks.stage import (
    CLIENTS,
    DOCUMENT_BYTES,
    PROBE_PAUSE_S,
    SET_PER_ARENA,
    Phase,
    Stage,
    latency_rows,
    opened_stage,
)
from benchmarks.written import NAMESPACE, Written, block_key, written_tier
from kvstore.block import Medium

BENCH: Final = "tiers"
BLOCK_SIZES: Final = {"2MiB": 2 * MIB, "256KiB": 256 * KIB}
QUICK_SIZES: Final = ("2MiB",)
# What the daemon reads and writes at once.
JOBS: Final = 4

IDLE, LOADING, CHECKING, IN_DRAM = "NVMe idle", "NVMe saturated", "Zipf readers", "same readers in DRAM"
IDLE_P50: Final = "p50, NVMe idle"
HOTTEST, EVERYTHING = "the hottest that fit", "everything"
KILLED, PUT = "back after SIGKILL", "blocks put"
KILLED_BLOCKS, KILLED_BLOCK_BYTES = 100, 2 * MIB
NO_NVME: Final = "without NVMe"
TARGETS: Final = (
    # At most twice as long; where readers check what they read, than beside readers as busy.
    Target(tuple(f"DRAM hit p50, {LOADING}, {size}" for size in BLOCK_SIZES), "limit", 0.5),
    Target(tuple(f"DRAM hit p99, {LOADING}, {size}" for size in BLOCK_SIZES), IDLE_P50, 0.5),
    Target(tuple(f"DRAM hit p50, {CHECKING}, {size}" for size in BLOCK_SIZES), IN_DRAM, 0.5),
    Target(tuple(f"DRAM hit p99, {CHECKING}, {size}" for size in BLOCK_SIZES), IN_DRAM, 0.5),
    Target(tuple(f"wrong blocks, {size}" for size in BLOCK_SIZES), None, 0),
    Target((KILLED,), None, KILLED_BLOCKS),
    Target(tuple(f"ready with {size} blocks" for size in RECOVERED_SIZES), None, 2.0),
)


def run(settings: Settings) -> Report:
    """Every size under load, then the kill, then the starts."""
    rows: list[Row] = []
    with TemporaryDirectory(prefix="kvbench-", dir=chosen_directory()) as name:
        directory = Path(name)
        for size, block_bytes in BLOCK_SIZES.items():
            if size in QUICK_SIZES or not settings.quick:
                with _stage_and_limit(directory, block_bytes, settings) as (stage, raw_file):
                    rows += _load_rows(stage, raw_file, size, settings)
        rows += [_killed_row(directory, settings), *_ready_rows(directory, settings)]
        caption = _caption(directory, settings)
    return Report(BENCH, rows, judge(rows, TARGETS), caption)


@contextmanager
def _stage_and_limit(
    directory: Path, block_bytes: int, settings: Settings
) -> Iterator[tuple[Stage, RawFile]]:
    with (
        opened_stage(directory, block_bytes, settings, nvme=True) as stage,
        closing(RawFile(directory)) as raw,
    ):
        buffer = filled_buffer(stage.arena_bytes)
        raw.prepare(Blocks(block_bytes, buffer, buffer))
        yield stage, raw


def _load_rows(stage: Stage, raw_file: RawFile, size: str, settings: Settings) -> list[Row]:
    def raw(move: Callable[[int], None]) -> float:
        return stage.arena_bytes / seconds(partial(move, JOBS)) / 1e6

    stored = medians({OURS: stage.store, RAW: partial(raw, raw_file.store)}, settings.rounds)
    raw_loads: list[float] = []
    choices = {IDLE: None, LOADING: Choice.UNIFORM, CHECKING: Choice.ZIPF, IN_DRAM: Choice.FEW}

    def phase(choice: Choice | None) -> Phase:
        if choice is None:  # once a round
            raw_loads.append(raw(raw_file.load))
        return stage.phase(choice)

    phases = interleaved({name: partial(phase, choice) for name, choice in choices.items()}, settings.rounds)
    rows = [
        row(BENCH, f"stored, {size}", "MB/s", "higher", stored, RAW),
        *latency_rows(BENCH, phases, LOADING, IDLE, [], size),
        *latency_rows(BENCH, phases, CHECKING, IDLE, [IN_DRAM], size),
    ]
    limit = Limit(RAW, median(raw_loads[1:]))
    for name in (LOADING, CHECKING):
        loaded = median(phase.loaded_mb_s for phase in phases[name])
        rows.append(Row(BENCH, f"loaded, {name}, {size}", "MB/s", "higher", loaded, limit, {}))
    return rows + _hit_rows(stage, phases[CHECKING], [p for taken in phases.values() for p in taken], size)


def _hit_rows(stage: Stage, checking: Sequence[Phase], phases: Sequence[Phase], size: str) -> list[Row]:
    fitting = stage.arena_bytes // DOCUMENT_BYTES
    hottest = 100 * float(popularity(stage.documents.count)[:fitting].sum())
    wrong = sum(phase.tally.wrong for phase in phases)
    if not all(phase.tally.checked for phase in checking):
        raise BenchmarkError("the readers have read nothing")
    in_dram = median(phase.in_dram for phase in checking)
    in_all = median(100 * phase.tally.hit / phase.tally.asked for phase in checking)
    return [
        Row(BENCH, f"hits in DRAM, {size}", "% of blocks", "higher", in_dram, Limit(HOTTEST, hottest), {}),
        Row(
            BENCH,
            f"hits in DRAM or NVMe, {size}",
            "% of blocks",
            "higher",
            in_all,
            Limit(EVERYTHING, 100),
            {},
        ),
        Row(BENCH, f"wrong blocks, {size}", "blocks", "lower", wrong, Limit("none", 0), {}),
    ]


def _killed_row(directory: Path, settings: Settings) -> Row:
    """How many blocks come back bit for bit when the daemon is killed some seconds after they were put."""
    chance = np.random.default_rng(1)
    blocks = [chance.bytes(KILLED_BLOCK_BYTES) for _ in range(KILLED_BLOCKS)]
    with TemporaryDirectory(prefix="node-", dir=directory) as name:
        folder = Path(name)
        with Daemon(folder, 64 * MIB, Place(folder / "tier", 512 * MIB)) as daemon:
            with daemon.client() as client:
                for number, block in enumerate(blocks):
                    client.put(NAMESPACE, block_key(number), block)
                time.sleep(settings.pick(5, 1))
                daemon.kill()
            daemon.start()
            with daemon.client() as client:
                back = sum(client.get(NAMESPACE, block_key(n)) == block for n, block in enumerate(blocks))
    return Row(BENCH, KILLED, "blocks", "higher", back, Limit(PUT, KILLED_BLOCKS), {})


def _ready_rows(directory: Path, settings: Settings) -> list[Row]:
    """From the start of the process until it says that it is ready, with blocks on NVMe or without NVMe."""
    rows = []
    blocks = settings.pick(RECOVERED_BLOCKS, RECOVERED_BLOCKS // 10)
    for size, block_bytes in RECOVERED_SIZES.items():
        if settings.quick and size != "64KiB":
            continue
        with written_tier(directory, blocks, block_bytes) as written:
            samplers = {OURS: partial(_ready_s, written), NO_NVME: partial(_ready_s, None)}
            figures = medians(samplers, settings.rounds)
        rows.append(row(BENCH, f"ready with {size} blocks", "s", "lower", figures, NO_NVME))
    return rows


def _ready_s(written: Written | None) -> float:
    place = None if written is None else Place(written.folder, written.capacity_bytes)
    with TemporaryDirectory(prefix="kvbench-") as name, Daemon(Path(name), 64 * MIB, place) as daemon:
        if written is not None:
            with daemon.client() as client:
                recovered = tier_of(client.statistics(), Medium.NVME).counters.recovered_blocks
            if recovered != written.blocks:
                raise BenchmarkError(f"{recovered} of {written.blocks} blocks recovered")
        return daemon.ready_s


def _caption(directory: Path, settings: Settings) -> str:
    arena = settings.pick(256, 128)
    return (
        f"An arena of {arena} MiB, {SET_PER_ARENA * arena} MiB of blocks, NVMe in {describe(directory)}; all"
        f" processes on cores {sorted(settings.cores.all)} as the kernel places them. {CLIENTS} clients read"
        f" documents of {DOCUMENT_BYTES // MIB} MiB. NVMe saturated: any, looking at nothing. Zipf readers:"
        " by popularity (exponent 1), checking every byte of every hit. A fifth process acquires blocks"
        f" in DRAM, one at a time, {1 / PROBE_PAUSE_S:,.0f} a second at most. NVMe idle: nobody else does."
        " Same readers in DRAM: they check a few documents that stay there. Stored: until the last block is"
        " on NVMe. Ready: from the start of the process until it says so."
    )
