"""The file that an index begins with after a restart: sections, each with its length and checksum.

    head        what it is, and its version
    section...  length, CRC-32, msgpack: the tables, and last what belongs to them, with their number

It is written beside the one before and takes its place when it is whole. What is damaged, half written or of
another version is no snapshot. What it says is a claim: publishers confirm theirs before it answers for them.
"""

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Final, TypeVar
from zlib import crc32

import msgspec

from kvstore.errors import KVStoreError
from kvstore.index.saved import SavedIndex, SavedTable

_HEAD: Final = b"kvstore index 2\n"
_SECTION: Final = struct.Struct(">QI")
_Section = TypeVar("_Section")
# Gives the tables to a function, and the rest when it has.
Save = Callable[[Callable[[SavedTable], None]], SavedIndex]


class SnapshotError(KVStoreError):
    """A file that is no snapshot, or not whole."""


def write(path: Path, save: Save) -> int:
    """Write what `save` gives; the file's length.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    new = path.with_name(path.name + ".new")
    with open(new, "wb", opener=_private) as file:
        file.write(_HEAD)
        tables = 0

        def write_table(table: SavedTable) -> None:
            nonlocal tables
            tables += 1
            _write_section(file, table)

        rest = save(write_table)
        rest.tables = tables
        _write_section(file, rest)
        nbytes = file.tell()
    new.rename(path)
    return nbytes


def read(path: Path) -> tuple[SavedIndex, list[SavedTable]] | None:
    """What was written last; None where nothing was.

    Raises:
        SnapshotError: it is damaged, or no snapshot of this version.
    """
    try:
        data = memoryview(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise SnapshotError(f"{path}: {exc.strerror}") from exc
    if bytes(data[: len(_HEAD)]) != _HEAD:
        raise SnapshotError(f"{path} is no snapshot of this version")
    sections = []
    start = len(_HEAD)
    while start < len(data):
        start, section = _section(path, data, start)
        sections.append(section)
    if not sections:
        raise SnapshotError(f"{path} ends after its head")
    tables = [_decoded(path, section, SavedTable) for section in sections[:-1]]
    rest = _decoded(path, sections[-1], SavedIndex)
    if rest.tables != len(tables):
        raise SnapshotError(f"{path} has {len(tables)} tables, of {rest.tables}")
    return rest, tables


def _private(path: str, flags: int) -> int:
    """Salts are in it, which are names of tenants."""
    return os.open(path, flags, 0o600)


def _write_section(file: BinaryIO, section: SavedTable | SavedIndex) -> None:
    data = msgspec.msgpack.encode(section)
    file.write(_SECTION.pack(len(data), crc32(data)))
    file.write(data)


def _section(path: Path, data: memoryview, start: int) -> tuple[int, memoryview]:
    """The section that starts there, and where the next one does."""
    if len(data) - start < _SECTION.size:
        raise SnapshotError(f"{path} ends within a section, at byte {start}")
    length, checksum = _SECTION.unpack_from(data, start)
    start += _SECTION.size
    section = data[start : start + length]
    if len(section) != length or crc32(section) != checksum:
        raise SnapshotError(f"{path} is damaged between bytes {start} and {start + length}")
    return start + length, section


def _decoded(path: Path, section: memoryview, kind: type[_Section]) -> _Section:
    try:
        return msgspec.msgpack.decode(section, type=kind)
    except (msgspec.DecodeError, msgspec.ValidationError) as exc:
        raise SnapshotError(f"{path} holds something else than it should: {exc}") from exc
