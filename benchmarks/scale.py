"""One daemon under more than one client and more than a few blocks: evicting, starting, remembering.

Nothing is pinned here: there are more processes than a small machine has cores, and they share what
there is. The limits have as many processes in the same rounds.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Final

from benchmarks import ours
from benchmarks.harness import (
    GIB,
    KIB,
    MIB,
    OURS,
    Limit,
    Report,
    Row,
    Settings,
    Target,
    interleaved,
    judge,
    row,
    seconds,
)
from benchmarks.limits import MEMCPY, ROUND_TRIP, Echo
from benchmarks.peers import installed_peers, running
from benchmarks.peers.base import KEY_BYTES, Asked, StoreModule, WorkingSet, filled_buffer
from benchmarks.processes import private_bytes
from benchmarks.publishers import Connect, Publish, Publishers

BENCH: Final = "scale"
CLIENTS: Final = 4
PUBLISHED_BLOCK_BYTES: Final = 2 * MIB
SMALL_BLOCK_BYTES: Final = 4 * KIB
MANY_BLOCKS: Final = 100_000
INTERPRETER: Final = "bare interpreter"
KEYS_ALONE: Final = "keys alone"
LATE_WAKE_UP: Final = "late wake-up of an idle process"
_NAP_S: Final = 0.001

PUBLISHING = "4 clients publishing twice the arena"
ANSWER = "slowest lookup of a fifth client meanwhile"
STALL = "longest stall of the event loop since start"
LATE = "longest lateness of the event loop since start"
READY, IDLE = "ready with a 1 GiB arena", "idle memory beyond the arena"
FURTHER = "memory for 100,000 further blocks"
TARGETS: Final = (
    Target((PUBLISHING,), "limit", 0.70),
    Target((STALL,), None, 20.0),
    Target((READY,), None, 1.0),
    Target((IDLE,), None, 80.0),
    Target((FURTHER,), None, 100.0),
)


def run(settings: Settings) -> Report:
    """Measure stores that many clients fill, then stores that start and are given many blocks."""
    found, missing = installed_peers()
    stores: dict[str, StoreModule] = {OURS: ours, **found}
    rows, versions = _publishing_rows(stores, settings)
    rows += _life_rows(stores, settings)
    return Report(BENCH, rows, judge(rows, TARGETS), _caption(settings), versions, missing)


@dataclass(frozen=True, slots=True)
class _Phase:
    """One round of publishing, and what others who wanted something meanwhile had to wait at worst."""

    bandwidth: float
    slowest_answer_s: float
    late_wake_up_s: float


@dataclass(slots=True)
class _Publishing:
    """All publishers storing new blocks in one store, or copying them where the store would be.

    `bystander` asks the same store for one key again and again; where there is no store, an idle process.
    """

    publishers: Publishers
    store: str
    blocks: int
    bystander: Asked
    rounds: int = 0

    def phase(self) -> _Phase:
        """Let them publish twice the store's capacity, and watch."""
        self.rounds += 1
        self.publishers.begin(Publish(self.store, f"round {self.rounds}", self.blocks, PUBLISHED_BLOCK_BYTES))
        slowest_answer_s = late_wake_up_s = 0.0
        while self.publishers.running():
            nap_s = seconds(partial(time.sleep, _NAP_S))
            late_wake_up_s = max(late_wake_up_s, nap_s - _NAP_S)
            slowest_answer_s = max(slowest_answer_s, seconds(partial(self.bystander.look_up, range(1))))
        published_bytes = CLIENTS * self.blocks * PUBLISHED_BLOCK_BYTES
        return _Phase(published_bytes / self.publishers.finish() / 1e9, slowest_answer_s, late_wake_up_s)


def _publishing_rows(
    stores: Mapping[str, StoreModule], settings: Settings
) -> tuple[list[Row], dict[str, str]]:
    capacity_bytes = settings.pick(GIB, 256 * MIB)
    blocks = 2 * capacity_bytes // PUBLISHED_BLOCK_BYTES // CLIENTS
    source = filled_buffer(MIB)
    with ExitStack() as exits:
        directory = Path(exits.enter_context(TemporaryDirectory(prefix="kvbench-")))
        servers = {
            name: exits.enter_context(running(store, directory, capacity_bytes))
            for name, store in stores.items()
        }
        publishers = exits.enter_context(closing(Publishers(CLIENTS, capacity_bytes // 2 // CLIENTS)))
        echo = exits.enter_context(closing(Echo()))
        publishing = {MEMCPY: _Publishing(publishers, MEMCPY, blocks, echo)}
        for name, store in stores.items():
            server = servers[name]
            server.settle()
            publishers.connect(Connect(name, store.__name__, server.address, capacity_bytes))
            bystander = exits.enter_context(closing(store.connect(server.address, source.size)))
            bystander.prepare(WorkingSet.of("bystander", 1, source.size, source, source[:0]))
            publishing[name] = _Publishing(publishers, name, blocks, bystander)
        phases = interleaved({name: each.phase for name, each in publishing.items()}, settings.rounds)
        daemon = servers[OURS]
        assert isinstance(daemon, ours.OurServer)
        statistics = daemon.statistics()
        stall_ms, late_ms = statistics.loop_stall_max_s * 1e3, statistics.loop_late_max_s * 1e3
        versions = {name: server.version for name, server in servers.items()}
    bandwidths = {name: median(phase.bandwidth for phase in taken) for name, taken in phases.items()}
    slowest = {
        name: 1e3 * median(phase.slowest_answer_s for phase in taken) for name, taken in phases.items()
    }
    slowest[ROUND_TRIP] = slowest.pop(MEMCPY)
    late = Limit(LATE_WAKE_UP, max(phase.late_wake_up_s for phase in phases[OURS]) * 1e3)
    return [
        row(BENCH, PUBLISHING, "GB/s", "higher", bandwidths, MEMCPY),
        row(BENCH, ANSWER, "ms", "lower", slowest, ROUND_TRIP),
        Row(BENCH, STALL, "ms", "lower", stall_ms, late, {}),
        Row(BENCH, LATE, "ms", "lower", late_ms, late, {}),
    ], versions


@dataclass(frozen=True, slots=True)
class _Life:
    """What one start of a server showed."""

    ready_s: float
    idle_bytes: int
    further_bytes: float


def _life_rows(stores: Mapping[str, StoreModule], settings: Settings) -> list[Row]:
    samplers: dict[str, Callable[[], _Life]] = {INTERPRETER: _bare_life}
    samplers |= {name: partial(_life, store, settings) for name, store in stores.items()}
    lives = interleaved(samplers, settings.rounds)
    ready = {name: median(life.ready_s for life in taken) for name, taken in lives.items()}
    idle = {name: median(life.idle_bytes for life in taken) / 1e6 for name, taken in lives.items()}
    further = {name: median(life.further_bytes for life in taken) / 1e6 for name, taken in lives.items()}
    further[KEYS_ALONE] = further.pop(INTERPRETER)
    return [
        row(BENCH, READY, "s", "lower", ready, INTERPRETER),
        row(BENCH, IDLE, "MB", "lower", idle, INTERPRETER),
        row(BENCH, FURTHER, "MB", "lower", further, KEYS_ALONE),
    ]


def _life(store: StoreModule, settings: Settings) -> _Life:
    """Start a server, fill it twice with many small blocks, and stop it."""
    blocks = settings.pick(MANY_BLOCKS, MANY_BLOCKS // 20)
    payload_bytes = blocks * SMALL_BLOCK_BYTES
    source = filled_buffer(MIB)
    with TemporaryDirectory(prefix="kvbench-") as name, ExitStack() as exits:
        begin = time.monotonic()
        server = exits.enter_context(running(store, Path(name), settings.pick(GIB, 256 * MIB)))
        ready_s = time.monotonic() - begin
        server.settle()
        idle_bytes = server.overhead_bytes(0)
        client = store.connect(server.address, source.size)
        exits.callback(client.close)
        overheads = []
        for count in (1, 2):
            work = WorkingSet.of(f"small {count}", blocks, SMALL_BLOCK_BYTES, source, source[:0])
            client.prepare(work)
            for batch in work.batches():
                client.put_batch(batch)
            overheads.append(server.overhead_bytes(count * payload_bytes))
    return _Life(ready_s, idle_bytes, (overheads[1] - overheads[0]) * MANY_BLOCKS / blocks)


def _bare_life() -> _Life:
    """An interpreter that does nothing, and nothing but keys."""
    begin = time.monotonic()
    command = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        return _Life(time.monotonic() - begin, private_bytes(process.pid), MANY_BLOCKS * KEY_BYTES)


def _caption(settings: Settings) -> str:
    return (
        f"Nothing is pinned: {CLIENTS} clients and the servers share cores {sorted(settings.cores.all)} as "
        f"the kernel places them. Blocks of {PUBLISHED_BLOCK_BYTES // MIB} MiB; memcpy is {CLIENTS} "
        "processes copying as much at the same time. Lateness is the event loop's at its worst, warming "
        "included, five processes on two cores; a stall is lateness in which the loop itself was busy. "
        "Memory is resident and not shared; "
        f"further blocks have {SMALL_BLOCK_BYTES // KIB} KiB."
    )
