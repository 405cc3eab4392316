"""The DRAM tier: one memfd that clients map, populated in the background, given out in slots.

The memory is the daemon's: it touches every page before a slot on it is given out, so that clients never
pay a first touch (ten times slower than the copy) and never are charged for the memory. Huge pages where
the system grants them, in this order: reserved ones (hugetlbfs), transparent ones, small ones collapsed on
the spot, else 4 KiB pages and a warning with what their page tables cost.
"""

import ctypes
import logging
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from kvstore.block import Medium
from kvstore.errors import ConfigError, TierError
from kvstore.memory import HUGE_PAGE_BYTES, MADV_COLLAPSE, MADV_POPULATE_WRITE, POPULATE_STEP_BYTES, Mapping
from tiers.allocator import ALIGNMENT_BYTES, Allocator
from tiers.base import Slot, TierStatistics

logger = logging.getLogger(__name__)

_MFD_HUGE_2MB: Final = 21 << 26
_SHMEM_HUGE_PAGES: Final = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
_RESERVED_HUGE_PAGES: Final = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
_PAGE_TABLE_ENTRY_BYTES: Final = 8


class DramTier:
    """An arena in host memory, a new one or that of the descriptor `inherited`, which it then owns.

    `populate` runs in a thread of its own until all is populated; `grow` is called on the event loop as
    it goes, so that slots are only ever given out from populated memory. For an inherited arena `claim` is
    called before either.
    """

    medium = Medium.DRAM

    def __init__(
        self, capacity_bytes: int, *, name: str = "dram", arena: int = 0, inherited: int | None = None
    ) -> None:
        if capacity_bytes < HUGE_PAGE_BYTES:
            raise ConfigError(
                f"{name} capacity is {capacity_bytes} bytes; the least is {HUGE_PAGE_BYTES} (one huge page)"
            )
        self.name = name
        self.arena = arena
        self.capacity_bytes = capacity_bytes // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
        available = _available_bytes()
        if inherited is None and self.capacity_bytes > available:
            raise ConfigError(
                f"{name} capacity is {self.capacity_bytes} bytes, {available} are available; lower it"
            )
        self._allocator = Allocator(self.capacity_bytes)
        self._inherited_bytes = 0
        if inherited is None:
            self._fd, self._map, self.pages = _memory_file(f"kvstore-{name}", self.capacity_bytes)
        else:
            self._fd, self._map = inherited, Mapping(inherited, self.capacity_bytes, writable=True)
            self.pages = _pages_of(inherited)
        if self.pages == "transparent":
            self._map.advise(mmap.MADV_HUGEPAGE)
        self._stopping = threading.Event()

    # Memory.

    def populate(self, report: Callable[[int], None]) -> None:
        """Touch all pages, front to back, and report how far it is. Blocks for 0.1 to 2.6 s a GiB.

        For a thread of its own. Raises TierError when the system is out of memory.
        """
        step = POPULATE_STEP_BYTES
        for start in range(0, self.capacity_bytes, step):
            if self._stopping.is_set():
                return
            length = min(step, self.capacity_bytes - start)
            there = start < self._inherited_bytes  # with blocks, perhaps; only entered into our page tables
            if self.pages == "small" and not there and not self._collapse(start, length):
                self._warn_of_page_tables()
            if not self._map.advise(MADV_POPULATE_WRITE, start, length):
                reason = os.strerror(ctypes.get_errno())
                raise TierError(
                    f"{self.name}: populating {length} bytes at {start} failed: {reason}; lower its capacity"
                )
            if start + length > self._inherited_bytes:
                report(start + length)

    def claim(self, pieces: Sequence[tuple[int, int]], ready_bytes: int) -> list[Slot]:
        """The slots (offset, length; ascending) that are taken of an inherited arena, populated so far."""
        self._inherited_bytes = ready_bytes
        return self._allocator.claim([(offset, length, self) for offset, length in pieces], ready_bytes)

    def open(self, *, writable: bool) -> int:
        """A new descriptor of the arena, for a client; the caller closes it."""
        access = os.O_RDWR if writable else os.O_RDONLY
        return os.open(f"/proc/self/fd/{self._fd}", access | os.O_CLOEXEC)

    def close(self) -> None:
        """Stop populating and give the memory back once no client maps it any more."""
        self._stopping.set()
        os.close(self._fd)

    # Slots: see SlotTier.

    def slot_length(self, length: int) -> int:
        return -(-length // ALIGNMENT_BYTES) * ALIGNMENT_BYTES

    def take(self, length: int, owner: object, within: Slot | None = None) -> Slot | None:
        return self._allocator.take(self.slot_length(length), owner, within)

    def free(self, slot: Slot) -> Slot:
        return self._allocator.free(slot)

    def move(self, slot: Slot, to: Slot) -> None:
        base = self._map.address
        ctypes.memmove(base + to.offset, base + slot.offset, slot.length)

    def poison(self, slot: Slot) -> None:
        ctypes.memset(self._map.address + slot.offset, 0xDB, slot.length)

    def _collapse(self, start: int, length: int) -> bool:
        """Turn small pages into huge ones, which goes where some are there already; False when refused."""
        for offset in range(start, start + length, HUGE_PAGE_BYTES):
            self._map.view[offset] = 0
        return self._map.advise(MADV_COLLAPSE, start, length)

    def _warn_of_page_tables(self) -> None:
        self.pages = "refused"
        tables = self.capacity_bytes // mmap.PAGESIZE * _PAGE_TABLE_ENTRY_BYTES
        logger.warning(
            "arena %s has 4 KiB pages: %d KiB of page tables in each process that maps it; "
            "reserve huge pages (vm.nr_hugepages=%d) or set %s to advise",
            self.name, tables >> 10, self.capacity_bytes // HUGE_PAGE_BYTES, _SHMEM_HUGE_PAGES,
        )  # fmt: skip

    def grow(self, ready_bytes: int) -> None:
        self._allocator.grow(ready_bytes)

    def view(self, slot: Slot) -> memoryview:
        return self._map.view[slot.offset : slot.offset + slot.length]

    def largest(self, count: int) -> list[Slot]:
        return self._allocator.largest(count)

    @property
    def free_bytes(self) -> int:
        return self._allocator.free_bytes

    def statistics(self) -> TierStatistics:
        allocator = self._allocator
        largest = allocator.largest(1)
        return TierStatistics(
            name=self.name,
            medium=self.medium.value,
            capacity_bytes=self.capacity_bytes,
            ready_bytes=allocator.ready_bytes,
            used_bytes=allocator.ready_bytes - allocator.free_bytes,
            largest_free_bytes=largest[0].length if largest else 0,
        )

    def check(self) -> list[str]:
        return [f"{self.name}: {line}" for line in self._allocator.check()]


def _memory_file(name: str, size: int) -> tuple[int, Mapping, str]:
    """The file, the daemon's own mapping of it, and what pages it has."""
    if _number_in(_RESERVED_HUGE_PAGES) * HUGE_PAGE_BYTES >= size:
        fd = -1
        try:
            fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_HUGETLB | _MFD_HUGE_2MB)
            os.ftruncate(fd, size)
            return fd, Mapping(fd, size, writable=True), "reserved"  # which a container may not be allowed
        except OSError:
            logger.warning("reserved huge pages are there but not for us; using others")
            if fd >= 0:
                os.close(fd)
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd, Mapping(fd, size, writable=True), _pages_of(fd)


def _pages_of(fd: int) -> str:
    if os.fstatvfs(fd).f_bsize == HUGE_PAGE_BYTES:
        return "reserved"
    try:
        setting = _SHMEM_HUGE_PAGES.read_text()
    except OSError:
        setting = "[never]"
    return "small" if "[never]" in setting or "[deny]" in setting else "transparent"


def _number_in(path: Path) -> int:
    try:
        return int(path.read_text())
    except OSError:
        return 0


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024 + _number_in(_RESERVED_HUGE_PAGES) * HUGE_PAGE_BYTES
    raise TierError("/proc/meminfo has no MemAvailable")
