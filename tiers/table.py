"""Which blocks lie in a volume: a file of records of one length, one for each block, written in place.

It moves no blocks and cuts no space. A record is in the page cache when `put` returns, which a killed process
does not take along; a power cut does, except for what was forgotten before a `flush`. What a power cut makes
of the rest (a record without its bytes, two records for one place) is found by checksums and sequences.
There is no clock in it: a sequence that grows with every record says what is older.

Numbers of records are for the event loop alone; everything that touches the file is for worker threads, which
one lock keeps apart. No lock is held across both, so a disk that hangs never stops the event loop.
"""

import errno
import os
import struct
import threading
from collections import deque
from collections.abc import Iterator, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Final

import numpy as np
import xxhash

from kvstore.block import KEY_BYTES_MAX, Namespace
from tiers.allocator import ALIGNMENT_BYTES
from tiers.base import Transfer
from tiers.namespaces import Namespaces
from tiers.volume import Head, is_still_at, open_file, reserve

RECORD_BYTES: Final = 128
RECORD_VERSION: Final = 1
_MAGIC: Final = b"kvtables"
# Version, length of key, flags, namespace, key, offset, length, checksum, sequence. Later versions keep the
# version, and the checksum of all this that follows.
_FIELDS: Final = struct.Struct("<HBB16s64sQQQQ4x")
_VERSION: Final = struct.Struct("<H")
_CHECKSUM: Final = struct.Struct("<Q")
_EMPTY: Final = bytes(RECORD_BYTES)
# Space for records is allocated for blocks of this length on average; smaller ones make the file grow.
_BLOCK_BYTES: Final = 64 << 10
_READ_BYTES: Final = 16 << 20


@dataclass(frozen=True, slots=True)
class Entry:
    """A record as it was found: the block, and where its bytes lie in the volume."""

    number: int
    namespace: Namespace
    key: bytes
    offset: int
    length: int
    checksum: int
    sequence: int

    @property
    def end(self) -> int:
        """Where its slot ends."""
        return self.offset + -(-self.length // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


@dataclass(slots=True)
class Found:
    """What a table held: the entries by offset, and how many records of other kinds."""

    entries: list[Entry]
    damaged: int = 0
    newer: int = 0
    beyond_capacity: int = 0


class Table:
    """The open file. First of all it is to `begin` or to `load`."""

    def __init__(self, path: Path, namespaces: Namespaces) -> None:
        self.path = path
        self._fd = open_file(path)
        self._namespaces = namespaces
        self._seed = 0
        self._sequence = 0
        self._end = 0
        self._lock = threading.Lock()
        self._sync_lock = threading.Lock()
        self._cleared = self._synced = 0
        # For the event loop, from here on.
        self._count = 0
        self._free: list[int] = []
        self._used: set[int] = set()
        # Forgotten and still on the disk. The event loop appends, who holds the lock takes away.
        self._stale: deque[int] = deque()

    @staticmethod
    def head_of(path: Path) -> Head | None:
        """The head of the table at `path`; None when there is none."""
        return Head.read(path, _MAGIC)

    # Opening, for a worker thread, before anything else.

    def begin(self, head: Head) -> int:
        """Begin anew, without records; how many there were."""
        found = sum(len(numbers) for numbers, _ in self._chunks()) if self.head_of(self.path) else 0
        os.ftruncate(self._fd, 0)
        self.load(head)
        return found

    def load(self, head: Head, forgotten: Set[int] = frozenset()) -> Found:
        """Read all records and clear those that cannot be used: damaged ones, those beyond the capacity, the
        older of two that exclude each other, and the `forgotten`. Records of later versions stay."""
        self._seed = int.from_bytes(head.identity[:8], "little")
        self.write_head(head)
        reserve(self._fd, (1 + head.capacity_bytes // _BLOCK_BYTES) * RECORD_BYTES)
        self._end = os.fstat(self._fd).st_size
        found = Found([])
        useless: list[int] = []
        later: set[int] = set()
        read: list[Entry] = []
        for numbers, chunk in self._chunks():
            for number, position in numbers:
                if number in forgotten:
                    useless.append(number)
                elif not self._is_whole(chunk, position):
                    useless.append(number)
                    found.damaged += 1
                elif _VERSION.unpack_from(chunk, position)[0] > RECORD_VERSION:
                    later.add(number)
                elif (entry := self._entry(number, chunk, position)) is None:
                    useless.append(number)
                    found.damaged += 1
                elif entry.end > head.capacity_bytes:
                    useless.append(number)
                    found.beyond_capacity += 1
                else:
                    read.append(entry)
        found.entries = _without_conflicts(read)
        found.newer = len(later)
        kept = {entry.number for entry in found.entries}
        excluded = [entry.number for entry in read if entry.number not in kept]
        found.damaged += len(excluded)
        self._clear(useless + excluded)
        self._sequence = max((entry.sequence for entry in read), default=0)
        self._count = -(-self._end // RECORD_BYTES) - 1
        self._used = kept | later
        self._free = [number for number in range(self._count - 1, -1, -1) if number not in self._used]
        return found

    # For the event loop.

    def take(self) -> int:
        """The number of a record to come."""
        if self._free:
            number = self._free.pop()
        else:
            number = self._count
            self._count += 1
        self._used.add(number)
        return number

    def forget(self, numbers: Sequence[int | None]) -> None:
        """Give numbers back; their records are cleared before one of them is put again. None is nobody's."""
        for number in numbers:
            if number is not None and number in self._used:
                self._used.remove(number)
                self._stale.append(number)
                self._free.append(number)

    @property
    def stale(self) -> frozenset[int]:
        """Forgotten, and still on the disk."""
        return frozenset(self._stale)

    def check(self) -> list[str]:
        """Recount the numbers; each line says what is wrong."""
        wrong = []
        free = set(self._free)
        if len(free) != len(self._free) or free & self._used:
            wrong.append("a number of a record is there twice")
        if len(self._free) + len(self._used) != self._count:
            wrong.append(f"{len(self._free)} free and {len(self._used)} used of {self._count} records")
        return wrong

    # For worker threads.

    def put(self, transfers: Sequence[Transfer]) -> None:
        """Write the records of those that are not dropped by now, of all or of none."""
        with self._lock:
            done: list[int] = []
            try:
                for transfer in transfers:
                    # Read under the lock: a number forgotten before may be somebody else's by now.
                    if not transfer.dropped:
                        self._namespaces.add(transfer.namespace)
                        done.append(transfer.record)
                        self._write(transfer.record, self._pack(transfer))
            except OSError:
                with suppress(OSError):
                    self._clear(done)
                raise

    def clear_forgotten(self) -> None:
        """Clear the records of all numbers forgotten so far; what fails is tried again by the next call."""
        with self._lock:
            while self._stale:
                self._clear([self._stale[0]])
                self._stale.popleft()

    def flush(self) -> None:
        """Clear the records of all numbers forgotten so far, and make that outlive a power cut."""
        self.clear_forgotten()
        wanted = self._cleared
        with self._sync_lock:
            if self._synced < wanted:
                reached = self._cleared
                os.fdatasync(self._fd)
                self._synced = reached

    def write_head(self, head: Head) -> None:
        """Write the table's first record, its head."""
        with self._lock:
            self._write(-1, head.pack(_MAGIC).ljust(RECORD_BYTES, b"\0"))

    def same(self) -> bool:
        """Whether the file is still at its path and has all its bytes."""
        end = self._end
        return is_still_at(self.path, self._fd, end)

    def close(self) -> None:
        """Close the descriptor; no other call may be under way."""
        os.close(self._fd)

    def _write(self, number: int, record: bytes) -> None:
        position = (number + 1) * RECORD_BYTES
        if os.pwrite(self._fd, record, position) != RECORD_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._end = max(self._end, position + RECORD_BYTES)

    def _clear(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            # What was never written need not be cleared, and the file need not grow for it.
            if (number + 1) * RECORD_BYTES < self._end:
                self._write(number, _EMPTY)
                self._cleared += 1

    def _pack(self, transfer: Transfer) -> bytes:
        self._sequence += 1
        packed = _FIELDS.pack(
            RECORD_VERSION,
            len(transfer.key),
            0,
            transfer.namespace.id,
            transfer.key,
            transfer.slot.offset,
            transfer.length,
            transfer.checksum,
            self._sequence,
        )
        return packed + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(packed, self._seed))

    def _chunks(self) -> Iterator[tuple[list[tuple[int, int]], bytes]]:
        """Pieces of the file, and of each record that is not empty its number and its place in the piece."""
        position = RECORD_BYTES
        while chunk := os.pread(self._fd, _READ_BYTES, position):
            chunk += bytes(-len(chunk) % RECORD_BYTES)
            words = np.frombuffer(chunk, np.uint64).reshape(-1, RECORD_BYTES // 8)
            first = position // RECORD_BYTES - 1
            rows: list[int] = np.flatnonzero(words.any(axis=1)).tolist()
            yield [(first + row, row * RECORD_BYTES) for row in rows], chunk
            position += len(chunk)

    def _is_whole(self, chunk: bytes, position: int) -> bool:
        packed = chunk[position : position + _FIELDS.size]
        (checksum,) = _CHECKSUM.unpack_from(chunk, position + _FIELDS.size)
        return bool(checksum == xxhash.xxh3_64_intdigest(packed, self._seed))

    def _entry(self, number: int, chunk: bytes, position: int) -> Entry | None:
        fields = _FIELDS.unpack_from(chunk, position)
        _, key_length, _, identity, key, offset, length, checksum, sequence = fields
        namespace = self._namespaces.get(identity)
        if (
            namespace is None
            or not 1 <= key_length <= KEY_BYTES_MAX
            or not length
            or offset % ALIGNMENT_BYTES
        ):
            return None
        return Entry(number, namespace, key[:key_length], offset, length, checksum, sequence)


def _without_conflicts(entries: Sequence[Entry]) -> list[Entry]:
    """The entries by offset, without the older of two that overlap or are of one block."""
    latest: dict[tuple[Namespace, bytes], Entry] = {}
    for entry in sorted(entries, key=attrgetter("sequence")):
        latest[entry.namespace, entry.key] = entry
    apart: list[Entry] = []
    for entry in sorted(latest.values(), key=attrgetter("offset")):
        if not apart or apart[-1].end <= entry.offset:
            apart.append(entry)
        elif apart[-1].sequence < entry.sequence:
            apart[-1] = entry
    return apart
