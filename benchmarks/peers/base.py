"""What a store must do to be measured beside ours: the contract of servers and contestants.

A contestant is one client of one store, or the limit in a store's place. It moves the blocks of one
working set between the caller's buffers and the store. Which calls are timed is the benchmark's affair.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

# One batch: as many blocks as an engine moves at once, but no more than a good part of a small arena.
BATCH_BLOCKS_MAX: Final = 64
BATCH_BYTES_MAX: Final = 128 << 20
KEY_BYTES: Final = 32
HUGE_PAGE_BYTES: Final = 2 << 20


@dataclass(frozen=True, slots=True)
class WorkingSet:
    """Blocks by number: their keys, and where they lie in the caller's two buffers.

    Where there are more keys than `source` has room for, its bytes serve again from the start.
    """

    keys: list[bytes]
    block_bytes: int
    source: Bytes
    destination: Bytes

    @classmethod
    def of(cls, label: str, count: int, block_bytes: int, source: Bytes, destination: Bytes) -> Self:
        """`count` blocks whose keys are made from `label`."""
        keys = [hashlib.sha256(f"{label} {number}".encode()).digest() for number in range(count)]
        return cls(keys, block_bytes, source, destination)

    def offset(self, number: int) -> int:
        """Where block `number` lies in either buffer."""
        return number % (self.source.size // self.block_bytes) * self.block_bytes

    def slices(self, buffer: Bytes) -> list[Bytes]:
        """The places of all blocks in a buffer of the source's size."""
        starts = map(self.offset, range(len(self.keys)))
        return [buffer[start : start + self.block_bytes] for start in starts]

    def batches(self) -> list[range]:
        """All blocks, in runs of one batch each."""
        step = max(1, min(BATCH_BLOCKS_MAX, BATCH_BYTES_MAX // self.block_bytes))
        count = len(self.keys)
        return [range(start, min(start + step, count)) for start in range(0, count, step)]


def filled_buffer(size: int) -> Bytes:
    """A buffer like `touched_buffer`, with other bytes in every place."""
    buffer = touched_buffer(size)
    numbers = buffer[: size // 8 * 8].view(np.uint64)
    numbers[:] = np.arange(numbers.size, dtype=np.uint64)
    return buffer


def touched_buffer(size: int) -> Bytes:
    """Zeros on whole huge pages, every page touched.

    First touch is 10 times slower than a copy. numpy's own place, 16 bytes into a page, made copies to
    and from page-aligned memory up to 1.7 times slower on Zen 4, and engines' staging buffers are aligned.
    """
    memory = np.empty(size + HUGE_PAGE_BYTES, np.uint8)
    start = -memory.ctypes.data % HUGE_PAGE_BYTES
    buffer = memory[start : start + size]
    buffer.fill(0)
    return buffer


class Asked(Protocol):
    """What can be asked about blocks."""

    def look_up(self, batch: range) -> None:
        """Ask which of these blocks are there."""
        ...


@runtime_checkable
class Pinning(Asked, Protocol):
    """One whose blocks can be held in place without a copy."""

    def pin_and_unpin(self, batch: range) -> None:
        """Pin these blocks, learn where they are, and unpin them."""
        ...


class Contestant(Asked, Protocol):
    """One client of one store. Every method is synchronous; what fails raises.

    `prepare` and `remove_all` are never timed.
    """

    def prepare(self, work: WorkingSet) -> None:
        """Take on a working set: make keys, slices and addresses, so that timed calls only store."""
        ...

    def put_batch(self, batch: range) -> None:
        """Store these blocks from the caller's source; none of them is there."""
        ...

    def get_batch(self, batch: range) -> None:
        """Fetch these blocks, which are there, into the caller's destination where the store can."""
        ...

    def put_single(self, number: int) -> None:
        """Store one block from the caller's source."""
        ...

    def get_single(self, number: int) -> None:
        """Fetch one block as `get_batch` does."""
        ...

    def holds(self, number: int) -> bool:
        """Whether what comes back for one block is what went in. For checks, not for timing."""
        ...

    def remove_all(self) -> None:
        """Remove the working set's blocks."""
        ...

    def close(self) -> None:
        """Give back connection and buffers."""
        ...


class Server(Protocol):
    """A running store that clients reach at `address`."""

    version: str
    address: str
    pids: list[int]

    def settle(self) -> None:
        """Return once nothing of its start goes on in the background."""
        ...

    def overhead_bytes(self, payload_bytes: int) -> int:
        """Private memory beyond the blocks' own room, of all its processes; it holds `payload_bytes` now."""
        ...

    def close(self) -> None:
        """Stop its processes and wait for their end."""
        ...


class StoreModule(Protocol):
    """A module with one store in it. Importing it raises ImportError when the store is not installed."""

    __name__: str

    def start(self, directory: Path, capacity_bytes: int) -> Server:
        """Start a store with room for `capacity_bytes`, its files in `directory`; return once it accepts."""
        ...

    def connect(self, address: str, buffer_bytes: int) -> Contestant:
        """Connect a client whose working sets have buffers of at most `buffer_bytes`."""
        ...


def warm(contestant: Contestant, capacity_bytes: int, source: Bytes) -> None:
    """Touch all of a store's memory once: fill it with blocks, then remove them."""
    block_bytes = min(2 << 20, source.size)
    blocks = WorkingSet.of("warm", capacity_bytes // block_bytes, block_bytes, source, source[:0])
    contestant.prepare(blocks)
    for batch in blocks.batches():
        contestant.put_batch(batch)
    contestant.remove_all()


def as_module(module: Any) -> StoreModule:
    """An imported module as the store in it."""
    store: StoreModule = module
    return store
