"""Prefixes that are loaded, and held in the arena for a time, for whoever maps nothing of it."""

import asyncio
import math
import os
import signal
from pathlib import Path

import pytest

from kvstore import protocol
from kvstore.block import Namespace
from kvstore.errors import InvalidRequest, LeaseError, ProtocolError, Unavailable
from kvstore.node.blocks import State
from kvstore.node.holds import HOLDS_MAX, Hold, HoldsStatistics
from tests.node import Node, RawConnection, node_with_disk, pinned, wait_for, written
from tests.redis_servers import Server
from tests.scripted import MIB, NAMESPACE, Disk, Stage, content, in_virtual_time, quiet
from tests.test_http import metrics

LENGTH = 64 << 10
NONE = HoldsStatistics(0, 0)
HELD = Namespace(model="held")


def hold(stage: Stage, *keys: bytes, ttl_s: float = 10.0) -> Hold:
    return stage.store.holds.hold(NAMESPACE, keys, ttl_s)


def pinned_keys(stage: Stage) -> list[bytes]:
    return sorted(block.key for block in stage.arena.directory.all_blocks() if block.pins)


@in_virtual_time
async def test_what_is_in_the_arena_is_pinned_at_once_and_until_its_time_is_over() -> None:
    async with Stage([]) as stage:
        stage.put(b"a", b"b")
        held = hold(stage, b"a", b"b", b"c", b"d", ttl_s=10.0)
        assert (held.pinned, held.loading, held.missing) == (2, 0, 2)
        assert pinned_keys(stage) == [b"a", b"b"]
        assert stage.store.holds.statistics() == HoldsStatistics(1, 2 * LENGTH)
        await asyncio.sleep(9.95)
        await stage_is_full(stage)
        assert pinned_keys(stage) == [b"a", b"b"]
        assert stage.in_arena(b"a")
        await asyncio.sleep(0.1)
        assert stage.store.holds.statistics() == NONE
        assert pinned_keys(stage) == []
        assert stage.store.holds.is_over(held.id)
        await stage_is_full(stage)
        assert not stage.in_arena(b"a")


async def stage_is_full(stage: Stage) -> None:
    """Others have written as much as the arena has."""
    for number in range(stage.arena_bytes // LENGTH):
        stage.put(b"other %d %d" % (number, stage.store.counters.sealed_blocks), length=LENGTH)
        await quiet()


@in_virtual_time
async def test_what_is_below_is_pinned_as_it_arrives() -> None:
    async with Stage([Disk(8 * MIB)]) as stage:
        stage.put(b"a", b"b", b"c")
        await quiet()
        await stage.evict(b"b")
        here = 1 if stage.in_arena(b"a") else 0
        stage.tier.holding = {"read"}
        held = hold(stage, b"a", b"b", b"c", b"d")
        assert (held.pinned, held.loading, held.missing) == (here, 3 - here, 1)
        await quiet()
        assert pinned_keys(stage) == [b"a"][:here]
        stage.tier.holding = set()
        stage.tier.release()
        await quiet()
        assert pinned_keys(stage) == [b"a", b"b", b"c"]
        assert stage.store.holds.end(held.id)
        assert pinned_keys(stage) == []
        assert not stage.store.holds.end(held.id)


@in_virtual_time
async def test_a_prefetch_brings_blocks_up_and_pins_nothing_afterwards() -> None:
    async with Stage([Disk(8 * MIB)]) as stage:
        stage.put(b"a", b"b")
        await quiet()
        await stage.evict(b"a", b"b")
        stage.tier.holding = {"read"}
        held = hold(stage, b"a", b"b", b"c", ttl_s=0.0)
        assert (held.pinned, held.loading, held.missing) == (0, 2, 1)
        await quiet()
        assert stage.store.holds.statistics() == HoldsStatistics(1, 0)
        stage.tier.holding = set()
        stage.tier.release()
        await quiet()
        assert stage.store.holds.statistics() == NONE
        lease = stage.acquire(b"a", b"b")
        assert stage.bytes_of(lease) == [content(key, LENGTH) for key in (b"a", b"b")]
        stage.release(lease)
        assert hold(stage, b"a", b"b", ttl_s=0.0) == Hold(0, 2, 0, 0), "there is nothing to do"


@in_virtual_time
async def test_a_block_that_is_being_written_is_waited_for() -> None:
    async with Stage([]) as stage:
        stage.put(b"a")
        grant = stage.reserve([b"b"], LENGTH)
        held = hold(stage, b"a", b"b")
        assert (held.pinned, held.loading) == (1, 1)
        await quiet()
        stage.fill(grant, [b"b"])
        await quiet()
        assert pinned_keys(stage) == [b"a", b"b"]
        assert stage.store.holds.end(held.id)


@in_virtual_time
async def test_a_hold_that_ends_while_it_loads_leaves_the_block_and_no_pin() -> None:
    async with Stage([Disk(8 * MIB)]) as stage:
        stage.put(b"a")
        await quiet()
        await stage.evict(b"a")
        stage.tier.holding = {"read"}
        held = hold(stage, b"a", ttl_s=1.0)
        await asyncio.sleep(1.1)
        assert not stage.store.holds.end(held.id)
        stage.tier.holding = set()
        stage.tier.release()
        await quiet()
        assert stage.in_arena(b"a")
        assert pinned_keys(stage) == []


@in_virtual_time
async def test_a_hold_that_finds_nothing_is_over() -> None:
    async with Stage([Disk(8 * MIB)]) as stage:
        stage.put(b"a")
        await quiet()
        await stage.evict(b"a")
        stage.tier.holding = {"read"}
        assert hold(stage, b"a").loading == 1
        await quiet()
        stage.tier.under_way("read")[0].fail()
        await quiet()
        stage.tier.holding = set()
        await quiet()
        await stage.remove(b"a")
        await quiet()
        assert stage.store.holds.statistics() == NONE


@in_virtual_time
async def test_a_removed_block_keeps_its_slot_until_the_hold_ends() -> None:
    async with Stage([]) as stage:
        stage.put(b"a")
        block = stage.block(b"a")
        held = hold(stage, b"a")
        await stage.remove(b"a")
        assert block.state is State.DOOMED
        assert not stage.in_arena(b"a")
        stage.put(b"a", version=1)
        assert stage.check() == []
        stage.store.holds.end(held.id)
        assert block.state is State.ABSENT


@in_virtual_time
async def test_all_holds_together_pin_a_part_of_the_arena_and_writers_have_the_rest() -> None:
    async with Stage([Disk(8 * MIB)], arena_bytes=2 * MIB) as stage:
        keys = [b"%d" % number for number in range(12)]
        stage.put(*keys)
        await quiet()
        stage.store.holds.fraction = 0.25
        hold(stage, *keys[:5])
        with pytest.raises(InvalidRequest, match=r"262144 bytes to hold; of the 524288 .* 196608 are left"):
            hold(stage, *keys[5:9])
        hold(stage, *keys[5:8])
        await stage_is_full(stage)
        assert pinned_keys(stage) == sorted(keys[:8])
        # What is below counts as well, before it is there.
        await stage.evict(*keys[8:])
        with pytest.raises(InvalidRequest, match="of the 524288 that all holds may pin 0 are left"):
            hold(stage, *keys[8:], ttl_s=0.0)
        stage.store.holds.fraction = 0.0
        with pytest.raises(InvalidRequest, match="of the 0 that all holds may pin 0 are left"):
            hold(stage, keys[0])
        stage.store.holds.close()


@in_virtual_time
async def test_ten_thousand_holds_are_refused_beyond_the_limit() -> None:
    async with Stage([]) as stage:
        stage.put(b"a", length=1)
        begun = [hold(stage, b"a", ttl_s=5.0 + number / 1000) for number in range(HOLDS_MAX)]
        for _ in range(10_000 - HOLDS_MAX):
            with pytest.raises(InvalidRequest, match=f"{HOLDS_MAX} holds; the limit is {HOLDS_MAX}: end one"):
                hold(stage, b"a")
        assert len({held.id for held in begun}) == HOLDS_MAX
        assert stage.check() == []
        await asyncio.sleep(6.0)
        assert 0 < stage.store.holds.statistics().holds < HOLDS_MAX
        await asyncio.sleep(6.0)
        assert stage.store.holds.statistics() == NONE


@in_virtual_time
async def test_what_is_out_of_its_limits_is_refused_and_named() -> None:
    async with Stage([]) as stage:
        stage.put(b"a")
        for keys, ttl_s, message in (
            ([b"a"], -1.0, "ttl_s is -1.0; give 0 to 3600 seconds"),
            ([b"a"], 3601.0, "ttl_s is 3601.0"),
            ([b"a"], math.nan, "ttl_s is nan"),
            ([b"a"], math.inf, "ttl_s is inf"),
            ([], 1.0, "0 keys to hold; give 1 to 4096"),
            ([b"%d" % number for number in range(4097)], 1.0, "4097 keys to hold"),
            ([b"a" * 65], 1.0, "key of 65 bytes"),
            ([b"a", b"a"], 1.0, "key 61 occurs twice"),
        ):
            with pytest.raises(InvalidRequest, match=message):
                stage.store.holds.hold(NAMESPACE, keys, ttl_s)
        assert hold(stage, b"nobody has it") == Hold(0, 0, 0, 1)
        assert stage.store.holds.statistics() == NONE
        assert not stage.store.holds.is_over(7)
        hold(stage, b"a")
        stage.store.holds.close()
        assert pinned_keys(stage) == []
        with pytest.raises(Unavailable, match="the daemon stops"):
            hold(stage, b"a")


# A daemon, and clients of it.


def test_a_held_prefix_survives_pressure_and_its_client_and_leaves_after_its_time() -> None:
    with Node("16MiB") as node, node.client() as store:
        for key in (b"a", b"b"):
            store.put(HELD, key, key * MIB)
        if (pid := os.fork()) == 0:
            with node.client() as dying:
                dying.pin(HELD, [b"a"], 3600.0)
                os.kill(os.getpid(), signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        wait_for(lambda: store.statistics().connections == 1)
        for number in range(40):
            store.put(HELD, b"%d" % number, bytes(MIB))
        assert store.get(HELD, b"b") is None
        with store.acquire(HELD, [b"a"]) as read:
            assert bytes(read.views[0]) == b"a" * MIB
        now = store.statistics()
        assert (now.holds, now.held_bytes) == (1, MIB)
        assert metrics(node)["kvstore_held_bytes"] == MIB
        # Another's hold of the same, for a short time, ends by itself.
        short = store.pin(HELD, [b"a"], 0.2)
        wait_for(lambda: store.statistics().holds == 1)
        with pytest.raises(LeaseError, match=f"hold {short.id} is over"):
            store.unpin(short.id)
        node.check()


def test_an_unpinned_prefix_gives_way_and_a_stopping_daemon_holds_nothing() -> None:
    with Node("16MiB") as node, node.client() as store:
        store.put(HELD, b"a", bytes(MIB))
        held = store.pin(HELD, [b"a", b"b"], 60.0)
        assert (held.pinned, held.loading, held.missing) == (1, 0, 1)
        store.unpin(held.id)
        assert pinned(store) == 0
        store.pin(HELD, [b"a"], 60.0)
        node.check()
        assert node.stop() == 0
        assert "Traceback" not in node.log


def test_a_prefix_on_disk_is_prefetched_and_held_and_no_hold_is_handed_over(tmp_path: Path) -> None:
    with node_with_disk("16MiB", "128MiB") as node, node.client() as store:
        keys = [b"%d" % number for number in range(3)]
        for key in keys:
            store.put(HELD, key, key * MIB)
        wait_for(lambda: written(store))
        for number in range(30):
            store.put(HELD, b"other %d" % number, bytes(MIB))
        assert store.hit_length(HELD, keys).dram == 0
        assert store.prefetch(HELD, keys)[1:] == (0, 3, 0)
        wait_for(lambda: store.statistics().holds == 0)
        with store.acquire(HELD, keys) as read:
            assert [bytes(view) for view in read.views] == [key * MIB for key in keys]
        assert pinned(store) == 0
        assert store.pin(HELD, keys[:2], 60.0).pinned == 2
        before = node.process
        node.start("--take-over")
        before.wait(20)
        before.stdout.close()
        with node.client() as again:
            now = again.statistics()
            assert (now.holds, now.tiers[0].pinned_blocks) == (0, 0)
            assert again.hit_length(HELD, keys).dram == 3


def test_what_another_node_has_put_into_redis_is_prefetched() -> None:
    with Server() as server:
        flags = ("--redis", server.url)
        with Node("16MiB", *flags) as one, Node("16MiB", *flags) as two:
            with one.client() as store:
                store.put(HELD, b"a", b"a" * MIB)
                wait_for(lambda: written(store))
            with two.client() as store:
                # What nobody here has heard of is missing, and is asked for all the same.
                assert store.prefetch(HELD, [b"a"])[1:] == (0, 0, 1)
                wait_for(lambda: store.hit_length(HELD, [b"a"]).dram == 1)
                wait_for(lambda: store.statistics().holds == 0)
                with store.acquire(HELD, [b"a"]) as read:
                    assert bytes(read.views[0]) == b"a" * MIB
            one.check()
            two.check()


def test_an_older_daemon_is_told_apart() -> None:
    with Node("4MiB") as node, node.client() as store:
        store._connected().welcome.minor = 1
        for verb, call in (
            ("prefetch", lambda: store.prefetch(HELD, [b"a"])),
            ("pin", lambda: store.pin(HELD, [b"a"], 1.0)),
            ("unpin", lambda: store.unpin(1)),
            ("clear", lambda: store.clear(model="m")),
        ):
            with pytest.raises(ProtocolError, match=rf"protocol 2\.1; {verb} came with 2\.2"):
                call()


def test_a_daemon_refuses_what_no_client_would_send() -> None:
    with Node("4MiB") as node, RawConnection(node.socket) as raw:
        handle = raw.open(HELD)
        key = protocol.Keys(b"a", 1)
        for request, message in (
            (protocol.Pin(handle, key, math.nan), "ttl_s is nan"),
            (protocol.Pin(handle, protocol.Keys(b"", 1), 1.0), "0 keys"),
            (protocol.Pin(handle + 1, key, 1.0), "this connection has opened 1"),
            (protocol.Unpin(-1), "hold -1 is over, or was never there"),
        ):
            answer = raw.ask(request)
            assert isinstance(answer, protocol.Failure)
            assert message in answer.text
        node.check()
