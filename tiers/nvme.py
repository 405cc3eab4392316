"""The NVMe tier: blocks in one directory, which is one device. They outlive the process, killed or not.

It keeps bytes and finds them again; which blocks those are, and which leave, is the store's. Whatever is
damaged in the directory (see `tiers.folder`) costs the blocks it belongs to, and nothing else.

Everything that touches the disk runs in threads of the tier's own, so a disk that hangs stops those and not
the event loop. What a call was given stays in use until its thread is done, also when nobody waits any more.
"""

import asyncio
import errno
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from operator import attrgetter
from pathlib import Path
from typing import Any, Final

import xxhash

from kvstore.block import Medium
from kvstore.errors import ConfigError, TierError
from tiers.allocator import ALIGNMENT_BYTES, Allocator
from tiers.base import Slot, TierStatistics, Transfer
from tiers.folder import Folder
from tiers.jobs import Jobs
from tiers.table import Entry, Table

logger = logging.getLogger(__name__)

_CAPACITY_BYTES_MIN: Final = 1 << 20
_REMEDIES: Final = {
    errno.ENOSPC: "free space there",
    errno.EROFS: "mount it writable",
    errno.EACCES: "give this user the right to write there",
    errno.EPERM: "give this user the right to write there",
}


@dataclass(frozen=True, slots=True)
class Recovered:
    """What `recover` found: blocks that are there again, and what is not. A record is a block's."""

    blocks: int = 0
    damaged_records: int = 0
    newer_records: int = 0
    beyond_capacity: int = 0
    set_aside_files: int = 0


class NvmeTier:
    """A storage tier in a directory: see `StorageTier`.

    `direct` says whether blocks go past the page cache, `found` what the last `recover` found. One call is
    the work of one thread, so what shall go on in parallel is given in several calls.
    """

    medium = Medium.NVME
    slowest_bytes_per_s = inf

    def __init__(self, folder: Path, capacity_bytes: int, *, name: str = "nvme", threads: int = 4) -> None:
        if capacity_bytes < _CAPACITY_BYTES_MIN:
            raise ConfigError(
                f"{name} tier: capacity is {capacity_bytes} bytes; the least is {_CAPACITY_BYTES_MIN}"
            )
        if folder.is_file():
            raise ConfigError(f"{name} tier: {folder} is a file; give a directory")
        self.name = name
        self.folder = folder
        self.capacity_bytes = capacity_bytes // ALIGNMENT_BYTES * ALIGNMENT_BYTES
        self.found = Recovered()
        self.direct = True
        self._sparse = False
        self._allocator = Allocator(self.capacity_bytes)
        self._open: Folder | None = None
        self._last: Folder | None = None
        self._jobs = Jobs(name, str(folder), threads, translate=self._translated, give_back=self._close_files)

    # Blocks: see StorageTier.

    async def recover(self) -> list[Transfer]:
        if self._jobs.running:
            raise TierError(
                f"{self.name} tier: {self._jobs.running} calls are under way in {self.folder}; "
                "try again later"
            )
        return await asyncio.shield(self._jobs.start("opening it", self._recover))

    async def write(self, transfers: Sequence[Transfer]) -> None:
        folder = self._opened()
        for transfer in transfers:
            transfer.record = folder.table.take()
        job = self._jobs.start(f"writing {len(transfers)} blocks", partial(self._write, folder, transfers))
        # Runs before whoever waits here goes on, and also when nobody waits any more.
        job.add_done_callback(partial(_take_back, folder.table, transfers))
        await asyncio.shield(job)

    async def read(self, transfers: Sequence[Transfer]) -> None:
        work = partial(self._read, self._opened(), transfers)
        await asyncio.shield(self._jobs.start(f"reading {len(transfers)} blocks", work))

    def forget(self, records: Sequence[Any]) -> None:
        # Also while nothing is open: the next `recover` clears them.
        if self._last is not None:
            self._last.table.forget(records)

    def evict(self, records: Sequence[Any]) -> None:
        self.forget(records)

    async def flush(self, names: Sequence[tuple[bytes, bytes]] = ()) -> None:
        await asyncio.shield(self._jobs.start("forgetting blocks", self._opened().table.flush))

    async def same(self) -> bool:
        return self._open is not None and await asyncio.shield(
            self._jobs.start("looking at its files", self._open.same)
        )

    def interrupt(self) -> None:
        """Nothing: what a disk does cannot be ended."""

    async def probe(self) -> None:
        await asyncio.shield(self._jobs.start("writing a little", self._opened().probe))

    def close(self) -> None:
        """Close the files, or leave that to the last thread that is still at them; does not wait for it."""
        self._jobs.close()

    # Space: all of it is ready once `recover` has returned.

    def slot_length(self, length: int) -> int:
        return -(-length // ALIGNMENT_BYTES) * ALIGNMENT_BYTES

    def take(self, length: int, owner: object, within: Slot | None = None) -> Slot | None:
        return self._allocator.take(self.slot_length(length), owner, within)

    def free(self, slot: Slot) -> Slot:
        return self._allocator.free(slot)

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
        wrong = self._allocator.check()
        if self._open is not None:
            wrong += self._open.table.check()
        return [f"{self.name}: {line}" for line in wrong]

    # On the event loop.

    def _opened(self) -> Folder:
        if self._open is None:
            raise TierError(f"{self.name} tier: {self.folder} is not open; recover it first")
        return self._open

    # In a thread.

    def _translated(self, action: str, exc: Exception) -> TierError | None:
        if not isinstance(exc, OSError):
            return None
        remedy = _REMEDIES.get(exc.errno or 0, "see the kernel's log")
        return TierError(f"{self.name} tier: {action} in {self.folder} failed: {exc}; {remedy}")

    def _recover(self) -> list[Transfer]:
        self._close_files()
        self._allocator = Allocator(self.capacity_bytes)
        folder = Folder(self.folder, self.capacity_bytes, name=self.name, previous=self._last)
        if self.direct and not folder.volume.direct:
            logger.warning("no O_DIRECT on %s: reads and writes go through the page cache", self.folder)
        if folder.volume.sparse and not self._sparse:
            logger.warning("no fallocate on %s: writes fail once others have filled it", self.folder)
        self.direct, self._sparse = folder.volume.direct, folder.volume.sparse
        self._open = self._last = folder
        found = folder.found
        self.found = Recovered(
            len(found.entries), found.damaged, found.newer, found.beyond_capacity, folder.set_aside_files
        )
        lost = self.found.damaged_records, self.found.newer_records, self.found.beyond_capacity
        if any(lost) and found.entries:  # where it begins anew, that was said
            logger.warning(
                "%s tier: of the records in %s %d were damaged, %d of a later release, %d beyond capacity",
                self.name, self.folder, *lost,
            )  # fmt: skip
        return self._claim(found.entries)

    def _claim(self, entries: Sequence[Entry]) -> list[Transfer]:
        """Entries by offset as transfers by age, in slots of their own."""
        slots = self._allocator.claim(
            [(entry.offset, entry.end - entry.offset, entry.key) for entry in entries]
        )
        offset_to_slot = {slot.offset: slot for slot in slots}
        return [
            Transfer(
                entry.namespace,
                entry.key,
                entry.length,
                slot=offset_to_slot[entry.offset],
                checksum=entry.checksum,
                record=entry.number,
            )
            for entry in sorted(entries, key=attrgetter("sequence"))
        ]

    def _write(self, folder: Folder, transfers: Sequence[Transfer]) -> None:
        # Before the bytes: they may go where a forgotten block was.
        folder.table.clear_forgotten()
        for transfer in transfers:
            if not transfer.dropped:
                memory = self._pages(transfer)
                if transfer.checksum is None:
                    transfer.checksum = xxhash.xxh3_64_intdigest(memory[: transfer.length])
                folder.volume.write(transfer.slot.offset, memory)
        folder.table.put(transfers)

    def _read(self, folder: Folder, transfers: Sequence[Transfer]) -> None:
        for transfer in transfers:
            if transfer.checksum is None:
                raise ValueError("a block without a checksum cannot be read; it was never written")
            memory = self._pages(transfer)
            whole = folder.volume.read(transfer.slot.offset, memory)
            if not whole or xxhash.xxh3_64_intdigest(memory[: transfer.length]) != transfer.checksum:
                transfer.damaged = True

    def _pages(self, transfer: Transfer) -> memoryview:
        if transfer.memory is None:
            raise ValueError("a transfer without memory cannot be read or written; give it whole pages")
        return transfer.memory[: self.slot_length(transfer.length)]

    def _close_files(self) -> None:
        folder, self._open = self._open, None
        if folder is not None:
            folder.close()


def _take_back(table: Table, transfers: Sequence[Transfer], job: "asyncio.Future[None]") -> None:
    """After a write that failed, forget its records; those of dropped blocks the store itself forgets."""
    if job.cancelled() or job.exception() is not None:
        for transfer in transfers:
            if not transfer.dropped:
                table.forget([transfer.record])
                transfer.record = None
