"""The feed of a real daemon: what subscribers are told, in which order, and what they can do to it."""

import asyncio
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

import pytest

from kvstore.block import Medium, Namespace
from kvstore.client import StoreClient
from kvstore.errors import ConfigError, InvalidRequest
from kvstore.index import feed, feed_server, outbox
from kvstore.index.feed_server import FeedServer, Held
from kvstore.index.outbox import Outbox, chains, packed
from tests.follower import Follower, sockets
from tests.node import Node, private_bytes, wait_for, written
from tests.redis_servers import Server
from tests.test_client import MIB, fill, keys
from tests.test_http import metrics, serve

NS: Final = Namespace(model="followed")
OTHER: Final = Namespace(model="followed", salt="tenant")
SMALL: Final = 4096


@contextmanager
def publishing(
    folder: Path, text: str = "", *flags: str, dram: str = "64MiB", sections: str = ""
) -> Iterator[Node]:
    """A daemon with a feed on a port of its own; `text` goes into its [events], `sections` behind it."""
    config = folder / "node.toml"
    config.write_text(f'[events]\nfeed = "127.0.0.1:0"\n{text}\n{sections}\n')
    with Node(dram, "--config", str(config), *flags) as node:
        yield node
        node.check()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with publishing(tmp_path_factory.mktemp("feed")) as node:
        yield node


@pytest.fixture
def namespace(request: pytest.FixtureRequest) -> Namespace:
    return Namespace(model=request.node.name)


@contextmanager
def following(node: Node) -> Iterator[Follower]:
    """Somebody who has got all there is."""
    with Follower(node.endpoint("feed")) as follower:
        follower.subscribe()
        follower.until(lambda: follower.complete)
        yield follower


def caught_up(store: StoreClient, *followers: Follower) -> None:
    """Take all that has happened by now, and compare it with what the daemon counts."""

    def everyone(condition: Callable[[Follower], bool]) -> None:
        deadline = time.monotonic() + 20
        while not all(map(condition, followers)):
            assert time.monotonic() < deadline, [(each.seq, each.hello) for each in followers]
            for each in followers:
                while each.take(1):
                    pass

    def at_the_end(follower: Follower) -> bool:
        state = store.statistics().events
        return state is not None and follower.complete and follower.seq == state.seq

    everyone(at_the_end)
    beats = {follower: follower.beats for follower in followers}
    everyone(lambda follower: follower.beats > beats[follower])


def churn(store: StoreClient, namespace: Namespace, seconds: float, seed: int) -> None:
    """Store and remove at random."""
    choose = random.Random(seed)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        first = choose.randrange(400)
        names = keys(first + choose.randrange(1, 32))[first:]
        if choose.random() < 0.6:
            with store.reserve(namespace, names, SMALL, parent=b"") as write:
                write.commit()
        else:
            store.remove(namespace, names)


# What is told.


def test_who_comes_late_gets_all_there_is_and_then_what_happens(shared: Node, namespace: Namespace) -> None:
    with shared.client() as store:
        fill(store, namespace, keys(9))
        with following(shared) as follower:
            assert follower.has(namespace, Medium.DRAM) == [set(keys(9))]
            assert follower.hello is not None
            assert not follower.hello.resumed
            assert follower.hello.node == store.statistics().node
            fill(store, namespace, keys(12)[9:])
            store.remove(namespace, keys(3))
            follower.until(lambda: follower.has(namespace, Medium.DRAM) == [set(keys(12)[3:])])


def test_a_block_is_told_of_once_it_can_be_read(shared: Node, namespace: Namespace) -> None:
    with shared.client() as store, following(shared) as follower:
        with store.reserve(namespace, keys(4), SMALL) as write:
            beats = follower.beats
            follower.until(lambda: follower.beats > beats)
            assert follower.has(namespace, Medium.DRAM) == [set()]
            write.commit(keys(2))
            follower.until(lambda: follower.has(namespace, Medium.DRAM) == [set(keys(2))])
            with store.acquire(namespace, keys(4)) as read:
                assert read.hit_length == 2
        caught_up(store, follower)
        assert follower.has(namespace, Medium.DRAM) == [set(keys(2))]


def test_keys_come_with_what_they_follow(shared: Node, namespace: Namespace) -> None:
    a, b, c, d, e, f = keys(6)
    with shared.client() as store, following(shared) as follower:
        with store.reserve(namespace, [a, b, c], SMALL, parent=b"") as write:
            write.commit([c])
            write.commit()
        with store.reserve(namespace, [c, d], SMALL, parent=b) as write:
            assert write.granted == [d]
            write.commit()
        with store.reserve(namespace, [e], SMALL) as write:
            write.commit()
        with store.reserve_each([(namespace, f)], SMALL) as write:
            write.commit()
        caught_up(store, follower)
        expected = {a: b"", b: a, c: b, d: c, e: None, f: None}
        assert follower.parents(namespace) == expected
    with following(shared) as late:
        assert late.parents(namespace) == expected


def test_a_chain_is_one_event_and_a_request_one_frame(shared: Node, namespace: Namespace) -> None:
    with shared.client() as store, following(shared) as follower:
        seq = follower.seq
        fill(store, namespace, keys(256))
        caught_up(store, follower)
        assert follower.seq == seq + 1
        first, rest = follower.told
        assert (first.keys, rest.keys) == (keys(1), keys(256)[1:])  # of the first nothing is known


def test_what_was_said_is_forgotten_with_the_block(shared: Node, namespace: Namespace) -> None:
    with shared.client() as store, following(shared) as follower:
        with store.reserve(namespace, keys(2), SMALL, parent=b"") as write:
            write.commit()
        store.remove(namespace, keys(2))
        fill(store, namespace, keys(1))
        caught_up(store, follower)
        assert follower.parents(namespace) == {keys(1)[0]: None}


@pytest.mark.parametrize("parent", [b"p" * 65, b"p" * 5000])
def test_a_parent_that_is_no_key_is_refused(shared: Node, namespace: Namespace, parent: bytes) -> None:
    with shared.client() as store, pytest.raises(InvalidRequest, match=f"key of {len(parent)} bytes"):
        store.reserve(namespace, keys(1), SMALL, parent=parent)


def test_a_block_is_retracted_before_another_has_its_place(tmp_path: Path) -> None:
    with publishing(tmp_path, dram="4MiB") as node, node.client() as store, following(node) as follower:
        for number in range(30):
            fill(store, NS, keys(1, f"{number}-"), MIB)
        caught_up(store, follower)
        there: set[bytes] = set()
        for event in follower.told:
            if isinstance(event, feed.Stored):
                there.update(event.keys)
            else:
                there.difference_update(event.keys)
            assert len(there) <= 4
        assert len(there) == 4


DEMOTING: Final = 'directories = ["{}:64MiB"]\nwrite = "on-eviction"\nexclusive = true'


def test_a_block_that_moves_down_is_told_below_before_it_is_retracted_above(tmp_path: Path) -> None:
    sections = f"[nvme]\n{DEMOTING.format(tmp_path / 'disk')}"
    with ExitStack() as stack:
        node = stack.enter_context(publishing(tmp_path, dram="4MiB", sections=sections))
        store, follower = stack.enter_context(node.client()), stack.enter_context(following(node))
        names = [keys(1, f"{number}-")[0] for number in range(12)]
        for prompt in zip(names[::2], names[1::2], strict=True):
            with store.reserve(NS, prompt, MIB, parent=b"", wait_s=10) as write:
                write.commit()
        with store.acquire(NS, names[:2], wait_s=10) as read:  # and back up
            assert read.hit_length == 2
        wait_for(lambda: all(tier.pending_blocks == 0 for tier in store.statistics().tiers))
        caught_up(store, follower)
        places: dict[bytes, list[Medium]] = {}
        for event in follower.told:
            for key in event.keys:
                if isinstance(event, feed.Stored):
                    places.setdefault(key, []).append(event.medium)
                else:
                    places[key].remove(event.medium)
                    assert places[key], "it was nowhere meanwhile"
        in_dram, on_disk = follower.has(NS, Medium.DRAM, Medium.NVME)
        assert in_dram | on_disk == set(names)
        assert len(in_dram) <= 4
        assert follower.parents(NS) == {
            key: names[place - 1] if place % 2 else b"" for place, key in enumerate(names)
        }


def test_two_disks_are_one_medium(tmp_path: Path) -> None:
    directories = f'["{tmp_path}/a:64MiB", "{tmp_path}/b:64MiB"]'
    with ExitStack() as stack:
        node = stack.enter_context(publishing(tmp_path, sections=f"[nvme]\ndirectories = {directories}"))
        store, follower = stack.enter_context(node.client()), stack.enter_context(following(node))
        fill(store, NS, keys(64), 65536)
        wait_for(lambda: written(store))
        caught_up(store, follower)
        blocks = {tier.name: tier.blocks for tier in store.statistics().tiers}
        assert min(blocks["nvme0"], blocks["nvme1"]) > 0
        assert follower.has(NS, Medium.DRAM, Medium.NVME) == [set(keys(64))] * 2
        with following(node) as late:
            assert late.keys == follower.keys
        store.remove(NS, keys(60))
        caught_up(store, follower)
        assert follower.has(NS, Medium.DRAM, Medium.NVME) == [set(keys(64)[60:])] * 2


def test_what_is_found_in_redis_is_told_of_as_remote(tmp_path: Path) -> None:
    with Server() as redis, ExitStack() as stack:
        folders = [tmp_path / name for name in ("first", "second")]
        for folder in folders:
            folder.mkdir()
        first, second = (
            stack.enter_context(publishing(folder, sections=f'[redis]\nurl = "{redis.url}"'))
            for folder in folders
        )
        with first.client() as store, following(first) as follower:
            fill(store, NS, keys(300))
            wait_for(lambda: written(store))
            caught_up(store, follower)
            assert follower.has(NS, Medium.DRAM, Medium.REMOTE) == [set(keys(300))] * 2
        with second.client() as store, following(second) as follower:
            assert follower.has(NS, Medium.REMOTE) == [set()]
            with store.acquire(NS, keys(300), wait_s=10) as read:
                assert read.hit_length == 300
            caught_up(store, follower)
            assert follower.has(NS, Medium.DRAM, Medium.REMOTE) == [set(keys(300))] * 2


@pytest.mark.parametrize("rules", ['write = "on-eviction"\nexclusive = true', 'write = "behind"'])
def test_whatever_moves_what_is_told_is_what_is_there(tmp_path: Path, rules: str) -> None:
    sections = f'[nvme]\ndirectories = ["{tmp_path}/a:8MiB", "{tmp_path}/b:8MiB"]\n{rules}'
    with ExitStack() as stack:
        node = stack.enter_context(publishing(tmp_path, dram="4MiB", sections=sections))
        store, follower = stack.enter_context(node.client()), stack.enter_context(following(node))
        choose = random.Random(7)
        for _ in range(250):
            namespace, first = choose.choice((NS, OTHER)), choose.randrange(30)
            names = keys(first + choose.randrange(1, 8))[first:]
            match choose.randrange(4):
                case 0 | 1:
                    with store.reserve(namespace, names, 256 << 10, parent=b"", wait_s=0.01) as write:
                        write.commit(write.granted[: choose.randrange(8)])
                case 2:
                    store.acquire(namespace, names, wait_s=0.1).release()
                case _:
                    store.remove(namespace, names)
            while follower.take():
                pass
        wait_for(lambda: all(tier.pending_blocks == 0 for tier in store.statistics().tiers))
        caught_up(store, follower)
        late = stack.enter_context(following(node))
        assert {place: names for place, names in late.keys.items() if names} == {
            place: names for place, names in follower.keys.items() if names
        }
        assert store.check() == []


# Snapshots, resuming, heartbeats.


def test_a_subscriber_that_was_away_gets_what_it_has_missed_and_nothing_else(
    shared: Node, namespace: Namespace
) -> None:
    with shared.client() as store, following(shared) as follower:
        hello = follower.hello
        assert hello is not None
        fill(store, namespace, keys(3))
        caught_up(store, follower)
        with Follower(shared.endpoint("feed")) as again:
            again.keys = {place: set(names) for place, names in follower.keys.items()}
            fill(store, namespace, keys(5)[3:])
            store.remove(namespace, keys(1))
            again.subscribe(hello.epoch, follower.seq)
            again.until(lambda: again.has(namespace, Medium.DRAM) == [set(keys(5)[1:])])
            caught_up(store, again)
            assert (again.resumed, again.parts) == (1, 0)


@pytest.mark.parametrize("ahead", [{"epoch": 1}, {"seq": 1}, {"seq": -(10**9)}])
def test_a_subscriber_whose_place_is_not_known_starts_over(shared: Node, ahead: dict[str, int]) -> None:
    with following(shared) as follower, Follower(shared.endpoint("feed")) as stranger:
        assert follower.hello is not None
        epoch = follower.hello.epoch + ahead.get("epoch", 0)
        stranger.subscribe(epoch, follower.seq + ahead.get("seq", 0))
        stranger.until(lambda: stranger.beats)
        assert stranger.snapshots == 1
        assert stranger.keys == follower.keys


def test_a_snapshot_is_whole_while_others_store_and_remove(tmp_path: Path) -> None:
    with publishing(tmp_path, dram="16MiB") as node, ExitStack() as stack:
        store = stack.enter_context(node.client())
        writers = [
            threading.Thread(target=lambda n=n: _churn(node, (NS, OTHER)[n % 2], 1.5, n), daemon=True)
            for n in range(3)
        ]
        first = stack.enter_context(following(node))
        for writer in writers:
            writer.start()
        others = []
        while writers[0].is_alive():
            follower = stack.enter_context(Follower(node.endpoint("feed")))
            follower.subscribe()
            follower.until(lambda f=follower: f.hello is not None)  # type: ignore[misc]
            others.append(follower)
            for each in (first, *others):
                while each.take():
                    pass
            if len(others) == 12:
                break
        for writer in writers:
            writer.join()
        caught_up(store, first, *others)
        for each in others:
            assert {place: names for place, names in each.keys.items() if names} == {
                place: names for place, names in first.keys.items() if names
            }
        for each in (NS, OTHER):
            listed = set(store.list(each).keys)
            assert first.has(each, Medium.DRAM) == [listed]


def _churn(node: Node, namespace: Namespace, seconds: float, seed: int) -> None:
    with node.client() as store:
        churn(store, namespace, seconds, seed)


def test_heartbeats_go_on_while_nothing_happens(shared: Node) -> None:
    with following(shared) as follower:
        began, beats = time.monotonic(), follower.beats
        follower.until(lambda: follower.beats == beats + 3)
        assert time.monotonic() - began < 4 * feed.HEARTBEAT_S + 1


def test_a_restarted_daemon_has_a_later_epoch_and_begins_anew(tmp_path: Path) -> None:
    with publishing(tmp_path) as node, node.client() as store:
        fill(store, NS, keys(5))
        with following(node) as follower:
            first = follower.hello
        node.kill()
        node.start()
        with Follower(node.endpoint("feed")) as again, node.client() as store:
            assert first is not None
            again.keys = follower.keys
            again.subscribe(first.epoch, follower.seq)
            again.until(lambda: again.beats)
            assert again.hello is not None
            assert again.hello.epoch > first.epoch
            assert (again.snapshots, again.has(NS, Medium.DRAM)) == (1, [set()])


def test_who_takes_over_tells_of_all_it_has_taken_over(tmp_path: Path) -> None:
    with publishing(tmp_path) as node:
        with node.client() as store, following(node) as follower:
            fill(store, NS, keys(50))
            caught_up(store, follower)
        old = node.process
        node.start("--take-over")
        with following(node) as again:
            assert again.has(NS, Medium.DRAM) == [set(keys(50))]
            assert again.hello is not None
            assert follower.hello is not None
            assert again.hello.epoch > follower.hello.epoch
        assert old.wait(20) == 0
        old.stdout.close()


def test_what_a_disk_has_kept_is_told_of_after_a_restart(tmp_path: Path) -> None:
    with publishing(tmp_path, "", "--nvme", f"{tmp_path}/disk:64MiB") as node:
        with node.client() as store:
            fill(store, NS, keys(20))
            wait_for(lambda: written(store))
        node.kill()
        node.start()
        with following(node) as follower:
            assert follower.has(NS, Medium.DRAM, Medium.NVME) == [set(), set(keys(20))]


def test_every_statistic_of_events_is_a_metric(shared: Node, namespace: Namespace) -> None:
    with shared.client() as store, following(shared):
        fill(store, namespace, keys(3))
        store.remove(namespace, keys(3))
        before, samples, now = None, {}, store.statistics().events
        while before != now:  # what has just happened is sent a little later
            before, samples, now = now, metrics(shared), store.statistics().events
    assert now is not None
    for each in fields(now):
        name = f"kvstore_events_{each.name}"
        assert samples.get(name, samples.get(f"{name}_total")) == getattr(now, each.name), name


def test_a_daemon_that_publishes_nothing_says_nothing_of_it() -> None:
    with Node("4MiB") as node, node.client() as store:
        assert store.statistics().events is None
        assert not any(name.startswith("kvstore_events") for name in metrics(node))
        assert "feed=" not in node.ready_line


# Who may follow, and what followers can do.


def test_without_the_key_nothing_is_received(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kvstore", "key"]
    secret, other = (subprocess.check_output(command, text=True).strip() for _ in range(2))
    (tmp_path / "key").write_text(f"{secret}\n")
    with publishing(tmp_path, f'key_file = "{tmp_path / "key"}"') as node, ExitStack() as stack:
        with node.client() as store:
            fill(store, NS, keys(3))
        endpoint = node.endpoint("feed")
        without = stack.enter_context(Follower(endpoint))
        wrong = stack.enter_context(Follower(endpoint, secret=other.encode()))
        right = stack.enter_context(Follower(endpoint, secret=secret.encode()))
        for follower in (without, wrong, right):
            follower.subscribe()
        right.until(lambda: right.beats > 2)
        assert right.has(NS, Medium.DRAM) == [set(keys(3))]
        assert not without.take(100)
        assert not wrong.take(100)
        assert secret not in node.log


@pytest.mark.parametrize("content", [None, "short", '"' * 40, "é" * 40])
def test_a_key_file_that_holds_no_key_is_a_clear_error(
    shared: Node, tmp_path: Path, content: str | None
) -> None:
    path = tmp_path / "key"
    if content is not None:
        path.write_text(content)
    config = tmp_path / "node.toml"
    config.write_text(f'[events]\nfeed = "127.0.0.1:0"\nkey_file = "{path}"\n')
    done = serve(shared, config=str(config), socket=str(tmp_path / "sock"))
    assert done.returncode == 1
    assert f"kvstore: key_file {path}: " in done.stderr


def test_a_feed_address_that_is_taken_is_a_clear_error(shared: Node, tmp_path: Path) -> None:
    config = tmp_path / "node.toml"
    config.write_text(f'[events]\nfeed = "{shared.endpoint("feed")}"\n')
    done = serve(shared, config=str(config), socket=str(tmp_path / "sock"))
    assert done.returncode == 1
    assert f"kvstore: feed address {shared.endpoint('feed')}: Address already in use" in done.stderr


def test_rubbish_is_counted_and_harms_nobody(shared: Node, namespace: Namespace) -> None:
    choose = random.Random(1)
    with shared.client() as store, following(shared) as follower, Follower(shared.endpoint("feed")) as bad:
        before = store.statistics().events
        assert before is not None
        for _ in range(200):
            bad.socket.send_multipart(
                [choose.randbytes(choose.randrange(60)) for _ in range(choose.randrange(1, 4))]
            )
        bad.say(feed.Subscribe(99))
        bad.socket.send(feed.encode(feed.Heartbeat(1, 1, 1.0, {})))
        fill(store, namespace, keys(3))
        caught_up(store, follower)

        def counted() -> bool:
            after = store.statistics().events
            assert before is not None
            return after is not None and after.refused >= before.refused + 200

        wait_for(counted)
        assert not bad.take(50)


def test_a_frame_that_is_too_long_ends_its_connection_alone(shared: Node) -> None:
    with following(shared) as follower, Follower(shared.endpoint("feed")) as bad:
        bad.socket.send(bytes(1 << 20))
        beats = follower.beats
        follower.until(lambda: follower.beats > beats + 1)


def test_subscribers_beyond_the_limit_are_not_served(shared: Node) -> None:
    with ExitStack() as stack:
        store = stack.enter_context(shared.client())
        followers = [
            stack.enter_context(Follower(shared.endpoint("feed")))
            for _ in range(feed_server.SUBSCRIBERS_MAX + 8)
        ]
        for follower in followers:
            follower.subscribe()

        def served() -> int:
            for follower in followers:
                while follower.take():
                    pass
            return sum(follower.beats > 1 for follower in followers)

        wait_for(lambda: served() >= feed_server.SUBSCRIBERS_MAX - 8)
        state = store.statistics().events
        assert state is not None
        assert state.subscribers <= feed_server.SUBSCRIBERS_MAX


def test_a_subscriber_that_does_not_read_costs_no_memory(tmp_path: Path) -> None:
    names = [bytes(keys(1, f"{number}-")[0]) * 2 for number in range(4096)]
    with publishing(tmp_path) as node, node.client() as store, ExitStack() as stack:
        fill(store, NS, names)
        store.remove(NS, names)
        stalled = [stack.enter_context(Follower(node.endpoint("feed"), queued=1)) for _ in range(8)]
        for each in stalled:
            each.subscribe()
            each.until(lambda each=each: each.hello is not None)  # type: ignore[misc]
        before = private_bytes(node.pid)
        told = 0
        while told < 24 * MIB:
            with store.reserve(NS, names, SMALL, wait_s=5) as write:
                write.commit()
            store.remove(NS, names)
            told += 2 * 4096 * 66
        # To each it would be as much again.
        assert private_bytes(node.pid) - before < told + 8 * 9 * 300_000 + 16 * MIB
        with following(node) as follower:
            caught_up(store, follower)


# The parts, on a loop of this process.


class Shelves:
    """What there is, as a test says."""

    def __init__(self, *held: Held) -> None:
        self.all = list(held)

    def held(self) -> list[Held]:
        return [Held(some.namespace, some.medium, list(some.keys)) for some in self.all]

    def predecessors(self, namespace: Namespace, names: Sequence[bytes]) -> list[bytes | None]:
        return [None] * len(names)


def on_a_loop(body: Callable[[], Coroutine[Any, Any, None]]) -> None:
    with asyncio.Runner(debug=False) as runner:
        runner.run(body())


async def eventually(condition: Callable[[], object], *followers: Follower) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        for follower in followers:
            while follower.take():
                pass
        await asyncio.sleep(0.002)


@contextmanager
def feed_of(inventory: Shelves, box: Outbox) -> Iterator[FeedServer]:
    with sockets() as context:
        server = FeedServer(context, ("127.0.0.1", 0), box, inventory, node="n", epoch=7)
        try:
            yield server
        finally:
            server.close()
            box.close()


def test_the_silent_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "SUBSCRIBER_S", 0.8)
    monkeypatch.setattr(feed, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(feed, "ALIVE_S", 0.1)

    async def body() -> None:
        with ExitStack() as stack:
            server = stack.enter_context(feed_of(Shelves(), Outbox()))
            silent, speaking = [stack.enter_context(Follower(server.endpoint)) for _ in range(2)]
            silent.subscribe()
            speaking.subscribe()
            await eventually(lambda: server.subscribers == 2, speaking)
            await eventually(lambda: server.subscribers == 1, speaking)
            beats = speaking.beats
            await eventually(lambda: speaking.beats > beats + 20, speaking)
            assert (server.subscribers, server.dropped) == (1, 1)

    on_a_loop(body)


def test_who_is_slower_than_what_is_kept_starts_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "FRAMES_MAX", 20)
    held: list[bytes] = []

    async def body() -> None:
        box, shelves = Outbox(), Shelves(Held(NS, Medium.DRAM, held))
        with feed_of(shelves, box) as server, Follower(server.endpoint, queued=1) as slow:
            slow.subscribe()
            await eventually(lambda: slow.beats, slow)
            for number in range(400):
                names = [b"%d-%d" % (number, index) + bytes(48) for index in range(4096)]
                held.extend(names)
                box.stored(NS, Medium.DRAM, names, [None] * 4096)
                box.flush()
                await asyncio.sleep(0)
                if server.dropped:
                    break
            assert server.dropped
            await eventually(lambda: slow.snapshots == 2 and slow.seq == box.seq, slow)
            beats = slow.beats
            await eventually(lambda: slow.beats > beats, slow)
            assert slow.has(NS, Medium.DRAM) == [set(held)]

    on_a_loop(body)


def test_a_snapshot_holds_up_nobody() -> None:
    inventory = Shelves(
        *[Held(Namespace(model=str(n)), Medium.DRAM, keys(20_000, f"{n}-")) for n in range(10)]
    )

    async def body() -> None:
        late: list[float] = []

        async def watch() -> None:
            while True:
                began = time.thread_time()
                await asyncio.sleep(0)
                late.append(time.thread_time() - began)

        with ExitStack() as stack:
            box = Outbox()
            for held in inventory.all:
                box.stored(held.namespace, held.medium, held.keys, inventory.predecessors(NS, held.keys))
            server = stack.enter_context(feed_of(inventory, box))
            one, other = [stack.enter_context(Follower(server.endpoint)) for _ in range(2)]
            watching = asyncio.create_task(watch())
            done = threading.Event()

            def read() -> None:
                for follower in (one, other):
                    follower.subscribe()
                    follower.until(lambda follower=follower: follower.complete)
                done.set()

            reading = asyncio.create_task(asyncio.to_thread(read))
            await reading
            watching.cancel()
            assert one.digest(Medium.DRAM).blocks == other.digest(Medium.DRAM).blocks == 200_000
            assert sorted(late)[-len(late) // 100] < 0.01

    on_a_loop(body)


def test_an_address_that_is_no_ones_is_an_error_that_names_it() -> None:
    async def body() -> None:
        with sockets() as context:
            for host in ("192.0.2.1", "no-such-host.invalid"):
                with pytest.raises(ConfigError, match=re.escape(f"feed address {host}:0: ")):
                    FeedServer(context, (host, 0), Outbox(), Shelves(), node="n", epoch=1)

    on_a_loop(body)


def test_keys_are_parted_where_they_do_not_follow_each_other() -> None:
    a, b, c, d = b"abcd"[:1], b"b", b"c", b"d"
    assert list(chains([a, b, c], [b"", a, b])) == [(b"", [a, b, c])]
    assert list(chains([a, b, c], [None, None, None])) == [(None, [a, b, c])]
    assert list(chains([a, b, c, d], [None, a, b, None])) == [(None, [a]), (a, [b, c]), (None, [d])]
    assert list(chains([a, b, c], [b"", b"", b])) == [(b"", [a]), (b"", [b, c])]


def test_no_frame_is_longer_than_it_may_be() -> None:
    long = Namespace(model="m" * 512, salt="s" * 512, layout="l" * 512, dtype="d" * 512).canonical
    events = [feed.Stored(long, Medium.DRAM, None, [b"%d" % number]) for number in range(9000)]
    frames = [feed.encode(feed.Events(1, 0.0, list(some))) for some in packed(events)]
    assert max(map(len, frames)) < 2 << 20
    assert len(frames) > 9000 // feed.KEYS_MAX + 1
