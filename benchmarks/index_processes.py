"""What following engines costs a process, ours and Dynamo's indexer, each fed the same batches over loopback.

The process has a core of its own. CPU is user and system time of all its threads until it answers that it
has everything, over HTTP and asked seldom.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Final

from benchmarks.batches import PROMPT_BLOCKS, Prompt, prompts, stored_batches
from benchmarks.harness import OURS, BenchmarkError, Row, Settings, interleaved, row, seconds
from benchmarks.indexers import Indexer, OurIndex, Publishers
from benchmarks.peers.dynamo import DynamoIndexer
from benchmarks.processes import pin, private_bytes
from kvstore.index.events import decode_batch

INDEXER: Final = "dynamo.indexer"
DECODING, NUMBER = "decoding alone", "8 bytes"
NUMBER_BYTES: Final = 8
BLOCKS: Final = 1_000_000
QUICK_BLOCKS: Final = 32_000
# A fifth is enough of what costs more.
FEWER: Final = 5
LONG, SHORT = "ingest 64-block events", "ingest 1-block events"
ENGINES: Final = 4
_KNOWN_S_MAX: Final = 120.0
_POLL_S: Final = 0.02

Start = Callable[[Path, Sequence[str]], Indexer]


@dataclass(frozen=True, slots=True)
class _Fed:
    """What a block cost: CPU, time, and memory that the process has kept."""

    cpu_us: float
    took_us: float
    kept_bytes: float


def rows(bench: str, settings: Settings, *, with_dynamo: bool) -> list[Row]:
    """Events of 64 blocks, and of one."""
    every = list(prompts(settings.pick(BLOCKS, QUICK_BLOCKS)))
    starts: dict[str, Start] = {OURS: OurIndex}
    if with_dynamo:
        starts[INDEXER] = DynamoIndexer
    fed = [(LONG, every, PROMPT_BLOCKS), (SHORT, every[: len(every) // FEWER], 1)]
    rows = []
    for name, some, event_blocks in fed[:1] if settings.quick else fed:
        batches = [list(stored_batches(prompt, event_blocks)) for prompt in some]
        samplers = {each: partial(_feed, start, some, batches, settings) for each, start in starts.items()}
        samplers[DECODING] = partial(_decode, batches)
        taken = interleaved(samplers, settings.rounds)
        cpu = {each: median(fed.cpu_us for fed in many) for each, many in taken.items()}
        rate = {each: median(1e6 / fed.took_us for fed in many) for each, many in taken.items()}
        kept = {each: median(fed.kept_bytes for fed in many) for each, many in taken.items()}
        rows.append(row(bench, f"{name}, CPU", "us/block", "lower", cpu, DECODING))
        rows.append(row(bench, f"{name}, over loopback", "blocks/s", "higher", rate, DECODING))
        kept[NUMBER] = kept.pop(DECODING)
        rows.append(row(bench, f"{name}, memory after a burst", "bytes/block", "lower", kept, NUMBER))
    return rows


def _feed(
    start: Start, some: Sequence[Prompt], batches: Sequence[Sequence[bytes]], settings: Settings
) -> _Fed:
    """Feed a fresh process all of it as fast as it goes, engine by turns."""
    with ExitStack() as exits:
        directory = Path(exits.enter_context(TemporaryDirectory(prefix="kvbench-")))
        publishers = exits.enter_context(closing(Publishers(ENGINES)))
        indexer = exits.enter_context(closing(start(directory, publishers.endpoints)))
        publishers.wait_for_subscriber()
        pin(indexer.pid, {settings.cores.server})
        before_bytes, before_s = private_bytes(indexer.pid), _cpu_s(indexer.pid)
        began = time.perf_counter()
        for number, payloads in enumerate(batches):
            for payload in payloads:
                publishers.publish(number % ENGINES, payload)
        _wait_until_known(indexer, some)
        blocks = len(some) * PROMPT_BLOCKS
        return _Fed(
            1e6 * (_cpu_s(indexer.pid) - before_s) / blocks,
            1e6 * (time.perf_counter() - began) / blocks,
            (private_bytes(indexer.pid) - before_bytes) / blocks,
        )


def _wait_until_known(indexer: Indexer, some: Sequence[Prompt]) -> None:
    """Return once it knows the last prompt of each engine, which come after all others.

    Raises:
        BenchmarkError: it does not come to know one.
    """
    deadline = time.monotonic() + _KNOWN_S_MAX
    for number in range(max(0, len(some) - ENGINES), len(some)):
        while not indexer.knows(number % ENGINES, some[number]):
            if time.monotonic() > deadline:
                raise BenchmarkError(f"prompt {number} is not known after {_KNOWN_S_MAX:.0f} s")
            time.sleep(_POLL_S)


def _decode(batches: Sequence[Sequence[bytes]]) -> _Fed:
    """The same batches, only decoded, in this process; the numbers alone are kept."""
    payloads = [payload for some in batches for payload in some]
    blocks = len(batches) * PROMPT_BLOCKS
    took_us = 1e6 * seconds(lambda: deque(map(decode_batch, payloads), 0)) / blocks
    return _Fed(took_us, took_us, NUMBER_BYTES)


def _cpu_s(pid: int) -> float:
    """User and system seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
