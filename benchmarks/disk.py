"""What no NVMe tier can pass, and what is there without one: blocks moved between memory and a file system
by as many threads, past the page cache where that goes. None of it survives anything.
"""

import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Protocol, Self

import numpy as np
import xxhash

from benchmarks.peers.base import Bytes

RAW: Final = "raw file"
HASHED: Final = "raw file + xxh3"
FILE_PER_BLOCK: Final = "file per block"
DIRECTORY_VARIABLE: Final = "KVSTORE_BENCH_DIR"
BATCH_BYTES_MAX: Final = 8 << 20
_FILES_MAX: Final = 4096
_SEED: Final = 1


@dataclass(frozen=True, slots=True)
class Blocks:
    """Equal blocks by number: where they lie in memory before they are stored and after they are loaded."""

    block_bytes: int
    source: Bytes
    destination: Bytes

    def __len__(self) -> int:
        return self.source.size // self.block_bytes

    def first(self, count: int) -> Self:
        """Of these blocks the first ones, or all."""
        part = slice(min(count, len(self)) * self.block_bytes)
        return replace(self, source=self.source[part], destination=self.destination[part])

    def views(self, buffer: Bytes) -> list[memoryview]:
        """Every block's place in one of the buffers."""
        view = buffer.data
        return [view[number * self.block_bytes :][: self.block_bytes] for number in range(len(self))]

    def batches(self, *, shuffled: bool) -> list[list[int]]:
        """All numbers once, in order or in an order that is the same for everybody, a few to a call."""
        numbers = np.arange(len(self))
        if shuffled:
            np.random.default_rng(_SEED).shuffle(numbers)
        step = max(1, BATCH_BYTES_MAX // self.block_bytes)
        return [numbers[start : start + step].tolist() for start in range(0, len(self), step)]


class Disk(Protocol):
    """Something that keeps blocks in files. Nothing but `store` and `load` is ever timed."""

    def prepare(self, blocks: Blocks) -> Blocks:
        """Take on a set of blocks, none of which is stored; the answer is what of it is stored and loaded."""

    def clear(self) -> None:
        """Drop what `store` stored, so that it can be called again."""

    def store(self, jobs: int) -> None:
        """Store all blocks in order, `jobs` batches at a time."""

    def load(self, jobs: int) -> None:
        """Load all blocks in shuffled order, `jobs` batches at a time."""

    def close(self) -> None:
        """Leave no file behind."""


class _Threaded:
    """Stores and loads blocks one by one, in threads, by the two methods that it lacks."""

    def __init__(self) -> None:
        self._blocks: Blocks | None = None
        self._sources: list[memoryview] = []
        self._destinations: list[memoryview] = []

    def _take_on(self, blocks: Blocks) -> None:
        self._blocks = blocks
        self._sources, self._destinations = blocks.views(blocks.source), blocks.views(blocks.destination)

    def store(self, jobs: int) -> None:
        assert self._blocks is not None
        in_threads(jobs, self._blocks.batches(shuffled=False), self._store)

    def load(self, jobs: int) -> None:
        assert self._blocks is not None
        in_threads(jobs, self._blocks.batches(shuffled=True), self._load)

    def _store(self, number: int) -> None:
        raise NotImplementedError

    def _load(self, number: int) -> None:
        raise NotImplementedError


class RawFile(_Threaded):
    """One file that is there in full, and one system call a block: the limit."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._file, self._path = tempfile.mkstemp(prefix="raw-", dir=directory)
        os.close(self._file)
        self._file = os.open(self._path, os.O_RDWR | direct_flag(directory))

    def prepare(self, blocks: Blocks) -> Blocks:
        os.posix_fallocate(self._file, 0, blocks.source.size)
        self._take_on(blocks)
        return blocks

    def clear(self) -> None:
        """It is overwritten in place."""

    def close(self) -> None:
        os.close(self._file)
        os.unlink(self._path)

    def _store(self, number: int) -> None:
        view = self._sources[number]
        if os.pwritev(self._file, [view], number * len(view)) != len(view):
            raise OSError(f"{self._path}: part of a block written")

    def _load(self, number: int) -> None:
        view = self._destinations[number]
        if os.preadv(self._file, [view], number * len(view)) != len(view):
            raise OSError(f"{self._path}: part of a block read")


class HashedFile(RawFile):
    """The same with a checksum of every block, which it does not keep: what knowing the bytes costs."""

    def _store(self, number: int) -> None:
        xxhash.xxh3_64_intdigest(self._sources[number])
        super()._store(number)

    def _load(self, number: int) -> None:
        super()._load(number)
        xxhash.xxh3_64_intdigest(self._destinations[number])


class FilePerBlock(_Threaded):
    """Create, write and rename; open and read. What most engines' own disk caches do."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory / "files"
        self._directory.mkdir()
        self._flag = direct_flag(directory)
        self._paths: list[str] = []

    def prepare(self, blocks: Blocks) -> Blocks:
        """Of the first ones only, where there are very many: files are slow, and need no more to show it."""
        self.clear()
        blocks = blocks.first(_FILES_MAX)
        self._paths = [str(self._directory / f"{number:08x}") for number in range(len(blocks))]
        self._take_on(blocks)
        return blocks

    def clear(self) -> None:
        for path in self._paths:
            with suppress(FileNotFoundError):
                os.unlink(path)

    def close(self) -> None:
        shutil.rmtree(self._directory)

    def _store(self, number: int) -> None:
        path = self._paths[number]
        file = os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_EXCL | self._flag, 0o600)
        try:
            written = os.pwritev(file, [self._sources[number]], 0)
        finally:
            os.close(file)
        if written != len(self._sources[number]):
            raise OSError(f"{path}: part of a block written")
        os.rename(f"{path}.new", path)

    def _load(self, number: int) -> None:
        file = os.open(self._paths[number], os.O_RDONLY | self._flag)
        try:
            if os.preadv(file, [self._destinations[number]], 0) != len(self._destinations[number]):
                raise OSError(f"{self._paths[number]}: part of a block read")
        finally:
            os.close(file)


def in_threads(jobs: int, batches: Sequence[Sequence[int]], move: Callable[[int], object]) -> None:
    """Do `move` with every number, each thread a batch at a time. The first error is raised here."""
    left: Iterator[Sequence[int]] = iter(batches)
    taking = threading.Lock()

    def work() -> None:
        while True:
            with taking:
                batch = next(left, None)
            if batch is None:
                return
            for number in batch:
                move(number)

    with ThreadPoolExecutor(jobs) as threads:
        for thread in [threads.submit(work) for _ in range(jobs)]:
            thread.result()


def chosen_directory() -> Path:
    """Where benchmarks put their files: KVSTORE_BENCH_DIR, or where the system puts temporary ones."""
    return Path(os.environ.get(DIRECTORY_VARIABLE) or tempfile.gettempdir())


def direct_flag(directory: Path) -> int:
    """O_DIRECT where files in `directory` can be opened with it, else 0."""
    with tempfile.NamedTemporaryFile(dir=directory) as probe:
        try:
            os.close(os.open(probe.name, os.O_RDWR | os.O_DIRECT))
        except OSError:
            return 0
    return os.O_DIRECT


def describe(directory: Path) -> str:
    """The file system, and whether the page cache is passed by."""
    mounts = [line.split()[:3] for line in Path("/proc/mounts").read_text().splitlines()]
    place = directory.resolve()
    above = [(point, kind, name) for name, point, kind in mounts if place.is_relative_to(point)]
    _, kind, name = max(above, key=lambda mount: len(mount[0]))
    return f"{kind} on {name}, {'with' if direct_flag(directory) else 'without'} O_DIRECT"
