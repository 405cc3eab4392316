"""A subscriber at the end of a real socket: cut off, flooded, lied to and left alone, it ends up right."""

import asyncio
import os
import random
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from threading import Event
from typing import Any, Final

import pytest
import zmq

from kvstore.block import Medium, Namespace
from kvstore.index import feed
from kvstore.index.feed_server import FeedServer, Held
from kvstore.index.locality import Locality
from kvstore.index.node_stream import Names
from kvstore.index.node_subscriber import NodeSubscriber
from kvstore.index.outbox import Outbox
from kvstore.index.wire import Wire, allow, new_key, serve_curve
from tests.feeds import Daemon, found
from tests.proxy import Proxy

SPACE: Final = Namespace(model="llama-test")
HEALED_S: Final = 5.0
# What a busy machine may add.
SLACK_S: Final = 3.0


async def until(condition: Callable[[], object], timeout_s: float = HEALED_S + SLACK_S) -> None:
    """Until the condition holds; fails when it does not within the time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.005)


def ended(context: "zmq.Context[zmq.Socket[bytes]]") -> None:
    """End a context, of which no socket may be left."""
    left = [each for each in context._sockets if not each.closed]
    context.destroy(linger=0)
    assert left == []


class Feeder:
    """A daemon's ROUTER. `passes` says which frames get through; `asked` is what it has been told."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", address: str = "127.0.0.1:*") -> None:
        self.daemon = Daemon(kept=64)
        self.asked: list[feed.ToDaemon] = []
        self.passes: Callable[[bytes], bool] = lambda _: True
        self._context = context
        self._subscribers: dict[bytes, None] = {}
        self._bind(address)
        self._beat()

    def _bind(self, address: str, secret: bytes | None = None) -> None:
        router = self._context.socket(zmq.ROUTER)
        router.setsockopt(zmq.LINGER, 0)
        router.setsockopt(zmq.SNDHWM, 0)
        router.setsockopt(zmq.IPV6, 1)
        if secret is not None:
            serve_curve(router, secret)
        try:
            router.bind(f"tcp://{address}")
        except zmq.ZMQError:
            router.close()
            raise
        self.address = router.getsockopt_string(zmq.LAST_ENDPOINT).removeprefix("tcp://")
        self.wire = Wire(router, self._answer)

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.address.rpartition(":")[2])

    def rebind(self, secret: bytes | None = None) -> None:
        """End its socket, and listen at the same port again; whoever had subscribed is forgotten."""
        self.wire.close()
        self._subscribers.clear()
        deadline = time.monotonic() + 20
        while True:
            try:
                return self._bind(self.address, secret)
            except zmq.ZMQError:  # libzmq closes in the background
                assert time.monotonic() < deadline
                time.sleep(0.001)

    def say(self, *frames: bytes) -> None:
        """To all subscribers."""
        for identity in self._subscribers:
            for frame in filter(self.passes, frames):
                self.wire.send([identity, frame])

    def say_raw(self, frames: Sequence[bytes]) -> None:
        """To all subscribers, one message of several frames."""
        for identity in self._subscribers:
            self.wire.send([identity, *frames])

    def _answer(self, frames: Sequence[bytes]) -> None:
        identity, frame = frames
        message = feed.decode_to_daemon(frame)
        self.asked.append(message)
        if isinstance(message, feed.Subscribe):
            self._subscribers[identity] = None
            for answer in filter(self.passes, self.daemon.answer(message)):
                self.wire.send([identity, answer])

    def _beat(self) -> None:
        self._beating = asyncio.get_running_loop().call_later(feed.HEARTBEAT_S, self._beat)
        self.say(self.daemon.beat())

    def close(self) -> None:
        """End it."""
        self._beating.cancel()
        self.wire.close()


class Pair:
    """A feeder, and a subscriber to it or to what stands between."""

    def __init__(self, feeder: Feeder, subscriber: NodeSubscriber, locality: Locality) -> None:
        self.feeder = feeder
        self.daemon = feeder.daemon
        self.subscriber = subscriber
        self.locality = locality

    def found(self, key: bytes) -> Medium | None:
        """Where the index says the daemon has a key."""
        return found(self.locality, self.daemon.node, SPACE, key)

    def store(self, *keys: bytes) -> None:
        """The daemon stores these, and says so."""
        self.feeder.say(self.daemon.store(SPACE, Medium.DRAM, list(keys)))

    @property
    def right(self) -> bool:
        """Whether the index has what the daemon has, and knows it."""
        now = self.subscriber.statistics()
        held = [key for keys in self.daemon.has.values() for key in keys]
        return (
            (now.epoch, now.seq, now.blocks) == (self.daemon.epoch, self.daemon.seq, len(held))
            and all(self.found(key) for key in held)
            and now.age_s < feed.HEARTBEAT_S + SLACK_S
        )


@asynccontextmanager
async def pair(
    address: str = "", bind: str = "127.0.0.1:*", secrets: Sequence[bytes | None] = (None, None)
) -> AsyncIterator[Pair]:
    """The two, who have met unless their secrets differ; nothing may be left of them."""
    context = zmq.Context()
    feeder = Feeder(context, bind)
    gate = None
    if secrets[0] is not None:
        gate = allow(context, secrets[0])
        feeder.rebind(secrets[0])
    locality, names = Locality(), Names()
    subscriber = NodeSubscriber(context, locality, names, address or feeder.address, secret=secrets[1])
    both = Pair(feeder, subscriber, locality)
    try:
        feeder.daemon.store(SPACE, Medium.DRAM, [b"a", b"b", b"c", b"d"])
        subscriber.start()
        if secrets[0] == secrets[1] and not address:
            await until(lambda: both.right)
        yield both
    finally:
        subscriber.close()
        feeder.close()
        if gate is not None:
            gate.close()
        ended(context)
    while locality.tend():
        pass
    assert locality.statistics().keys == 0
    assert names == {}


def run(scenario: Callable[[Pair], Awaitable[None]], **options: Any) -> None:
    """A scenario with a pair."""

    async def whole() -> None:
        async with pair(**options) as both:
            await scenario(both)

    asyncio.run(whole())


def test_a_subscriber_knows_what_is_there_and_what_happens() -> None:
    async def scenario(both: Pair) -> None:
        both.store(b"e")
        both.feeder.say(both.daemon.remove(SPACE, Medium.DRAM, [b"a"]))
        await until(lambda: both.right)
        assert both.found(b"a") is None
        assert both.subscriber.heard
        assert [type(message) for message in both.feeder.asked].count(feed.Subscribe) == 1
        await until(lambda: feed.Alive() in both.feeder.asked)

    run(scenario)


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_a_feed_may_have_an_address_of_version_6() -> None:
    async def scenario(both: Pair) -> None:
        assert both.subscriber.stream.address.startswith("[::1]:")

    run(scenario, bind="[::1]:*")


def test_with_a_key_only_who_has_it_is_heard() -> None:
    ours, theirs = new_key().encode(), new_key().encode()

    async def together(both: Pair) -> None:
        both.store(b"e")
        await until(lambda: both.right)

    async def apart(both: Pair) -> None:
        await until(lambda: both.subscriber.stream.silent)
        assert both.feeder.asked == []
        assert both.found(b"a") is None

    run(together, secrets=(ours, ours))
    run(apart, secrets=(ours, theirs))
    run(apart, secrets=(ours, None))


def test_a_daemon_that_starts_anew_at_its_port_is_followed_and_nothing_stale_is_left() -> None:
    async def scenario(both: Pair) -> None:
        for _ in range(3):
            both.feeder.rebind()
            both.daemon.restart()
            both.daemon.store(SPACE, Medium.DRAM, [b"new%d" % both.daemon.epoch])
            await until(lambda: both.right)
            assert both.found(b"a") is None
        assert both.subscriber.statistics().counters.restarts == 3

    run(scenario)


def test_a_daemon_whose_socket_alone_was_lost_goes_on_where_it_was() -> None:
    async def scenario(both: Pair) -> None:
        both.feeder.rebind()
        both.daemon.store(SPACE, Medium.DRAM, [b"meanwhile"])
        await until(lambda: both.right)
        assert feed.Subscribe(feed.VERSION, 1, 1) in both.feeder.asked
        assert both.subscriber.statistics().counters.resyncs == 0

    run(scenario)


def test_lost_frames_are_made_up_for() -> None:
    async def scenario(both: Pair) -> None:
        chance = random.Random(1)
        both.feeder.passes = lambda _: chance.random() < 0.8
        for number in range(300):
            both.store(b"key%d" % number)
            await asyncio.sleep(0.002)
        both.feeder.passes = lambda _: True
        await until(lambda: both.right)
        assert both.subscriber.statistics().counters.gaps > 0
        both.locality.check()

    run(scenario)


def test_a_silent_daemon_is_left_out_until_it_is_back() -> None:
    async def scenario(both: Pair) -> None:
        both.feeder.passes = lambda _: False
        await until(lambda: both.found(b"a") is None)
        assert both.subscriber.age_s() > 1.0
        assert not both.subscriber.heard
        both.feeder.passes = lambda _: True
        await until(lambda: both.right)

    run(scenario)


def test_garbage_is_counted_and_harms_nothing() -> None:
    async def scenario(both: Pair) -> None:
        chance = random.Random(2)
        for _ in range(200):
            both.feeder.say(chance.randbytes(chance.randrange(99)))
            both.feeder.say_raw([both.daemon.beat(), b"more"])
            both.feeder.say_raw([b"", b""])
        await until(lambda: both.subscriber.statistics().counters.malformed >= 600)
        await until(lambda: both.right)

    run(scenario)


def test_a_flood_holds_up_nobody_else() -> None:
    async def scenario(both: Pair) -> None:
        keys = [b"%032d" % number for number in range(feed.KEYS_MAX)]
        for _ in range(100):
            stored = both.daemon.store(SPACE, Medium.NVME, keys)
            both.feeder.say(stored, both.daemon.remove(SPACE, Medium.NVME, keys))
        waits_s = []
        while both.subscriber.statistics().seq != both.daemon.seq:
            began_s = time.monotonic()
            await asyncio.sleep(0)
            waits_s.append(time.monotonic() - began_s)
        # A frame takes some 5 ms; a turn of as many as there are would take half a second.
        assert sorted(waits_s)[-3] < 0.1
        await until(lambda: both.right)

    run(scenario)


class Swallower(Proxy):
    """A proxy that takes bytes and passes none of them on while `swallows` is set."""

    def __init__(self, target: tuple[str, int]) -> None:
        super().__init__(target)
        self.swallows = Event()
        self.swallowed = 0

    def _pass_on(self, source: Any, sink: Any, seen: bytearray, is_open: Event) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if self.swallows.is_set():
                    self.swallowed += len(data)
                else:
                    sink.sendall(data)
        for side in (source, sink):
            with suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)


@asynccontextmanager
async def at_a_distance(kind: Callable[[tuple[str, int]], Proxy]) -> AsyncIterator[tuple[Pair, Any]]:
    """A pair with a proxy between, who have met."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with kind(("127.0.0.1", port)) as proxy:
        async with pair(address=proxy.address.removeprefix("tcp://"), bind=f"127.0.0.1:{port}") as both:
            await until(lambda: both.right)
            yield both, proxy


def test_a_cut_link_is_made_anew_and_what_was_missed_comes() -> None:
    async def scenario() -> None:
        async with at_a_distance(Proxy) as (both, proxy):
            for number in range(3):
                both.store(b"before%d" % number)
                proxy.hang_up(proxy.connections - 1)
                both.store(b"after%d" % number)
                await until(lambda: both.right)
            assert both.subscriber.statistics().counters.resyncs == 0

    asyncio.run(scenario())


def test_a_link_that_swallows_bytes_is_given_up_and_healed_when_it_passes_them_again() -> None:
    async def scenario() -> None:
        async with at_a_distance(Swallower) as (both, proxy):
            proxy.swallows.set()
            both.store(b"swallowed")
            await until(lambda: both.subscriber.stream.silent)
            both.store(b"unheard")
            assert both.found(b"a") is None
            connections = proxy.connections
            await until(lambda: proxy.connections > connections)
            proxy.swallows.clear()
            began_s = time.monotonic()
            await until(lambda: both.right)
            assert time.monotonic() - began_s < HEALED_S + SLACK_S

    asyncio.run(scenario())


def test_a_link_that_loses_part_of_the_bytes_is_healed() -> None:
    async def scenario() -> None:
        async with at_a_distance(Swallower) as (both, proxy):
            proxy.swallows.set()
            both.store(b"swallowed")
            await until(lambda: proxy.swallowed)
            proxy.swallows.clear()
            both.store(b"heard")
            await until(lambda: both.right)

    asyncio.run(scenario())


def test_nobody_at_the_address_costs_nothing_and_is_found_when_it_comes() -> None:
    async def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        context = zmq.Context()
        locality = Locality()
        subscriber = NodeSubscriber(context, locality, Names(), f"127.0.0.1:{port}")
        subscriber.start()
        await until(lambda: subscriber.stream.silent)
        feeder = Feeder(context, f"127.0.0.1:{port}")
        feeder.daemon.store(SPACE, Medium.DRAM, [b"a"])
        both = Pair(feeder, subscriber, locality)
        await until(lambda: both.right)
        subscriber.close()
        feeder.close()
        ended(context)

    asyncio.run(scenario())


def test_no_more_sockets_is_said_and_survived(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        context = zmq.Context()
        context.set(zmq.MAX_SOCKETS, 1)
        taken = context.socket(zmq.PULL)
        subscriber = NodeSubscriber(context, Locality(), Names(), "127.0.0.1:1")
        subscriber.start()
        assert "127.0.0.1:1 cannot be followed now" in caplog.text
        subscriber.close()
        taken.close()
        ended(context)

    asyncio.run(scenario())


class Blocks:
    """What a daemon has, for its own side of the feed."""

    def __init__(self) -> None:
        self.keys: list[bytes] = []

    def held(self) -> list[Held]:
        return [Held(SPACE, Medium.DRAM, list(self.keys))] if self.keys else []

    def predecessors(self, _: Namespace, keys: Sequence[bytes]) -> list[bytes | None]:
        return [self.keys[place - 1] if (place := self.keys.index(key)) else b"" for key in keys]


def test_both_sides_of_the_feed_understand_each_other() -> None:
    async def scenario() -> None:
        context = zmq.Context()
        outbox, blocks = Outbox(), Blocks()
        server = FeedServer(
            context, ("127.0.0.1", 0), outbox, blocks, node="node-a", epoch=7, engines=["e:1"]
        )
        blocks.keys = [os.urandom(32) for _ in range(3000)]
        outbox.stored(SPACE, Medium.DRAM, blocks.keys, blocks.predecessors(SPACE, blocks.keys))
        locality, names = Locality(), Names()
        subscriber = NodeSubscriber(context, locality, names, server.endpoint)
        subscriber.start()
        await until(lambda: subscriber.statistics().blocks == 3000)
        gone, blocks.keys = blocks.keys[2000:], blocks.keys[:2000]
        outbox.removed(SPACE, Medium.DRAM, gone)
        await until(lambda: subscriber.statistics().blocks == 2000)
        heard_s = subscriber.stream.heard_s
        await until(lambda: subscriber.stream.heard_s > heard_s and outbox.seq == subscriber.statistics().seq)
        now = subscriber.statistics()
        assert (now.name, now.epoch, now.engines) == ("node-a", 7, ("e:1",))
        assert (now.counters.divergences, now.counters.malformed, now.counters.gaps) == (0, 0, 0)
        assert [depth for depth, _ in locality.depths(SPACE, blocks.keys + gone)] == [2000]
        subscriber.close()
        server.close()
        ended(context)

    asyncio.run(scenario())
