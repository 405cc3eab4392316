"""One client and one daemon on one node: how fast blocks go in and out, and what asking costs.

The client is on one core and the servers of all stores on another. What has no copy in it is measured in
three regimes, because a round trip between two cores costs several times that on one, and which of the
two a kernel chooses for processes that are free is its own affair. No ratio crosses regimes.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from benchmarks import ours
from benchmarks.harness import (
    GIB,
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
from benchmarks.limits import MEMCPY, ROUND_TRIP, Echo, Memcpy
from benchmarks.peers import installed_peers, running
from benchmarks.peers.base import Asked, Contestant, Pinning, WorkingSet, filled_buffer, touched_buffer, warm
from benchmarks.processes import pin

BENCH: Final = "node"
BLOCK_SIZES: Final = {
    "128KiB": 128 * KIB,
    "1MiB": MIB,
    "2MiB": 2 * MIB,
    "8MiB": 8 * MIB,
    "32MiB": 32 * MIB,
}
QUICK_SIZES: Final = ("2MiB",)
LOOKUP_BLOCKS: Final = 256


@dataclass(frozen=True, slots=True)
class Verb:
    """One way of moving all blocks of a working set. With `stores`, none of them may be there before."""

    name: str
    stores: bool
    move: Callable[[Contestant, WorkingSet], None]


def _put_batch(contestant: Contestant, work: WorkingSet) -> None:
    for batch in work.batches():
        contestant.put_batch(batch)


def _get_batch(contestant: Contestant, work: WorkingSet) -> None:
    for batch in work.batches():
        contestant.get_batch(batch)


def _put_single(contestant: Contestant, work: WorkingSet) -> None:
    for number in range(len(work.keys)):
        contestant.put_single(number)


def _get_single(contestant: Contestant, work: WorkingSet) -> None:
    for number in range(len(work.keys)):
        contestant.get_single(number)


VERBS: Final = (
    Verb("put batch", True, _put_batch),
    Verb("get batch", False, _get_batch),
    Verb("put single", True, _put_single),
    Verb("get single", False, _get_single),
)


@dataclass(frozen=True, slots=True)
class Lookup:
    """One question about `blocks` blocks; the figure is for one of them."""

    name: str
    blocks: int
    unit: str
    repeats: int
    ask: Callable[[Asked, range], None]


def _look_up(contestant: Asked, batch: range) -> None:
    contestant.look_up(batch)


def _pin(contestant: Asked, batch: range) -> None:
    assert isinstance(contestant, Pinning)
    contestant.pin_and_unpin(batch)


LOOKUPS: Final = (
    Lookup("acquire and release 1 block", 1, "µs/block", 2000, _pin),
    Lookup("acquire and release 64 blocks", 64, "µs/block", 300, _pin),
    Lookup("hit_length 1 key", 1, "µs/key", 2000, _look_up),
    Lookup("hit_length 256 keys", LOOKUP_BLOCKS, "µs/key", 300, _look_up),
)
ONE_CORE, TWO_CORES, FREE = "one core", "two cores", "free cores"

_BATCHED: Final = tuple(f"{verb} {size}" for size in BLOCK_SIZES for verb in ("put batch", "get batch"))
TARGETS: Final = (
    Target(tuple(case for case in _BATCHED if case.endswith((" 2MiB", " 8MiB", " 32MiB"))), "limit", 0.90),
    Target(tuple(case for case in _BATCHED if case.endswith(" 1MiB")), "limit", 0.87),
    Target(_BATCHED, "mooncake", 0.95),
    Target(_BATCHED, "mooncake", 1.0, mean=True),
    Target(("put single 2MiB", "get single 2MiB"), "redis-py", 3.0),
    Target((f"acquire and release 1 block, {ONE_CORE}",), None, 25.0),
    Target((f"acquire and release 64 blocks, {ONE_CORE}",), None, 1.2),
    Target((f"hit_length 256 keys, {ONE_CORE}",), None, 0.2),
)


def run(settings: Settings) -> Report:
    """Measure everything; all stores run throughout, so that what one costs the others is there for all."""
    before = os.sched_getaffinity(0)
    try:
        with _Stage(settings) as stage:
            rows = [*_bandwidth_rows(stage), *_lookup_rows(stage)]
            verdicts = judge(rows, TARGETS)
            return Report(BENCH, rows, verdicts, _caption(settings), stage.versions, stage.missing)
    finally:
        pin(os.getpid(), before)


class _Stage:
    """All stores, started, connected and warmed, and the limits in their places."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.missing: dict[str, str] = {}
        self.versions: dict[str, str] = {}
        self.contestants: dict[str, Contestant] = {}
        self.pids: list[int] = []
        self._exits = ExitStack()
        working_set_bytes = settings.pick(512 * MIB, 64 * MIB)
        self.source = filled_buffer(working_set_bytes)
        self.destination = touched_buffer(working_set_bytes)
        self.capacity_bytes = settings.pick(GIB, 256 * MIB)

    def __enter__(self) -> "_Stage":
        with ExitStack() as exits:
            directory = Path(exits.enter_context(TemporaryDirectory(prefix="kvbench-")))
            self.contestants[MEMCPY] = Memcpy(self.source.size)
            found, self.missing = installed_peers()
            for name, store in {OURS: ours, **found}.items():
                server = exits.enter_context(running(store, directory, self.capacity_bytes))
                server.settle()
                client = store.connect(server.address, self.source.size)
                exits.callback(client.close)
                warm(client, self.capacity_bytes, self.source)
                self.contestants[name] = client
                self.versions[name] = server.version
                self.pids += server.pids
            self._exits = exits.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._exits.close()

    def work(self, label: str, block_bytes: int) -> WorkingSet:
        """All of the buffers as blocks of one size."""
        count = self.source.size // block_bytes
        return WorkingSet.of(label, count, block_bytes, self.source, self.destination)

    def place(self, client: Iterable[int], servers: Iterable[int]) -> None:
        """Move this process and all servers to their cores."""
        pin(os.getpid(), client)
        for pid in self.pids:
            pin(pid, servers)

    @contextmanager
    def echo(self) -> Iterator[Echo]:
        """The limit of lookups, placed with the servers from the next `place` on."""
        echo = Echo()
        self.pids += echo.pids
        try:
            yield echo
        finally:
            echo.close()
            self.pids = [pid for pid in self.pids if pid not in echo.pids]


def _bandwidth_rows(stage: _Stage) -> list[Row]:
    cores = stage.settings.cores
    stage.place([cores.client], [cores.server])
    rows = []
    for size, block_bytes in BLOCK_SIZES.items():
        if stage.settings.quick and size not in QUICK_SIZES:
            continue
        work = stage.work(size, block_bytes)
        for contestant in stage.contestants.values():
            contestant.prepare(work)
        for verb in VERBS:
            samplers = {
                name: partial(_bandwidth, contestant, verb, work)
                for name, contestant in stage.contestants.items()
            }
            figures = medians(samplers, stage.settings.rounds)
            rows.append(row(BENCH, f"{verb.name} {size}", "GB/s", "higher", figures, MEMCPY))
        _check_and_clear(stage.contestants, work)
    return rows


def _bandwidth(contestant: Contestant, verb: Verb, work: WorkingSet) -> float:
    if verb.stores:
        contestant.remove_all()
    return len(work.keys) * work.block_bytes / seconds(partial(verb.move, contestant, work)) / 1e9


def _check_and_clear(contestants: Mapping[str, Contestant], work: WorkingSet) -> None:
    """A store that is fast because it loses or mixes up blocks is not fast."""
    last = len(work.keys) - 1
    for name, contestant in contestants.items():
        if not all(contestant.holds(number) for number in {0, last // 2, last}):
            raise BenchmarkError(f"{name} does not give back what was put, at {work.block_bytes} bytes")
        contestant.remove_all()


def _lookup_rows(stage: _Stage) -> list[Row]:
    cores = stage.settings.cores
    regimes = {
        ONE_CORE: ([cores.client], [cores.client]),
        TWO_CORES: ([cores.client], [cores.server]),
        FREE: (cores.all, cores.all),
    }
    work = stage.work("lookup", stage.source.size // LOOKUP_BLOCKS)
    stores = {name: contestant for name, contestant in stage.contestants.items() if name != MEMCPY}
    for contestant in stores.values():
        contestant.prepare(work)
        _put_batch(contestant, work)
    rows = []
    with stage.echo() as echo:
        for regime, (client, servers) in regimes.items():
            stage.place(client, servers)
            for lookup in LOOKUPS:
                able = {n: c for n, c in stores.items() if lookup.ask is not _pin or isinstance(c, Pinning)}
                samplers = {
                    name: partial(_microseconds, asked, lookup, stage.settings)
                    for name, asked in {ROUND_TRIP: echo, **able}.items()
                }
                figures = medians(samplers, stage.settings.rounds)
                rows.append(row(BENCH, f"{lookup.name}, {regime}", lookup.unit, "lower", figures, ROUND_TRIP))
    _check_and_clear(stores, work)
    return rows


def _microseconds(contestant: Asked, lookup: Lookup, settings: Settings) -> float:
    """Per block, over many calls that walk through the working set."""
    repeats = settings.pick(lookup.repeats, lookup.repeats // 10)
    batches = [range(start, start + lookup.blocks) for start in range(0, LOOKUP_BLOCKS, lookup.blocks)]

    def ask_all() -> None:
        for number in range(repeats):
            lookup.ask(contestant, batches[number % len(batches)])

    return seconds(ask_all) / repeats / lookup.blocks * 1e6


def _caption(settings: Settings) -> str:
    cores = settings.cores
    size = settings.pick(512, 64)
    return (
        f"put and get: {cores}; every figure is one pass over {size} MiB, source and destination touched. "
        f"one core: client and servers on core {cores.client}. two cores: as above. free cores: all on "
        f"{sorted(cores.all)}, as the kernel places them. What redis-py gets is bytes, others copy into the "
        "caller's buffer. Mooncake's acquire is batch_is_exist, which leases a block but tells no place."
    )
