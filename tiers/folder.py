"""The directory of a storage tier while it is open: `blocks`, `table`, `namespaces`, and `lock`.

It is opened here, whatever lies in it: files that are damaged, foreign or mixed up begin anew, files of a
later release are set aside, others are not touched. `lock` is held by the one process that owns all this.
"""

import fcntl
import logging
import os
from collections.abc import Set
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from kvstore.errors import ConfigError
from tiers.namespaces import Namespaces
from tiers.table import Found, Table
from tiers.volume import FORMAT, IDENTITY_BYTES, Head, Volume, is_still_at, open_file

logger = logging.getLogger(__name__)

_NAMES: Final = ("blocks", "table", "namespaces")


class Folder:
    """The open files. All methods block; OSError from all of them.

    `previous` is the same directory as it was open before, now closed: what was forgotten there and could
    not be cleared is cleared now.

    Raises:
        ConfigError: another process owns the directory, or it cannot hold what it should.
    """

    def __init__(
        self, path: Path, capacity_bytes: int, *, name: str, previous: "Folder | None" = None
    ) -> None:
        self.path = path
        self.name = name
        try:
            path.mkdir(0o700, parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as exc:
            raise ConfigError(f"{name} tier: {path} is no directory; give another one") from exc
        with ExitStack() as opened:
            self._lock = self._take_lock()
            opened.callback(os.close, self._lock)
            self.set_aside_files = self._set_newer_aside()
            fresh = not any((path / name).exists() for name in _NAMES)
            superblock, head = self._heads()
            self.volume = Volume(path / "blocks", capacity_bytes)
            opened.callback(self.volume.close)
            self.volume.allocate(name)
            namespaces = Namespaces(path / "namespaces")
            opened.callback(namespaces.close)
            self.table = Table(path / "table", namespaces)
            opened.callback(self.table.close)
            self._namespaces = namespaces
            if superblock is not None and head is not None and superblock.identity == head.identity:
                self.head = Head(FORMAT, head.identity, capacity_bytes)
                self.found = self.table.load(self.head, self._forgotten(previous))
            else:
                self.head = Head(FORMAT, os.urandom(IDENTITY_BYTES), capacity_bytes)
                self.found = Found([], damaged=self.table.begin(self.head))
                if not fresh:
                    self._say_it_begins_anew(superblock, head)
            if superblock != self.head:
                self.volume.write_head(self.head)
            namespaces.keep({entry.namespace.id for entry in self.found.entries})
            self._opened = opened.pop_all()

    def same(self) -> bool:
        """Whether all files are still at their paths, with all their bytes."""
        return (
            is_still_at(self.path / "lock", self._lock)
            and self.volume.same()
            and self.table.same()
            and self._namespaces.same()
        )

    def probe(self) -> None:
        """Write to both files, and read back what went to the disk."""
        self.volume.write_head(self.head)
        self.table.write_head(self.head)

    def close(self) -> None:
        """Close all files, the lock last; no other call may be under way."""
        self._opened.close()

    def _take_lock(self) -> int:
        lock = open_file(self.path / "lock")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        except BlockingIOError as exc:
            owner = os.pread(lock, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(lock)
            raise ConfigError(
                f"{self.name} tier: {self.path} is used by process {owner}; "
                "stop it, or give another directory"
            ) from exc
        except OSError:
            os.close(lock)
            raise
        return lock

    def _heads(self) -> tuple[Head | None, Head | None]:
        return Volume.head_of(self.path / "blocks"), Table.head_of(self.path / "table")

    def _set_newer_aside(self) -> int:
        """Rename the files of a later format, which a later release may want back; how many those are."""
        version = max((head.version for head in self._heads() if head is not None), default=FORMAT)
        if version <= FORMAT:
            return 0
        suffix, again = f"format-{version}", 1
        while any((self.path / f"{name}.{suffix}").exists() for name in _NAMES):
            again += 1
            suffix = f"format-{version}-{again}"
        there = [name for name in _NAMES if (self.path / name).exists()]
        for name in there:
            (self.path / name).rename(self.path / f"{name}.{suffix}")
        logger.warning(
            "%s tier: %s holds format %d, this release knows %d; %d files are set aside as *.%s",
            self.name, self.path, version, FORMAT, len(there), suffix,
        )  # fmt: skip
        return len(there)

    def _forgotten(self, previous: "Folder | None") -> Set[int]:
        if previous is None or previous.head.identity != self.head.identity:
            return frozenset()
        return previous.table.stale

    def _say_it_begins_anew(self, superblock: Head | None, head: Head | None) -> None:
        logger.warning(
            "%s tier: %s begins anew, %d blocks dropped: its superblock is %s, its table %s",
            self.name, self.path, self.found.damaged, _state(superblock), _state(head),
        )  # fmt: skip


def _state(head: Head | None) -> str:
    return "damaged or missing" if head is None else f"that of {head.identity.hex()[:8]}"
