"""Draining a node: nothing new, everything below, readers go on, and whoever asked may go."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore import protocol
from kvstore.block import Medium, Namespace
from kvstore.errors import DeadlineExceeded, ProtocolError, TierError
from kvstore.node.drain import Remains
from kvstore.node.rules import Rules
from tests.node import Node, RawConnection, wait_for
from tests.scripted import MIB, Disk, Stage, content, in_virtual_time, quiet
from tests.test_cli import Command, on
from tests.test_http import get

LENGTH = 64 << 10
NAMESPACE = Namespace(model="drained")
NONE_LEFT = Remains(0, 0, 0)
REDIS = '[redis]\nurl = "redis://127.0.0.1:1"\nenabled = false\n'
OFF = "tier redis is turned off"


def open_writes(stage: Stage) -> int:
    return len(stage.holder.writes)


async def drained(stage: Stage, wait_s: float = 10.0) -> Remains:
    return await stage.store.drain.wait(lambda: open_writes(stage), wait_s)


@pytest.mark.parametrize(
    "rules",
    [Rules(), Rules(on_eviction=True), Rules(admit_hits=3), Rules(on_eviction=True, exclusive=True)],
    ids=["behind", "on-eviction", "admitted by hits", "exclusive"],
)
@in_virtual_time
async def test_what_only_the_arena_has_is_written_below_and_stays_readable(rules: Rules) -> None:
    async with Stage([Disk(8 * MIB)], rules) as stage:
        stage.put(b"a", b"b", b"c")
        pinned = stage.acquire(b"a")
        stage.store.drain.begin()
        assert await drained(stage) == NONE_LEFT
        assert sorted(stage.disks[0].keys()) == [b"a", b"b", b"c"]
        assert stage.bytes_of(stage.acquire(b"a", b"b", b"c")) == [
            content(key, LENGTH) for key in (b"a", b"b", b"c")
        ]
        stage.release(pinned)
        stage.store.end(stage.holder)


@in_virtual_time
async def test_a_draining_node_refuses_at_once_what_is_new_and_says_present_of_what_is_not() -> None:
    async with Stage([Disk(8 * MIB)]) as stage:
        stage.put(b"a")
        await quiet()
        stage.store.drain.begin()
        assert stage.reserve([b"a", b"b"], LENGTH).status == b"pr"
        assert (await stage.reserve_waiting([b"b"], LENGTH, 60.0)).status == b"r"


@in_virtual_time
async def test_who_waits_for_room_when_it_begins_is_refused_then() -> None:
    async with Stage([Disk(8 * MIB)]) as stage:
        stage.tier.holding = {"write"}
        stage.put(*[b"%d" % number for number in range(32)])  # all of the arena, and all of it owed
        waiting = asyncio.ensure_future(stage.reserve_waiting([b"more"], LENGTH, 60.0))
        await quiet()
        assert not waiting.done()
        stage.store.drain.begin()
        await quiet()
        assert waiting.result().status == b"r"


@in_virtual_time
async def test_it_is_over_only_when_writers_have_committed_and_that_is_below_too() -> None:
    async with Stage([Disk(8 * MIB)]) as stage:
        grant = stage.reserve([b"late"], LENGTH)
        stage.store.drain.begin()
        assert await drained(stage, 1.0) == Remains(0, 0, 1, over=False)
        stage.fill(grant, [b"late"])
        assert await drained(stage) == NONE_LEFT
        assert stage.disks[0].keys() == [b"late"]


@in_virtual_time
async def test_what_remains_is_said_when_the_time_is_over_and_it_drains_on() -> None:
    async with Stage([Disk(8 * MIB)], Rules(timeout_s=60)) as stage:
        stage.tier.holding = {"write"}
        stage.put(b"a", b"b")
        stage.store.drain.begin()
        stage.store.drain.begin()  # once is enough
        assert await drained(stage, 1.0) == Remains(2, 2 * LENGTH, 0, owed_blocks=2, over=False)
        assert stage.store.drain.under_way
        stage.tier.holding = set()
        stage.tier.release()
        assert await drained(stage) == NONE_LEFT


@in_virtual_time
async def test_cancelled_it_goes_by_its_rules_again() -> None:
    rules = Rules(on_eviction=True, admit_hits=2, exclusive=True)
    async with Stage([Disk(8 * MIB)], rules) as stage:
        stage.store.drain.begin()
        assert stage.lower.rules != rules
        stage.store.drain.cancel()
        stage.store.drain.cancel()
        assert stage.lower.rules == rules
        stage.put(b"a")
        await quiet()
        assert stage.disks[0].keys() == []


@in_virtual_time
async def test_rules_that_change_while_it_drains_hold_once_it_is_cancelled() -> None:
    async with Stage([Disk(8 * MIB)], Rules(admit_hits=2)) as stage:
        stage.store.drain.begin()
        stage.store.movements.set_rules(stage.lower, Rules(admit_hits=1, timeout_s=7))
        assert (stage.lower.rules.admit_hits, stage.lower.rules.timeout_s) == (0, 7)
        stage.store.drain.cancel()
        assert stage.lower.rules == Rules(admit_hits=1, timeout_s=7)


@in_virtual_time
async def test_a_tier_that_fails_keeps_it_from_ending_until_it_is_back() -> None:
    async with Stage([Disk(8 * MIB)]) as stage:
        stage.lower.turn(on=False)
        stage.put(b"a")
        stage.store.drain.begin()
        assert await drained(stage, 1.0) == Remains(
            1, LENGTH, 0, away=("tier tier0 is turned off",), over=False
        )
        stage.lower.turn(on=True)
        assert await drained(stage) == NONE_LEFT


@in_virtual_time
async def test_a_tier_that_is_away_is_not_waited_for_where_another_has_everything(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with Stage([Disk(8 * MIB), Disk(8 * MIB)], media=[Medium.NVME, Medium.REMOTE]) as stage:
        stage.lowers[1].trip("it is gone")
        stage.tier.holding = {"write"}
        stage.put(b"a", b"b")
        stage.store.drain.begin()
        away = ("tier tier1 fails: it is gone",)
        assert await drained(stage, 0.2) == Remains(2, 2 * LENGTH, 0, 2, away, over=False)
        stage.tier.holding = set()
        stage.tier.release()
        assert await drained(stage, 0.2) == Remains(0, 0, 0, 0, away)
        end = "drained: 0 blocks (0 bytes) are in no tier below, 0 are owed below, 0 writes are open"
        assert caplog.messages[-1] == f"{end}; {away[0]}"


@in_virtual_time
async def test_what_one_tier_has_another_that_works_is_still_to_get() -> None:
    async with Stage([Disk(8 * MIB), Disk(8 * MIB)], media=[Medium.NVME, Medium.REMOTE]) as stage:
        stage.tiers[1].holding = {"write"}
        stage.put(b"a")
        stage.store.drain.begin()
        assert await drained(stage, 1.0) == Remains(0, 0, 0, owed_blocks=1, over=False)
        stage.tiers[1].holding = set()
        stage.tiers[1].release()
        assert await drained(stage) == NONE_LEFT


@in_virtual_time
async def test_a_block_that_no_tier_can_take_is_named_and_not_waited_for() -> None:
    async with Stage([Disk(MIB)]) as stage:
        stage.put(b"long", length=MIB + LENGTH)
        stage.store.drain.begin()
        assert await drained(stage, 3600.0) == Remains(1, MIB + LENGTH, 0)


# A daemon.


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A daemon that writes to its disk only when it must, and whose Redis is turned off."""
    folder = tmp_path_factory.mktemp("drain")
    config = folder / "node.toml"
    config.write_text(f'[nvme]\ndirectories = ["{folder}/nvme:64MiB"]\nwrite = "on-eviction"\n' + REDIS)
    with Node("16MiB", "--config", str(config)) as node:
        yield node
        node.check()
        assert "Traceback" not in node.log, node.log


def test_the_command_waits_until_all_is_below_and_can_be_undone(node: Node) -> None:
    with node.client() as store:
        store.put(NAMESPACE, b"one", b"bytes")
        write = store.reserve(NAMESPACE, [b"two"], 5)
        late = Command("drain", *on(node), "--timeout", "0")
        assert (late.status, late.error) == (1, "")
        assert late.output.decode().endswith(f"1 writers are not done; {OFF}\n")
        status, text = get(node, "/readyz")
        assert (status, text.split(",")[0]) == (503, "draining")
        with pytest.raises(DeadlineExceeded, match="the node drains and takes nothing new; "):
            store.put(NAMESPACE, b"three", b"bytes", timeout_s=60)
        write.commit()
        assert Command("drain", *on(node)).text.splitlines()[-1] == f"drained: everything is below; {OFF}"
        assert store.get(NAMESPACE, b"one") == b"bytes"
        assert store.statistics().tiers[1].blocks == 2
        assert Command("drain", *on(node), "--cancel").text == "takes new blocks again\n"
        store.put(NAMESPACE, b"three", b"bytes")
        assert get(node, "/readyz") == (200, f"ready; {OFF}\n")


def test_a_removal_that_is_not_lasting_says_which_tier_is_turned_off(node: Node) -> None:
    with node.client() as store, pytest.raises(TierError, match=f"are hidden, but {OFF}: until it is back"):
        store.remove(NAMESPACE, [b"one"])


def test_it_outlives_the_client_that_asked(node: Node) -> None:
    with node.client() as store, store.reserve(NAMESPACE, [b"open"], 5):
        with RawConnection(node.socket) as raw:
            raw.send(protocol.frame(1, protocol.Drain(60.0)))
            wait_for(lambda: (now := store.statistics()).draining and not now.tiers[1].backlog_blocks)
        assert store.statistics().draining
        # Somebody else who waits is answered when it is cancelled.
        with RawConnection(node.socket) as raw:
            raw.send(protocol.frame(7, protocol.Drain(60.0)))
            assert isinstance(raw.ask(protocol.GetStatistics()), protocol.Statistics)
            assert not store.drain(cancel=True).draining
            assert raw.answer() == protocol.Drained(False, 2, 0, 0, 1, 0, [OFF])


def test_an_older_daemon_is_named(node: Node) -> None:
    with node.client() as store:
        store._connected().welcome.minor = 0
        with pytest.raises(ProtocolError, match=r"the daemon speaks protocol 2\.0; drain came with 2\.1"):
            store.drain()


def test_without_a_tier_below_it_ends_at_once_and_says_what_will_be_lost(tmp_path: Path) -> None:
    with Node("4MiB") as node, node.client() as store:
        assert Command("drain", *on(node)).status == 0
        assert store.drain(cancel=True).tiers == 0
        store.put(NAMESPACE, b"one", bytes(2 << 20))
        done = Command("drain", *on(node))
        assert done.status == 1
        assert b"no tier below, so 1 blocks (2 MiB) will be lost with the daemon" in done.output
        assert store.get(NAMESPACE, b"one") == bytes(2 << 20)
