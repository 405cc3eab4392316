"""A daemon whose working set is larger than its arena, its readers, and a client that acquires blocks in DRAM
meanwhile, which is the probe. Which readers read when, and what is too long, is the benchmark's affair.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np

from benchmarks.daemon import Daemon, Place, settle, tier_of
from benchmarks.harness import MIB, OURS, BenchmarkError, Row, Settings, row, seconds
from benchmarks.readers import WAIT_S, Choice, Documents, Readers, Tally, publish
from benchmarks.written import NAMESPACE, block_key
from kvstore.block import Medium
from kvstore.client import StoreClient
from kvstore.statistics import NodeStatistics

CLIENTS: Final = 4
DOCUMENT_BYTES: Final = 4 * MIB
SET_PER_ARENA: Final = 4
PROBED_BLOCKS: Final = 2
# Often enough that the probed blocks are never the coldest, and seldom enough to cost little.
PROBE_PAUSE_S: Final = 0.001
# An acquire that waits for nothing is late beyond that.
AT_ONCE_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class Phase:
    """What some seconds showed: the probe's latencies, and where the readers' blocks were, in percent.

    `late` are answers that came after their deadline, to the probe or to a reader.
    """

    p50_us: float
    p99_us: float
    late: int
    loaded_mb_s: float
    in_dram: float
    tally: Tally


@dataclass(frozen=True, slots=True)
class Stage:
    """All of them, and the medium that the daemon loads from."""

    client: StoreClient
    readers: Readers
    documents: Documents
    below: Medium
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

    def phase(self, choice: Choice | None) -> Phase:
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
        read_bytes = self._bytes_read(after) - self._bytes_read(before)
        in_dram = _dram_rate(before, after, len(latencies), missed)
        late = tally.late + sum(took_s > AT_ONCE_S for took_s in latencies)
        return Phase(p50, p99, late, read_bytes / (ended - began) / 1e6, in_dram, tally)

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

    def _bytes_read(self, statistics: NodeStatistics) -> int:
        return tier_of(statistics, self.below).counters.read_bytes


@contextmanager
def opened_stage(
    directory: Path,
    block_bytes: int,
    settings: Settings,
    *,
    nvme: bool = False,
    redis: str = "",
    wait_s: float = WAIT_S,
) -> Iterator[Stage]:
    """With NVMe below the arena, or with the Redis of that URL; its readers wait for `wait_s`."""
    arena_bytes = settings.pick(256, 128) * MIB
    set_bytes = SET_PER_ARENA * arena_bytes
    documents = Documents(set_bytes // DOCUMENT_BYTES, DOCUMENT_BYTES // block_bytes, block_bytes)
    with ExitStack() as exits:
        folder = Path(exits.enter_context(TemporaryDirectory(prefix="node-", dir=directory)))
        place = Place(folder / "tier", 2 * set_bytes) if nvme else None
        daemon = exits.enter_context(Daemon(folder, arena_bytes, place, redis))
        client = exits.enter_context(daemon.client())
        readers = exits.enter_context(closing(Readers(CLIENTS, daemon.address, documents, wait_s)))
        phase_s, lead_s = (0.2, 0.1) if settings.quick else (2.0, 0.3)
        below = Medium.NVME if nvme else Medium.REMOTE
        stage = Stage(client, readers, documents, below, arena_bytes, phase_s, lead_s)
        for key in stage.probed_keys:
            client.put(NAMESPACE, key, bytes(block_bytes))
        yield stage


def latency_rows(
    bench: str, phases: Mapping[str, Sequence[Phase]], busy: str, idle: str, peers: Sequence[str], size: str
) -> list[Row]:
    """The probe's p50 and p99 in the phases called `busy`, beside those called `idle` and `peers`."""
    rows = []
    for field in ("p50", "p99"):
        figures = {
            name: median(getattr(phase, f"{field}_us") for phase in phases[name])
            for name in (busy, idle, *peers)
        }
        figures[OURS] = figures.pop(busy)
        if field == "p99":
            figures[f"p50, {idle}"] = median(phase.p50_us for phase in phases[idle])
        rows.append(row(bench, f"DRAM hit {field}, {busy}, {size}", "µs", "lower", figures, idle))
    return rows


def _dram_rate(before: NodeStatistics, after: NodeStatistics, hits: int, misses: int) -> float:
    """Percent of the blocks that readers asked for which were in DRAM.

    `hits` and `misses` are the probe's, which asks again for what it misses.
    """
    first, last = (tier_of(each, Medium.DRAM).counters for each in (before, after))
    hit = last.hit_blocks - first.hit_blocks - hits
    missed = last.missed_blocks - first.missed_blocks - 2 * misses
    return 100 * hit / max(1, hit + missed)
