"""Fuzzing what the daemon decodes: in process, and over the wire against one that others are using.

Bounded: each test draws batches of examples until its seconds are over.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kvstore import packing, protocol
from kvstore.block import KEY_BYTES_MAX, Namespace
from kvstore.client import StoreClient
from kvstore.errors import InvalidRequest, ProtocolError
from kvstore.protocol import HEADER, KEYS_MAX, Keys, frame
from tests.node import Node, RawConnection, open_files, wait_for

MIB = 1 << 20
DECODE_S = 3.0
LIVE_S = 7.0
FUZZ = settings(
    max_examples=50,
    deadline=None,
    database=None,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.function_scoped_fixture,
        HealthCheck.data_too_large,
    ],
)
NAMESPACES = [Namespace(model="fuzz"), Namespace(model="fuzz", salt="other")]


# Values, and the messages that they make.

LENGTHS = st.one_of(
    st.integers(1, 70_000),
    st.sampled_from([0, -1, 1, MIB, 32 * MIB, 64 * MIB, 64 * MIB + 1, 1 << 40, (1 << 64) - 1, -(1 << 63)]),
)
NUMBERS = st.one_of(st.integers(-2, 6), st.integers(-(1 << 63), (1 << 64) - 1))
# Small ones stand for leases that were granted (see `Talk.lease`), large ones for none.
LEASES = st.one_of(st.integers(0, 7), st.integers(0, 7), NUMBERS)
HANDLES = st.one_of(st.integers(0, 1), st.integers(0, 1), st.integers(0, 1), NUMBERS)
WAITS = st.one_of(
    st.just(0.0),
    st.just(0.0),
    st.floats(0, 0.05),
    st.floats(),
    st.sampled_from([float("nan"), float("inf"), -1.0, 3600.0, 3600.1, 1e308]),
)
# Few different keys, so that requests meet.
SOME_KEYS = st.lists(st.sampled_from([b"k%d" % index for index in range(12)]), min_size=1, max_size=8)
DISTINCT_KEYS = st.lists(
    st.sampled_from([b"k%d" % index for index in range(12)]), min_size=1, max_size=8, unique=True
)


def packed(names: list[bytes]) -> Keys:
    """As `pack_keys`, without its checks."""
    widths = {len(name) for name in names}
    return Keys(b"".join(names), widths.pop() if len(widths) == 1 else [len(name) for name in names])


WILD_KEYS = st.builds(
    Keys,
    st.binary(max_size=200),
    st.one_of(NUMBERS, st.integers(1, 64), st.lists(st.one_of(st.integers(1, 5), NUMBERS), max_size=40)),
)
KEYS = st.one_of(DISTINCT_KEYS.map(packed), DISTINCT_KEYS.map(packed), SOME_KEYS.map(packed), WILD_KEYS)
TEXTS = st.text(max_size=20)
BYTES = st.binary(max_size=40)
OPENINGS = st.one_of(
    st.lists(st.sampled_from(NAMESPACES), max_size=4).map(
        lambda many: protocol.OpenNamespaces([ns.id for ns in many], many)
    ),
    st.builds(
        protocol.OpenNamespaces,
        st.lists(st.sampled_from([NAMESPACES[0].id, b"", bytes(16)]), max_size=3),
        st.lists(st.sampled_from(NAMESPACES), max_size=3),
    ),
)
REQUESTS: st.SearchStrategy[Any] = st.one_of(
    st.builds(
        protocol.Reserve,
        HANDLES,
        KEYS,
        st.one_of(st.integers(1, 70_000), LENGTHS, st.lists(LENGTHS, max_size=8)),
        st.one_of(st.none(), BYTES, st.sampled_from([b"k0", b"k1", b"k2"])),
        st.one_of(st.none(), BYTES),
        WAITS,
    ),
    st.builds(protocol.Reserve, HANDLES, DISTINCT_KEYS.map(packed), st.integers(1, 70_000)),
    st.builds(protocol.ReserveEach, st.lists(HANDLES, max_size=8), KEYS, st.one_of(LENGTHS, NUMBERS), WAITS),
    SOME_KEYS.map(lambda names: protocol.ReserveEach([0] * len(names), packed(names), 4096)),
    st.builds(protocol.Commit, LEASES, st.one_of(st.none(), st.none(), st.lists(NUMBERS, max_size=5))),
    st.builds(protocol.Abort, LEASES),
    st.builds(protocol.Acquire, HANDLES, KEYS, WAITS),
    st.builds(protocol.AcquireEach, st.lists(HANDLES, max_size=8), KEYS),
    SOME_KEYS.map(lambda names: protocol.AcquireEach([0] * len(names), packed(names))),
    st.builds(protocol.Release, st.lists(LEASES, max_size=4)),
    st.builds(protocol.HitLengthOf, HANDLES, KEYS),
    st.builds(protocol.HitEach, st.lists(HANDLES, max_size=8), KEYS),
    st.builds(protocol.Remove, HANDLES, KEYS),
    st.builds(protocol.ListKeys, HANDLES, NUMBERS, NUMBERS),
    st.builds(protocol.ListNamespaces, BYTES),
    st.builds(protocol.OpenArena, NUMBERS, st.booleans()),
    OPENINGS,
    st.sampled_from([protocol.GetStatistics(), protocol.Check(), protocol.Proof(b""), protocol.Goodbye()]),
    st.builds(
        protocol.Hello,
        NUMBERS,
        NUMBERS,
        BYTES,
        TEXTS,
        st.lists(BYTES, max_size=3),
        st.lists(NUMBERS, max_size=3),
    ),
)


@dataclass(frozen=True)
class Mutation:
    """Replace `removed` bytes at a place (a fraction of the whole) by others."""

    at: float
    removed: int
    added: bytes

    def __call__(self, data: bytes) -> bytes:
        start = int(self.at * len(data))
        return data[:start] + self.added + data[start + self.removed :]


MUTATIONS = st.lists(
    st.builds(Mutation, st.floats(0, 1), st.integers(0, 4), st.binary(max_size=4)), min_size=1, max_size=4
)


def mutated(data: bytes, mutations: list[Mutation]) -> bytes:
    for mutation in mutations:
        data = mutation(data)
    return data


def until(seconds: float) -> Callable[[], bool]:
    """Whether there is time left."""
    ends = time.monotonic() + seconds
    return lambda: time.monotonic() < ends


# In process: what the decoder lets through, and what it raises.


def decode(body: bytes) -> None:
    """What the daemon does with a body before it looks at its store."""
    try:
        request = protocol.decode_request(body)
    except ProtocolError:
        return
    names = getattr(request, "keys", None)
    if isinstance(names, Keys):
        with contextlib.suppress(InvalidRequest):
            found = packing.unpack_keys(names)
            assert 1 <= len(found) <= KEYS_MAX
            assert all(1 <= len(name) <= KEY_BYTES_MAX for name in found)
            assert b"".join(found) == names.joined
        with contextlib.suppress(InvalidRequest):
            packing.spread(getattr(request, "lengths", 0), 3)


def test_random_bodies_are_decoded_or_refused() -> None:
    time_left = until(DECODE_S)

    @FUZZ
    @given(st.binary(max_size=300))
    @example(b"")
    @example(b"\x91" * 5000)
    @example(b"\xdd\xff\xff\xff\xff")
    @example(b"\xc6\xff\xff\xff\xff")
    @example(msgspec.msgpack.encode([5, 0, [b"", 1 << 63], 1]))
    def run(body: bytes) -> None:
        decode(body)

    while time_left():
        run()


def test_mutated_requests_are_decoded_or_refused() -> None:
    time_left = until(DECODE_S)

    @FUZZ
    @given(REQUESTS, MUTATIONS)
    def run(request: Any, mutations: list[Mutation]) -> None:
        body = frame(1, request)[HEADER.size :]
        decode(body)
        decode(mutated(body, mutations))

    while time_left():
        run()


@settings(max_examples=300, deadline=None, database=None)
@given(st.lists(st.binary(min_size=1, max_size=KEY_BYTES_MAX), min_size=1, max_size=200))
def test_packed_keys_unpack_to_what_they_were(names: list[bytes]) -> None:
    keys = msgspec.msgpack.decode(msgspec.msgpack.encode(packing.pack_keys(names)), type=Keys)
    assert packing.unpack_keys(keys) == names


@settings(max_examples=300, deadline=None, database=None)
@given(st.lists(st.integers(0, 1 << 64), max_size=20))
def test_gathered_numbers_spread_to_what_they_were(values: list[int]) -> None:
    assert list(packing.spread(packing.gather(values), len(values))) == values


# Over the wire.


@dataclass(frozen=True)
class Step:
    """One request of one of the connections; `payload_bytes` None is the right payload, over TCP."""

    connection: int
    request: Any
    wants_answer: bool
    payload_bytes: int | None
    mutations: list[Mutation]


STEPS = st.lists(
    st.builds(
        Step,
        st.integers(0, 2),
        REQUESTS,
        st.integers(0, 9).map(bool),
        st.one_of(st.none(), st.none(), st.none(), st.sampled_from([0, 1, 100, 70_000, 33 * MIB, 1 << 63])),
        st.one_of(st.just([]), st.just([]), st.just([]), st.just([]), MUTATIONS),
    ),
    min_size=1,
    max_size=14,
)


class Talk:
    """A conversation on one connection of a fuzzed client, which is forgiven all it says."""

    def __init__(self, address: Any) -> None:
        self._raw = RawConnection(address, greet=False)
        welcome = self._raw.ask(protocol.Hello(protocol.MAJOR, protocol.MINOR, bytes(32)))
        assert isinstance(welcome, protocol.Welcome)
        self.session = welcome.session
        self._shares_memory = bool(welcome.arena_bytes)
        self._leases: list[tuple[int, int]] = []  # id and bytes
        for namespace in NAMESPACES:
            self._raw.open(namespace)
        self._garbled = False
        self.over = False

    def say(self, step: Step) -> None:
        """Send a step's request; read its answer if it comes at once, else later or never."""
        if self.over:
            return
        request, payload_bytes = self._resolved(step.request), step.payload_bytes
        if payload_bytes is None:
            payload_bytes = self._right_payload(request)
        self._raw.request_id += 1
        request_id = self._raw.request_id if step.wants_answer else 0
        data = frame(request_id, request, payload_bytes) + bytes(min(payload_bytes, 70_000))
        if step.mutations:
            data = mutated(data, step.mutations)
        answers = step.wants_answer and not step.mutations and getattr(request, "wait_s", 0.0) == 0
        # After a mutated frame the daemon may be waiting for the rest of something.
        self._garbled = self._garbled or bool(step.mutations) or payload_bytes > 70_000
        answers = answers and not self._garbled
        try:
            self._raw.send(data)
            if answers:
                self._read_until(request_id, request)
        except ConnectionError:
            self.over = True

    def end(self) -> None:
        """Say no more, and take what there is until the daemon hangs up."""
        with contextlib.suppress(OSError):
            self._raw.sock.shutdown(1)
            self._raw.closed()
        self._raw.close()

    def _read_until(self, request_id: int, request: Any) -> None:
        while True:
            head = HEADER.unpack(self._raw._exactly(HEADER.size))
            answer = protocol.decode_answer(self._raw._exactly(head[0]))
            assert not head[2] or not self._shares_memory
            self._raw._exactly(head[2])
            if isinstance(answer, protocol.Failure):
                assert answer.code != "internal", (request, answer)
                assert answer.text
                self.over = self.over or head[1] == 0
            elif isinstance(answer, protocol.Report):
                assert answer.wrong == [], (request, answer)
            elif isinstance(answer, protocol.Granted | protocol.Acquired) and answer.lease:
                nbytes = sum(packing.spread(answer.slots.lengths, self._count(answer)))
                self._leases.append((answer.lease, nbytes))
            if head[1] == request_id or self.over:
                return

    @staticmethod
    def _count(answer: protocol.Granted | protocol.Acquired) -> int:
        if isinstance(answer, protocol.Granted):
            return answer.status.count(b"g")
        return len(answer.slots.offsets)

    def _lease(self, number: int) -> int:
        return self._leases[-1 - number][0] if 0 <= number < len(self._leases) else number

    def _resolved(self, request: Any) -> Any:
        if isinstance(request, protocol.Commit):
            return protocol.Commit(self._lease(request.lease), request.indices)
        if isinstance(request, protocol.Abort):
            return protocol.Abort(self._lease(request.lease))
        if isinstance(request, protocol.Release):
            return protocol.Release([self._lease(lease) for lease in request.leases])
        return request

    def _right_payload(self, request: Any) -> int:
        if self._shares_memory or not isinstance(request, protocol.Commit):
            return 0
        return min(70_000, dict(self._leases).get(request.lease, 0))


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    """A daemon with a data port, for all examples."""
    with Node("64MiB", "--data", "127.0.0.1:0") as node:
        yield node
        assert node.stop() == 0
        assert "Traceback" not in node.log, node.log


class Others:
    """A client beside the fuzzed ones, that wants to work as ever."""

    def __init__(self, node: Node, store: StoreClient) -> None:
        self._node = node
        self._store = store
        self._namespace = Namespace(model="others")
        host, port = node.endpoint("data").rsplit(":", 1)
        self.addresses = [node.socket, node.socket, (host, int(port))]
        store.put(self._namespace, b"warm", b"up")  # maps the arena
        self._descriptors = open_files(node.pid)

    def work(self) -> None:
        """Store, read, find nothing wrong."""
        data = os.urandom(5000)
        self._store.put(self._namespace, b"k", data)
        assert self._store.get(self._namespace, b"k") == data
        assert self._store.remove(self._namespace, [b"k"]) == 1
        assert self._store.check() == []

    def give_up(self, sessions: list[bytes]) -> None:
        """End what lost connections still hold: their process lives on, and so would their slots."""
        with RawConnection(self._node.socket, greet=False) as raw:
            hello = protocol.Hello(protocol.MAJOR, protocol.MINOR, bytes(32), "", sessions)
            assert isinstance(raw.ask(hello), protocol.Welcome)

    def nothing_is_left(self, sessions: list[bytes]) -> None:
        """Of the fuzzed connections nothing remains: no lease, no block half-way, no descriptor."""

        def settled() -> bool:
            now = self._store.statistics()
            tier = now.tiers[0]
            if now.quarantined_leases:
                self.give_up(sessions)
            held = (now.connections, now.leases, now.quarantined_leases, tier.pending_blocks)
            return held == (1, 0, 0, 0) and tier.pinned_blocks == tier.doomed_blocks == 0

        wait_for(settled)
        wait_for(lambda: open_files(self._node.pid) == self._descriptors)
        assert self._store.check() == []

    def nothing_is_used(self) -> None:
        """Once all blocks are removed, no memory is taken: no slot has been lost."""
        for namespace in (*NAMESPACES, self._namespace):
            if names := self._store.list(namespace).keys:
                self._store.remove(namespace, names)
        if os.environ.get("KVSTORE_DEBUG") != "1":
            assert self._store.statistics().tiers[0].used_bytes == 0


def test_any_sequence_of_requests_leaves_the_daemon_whole(node: Node) -> None:
    time_left = until(LIVE_S)
    with node.client() as store:
        others = Others(node, store)

        @FUZZ
        @given(STEPS)
        def run(steps: list[Step]) -> None:
            talks = [Talk(address) for address in others.addresses]
            try:
                for step in steps:
                    talks[step.connection].say(step)
            finally:
                for talk in talks:
                    talk.end()
            others.nothing_is_left([talk.session for talk in talks])
            others.work()

        while time_left():
            run()
        others.nothing_is_used()
    assert "Traceback" not in node.log, node.log


def test_any_stream_of_bytes_leaves_the_daemon_whole(node: Node) -> None:
    time_left = until(LIVE_S)
    streams = st.tuples(
        st.booleans(),
        st.integers(0, 2),
        st.one_of(
            st.binary(max_size=2000),
            st.builds(
                lambda requests, mutations: mutated(
                    b"".join(frame(index, request) for index, request in enumerate(requests)), mutations
                ),
                st.lists(REQUESTS, min_size=1, max_size=6),
                MUTATIONS,
            ),
        ),
    )
    with node.client() as store:
        others = Others(node, store)

        @FUZZ
        @given(streams)
        def run(stream: tuple[bool, int, bytes]) -> None:
            greet, where, data = stream
            sessions = []
            with RawConnection(others.addresses[where], greet=False) as raw:
                if greet:
                    welcome = raw.ask(protocol.Hello(protocol.MAJOR, protocol.MINOR, bytes(32)))
                    assert isinstance(welcome, protocol.Welcome)
                    sessions.append(welcome.session)
                    raw.open(NAMESPACES[0])
                with contextlib.suppress(OSError):
                    raw.send(data)
                    raw.sock.shutdown(1)
                    raw.closed()
            others.nothing_is_left(sessions)
            others.work()

        while time_left():
            run()
        others.nothing_is_used()
    assert "Traceback" not in node.log, node.log
