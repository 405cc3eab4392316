"""Records of blocks: found again after any end, never two for one place, never one that was forgotten."""

import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore.block import Namespace
from tests.test_storage_contract import KIB, MIB, NAMESPACE
from tiers.base import Slot, Transfer
from tiers.namespaces import Namespaces
from tiers.table import RECORD_BYTES, Entry, Found, Table
from tiers.volume import FORMAT, Head

HEAD = Head(FORMAT, bytes(range(16)), 16 * MIB)
Load = Callable[..., tuple[Table, Found]]


@pytest.fixture
def table(tmp_path: Path) -> Iterator[Table]:
    namespaces = Namespaces(tmp_path / "namespaces")
    table = Table(tmp_path / "table", namespaces)
    assert table.begin(HEAD) == 0
    yield table
    assert table.check() == []
    table.close()
    namespaces.close()


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Load]:
    """Another table of the same files."""
    opened: list[Table | Namespaces] = []

    def load(head: Head = HEAD, forgotten: frozenset[int] = frozenset()) -> tuple[Table, Found]:
        namespaces = Namespaces(tmp_path / "namespaces")
        table = Table(tmp_path / "table", namespaces)
        opened.extend((table, namespaces))
        return table, table.load(head, forgotten)

    yield load
    for file in opened:
        file.close()


def put(
    table: Table, key: bytes, offset: int, length: int = 4096, namespace: Namespace = NAMESPACE
) -> Transfer:
    transfer = Transfer(namespace, key, length, slot=Slot(offset, length), checksum=hash(key) & 0xFFFF)
    transfer.record = table.take()
    table.put([transfer])
    return transfer


def keys(found: Found) -> list[bytes]:
    return [entry.key for entry in found.entries]


def record(path: Path, number: int) -> bytes:
    return path.read_bytes()[(number + 1) * RECORD_BYTES :][:RECORD_BYTES]


@given(st.binary(min_size=1, max_size=64), st.integers(1, 4 * MIB), st.integers(0, (1 << 64) - 1))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_record_holds_what_was_put(table: Table, key: bytes, length: int, checksum: int) -> None:
    table.begin(HEAD)
    transfer = Transfer(NAMESPACE, key, length, slot=Slot(8192, length), checksum=checksum)
    transfer.record = table.take()
    table.put([transfer])
    assert table.load(HEAD).entries == [Entry(0, NAMESPACE, key, 8192, length, checksum, 1)]


def test_entries_come_by_offset_with_sequences_that_tell_their_age(table: Table, load: Load) -> None:
    for offset in (3, 1, 2):
        put(table, b"%d" % offset, offset * 4096)
    again, found = load()
    assert [(entry.key, entry.sequence) for entry in found.entries] == [(b"1", 2), (b"2", 3), (b"3", 1)]
    put(again, b"later", 4 * 4096)
    assert [entry.sequence for entry in load()[1].entries] == [2, 3, 1, 4]


def test_numbers_are_used_again_once_forgotten(table: Table, tmp_path: Path) -> None:
    stored = [put(table, b"%d" % number, number * 4096) for number in range(3)]
    assert [transfer.record for transfer in stored] == [0, 1, 2]
    table.forget([1, None, 1])
    assert table.stale == {1}
    assert record(tmp_path / "table", 1) != bytes(RECORD_BYTES)
    table.clear_forgotten()
    assert table.stale == frozenset()
    assert record(tmp_path / "table", 1) == bytes(RECORD_BYTES)
    assert [table.take(), table.take()] == [1, 3]


def test_what_is_dropped_is_not_put(table: Table, load: Load) -> None:
    transfer = Transfer(NAMESPACE, b"dropped", 1, slot=Slot(0, 4096), checksum=1, record=table.take())
    transfer.dropped = True
    table.forget([transfer.record])
    other = put(table, b"other", 0)
    assert other.record == transfer.record
    table.put([transfer])
    assert keys(load()[1]) == [b"other"]


def test_forgotten_numbers_that_were_never_put_cost_nothing(table: Table, tmp_path: Path) -> None:
    numbers = [table.take() for _ in range(1000)]
    table.forget(numbers)
    table.flush()
    assert (tmp_path / "table").stat().st_size == RECORD_BYTES


def test_what_was_forgotten_before_it_was_opened_again_is_cleared(table: Table, load: Load) -> None:
    for number in range(4):
        put(table, b"%d" % number, number * 4096)
    table.forget([1, 3])
    assert keys(load(forgotten=table.stale)[1]) == [b"0", b"2"]
    assert keys(load()[1]) == [b"0", b"2"]


@pytest.mark.parametrize(("early", "late"), [(0, 4096), (4096, 0), (4096, 4096)])
def test_of_two_that_overlap_the_later_stays(table: Table, load: Load, early: int, late: int) -> None:
    put(table, b"early", early, 8192)
    put(table, b"late", late, 8192)
    found = load()[1]
    assert (keys(found), found.damaged) == ([b"late"], 1)
    assert keys(load()[1]) == [b"late"]


def test_a_late_one_clears_all_that_it_overlaps(table: Table, load: Load) -> None:
    for number in range(6):
        put(table, b"%d" % number, number * 4096)
    put(table, b"wide", 4096, 3 * 4096)
    again, found = load()
    assert keys(found) == [b"0", b"wide", b"4", b"5"]
    assert found.damaged == 3
    assert again.check() == []
    assert load()[1].damaged == 0


def test_of_two_of_one_block_the_later_stays(table: Table, load: Load) -> None:
    put(table, b"same", 0)
    put(table, b"same", 8192)
    put(table, b"same", 4096, namespace=Namespace("other"))
    assert [(entry.offset, entry.namespace.model) for entry in load()[1].entries] == [
        (4096, "other"), (8192, "stored")
    ]  # fmt: skip


def test_what_lies_beyond_the_capacity_is_cleared(table: Table, load: Load) -> None:
    for number in range(4):
        put(table, b"%d" % number, number * MIB, MIB)
    found = load(Head(FORMAT, HEAD.identity, 3 * MIB - 1))[1]
    assert (keys(found), found.beyond_capacity, found.damaged) == ([b"0", b"1"], 2, 0)
    assert keys(load()[1]) == [b"0", b"1"]


def test_records_of_another_table_are_foreign(table: Table, load: Load) -> None:
    for number in range(4):
        put(table, b"%d" % number, number * 4096)
    assert load(Head(FORMAT, bytes(16), 16 * MIB))[1] == Found([], damaged=4)


def test_a_record_of_a_later_version_is_left_alone_and_so_is_its_number(
    table: Table, load: Load, tmp_path: Path
) -> None:
    for number in range(3):
        put(table, b"%d" % number, number * 4096)
    packed = struct.pack("<H", 2) + record(tmp_path / "table", 1)[2:-8]
    seed = int.from_bytes(HEAD.identity[:8], "little")
    later = packed + struct.pack("<Q", xxhash.xxh3_64_intdigest(packed, seed))
    with (tmp_path / "table").open("r+b") as file:
        file.seek(2 * RECORD_BYTES)
        file.write(later)
    again, found = load()
    assert (keys(found), found.newer, found.damaged) == ([b"0", b"2"], 1, 0)
    again.forget([0, 2])
    again.flush()
    assert {again.take() for _ in range(4)} == {0, 2, 3, 4}
    assert again.check() == []
    assert record(tmp_path / "table", 1) == later
    # One of ours that is as whole and still makes no sense is damaged.
    packed = struct.pack("<HB", 1, 65) + packed[3:]
    with (tmp_path / "table").open("r+b") as file:
        file.seek(2 * RECORD_BYTES)
        file.write(packed + struct.pack("<Q", xxhash.xxh3_64_intdigest(packed, seed)))
    assert load()[1].damaged == 1


def test_beginning_anew_says_how_many_records_there_were(table: Table) -> None:
    for number in range(4):
        put(table, b"%d" % number, number * 4096)
    table.forget([2])
    table.flush()
    assert table.begin(Head(FORMAT, bytes(16), MIB)) == 3
    assert table.begin(HEAD) == 0


def test_a_large_table_with_few_records_is_read_as_it_is(table: Table, load: Load, tmp_path: Path) -> None:
    stored = [put(table, b"%d" % number, number * 4096) for number in range(2)]
    number = 40 * MIB // RECORD_BYTES
    os.truncate(tmp_path / "table", 40 * MIB)
    last = table.load(HEAD)
    assert [entry.number for entry in last.entries] == [transfer.record for transfer in stored]
    # A number beyond what is read in one piece.
    while (taken := table.take()) != number - 2:
        assert taken < number
    transfer = Transfer(NAMESPACE, b"far", 1, slot=Slot(8 * KIB, 4096), checksum=1, record=taken)
    table.put([transfer])
    assert [entry.number for entry in load()[1].entries] == [0, 1, number - 2]


def test_check_finds_what_is_wrong(load: Load, table: Table) -> None:
    put(table, b"one", 0)
    again, _ = load()
    again._free.append(0)
    assert again.check() == ["a number of a record is there twice", "1 free and 1 used of 1 records"]
