"""A daemon whose working set is four times its arena, the rest on NVMe: what readers of DRAM feel of it, how
fast blocks come up, what a killed daemon still has, and how soon a started one is ready with it.

Nothing is pinned: there are more processes than a small machine has cores. So readers who load as much as
they can and look at nothing are told from readers who check every byte, each beside the same processes when
NVMe has nothing to do.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np

from benchmarks.daemon import Daemon, Place, settle, tier_of
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
from benchmarks.readers import WAIT_S, Choice, Documents, Readers, Tally, popularity, publish
from benchmarks.written import NAMESPACE, Written, block_key, written_tier
from kvstore.block import Medium
from kvstore.client import StoreClient
from kvstore.statistics import NodeStatistics

BENCH: Final = "tiers"
CLIENTS: Final = 4
BLOCK_SIZES: Final = {"2MiB": 2 * MIB, "256KiB": 256 * KIB}
QUICK_SIZES: Final = ("2MiB",)
DOCUMENT_BYTES: Final = 4 * MIB
SET_PER_ARENA: Final = 4
# What the daemon reads and writes at once.
JOBS: Final = 4
PROBED_BLOCKS: Final = 2
# Often enough that the probed blocks are never the coldest, and seldom enough to cost little.
PROBE_PAUSE_S: Final = 0.001

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


@dataclass(frozen=True, slots=True)
class _Phase:
    """What some seconds showed: the probe's latencies, and where the readers' blocks were, in percent."""

    p50_us: float
    p99_us: float
    loaded_mb_s: float
    in_dram: float
    tally: Tally


def run(settings: Settings) -> Report:
    """Every size under load, then the kill, then the starts."""
    rows: list[Row] = []
    with TemporaryDirectory(prefix="kvbench-", dir=chosen_directory()) as name:
        directory = Path(name)
        for size, block_bytes in BLOCK_SIZES.items():
            if size in QUICK_SIZES or not settings.quick:
                with _stage(directory, block_bytes, settings) as stage:
                    rows += _load_rows(stage, size, settings)
        rows += [_killed_row(directory, settings), *_ready_rows(directory, settings)]
        caption = _caption(directory, settings)
    return Report(BENCH, rows, judge(rows, TARGETS), caption)


@dataclass(frozen=True, slots=True)
class _Stage:
    """A daemon, its readers, a client that probes, and the limit beside them."""

    client: StoreClient
    readers: Readers
    documents: Documents
    raw: RawFile
    arena_bytes: int
    phase_s: float
    lead_s: float  # before a phase counts, so that readers have begun

    @property
    def probed_keys(self) -> list[bytes]:
        """Blocks of no document."""
        first = self.documents.count * self.documents.blocks
        return [block_key(first + number) for number in range(PROBED_BLOCKS)]

    def store(self) -> float:
        """MB/s of storing all documents until the last one is written, after removing them."""
        for document in range(self.documents.count):
            self.client.remove(NAMESPACE, self.documents.keys(document))

        def store_all() -> None:
            publish(self.client, self.documents)
            settle(self.client)

        return self.documents.count * DOCUMENT_BYTES / seconds(store_all) / 1e6

    def phase(self, choice: Choice | None) -> _Phase:
        """Probe while the readers read, or while they do nothing."""
        for key in self.probed_keys:
            self.client.get(NAMESPACE, key)
        if choice is not None:
            self.readers.begin(choice)
        time.sleep(self.lead_s)
        before, began = self.client.statistics(), time.perf_counter()
        latencies, missed = self._probe(began + self.phase_s)
        after, ended = self.client.statistics(), time.perf_counter()
        tally = self.readers.end() if choice is not None else Tally()
        if missed > len(latencies):
            raise BenchmarkError(f"{missed} of {missed + len(latencies)} probed blocks were not in DRAM")
        p50, p99 = (1e6 * float(bound_s) for bound_s in np.percentile(latencies, (50, 99)))
        read_bytes = _nvme_bytes_read(after) - _nvme_bytes_read(before)
        in_dram = _dram_rate(before, after, len(latencies), missed)
        return _Phase(p50, p99, read_bytes / (ended - began) / 1e6, in_dram, tally)

    def _probe(self, until: float) -> tuple[list[float], int]:
        """How long acquires took that found their block in DRAM, and how many did not."""
        latencies: list[float] = []
        missed = 0
        keys = self.probed_keys
        while (began := time.perf_counter()) < until:
            key = keys[(len(latencies) + missed) % len(keys)]
            with self.client.acquire(NAMESPACE, [key]) as read:
                took_s = time.perf_counter() - began
            if read.hit_length:
                latencies.append(took_s)
            else:
                missed += 1
                self.client.acquire(NAMESPACE, [key], wait_s=WAIT_S).release()
            time.sleep(PROBE_PAUSE_S)
        return latencies, missed


@contextmanager
def _stage(directory: Path, block_bytes: int, settings: Settings) -> Iterator[_Stage]:
    arena_bytes = settings.pick(256, 128) * MIB
    set_bytes = SET_PER_ARENA * arena_bytes
    documents = Documents(set_bytes // DOCUMENT_BYTES, DOCUMENT_BYTES // block_bytes, block_bytes)
    raw_buffer = filled_buffer(arena_bytes)
    with ExitStack() as exits:
        folder = Path(exits.enter_context(TemporaryDirectory(prefix="node-", dir=directory)))
        daemon = exits.enter_context(Daemon(folder, arena_bytes, Place(folder / "tier", 2 * set_bytes)))
        client = exits.enter_context(daemon.client())
        readers = exits.enter_context(closing(Readers(CLIENTS, daemon.address, documents)))
        raw = exits.enter_context(closing(RawFile(folder)))
        raw.prepare(Blocks(block_bytes, raw_buffer, raw_buffer))
        phase_s, lead_s = (0.2, 0.1) if settings.quick else (2.0, 0.3)
        stage = _Stage(client, readers, documents, raw, arena_bytes, phase_s, lead_s)
        for key in stage.probed_keys:
            client.put(NAMESPACE, key, bytes(block_bytes))
        yield stage


def _load_rows(stage: _Stage, size: str, settings: Settings) -> list[Row]:
    def raw(move: Callable[[int], None]) -> float:
        return stage.arena_bytes / seconds(partial(move, JOBS)) / 1e6

    stored = medians({OURS: stage.store, RAW: partial(raw, stage.raw.store)}, settings.rounds)
    raw_loads: list[float] = []
    choices = {IDLE: None, LOADING: Choice.UNIFORM, CHECKING: Choice.ZIPF, IN_DRAM: Choice.FEW}

    def phase(choice: Choice | None) -> _Phase:
        if choice is None:  # once a round
            raw_loads.append(raw(stage.raw.load))
        return stage.phase(choice)

    phases = interleaved({name: partial(phase, choice) for name, choice in choices.items()}, settings.rounds)
    rows = [
        row(BENCH, f"stored, {size}", "MB/s", "higher", stored, RAW),
        *_latency_rows(phases, LOADING, [], size),
        *_latency_rows(phases, CHECKING, [IN_DRAM], size),
    ]
    limit = Limit(RAW, median(raw_loads[1:]))
    for name in (LOADING, CHECKING):
        loaded = median(phase.loaded_mb_s for phase in phases[name])
        rows.append(Row(BENCH, f"loaded, {name}, {size}", "MB/s", "higher", loaded, limit, {}))
    return rows + _hit_rows(stage, phases[CHECKING], [p for taken in phases.values() for p in taken], size)


def _latency_rows(
    phases: Mapping[str, Sequence[_Phase]], busy: str, peers: Sequence[str], size: str
) -> list[Row]:
    rows = []
    for field in ("p50", "p99"):
        figures = {
            name: median(getattr(phase, f"{field}_us") for phase in phases[name])
            for name in (busy, IDLE, *peers)
        }
        figures[OURS] = figures.pop(busy)
        if field == "p99":
            figures[IDLE_P50] = median(phase.p50_us for phase in phases[IDLE])
        rows.append(row(BENCH, f"DRAM hit {field}, {busy}, {size}", "µs", "lower", figures, IDLE))
    return rows


def _hit_rows(stage: _Stage, checking: Sequence[_Phase], phases: Sequence[_Phase], size: str) -> list[Row]:
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


def _nvme_bytes_read(statistics: NodeStatistics) -> int:
    return tier_of(statistics, Medium.NVME).counters.read_bytes


def _dram_rate(before: NodeStatistics, after: NodeStatistics, hits: int, misses: int) -> float:
    """Percent of the blocks that readers asked for which were in DRAM.

    `hits` and `misses` are the probe's, which asks again for what it misses.
    """
    first, last = (tier_of(each, Medium.DRAM).counters for each in (before, after))
    hit = last.hit_blocks - first.hit_blocks - hits
    missed = last.missed_blocks - first.missed_blocks - 2 * misses
    return 100 * hit / max(1, hit + missed)


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
