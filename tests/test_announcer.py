"""What a real daemon announces to other people's routers, in vLLM's protocol, and how they ask for more."""

import hashlib
import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import msgspec
import pytest
import zmq

from kvstore.block import Medium, Namespace
from kvstore.client import StoreClient
from kvstore.index import feed
from kvstore.index.announcer import Announcer
from kvstore.index.events import AllBlocksCleared, BlockRemoved, BlockStored, Event, decode_batch
from kvstore.index.vllm_terms import TOKENS_MAX, VllmTerms
from tests.node import Node, private_bytes, wait_for, written
from tests.test_client import MIB
from tests.test_feed_server import SMALL, on_a_loop, publishing
from tests.test_http import serve

MODEL: Final = "m"
NS: Final = Namespace(model=MODEL, block_tokens=4)
ENGINE: Final = Namespace(model=MODEL, block_tokens=4, scheme="vllm-sha256:12345678")
TOPIC: Final = b"kv@10.0.0.1:8000@m"
END: Final = b"\xff" * 8
# A number that none is above.
LAST: Final = (1 << 64) - 1
ANY: Final = 'publish = "127.0.0.1:0"\nreplay = "127.0.0.1:0"\nclear = false\n'
ONE: Final = ANY + 'engines = ["10.0.0.1:8000"]\n'
PATIENCE_S: Final = 20.0


def keys(count: int, tag: str = "k") -> list[bytes]:
    """Digests, as engines have."""
    return [hashlib.sha256(f"{tag}{index}".encode()).digest() for index in range(count)]


class Router:
    """Somebody's router: subscribed from the start, and what it was sent."""

    def __init__(self, publish: str, replay: str = "", topic: bytes = b"") -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        self.socket = self._context.socket(zmq.SUB)
        self.socket.subscribe(topic)
        self.socket.connect(f"tcp://{publish}")
        self._asking = self._context.socket(zmq.DEALER)
        if replay:
            self._asking.connect(f"tcp://{replay}")
        self.frames: list[tuple[bytes, int, bytes]] = []

    def take(self, wait_ms: int = 20) -> bool:
        if not self.socket.poll(wait_ms):
            return False
        topic, seq, payload = self.socket.recv_multipart()
        assert len(seq) == 8
        self.frames.append((topic, int.from_bytes(seq, "big"), payload))
        return True

    def events(self, topic: bytes = TOPIC) -> list[Event]:
        """All of a topic, which must be numbered without a gap, but where all begins anew."""
        events: list[Event] = []
        last = None
        for seq, payload in [(seq, payload) for name, seq, payload in self.frames if name == topic]:
            batch = decode_batch(payload).events
            assert last is None or seq == last + 1 or isinstance(batch[0], AllBlocksCleared)
            events += batch
            last = seq
        return events

    def replay(self, start: int, *topic: bytes) -> list[tuple[bytes, int, bytes]]:
        """Ask for what is kept, as vLLM's subscribers do."""
        self._asking.send_multipart([b"", start.to_bytes(8, "big"), *topic])
        answers = []
        while True:
            assert self._asking.poll(int(PATIENCE_S * 1000)), answers[-3:]
            empty, name, seq, payload = self._asking.recv_multipart()
            assert empty == b""
            if seq == END:
                assert (name, payload) == (b"", b"")
                return answers
            answers.append((name, int.from_bytes(seq, "big"), payload))

    def send(self, *frames: bytes) -> None:
        """Ask something else."""
        self._asking.send_multipart(frames)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._context.destroy(linger=0)


@contextmanager
def announcing(folder: Path, text: str = ONE, *flags: str, **more: str) -> Iterator[tuple[Node, StoreClient]]:
    with publishing(folder, text, *flags, **more) as node, node.client() as store:
        yield node, store


@contextmanager
def listening(node: Node, store: StoreClient, topic: bytes = b"") -> Iterator[Router]:
    """A router that is known to be subscribed: what is announced from now on reaches it."""
    with Router(node.endpoint("publish"), node.endpoint("replay"), topic) as router:
        deadline = time.monotonic() + PATIENCE_S
        number = 0
        while not router.take(20):
            assert time.monotonic() < deadline
            number += 1
            announce(store, Namespace(model=MODEL, salt=f"try {number}", block_tokens=4))
        while router.take(200):
            pass
        router.frames.clear()
        yield router


def announce(store: StoreClient, namespace: Namespace) -> None:
    with store.reserve(namespace, [b"?"], SMALL) as write:
        write.commit()
    store.remove(namespace, [b"?"])


def until(router: Router, count: int, topic: bytes = TOPIC) -> list[Event]:
    """The events of a topic once there are so many blocks in them."""
    deadline = time.monotonic() + PATIENCE_S
    while sum(len(getattr(event, "block_hashes", [])) for event in router.events(topic)) < count:
        assert time.monotonic() < deadline, router.events(topic)
        router.take()
    return router.events(topic)


def stored(events: list[Event]) -> list[BlockStored]:
    assert all(isinstance(event, BlockStored) for event in events)
    return [event for event in events if isinstance(event, BlockStored)]


def put(
    store: StoreClient,
    namespace: Namespace,
    names: list[bytes],
    tokens: list[int] | None = None,
    parent: bytes | None = b"",
) -> None:
    with store.reserve(namespace, names, SMALL, parent=parent, tokens=tokens) as write:
        assert write.granted == names
        write.commit()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, StoreClient]]:
    with announcing(tmp_path_factory.mktemp("announcer"), ONE + "tokens = true") as both:
        yield both


# Topics, numbers, replays.


def test_each_engine_has_a_topic_with_numbers_of_its_own(tmp_path: Path) -> None:
    engines = 'engines = ["10.0.0.1:8000", "10.0.0.2:8000@m", "10.0.0.3:8000@other"]'
    with (
        announcing(tmp_path, ANY + engines) as (node, store),
        Router(node.endpoint("publish"), node.endpoint("replay")) as router,
    ):
        put(store, NS, keys(3))
        put(store, Namespace(model="other"), keys(2))
        store.remove(NS, keys(1))
        wait_for(lambda: len(router.replay(0)) == 6)
        topics: dict[bytes, list[int]] = {}
        for topic, seq, _ in router.replay(0):
            topics.setdefault(topic, []).append(seq - store.statistics().epoch)
        assert topics == {
            b"kv@10.0.0.1:8000@m": [0, 1],
            b"kv@10.0.0.2:8000@m": [0, 1],
            b"kv@10.0.0.1:8000@other": [0],
            b"kv@10.0.0.3:8000@other": [0],
        }
        state = store.statistics().events
        assert state is not None
        assert state.topics == 4


def test_what_is_asked_for_again_is_what_was_sent(shared: tuple[Node, StoreClient]) -> None:
    node, store = shared
    with listening(node, store) as router:
        for number in range(20):
            put(store, NS, keys(5, f"{number}-"), tokens=list(range(20)))
            store.remove(NS, keys(5, f"{number}-"))
        until(router, 200)
        first = router.frames[0][1]
        assert router.replay(first) == router.frames
        assert router.replay(first, TOPIC) == router.frames
        assert router.replay(first + 7) == router.frames[7:]
        assert router.replay(0)[-len(router.frames) :] == router.frames
        assert router.replay(LAST) == []
        assert router.replay(0, b"kv@another@m") == []


def test_questions_that_are_none_are_counted_and_harm_nobody(shared: tuple[Node, StoreClient]) -> None:
    node, store = shared
    with Router(node.endpoint("publish"), node.endpoint("replay")) as router:
        before = store.statistics().events
        router.send(b"one")
        router.send(b"", b"nine bytes", b"topic")
        router.send(b"", b"1", b"topic", b"and", b"more")

        def counted() -> bool:
            after = store.statistics().events
            return after is not None and before is not None and after.refused == before.refused + 3

        wait_for(counted)
        assert router.replay(LAST) == []


def test_a_router_that_asks_twice_gets_both_answers_in_turn(shared: tuple[Node, StoreClient]) -> None:
    node, store = shared
    put(store, Namespace(model=MODEL, group="9"), keys(3))
    with Router(node.endpoint("publish"), node.endpoint("replay")) as router:
        wait_for(lambda: router.replay(0))
        once = router.replay(0)
        router.send(b"", bytes(8))
        assert router.replay(0) == once
        assert router.replay(0) == once
        assert router.replay(LAST) == once  # the answer to the one before


def test_ports_of_its_own_are_for_each_engine(tmp_path: Path) -> None:
    engines = 'engines = ["a:1", "b:1@m", "b:1@other"]\nports = "each"'
    with announcing(tmp_path, ANY + engines) as (node, store):
        ports = list(
            zip(node.endpoint("publish").split(","), node.endpoint("replay").split(","), strict=True)
        )
        assert len({port for pair in ports for port in pair}) == 4
        put(store, NS, keys(1))
        put(store, Namespace(model="other"), keys(1))
        for place, topics in enumerate([[b"kv@a:1@m", b"kv@a:1@other"], [b"kv@b:1@m", b"kv@b:1@other"]]):
            with Router(*ports[place]) as router:
                wait_for(lambda router=router: len(router.replay(0)) == 2)  # type: ignore[misc]
                assert [topic for topic, _, _ in router.replay(0)] == topics


def test_who_comes_after_another_says_first_that_all_is_cleared(tmp_path: Path) -> None:
    text = ONE.replace("clear = false", "clear = true").replace("127.0.0.1:0", "127.0.0.1:{}")
    with ExitStack() as stack:
        taken = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        ports = [each.getsockname()[1] for each in taken]
    with ExitStack() as stack:
        node, store = stack.enter_context(announcing(tmp_path, text.format(*ports)))
        router = stack.enter_context(Router(node.endpoint("publish"), node.endpoint("replay")))
        put(store, ENGINE, keys(2))
        first = until(router, 2)
        node.kill()
        node.start()
        with node.client() as again:
            put(again, ENGINE, keys(1))
            after = until(router, 3)[len(first) :]
        assert [type(event) for event in first] == [type(event) for event in after]
        assert [type(event) for event in after] == [AllBlocksCleared, BlockStored]
        assert router.frames[-1][1] > router.frames[1][1] + 1


def test_without_engines_nothing_is_announced(tmp_path: Path) -> None:
    with publishing(tmp_path) as node:
        assert re.search(r" feed=127\.0\.0\.1:\d+$", node.ready_line)


@pytest.mark.parametrize("name", ["publish", "replay"])
def test_an_address_that_is_taken_is_a_clear_error(
    shared: tuple[Node, StoreClient], tmp_path: Path, name: str
) -> None:
    node, _ = shared
    taken = node.endpoint(name)
    config = tmp_path / "node.toml"
    text = ONE.replace(f'{name} = "127.0.0.1:0"', f'{name} = "{taken}"')
    config.write_text(f'[events]\nfeed = "127.0.0.1:0"\n{text}')
    done = serve(node, config=str(config), socket=str(tmp_path / "sock"))
    assert done.returncode == 1
    assert f"kvstore: events.{name} address {taken}: Address already in use" in done.stderr


def test_a_router_that_does_not_read_costs_a_bounded_memory(tmp_path: Path) -> None:
    names = [keys(1, f"{number}-")[0] for number in range(1024)]
    with announcing(tmp_path) as (node, store), ExitStack() as stack:
        put(store, NS, names)
        store.remove(NS, names)
        stalled = [
            stack.enter_context(Router(node.endpoint("publish"), node.endpoint("replay"))) for _ in range(4)
        ]
        for each in stalled:
            each.socket.setsockopt(zmq.RCVHWM, 1)
            wait_for(lambda each=each: each.replay(0))  # type: ignore[misc]
        before = private_bytes(node.pid)
        for _ in range(400):
            put(store, NS, names)
            store.remove(NS, names)
        told = 800 * (1024 * 9 + 1024 * 34)
        assert private_bytes(node.pid) - before < told + 4 * 9 * MIB + 16 * MIB
        for each in stalled:
            each.send(b"", bytes(8))
        put(store, ENGINE, keys(1))
        with Router(node.endpoint("publish"), node.endpoint("replay")) as router:
            assert len(router.replay(store.statistics().epoch + 790)) >= 10


# What is said.


def test_blocks_are_told_with_their_tokens_and_what_they_follow(shared: tuple[Node, StoreClient]) -> None:
    node, store = shared
    a, b, c, d = keys(4, "tokens")
    with listening(node, store) as router:
        put(store, ENGINE, [a, b], list(range(8)))
        until(router, 2)
        put(store, ENGINE, [c], list(range(8, 12)), parent=b)
        first, second = stored(until(router, 3))
        assert first.block_hashes == [int.from_bytes(key[-8:], "big") for key in (a, b)]
        assert (first.parent_block_hash, list(first.tokens()), first.block_size) == (None, list(range(8)), 4)
        assert (first.medium, first.group_idx, first.locality, first.extra_keys) == ("CPU", 0, None, None)
        assert (second.parent_block_hash, list(second.tokens())) == (first.block_hashes[1], [8, 9, 10, 11])
        put(store, ENGINE, [d], [1, 2, 3, 4], parent=None)
        (*_, third) = stored(until(router, 4))
        assert (third.parent_block_hash, third.has_tokens, third.block_size) == (None, False, 0)
        store.remove(ENGINE, [a, b, c, d])
        (*_, last) = until(router, 8)
        assert isinstance(last, BlockRemoved)
        assert last.block_hashes == [*first.block_hashes, *second.block_hashes, *third.block_hashes]


def test_tokens_that_are_not_as_many_as_the_blocks_need_are_not_told(
    shared: tuple[Node, StoreClient],
) -> None:
    node, store = shared
    with listening(node, store) as router:
        put(store, ENGINE, keys(2, "few"), list(range(7)))
        (event,) = stored(until(router, 2))
        assert (event.has_tokens, event.block_size, event.parent_block_hash) == (False, 0, None)


def test_no_tokens_are_told_where_they_are_not_switched_on(tmp_path: Path) -> None:
    with announcing(tmp_path) as (node, store), listening(node, store) as router:
        put(store, ENGINE, keys(2), list(range(8)))
        (event,) = stored(until(router, 2))
        assert (event.has_tokens, event.block_size, event.parent_block_hash) == (False, 0, None)


def test_a_block_that_has_moved_down_is_told_of_with_its_tokens(tmp_path: Path) -> None:
    with ExitStack() as stack:
        disk = ("--nvme", f"{tmp_path}/disk:64MiB")
        node, store = stack.enter_context(announcing(tmp_path, ONE + "tokens = true", *disk))
        router = stack.enter_context(listening(node, store))
        put(store, ENGINE, keys(2), list(range(8)))
        above, *below = stored(until(router, 4))
        assert {event.medium for event in below} == {"STORAGE"}
        assert [token for event in below for token in event.tokens()] == list(range(8))
        assert below[0].parent_block_hash is None
        assert [h for event in below for h in event.block_hashes] == above.block_hashes
        wait_for(lambda: written(store))


def test_long_chains_are_parted_and_go_on(shared: tuple[Node, StoreClient]) -> None:
    node, store = shared
    namespace = Namespace(model=MODEL, block_tokens=256, scheme="vllm-sha256:0")
    names, tokens = keys(300, "long"), list(range(300 * 256))
    with listening(node, store) as router:
        put(store, namespace, names, tokens)
        events = stored(until(router, 300))
        assert [token for event in events for token in event.tokens()] == tokens
        ends = [None, *[event.block_hashes[-1] for event in events]]
        assert [event.parent_block_hash for event in events] == ends[:-1]
        assert max(len(event.tokens()) for event in events) <= TOKENS_MAX
        assert max(len(payload) for _, _, payload in router.frames) < 256 << 10


def test_namespaces_never_share_a_hash_but_engines_own(shared: tuple[Node, StoreClient]) -> None:
    node, store = shared
    others = [
        NS,
        Namespace(model=MODEL, block_tokens=4, dtype="half"),
        Namespace(model=MODEL, block_tokens=4, salt="tenant"),
        Namespace(model=MODEL, block_tokens=4, group="1"),
        Namespace(model=MODEL, block_tokens=4, scheme="lmcache-blake3:1"),
        Namespace(model=MODEL, block_tokens=4, scheme=ENGINE.scheme, salt="tenant"),
        ENGINE,
    ]
    with listening(node, store) as router:
        for each in others:
            put(store, each, keys(2, "shared"), list(range(8)))
        events = stored(until(router, 2 * len(others)))
        hashes = [h for event in events for h in event.block_hashes]
        assert len(set(hashes)) == len(hashes)
        assert events[-1].block_hashes == [int.from_bytes(key[-8:], "big") for key in keys(2, "shared")]
        for each in others:
            store.remove(each, keys(2, "shared"))
        removed = [
            h
            for event in until(router, 4 * len(others))
            if isinstance(event, BlockRemoved)
            for h in event.block_hashes
        ]
        assert sorted(removed) == sorted(hashes)  # type: ignore[type-var]


def test_a_salted_block_says_so(shared: tuple[Node, StoreClient]) -> None:
    node, store = shared
    salted = Namespace(model=MODEL, block_tokens=4, scheme=ENGINE.scheme, salt="tenant")
    with listening(node, store) as router:
        put(store, salted, keys(2, "s"), list(range(8)))
        until(router, 2)
        put(store, salted, keys(3, "s")[2:], list(range(8, 12)), parent=keys(2, "s")[1])
        first, second = stored(until(router, 3))
        assert (first.cache_salt, first.extra_keys) == ("tenant", [("tenant",), None])
        assert (second.cache_salt, second.extra_keys) == ("tenant", None)
        assert second.parent_block_hash == first.block_hashes[1]


def test_a_block_is_there_when_all_its_shards_are(shared: tuple[Node, StoreClient]) -> None:
    node, store = shared
    a, b = (
        Namespace(model=MODEL, block_tokens=4, scheme=ENGINE.scheme, shard=f"{rank}/2") for rank in range(2)
    )
    names = keys(3, "shards")
    with listening(node, store) as router:
        put(store, a, names, list(range(12)))
        put(store, b, names[:1], list(range(4)))
        until(router, 1)
        put(store, b, names[1:], list(range(4, 12)), parent=names[0])
        first, second = stored(until(router, 3))
        assert (list(first.tokens()), list(second.tokens())) == (list(range(4)), list(range(4, 12)))
        store.remove(a, names[:2])
        store.remove(b, names[:2])
        put(store, a, names[:1], list(range(4)))
        put(store, ENGINE, keys(1, "mark"), list(range(4)))
        *_, removed, mark = until(router, 6)
        assert isinstance(removed, BlockRemoved)
        assert removed.block_hashes == [*first.block_hashes, second.block_hashes[0]]
        assert stored([mark])[0].block_hashes == [int.from_bytes(keys(1, "mark")[0][-8:], "big")]


def test_arrays_are_as_llm_d_decodes_them(tmp_path: Path) -> None:
    with ExitStack() as stack:
        text = ONE + 'tokens = true\nformat = "arrays"'
        node, store = stack.enter_context(announcing(tmp_path, text))
        router = stack.enter_context(Router(node.endpoint("publish"), node.endpoint("replay")))
        put(store, ENGINE, keys(2), list(range(8)))
        put(store, Namespace(model=MODEL, block_tokens=4, salt="tenant"), keys(2), list(range(8)))
        store.remove(ENGINE, keys(1))
        wait_for(lambda: len(router.replay(0)) == 2)
        one, two = [msgspec.msgpack.decode(payload) for _, _, payload in router.replay(0)]
        hashes = [int.from_bytes(key[-8:], "big") for key in keys(2)]
        assert one[1] == [
            ["BlockStored", hashes, None, list(range(8)), 4, None, "CPU", None, None, 0, None, None]
        ]
        assert two[1] == [["BlockRemoved", hashes[:1], "CPU", 0]]
        assert abs(one[0] - time.time()) < 60


# The terms, without a daemon.


def say(terms: VllmTerms, event: feed.Stored | feed.Removed) -> list[Event]:
    return terms.say(event)[1]


def test_what_is_remote_is_said_to_be_external() -> None:
    terms = VllmTerms(lambda *_: None, arrays=False)
    for event in (
        feed.Stored(NS.canonical, Medium.REMOTE, b"", [b"k"]),
        feed.Removed(NS.canonical, Medium.REMOTE, [b"k"]),
    ):
        (said,) = say(terms, event)
        assert isinstance(said, BlockStored | BlockRemoved)
        assert (said.medium, said.locality) == ("EXTERNAL", "REMOTE")


@pytest.mark.parametrize("shard", ["0/1", "", "both", "3/2", "0/99999", "0/0"])
def test_what_is_no_shard_is_a_block_of_its_own(shard: str) -> None:
    terms = VllmTerms(lambda *_: None, arrays=False)
    namespace = Namespace(model=MODEL, shard=shard)
    assert len(say(terms, feed.Stored(namespace.canonical, Medium.DRAM, None, [b"k"]))) == 1
    assert len(say(terms, feed.Removed(namespace.canonical, Medium.DRAM, [b"k"]))) == 1


def test_shards_of_each_medium_are_counted_apart_and_forgotten() -> None:
    terms = VllmTerms(lambda *_: None, arrays=False)
    shards = [Namespace(model=MODEL, shard=f"{rank}/3:0/1").canonical for rank in range(3)]
    for medium in (Medium.DRAM, Medium.NVME):
        said = [say(terms, feed.Stored(shard, medium, None, [b"k", b"l"])) for shard in shards]
        assert list(map(len, said)) == [0, 0, 1]
    said = [say(terms, feed.Removed(shard, Medium.DRAM, [b"k", b"l"])) for shard in shards]
    assert list(map(len, said)) == [1, 0, 0]
    assert say(terms, feed.Removed(shards[1], Medium.NVME, [b"l"]))
    assert not say(terms, feed.Removed(shards[1], Medium.DRAM, [b"l"]))
    (again,) = say(terms, feed.Stored(shards[1], Medium.NVME, None, [b"l"]))
    assert isinstance(again, BlockStored)
    assert len(again.block_hashes) == 1


def test_models_beyond_the_limit_are_not_announced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("kvstore.index.announcer.MODELS_MAX", 3)

    async def body() -> None:
        context: zmq.Context[Any] = zmq.Context()
        anywhere = ("127.0.0.1", 0)
        announcer = Announcer(context, ["e"], lambda *_: None, publish=anywhere, replay=anywhere, clear=False)
        try:
            for number in range(6):
                name = Namespace(model=str(number)).canonical
                announcer.announce([feed.Stored(name, Medium.DRAM, None, [b"k"])], 1.0)
            assert announcer.topics == 3
        finally:
            announcer.close()
            context.destroy(linger=0)

    on_a_loop(body)
    assert caplog.text.count("3 models are announced, which is the limit: 3 is not") == 1
