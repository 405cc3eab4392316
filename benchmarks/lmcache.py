"""Our L2 adapter beside LMCache's own, each moved by LMCache's own `lmcache bench l2`: how fast an LMCache
server would store objects in what is below it, and load them back.

The bench's exit status only says that no bytes were found unequal, so what it printed is read: every round of
every operation must have had all its keys, and the bytes must have been compared. Each bench has the same
keys, and adapters skip what is there, so whatever is below an adapter holds nothing before its bench.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Final, Protocol

import numpy as np

from benchmarks.daemon import Daemon, settle
from benchmarks.disk import chosen_directory, describe, in_threads
from benchmarks.harness import (
    KIB,
    MIB,
    OURS,
    BenchmarkError,
    Report,
    Row,
    Settings,
    Target,
    interleaved,
    judge,
    row,
    seconds,
)
from benchmarks.limits import MEMCPY
from benchmarks.lmcache_commands import Commands
from benchmarks.peers import PEER_TO_INSTALL
from benchmarks.peers.base import filled_buffer, touched_buffer
from benchmarks.redis_server import RedisServer

BENCH: Final = "lmcache"
FILES, NATIVE_FILES, RESP, MOONCAKE = "fs", "fs_native", "resp", "mooncake_store"
STORE, LOAD = "store", "load"
# Of the bench's own rounds: what it does first and does not count, and what a figure is the median of.
WARMUPS: Final = 1
COUNTED: Final = 3
# The bench never unlocks what it looked up, and our lookups lock up to a quarter of the arena.
ARENA_PER_STORED: Final = 5
# What LMCache's server aligns its memory to.
ALIGNMENT_BYTES: Final = 4096


@dataclass(frozen=True, slots=True)
class Objects:
    """What one bench stores and loads: in each round as many objects, under keys of its own."""

    count: int
    object_bytes: int

    @property
    def round_bytes(self) -> int:
        """What a figure's time is for."""
        return self.count * self.object_bytes

    @property
    def stored_bytes(self) -> int:
        """What is there in the end."""
        return self.round_bytes * (WARMUPS + COUNTED)

    def words(self, adapter: Mapping[str, Any]) -> list[str]:
        """The command that benches an adapter with them."""
        options = {
            "--l2-adapter": json.dumps(adapter),
            "--num-keys": self.count,
            "--data-size-kb": self.object_bytes // KIB,
            "--rounds": COUNTED,
            "--warmup-rounds": WARMUPS,
            "--lookup-max-hit-rate": 1,
            "--l1-align-bytes": ALIGNMENT_BYTES,
        }
        return ["bench", "l2", "--no-skip-verify", *(str(word) for pair in options.items() for word in pair)]


# As many as make up more than a core's caches hold, and no more than the 256 patterns that tell them apart.
SIZES: Final = {
    "256KiB": Objects(128, 256 * KIB),
    "2MiB": Objects(32, 2 * MIB),
    "8MiB": Objects(8, 8 * MIB),
    "32MiB": Objects(4, 32 * MIB),
}
QUICK_SIZES: Final = ("2MiB",)
TARGETS: Final = tuple(
    Target(tuple(f"{verb} {size}" for size in SIZES for verb in (STORE, LOAD)), peer, 1.0)
    for peer in (FILES, RESP)
)
MISSING: Final = {
    MOONCAKE: (
        "LMCache's wheel lacks the C++ extension that this adapter wraps, lmcache.lmcache_mooncake; building"
        " that takes LMCache's source and Mooncake's headers (MOONCAKE_INCLUDE_DIR), which no wheel has"
    )
}
_INSTALL: Final = "pip install torch==2.13.0, then lmcache==0.5.6"
_ADAPTER: Final = {
    "type": "plugin",
    "module_path": "connectors.lmcache",
    "class_name": "KVStoreL2Adapter",
}
_PARAMETERS: Final = {"block_tokens": 256, "dtype": "bfloat16", "layout": "L2TD"}
_ROUND: Final = re.compile(
    r"^ *\[(Store|Lookup|Load)\] Round \d+: ([\d.]+) ms, \w+=(\d+)/(\d+)$", re.MULTILINE
)


class Backend(Protocol):
    """An adapter of LMCache and what is below it."""

    def emptied(self, objects: Objects) -> AbstractContextManager[Mapping[str, Any]]:
        """While it is entered there is room for `objects`, and at first nothing else: the adapter's JSON."""
        ...


class Ours:
    """A daemon for each bench."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @contextmanager
    def emptied(self, objects: Objects) -> Iterator[Mapping[str, Any]]:
        arena_bytes = ARENA_PER_STORED * objects.stored_bytes
        with (
            TemporaryDirectory(prefix="node-", dir=self._directory) as folder,
            Daemon(Path(folder), arena_bytes, None) as daemon,
        ):
            with daemon.client() as client:
                settle(client)
            yield {**_ADAPTER, "adapter_params": {"address": daemon.address, **_PARAMETERS}}


class Files:
    """A directory for each bench, whose files go through the page cache."""

    def __init__(self, directory: Path, adapter: Mapping[str, Any]) -> None:
        self._directory = directory
        self._adapter = adapter

    @contextmanager
    def emptied(self, objects: Objects) -> Iterator[Mapping[str, Any]]:
        with TemporaryDirectory(prefix="files-", dir=self._directory) as folder:
            yield {**self._adapter, "base_path": folder}


class Redis:
    """A redis-server that is flushed and keeps its memory: without it the next stores would be slower.

    Raises:
        ImportError: redis-server or redis-py is not installed.
    """

    def __init__(self, directory: Path, connections: int) -> None:
        client: Any = import_module("redis").Redis
        self._connections = connections
        self._server = RedisServer(directory)
        self._client = client(port=self._server.port)
        self.version = self._server.versions["redis-server"]

    @contextmanager
    def emptied(self, objects: Objects) -> Iterator[Mapping[str, Any]]:
        self._client.flushall()
        yield {"type": RESP, "host": "127.0.0.1", "port": self._server.port, "num_workers": self._connections}

    def close(self) -> None:
        self._client.close()
        self._server.close()


class Memcpy:
    """The limit: as many bytes from and to buffers that are touched, in one thread or one for each core."""

    def __init__(self, objects: Objects, threads: int) -> None:
        self._objects = objects
        self._threads = threads
        self._source = filled_buffer(objects.round_bytes)
        self._destination = touched_buffer(objects.round_bytes)
        self._stored = touched_buffer(objects.stored_bytes)

    def sample(self) -> dict[str, float]:
        """MB/s of storing and of loading, each in as many threads as are faster."""
        one, all_cores = self._rounds(1), self._rounds(self._threads)
        return {verb: max(one[verb], all_cores[verb]) for verb in (STORE, LOAD)}

    def _rounds(self, threads: int) -> dict[str, float]:
        shares = [range(first, self._objects.count, threads) for first in range(threads)]

        def mb_s(move: Callable[[int, int], None]) -> float:
            rounds = [partial(move, number) for number in range(WARMUPS + COUNTED)]
            taken_s = [seconds(partial(in_threads, threads, shares, each)) for each in rounds]
            return self._objects.round_bytes / median(taken_s[WARMUPS:]) / 1e6

        return {STORE: mb_s(self._store), LOAD: mb_s(self._load)}

    def _store(self, number: int, each: int) -> None:
        np.copyto(self._stored[self._place(number, each)], self._source[self._place(0, each)])

    def _load(self, number: int, each: int) -> None:
        np.copyto(self._destination[self._place(0, each)], self._stored[self._place(number, each)])

    def _place(self, number: int, each: int) -> slice:
        start = number * self._objects.round_bytes + each * self._objects.object_bytes
        return slice(start, start + self._objects.object_bytes)


def run(settings: Settings) -> Report:
    """Bench every adapter at every size, or say that LMCache is missing."""
    try:
        versions = {BENCH: version("lmcache")}
    except PackageNotFoundError as exc:
        return Report(BENCH, [], [], "Nothing was measured.", missing={BENCH: f"{exc}; {_INSTALL}"})
    missing = dict(MISSING)
    threads = len(settings.cores.all)
    rows: list[Row] = []
    with ExitStack() as exits:
        directory = Path(exits.enter_context(TemporaryDirectory(prefix="kvbench-", dir=chosen_directory())))
        backends: dict[str, Backend] = {
            OURS: Ours(directory),
            FILES: Files(directory, {"type": FILES}),
            NATIVE_FILES: Files(directory, {"type": NATIVE_FILES, "num_workers": threads}),
        }
        try:
            redis = exits.enter_context(closing(Redis(directory, threads)))
            backends[RESP] = redis
            versions["redis-server"] = redis.version
        except ImportError as exc:
            missing[RESP] = f"{exc}; {PEER_TO_INSTALL['redis-py']}"
        commands = exits.enter_context(closing(Commands()))
        for size in QUICK_SIZES if settings.quick else SIZES:
            samplers: dict[str, Callable[[], Mapping[str, float]]] = {
                name: partial(_bench, name, backend, SIZES[size], commands, directory / "bench.log")
                for name, backend in backends.items()
            }
            samplers[MEMCPY] = Memcpy(SIZES[size], threads).sample
            rows += _rows(size, interleaved(samplers, settings.rounds))
        caption = _caption(directory, settings)
    return Report(BENCH, rows, judge(rows, TARGETS), caption, versions, missing)


def _rows(size: str, samples: Mapping[str, list[Mapping[str, float]]]) -> list[Row]:
    rows = []
    for verb in (STORE, LOAD):
        medians = {name: median(sample[verb] for sample in taken) for name, taken in samples.items()}
        rows.append(row(BENCH, f"{verb} {size}", "MB/s", "higher", medians, MEMCPY))
    return rows


def _bench(name: str, backend: Backend, objects: Objects, commands: Commands, log: Path) -> dict[str, float]:
    with backend.emptied(objects) as adapter:
        status = commands.run(objects.words(adapter), log)
    output = log.read_text(errors="replace")
    try:
        return read_figures(status, output, objects)
    except BenchmarkError as exc:
        raise BenchmarkError(f"{name}, {objects.object_bytes} bytes: {exc}\n{output}") from exc


def read_figures(status: int, output: str, objects: Objects) -> dict[str, float]:
    """MB/s of storing and of loading, from what the bench printed; its own MB are MiB.

    Raises:
        BenchmarkError: not every round stored, found or loaded everything, or the bytes were not compared.
    """
    if status:
        raise BenchmarkError(f"the bench ended with {status}")
    taken_ms: dict[str, list[float]] = {"Store": [], "Lookup": [], "Load": []}
    for operation, ms, done, asked in _ROUND.findall(output):
        if not int(done) == int(asked) == objects.count:
            raise BenchmarkError(f"{operation} did {done} of {objects.count} objects")
        taken_ms[operation].append(float(ms))
    for operation, rounds in taken_ms.items():
        if len(rounds) != WARMUPS + COUNTED:
            raise BenchmarkError(f"{operation} did {len(rounds)} of {WARMUPS + COUNTED} rounds")
    if f"[Verify] All {objects.count} keys data verified OK." not in output or "MISMATCH" in output:
        raise BenchmarkError("the bench has not found the bytes equal")
    return {
        verb: objects.round_bytes / median(taken_ms[operation][WARMUPS:]) / 1e3
        for verb, operation in ((STORE, "Store"), (LOAD, "Load"))
    }


def _caption(directory: Path, settings: Settings) -> str:
    submits = ", ".join(f"{objects.count} of {size}" for size, objects in SIZES.items())
    cores = settings.cores.all
    file_system, _, _ = describe(directory).partition(",")
    return (
        f"`lmcache bench l2`: one submit at a time, of {submits}; {WARMUPS} + {COUNTED} submits a bench under"
        " other keys, each key with a rank of its own, and as many lookups and loads, all of them complete;"
        f" the last load's bytes are compared. A sample is the median of {COUNTED}. All processes on cores"
        f" {sorted(cores)} as the kernel places them. Ours: a new daemon for each bench, its arena populated"
        f" before, of {ARENA_PER_STORED} times what is stored. fs, fs_native: files in {file_system}, and in"
        f" its page cache; fs_native in {len(cores)} threads. resp: redis-server over TCP on loopback,"
        f" {len(cores)} connections, flushed before each bench; it keeps its memory. memcpy: in one thread or"
        f" in {len(cores)}, whichever is faster."
    )
