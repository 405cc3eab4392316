"""A tier that nodes share: asked in one batch by those who wait, believed for a while, in nobody's way."""

import asyncio
from collections.abc import Sequence
from typing import Any

import xxhash

from kvstore.block import HitLength, Medium, Namespace
from kvstore.node.pace import Pace
from kvstore.node.rules import Rules
from tests.scripted import (
    MIB,
    NAMESPACE,
    Call,
    Disk,
    ScriptedTier,
    Stage,
    content,
    in_virtual_time,
    quiet,
)
from tiers.base import Found, Slot, Transfer
from tiers.ledger import ENTRY_BYTES, Ledger

LENGTH = 64 << 10
KEYS = [b"key %d" % number for number in range(8)]
SHARED = Rules(owed=False, timeout_s=2.0)


class Cloud(Disk):
    """What all nodes see: blocks by name, each with a number that is its writer's."""

    def __init__(self, entries: int = 64) -> None:
        super().__init__(entries * ENTRY_BYTES)
        self.entries = entries
        self.blocks: dict[tuple[bytes, bytes], tuple[int, bytes]] = {}

    def tier(self, name: str, medium: Medium) -> "ScriptedCloud":
        return ScriptedCloud(self, name=name, medium=medium)

    def store(self, *keys: bytes, version: int = 0, length: int = LENGTH) -> None:
        """As another node does."""
        for key in keys:
            self.blocks[NAMESPACE.id, key] = next(self.numbers), content(key, length, version)


class ScriptedCloud(ScriptedTier):
    """One node's view of a cloud. `asked` are the questions so far, each the keys of one batch."""

    disk: Cloud

    def __init__(self, disk: Cloud, **options: Any) -> None:
        super().__init__(disk, **options)
        self._ledger = Ledger(disk.entries)
        self.capacity_bytes = self._ledger.capacity_bytes
        self.asked: list[list[bytes]] = []

    async def find(self, blocks: Sequence[tuple[Namespace, bytes]]) -> list[Found | None]:
        self.asked.append([key for _, key in blocks])
        await self._call("find")
        found = [self.disk.blocks.get((namespace.id, key)) for namespace, key in blocks]
        return [None if f is None else Found(len(f[1]), xxhash.xxh3_64_intdigest(f[1]), f[0]) for f in found]

    async def write(self, transfers: Sequence[Transfer]) -> None:
        await self._call("write", transfers)

    def forget(self, records: Sequence[Any]) -> None:
        doomed = set(records)
        self.disk.blocks = {name: b for name, b in self.disk.blocks.items() if b[0] not in doomed}

    def evict(self, records: Sequence[Any]) -> None:
        pass

    async def flush(self, names: Sequence[tuple[bytes, bytes]] = ()) -> None:
        await self._call("flush")
        for name in names:
            self.disk.blocks.pop(name, None)

    def slot_length(self, length: int) -> int:
        return self._ledger.slot_length(length)

    def take(self, length: int, owner: object, within: Slot | None = None) -> Slot | None:
        return self._ledger.take(length, owner, within)

    def free(self, slot: Slot) -> Slot:
        return self._ledger.free(slot)

    @property
    def free_bytes(self) -> int:
        return self._ledger.free_bytes

    def statistics(self) -> Any:
        return super().statistics().__class__(
            self.name, self.medium, self.capacity_bytes, self.capacity_bytes,
            self.capacity_bytes - self.free_bytes, self.free_bytes,
        )  # fmt: skip

    def check(self) -> list[str]:
        return []

    def _recover(self, call: Call) -> list[Transfer]:
        self._identity = self.disk.identity
        self._ledger.clear()
        return []

    def _find(self, _: Call) -> None:
        pass

    def _write(self, transfer: Transfer) -> None:
        assert transfer.memory is not None
        name, data = (transfer.namespace.id, transfer.key), bytes(transfer.memory[: transfer.length])
        number, stands = self.disk.blocks.setdefault(name, (next(self.disk.numbers), data))
        transfer.checksum = xxhash.xxh3_64_intdigest(data)
        transfer.record = number
        transfer.refused = stands != data

    def _put(self, transfers: Sequence[Transfer]) -> None:
        pass

    def _read(self, transfer: Transfer) -> None:
        assert transfer.memory is not None
        number, data = self.disk.blocks.get((transfer.namespace.id, transfer.key), (0, b""))
        if number == transfer.record:
            transfer.memory[: transfer.length] = data
        else:
            transfer.missing = True


def shared(cloud: Cloud, **options: Any) -> Stage:
    return Stage([cloud], SHARED, media=[Medium.REMOTE], **options)


def below_disk(cloud: Cloud, **options: Any) -> Stage:
    """A disk, and below it the cloud."""
    return Stage([Disk(8 * MIB), cloud], [Rules(), SHARED], media=[Medium.NVME, Medium.REMOTE], **options)


def cloud_of(stage: Stage) -> ScriptedCloud:
    tier = stage.tiers[-1]
    assert isinstance(tier, ScriptedCloud)
    return tier


def hits(stage: Stage, *keys: bytes) -> HitLength:
    return stage.store.readers.hit_length(stage.shelves, keys)


@in_virtual_time
async def test_what_another_node_stored_is_asked_for_in_one_batch_and_loaded() -> None:
    cloud = Cloud()
    cloud.store(*KEYS[1:5])
    async with shared(cloud) as stage:
        stage.put(KEYS[0])
        lease = await stage.acquiring(*KEYS)
        assert stage.bytes_of(lease) == [content(key, LENGTH) for key in KEYS[:5]]
        assert cloud_of(stage).asked == [KEYS[1:]]
        stage.release(lease)


@in_virtual_time
async def test_who_does_not_wait_is_told_what_is_known_and_nobody_is_asked() -> None:
    cloud = Cloud()
    cloud.store(*KEYS)
    async with shared(cloud) as stage:
        assert stage.acquire(*KEYS).blocks == []
        assert hits(stage, *KEYS).remote == 0
        assert cloud_of(stage).asked == []
        await stage.store.movements.find([(stage.shelves, key) for key in KEYS], 1.0)
        assert hits(stage, *KEYS) == HitLength(0, 0, 0, len(KEYS))
        assert stage.acquire(*KEYS).blocks == []


@in_virtual_time
async def test_what_is_missing_is_asked_for_again_only_after_a_while() -> None:
    cloud = Cloud()
    async with shared(cloud) as stage:
        assert (await stage.acquiring(KEYS[0])).blocks == []
        cloud.store(KEYS[0])
        assert (await stage.acquiring(KEYS[0])).blocks == []
        assert cloud_of(stage).asked == [[KEYS[0]]]
        await asyncio.sleep(2.1)
        lease = await stage.acquiring(KEYS[0])
        assert stage.bytes_of(lease) == [content(KEYS[0], LENGTH)]
        stage.release(lease)


@in_virtual_time
async def test_those_who_ask_for_the_same_at_once_share_an_answer() -> None:
    cloud = Cloud()
    cloud.store(*KEYS)
    async with shared(cloud) as stage:
        cloud_of(stage).holding = {"find"}
        readers = [stage.acquiring(*KEYS[:4]), stage.acquiring(*KEYS[2:6])]
        await quiet()
        assert cloud_of(stage).asked == [KEYS[:4], KEYS[4:6]]
        cloud_of(stage).release()
        leases = [await reader for reader in readers]
        assert [len(lease.blocks) for lease in leases] == [4, 4]
        for lease in leases:
            stage.release(lease)


@in_virtual_time
async def test_an_answer_that_does_not_come_costs_a_reader_its_time_once_and_no_block_that_is_here() -> None:
    cloud = Cloud()
    async with below_disk(cloud) as stage:
        stage.put(*KEYS[:4])
        await quiet()
        await stage.evict(*KEYS[2:4])
        lease = stage.acquire(*KEYS[:2])
        cloud_of(stage).holding = {"find"}
        loop = asyncio.get_running_loop()
        began = loop.time()
        reader = await stage.acquiring(*KEYS[:6], wait_s=1.0)
        assert (len(reader.blocks), loop.time() - began) == (4, 1.0)
        await asyncio.sleep(1.5)
        assert stage.lowers[1].breaker.open
        began = loop.time()
        again = await stage.acquiring(*KEYS[:6], wait_s=1.0)
        assert (len(again.blocks), loop.time() - began) == (4, 0.0)
        for held in (lease, reader, again):
            stage.release(held)


@in_virtual_time
async def test_a_block_that_is_gone_by_the_time_it_is_loaded_is_a_miss_and_asked_for_anew() -> None:
    cloud = Cloud()
    cloud.store(KEYS[0])
    async with shared(cloud) as stage:
        await stage.store.movements.find([(stage.shelves, KEYS[0])], 1.0)
        cloud.blocks.clear()
        assert (await stage.acquiring(KEYS[0])).blocks == []
        assert hits(stage, KEYS[0]).remote == 0
        assert stage.lower.counters.lost_blocks == 1
        cloud.store(KEYS[0], version=2)
        lease = await stage.acquiring(KEYS[0])
        assert stage.bytes_of(lease) == [content(KEYS[0], LENGTH, 2)]
        stage.release(lease)


@in_virtual_time
async def test_what_is_forgotten_for_others_stays_where_it_is() -> None:
    cloud = Cloud(entries=4)
    cloud.store(*KEYS)
    async with shared(cloud) as stage:
        for keys in (KEYS[:4], KEYS[4:]):
            await stage.store.movements.find([(stage.shelves, key) for key in keys], 1.0)
        assert list(stage.shelves[1].sealed) == KEYS[4:]
        assert len(cloud.blocks) == len(KEYS)
        assert stage.lower.counters.evicted_blocks == 4


@in_virtual_time
async def test_what_is_removed_is_gone_for_all_also_where_this_node_never_knew_it() -> None:
    cloud = Cloud()
    cloud.store(*KEYS)
    async with shared(cloud) as stage:
        assert await stage.remove(*KEYS[:2]) == 0
        assert sorted(key for _, key in cloud.blocks) == KEYS[2:]


@in_virtual_time
async def test_what_was_removed_without_waiting_is_not_found_again_and_what_is_put_again_stays() -> None:
    cloud = Cloud()
    cloud.store(*KEYS[:2])
    async with shared(cloud) as stage:
        _, lasting = stage.store.remove(stage.shelves, KEYS[:2])
        assert lasting is not None
        lasting.close()
        assert (await stage.acquiring(KEYS[0])).blocks == []
        stage.put(KEYS[1])
        await asyncio.sleep(3.0)
        assert [key for _, key in cloud.blocks] == [KEYS[1]]
        assert hits(stage, KEYS[1]).remote == 1


@in_virtual_time
async def test_a_slow_cloud_holds_no_writer_back_and_what_leaves_before_is_counted() -> None:
    async with shared(Cloud(), arena_bytes=2 * MIB) as stage:
        stage.tier.holding = {"write"}
        for number in range(64):
            stage.put(b"block %d" % number)
        await quiet()
        stage.tier.holding = set()
        stage.tier.release()
        await quiet()
        counters = stage.lower.counters
        assert counters.dropped_blocks > 0
        assert counters.written_blocks + counters.dropped_blocks == 64


@in_virtual_time
async def test_blocks_go_to_the_disk_and_to_the_cloud_and_one_that_hangs_does_not_stop_the_other() -> None:
    cloud = Cloud()
    async with below_disk(cloud) as stage:
        cloud_of(stage).holding = {"write"}
        stage.put(*KEYS)
        await quiet()
        assert all(stage.is_below(key) for key in KEYS)
        cloud_of(stage).holding = set()
        cloud_of(stage).release()
        await quiet()
        assert sorted(key for _, key in cloud.blocks) == KEYS


@in_virtual_time
async def test_anothers_block_of_the_same_name_stands_and_this_node_keeps_its_own_to_itself() -> None:
    cloud = Cloud()
    cloud.store(KEYS[0], version=1)
    async with shared(cloud) as stage:
        stage.put(KEYS[0], version=2)
        await quiet()
        assert stage.lower.counters.refused_blocks == 1
        assert hits(stage, KEYS[0]) == HitLength(0, 1, 1, 1)
        assert not stage.is_below(KEYS[0])
        assert cloud.blocks[NAMESPACE.id, KEYS[0]][1] == content(KEYS[0], LENGTH, 1)
        lease = stage.acquire(KEYS[0])
        assert stage.bytes_of(lease) == [content(KEYS[0], LENGTH, 2)]
        stage.release(lease)


@in_virtual_time
async def test_a_block_is_loaded_from_where_it_is_expected_first() -> None:
    async with below_disk(Cloud()) as stage:
        stage.put(*KEYS[:2])
        await quiet()
        await stage.evict(*KEYS[:2])
        disk, cloud = stage.lowers
        for slow, fast in ((cloud, disk), (disk, cloud)):
            for lower, speed in ((slow, 1e6), (fast, 1e9)):
                for _ in range(100):
                    lower.pace.observe(int(speed), 1.0, 1)
            before = fast.counters.hit_blocks
            key = KEYS[fast is cloud]
            lease = await stage.acquiring(key)
            assert stage.bytes_of(lease) == [content(key, LENGTH)]
            assert fast.counters.hit_blocks == before + 1
            stage.release(lease)


@in_virtual_time
async def test_loads_of_a_tier_that_hangs_take_no_room_from_those_of_another() -> None:
    cloud = Cloud()
    cloud.store(*KEYS, length=MIB // 2)
    async with below_disk(cloud, arena_bytes=4 * MIB) as stage:
        stage.put(b"mine")
        await quiet()
        await stage.evict(b"mine")
        await stage.store.movements.find([(stage.shelves, key) for key in KEYS], 1.0)
        stage.lowers[1].pace = Pace(1e12)
        stage.lowers[0].pace = Pace(1.0)
        cloud_of(stage).holding = {"read"}
        hanging = stage.acquiring(*KEYS, wait_s=1.0)
        await quiet()
        stage.lowers[1].pace = Pace(1.0)
        lease = await stage.acquiring(b"mine", wait_s=0.5)
        assert stage.bytes_of(lease) == [content(b"mine", LENGTH)]
        stage.release(lease)
        assert (await hanging).blocks == []


def test_a_pace_follows_what_is_measured_and_hopes_for_what_is_passed_over() -> None:
    pace = Pace(1000.0)
    for _ in range(100):
        pace.observe(100, 1.0, 2)
    assert 199 < pace.bytes_per_s < 220
    assert pace.expected_s(400) == 400 / pace.bytes_per_s
    for _ in range(200):
        pace.passed_over()
    assert pace.bytes_per_s == 1000.0
    for _ in range(100):
        pace.observe(5000, 1.0, 1)
    for _ in range(10):
        pace.passed_over()
    assert pace.bytes_per_s > 4000
