"""`kvstore check`: every checksum of a live node and of a stopped one."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore import protocol
from kvstore.block import Namespace
from kvstore.errors import InvalidRequest
from tests.node import Node, RawConnection, wait_for
from tests.test_cli import Command

NS = Namespace(model="checked")
BLOCKS = 40
BLOCK_BYTES = 1 << 20
DATA_START = 4096  # of the data file, after its superblock


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "disk"


@pytest.fixture
def node(folder: Path) -> Iterator[Node]:
    """A daemon whose disk has all blocks, and whose DRAM has room for some."""
    with Node("16MiB", "--nvme", f"{folder}:64MiB") as node:
        with node.client() as store:
            for number in range(BLOCKS):
                store.put(NS, key(number), bytes([number + 1]) * BLOCK_BYTES)
            wait_for(lambda: store.statistics().tiers[1].blocks == BLOCKS)
        yield node
        assert "Traceback" not in node.log, node.log


def key(number: int) -> bytes:
    return b"block %d" % number


def damage(folder: Path, number: int) -> None:
    """Flip one bit of a block on disk, wherever it lies."""
    data = (folder / "blocks").read_bytes()
    start = data.index(bytes([number + 1]) * BLOCK_BYTES, DATA_START)
    with (folder / "blocks").open("r+b") as file:
        file.seek(start + BLOCK_BYTES // 2)
        file.write(bytes([(number + 1) ^ 1]))


def test_a_whole_disk_is_well(node: Node) -> None:
    assert Command("check", "--address", node.address).text == "all is well\n"


def test_a_damaged_block_is_named_and_dropped(node: Node, folder: Path) -> None:
    damage(folder, 3)
    command = Command("check", "--address", node.address)
    assert command.status == 1
    assert command.output.decode() == f"nvme: {NS} {key(3).hex()} is damaged; it was dropped\n"
    assert Command("check", "--address", node.address).text == "all is well\n"
    with node.client() as store:
        tier = store.statistics().tiers[1]
        assert tier.counters.damaged_blocks == 1
        assert tier.blocks == BLOCKS - 1
    statistics = json.loads(Command("stats", "--json", "--address", node.address).text)
    assert statistics["tiers"][1]["counters"]["damaged_blocks"] == 1


def test_what_dram_has_as_well_is_not_lost_with_the_copy_on_disk(node: Node, folder: Path) -> None:
    with node.client() as store:
        assert store.get(NS, key(5)) == bytes([6]) * BLOCK_BYTES
        damage(folder, 5)
        assert Command("check", "--address", node.address).status == 1
        with store.acquire(NS, [key(5)]) as read:
            assert bytes(read.views[0]) == bytes([6]) * BLOCK_BYTES


def test_a_stopped_node_is_checked_too_and_left_as_it_is(node: Node, folder: Path) -> None:
    assert node.stop() == 0
    assert Command("check", "--nvme", str(folder)).text == "all is well\n"
    damage(folder, 7)
    for _ in range(2):
        command = Command("check", "--nvme", str(folder))
        assert command.status == 1
        assert f"{key(7).hex()} is damaged" in command.output.decode()
    node.start()
    with node.client() as store:
        assert store.get(NS, key(7)) is None
        assert all(store.get(NS, key(n)) == bytes([n + 1]) * BLOCK_BYTES for n in range(BLOCKS) if n != 7)


def test_a_directory_in_use_or_of_something_else_is_not_checked(node: Node, folder: Path) -> None:
    assert f"is used by process {node.pid}" in Command("check", "--nvme", str(folder)).failure
    assert "holds no tier" in Command("check", "--nvme", str(folder.parent)).failure
    assert "holds no tier" in Command("check", "--nvme", "/nowhere").failure
    (folder.parent / "blocks").write_bytes(os.urandom(8192))
    assert "holds no tier" in Command("check", "--nvme", str(folder.parent)).failure


def test_statistics_show_every_tier(node: Node) -> None:
    text = Command("stats", "--address", node.address).text
    assert "tier dram" in text
    assert "tier nvme" in text
    assert "writes_mean_s" in text


def test_verifying_begins_at_the_start_and_ends(node: Node) -> None:
    with node.client() as store:
        seen, after = 0, None
        while after != 0:
            answer = store.verify(1, after or 0)
            seen, after = seen + answer.blocks, answer.after
            assert answer.damaged == []
        assert seen == BLOCKS
        for tier in (0, 2, -1, 1 << 40):
            with pytest.raises(InvalidRequest, match="has no checksums; those of 1 to 1 have"):
                store.verify(tier)
    with RawConnection(node.socket) as raw:
        for after in (1, -1):
            failure = raw.ask(protocol.Verify(1, after))
            assert isinstance(failure, protocol.Failure)
            assert "begin after 0" in failure.text


def test_blocks_that_leave_while_a_client_verifies_are_passed_over(node: Node) -> None:
    with node.client() as store:
        first = store.verify(1)
        store.remove(NS, [key(number) for number in range(BLOCKS)])
        assert first.after
        after = first.after
        while after:
            answer = store.verify(1, after)
            assert answer.damaged == []
            after = answer.after


def test_a_page_beyond_the_end_is_empty(node: Node, folder: Path) -> None:
    with node.client() as store:
        store.verify(1)
        answer = store.verify(1, (1 << 63) - 1)
        assert (answer.blocks, answer.after) == (0, 0)
