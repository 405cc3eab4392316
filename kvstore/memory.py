"""Shared memory as the daemon and its clients map it: mmap, madvise and nothing of what lies in it.

Python's own `mmap` is not used, for three reasons: it keeps a duplicate of the descriptor (which a
forked child inherits), its `madvise` holds the GIL (populating takes 0.1 s a GiB and more), and when it
is collected in a forked child that was told MADV_DONTFORK it unmaps whatever lies there by then.
"""

import ctypes
import mmap
import os
import weakref
from typing import Final

MADV_POPULATE_READ: Final = 22
MADV_POPULATE_WRITE: Final = 23
MADV_COLLAPSE: Final = 25  # Linux 6.1 and later: huge pages now, whatever the system's default is
# One step of populating. Longer ones hold the process's memory map: 32 MiB held it for up to 132 ms.
POPULATE_STEP_BYTES: Final = 4 << 20
HUGE_PAGE_BYTES: Final = 2 << 20
_MAP_FAILED: Final = ctypes.c_void_p(-1).value
_MAP_NORESERVE: Final = 0x4000
_MAP_FIXED: Final = 0x10
_RESERVE: Final = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Mapping:
    """One shared mapping of a descriptor's first `size` bytes; the descriptor may be closed after.

    `view` is the whole of it as bytes, read-only if the mapping is. The memory is unmapped when `view`
    and everything sliced from it are gone, never before, so no array can outlive its memory. A forked
    child inherits nothing: there `forbid` makes the range fault instead of meaning something else.
    """

    __slots__ = ("__weakref__", "address", "size", "view", "writable")

    def __init__(self, fd: int, size: int, *, writable: bool) -> None:
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        # The kernel aligns shared memory to 4 KiB, and maps huge pages only where the address fits them:
        # reserve a little more, map at the aligned place within it, give the ends back.
        reserved = _mmap(None, size + HUGE_PAGE_BYTES, 0, _RESERVE, -1)
        address = -(-reserved // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        _mmap(address, size, protection, mmap.MAP_SHARED | _MAP_FIXED, fd)
        end = -(-(address + size) // mmap.PAGESIZE) * mmap.PAGESIZE
        for start, stop in ((reserved, address), (end, reserved + size + HUGE_PAGE_BYTES)):
            if stop > start:
                _libc.munmap(start, stop - start)
        self.address = address
        self.size = size
        self.writable = writable
        owner = (ctypes.c_ubyte * size).from_address(address)
        weakref.finalize(owner, _libc.munmap, address, size).atexit = False
        whole = memoryview(owner).cast("B")
        self.view = whole if writable else whole.toreadonly()
        self.advise(mmap.MADV_DONTFORK)

    def advise(self, advice: int, offset: int = 0, length: int | None = None) -> bool:
        """Call madvise on a range, without the GIL; False when the kernel declines."""
        length = self.size - offset if length is None else length
        return bool(_libc.madvise(self.address + offset, length, advice) == 0)

    def forbid(self) -> None:
        """In a forked child: let every access to the range fault, and nobody else be mapped there."""
        _mmap(self.address, self.size, 0, _RESERVE | _MAP_FIXED, -1)


def _mmap(address: int | None, size: int, protection: int, flags: int, fd: int) -> int:
    result = _libc.mmap(address, size, protection, flags, fd, 0)
    if result in (None, _MAP_FAILED):
        code = ctypes.get_errno()
        raise OSError(code, f"cannot map {size} bytes: {os.strerror(code)}")
    return int(result)


def backed_bytes(fd: int) -> int:
    """How much of a memfd has memory behind it. Populated front to back, this is the populated front."""
    return os.fstat(fd).st_blocks * 512
