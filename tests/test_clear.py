"""Clearing: what was there of a model or a salt is gone, everywhere, for good, and others go on."""

import asyncio
from pathlib import Path

import pytest

from kvstore.block import Namespace
from kvstore.errors import DeadlineExceeded, InvalidRequest, TierError
from kvstore.node.blocks import State
from kvstore.node.clear import Scope, clear
from kvstore.node.holds import HoldsStatistics
from kvstore.node.rules import Rules
from tests.node import Node, node_with_disk, wait_for, written
from tests.redis_servers import Server
from tests.scripted import MIB, NAMESPACE, Disk, Stage, in_virtual_time, quiet

LENGTH = 4096
SALTED = Namespace(model="scripted", salt="tenant")


def scope(**given: str) -> Scope:
    return Scope(**given)  # type: ignore[arg-type]


def put(stage: Stage, namespace: Namespace, keys: list[bytes], length: int = LENGTH) -> None:
    shelves = stage.store.directory.shelves(namespace)
    grant = stage.store.writers.reserve(stage.holder, shelves, keys, [length] * len(keys))
    assert set(grant.status) == {ord("g")}, grant.status
    stage.store.writers.commit(stage.holder, grant.lease.id)


def names(stage: Stage, namespace: Namespace) -> set[bytes]:
    """What of a namespace can be read, in any tier."""
    return {key for shelf in stage.store.directory.shelves(namespace) for key in shelf.sealed}


async def cleared(stage: Stage, wait_s: float = 60.0, **given: str) -> int:
    return await clear(stage.store, scope(**given), wait_s)


@pytest.mark.parametrize(
    "rules", [Rules(), Rules(on_eviction=True, exclusive=True)], ids=["behind", "exclusive"]
)
@in_virtual_time
async def test_only_the_blocks_of_the_scope_go_wherever_they_are_and_no_restart_brings_them_back(
    rules: Rules,
) -> None:
    async with Stage([Disk(16 * MIB)], rules) as stage:
        for start in range(0, 1000, 50):
            for namespace in (NAMESPACE, SALTED):
                put(stage, namespace, [b"%d" % number for number in range(start, start + 50)])
                await quiet()
        assert stage.lower.directory.statistics().blocks
        assert stage.arena.counters.evicted_blocks
        assert await cleared(stage, salt="tenant") == 1000
        assert names(stage, SALTED) == set()
        assert len(names(stage, NAMESPACE)) == 1000
        assert not stage.lower.graves
        below = set(stage.shelves[1].sealed)
        following = await stage.crash()
    async with following as stage:
        assert names(stage, SALTED) == set()
        assert names(stage, NAMESPACE) == below
        assert await cleared(stage, model="scripted") == len(below)
        assert not any(tier.blocks for tier in stage.store.statistics())


@in_virtual_time
async def test_what_is_on_its_way_up_or_down_does_not_come_back() -> None:
    async with Stage([Disk(4 * MIB)]) as stage:
        stage.put(b"up")
        await quiet()
        await stage.evict(b"up")
        stage.tier.holding = {"read", "write"}
        stage.put(b"down")
        reading = stage.acquiring(b"up")
        await quiet()
        assert stage.tier.under_way("read")
        assert stage.tier.under_way("write")
        clearing = asyncio.ensure_future(cleared(stage, model="scripted"))
        await quiet()
        stage.tier.holding = set()
        stage.tier.release()
        assert await clearing > 0
        assert (await reading).blocks == []
        await quiet()
        assert not any(tier.blocks for tier in stage.store.statistics())
        following = await stage.crash()
    async with following as stage:
        assert not any(tier.blocks for tier in stage.store.statistics())


@in_virtual_time
async def test_others_have_their_turns_and_what_they_commit_meanwhile_may_stay() -> None:
    async with Stage([Disk(8 * MIB)], arena_bytes=8 * MIB) as stage:
        keys = [b"%d" % number for number in range(1000)]
        put(stage, SALTED, keys)
        await quiet()
        seen: list[int] = []

        async def write() -> None:
            for number in range(5):
                put(stage, SALTED, [b"new %d" % number])
                seen.append(len(stage.store.directory.shelves(SALTED)[0].sealed))
                await asyncio.sleep(0)

        clearing = asyncio.ensure_future(cleared(stage, salt="tenant"))
        await asyncio.gather(write(), clearing)
        assert 0 < seen[-1] < 1000
        assert await clearing >= 1000
        left = set(stage.store.directory.shelves(SALTED)[0].sealed)
        assert left <= {b"new %d" % number for number in range(5)}
        assert await cleared(stage, salt="tenant") == len(left)


@in_virtual_time
async def test_a_pinned_or_held_block_is_hidden_and_freed_at_its_end() -> None:
    async with Stage([]) as stage:
        stage.put(b"a", b"b")
        lease, block = stage.acquire(b"a"), stage.block(b"b")
        held = stage.store.holds.hold(NAMESPACE, [b"a", b"b"], 10.0)
        assert await cleared(stage, model="scripted") == 2
        assert not stage.shelves[0].sealed
        assert block.state is State.DOOMED
        assert stage.store.holds.statistics() == HoldsStatistics(1, 2 * (64 << 10))
        stage.store.holds.end(held.id)
        assert block.state is State.ABSENT
        stage.release(lease)


@in_virtual_time
async def test_a_tier_that_fails_or_is_not_open_is_named_and_made_good_later() -> None:
    async with Stage([Disk(4 * MIB)]) as stage:
        stage.put(b"a")
        await quiet()
        stage.lower.trip("scripted")
        with pytest.raises(TierError, match="1 blocks are hidden, but tier tier0 fails: what it has may"):
            await cleared(stage, model="scripted")
        await asyncio.sleep(60)
        assert not stage.lower.graves
        assert await cleared(stage, model="scripted") == 0
        stage.lower.recovered = False
        with pytest.raises(TierError, match="tier tier0 is not open"):
            await cleared(stage, model="scripted")
        stage.lower.recovered = True


@in_virtual_time
async def test_a_clear_that_takes_too_long_says_how_far_it_came() -> None:
    async with Stage([Disk(4 * MIB)], Rules(timeout_s=60.0)) as stage:
        stage.put(b"a", b"b")
        await quiet()
        stage.tier.holding = {"flush"}
        with pytest.raises(DeadlineExceeded, match="2 blocks are cleared after 1 s, and there are more"):
            await cleared(stage, 1.0, model="scripted")
        assert not stage.in_arena(b"a")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "nothing to clear; give a namespace, or a model, a salt or both"),
        ({"namespace": NAMESPACE, "salt": ""}, "a namespace beside a model or a salt to clear"),
    ],
)
def test_everything_at_once_cannot_be_cleared(given: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        Scope(**given)  # type: ignore[arg-type]


def test_a_scope_has_what_all_that_is_given_says() -> None:
    other = Namespace(model="other", salt="tenant")
    assert [scope(model="scripted").has(each) for each in (NAMESPACE, SALTED, other)] == [True, True, False]
    assert [scope(salt="tenant").has(each) for each in (NAMESPACE, SALTED, other)] == [False, True, True]
    assert [scope(salt="").has(each) for each in (NAMESPACE, SALTED, other)] == [True, False, False]
    assert [scope(model="other", salt="tenant").has(each) for each in (SALTED, other)] == [False, True]
    assert [Scope(SALTED).has(each) for each in (NAMESPACE, SALTED, other)] == [False, True, False]


def test_a_cleared_salt_is_gone_after_a_kill_and_others_are_not(tmp_path: Path) -> None:
    shards = [Namespace(model="m", salt="tenant", shard=f"{rank}/2") for rank in (0, 1)]
    kept = Namespace(model="m", salt="kept")
    keys = [b"%d" % number for number in range(200)]
    with node_with_disk("16MiB", "128MiB") as node:
        with node.client() as store:
            for namespace in (*shards, kept):
                for half in (keys[:100], keys[100:]):
                    with store.reserve(namespace, half, 64 << 10, wait_s=10.0) as write:
                        assert not write.refused
                        write.commit()
                wait_for(lambda: written(store))
            assert store.clear(salt="tenant") == 400
            assert store.clear(shards[0]) == 0
        node.kill()
        node.start()
        with node.client() as store:
            assert [use.namespace for use in store.namespaces()] == [kept]
            assert store.hit_length(kept, keys).nvme == 200
            with pytest.raises(InvalidRequest, match="nothing to clear"):
                store.clear()
            assert store.clear(kept) == 200
            assert list(store.namespaces()) == []


def test_of_a_shared_tier_goes_what_the_node_knows_of_there() -> None:
    known, unknown = Namespace(model="m", salt="known"), Namespace(model="m", salt="unknown")
    with Server() as server:
        flags = ("--redis", server.url)
        with Node("16MiB", *flags) as one, Node("16MiB", *flags) as two, one.client() as store:
            for namespace in (known, unknown):
                store.put(namespace, b"k", b"bytes")
            wait_for(lambda: written(store))
            with two.client() as other:
                assert other.get(known, b"k") == b"bytes"
                assert other.clear(model="m") == 1
                assert other.get(known, b"k", timeout_s=1.0) is None
                # Of what it has never heard it can say nothing.
                assert other.get(unknown, b"k", timeout_s=1.0) == b"bytes"
            one.check()
            two.check()
