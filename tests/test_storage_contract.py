"""What every storage tier keeps: bytes that come back whole or not at all, however the last owner ended."""

import asyncio
import hashlib
import mmap
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvstore.block import Namespace
from kvstore.errors import ConfigError, TierError
from tests.redis_servers import Server
from tiers.base import Slot, StorageTier, Transfer
from tiers.ledger import ENTRY_BYTES
from tiers.nvme import NvmeTier
from tiers.redis import RedisPlace, RedisServers, RedisTier

KIB, MIB = 1 << 10, 1 << 20
CAPACITY_BYTES = 32 * MIB
LENGTHS = (1, 4095, 4096, 4097, 64 * KIB, 2 * MIB + 3)
NAMESPACE = Namespace(model="stored")

# Where the server listens that the Redis tier's tests share with the processes they start.
REDIS_URL = "KVSTORE_TEST_REDIS"


class KnowingRedisTier(RedisTier):
    """The Redis tier as a tier of one node: it finds what is under its prefix, as if it were its own."""

    async def recover(self) -> list[Transfer]:
        await super().recover()
        await self.flush()
        client: Any = self._servers.client
        names = list(client.scan_iter(f"{self._blocks._names.prefix}:{{*}}"))
        keys = [bytes.fromhex(name.decode().split(":")[-1][:-1]) for name in names]
        found = await self.find([(NAMESPACE, key) for key in keys])
        return [
            Transfer(
                NAMESPACE, key, there.length,
                slot=self.take(there.length, key) or pytest.fail("no room"),
                checksum=there.checksum, record=there.record,
            )
            for key, there in zip(keys, found, strict=True) if there is not None
        ]  # fmt: skip


def redis_tier(folder: Path, capacity_bytes: int) -> KnowingRedisTier:
    """A tier with the names of one folder, on the server of all of them."""
    prefix = f"contract-{hashlib.sha256(bytes(folder)).hexdigest()[:16]}"
    servers = RedisServers(RedisPlace(os.environ[REDIS_URL]))
    return KnowingRedisTier(servers, prefix=prefix, known_blocks=capacity_bytes // ENTRY_BYTES)


# A later tier is one line.
TIERS: dict[str, Callable[[Path, int], StorageTier]] = {
    "nvme": NvmeTier,
    "redis": redis_tier,
}
# What only a tier keeps that has a place and a space of its own.
OWNED = ("nvme",)


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    with Server() as redis, pytest.MonkeyPatch.context() as environ:
        environ.setenv(REDIS_URL, redis.unix_url)
        yield


@pytest.fixture(params=TIERS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=OWNED)
def owned(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def pattern(key: bytes, length: int) -> bytes:
    return random.Random(key).randbytes(length)


def pages(length: int) -> memoryview:
    return memoryview(mmap.mmap(-1, -(-length // mmap.PAGESIZE) * mmap.PAGESIZE))


def block(tier: StorageTier, key: bytes, length: int, namespace: Namespace = NAMESPACE) -> Transfer:
    """A block to be written, in a slot of its own."""
    slot = tier.take(length, key)
    assert slot is not None
    memory = pages(length)
    memory[:length] = pattern(key, length)
    return Transfer(namespace, key, length, slot=slot, memory=memory)


def blocks(tier: StorageTier, lengths: Sequence[int], prefix: str = "") -> list[Transfer]:
    return [block(tier, f"{prefix}{number}".encode(), length) for number, length in enumerate(lengths)]


async def read(tier: StorageTier, stored: Sequence[Transfer]) -> list[bytes | None]:
    """The bytes of blocks, None for a damaged one, by way of memory that held something else."""
    transfers = []
    for transfer in stored:
        memory = pages(transfer.length)
        memory[:] = b"\xee" * len(memory)
        transfers.append(
            Transfer(
                transfer.namespace, transfer.key, transfer.length,
                slot=transfer.slot, memory=memory, checksum=transfer.checksum, record=transfer.record,
            )
        )  # fmt: skip
    await tier.read(transfers)
    return [
        None if not t.arrived or t.memory is None else bytes(t.memory[: t.length]) for t in transfers
    ]  # fmt: skip


def expected(stored: Sequence[Transfer]) -> list[bytes | None]:
    return [pattern(transfer.key, transfer.length) for transfer in stored]


async def recovered(tier: StorageTier) -> list[Transfer]:
    """What the tier finds once everything before has let go of its place."""
    deadline = time.monotonic() + 20
    while True:
        try:
            return await tier.recover()
        except (ConfigError, TierError):
            assert time.monotonic() < deadline
            await asyncio.sleep(0)


async def opened(
    kind: str, folder: Path, capacity_bytes: int = CAPACITY_BYTES
) -> tuple[StorageTier, list[Transfer]]:
    tier = TIERS[kind](folder, capacity_bytes)
    return tier, await recovered(tier)


async def drop(tier: StorageTier, transfers: Sequence[Transfer]) -> None:
    """Let go of blocks, as the store does."""
    tier.forget([transfer.record for transfer in transfers])
    for transfer in transfers:
        tier.free(transfer.slot)


def killed(kind: str, folder: Path, scene: str) -> None:
    """Play a scene (below) in a process of its own that kills itself at its end."""
    done = subprocess.run([sys.executable, "-m", __name__, kind, str(folder), scene], check=False)
    assert done.returncode == -signal.SIGKILL


async def play(kind: str, folder: Path, scene: str) -> None:
    tier, _ = await opened(kind, folder)
    stored = blocks(tier, LENGTHS)
    await tier.write(stored)
    if scene == "forget":
        await drop(tier, stored[::2])
        await tier.flush()
    elif scene == "overwrite":
        await drop(tier, stored[::2])
        await tier.write(blocks(tier, LENGTHS[::2], "new"))
    elif scene == "amid":
        # Killed while these go to the disk.
        writing = [
            asyncio.ensure_future(tier.write(blocks(tier, [256 * KIB] * 4, f"{n}-"))) for n in range(16)
        ]
        await writing[1]
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_is_written_is_read_back_bit_for_bit(kind: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        tier, found = await opened(kind, tmp_path)
        assert found == []
        stored = blocks(tier, LENGTHS)
        await tier.write(stored)
        assert all(transfer.checksum is not None and transfer.record is not None for transfer in stored)
        assert await read(tier, stored) == expected(stored)
        assert await read(tier, stored[::-1]) == expected(stored)[::-1]
        await tier.probe()
        assert await tier.same()
        assert tier.check() == []
        tier.close()

    asyncio.run(scenario())


def test_a_checksum_that_is_known_is_kept(kind: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        tier, _ = await opened(kind, tmp_path)
        one, two = stored = blocks(tier, [5000, 5000])
        await tier.write([one])
        checksum = two.checksum = (one.checksum or 0) ^ 1
        await tier.write([two])
        assert two.checksum == checksum
        # It is not that of the bytes, so they count as damaged; the others of the same call do not.
        assert await read(tier, stored) == [pattern(one.key, 5000), None]
        tier.close()

    asyncio.run(scenario())


def test_after_a_restart_all_blocks_are_there_oldest_first(owned: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        tier, _ = await opened(owned, tmp_path)
        stored = blocks(tier, LENGTHS)
        for transfer in stored[::-1]:
            await tier.write([transfer])
        tier.close()
        again, found = await opened(owned, tmp_path)
        assert [(t.namespace, t.key, t.length, t.slot.offset, t.checksum) for t in found] == [
            (NAMESPACE, t.key, t.length, t.slot.offset, t.checksum) for t in stored[::-1]
        ]
        assert all(transfer.slot.owner is not None for transfer in found)
        assert await read(again, found) == expected(found)
        assert again.statistics().used_bytes == sum(transfer.slot.length for transfer in found)
        assert again.check() == []
        # What comes later is younger than all of that.
        await again.write(later := blocks(again, [1], "later"))
        again.close()
        last, found = await opened(owned, tmp_path)
        assert [transfer.key for transfer in found] == [t.key for t in stored[::-1]] + [later[0].key]
        last.close()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("scene", "keys"),
    [
        ("write", {b"0", b"1", b"2", b"3", b"4", b"5"}),
        ("forget", {b"1", b"3", b"5"}),
        ("overwrite", {b"1", b"3", b"5", b"new0", b"new1", b"new2"}),
    ],
)
def test_what_was_stored_when_it_was_killed_is_there(
    kind: str, tmp_path: Path, scene: str, keys: set[bytes]
) -> None:
    async def scenario() -> None:
        tier, found = await opened(kind, tmp_path)
        assert {transfer.key for transfer in found} == keys
        assert await read(tier, found) == expected(found)
        assert tier.check() == []
        tier.close()

    killed(kind, tmp_path, scene)
    asyncio.run(scenario())


def test_a_tier_killed_amid_writing_has_whole_blocks_only(kind: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        tier, found = await opened(kind, tmp_path)
        assert {transfer.key for transfer in found} >= {b"0", b"1", b"2", b"3", b"4", b"5", b"1-0", b"1-3"}
        assert await read(tier, found) == expected(found)
        tier.close()

    killed(kind, tmp_path, "amid")
    asyncio.run(scenario())


def test_a_block_dropped_while_it_is_written_does_not_come_back(kind: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        tier, _ = await opened(kind, tmp_path)
        chance = random.Random(7)
        kept: dict[bytes, Transfer] = {}

        async def one(number: int) -> None:
            stored = blocks(tier, [chance.choice((1, 5000, 100_000)) for _ in range(4)], f"{number}-")
            writing = asyncio.ensure_future(tier.write(stored))
            await asyncio.sleep(0)
            # The thread writes meanwhile: let it be anywhere.
            until = time.perf_counter() + chance.choice((0, 1e-4, 5e-4, 1e-3)) * chance.random()
            while time.perf_counter() < until:
                pass
            dropped = chance.sample(stored, 2)
            for transfer in dropped:
                transfer.dropped = True
                tier.forget([transfer.record])
            await asyncio.sleep(0)
            await writing
            for transfer in dropped:
                tier.free(transfer.slot)
            kept.update((t.key, t) for t in stored if not t.dropped)
            if len(kept) > 80:
                await drop(tier, [kept.pop(key) for key in chance.sample(sorted(kept), 40)])

        for number in range(0, 600, 3):
            await asyncio.gather(one(number), one(number + 1), one(number + 2))
            assert tier.check() == []
        await tier.flush()
        assert await read(tier, list(kept.values())) == expected(list(kept.values()))
        tier.close()
        again, found = await opened(kind, tmp_path)
        assert {transfer.key for transfer in found} == set(kept)
        assert await read(again, found) == expected(found)
        again.close()

    asyncio.run(scenario())


def test_a_write_that_nobody_waits_for_any_more_goes_on(kind: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        tier, _ = await opened(kind, tmp_path)
        stored = blocks(tier, [MIB] * 8)
        writing = [asyncio.ensure_future(tier.write([transfer])) for transfer in stored]
        await asyncio.sleep(0)
        for write in writing:
            write.cancel()
        assert await asyncio.gather(*writing, return_exceptions=True)
        with pytest.raises(TierError, match="calls are under way"):
            await tier.recover()
        found = await recovered(tier)
        assert {transfer.key for transfer in found} == {transfer.key for transfer in stored}
        assert await read(tier, found) == expected(found)
        assert tier.check() == []
        tier.close()

    asyncio.run(scenario())


def test_a_tier_closed_amid_writing_lets_go_when_that_has_ended(kind: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        tier, _ = await opened(kind, tmp_path)
        stored = blocks(tier, [MIB] * 16)
        writing = [asyncio.ensure_future(tier.write([transfer])) for transfer in stored]
        await writing[0]
        tier.close()
        ended = await asyncio.gather(*writing, return_exceptions=True)
        assert {type(end) for end in ended} <= {type(None), TierError}
        again, found = await opened(kind, tmp_path)
        assert {t.key for t in found} == {t.key for t, end in zip(stored, ended, strict=True) if end is None}
        assert await read(again, found) == expected(found)
        again.close()

    asyncio.run(scenario())


def test_many_reads_and_writes_at_once_give_the_right_bytes(kind: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        tier, _ = await opened(kind, tmp_path)
        kept: list[Transfer] = []

        async def one(number: int) -> None:
            chance = random.Random(number)
            for turn in range(12):
                lengths = [chance.randrange(1, 300 * KIB) for _ in range(chance.randrange(1, 5))]
                stored = blocks(tier, lengths, f"{number}-{turn}-")
                await tier.write(stored)
                assert await read(tier, stored) == expected(stored)
                await drop(tier, stored[1:])
                kept.append(stored[0])

        await asyncio.gather(*map(one, range(8)))
        assert await read(tier, kept) == expected(kept)
        assert tier.check() == []
        await tier.flush()
        tier.close()
        again, found = await opened(kind, tmp_path)
        assert {transfer.key for transfer in found} == {transfer.key for transfer in kept}
        assert await read(again, found) == expected(found)
        again.close()

    asyncio.run(scenario())


def test_a_place_has_one_owner(owned: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        tier, _ = await opened(owned, tmp_path)
        other = TIERS[owned](tmp_path, CAPACITY_BYTES)
        with pytest.raises(ConfigError, match=rf"is used by process {os.getpid()}; stop it, or give another"):
            await other.recover()
        await tier.write(stored := blocks(tier, [4096]))
        tier.close()
        found = await other.recover()
        assert [transfer.key for transfer in found] == [stored[0].key]
        other.close()

    asyncio.run(scenario())


def test_its_space_is_all_given_out_and_merged_again(owned: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        tier, _ = await opened(owned, tmp_path)
        slots: list[Slot] = []
        while (slot := tier.take(MIB - 1, "full")) is not None:
            slots.append(slot)
        assert len(slots) == CAPACITY_BYTES // MIB
        assert (tier.free_bytes, tier.largest(1), tier.statistics().used_bytes) == (0, [], CAPACITY_BYTES)
        # The last byte is written too.
        memory = pages(MIB)
        memory[:] = pattern(b"last", MIB)
        last = Transfer(NAMESPACE, b"last", MIB, slot=max(slots, key=lambda slot: slot.offset), memory=memory)
        await tier.write([last])
        assert await read(tier, [last]) == expected([last])
        for slot in slots:
            tier.free(slot)
        statistics = tier.statistics()
        assert (statistics.name, statistics.medium) == (tier.name, tier.medium.value)
        assert (statistics.capacity_bytes, statistics.ready_bytes) == (CAPACITY_BYTES, CAPACITY_BYTES)
        assert (statistics.used_bytes, statistics.largest_free_bytes) == (0, CAPACITY_BYTES)
        assert tier.check() == []
        tier.close()

    asyncio.run(scenario())


def test_a_tier_that_is_not_open_says_so(kind: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        tier = TIERS[kind](tmp_path, CAPACITY_BYTES)
        assert kind not in OWNED or tier.take(1, "early") is None
        assert not await tier.same()
        for call in (tier.write([]), tier.read([]), tier.flush(), tier.probe()):
            with pytest.raises(TierError, match="is not open; recover it first"):
                await call
        await tier.recover()
        tier.close()
        with pytest.raises(TierError, match="is closed"):
            await tier.recover()

    asyncio.run(scenario())


class AgainstModel(RuleBasedStateMachine):
    """Random operations; the model is what is stored, and what a restart may bring back until a flush."""

    kind: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.folder = TemporaryDirectory()
        self.count = 0
        self.stored: dict[bytes, Transfer] = {}
        self.forgotten: set[bytes] = set()
        self.tier = self.open()

    def open(self) -> StorageTier:
        tier, found = self.runner.run(opened(self.kind, Path(self.folder.name), 2 * MIB))
        keys = {transfer.key for transfer in found}
        assert set(self.stored) <= keys <= set(self.stored) | self.forgotten
        self.stored, self.forgotten = {transfer.key: transfer for transfer in found}, set()
        return tier

    @rule(lengths=st.lists(st.integers(1, 300 * KIB), min_size=1, max_size=4))
    def write(self, lengths: list[int]) -> None:
        made = []
        for length in lengths:
            if self.tier.slot_length(length) <= self.tier.statistics().largest_free_bytes:
                self.count += 1
                made.append(block(self.tier, b"%d" % self.count, length))
        self.runner.run(self.tier.write(made))
        self.stored.update((transfer.key, transfer) for transfer in made)
        # Whatever was forgotten before is gone before bytes are written.
        self.forgotten.clear()

    @precondition(lambda self: self.stored)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        keys = data.draw(st.lists(st.sampled_from(sorted(self.stored)), unique=True, max_size=5))
        self.runner.run(drop(self.tier, [self.stored.pop(key) for key in keys]))
        self.forgotten.update(keys)

    @rule()
    def flush(self) -> None:
        self.runner.run(self.tier.flush())
        self.forgotten.clear()

    @rule()
    def restart(self) -> None:
        self.tier.close()
        self.tier = self.open()

    @rule()
    def open_again(self) -> None:
        # Not a restart: what was forgotten is known.
        self.forgotten.clear()
        found = self.runner.run(self.tier.recover())
        assert {transfer.key for transfer in found} == set(self.stored)
        self.stored = {transfer.key: transfer for transfer in found}

    @rule()
    def read(self) -> None:
        stored = list(self.stored.values())
        assert self.runner.run(read(self.tier, stored)) == expected(stored)

    @invariant()
    def is_whole(self) -> None:
        assert self.tier.check() == []
        used = sum(transfer.slot.length for transfer in self.stored.values())
        assert self.tier.statistics().used_bytes == used

    def teardown(self) -> None:
        self.tier.close()
        self.runner.close()
        self.folder.cleanup()


class NvmeAgainstModel(AgainstModel):
    kind = "nvme"


class RedisAgainstModel(AgainstModel):
    kind = "redis"


TestNvmeAgainstModel = NvmeAgainstModel.TestCase
TestRedisAgainstModel = RedisAgainstModel.TestCase
for _machine, examples in ((TestNvmeAgainstModel, 40), (TestRedisAgainstModel, 20)):
    _machine.settings = settings(
        max_examples=examples,
        stateful_step_count=30,
        deadline=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
    )


del _machine  # or it would be collected once more


if __name__ == "__main__":
    asyncio.run(play(sys.argv[1], Path(sys.argv[2]), sys.argv[3]))
