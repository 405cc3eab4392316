"""The data file of a storage tier: a superblock, then the bytes of blocks, all of it allocated beforehand.

It knows offsets and no blocks; which bytes mean what is the table's. Bytes go past the page cache where the
file system allows it: what a block would take there is memory that belongs to the arena. One file holds all
blocks, because overwriting allocated bytes is twice as fast as a new file a block at 2 MiB, and six times at
64 KiB (2 threads, ext4 on a virtual disk).
"""

import ctypes
import errno
import mmap
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import xxhash

from kvstore.errors import ConfigError

# The version of everything that lies in a tier's directory but single records, which have their own.
FORMAT: Final = 1
IDENTITY_BYTES: Final = 16
SUPERBLOCK_BYTES: Final = 4096
_MAGIC: Final = b"kvblocks"
_FIELDS: Final = struct.Struct("<8sI16sQ")
_CHECKSUM: Final = struct.Struct("<Q")
_FALLOC_FL_KEEP_SIZE: Final = 1
_UNSUPPORTED: Final = (errno.EOPNOTSUPP, errno.ENOSYS)
_NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What the kernel says of a place on a disk that cannot be read, while the disk as such is well.
_UNREADABLE: Final = (errno.ENODATA, errno.EILSEQ)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


@dataclass(frozen=True, slots=True)
class Head:
    """How a file of a tier begins: magic, version, identity, capacity, checksum.

    Later versions keep this, so that older ones can tell that a file is later and leave it alone. Files
    that belong together share the identity, which is random and new whenever a tier begins anew.
    """

    version: int
    identity: bytes
    capacity_bytes: int

    def pack(self, magic: bytes) -> bytes:
        """The head of a file of this kind."""
        packed = _FIELDS.pack(magic, self.version, self.identity, self.capacity_bytes)
        return packed + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(packed))

    @classmethod
    def parse(cls, data: bytes, magic: bytes) -> "Head | None":
        """The head that `data` begins with; None when it is damaged, or of another kind of file."""
        packed, checksum = data[: _FIELDS.size], data[_FIELDS.size : _FIELDS.size + _CHECKSUM.size]
        if checksum != _CHECKSUM.pack(xxhash.xxh3_64_intdigest(packed)):
            return None
        found, version, identity, capacity_bytes = _FIELDS.unpack(packed)
        return cls(version, identity, capacity_bytes) if found == magic else None

    @classmethod
    def read(cls, path: Path, magic: bytes) -> "Head | None":
        """The head of the file at `path`; None too when there is no such file."""
        try:
            # Without waiting: it might be a pipe.
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            return cls.parse(os.read(fd, _FIELDS.size + _CHECKSUM.size), magic)
        except IsADirectoryError:
            return None
        finally:
            os.close(fd)


class Volume:
    """The open data file. Offsets count from its data area, which begins after the superblock.

    `direct` says whether it goes past the page cache; `sparse` that its space could not be allocated, so
    that a write may find the disk full. All methods block; OSError from all of them.
    """

    def __init__(self, path: Path, capacity_bytes: int) -> None:
        self.path = path
        self.capacity_bytes = capacity_bytes
        self.sparse = False
        self.direct = True
        try:
            self._fd = open_file(path, os.O_DIRECT)
        except OSError as exc:
            if exc.errno != errno.EINVAL:
                raise
            self._fd = open_file(path)
            self.direct = False

    @staticmethod
    def head_of(path: Path) -> Head | None:
        """The superblock of the data file at `path`; None when there is none."""
        return Head.read(path, _MAGIC)

    def allocate(self, name: str) -> None:
        """Make the file as long as it should be, shorter or longer, and give it all its space on the disk.

        Raises:
            ConfigError: the disk has less space than that; the file is as long as before.
        """
        wanted = SUPERBLOCK_BYTES + self.capacity_bytes
        before = os.fstat(self._fd).st_size
        if before > wanted:
            os.ftruncate(self._fd, wanted)
        allocated = os.fstat(self._fd).st_blocks * 512
        free = _free_bytes(self._fd)
        if free is not None and wanted - allocated > free:
            raise self._too_large(name, allocated + free)
        try:
            fallocate(self._fd, wanted)
        except OSError as exc:
            if exc.errno in _NO_SPACE:
                os.ftruncate(self._fd, min(before, wanted))
                raise self._too_large(name, allocated + (free or 0)) from exc
            if exc.errno not in _UNSUPPORTED:
                raise
            self.sparse = True
            os.ftruncate(self._fd, wanted)

    def write(self, offset: int, memory: memoryview) -> None:
        """Write whole pages from page-aligned memory."""
        self._write_at(SUPERBLOCK_BYTES + offset, memory)

    def read(self, offset: int, memory: memoryview) -> bool:
        """Fill page-aligned memory of whole pages; False when the bytes cannot be had any more."""
        position = SUPERBLOCK_BYTES + offset
        try:
            return self._read_at(position, memory)
        except OSError as exc:
            if exc.errno in _UNREADABLE:
                return False
            raise

    def write_head(self, head: Head) -> None:
        """Write the superblock, and read it back, by the way that blocks go."""
        with mmap.mmap(-1, SUPERBLOCK_BYTES) as page, memoryview(page) as memory:
            packed = head.pack(_MAGIC)
            memory[: len(packed)] = packed
            self._write_at(0, memory)
            memory[:] = bytes(SUPERBLOCK_BYTES)
            if not self._read_at(0, memory) or bytes(memory[: len(packed)]) != packed:
                raise OSError(errno.EIO, "what was written does not come back")

    def same(self) -> bool:
        """Whether the file is still at its path and has all its bytes."""
        return is_still_at(self.path, self._fd, SUPERBLOCK_BYTES + self.capacity_bytes)

    def close(self) -> None:
        """Close the descriptor. No other call may be under way: the number is soon another file's."""
        os.close(self._fd)

    def _write_at(self, position: int, memory: memoryview) -> None:
        while memory:
            count = os.pwritev(self._fd, [memory], position)
            if not count:
                raise OSError(errno.EIO, f"{len(memory)} bytes are not taken")
            memory, position = memory[count:], position + count

    def _read_at(self, position: int, memory: memoryview) -> bool:
        while memory:
            count = os.preadv(self._fd, [memory], position)
            # Less than pages are read only where the file ends.
            if not count or count % mmap.PAGESIZE:
                return False
            memory, position = memory[count:], position + count
        return True

    def _too_large(self, name: str, free: int) -> ConfigError:
        return ConfigError(
            f"{name} tier: {_in_words(self.capacity_bytes)} asked, {_in_words(free)} free on "
            f"{self.path.parent}; lower its capacity"
        )


def open_file(path: Path, flags: int = 0) -> int:
    """Open a file of ours for reading and writing, made if missing, for nobody else's eyes.

    Raises:
        ConfigError: something that is no file has its name.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | flags, 0o600)
    except IsADirectoryError as exc:
        raise ConfigError(f"{path} is a directory where a file belongs; move it away") from exc
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ConfigError(f"{path} is not a regular file; move it away")
    return fd


def is_still_at(path: Path, fd: int, least_bytes: int = 0) -> bool:
    """Whether `path` names the open file, and the file is at least so long."""
    try:
        there = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return os.path.samestat(there, os.fstat(fd)) and there.st_size >= least_bytes


def fallocate(fd: int, length: int) -> None:
    """Allocate a file's first `length` bytes on the disk, extending it.

    The system call itself: where a file system does not offer it, `os.posix_fallocate` writes every page.
    """
    _fallocate(fd, 0, length)


def reserve(fd: int, length: int) -> None:
    """Allocate space that a file may grow into, where that can be had: a full disk does not stop it then."""
    free = _free_bytes(fd)
    if free is not None and free < length:
        # Some file systems would take what there is, and fill the disk for nothing.
        return
    try:
        _fallocate(fd, _FALLOC_FL_KEEP_SIZE, length)
    except OSError as exc:
        if exc.errno not in _UNSUPPORTED + _NO_SPACE:
            raise


def _fallocate(fd: int, mode: int, length: int) -> None:
    while _libc.fallocate(fd, mode, 0, length):
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def _free_bytes(fd: int) -> int | None:
    """What the file system has left, None when it does not say."""
    system = os.fstatvfs(fd)
    return system.f_bavail * system.f_frsize if system.f_blocks else None


def _in_words(size: int) -> str:
    for unit, shift in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 1 << shift:
            return f"{size / (1 << shift):.4g} {unit}"
    return f"{size} bytes"
