"""Blocks on their way between the arena and the tiers below it, whatever those do meanwhile."""

import asyncio
from contextlib import suppress

import pytest

from kvstore.block import Medium, Namespace
from kvstore.errors import InvalidRequest, TierError
from kvstore.node import patience
from kvstore.node.blocks import State
from kvstore.node.breaker import FAILURES_MAX
from kvstore.node.rules import Rules
from kvstore.node.verification import Verification
from tests.scripted import (
    MIB,
    NAMESPACE,
    Disk,
    Stage,
    content,
    ended,
    in_virtual_time,
    quiet,
    shelves_of,
    until,
)

KIB = 1 << 10
LENGTH = 64 * KIB
QUARTER = 512 * KIB  # of the arena
# Nothing is demoted unless a writer or a reader finds no room.
ON_EVICTION = Rules(on_eviction=True, high_watermark=1.0, low_watermark=1.0)
NAMES = [b"%d" % number for number in range(32)]


async def stored(*keys: bytes, length: int = LENGTH, capacity: int = 8 * MIB, version: int = 0) -> Disk:
    """A disk with these blocks, which a daemon before has left."""
    disk = Disk(capacity)
    async with Stage([disk]) as stage:
        stage.put(*keys, length=length, version=version)
    assert disk.keys() == list(keys)
    return disk


async def restarted(stage: Stage) -> list[bytes]:
    """The keys that are there after a crash."""
    following = await stage.crash()
    async with following:
        return [key for shelf in following.shelves for key in shelf.sealed]


# Write-behind.


@in_virtual_time
async def test_a_committed_block_is_written_behind_and_outlives_a_crash() -> None:
    stage = Stage([Disk(8 * MIB)])
    async with stage:
        stage.put(b"a", b"b")
        assert not stage.is_below(b"a")
        await quiet()
        assert stage.log.of(b"a") == [("sealed", "dram"), ("write", "tier0"), ("sealed", "tier0")]
        following = await stage.crash()
    async with following:
        assert list(following.shelves[1].sealed) == [b"a", b"b"]
        lease = await following.acquiring(b"a", b"b")
        assert following.bytes_of(lease) == [content(key, LENGTH) for key in (b"a", b"b")]
        following.release(lease)


@in_virtual_time
async def test_blocks_are_written_in_the_order_of_their_commit() -> None:
    async with Stage([Disk(8 * MIB)], Rules(jobs=1)) as stage:
        stage.tier.holding = {"write"}
        for name in NAMES[:20]:
            stage.put(name)
        while stage.lower.unwritten or stage.tier.calls:
            stage.tier.release()
            await quiet()
        assert stage.disks[0].keys() == NAMES[:20]


@in_virtual_time
async def test_small_blocks_share_a_call_and_one_call_is_left_to_readers() -> None:
    async with Stage([Disk(32 * MIB)], Rules(jobs=3), arena_bytes=8 * MIB) as stage:
        stage.tier.holding = {"write"}
        stage.put(b"first")
        stage.put(*NAMES, length=128 * KIB)
        await quiet()
        sizes = [sum(t.length for t in call.transfers) for call in stage.tier.under_way("write")]
        assert len(sizes) == 2
        assert sizes[1] == 2 * MIB
        assert stage.lower.unwritten_bytes == 32 * 128 * KIB - 2 * MIB


@in_virtual_time
async def test_a_block_that_is_owed_is_not_evicted_and_reserve_without_waiting_is_refused() -> None:
    async with Stage([Disk(8 * MIB)]) as stage:
        stage.tier.holding = {"write"}
        stage.put(*NAMES[:4], length=QUARTER)
        grant = stage.reserve([b"more"], QUARTER)
        assert grant.status == b"r"
        waiting = asyncio.ensure_future(stage.reserve_waiting([b"more"], QUARTER, 5.0))
        await quiet()
        assert not waiting.done()
        stage.tier.under_way("write")[0].release()
        await quiet()
        grant = ended(waiting)
        assert grant.status == b"g"
        assert asyncio.get_running_loop().time() == 0
        stage.store.writers.abort(stage.holder, grant.lease.id)


@in_virtual_time
async def test_a_reserve_that_waits_in_vain_is_refused_in_time_and_holds_nothing() -> None:
    async with Stage([Disk(8 * MIB)], Rules(timeout_s=60.0)) as stage:
        stage.tier.holding = {"write"}
        stage.put(*NAMES[:4], length=QUARTER)
        grant = await stage.reserve_waiting([b"more", b"yet more"], QUARTER, 5.0)
        assert grant.status == b"rr"
        assert asyncio.get_running_loop().time() == pytest.approx(5.0)
        assert not stage.holder.lease_ids()
        assert stage.holder.reserved_bytes == 0


@in_virtual_time
async def test_a_block_removed_while_it_is_written_behind_does_not_come_back() -> None:
    for step in ("nothing", "copy", "put"):
        stage = Stage([Disk(8 * MIB)])
        async with stage:
            stage.tier.holding = {"write"}
            stage.put(b"a", b"b")
            await quiet()
            (call,) = stage.tier.under_way("write")
            if step != "nothing":
                getattr(call, step)()
            removing = asyncio.ensure_future(stage.remove(b"a"))
            await quiet()
            assert ended(removing) == 1
            assert stage.memory.free_bytes == 2 * MIB - 2 * LENGTH, "its slot was given away while it is read"
            stage.tier.release()
            await quiet()
            assert stage.memory.free_bytes == 2 * MIB - LENGTH
            assert (stage.is_below(b"a"), stage.is_below(b"b")) == (False, True)
            assert stage.check() == []
            await stage.remove()
            assert await restarted(stage) == [b"b"]


@in_virtual_time
async def test_a_block_removed_before_its_write_has_begun_leaves_nothing_behind() -> None:
    async with Stage([Disk(8 * MIB)]) as stage:
        stage.put(b"a", b"b")
        assert await stage.remove(b"a") == 1
        await quiet()
        assert stage.disks[0].keys() == [b"b"]
        assert stage.tier.free_bytes == 8 * MIB - LENGTH


@in_virtual_time
async def test_a_removed_block_stays_until_both_its_reader_and_its_write_have_ended() -> None:
    for reader_first in (True, False):
        async with Stage([Disk(8 * MIB)]) as stage:
            stage.tier.holding = {"write"}
            stage.put(b"a")
            lease = stage.acquire(b"a")
            await quiet()
            await stage.remove(b"a")
            ends = [lambda: stage.release(lease), lambda: stage.tier.release()]  # noqa: B023
            for end in ends if reader_first else ends[::-1]:
                assert stage.memory.free_bytes == 2 * MIB - LENGTH
                assert stage.bytes_of(lease) == [content(b"a", LENGTH)]
                end()
                await quiet()
                assert stage.check() == []
            assert stage.memory.free_bytes == 2 * MIB


@in_virtual_time
async def test_a_block_that_is_being_written_is_not_moved_to_join_free_memory() -> None:
    async with Stage([Disk(8 * MIB)], Rules(jobs=1)) as stage:
        for name in NAMES[:8]:
            stage.put(name, length=QUARTER // 2)
            await quiet()
        await stage.remove(NAMES[2])
        stage.tier.holding = {"write"}
        stage.put(NAMES[2], length=QUARTER // 2, version=2)
        await quiet()
        assert (stage.block(NAMES[2]).copies, stage.block(NAMES[2]).slot.offset) == (1, QUARTER)
        leases = [stage.acquire(NAMES[number]) for number in (0, 4, 5, 7)]
        await stage.remove(NAMES[1], NAMES[3], NAMES[6])
        assert stage.reserve([b"large"], QUARTER).status == b"r"
        assert stage.block(NAMES[2]).slot.offset == QUARTER
        for lease in leases:
            stage.release(lease)


@in_virtual_time
async def test_a_key_is_written_anew_while_its_removed_block_is_still_being_written() -> None:
    stage = Stage([Disk(8 * MIB)])
    async with stage:
        stage.tier.holding = {"write"}
        stage.put(b"a", version=1)
        await quiet()
        await stage.remove(b"a")
        stage.put(b"a", version=2)
        await quiet()
        first, second = stage.tier.under_way("write")
        second.release()
        first.release()
        await quiet()
        assert stage.check() == []
        following = await stage.crash()
    async with following:
        lease = await following.acquiring(b"a")
        assert following.bytes_of(lease) == [content(b"a", LENGTH, 2)]
        following.release(lease)


@in_virtual_time
async def test_two_tiers_of_one_medium_share_blocks_and_two_media_get_each_its_own() -> None:
    for media, counts in (
        ([Medium.NVME, Medium.NVME], (10, 10)),
        ([Medium.NVME, Medium.REMOTE], (20, 20)),
    ):
        async with Stage([Disk(8 * MIB), Disk(8 * MIB)], media=media) as stage:
            for name in NAMES[:20]:
                stage.put(name)
                await quiet()
            one, two = (set(shelf.sealed) for shelf in stage.shelves[1:])
            assert (len(one), len(two)) == counts
            assert one | two == set(NAMES[:20])


@in_virtual_time
async def test_only_blocks_that_were_hit_often_enough_are_written() -> None:
    async with Stage([Disk(8 * MIB)], Rules(admit_hits=2)) as stage:
        stage.put(b"a", b"b")
        for keys in ([b"a", b"b"], [b"a"]):
            await quiet()
            assert not stage.shelves[1].sealed
            stage.release(stage.acquire(*keys))
        await quiet()
        assert list(stage.shelves[1].sealed) == [b"a"]


@in_virtual_time
async def test_a_full_tier_loses_its_oldest_which_is_announced_before_it_is_overwritten() -> None:
    async with Stage([Disk(4 * LENGTH)]) as stage:
        for name in NAMES[:6]:
            stage.put(name)
            await quiet()
        assert list(stage.shelves[1].sealed) == NAMES[2:6]
        told = [line for line in stage.log.lines if line[1] == "tier0"]
        assert told.index(("removed", "tier0", b"0")) < told.index(("write", "tier0", b"4"))
        assert stage.lower.counters.evicted_blocks == 2
        assert sorted(await restarted(stage)) == NAMES[2:6]


@in_virtual_time
async def test_a_block_that_finds_no_room_below_is_dropped_there_and_stays_in_the_arena() -> None:
    async with Stage([Disk(2 * LENGTH)]) as stage:
        stage.put(b"large", length=3 * LENGTH)
        await quiet()
        assert stage.in_arena(b"large")
        assert not stage.lower.unwritten
        await stage.evict(b"large")


# Demotion.


@in_virtual_time
async def test_demotion_begins_at_the_high_watermark_and_ends_at_the_low_one_coldest_first() -> None:
    rules = Rules(on_eviction=True, high_watermark=0.75, low_watermark=0.5)
    async with Stage([Disk(8 * MIB)], rules) as stage:
        for name in NAMES[:24]:
            stage.put(name)
        await quiet()
        assert not stage.shelves[1].sealed
        stage.release(stage.acquire(NAMES[0]))
        stage.put(NAMES[24])
        await until(lambda: not stage.tier.calls)
        assert set(stage.shelves[1].sealed) == set(NAMES[1:10])
        assert set(stage.shelves[0].sealed) == {NAMES[0], *NAMES[10:25]}
        assert stage.arena.used_bytes == MIB


@in_virtual_time
async def test_a_block_is_announced_below_before_it_is_retracted_above() -> None:
    async with Stage([Disk(8 * MIB)], ON_EVICTION) as stage:
        stage.put(*NAMES[:4], length=QUARTER)
        stage.reserve([b"more"], QUARTER)
        await quiet()
        assert stage.log.of(NAMES[3]) == [
            ("sealed", "dram"), ("write", "tier0"), ("sealed", "tier0"), ("removed", "dram"),
        ]  # fmt: skip


@in_virtual_time
async def test_a_writer_that_finds_no_room_has_as_much_demoted_below_the_watermark() -> None:
    async with Stage([Disk(8 * MIB)], ON_EVICTION) as stage:
        for name in NAMES:
            stage.put(name)
        await quiet()
        assert not stage.shelves[1].sealed
        assert stage.reserve([b"more"], 2 * LENGTH).status == b"r"
        await quiet()
        assert len(stage.shelves[1].sealed) == 2
        grant = stage.reserve([b"more"], 2 * LENGTH)
        assert grant.status == b"g"
        stage.store.writers.abort(stage.holder, grant.lease.id)


@in_virtual_time
async def test_a_block_is_readable_while_it_is_demoted_and_an_acquire_wins() -> None:
    async with Stage([Disk(8 * MIB)], ON_EVICTION) as stage:
        stage.put(*NAMES[:4], length=QUARTER)
        stage.tier.holding = {"write"}
        stage.reserve([b"more"], QUARTER)
        await quiet()
        block = stage.block(NAMES[3])
        assert block.state is State.DEMOTING
        lease = stage.acquire(*NAMES[:4])
        assert len(lease.blocks) == 4
        assert block.state is State.SEALED
        stage.tier.release()
        await quiet()
        assert stage.in_arena(NAMES[3])
        assert stage.is_below(NAMES[3])
        assert stage.bytes_of(lease)[3] == content(NAMES[3], QUARTER)
        stage.release(lease)
        stage.tier.holding = set()
        assert stage.reserve([b"more"], QUARTER).status == b"g", "it is clean below, so it may leave at once"
        stage.store.end(stage.holder)


@in_virtual_time
async def test_a_parent_that_is_continued_while_it_is_demoted_stays() -> None:
    async with Stage([Disk(8 * MIB)], ON_EVICTION) as stage:
        stage.put(b"a", length=QUARTER)
        stage.put(b"b", b"c", length=QUARTER)
        stage.release(stage.acquire(b"b", b"c"))
        stage.tier.holding = {"write"}
        stage.reserve([b"more"], MIB)
        await quiet()
        assert stage.block(b"a").state is State.DEMOTING
        grant = stage.reserve([b"child"], LENGTH, parent=b"a")
        stage.tier.release()
        await quiet()
        assert stage.in_arena(b"a")
        assert stage.is_below(b"a")
        stage.fill(grant, [b"child"])
        assert stage.block(b"child").parent is stage.block(b"a")


@in_virtual_time
async def test_the_tail_of_a_prefix_is_demoted_before_its_head() -> None:
    async with Stage(
        [Disk(8 * MIB)], Rules(on_eviction=True, high_watermark=0.9, low_watermark=0.4)
    ) as stage:
        stage.put(*NAMES[:16])
        stage.put(*NAMES[16:28])
        assert not stage.lower.calls
        stage.put(NAMES[28])
        await until(lambda: not stage.lower.calls)
        for first, last in ((0, 16), (16, 28)):
            here = [stage.in_arena(name) for name in NAMES[first:last]]
            assert here == sorted(here, reverse=True)
        assert stage.arena.used_bytes <= 0.4 * 2 * MIB


@in_virtual_time
async def test_a_block_removed_while_it_is_demoted_is_gone_in_both_tiers() -> None:
    stage = Stage([Disk(8 * MIB)], ON_EVICTION)
    async with stage:
        stage.put(*NAMES[:4], length=QUARTER)
        stage.tier.holding = {"write"}
        stage.reserve([b"more"], QUARTER)
        await quiet()
        assert await stage.remove(NAMES[3]) == 1
        assert not stage.in_arena(NAMES[3])
        stage.tier.release()
        await quiet()
        assert not stage.is_below(NAMES[3])
        assert stage.memory.free_bytes == QUARTER
        assert await restarted(stage) == []


@in_virtual_time
async def test_a_demotion_that_fails_leaves_the_block_where_it_is_and_is_tried_again() -> None:
    async with Stage([Disk(8 * MIB)], ON_EVICTION) as stage:
        stage.put(*NAMES[:4], length=QUARTER)
        stage.disks[0].failures = 1
        stage.reserve([b"more"], QUARTER)
        await quiet()
        assert stage.lower.counters.failed_calls == 1
        assert stage.is_below(NAMES[3])
        assert not stage.in_arena(NAMES[3])


@in_virtual_time
async def test_what_a_tier_dropped_is_written_there_again_before_it_leaves_the_arena() -> None:
    async with Stage([Disk(2 * QUARTER)], ON_EVICTION) as stage:
        for name in NAMES[:4]:
            stage.put(name, length=QUARTER)
        for name in (b"x", b"y"):
            grant = await stage.reserve_waiting([name], QUARTER, 1.0)
            stage.fill(grant, [name])
        assert set(stage.shelves[1].sealed) == set(NAMES[:2])
        lease = await stage.acquiring(NAMES[0])
        stage.release(lease)
        for block in stage.shelves[0].sealed.values():
            assert block.owed or stage.is_below(block.key), block


# Promotion.


@in_virtual_time
async def test_a_load_that_several_wait_for_happens_once() -> None:
    async with Stage([await stored(b"a", b"b")]) as stage:
        stage.tier.holding = {"read"}
        readers = [stage.acquiring(b"a", b"b") for _ in range(5)]
        each = asyncio.ensure_future(
            patience.acquire_each(
                stage.store, stage.holder, [(stage.shelves, key) for key in (b"b", b"?", b"a", b"b")], 5.0
            )
        )
        await quiet()
        assert sum(len(call.transfers) for call in stage.tier.under_way("read")) == 2
        assert stage.block_state(b"a") is State.LOADING
        stage.tier.release()
        await quiet()
        for reader in readers:
            assert stage.bytes_of(ended(reader)) == [content(key, LENGTH) for key in (b"a", b"b")]
            stage.release(ended(reader))
        lease, found = ended(each)
        assert found == b"\1\0\1\1"
        assert stage.bytes_of(lease) == [content(key, LENGTH) for key in (b"b", b"a", b"b")]
        stage.release(lease)
        assert stage.lower.counters.read_blocks == 2


@in_virtual_time
async def test_a_reader_whose_time_is_over_gets_the_shorter_prefix_and_the_load_arrives() -> None:
    async with Stage([await stored(b"b")], Rules(timeout_s=60.0)) as stage:
        stage.put(b"a")
        stage.tier.holding = {"read"}
        lease = await stage.acquiring(b"a", b"b", wait_s=0.5)
        assert asyncio.get_running_loop().time() == pytest.approx(0.5)
        assert stage.bytes_of(lease) == [content(b"a", LENGTH)]
        stage.release(lease)
        stage.tier.release()
        await quiet()
        assert stage.in_arena(b"b")
        lease = stage.acquire(b"a", b"b")
        assert stage.bytes_of(lease) == [content(key, LENGTH) for key in (b"a", b"b")]
        stage.release(lease)


@in_virtual_time
async def test_a_late_load_is_given_up_at_once_and_its_slot_kept_until_it_has_ended() -> None:
    async with Stage([await stored(b"a", length=QUARTER)], Rules(timeout_s=2.0)) as stage:
        stage.tier.holding = {"read", "write"}
        reader = stage.acquiring(b"a", wait_s=30.0)
        await until(reader.done)
        assert asyncio.get_running_loop().time() == pytest.approx(2.0, abs=0.05)
        assert not ended(reader).blocks
        assert stage.lower.breaker.open
        assert stage.lower.counters.late_calls == 1
        assert stage.check() == []
        # The key is free for a writer, the memory is not.
        stage.put(b"a", b"b", b"c", length=QUARTER)
        lease = stage.acquire(b"a", b"b", b"c")
        assert stage.memory.free_bytes == 0
        stage.tier.under_way("read")[0].release()
        await quiet()
        assert stage.memory.free_bytes == QUARTER
        assert stage.bytes_of(lease) == [content(key, QUARTER) for key in (b"a", b"b", b"c")]
        assert stage.check() == []
        stage.release(lease)
        stage.tier.holding = set()
        await until(lambda: not stage.lower.breaker.open)


@in_virtual_time
async def test_a_tier_with_a_late_call_is_not_trusted_before_that_has_ended() -> None:
    async with Stage([await stored(b"a")]) as stage:
        stage.tier.holding = {"read"}
        await stage.acquiring(b"a", wait_s=30.0)
        await asyncio.sleep(60)
        assert stage.lower.breaker.open
        stage.tier.holding = set()
        await asyncio.sleep(60)
        assert stage.lower.breaker.open
        stage.tier.release()
        await until(lambda: not stage.lower.breaker.open)
        lease = await stage.acquiring(b"a")
        assert stage.bytes_of(lease) == [content(b"a", LENGTH)]
        stage.release(lease)


@in_virtual_time
async def test_a_late_load_is_taken_from_the_next_tier() -> None:
    disks = [await stored(b"a"), await stored(b"a")]
    async with Stage(disks, media=[Medium.NVME, Medium.REMOTE]) as stage:
        stage.tier.holding = {"read"}
        reader = stage.acquiring(b"a", wait_s=30.0)
        await until(reader.done)
        assert stage.bytes_of(ended(reader)) == [content(b"a", LENGTH)]
        assert asyncio.get_running_loop().time() < 3
        stage.release(ended(reader))


@in_virtual_time
async def test_a_block_removed_while_it_is_loaded_is_a_miss_and_does_not_come_back() -> None:
    stage = Stage([await stored(b"a", b"b")])
    async with stage:
        stage.tier.holding = {"read"}
        reader = stage.acquiring(b"a", b"b")
        await quiet()
        assert await stage.remove(b"a") == 1
        await quiet()
        assert not ended(reader).blocks
        stage.put(b"a", version=2)
        stage.tier.release()
        await quiet()
        lease = stage.acquire(b"a", b"b")
        assert stage.bytes_of(lease) == [content(b"a", LENGTH, 2), content(b"b", LENGTH)]
        stage.release(lease)
        await stage.remove(b"a")
        assert stage.check() == []
        following = await stage.crash()
    async with following:
        assert list(following.shelves[1].sealed) == [b"b"]


@in_virtual_time
async def test_a_block_removed_while_it_is_pinned_stays_for_its_reader_alone() -> None:
    stage = Stage([await stored(b"a")])
    async with stage:
        lease = await stage.acquiring(b"a")
        assert await stage.remove(b"a") == 1
        stage.put(b"a", version=2)
        for name in NAMES[:16]:
            stage.put(name, length=QUARTER // 2)
            await quiet()
        assert stage.bytes_of(lease) == [content(b"a", LENGTH)]
        assert stage.check() == []
        stage.release(lease)
        assert stage.arena.directory.statistics().doomed_blocks == 0


@in_virtual_time
async def test_a_block_removed_in_the_tier_while_it_is_read_there_keeps_its_place_until_the_end() -> None:
    async with Stage([await stored(b"a", length=QUARTER, capacity=2 * QUARTER)]) as stage:
        stage.tier.holding = {"read"}
        stage.acquiring(b"a")
        await quiet()
        await stage.remove(b"a")
        stage.put(b"b", length=QUARTER)
        stage.put(b"c", length=QUARTER)
        await quiet()
        assert len(stage.shelves[1].sealed) == 1, "the other half is still being read"
        stage.tier.release()
        await quiet()
        assert stage.tier.free_bytes == QUARTER
        assert stage.check() == []


@in_virtual_time
async def test_blocks_that_an_acquire_needs_are_not_evicted_to_load_its_others() -> None:
    async with Stage([await stored(b"tail", length=QUARTER)]) as stage:
        stage.put(b"head", length=QUARTER)
        for name in NAMES[:3]:
            stage.put(name, length=QUARTER)
        await quiet()
        lease = await stage.acquiring(b"head", b"tail")
        assert stage.bytes_of(lease) == [content(b"head", QUARTER), content(b"tail", QUARTER)]
        stage.release(lease)
        lease, found = await patience.acquire_each(
            stage.store, stage.holder, [(stage.shelves, key) for key in (NAMES[0], b"head", b"tail")], 5.0
        )
        assert found == b"\1\1\1"
        stage.release(lease)


@in_virtual_time
async def test_blocks_behind_a_hole_are_not_evicted_for_what_fills_it() -> None:
    async with Stage([await stored(b"a", length=QUARTER)]) as stage:
        for name in (b"b", *NAMES[:3]):
            stage.put(name, length=QUARTER)
            await quiet()
        lease = await stage.acquiring(b"a", b"b")
        assert stage.bytes_of(lease) == [content(b"a", QUARTER), content(b"b", QUARTER)]
        assert stage.lower.counters.read_blocks == 1
        stage.release(lease)


@in_virtual_time
async def test_no_more_than_a_quarter_of_the_arena_is_loading_at_once() -> None:
    async with Stage([await stored(*NAMES[:16], length=128 * KIB, capacity=8 * MIB)]) as stage:
        stage.tier.holding = {"read"}
        reader = stage.acquiring(*NAMES[:12], wait_s=30.0)
        other = stage.acquiring(*NAMES[12:16], wait_s=30.0)
        for _ in range(32):
            await quiet()
            loading = [b for b in stage.arena.directory.all_blocks() if b.state is State.LOADING]
            assert sum(block.length for block in loading) <= QUARTER
            if not stage.tier.calls:
                break
            stage.tier.calls[-1].release()
        assert len(ended(reader).blocks) == 12
        assert len(ended(other).blocks) == 4
        stage.release(ended(reader))
        stage.release(ended(other))


@in_virtual_time
async def test_cancelling_a_reader_that_waits_releases_what_it_has() -> None:
    async with Stage([await stored(b"b")]) as stage:
        stage.put(b"a")
        stage.tier.holding = {"read"}
        reader = stage.acquiring(b"a", b"b")
        await quiet()
        assert stage.holder.pinned_bytes == LENGTH
        reader.cancel()
        await quiet()
        assert reader.cancelled()
        assert (stage.holder.pinned_bytes, stage.holder.reads) == (0, {})
        stage.tier.release()
        await quiet()
        assert stage.in_arena(b"b")


@in_virtual_time
async def test_a_reader_waits_for_a_writer_and_has_its_miss_when_that_aborts() -> None:
    async with Stage([Disk(MIB)]) as stage:
        grant = stage.reserve([b"a", b"b"], LENGTH)
        reader = stage.acquiring(b"a", b"b")
        await quiet()
        assert not reader.done()
        view = stage.memory.view(grant.slots[0])
        view[:LENGTH] = content(b"a", LENGTH)
        stage.store.writers.commit(stage.holder, grant.lease.id, [0])
        await quiet()
        assert not reader.done()
        stage.store.writers.abort(stage.holder, grant.lease.id)
        await quiet()
        assert stage.bytes_of(ended(reader)) == [content(b"a", LENGTH)]
        stage.release(ended(reader))


@in_virtual_time
async def test_a_key_that_nobody_has_is_a_miss_at_once() -> None:
    async with Stage([await stored(b"b")]) as stage:
        lease = await stage.acquiring(b"a", b"b")
        assert not lease.blocks
        assert asyncio.get_running_loop().time() == 0
        assert not stage.in_arena(b"b")


@in_virtual_time
async def test_a_key_with_another_length_is_busy_until_it_can_be_read_in_some_tier() -> None:
    async with Stage([await stored(b"below")]) as stage:
        stage.tier.holding = {"read", "write"}
        loading = stage.acquiring(b"below")
        await quiet()
        assert stage.block_state(b"below") is State.LOADING
        assert stage.reserve([b"below"], LENGTH).status == b"b"
        with pytest.raises(InvalidRequest, match=f"is here with {LENGTH} bytes"):
            stage.reserve([b"below"], KIB)
        writing = stage.reserve([b"new"], LENGTH)
        assert stage.reserve([b"new"], KIB).status == b"b"
        # Removed while it is loaded: what comes of that nobody will read.
        removing = asyncio.ensure_future(stage.remove(b"below"))
        await quiet()
        anew = stage.reserve([b"below"], KIB)
        assert anew.status == b"g"
        stage.tier.holding = set()
        stage.tier.release()
        assert await removing == 1
        assert (await loading).blocks == []
        stage.fill(writing, [b"new"])
        stage.fill(anew, [b"below"])
        for key, length in ((b"new", KIB), (b"below", LENGTH)):
            with pytest.raises(InvalidRequest, match=f"nbytes is {length} for key {key.hex()}"):
                stage.reserve([key], length)


@in_virtual_time
async def test_a_damaged_block_is_a_miss_and_dropped_and_the_others_arrive() -> None:
    stage = Stage([await stored(b"a", b"b", b"c")])
    async with stage:
        stage.disks[0].damage(stage.shelves[1].sealed[b"b"].record)
        lease = await stage.acquiring(b"a", b"b", b"c")
        assert stage.bytes_of(lease) == [content(b"a", LENGTH)]
        stage.release(lease)
        assert not stage.is_below(b"b")
        assert stage.in_arena(b"c")
        assert stage.lower.counters.damaged_blocks == 1
        assert not stage.lower.breaker.open
        await stage.remove()
        assert sorted(await restarted(stage)) == [b"a", b"c"]


@in_virtual_time
async def test_damage_below_does_not_touch_the_copy_in_the_arena() -> None:
    async with Stage([Disk(8 * MIB)]) as stage:
        stage.put(b"a")
        await quiet()
        stage.disks[0].damage(stage.shelves[1].sealed[b"a"].record)
        verified = await Verification(stage.lower).page(0)
        assert len(verified.damaged) == 1
        assert not stage.is_below(b"a")
        lease = stage.acquire(b"a")
        assert stage.bytes_of(lease) == [content(b"a", LENGTH)]
        stage.release(lease)


@in_virtual_time
async def test_a_read_that_fails_is_a_miss_at_once_and_may_go_well_the_next_time() -> None:
    async with Stage([await stored(b"a", b"b", length=QUARTER)]) as stage:
        stage.tier.holding = {"read"}
        reader = stage.acquiring(b"a", b"b", wait_s=0.0)
        await quiet()
        reader = stage.acquiring(b"a", wait_s=30.0)
        await quiet()
        for call in stage.tier.under_way("read"):
            call.fail()
        stage.tier.holding = set()
        await quiet()
        assert stage.bytes_of(ended(reader)) == [content(b"a", QUARTER)]
        assert stage.lower.counters.failed_calls == 1
        stage.release(ended(reader))


@in_virtual_time
async def test_an_exclusive_tier_gives_up_what_was_promoted_and_gets_it_back() -> None:
    async with Stage([await stored(b"a", length=QUARTER)], Rules(on_eviction=True, exclusive=True)) as stage:
        lease = await stage.acquiring(b"a")
        assert not stage.is_below(b"a")
        assert stage.block(b"a").owed == 1
        stage.release(lease)
        for name in NAMES[:4]:
            grant = await stage.reserve_waiting([name], QUARTER, 1.0)
            stage.fill(grant, [name])
        await quiet()
        assert (stage.in_arena(b"a"), stage.is_below(b"a")) == (False, True)


@in_virtual_time
async def test_a_reader_has_what_it_waited_for_before_an_exclusive_tier_takes_it_back() -> None:
    disk = await stored(b"a", length=QUARTER)
    rules = Rules(on_eviction=True, exclusive=True, high_watermark=0.6, low_watermark=0.3)
    async with Stage([disk], rules) as stage:
        grant = stage.reserve([b"x", b"y"], QUARTER)  # with "a" that is too much, and only "a" may leave
        lease = await stage.acquiring(b"a")
        assert stage.bytes_of(lease) == [content(b"a", QUARTER)]
        assert stage.lower.counters.read_blocks == 1
        stage.release(lease)
        stage.store.writers.abort(stage.holder, grant.lease.id)


@in_virtual_time
async def test_an_inclusive_tier_keeps_what_was_promoted() -> None:
    async with Stage([await stored(b"a")], ON_EVICTION) as stage:
        stage.release(await stage.acquiring(b"a"))
        assert stage.is_below(b"a")
        assert stage.block(b"a").owed == 0


# Tiers that fail.


@in_virtual_time
async def test_three_failures_open_the_breaker_and_what_was_owed_may_leave() -> None:
    async with Stage([Disk(8 * MIB)]) as stage:
        stage.disks[0].failures = 1e9
        stage.put(*NAMES[:4], length=QUARTER)
        await quiet()
        assert stage.lower.counters.failed_calls == FAILURES_MAX
        assert stage.lower.breaker.open
        assert [block.owed for block in stage.shelves[0].sealed.values()] == [0] * 4
        stage.put(b"new", length=QUARTER)
        assert stage.lower.counters.dropped_blocks == 1
        assert not stage.in_arena(NAMES[3])
        # What is still in the arena is written once the tier is back.
        stage.disks[0].failures = 0
        await until(lambda: not stage.lower.breaker.open)
        await quiet()
        assert set(stage.shelves[1].sealed) == {*NAMES[:3], b"new"}
        assert stage.lower.breaker.opened == 1


@in_virtual_time
async def test_a_late_write_opens_the_breaker_and_the_arena_goes_on_without_its_memory() -> None:
    async with Stage([Disk(8 * MIB)], Rules(jobs=1)) as stage:
        stage.tier.holding = {"write"}
        for name in NAMES[:4]:
            stage.put(name, length=QUARTER)
        await until(lambda: stage.lower.breaker.open)
        assert asyncio.get_running_loop().time() == pytest.approx(2.0, abs=0.05)
        await quiet()
        (writing,) = [b for b in stage.shelves[0].sealed.values() if b.copies]
        for name in NAMES[4:12]:
            stage.put(name, length=QUARTER)
            assert stage.in_arena(writing.key)
        stage.tier.holding = set()
        stage.tier.release()
        await until(lambda: not stage.lower.breaker.open)
        await quiet()
        assert stage.is_below(writing.key)
        assert not stage.lower.unwritten


@in_virtual_time
async def test_a_failing_tier_is_a_miss_at_once_and_its_blocks_may_be_written_anew() -> None:
    async with Stage([await stored(b"a", b"b")]) as stage:
        stage.disks[0].failures = 1e9
        for _ in range(FAILURES_MAX):
            await stage.acquiring(b"a", wait_s=0.01)
        await until(lambda: stage.lower.breaker.open)
        before = asyncio.get_running_loop().time()
        assert not (await stage.acquiring(b"a", b"b")).blocks
        assert asyncio.get_running_loop().time() == before
        stage.put(b"a", b"b")
        stage.disks[0].failures = 0
        await until(lambda: not stage.lower.breaker.open)
        assert stage.disks[0].keys() == [b"a", b"b"]


@in_virtual_time
async def test_a_removal_that_a_failing_tier_cannot_make_lasting_says_so_and_is_made_good() -> None:
    stage = Stage([await stored(b"a", b"b")])
    async with stage:
        stage.tier.holding = {"flush"}
        removing = asyncio.ensure_future(stage.remove(b"a"))
        await quiet()
        assert not stage.is_below(b"a")
        stage.disks[0].failures = 1
        stage.tier.release()
        stage.tier.holding = set()
        with pytest.raises(TierError, match="tier0 fails: until it is back, a restart of the daemon may"):
            await removing
        assert b"a" in stage.disks[0].keys()  # noqa: SIM118
        await until(lambda: stage.disks[0].keys() == [b"b"])
        assert stage.check() == []
        assert await restarted(stage) == [b"b"]


@in_virtual_time
async def test_a_removal_waits_no_longer_for_a_hanging_tier_than_a_call_may_take() -> None:
    async with Stage([await stored(b"a")]) as stage:
        stage.tier.holding = {"flush"}
        with pytest.raises(TierError, match="1 keys are hidden, but tier tier0 fails"):
            await stage.remove(b"a")
        assert asyncio.get_running_loop().time() == pytest.approx(2.0, abs=0.05)
        assert stage.lower.breaker.open
        stage.tier.holding = set()
        stage.tier.release()
        await until(lambda: not stage.lower.breaker.open)
        assert stage.disks[0].keys() == []


@in_virtual_time
async def test_what_is_removed_before_a_tier_is_open_does_not_appear_with_it() -> None:
    disk = await stored(b"a", b"b")
    disk.failures = 1
    stage = Stage([disk])
    async with stage:
        assert stage.lower.breaker.open
        with pytest.raises(TierError, match="tier0 fails"):
            await stage.remove(b"a")
        await until(lambda: not stage.lower.breaker.open)
        assert list(stage.shelves[1].sealed) == [b"b"]
        assert await restarted(stage) == [b"b"]


@in_virtual_time
async def test_a_tier_that_hangs_at_the_start_is_left_alone_and_opened_later() -> None:
    stage = Stage([await stored(b"a")])
    stage.tier.holding = {"recover"}
    async with stage:
        assert stage.lower.breaker.open
        stage.put(b"b")
        assert not (await stage.acquiring(b"a")).blocks
        stage.tier.release()
        await until(lambda: not stage.lower.breaker.open)
        await quiet()
        assert set(stage.shelves[1].sealed) == {b"a", b"b"}


@in_virtual_time
async def test_a_disk_that_was_replaced_is_opened_anew_and_nothing_of_the_old_one_is_read() -> None:
    other = await stored(b"c", version=3)
    async with Stage([await stored(b"a", b"b", b"c")]) as stage:
        disk = stage.disks[0]
        disk.identity, disk.data, disk.records = other.identity, other.data, other.records
        # Until it is noticed, checksums tell.
        lease = await stage.acquiring(b"a")
        assert not lease.blocks
        await until(lambda: stage.lower.breaker.open)
        await until(lambda: not stage.lower.breaker.open)
        assert list(stage.shelves[1].sealed) == [b"c"]
        lease = await stage.acquiring(b"c")
        assert stage.bytes_of(lease) == [content(b"c", LENGTH, 3)]
        stage.release(lease)
        assert stage.log.of(b"b") == [("sealed", "tier0"), ("removed", "tier0")]


@in_virtual_time
async def test_blocks_are_recovered_oldest_first_and_those_leave_first() -> None:
    disk = Disk(4 * LENGTH)
    async with Stage([disk]) as stage:
        for name in NAMES[:4]:
            stage.put(name)
            await quiet()
    async with Stage([disk]) as stage:
        assert list(stage.shelves[1].sealed) == NAMES[:4]
        assert stage.lower.counters.recovered_blocks == 4
        stage.put(b"new")
        await quiet()
        assert list(stage.shelves[1].sealed) == [*NAMES[1:4], b"new"]


@in_virtual_time
async def test_namespaces_are_told_apart_below() -> None:
    tenant = Namespace(model="scripted", salt="tenant")
    disk = await stored(b"a")
    async with Stage([disk]) as stage:
        shelves = shelves_of(stage, tenant)
        lease = await patience.acquire(stage.store, stage.holder, shelves, [b"a"], 1.0)
        assert not lease.blocks
        count, lasting = stage.store.remove(shelves, [b"a"])
        assert lasting is not None
        await lasting
        assert count == 0
        assert stage.is_below(b"a")
    assert [s.namespace for s in disk.records.values()] == [NAMESPACE]


@in_virtual_time
async def test_a_stop_writes_what_is_owed_and_leaves_without_what_hangs() -> None:
    disk = Disk(8 * MIB)
    async with Stage([disk], Rules(jobs=1)) as stage:
        for name in NAMES[:20]:
            stage.put(name)
    assert disk.keys() == NAMES[:20]
    stage = Stage([disk])
    await stage.__aenter__()
    stage.tier.holding = {"write"}
    stage.put(b"hangs")
    await quiet()
    assert not await stage.store.movements.stop()
    stage.close()


# Found by looking, not repaired yet: each is a promise that is broken.


@in_virtual_time
async def test_a_block_committed_before_it_was_recovered_is_below_once() -> None:
    disk = await stored(b"a")
    disk.failures = 1
    async with Stage([disk]) as stage:
        assert stage.lower.breaker.open
        stage.put(b"a")
        await until(lambda: not stage.lower.breaker.open)
        await quiet()
        assert stage.check() == []


@in_virtual_time
async def test_a_removal_stays_whose_client_left_at_once() -> None:
    disk = await stored(b"a")
    disk.failures = 1
    async with Stage([disk]) as stage:
        _, lasting = stage.store.remove(stage.shelves, [b"a"])
        lasting.close()  # type: ignore[union-attr]
        await until(lambda: not stage.lower.breaker.open)
        assert not stage.is_below(b"a")


@in_virtual_time
async def test_a_block_removed_when_its_tier_has_just_been_read_does_not_appear() -> None:
    for turns in range(6):
        disk = await stored(b"a")
        disk.failures = 1
        async with Stage([disk]) as stage:
            stage.tier.holding = {"recover"}
            await until(lambda: stage.tier.under_way("recover"))
            stage.tier.release()
            stage.tier.holding = set()
            for _ in range(turns):
                await asyncio.sleep(0)
            _, lasting = stage.store.remove(stage.shelves, [b"a"])
            assert lasting is not None
            with suppress(TierError):
                await lasting
            await until(lambda: not stage.lower.breaker.open)
            assert not stage.is_below(b"a"), f"removed {turns} turns after the tier was read"


@in_virtual_time
async def test_a_tier_is_opened_anew_though_blocks_are_removed_meanwhile() -> None:
    async with Stage([Disk(4 * MIB)]) as stage:
        for number in range(300):
            stage.put(b"%d" % number, length=1)
        await quiet()
        stage.tier.holding = {"same"}
        await until(lambda: stage.tier.under_way("same"))
        stage.disks[0].replace()
        stage.tier.holding = set()
        stage.tier.release()
        while stage.is_below(b"0"):
            await asyncio.sleep(0)
        assert stage.is_below(b"299"), "this is no longer amid it"
        stage.store.remove(stage.shelves, [b"299"])[1].close()  # type: ignore[union-attr]
        await until(lambda: not stage.lower.breaker.open)


@in_virtual_time
async def test_a_verification_whose_client_left_lets_go() -> None:
    async with Stage([await stored(b"a")]) as stage:
        stage.tier.holding = {"read"}
        verifying = asyncio.ensure_future(Verification(stage.lower).page(0))
        await quiet()
        verifying.cancel()
        await quiet()
        assert stage.shelves[1].sealed[b"a"].pins == 1, "it is still read"
        stage.tier.release()
        await quiet()
        assert (stage.lower.calls, stage.shelves[1].sealed[b"a"].pins) == (0, 0)


@in_virtual_time
async def test_a_block_that_a_reader_waits_for_does_not_leave_its_tier_for_it() -> None:
    disk = Disk(4 * QUARTER)
    async with Stage([disk]) as stage:
        for name, length in ((b"old", 2 * QUARTER), (b"x", QUARTER), (b"y", QUARTER)):
            stage.put(name, length=length)
            await quiet()
    async with Stage([disk], ON_EVICTION) as stage:
        stage.put(*NAMES[:4], length=QUARTER)
        lease = await stage.acquiring(b"old")
        assert stage.bytes_of(lease) == [content(b"old", 2 * QUARTER)]
        stage.release(lease)


@in_virtual_time
async def test_a_reader_at_its_limit_does_not_wait() -> None:
    async with Stage([await stored(b"a", length=QUARTER)]) as stage:
        holder = stage.hold(fraction=0.1)
        lease = await stage.acquiring(b"a", holder=holder)
        assert lease.limited
        assert asyncio.get_running_loop().time() == 0


@in_virtual_time
async def test_all_is_well_while_a_tier_is_opened_anew() -> None:
    async with Stage([await stored(b"a")]) as stage:
        stage.disks[0].replace()
        stage.tier.holding = {"recover"}
        await until(lambda: stage.tier.under_way("recover"))
        assert stage.check() == []


@in_virtual_time
async def test_what_the_arena_has_is_written_to_a_disk_that_was_replaced() -> None:
    async with Stage([Disk(8 * MIB)], ON_EVICTION) as stage:
        stage.put(*NAMES[:4], length=QUARTER)
        stage.tier.holding = {"write"}
        stage.reserve([b"more"], QUARTER)
        await quiet()
        stage.release(stage.acquire(*NAMES[:4]))
        stage.tier.release()
        stage.tier.holding = set()
        await quiet()
        stage.disks[0].replace()
        await until(lambda: stage.lower.breaker.open)
        await until(lambda: not stage.lower.breaker.open)
        assert all(block.owed or stage.is_below(block.key) for block in stage.shelves[0].sealed.values())


@in_virtual_time
async def test_items_of_one_request_do_not_drive_each_other_out() -> None:
    disk = Disk(8 * MIB)
    async with Stage([disk]) as stage:
        for name in (b"a", b"b"):
            stage.put(name, length=3 * QUARTER)
            await quiet()
    async with Stage([disk]) as stage:
        items = [(stage.shelves, key) for key in (b"a", b"b")]
        lease, found = await patience.acquire_each(stage.store, stage.holder, items, 5.0)
        assert found in (b"\1\0", b"\0\1")
        assert stage.lower.counters.read_blocks == 1
        stage.release(lease)


@in_virtual_time
async def test_room_is_made_of_blocks_whose_parents_are_colder() -> None:
    async with Stage([]) as stage:
        for name in (b"gap", b"parent 2", b"parent 1"):
            stage.put(name, length=QUARTER)
        await stage.remove(b"gap")
        # By address: child 1, parent 2, parent 1, child 2.
        stage.put(b"child 2", length=QUARTER, parent=b"parent 2")
        stage.put(b"child 1", length=QUARTER, parent=b"parent 1")
        offsets = [stage.block(b"%s" % name).slot.offset for name in (b"child 1", b"parent 2", b"parent 1")]
        assert offsets == [0, QUARTER, 2 * QUARTER]
        for name in (b"parent 1", b"parent 2", b"child 1", b"child 2"):
            stage.release(stage.acquire(name))
        grant = stage.reserve([b"large"], 2 * QUARTER)
        assert grant.status == b"g"
        stage.store.end(stage.holder)


@in_virtual_time
async def test_blocks_are_not_written_again_and_again_while_a_call_hangs() -> None:
    rules = Rules(on_eviction=True, high_watermark=0.6, low_watermark=0.5, jobs=1)
    async with Stage([Disk(QUARTER), Disk(QUARTER)], rules) as stage:
        stage.tier.holding = {"write"}
        chains = (
            ((b"a", 262_144), (b"b", 700_000), (b"c", 262_144), (b"d", 1)),
            ((b"e", 300_000), (b"f", 4097)),
        )
        for chain in chains:
            lengths = [length for _, length in chain]
            keys = [key for key, _ in chain]
            grant = stage.store.writers.reserve(stage.holder, stage.shelves, keys, lengths)
            stage.fill(grant, keys)
        for _ in range(300):
            await asyncio.sleep(0)
        writes = sum(line[0] == "write" for line in stage.log.lines)
        stage.tier.holding = set()
        stage.tier.release()
        assert writes < 20


@in_virtual_time
async def test_a_reader_is_served_when_a_verification_has_ended() -> None:
    async with Stage([await stored(b"a")], Rules(jobs=1)) as stage:
        stage.tier.holding = {"read"}
        verifying = asyncio.ensure_future(Verification(stage.lower).page(0))
        await quiet()
        reader = stage.acquiring(b"a")
        await quiet()
        stage.tier.holding = set()
        stage.tier.release()
        await quiet()
        assert ended(verifying).blocks == 1
        assert stage.bytes_of(ended(reader)) == [content(b"a", LENGTH)]
        stage.release(ended(reader))


@in_virtual_time
async def test_a_tier_is_not_opened_anew_while_its_probe_reads() -> None:
    async with Stage([await stored(b"a")]) as stage:
        stage.disks[0].failures = 1e9
        for _ in range(FAILURES_MAX):
            await stage.acquiring(b"a", wait_s=0.01)
        await until(lambda: stage.lower.breaker.open)
        stage.disks[0].failures = 0
        stage.tier.holding = {"read"}
        await until(lambda: stage.tier.under_way("read"))
        stage.disks[0].replace()
        await asyncio.sleep(60)
        assert stage.tier.wrong == []


@in_virtual_time
async def test_a_block_that_is_asked_for_twice_in_one_request_is_loaded_once() -> None:
    async with Stage([await stored(b"a")]) as stage:
        stage.tier.holding = {"read"}
        items = [(stage.shelves, b"a")] * 2
        each = asyncio.ensure_future(patience.acquire_each(stage.store, stage.holder, items, 5.0))
        await quiet()
        assert stage.check() == []
        stage.tier.release()
        await quiet()
        lease, found = ended(each)
        assert found == b"\1\1"
        assert stage.lower.counters.read_blocks == 1
        stage.release(lease)
