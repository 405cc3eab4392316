"""The namespaces of a storage tier's blocks: one JSON line each, appended the first time one is stored.

A record names its namespace by id alone, and the id is the digest of the line's content. So a damaged line
gives another id or none, and its blocks are not found again; it never gives the wrong namespace.
"""

import errno
import os
from collections.abc import Set
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

from kvstore.block import Namespace
from tiers.volume import is_still_at, open_file, reserve

# Some 250 namespaces: none of them is refused because the disk is full by then.
_RESERVED_BYTES: Final = 64 << 10
# A file of ours is never so long; what lies beyond is not read.
_READ_BYTES_MAX: Final = 64 << 20


class Namespaces:
    """The open file, and what it holds. All methods block; OSError from all of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fresh = path.with_name(f"{path.name}.new")
        self._fresh.unlink(missing_ok=True)
        self._fd = open_file(path)
        text = os.pread(self._fd, min(os.fstat(self._fd).st_size, _READ_BYTES_MAX), 0)
        # A last line without an end was torn: the next one is written over it.
        self._end = text.rfind(b"\n") + 1
        self._text = text
        self._namespaces: dict[bytes, Namespace] = {}
        for line in text[: self._end].splitlines():
            with suppress(ValueError, RecursionError):
                namespace = msgspec.json.decode(line, type=Namespace)
                self._namespaces[namespace.id] = namespace
        reserve(self._fd, _RESERVED_BYTES)

    def get(self, identity: bytes) -> Namespace | None:
        """The namespace with this id, None when the file has no whole line of it."""
        return self._namespaces.get(identity)

    def add(self, namespace: Namespace) -> None:
        """Append it unless it is there."""
        if namespace.id in self._namespaces:
            return
        line = _line(namespace)
        if os.pwrite(self._fd, line, self._end) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._end += len(line)
        self._namespaces[namespace.id] = namespace

    def keep(self, identities: Set[bytes]) -> None:
        """Forget all others, and what was damaged, by a new file in place of the old one."""
        kept = {key: value for key, value in self._namespaces.items() if key in identities}
        text = b"".join(map(_line, kept.values()))
        if text == self._text:
            return
        # It only tidies up: on a full disk the old file goes on.
        with suppress(OSError):
            fd = open_file(self._fresh, os.O_TRUNC)
            try:
                if os.pwrite(fd, text, 0) != len(text):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                reserve(fd, _RESERVED_BYTES)
                os.fdatasync(fd)
                self._fresh.rename(self.path)
            except OSError:
                os.close(fd)
                self._fresh.unlink(missing_ok=True)
                raise
            os.close(self._fd)
            self._fd, self._end, self._namespaces, self._text = fd, len(text), kept, text

    def same(self) -> bool:
        """Whether the file is still at its path and has all its bytes."""
        end = self._end
        return is_still_at(self.path, self._fd, end)

    def close(self) -> None:
        """Close the descriptor; no other call may be under way."""
        os.close(self._fd)


def _line(namespace: Namespace) -> bytes:
    return msgspec.json.encode(namespace) + b"\n"
