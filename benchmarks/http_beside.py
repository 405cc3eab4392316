"""Lookups beside a daemon that works, on the same two cores: what they cost its clients, and what they wait.

One process asks a thousand times a second, compact and over HTTP in turns, whether answers come or not: what
a lookup takes is counted from when it was due. Another acquires blocks in DRAM as fast as it can.
"""

import multiprocessing
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from statistics import median
from tempfile import TemporaryDirectory
from typing import Final

import msgspec

from benchmarks.harness import OURS, BenchmarkError, Limit, Row, Settings, Target, interleaved
from benchmarks.index_life import node_with_feed
from benchmarks.indexers import OurIndex
from benchmarks.load import Caller, frame_end, http_end, http_request
from kvstore.block import Namespace
from kvstore.client import StoreClient
from kvstore.hits import pack_keys
from kvstore.lookup_messages import Find, NameQuestion, frame
from kvstore.messages import Hello
from kvstore.protocol import MAJOR, MINOR

PACE: Final = "1,000 lookups/s"
ACQUIRE: Final = f"acquire of 64 blocks beside {PACE}, p50"
WAITS: Final = f"{PACE} beside a busy daemon, p99"
STALL: Final = f"index's longest stall at {PACE}"
IDLE: Final = "no lookups"
CAPTION: Final = (
    "The last rows: daemon, index and two clients on both cores; acquires follow each other without a pause, "
    "and lookups count from when they were due."
)
TARGETS: Final = (
    Target((ACQUIRE,), "limit", 1 / 1.3),
    Target((STALL,), None, 5.0),
)
_RATE: Final = 1000
_SECONDS: Final = 3.0
_QUICK_SECONDS: Final = 0.2
_PROMPT_BLOCKS: Final = 512
_ACQUIRED: Final = 64
_BLOCK_BYTES: Final = 4096
_SPACE: Final = Namespace("model", block_tokens=16)
_KNOWN_S_MAX: Final = 20.0
_POLL_S: Final = 0.02
_LATE: Final = ("stall", "late")


def rows(bench: str, settings: Settings) -> list[Row]:
    """A daemon's client with and without lookups at an index that follows it."""
    seconds = _QUICK_SECONDS if settings.quick else _SECONDS
    with ExitStack() as exits:
        directory = Path(exits.enter_context(TemporaryDirectory(prefix="kvbench-")))
        feed = exits.enter_context(node_with_feed(directory))
        index = exits.enter_context(closing(OurIndex(directory, nodes=[feed])))
        store = exits.enter_context(StoreClient.connect(f"unix:{directory / 'node.sock'}", timeout_s=30.0))
        keys = _commit(store)
        _wait_until_known(index, keys)
        router = exits.enter_context(_router(index, keys))
        client = _Client(store, keys[:_ACQUIRED], router, seconds)
        taken = interleaved({OURS: client.beside_lookups, IDLE: client.alone}, settings.rounds)
        samples = index.http.text("/metrics").splitlines()  # once: to tell them takes milliseconds itself
        stall_s, late_s = (_value(samples, f"kvstore_index_loop_{each}_max_seconds") for each in _LATE)
    acquire = {name: 1e6 * median(sample.acquire_s for sample in some) for name, some in taken.items()}
    waits = [1e3 * median(getattr(each, name) for each in taken[OURS]) for name in ("p99_s", "p50_s")]
    return [
        Row(bench, ACQUIRE, "us", "lower", acquire[OURS], Limit(IDLE, acquire[IDLE]), {}),
        Row(bench, WAITS, "ms", "lower", waits[0], Limit("p50", waits[1]), {}),
        Row(bench, STALL, "ms", "lower", 1e3 * stall_s, Limit("longest lateness", 1e3 * late_s), {}),
    ]


@dataclass(frozen=True, slots=True)
class _Sample:
    """Medians of a client's acquires, and of lookups beside them where there were some."""

    acquire_s: float
    p50_s: float = 0.0
    p99_s: float = 0.0


class _Client:
    """Acquires the same blocks again and again."""

    def __init__(self, store: StoreClient, keys: Sequence[bytes], router: Connection, seconds: float) -> None:
        self._store = store
        self._keys = keys
        self._router = router
        self._seconds = seconds

    def beside_lookups(self) -> _Sample:
        """While the other process looks up."""
        self._router.send(self._seconds)
        acquire_s = self._acquire()
        p50_s, p99_s = self._router.recv()
        return _Sample(acquire_s, p50_s, p99_s)

    def alone(self) -> _Sample:
        """While nobody does."""
        return _Sample(self._acquire())

    def _acquire(self) -> float:
        taken = []
        until = time.perf_counter() + self._seconds
        while (began := time.perf_counter()) < until:
            with self._store.acquire(_SPACE, self._keys) as read:
                if read.hit_length != len(self._keys):
                    raise BenchmarkError(f"{read.hit_length} of {len(self._keys)} blocks are there")
            taken.append(time.perf_counter() - began)
        return median(taken)


@contextmanager
def _router(index: OurIndex, keys: Sequence[bytes]) -> Iterator[Connection]:
    """A process that looks up for as many seconds as it is sent; it answers with p50 and p99."""
    spawning = multiprocessing.get_context("spawn")
    ours, theirs = spawning.Pipe()
    process = spawning.Process(target=_look_up, args=(theirs, index.data_port, index.port, index.pid, keys))
    process.start()
    theirs.close()
    try:
        ours.recv()  # it is ready
        yield ours
    finally:
        ours.close()
        process.join()


def _look_up(commands: Connection, data_port: int, port: int, pid: int, keys: list[bytes]) -> None:
    name = frame(2, NameQuestion(_SPACE.model, fields={"block_tokens": _SPACE.block_tokens}))
    packed, width = pack_keys(keys)
    question = {"model": _SPACE.model, "keys": [key.hex() for key in keys], "namespace": {"block_tokens": 16}}
    hello = frame(1, Hello(MAJOR, MINOR, b"nonce"))
    find, lookup = frame(3, Find(1, width), packed), http_request("/v1/lookup", msgspec.json.encode(question))
    commands.send(None)
    with suppress(EOFError):  # nobody asks for more
        while seconds := commands.recv():
            with (
                closing(Caller(data_port, pid, frame_end, 1, (hello, name))) as compact,
                closing(Caller(port, pid, http_end, 1)) as http,
            ):
                commands.send(_paced([(compact, find), (http, lookup)], int(seconds * _RATE)))


def _paced(asked: Sequence[tuple[Caller, bytes]], count: int) -> tuple[float, float]:
    taken = []
    began = time.perf_counter()
    for number in range(count):
        due = began + number / _RATE
        if (early_s := due - time.perf_counter()) > 0:
            time.sleep(early_s)
        caller, request = asked[number % len(asked)]
        caller.ask(request)
        taken.append(time.perf_counter() - due)
    taken.sort()
    return taken[count // 2], taken[int(0.99 * count)]


def _commit(store: StoreClient) -> list[bytes]:
    random = Random(0)
    keys = [random.randbytes(32) for _ in range(_PROMPT_BLOCKS)]
    with store.reserve(_SPACE, keys, _BLOCK_BYTES, parent=b"") as write:
        for view in write.views:
            view[:] = bytes(_BLOCK_BYTES)
        write.commit()
    return keys


def _wait_until_known(index: OurIndex, keys: Sequence[bytes]) -> None:
    question = {"model": _SPACE.model, "keys": [key.hex() for key in keys]}
    deadline = time.monotonic() + _KNOWN_S_MAX
    while [each["dram"] for each in index.http.post("/v1/lookup", question)["placements"]] != [
        len(keys) * _SPACE.block_tokens
    ]:
        if time.monotonic() > deadline:
            raise BenchmarkError(f"the index does not follow the node within {_KNOWN_S_MAX:.0f} s")
        time.sleep(_POLL_S)


def _value(samples: Iterable[str], name: str) -> float:
    return next(float(line.split()[1]) for line in samples if line.startswith(f"{name} "))
