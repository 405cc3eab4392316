"""The DRAM tier: memory that is populated, shared, protected, and on huge pages where there are any."""

import fcntl
import logging
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.block import Namespace
from kvstore.errors import ConfigError
from kvstore.memory import HUGE_PAGE_BYTES, Mapping, backed_bytes
from tests.node import Node
from tests.test_client import MIB, fill, keys, pattern
from tiers import dram
from tiers.base import SlotTier
from tiers.dram import DramTier

RESERVED = Path("/proc/sys/vm/nr_hugepages")


@pytest.fixture
def tier() -> Iterator[DramTier]:
    made = DramTier(8 * MIB)
    yield made
    made.close()


@pytest.fixture
def reserved_pages() -> Iterator[int]:
    """48 huge pages of the system, or as many as it gives; what was set before is set again after."""
    before = RESERVED.read_text()
    try:
        RESERVED.write_text(str(int(before) + 48))
    except OSError:
        yield 0
        return
    try:
        yield int(RESERVED.read_text()) - int(before)
    finally:
        RESERVED.write_text(before)


def populated(tier: DramTier) -> list[int]:
    """Populate it and give it all out; the steps in which that went."""
    steps: list[int] = []
    tier.populate(steps.append)
    for step in steps:
        tier.grow(step)
    return steps


def test_it_keeps_the_contract_of_slot_tiers(tier: DramTier) -> None:
    checked: SlotTier = tier
    assert (checked.name, checked.medium.value, checked.arena) == ("dram", "dram", 0)
    assert checked.capacity_bytes == 8 * MIB


def test_nothing_is_given_out_before_it_is_populated() -> None:
    tier = DramTier(80 * MIB)
    with os.fdopen(tier.open(writable=False)) as file:
        assert tier.take(1, "early") is None
        assert backed_bytes(file.fileno()) == 0
        assert populated(tier) == list(range(4 * MIB, 81 * MIB, 4 * MIB))
        assert backed_bytes(file.fileno()) == 80 * MIB
    statistics = tier.statistics()
    assert (statistics.ready_bytes, statistics.used_bytes) == (80 * MIB, 0)
    assert statistics.largest_free_bytes == 80 * MIB
    assert tier.check() == []
    tier.close()


def test_populating_ends_early_when_the_tier_is_closed(tier: DramTier) -> None:
    other = DramTier(4 * MIB)
    other.close()
    assert populated(other) == []


def test_slots_are_whole_pages_and_hold_what_is_written(tier: DramTier) -> None:
    populated(tier)
    one, two = tier.take(5000, "one"), tier.take(1, "two")
    assert one is not None
    assert two is not None
    assert (one.length, two.length) == (tier.slot_length(5000), tier.slot_length(1)) == (8192, 4096)
    tier.view(one)[:] = b"1" * 8192
    tier.view(two)[:] = b"2" * 4096
    other = tier.take(8192, "other")
    assert other is not None
    tier.move(one, other)
    assert tier.view(other) == b"1" * 8192
    tier.poison(one)
    assert tier.view(one) == b"\xdb" * 8192
    assert tier.view(two) == b"2" * 4096
    assert tier.statistics().used_bytes == 8192 + 4096 + 8192
    for slot in (one, two, other):
        tier.free(slot)
    assert (tier.free_bytes, tier.largest(9)[0].length) == (8 * MIB, 8 * MIB)
    assert tier.check() == []


def test_all_who_map_it_see_the_same_bytes(tier: DramTier) -> None:
    populated(tier)
    slot = tier.take(4096, "shared")
    assert slot is not None
    fds = [tier.open(writable=True), tier.open(writable=False)]
    writer, reader = (Mapping(fd, 8 * MIB, writable=fd == fds[0]) for fd in fds)
    for fd in fds:
        os.close(fd)
    writer.view[slot.offset : slot.offset + 3] = b"abc"
    assert bytes(tier.view(slot)[:3]) == bytes(reader.view[slot.offset : slot.offset + 3]) == b"abc"
    with pytest.raises(TypeError, match="read-only"):
        reader.view[slot.offset] = 1


def test_a_read_only_descriptor_cannot_be_mapped_for_writing(tier: DramTier) -> None:
    fd = tier.open(writable=False)
    try:
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        with pytest.raises(OSError, match="cannot map"):
            Mapping(fd, 8 * MIB, writable=True)
        with pytest.raises(PermissionError):
            mmap.mmap(fd, 8 * MIB, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        with pytest.raises(OSError):
            os.pwrite(fd, b"x", 0)
        with pytest.raises(OSError):
            os.ftruncate(fd, 0)
    finally:
        os.close(fd)


def test_descriptors_are_closed_on_exec(tier: DramTier) -> None:
    for writable in (True, False):
        fd = tier.open(writable=writable)
        assert not os.get_inheritable(fd)
        os.close(fd)


def test_the_memory_outlives_the_tier_for_those_who_map_it() -> None:
    tier = DramTier(2 * MIB)
    populated(tier)
    slot = tier.take(4096, "kept")
    assert slot is not None
    tier.view(slot)[:4] = b"kept"
    fd = tier.open(writable=False)
    mapping = Mapping(fd, 2 * MIB, writable=False)
    os.close(fd)
    tier.close()
    del tier
    assert bytes(mapping.view[slot.offset : slot.offset + 4]) == b"kept"


def test_a_capacity_below_one_huge_page_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"dram capacity is 2097151 bytes; the least is 2097152"):
        DramTier(HUGE_PAGE_BYTES - 1)


def test_a_capacity_beyond_the_memory_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"dram capacity is \d+ bytes, \d+ are available; lower it"):
        DramTier(1 << 50)


def test_a_capacity_is_rounded_down_to_whole_huge_pages() -> None:
    tier = DramTier(3 * HUGE_PAGE_BYTES - 1)
    assert tier.capacity_bytes == 2 * HUGE_PAGE_BYTES
    tier.close()


def test_without_huge_pages_it_says_what_that_costs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    setting = tmp_path / "shmem_enabled"
    setting.write_text("always within_size advise [never] deny force\n")
    monkeypatch.setattr(dram, "_SHMEM_HUGE_PAGES", setting)
    monkeypatch.setattr(dram, "_RESERVED_HUGE_PAGES", tmp_path / "none")
    monkeypatch.setattr(dram, "MADV_COLLAPSE", 9999)  # as a kernel that does not know it
    tier = DramTier(4 * MIB)
    assert tier.pages == "small"
    assert populated(tier) == [4 * MIB]
    assert tier.pages == "refused"
    assert "8 KiB of page tables" in caplog.text
    assert "vm.nr_hugepages=2)" in caplog.text
    tier.close()


def test_small_pages_are_collapsed_into_huge_ones_or_it_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(dram, "_RESERVED_HUGE_PAGES", tmp_path / "none")
    tier = DramTier(8 * MIB)
    assert populated(tier)[-1] == 8 * MIB
    assert ("4 KiB pages" in caplog.text) == (tier.pages == "refused")
    tier.close()


def test_where_transparent_huge_pages_are_allowed_it_says_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    setting = tmp_path / "shmem_enabled"
    setting.write_text("always within_size [advise] never deny force\n")
    monkeypatch.setattr(dram, "_SHMEM_HUGE_PAGES", setting)
    monkeypatch.setattr(dram, "_RESERVED_HUGE_PAGES", tmp_path / "none")
    tier = DramTier(4 * MIB)
    assert (tier.pages, caplog.text) == ("transparent", "")
    assert populated(tier) == [4 * MIB]
    tier.close()


def test_reserved_huge_pages_are_used_where_they_are_there(
    reserved_pages: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    tier = DramTier(8 * MIB)
    expected = "reserved" if reserved_pages >= 4 else "other"
    assert (tier.pages if tier.pages == "reserved" else "other") == expected
    assert populated(tier)[-1] == 8 * MIB
    assert ("4 KiB pages" in caplog.text) == (tier.pages == "refused")
    slot = tier.take(5000, "block")
    assert slot is not None
    tier.view(slot)[:] = b"h" * slot.length
    fd = tier.open(writable=False)
    mapping = Mapping(fd, 8 * MIB, writable=False)
    assert backed_bytes(fd) == 8 * MIB
    os.close(fd)
    assert mapping.view[slot.offset : slot.offset + slot.length] == b"h" * slot.length
    del mapping
    tier.close()


def test_clients_map_and_read_an_arena_of_reserved_huge_pages(reserved_pages: int) -> None:
    namespace = Namespace(model="huge")
    with Node("64MiB") as node, node.client() as store:
        fill(store, namespace, keys(16), MIB)
        with store.acquire(namespace, keys(16)) as read:
            assert [bytes(view) for view in read.views] == [pattern(key, MIB) for key in keys(16)]
        if reserved_pages >= 32:
            smaps = Path(f"/proc/{node.pid}/smaps").read_text()
            assert "KernelPageSize:     2048 kB" in smaps
        node.check()


def test_fewer_reserved_huge_pages_than_the_arena_needs_are_left_alone(reserved_pages: int) -> None:
    tier = DramTier(512 * MIB)
    assert tier.pages != "reserved"
    tier.close()
