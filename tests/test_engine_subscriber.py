"""The index subscribed to engines over real sockets; the publishers are processes that come and go."""

import asyncio
import math
import random
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from typing import Any, Final

import pytest
import zmq

from kvstore.block import Namespace
from kvstore.errors import ConfigError
from kvstore.index import engine_subscriber, resolver
from kvstore.index.engine_source import EngineKind, EngineSource
from kvstore.index.engine_subscriber import EngineSubscriber
from kvstore.index.events import BlockStored, encode_batch, pack_tokens
from kvstore.index.locality import Locality
from kvstore.index.placement import Engine
from kvstore.index.resolver import Resolver
from tests.event_publisher import EventPublisher

NAME: Final = "10.0.0.1:8000"
SPACE: Final = Namespace("m", 16, scheme="vllm-x")
WITHIN_S: Final = 20.0


class Listener:
    """A subscriber, and what the index says of its engine."""

    def __init__(self, *words: str, resolver: Resolver | None = None) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.locality = Locality(blocks_max=1_000_000)
        endpoint, replay, topic = [*words, "", ""][:3]
        source = EngineSource(NAME, EngineKind.VLLM, "m", 16, SPACE.scheme, endpoint, replay, topic)
        self.subscriber = EngineSubscriber(self.context, source, self.locality, resolver or Resolver())

    def has(self, *keys: int) -> int:
        """Leading blocks in gpu."""
        (found,) = self.locality.find({SPACE: keys}, [Engine(NAME)])
        return found.gpu // 16

    @property
    def statistics(self) -> Any:
        return self.subscriber.statistics()

    async def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WITHIN_S
        while not condition():
            assert time.monotonic() < deadline, self.statistics
            await asyncio.sleep(0.005)


@asynccontextmanager
async def listening(*words: str, resolver: Resolver | None = None) -> AsyncIterator[Listener]:
    listener = Listener(*words, resolver=resolver)
    try:
        yield listener
    finally:
        listener.subscriber.close()
        # Hangs, and so fails, if a socket is left.
        await asyncio.wait_for(asyncio.to_thread(listener.context.term), WITHIN_S)


def chain(keys: Iterable[int]) -> list[list[int | None]]:
    """Events of blocks that follow each other."""
    events: list[list[int | None]] = []
    for key in keys:
        events.append([key, events[-1][0] if events else None])
    return events


def scenario(function: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(function())

    run.__name__ = function.__name__
    return run


@scenario
async def test_an_engine_that_was_there_before_is_known_at_once_and_followed() -> None:
    with EventPublisher() as engine:
        engine.publish(chain([1, 2]), [[3, 2]])
        async with listening(engine.endpoint, engine.replay) as index:
            await index.until(lambda: index.has(1, 2, 3) == 3)
            engine.publish([[4, 3]], [[-3]])
            await index.until(lambda: index.has(1, 2, 3, 4) == 2)
            assert (index.statistics.seq, index.statistics.incomplete) == (3, False)


@scenario
async def test_an_engine_that_comes_later_is_known_then() -> None:
    with EventPublisher() as engine:
        engine.publish([[1]])
        engine.kill()
        async with listening(engine.endpoint, engine.replay) as index:
            assert not index.statistics.connected
            engine.start()
            engine.publish([[2]])
            await index.until(lambda: index.has(2) == 1)
            assert (index.has(1), index.statistics.connected) == (0, True)


@scenario
async def test_an_engine_killed_and_started_again_leaves_nothing_stale() -> None:
    with EventPublisher() as engine:
        async with listening(engine.endpoint, engine.replay) as index:
            for life in range(2):
                key = life * 1000 + 1
                engine.publish(*[[event] for event in chain(range(key, key + 100))])
                await index.until(lambda key=key: index.has(*range(key, key + 100)) == 100)  # type: ignore[misc]
                assert index.statistics.blocks == 100
                engine.kill()
                await index.until(lambda: not index.statistics.connected)
                engine.start()
            await index.until(lambda: index.statistics.connected and index.statistics.blocks == 0)


@scenario
async def test_an_engine_started_again_whose_replay_never_answers_is_not_told_as_it_was() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    silent = context.socket(zmq.ROUTER)
    silent.bind("tcp://127.0.0.1:*")
    publisher = context.socket(zmq.XPUB)
    publisher.bind("tcp://127.0.0.1:*")
    endpoint = publisher.getsockopt_string(zmq.LAST_ENDPOINT)
    event = BlockStored([1], None, pack_tokens([1]), 16, None, "GPU")
    async with listening(endpoint, silent.getsockopt_string(zmq.LAST_ENDPOINT)) as index:
        await asyncio.to_thread(publisher.recv)
        assert index.subscriber.age_s() == math.inf
        publisher.send_multipart([b"", bytes(8), encode_batch([event], 1.0, arrays=False)])
        await index.until(lambda: index.has(1) == 1 and index.subscriber.age_s() == 0.0)
        publisher.close(0)
        await index.until(lambda: not index.statistics.connected)
        assert 0.0 < index.subscriber.age_s() < math.inf
        publisher = context.socket(zmq.XPUB)
        publisher.bind(endpoint)
        await index.until(lambda: bool(index.statistics.connected))
        assert (index.has(1), index.statistics.muted) == (0, True)
        assert 0.0 < index.subscriber.age_s() < math.inf
    publisher.close(0)
    silent.close(0)
    context.term()


@scenario
async def test_an_engine_that_hangs_is_left_out_and_counts_again_when_it_goes_on() -> None:
    with EventPublisher() as engine:
        engine.publish([[1]])
        async with listening(engine.endpoint, engine.replay) as index:
            await index.until(lambda: index.has(1) == 1)
            engine.process.send_signal(signal.SIGSTOP)
            await index.until(lambda: index.has(1) == 0)
            engine.process.send_signal(signal.SIGCONT)
            await index.until(lambda: index.has(1) == 1)
            assert index.statistics.restarts == 0


@scenario
async def test_one_batch_of_a_hundred_lost_is_made_up_for() -> None:
    with EventPublisher(dropped=0.01) as engine:
        async with listening(engine.endpoint, engine.replay) as index:
            await index.until(lambda: index.statistics.connected)
            choose = random.Random(5)
            truth: set[int] = set()
            for _ in range(40):
                batches: list[list[list[int | None]]] = []
                for _ in range(50):
                    key = choose.randrange(1, 300)
                    batches.append([[-key]] if key in truth else [[key]])
                    truth ^= {key}
                engine.publish(*batches)
                await asyncio.sleep(0)
            await index.until(lambda: {key for key in range(1, 300) if index.has(key)} == truth)
            assert index.statistics.gaps
            assert not index.statistics.incomplete


@scenario
async def test_other_topics_and_garbage_are_passed_over() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    publisher = context.socket(zmq.XPUB)
    publisher.bind("tcp://127.0.0.1:*")
    good = encode_batch([BlockStored([1], None, pack_tokens([1]), 16, None, "GPU")], 1.0, arrays=True)
    async with listening(publisher.getsockopt_string(zmq.LAST_ENDPOINT), "", "kv@a") as index:
        assert await asyncio.to_thread(publisher.recv) == b"\x01kv@a"
        for frames in (
            [b"kv@ab", bytes(8), good],
            [b"kv@a", b"short", good],
            [b"kv@a"],
            [b"kv@a", bytes(8), random.Random(1).randbytes(100_000)],
            [b"kv@a", (1).to_bytes(8, "big"), good],
        ):
            publisher.send_multipart(frames)
        await index.until(lambda: index.has(1) == 1)
        assert index.statistics.ignored == {"topic": 1}
        assert (index.statistics.undecodable, index.statistics.incomplete) == (3, True)
    publisher.close(0)
    context.term()


@scenario
async def test_a_batch_that_is_too_long_for_one_turn_is_never_read() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    publisher = context.socket(zmq.XPUB)
    publisher.bind("tcp://127.0.0.1:*")
    async with listening(publisher.getsockopt_string(zmq.LAST_ENDPOINT)) as index:
        for seq, tokens in enumerate(([1] * (4 << 20), [1])):
            assert (await asyncio.to_thread(publisher.recv))[0] == 1  # connected, if need be again
            event = BlockStored([seq + 1], None, pack_tokens(tokens), 16, None, "GPU")
            payload = encode_batch([event], 1.0, arrays=False)
            publisher.send_multipart([b"", seq.to_bytes(8, "big"), payload])
            if not seq:
                assert (await asyncio.to_thread(publisher.recv))[0] == 0  # hung up
        await index.until(lambda: index.has(2) == 1)
        assert index.has(1) == 0
    publisher.close(0)
    context.term()


async def longest_pause(of: Coroutine[Any, Any, None]) -> float:
    """How long the loop let nothing else run meanwhile."""
    longest, task = 0.0, asyncio.ensure_future(of)
    while not task.done():
        before = time.perf_counter()
        await asyncio.sleep(0)
        longest = max(longest, time.perf_counter() - before)
    await task
    return longest


@scenario
async def test_a_long_replay_holds_up_nobody() -> None:
    with EventPublisher() as engine:
        engine.publish(*[[event] for event in chain(range(1, 10_001))])
        async with listening(engine.endpoint, engine.replay) as index:
            pause_s = await longest_pause(index.until(lambda: index.statistics.blocks == 10_000))
            assert index.has(*range(1, 10_001)) == 10_000
            # Alone on two cores it is 9 ms, most of which others take.
            assert pause_s < 0.1


@scenario
async def test_a_flood_holds_up_no_other_engine() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    flooder = context.socket(zmq.PUB)
    flooder.bind("tcp://127.0.0.1:*")
    stop = asyncio.Event()

    def flood() -> None:
        seq = 0
        while not stop.is_set():
            seq += 1
            flooder.send_multipart([b"", seq.to_bytes(8, "big"), bytes(random.Random(seq).randbytes(64))])

    async with listening(flooder.getsockopt_string(zmq.LAST_ENDPOINT)) as flooded:
        flooding = asyncio.ensure_future(asyncio.to_thread(flood))
        await flooded.until(lambda: flooded.statistics.undecodable > 100)
        with EventPublisher() as engine:
            async with listening(engine.endpoint, engine.replay) as index:
                engine.publish(chain(range(1, 100)))
                await index.until(lambda: index.has(*range(1, 100)) == 99)
                engine.publish([[100, 99]])
                await index.until(lambda: index.has(*range(1, 101)) == 100)
        stop.set()
        await flooding
    flooder.close(0)
    context.term()


@scenario
async def test_an_endpoint_that_is_none_is_refused() -> None:
    with zmq.Context() as context:
        for endpoints in (("nowhere",), ("tcp://127.0.0.1:1", "nowhere")):
            source = EngineSource(NAME, EngineKind.VLLM, "m", 16, SPACE.scheme, *endpoints)
            with pytest.raises(ConfigError, match="nowhere"):
                EngineSubscriber(context, source, Locality(), Resolver())


@scenario
async def test_a_name_that_takes_long_to_look_up_holds_up_no_other_engine() -> None:
    answered = asyncio.Event()

    async def look_up(host: str) -> list[str]:
        if host == "slow.example":
            await answered.wait()
        return ["127.0.0.1"]

    names = Resolver(look_up)
    with EventPublisher() as engine:
        engine.publish(chain([1, 2]))
        words = [each.replace("127.0.0.1", "slow.example") for each in (engine.endpoint, engine.replay)]
        quickly = [each.replace("slow", "quick") for each in words]
        async with (
            listening(*words, resolver=names) as slow,
            listening(*quickly, resolver=names) as quick,
        ):
            await quick.until(lambda: quick.has(1, 2) == 2)
            assert slow.has(1) == 0
            answered.set()
            await slow.until(lambda: slow.has(1, 2) == 2)


@scenario
async def test_a_name_is_looked_up_as_this_machine_does() -> None:
    with EventPublisher() as engine:
        engine.publish(chain([1, 2]))
        words = [each.replace("127.0.0.1", "localhost") for each in (engine.endpoint, engine.replay)]
        async with listening(*words) as index:
            await index.until(lambda: index.has(1, 2) == 2)


@scenario
async def test_an_engine_that_has_moved_is_found_by_its_name() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    names = ["127.0.0.3", "127.0.0.1"]  # nobody is at the first
    event = BlockStored([1], None, pack_tokens([1]), 16, None, "GPU")
    payload = encode_batch([event], 1.0, arrays=False)

    async def look_up(_: str) -> list[str]:
        if not names:
            raise OSError("the resolver is away")
        return list(names)

    def publisher(address: str, port: str) -> zmq.Socket[bytes]:
        socket = context.socket(zmq.XPUB)
        socket.bind(f"tcp://{address}:{port}")
        return socket

    async def hears(index: Listener, socket: zmq.Socket[bytes]) -> None:
        await asyncio.to_thread(socket.recv)
        socket.send_multipart([b"", bytes(8), payload])
        await index.until(lambda: index.has(1) == 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_subscriber, "_DIAL_S", 0.2)
        patch.setattr(engine_subscriber, "_MOVED_S", 0.2)
        patch.setattr(resolver, "_RETRY_S", 0.1)
        here = publisher("127.0.0.1", "*")
        port = here.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2]
        there = publisher("127.0.0.2", port)
        async with listening(f"tcp://engine.example:{port}", resolver=Resolver(look_up)) as index:
            await hears(index, here)
            names.clear()
            here.close(0)
            await index.until(lambda: not index.statistics.connected)
            names.append("127.0.0.2")
            await hears(index, there)
            names[:] = ["127.0.0.1"]  # though who is at the other address goes on
            here = publisher("127.0.0.1", port)
            await hears(index, here)
            assert index.statistics.connected
    here.close(0)
    there.close(0)
    context.term()
