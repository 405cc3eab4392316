"""Quotas per salt: who makes room for whom; and what is told of salts."""

import asyncio
import gc
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvstore.block import Medium, Namespace
from kvstore.node import patience
from kvstore.node.accounts import Account, BySalt, Quotas
from kvstore.node.arena import Arena
from kvstore.node.blocks import Block
from kvstore.node.directory import TierDirectory
from kvstore.node.lease import Grant, Holder, ReadLease
from kvstore.node.origin import Origin
from kvstore.node.policy import FIFO, LRU
from kvstore.node.promote import Shelves
from kvstore.node.rules import Rules
from kvstore.node.salts import SALTS_MAX
from kvstore.node.store import Store
from kvstore.statistics import SaltState, SaltUse
from tests.node import Node, wait_for
from tests.scripted import MIB, Disk, Stage, ended, in_virtual_time, quiet, shelves_of
from tests.test_room import PHASES
from tiers.dram import DramTier

KIB = 1 << 10
LENGTH = 64 * KIB
NAMES = [b"%d" % number for number in range(64)]
# Nothing is demoted unless a writer or a reader finds no room.
ON_EVICTION = Rules(on_eviction=True, high_watermark=1.0, low_watermark=1.0)


def shelves(stage: Stage, salt: str) -> Shelves:
    """Of a tenant."""
    return shelves_of(stage, Namespace(model="quotas", salt=salt))


def account(stage: Stage, salt: str, tier: int = 0) -> Account:
    """Of a tenant."""
    return shelves(stage, salt)[tier].account


def here(stage: Stage, salt: str, tier: int = 0) -> list[bytes]:
    """The keys of a tenant's blocks, in the order of their sealing."""
    return list(shelves(stage, salt)[tier].sealed)


def reserve(
    stage: Stage, salt: str, *keys: bytes, length: int = LENGTH, parent: bytes | None = None
) -> Grant:
    """Reserve a chain for a tenant."""
    lengths = [length] * len(keys)
    return stage.store.writers.reserve(stage.holder, shelves(stage, salt), keys, lengths, parent=parent)


def put(stage: Stage, salt: str, *keys: bytes, length: int = LENGTH, parent: bytes | None = None) -> None:
    """Have a tenant's chain committed."""
    stage.fill(reserve(stage, salt, *keys, length=length, parent=parent), keys)


def dram(stage: Stage, default: int | None = None, **salts: int | None) -> None:
    """Set the arena's quotas."""
    stage.store.salts.set_quotas({Medium.DRAM: Quotas(default, salts)})


def state(stage: Stage, salt: str | None) -> SaltState:
    """What is told of a salt."""
    return next(each for each in stage.store.salts.statistics() if each.salt == salt)


# Making room.


@in_virtual_time
async def test_a_salt_at_its_quota_replaces_its_own_coldest_blocks_in_a_full_arena() -> None:
    async with Stage([], arena_bytes=16 * LENGTH * 2) as stage:
        dram(stage, a=4 * LENGTH)
        put(stage, "b", *NAMES[:28])
        for name in NAMES[:4]:
            put(stage, "a", name)
        stage.release(stage.store.readers.acquire(stage.holder, shelves(stage, "a")[0], [NAMES[0]]))
        for name in NAMES[4:7]:
            put(stage, "a", name)
        assert here(stage, "a") == [NAMES[0], *NAMES[4:7]]
        assert here(stage, "b") == NAMES[:28]
        assert account(stage, "a").block_bytes == 4 * LENGTH


@in_virtual_time
async def test_the_tail_of_a_prefix_leaves_before_its_head() -> None:
    async with Stage([]) as stage:
        dram(stage, a=4 * LENGTH)
        put(stage, "a", *NAMES[:2])
        put(stage, "a", *NAMES[2:4], parent=NAMES[1])
        put(stage, "a", b"x", b"y")
        assert here(stage, "a") == [*NAMES[:2], b"x", b"y"]
        put(stage, "a", b"z", length=3 * LENGTH)
        assert here(stage, "a") == [b"x", b"z"]


@in_virtual_time
async def test_what_is_beyond_the_quota_alone_is_refused_and_nothing_leaves() -> None:
    async with Stage([]) as stage:
        dram(stage, a=4 * LENGTH)
        put(stage, "a", *NAMES[:4])
        assert reserve(stage, "a", b"long", length=4 * LENGTH + 1).status == b"r"
        assert here(stage, "a") == NAMES[:4]


@in_virtual_time
async def test_where_too_little_of_its_own_can_leave_nothing_does_and_a_waiting_writer_waits() -> None:
    async with Stage([]) as stage:
        dram(stage, a=4 * LENGTH)
        put(stage, "a", *NAMES[:4])
        lease = stage.store.readers.acquire(stage.holder, shelves(stage, "a")[0], NAMES[:3])
        assert reserve(stage, "a", b"x", length=2 * LENGTH).status == b"r"
        assert here(stage, "a") == NAMES[:4]
        attempt = lambda: reserve(stage, "a", b"x", length=2 * LENGTH)  # noqa: E731
        work = patience.reserve(stage.store, stage.holder, attempt, 2 * LENGTH, 5.0)
        waiting = asyncio.ensure_future(work)
        await quiet()
        assert not waiting.done()
        stage.release(lease)
        await quiet()
        stage.fill(ended(waiting), [b"x"])
        assert here(stage, "a") == [*NAMES[:2], b"x"]


@in_virtual_time
async def test_a_chain_beyond_the_quota_is_granted_as_far_as_it_goes_and_not_waited_for() -> None:
    async with Stage([]) as stage:
        dram(stage, a=4 * LENGTH)
        attempt = lambda: reserve(stage, "a", *NAMES[:6])  # noqa: E731
        grant = await patience.reserve(stage.store, stage.holder, attempt, 6 * LENGTH, 5.0)
        assert grant.status == b"ggggrr"
        assert asyncio.get_running_loop().time() == 0
        stage.store.writers.abort(stage.holder, grant.lease.id)


@in_virtual_time
async def test_a_quota_is_no_reservation() -> None:
    async with Stage([], arena_bytes=32 * LENGTH) as stage:
        dram(stage, a=8 * LENGTH)
        put(stage, "a", *NAMES[:8])
        put(stage, "b", *NAMES[:32])
        assert here(stage, "a") == []
        assert len(here(stage, "b")) == 32


@in_virtual_time
async def test_each_salt_has_the_default_but_those_with_a_quota_of_their_own() -> None:
    async with Stage([]) as stage:
        dram(stage, 2 * LENGTH, a=4 * LENGTH, b=None)
        for salt, most in (("", 2), ("a", 4), ("b", 6), ("c", 2)):
            put(stage, salt, *NAMES[:6])
            assert len(here(stage, salt)) == most


# Changing quotas.


@in_virtual_time
@pytest.mark.parametrize("policy", [LRU, FIFO])
async def test_a_quota_that_is_lowered_is_kept_step_by_step(policy: type[FIFO]) -> None:
    async with Stage([], arena_bytes=32 * MIB) as stage:
        stage.arena.directory.set_policy(policy)
        names = [b"%d" % number for number in range(1000)]
        for name in names:
            put(stage, "a", name, length=4 * KIB)
            put(stage, "b", name, length=4 * KIB)
        stage.release(stage.store.readers.acquire(stage.holder, shelves(stage, "a")[0], names[:1]))
        dram(stage, a=10 * 4 * KIB)
        steps = 0
        while account(stage, "a").block_bytes > 10 * 4 * KIB:
            before = len(here(stage, "a"))
            assert reserve(stage, "a", b"more", length=40 * KIB).status == b"r" or before < 600
            stage.store.salts.keep_quotas()
            assert before - len(here(stage, "a")) <= 512
            assert stage.check() == []
            steps += 1
            assert steps < 20
        assert steps > 1
        kept = names[:1] + names[-9:] if policy is LRU else names[-10:]
        assert here(stage, "a") == kept
        assert here(stage, "b") == names


@in_virtual_time
async def test_quotas_that_are_taken_away_leave_no_trace() -> None:
    async with Stage([]) as stage:
        dram(stage, 4 * LENGTH)
        put(stage, "a", *NAMES[:8])
        assert isinstance(stage.arena.directory.policy, BySalt)
        stage.store.salts.set_quotas({})
        assert isinstance(stage.arena.directory.policy, LRU)
        assert account(stage, "a").order is None
        put(stage, "a", *NAMES[:8])
        assert len(here(stage, "a")) == 8


# Tiers below.


@in_virtual_time
async def test_what_is_written_behind_replaces_the_coldest_of_its_own_salt_below() -> None:
    async with Stage([Disk(32 * LENGTH)]) as stage:
        stage.store.salts.set_quotas({Medium.NVME: Quotas(None, {"a": 4 * LENGTH})})
        put(stage, "b", *NAMES[:28])
        await quiet()
        for name in NAMES[:6]:
            put(stage, "a", name)
            await quiet()
        assert here(stage, "a", 1) == NAMES[2:6]
        assert here(stage, "b", 1) == NAMES[:28]
        assert state(stage, "a").media[1] == SaltUse("nvme", 4, 4 * LENGTH, 4 * LENGTH)


@in_virtual_time
async def test_what_is_beyond_the_quota_below_is_not_written_and_keeps_no_slot_in_the_arena() -> None:
    async with Stage([Disk(8 * MIB)], arena_bytes=32 * LENGTH) as stage:
        stage.store.salts.set_quotas({Medium.NVME: Quotas(LENGTH - 1)})
        put(stage, "a", *NAMES[:30])
        put(stage, "a", *NAMES[30:60])
        await quiet()
        assert here(stage, "a", 1) == []
        assert stage.lower.counters.dropped_blocks == 60
        assert not stage.lower.unwritten


@in_virtual_time
async def test_directories_share_a_quota_by_their_capacities() -> None:
    async with Stage([Disk(3 * MIB), Disk(MIB)]) as stage:
        stage.store.salts.set_quotas({Medium.NVME: Quotas(16 * LENGTH)})
        for name in NAMES[:24]:
            put(stage, "a", name)
            await quiet()
        bytes_by_tier = [account(stage, "a", tier).block_bytes for tier in (1, 2)]
        assert bytes_by_tier == [12 * LENGTH, 4 * LENGTH]
        assert state(stage, "a").media[1] == SaltUse("nvme", 16, 16 * LENGTH, 16 * LENGTH)


@in_virtual_time
async def test_what_a_restart_finds_beyond_a_quota_leaves() -> None:
    disk = Disk(8 * MIB)
    async with Stage([disk]) as stage:
        for name in NAMES[:8]:
            put(stage, "a", name)
        await quiet()
        following = await stage.crash()
    following.store.salts.set_quotas({Medium.NVME: Quotas(4 * LENGTH)})
    async with following:
        assert here(following, "a", 1) == NAMES[:8]
        following.store.salts.keep_quotas()
        assert here(following, "a", 1) == NAMES[4:8]


@in_virtual_time
async def test_a_salt_at_its_quota_has_its_own_blocks_demoted_and_no_others() -> None:
    async with Stage([Disk(16 * MIB)], ON_EVICTION) as stage:
        dram(stage, a=4 * LENGTH)
        put(stage, "b", *NAMES[:8])
        put(stage, "a", *NAMES[:4])
        assert reserve(stage, "a", b"x", length=2 * LENGTH).status == b"r"
        await quiet()
        assert here(stage, "a") == NAMES[:2]
        assert here(stage, "a", 1) == [NAMES[3], NAMES[2]]
        assert here(stage, "b") == NAMES[:8]
        put(stage, "a", b"x", length=2 * LENGTH)
        assert here(stage, "a") == [*NAMES[:2], b"x"]
        dram(stage, a=2 * LENGTH)
        stage.store.salts.keep_quotas()
        await quiet()
        assert account(stage, "a").block_bytes <= 2 * LENGTH
        assert {*here(stage, "a"), *here(stage, "a", 1)} == {*NAMES[:4], b"x"}
        assert here(stage, "b") == NAMES[:8]


@in_virtual_time
async def test_what_is_loaded_keeps_the_quota_and_a_prefix_beyond_it_is_not_waited_for() -> None:
    async with Stage([Disk(16 * MIB)]) as stage:
        put(stage, "b", *NAMES[:4])
        for start in range(0, 16, 4):
            parent = NAMES[start - 1] if start else None
            put(stage, "a", *NAMES[start : start + 4], parent=parent)
        await quiet()
        dram(stage, a=4 * LENGTH)
        stage.store.salts.keep_quotas()
        assert here(stage, "a") == NAMES[:4]
        for names, hit in ((NAMES[:3], 3), (NAMES[8:12], 4), (NAMES[:16], 4)):
            work = patience.acquire(stage.store, stage.holder, shelves(stage, "a"), names, 10.0)
            lease = await work
            assert len(lease.blocks) == hit
            assert lease.limited == (len(names) > 4)
            assert account(stage, "a").block_bytes <= 4 * LENGTH
            stage.release(lease)
        assert here(stage, "b") == NAMES[:4]
        assert asyncio.get_running_loop().time() == 0


# What is told of salts.


@in_virtual_time
async def test_hits_misses_and_bytes_are_counted_by_salt() -> None:
    async with Stage([Disk(8 * MIB)]) as stage:
        put(stage, "a", *NAMES[:2])
        put(stage, "", NAMES[0])
        await quiet()
        stage.release(stage.store.readers.acquire(stage.holder, shelves(stage, "a")[0], NAMES[:3]))
        items = [(shelves(stage, salt), name) for name in NAMES[:2] for salt in ("a", "", "b")]
        lease, found = stage.store.readers.acquire_each(stage.holder, items)
        assert found == bytes([1, 1, 0, 1, 0, 0])
        stage.release(lease)
        told = {each.salt: (each.hit_blocks, each.missed_blocks) for each in stage.store.salts.statistics()}
        assert told["a"] == (4, 1)
        assert told[""] == (1, 1)
        assert state(stage, "a").media == [SaltUse("dram", 2, 2 * LENGTH), SaltUse("nvme", 2, 2 * LENGTH)]
        assert state(stage, "a").label == "433911c6eb0d"  # printf a | b2sum -l 48
        assert state(stage, "").label == "none"


@in_virtual_time
async def test_a_salt_that_nobody_uses_any_more_is_forgotten() -> None:
    async with Stage([]) as stage:
        put(stage, "a", *NAMES[:2])
        assert "a" in {each.salt for each in stage.store.salts.statistics()}
        stage.store.remove(shelves(stage, "a"), NAMES[:2])
        gc.collect()
        assert "a" not in {each.salt for each in stage.store.salts.statistics()}


@in_virtual_time
async def test_of_many_salts_those_with_most_are_told_and_the_others_together() -> None:
    async with Stage([], arena_bytes=4 * MIB) as stage:
        used = []
        for number in range(500):
            put(stage, f"salt {number}", b"k", length=1 + number)
            used.append(shelves(stage, f"salt {number}"))
        told = stage.store.salts.statistics()
        assert [each.salt for each in told[:-1]] == [f"salt {499 - n}" for n in range(SALTS_MAX)]
        assert told[-1].salt is None
        assert told[-1].label == "other"
        assert sum(each.medium_to_bytes["dram"] for each in told) == sum(range(501))
        assert sum(each.media[0].blocks for each in told) == 500


# A daemon.


def test_a_daemon_keeps_quotas_and_takes_others_while_it_runs(tmp_path: Path) -> None:
    config = tmp_path / "node.toml"
    config.write_text('[quotas]\ndram = "8MiB"\ndram_salts = ["b:2MiB", "c:"]\n')
    with Node("64MiB", "--config", str(config)) as node, node.client() as store:

        def used_mib() -> dict[str | None, int]:
            return {salt.salt: salt.medium_to_bytes["dram"] >> 20 for salt in store.statistics().salts}

        for salt in ("a", "b", "c"):
            for name in NAMES[:12]:
                store.put(Namespace(model="quotas", salt=salt), name, bytes(MIB))
        assert used_mib() == {"a": 8, "b": 2, "c": 12}
        with store.reserve(Namespace(model="quotas", salt="b"), [b"long"], 3 * MIB, wait_s=5.0) as write:
            assert write.refused == [b"long"]
        config.write_text('[quotas]\ndram_salts = ["a:3MiB"]\n')
        node.process.send_signal(signal.SIGHUP)
        wait_for(lambda: used_mib()["a"] == 3)
        store.put(Namespace(model="quotas", salt="b"), b"long", bytes(3 * MIB))
        assert used_mib() == {"a": 3, "b": 5, "c": 12}
        node.check()


# Whatever happens.

SALTS = {"a": 6 * LENGTH, "b": 3 * LENGTH, "c": None}
KEYS = NAMES[:12]
SPANS = st.tuples(st.sampled_from(sorted(SALTS)), st.integers(0, 11), st.integers(1, 5))


class Tenants(RuleBasedStateMachine):
    """Tenants over one arena that has room for the quotas of all, and for what the one without has."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = DramTier(32 * LENGTH)
        self.gone: list[tuple[str, bytes]] = []
        self.asking: set[str] = set()
        self.grants: list[Grant] = []
        self.leases: list[ReadLease] = []

    @initialize(policy=st.sampled_from([LRU, FIFO]), debug=st.booleans())
    def start(self, policy: type[FIFO], debug: bool) -> None:
        directory = TierDirectory("dram", Medium.DRAM, policy())
        self.store = Store(Arena(self.memory, directory, [self], debug=debug), [])
        self.holder = Holder("tenants", MIB * 64, MIB * 64, maps=True)
        self.memory.populate(self.store.grow)
        self.store.salts.set_quotas({Medium.DRAM: Quotas(None, SALTS)})
        self.shelves = {
            salt: self.store.directory.shelves(Namespace(model="tenants", salt=salt)) for salt in SALTS
        }

    def sealed(self, tier: str, blocks: Sequence[Block], origin: Origin | None) -> None:
        pass

    def removed(self, tier: str, blocks: Sequence[Block]) -> None:
        left = {block.shelf.namespace.salt for block in blocks}
        assert left <= self.asking, f"blocks of {left} leave for {self.asking}"

    @rule(span=SPANS, length=st.integers(1, 2 * LENGTH), each=st.booleans())
    def reserve(self, span: tuple[str, int, int], length: int, each: bool) -> None:
        salt, first, size = span
        keys = [key + b":%d" % (-(-length // KIB)) for key in KEYS[first : first + size]]
        length = -(-length // KIB) * KIB
        self.asking, writers = {salt}, self.store.writers
        if each:
            grant = writers.reserve_each(
                self.holder, [(self.shelves[salt], k) for k in keys], [length] * len(keys)
            )
        else:
            grant = writers.reserve(self.holder, self.shelves[salt], keys, [length] * len(keys))
        if salt == "c" and self.shelves["c"][0].account.block_bytes > 8 * LENGTH:
            self.store.remove(self.shelves["c"], list(self.shelves["c"][0].sealed))
        if grant.lease.open:
            self.grants.append(grant)

    @rule(number=st.integers(0, 9), well=st.booleans())
    def end_write(self, number: int, well: bool) -> None:
        if self.grants:
            grant = self.grants.pop(number % len(self.grants))
            end = self.store.writers.commit if well else self.store.writers.abort
            end(self.holder, grant.lease.id)

    @rule(number=st.integers(0, 9))
    def commit(self, number: int) -> None:
        self.end_write(number, True)

    @rule(span=SPANS)
    def acquire(self, span: tuple[str, int, int]) -> None:
        shelf = self.shelves[span[0]][0]
        keys = list(shelf.sealed)[span[1] :][: span[2]]
        lease = self.store.readers.acquire(self.holder, shelf, keys)
        if lease.blocks:
            self.leases.append(lease)

    @rule(number=st.integers(0, 9))
    def release(self, number: int) -> None:
        if self.leases:
            lease = self.leases.pop(number % len(self.leases))
            self.store.readers.release(self.holder, lease.id)

    @rule(span=SPANS)
    def remove(self, span: tuple[str, int, int]) -> None:
        self.asking = {span[0]}
        shelves = self.shelves[span[0]]
        self.store.remove(shelves, list(shelves[0].sealed)[span[1] :][: span[2]])

    @rule()
    def keep_quotas(self) -> None:
        self.asking = set()
        self.store.salts.keep_quotas()

    @invariant()
    def nobody_is_above_a_quota_and_all_is_well(self) -> None:
        if hasattr(self, "store"):
            for salt, quota_bytes in SALTS.items():
                assert quota_bytes is None or self.shelves[salt][0].account.block_bytes <= quota_bytes
            assert self.store.check([self.holder]) == []

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.asking = set(SALTS)
            self.store.end(self.holder)
            for salt in SALTS:
                self.store.remove(self.shelves[salt], list(self.shelves[salt][0].sealed))
                assert self.shelves[salt][0].account.block_bytes == 0
            assert self.store.check([self.holder]) == []
        self.memory.close()


TestTenants = Tenants.TestCase
TestTenants.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    phases=PHASES,
    suppress_health_check=list(HealthCheck),
)
