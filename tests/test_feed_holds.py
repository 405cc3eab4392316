"""Holds over the feed of a real daemon, what it measures, and what earlier releases make of either."""

import itertools
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest

from kvstore.block import Medium, Namespace
from kvstore.client import StoreClient
from kvstore.index import feed, feed_holds
from tests.follower import Follower
from tests.node import Node, pinned, wait_for
from tests.test_client import MIB, fill, keys
from tests.test_feed_server import following, publishing

_ids: Final = itertools.count(1)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with publishing(tmp_path_factory.mktemp("holds"), 'topology = "eu/r7"', dram="16MiB") as node:
        yield node


@pytest.fixture
def store(node: Node) -> Iterator[StoreClient]:
    with node.client() as store:
        yield store


@pytest.fixture
def follower(node: Node) -> Iterator[Follower]:
    with following(node) as follower:
        yield follower


@pytest.fixture
def namespace(request: pytest.FixtureRequest) -> Namespace:
    return Namespace(request.node.name[:400], 16)


def hold(follower: Follower, namespace: Namespace, names: list[bytes], ttl_s: float = 30.0) -> feed.Held:
    """Ask for a hold; its answer."""
    follower.say(wish := feed.Hold(next(_ids), namespace.canonical, names, ttl_s))
    return answer(follower, wish.id)


def answer(follower: Follower, number: int) -> feed.Held:
    follower.until(lambda: number in [held.id for held in follower.held])
    return next(held for held in follower.held if held.id == number)


def raw(follower: Follower, *fields: Any) -> None:
    """Say what no release says."""
    follower.socket.send(msgspec.msgpack.encode(list(fields)))


def refused(store: StoreClient) -> int:
    events = store.statistics().events
    assert events is not None
    return events.refused


def test_what_is_held_is_pinned_until_it_is_not(
    store: StoreClient, follower: Follower, namespace: Namespace
) -> None:
    fill(store, namespace, keys(3))
    held = hold(follower, namespace, [*keys(3), b"nowhere"])
    assert (held.pinned, held.loading, held.missing, held.refused) == (3, 0, 1, "")
    assert pinned(store) == 3
    follower.say(feed.Unhold(held.id))
    follower.say(feed.Unhold(held.id))
    wait_for(lambda: pinned(store) == 0)
    hold(follower, namespace, keys(3), ttl_s=0.2)
    wait_for(lambda: pinned(store) == 0)


def test_what_is_no_hold_is_refused_in_a_sentence(
    store: StoreClient, follower: Follower, namespace: Namespace
) -> None:
    fill(store, namespace, keys(1))
    for names, ttl_s, reason in (
        ([], 1.0, "0 keys for 1.0 s; give 1 to 4096"),
        ([b"k"] * 4097, 1.0, "4097 keys for 1.0 s; give 1 to 4096"),
        ([b"x" * 65], 1.0, "key of 65 bytes; give 1 to 64 bytes"),
        ([b"k"], float("nan"), "1 keys for nan s"),
        ([b"k"], -1.0, "1 keys for -1.0 s"),
    ):
        assert reason in hold(follower, namespace, names, ttl_s).refused
    follower.say(feed.Hold(0, b"{}", [b"k"], 1.0))
    assert "is no canonical form" in answer(follower, 0).refused
    first = hold(follower, namespace, keys(1))
    follower.held.clear()
    follower.say(feed.Hold(first.id, namespace.canonical, keys(1), 1.0))
    assert "give each a number of its own" in answer(follower, first.id).refused
    follower.say(feed.Unhold(first.id))
    wait_for(lambda: pinned(store) == 0)


def test_what_a_later_release_says_is_counted_and_ends_nothing(
    node: Node, store: StoreClient, follower: Follower, namespace: Namespace
) -> None:
    before = refused(store)
    raw(follower, "later", 1, b"2")
    raw(follower, "alive", b"x" * feed.SAID_BYTES_MAX)
    with Follower(node.endpoint("feed")) as stranger:
        stranger.say(feed.Hold(1, namespace.canonical, keys(1), 1.0))
        wait_for(lambda: refused(store) >= before + 2)
        assert not stranger.take(50)
    raw(follower, "hold", 77, namespace.canonical, keys(1), 1.0, "a field of later")
    assert answer(follower, 77).missing == 1
    fill(store, namespace, keys(2))
    follower.until(lambda: follower.has(namespace, Medium.DRAM) == [set(keys(2))])
    assert follower.snapshots == 1


def test_a_flood_of_holds_harms_nobody(
    node: Node, store: StoreClient, follower: Follower, namespace: Namespace
) -> None:
    names = keys(feed.KEYS_MAX)
    fill(store, namespace, names[:9], 64)
    took = []
    with following(node) as other:
        for _ in range(60):
            for _ in range(10):
                follower.say(feed.Hold(next(_ids), namespace.canonical, names, 0.0))
            while follower.take():
                pass
            began_s = time.monotonic()
            with store.acquire(namespace, names[:9]) as lease:
                assert lease.hit_length == 9
            took.append(time.monotonic() - began_s)
        beats = other.beats
        other.until(lambda: other.beats > beats + 1)
        follower.until(lambda: any("400000 keys a second" in held.refused for held in follower.held))
        assert not hold(other, namespace, names, 0.0).refused  # each has limits of its own
    assert statistics.median(took) < 0.1
    assert store.statistics().loop_stall_max_s < 0.5


def test_one_index_has_so_many_holds_at_a_time(follower: Follower, store: StoreClient) -> None:
    class Holds:
        def hold(self, namespace: Namespace, names: object, ttl_s: float) -> feed.Held:
            return feed.Held(next(_ids), pinned=1)

        def end(self, hold_id: int) -> bool:
            return True

    holds = feed_holds.FeedHolds(Holds(), lambda: "")
    wishes = [feed.Hold(number, Namespace("m").canonical, [b"k"], 5.0) for number in range(1026)]
    for number, wish in enumerate(wishes[:1024]):
        assert not holds.hold(b"one", wish, 0.001 * number).refused
    assert "1024 holds of one index; the limit is 1024" in holds.hold(b"one", wishes[1024], 2.0).refused
    assert not holds.hold(b"two", wishes[1024], 2.0).refused
    assert not holds.hold(b"one", wishes[1024], 7.0).refused
    assert (holds.taken, holds.refused) == (1026, 1)


def test_a_daemon_with_a_token_and_no_key_says_why_it_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret")
    config = tmp_path / "node.toml"
    config.write_text(f'token_file = "{tmp_path}/token"\n[events]\nfeed = "127.0.0.1:0"\n')
    with Node("16MiB", "--config", str(config)) as node, node.client() as store, following(node) as follower:
        assert follower.hello is not None
        assert not follower.hello.takes_holds
        fill(store, Namespace("m"), keys(1))
        assert (
            "give its [events] and the index one key_file" in hold(follower, Namespace("m"), keys(1)).refused
        )
        assert pinned(store) == 0
        follower.until(lambda: follower.has(Namespace("m"), Medium.DRAM) == [set(keys(1))])


def test_measures_come_with_the_first_heartbeat(
    node: Node, store: StoreClient, follower: Follower, namespace: Namespace
) -> None:
    salted = Namespace("salted", 16, salt="a secret")
    fill(store, namespace, keys(3), MIB)
    fill(store, salted, keys(2), 1000)
    with following(node) as late:
        assert late.hello is not None
        assert (late.hello.topology, late.hello.takes_holds) == ("eu/r7", True)
        late.until(lambda: late.measures)
        assert late.beats == 1
    (measures,) = late.measures
    assert measures.speeds[Medium.DRAM][1] > 1e8
    spaces = {space.namespace: space for space in measures.spaces}
    assert spaces[namespace.canonical] == feed.SpaceMeasure(namespace.canonical, 3, 3 * MIB)
    assert spaces[Namespace("salted", 16).canonical].block_bytes == 2000
    assert salted.canonical not in spaces


# Earlier releases, which know less of the same messages.


class OldHello(msgspec.Struct, frozen=True, array_like=True, tag="hello"):
    version: int
    node: str
    epoch: int
    seq: int
    resumed: bool
    engines: list[str]


class OldHeartbeat(msgspec.Struct, frozen=True, array_like=True, tag="heartbeat"):
    epoch: int
    seq: int
    at_s: float
    digests: dict[Medium, feed.Digest]


def test_earlier_releases_and_this_one_understand_each_other() -> None:
    hello = feed.Hello(feed.VERSION, "n", 1, 2, True, ["e"], "eu/r7", True)
    measures = feed.Measures({Medium.NVME: (0.1, 1e9)}, [feed.SpaceMeasure(b"{}", 1, 2)])
    beat = feed.Heartbeat(1, 2, 3.0, {Medium.DRAM: feed.Digest(1, 2)}, measures)
    old = msgspec.msgpack.Decoder(OldHello | OldHeartbeat)
    old_hello, old_beat = old.decode(feed.encode(hello)), old.decode(feed.encode(beat))
    assert old_hello == OldHello(feed.VERSION, "n", 1, 2, True, ["e"])
    assert old_beat == OldHeartbeat(1, 2, 3.0, {Medium.DRAM: feed.Digest(1, 2)})
    encode = msgspec.msgpack.encode
    assert feed.decode_to_index(encode(old_hello)) == feed.Hello(feed.VERSION, "n", 1, 2, True, ["e"])
    assert feed.decode_to_index(encode(old_beat)) == feed.Heartbeat(1, 2, 3.0, old_beat.digests)
    assert feed.decode_to_index(feed.encode(beat)) == beat
