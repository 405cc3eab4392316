"""Clients in processes of their own that read documents until they are told to stop. They time nothing.

A document is a run of blocks that is read as a whole, as a prompt's prefix is. Every block's bytes follow
from its number, so whoever reads it knows what must be there.
"""

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Final

import numpy as np
import xxhash
from numpy.typing import NDArray

from benchmarks.harness import BenchmarkError
from benchmarks.written import NAMESPACE, block_key
from kvstore.client import StoreClient

# How long a reader waits for what is below; what has not come by then counts as a miss.
WAIT_S: Final = 10.0
# Beyond that its answer is late: a machine with more processes than cores takes some of it.
LATE_S: Final = 0.2
# Whoever misses has something to compute.
MISS_PAUSE_S: Final = 0.02
ZIPF_EXPONENT: Final = 1.0
_DRAWS: Final = 1 << 16
_ODD: Final = 0x9E3779B97F4A7C15
_SEED: Final = 1


class Choice(StrEnum):
    """Which documents are read: by popularity, all alike, or only a few. Only the second kind is not checked:
    it is there to load as much as it can."""

    ZIPF = "zipf"
    UNIFORM = "uniform"
    FEW = "few"


@dataclass(frozen=True, slots=True)
class Documents:
    """Documents by number, all of as many equal blocks."""

    count: int
    blocks: int
    block_bytes: int

    def keys(self, document: int) -> list[bytes]:
        """The keys of its blocks, in order."""
        return [block_key(document * self.blocks + number) for number in range(self.blocks)]

    def words(self) -> NDArray[np.uint64]:
        """What all blocks have in common; `fill` makes them differ."""
        return np.arange(self.block_bytes // 8, dtype=np.uint64) * np.uint64(_ODD)

    def fill(self, document: int, number: int, words: NDArray[np.uint64], into: memoryview) -> None:
        """Write the bytes of one of its blocks."""
        seed = np.uint64(document * self.blocks + number + 1)
        np.add(words, seed, out=np.frombuffer(into, np.uint64))

    def digests(self) -> list[list[int]]:
        """What the bytes of every document's blocks hash to."""
        words = self.words()
        scratch = memoryview(bytearray(self.block_bytes))
        digests = []
        for document in range(self.count):
            digests.append([0] * self.blocks)
            for number in range(self.blocks):
                self.fill(document, number, words, scratch)
                digests[-1][number] = xxhash.xxh3_64_intdigest(scratch)
        return digests


@dataclass(slots=True)
class Tally:
    """What one reader asked for and got, in blocks, and how many of its calls took longer than they may."""

    asked: int = 0
    hit: int = 0
    checked: int = 0
    wrong: int = 0
    late: int = 0

    def add(self, other: "Tally") -> None:
        """Count another reader's too."""
        self.asked += other.asked
        self.hit += other.hit
        self.checked += other.checked
        self.wrong += other.wrong
        self.late += other.late


def popularity(count: int) -> NDArray[np.float64]:
    """How likely each document is read, most popular first."""
    weights = 1.0 / np.arange(1, count + 1) ** ZIPF_EXPONENT
    shares: NDArray[np.float64] = weights / weights.sum()
    return shares


class Readers:
    """A fixed number of reading processes over the documents that one daemon has."""

    def __init__(self, count: int, address: str, documents: Documents, wait_s: float = WAIT_S) -> None:
        context = get_context("spawn")
        self._connections: list[Connection] = []
        self._processes = []
        for number in range(count):
            mine, theirs = context.Pipe()
            work = (theirs, number, address, documents, wait_s)
            process = context.Process(target=_serve, args=work, daemon=True)
            process.start()
            theirs.close()
            self._connections.append(mine)
            self._processes.append(process)
        for connection in self._connections:
            connection.recv()

    def begin(self, choice: Choice) -> None:
        """Let all read."""
        for connection in self._connections:
            connection.send(choice)

    def end(self) -> Tally:
        """Stop them; what they got."""
        for connection in self._connections:
            connection.send(None)
        total = Tally()
        for connection in self._connections:
            total.add(connection.recv())
        return total

    def close(self) -> None:
        """End all of them and wait for it."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join()


def publish(client: StoreClient, documents: Documents) -> None:
    """Store all documents, one after the other, waiting for room where there is none."""
    words = documents.words()
    for document in range(documents.count):
        keys = documents.keys(document)
        with client.reserve(NAMESPACE, keys, documents.block_bytes, wait_s=WAIT_S) as write:
            if len(write.granted) != len(keys):
                raise BenchmarkError(f"{len(write.granted)} of {len(keys)} blocks granted")
            for number, view in enumerate(write.views):
                documents.fill(document, number, words, view)
            write.commit()


def _serve(connection: Connection, number: int, address: str, documents: Documents, wait_s: float) -> None:
    digests = documents.digests()
    chance = np.random.default_rng([_SEED, number])
    with suppress(EOFError), StoreClient.connect(address, timeout_s=30.0) as client:
        connection.send(None)
        while True:  # the other end closes when it has seen enough
            choice = connection.recv()
            connection.send(_read(client, documents, digests, choice, chance, connection, wait_s))


def _read(
    client: StoreClient,
    documents: Documents,
    digests: list[list[int]],
    choice: Choice,
    chance: np.random.Generator,
    connection: Connection,
    wait_s: float,
) -> Tally:
    tally = Tally()
    for document in _drawn(documents.count, choice, chance):
        if connection.poll():
            connection.recv()
            break
        keys = documents.keys(document)
        began = time.perf_counter()
        with client.acquire(NAMESPACE, keys, wait_s=wait_s) as read:
            tally.late += time.perf_counter() - began > wait_s + LATE_S
            missed = read.hit_length < len(keys)
            tally.asked += len(keys)
            tally.hit += read.hit_length
            if choice is not Choice.UNIFORM:
                found = [xxhash.xxh3_64_intdigest(view) for view in read.views]
                tally.checked += len(found)
                tally.wrong += sum(a != b for a, b in zip(found, digests[document], strict=False))
        if missed:
            time.sleep(MISS_PAUSE_S)
    return tally


def _drawn(count: int, choice: Choice, chance: np.random.Generator) -> Iterator[int]:
    # Popular ones anywhere among the others, the same for every reader.
    ranked = np.random.default_rng(_SEED).permutation(count)
    while True:
        if choice is Choice.ZIPF:
            ranks = chance.choice(count, _DRAWS, p=popularity(count))
        else:
            ranks = chance.integers(0, count if choice is Choice.UNIFORM else max(1, count // 64), _DRAWS)
        yield from ranked[ranks].tolist()
