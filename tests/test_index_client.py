"""Compact lookups: the client over real sockets against a server, and against a whole index process."""

import asyncio
import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.block import Medium, Namespace
from kvstore.callers import Callers
from kvstore.client import IndexClient, StoreClient
from kvstore.engine_hashes import vllm_block_hashes
from kvstore.engine_keys import engine_keys, vllm_scheme
from kvstore.errors import (
    DeadlineExceeded,
    InvalidRequest,
    KVStoreError,
    ProtocolError,
    TooManyRequests,
    Unauthorized,
    Unavailable,
)
from kvstore.hits import EngineHits, HitGroups, Question, pack_keys
from kvstore.index import lookup_server, lookup_session
from kvstore.index.compact import Compact
from kvstore.index.keytable import ROOT, Key
from kvstore.index.locality import Locality
from kvstore.index.lookup_server import LookupServer
from kvstore.index.placement import Engine, Placement
from kvstore.index.searching import search
from kvstore.lookup_messages import (
    HELLO_BYTES_MAX,
    KEYS_MAX,
    QUESTIONS_MAX,
    TOKENS_MAX,
    Answer,
    Challenge,
    Failure,
    Find,
    Found,
    Named,
    NameQuestion,
    decode_answer,
    frame,
)
from kvstore.messages import Hello, Proof
from kvstore.protocol import HEADER, MAJOR, MINOR, token_mark, token_proof
from kvstore.rate import Rate
from tests import readme
from tests.locator import Locator
from tests.node import SLACK_S, Node, wait_for

NUMBERS = Namespace("m", 16, scheme=vllm_scheme())
BYTES = Namespace("m", 256)
FIELDS: dict[str, str | int] = {"block_tokens": 16, "scheme": NUMBERS.scheme}


class Serving:
    """A server over a Locality, on an event loop in a thread of its own."""

    def __init__(
        self, token: str | None = None, age_s: float = 0.25, per_s: float = 0, **routers: str
    ) -> None:
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._sock = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._sock.getsockname()[1]}"
        self.locality = Locality()
        callers, rate = Callers(token, routers), Rate(per_s, burst=2)
        self.server: LookupServer = self.run(
            lambda: LookupServer(self.locality, lambda: age_s, callers, rate)
        )
        asyncio.run_coroutine_threadsafe(self.server.listen(self._sock), self._loop).result(10)

    def run(self, work: Callable[[], Any]) -> Any:
        """Its result, on the loop."""

        async def on_loop() -> Any:
            return work()

        return asyncio.run_coroutine_threadsafe(on_loop(), self._loop).result(10)

    def set_engines(self, *engines: Engine) -> None:
        self.run(lambda: self.locality.set_engines(engines))

    def store(
        self,
        name: str,
        keys: Sequence[Key],
        space: Namespace = NUMBERS,
        medium: Medium = Medium.GPU,
        parent: Key | None = ROOT,
    ) -> None:
        """A publisher has these."""

        def store() -> None:
            holding = self.locality.holding(name) or self.locality.open(name)
            self.locality.show(holding)
            holding.stored(space, medium, keys, parent)

        self.run(store)

    def client(self, **options: Any) -> IndexClient:
        return IndexClient.connect(self.address, **options)

    def connect(self) -> socket.socket:
        host, port = self.address.removeprefix("tcp://").split(":")
        return socket.create_connection((host, int(port)), 10)

    def close(self) -> None:
        self.run(self.server.close)
        wait_for(lambda: not self.server.connections)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.run_until_complete(asyncio.sleep(0))  # what is closing ends
        self._loop.close()


@contextmanager
def serving(token: str | None = None, per_s: float = 0, **routers: str) -> Iterator[Serving]:
    server = Serving(token, per_s=per_s, **routers)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="module")
def shared() -> Iterator[Serving]:
    """Two engines on a node: a prompt of 40 numbers and of 5 byte keys."""
    with serving() as server:
        server.set_engines(Engine("a:1", ("node",)), Engine("b:1", ("node",)), Engine("c:1#0"))
        server.store("a:1", PROMPT[:10])
        server.store("node", PROMPT[:30], medium=Medium.DRAM)
        server.store("c:1#0", PROMPT)
        server.store("node", DIGESTS[:3], BYTES, Medium.NVME)
        yield server


PROMPT = engine_keys(vllm_block_hashes(list(range(640)), 16))
DIGESTS = [bytes([number]) * 32 for number in range(1, 6)]
A, B, C = EngineHits("a:1", 160, 480, 480, 480), EngineHits("b:1", 0, 480, 480, 480), 640


def test_a_router_is_told_what_each_engine_has(shared: Serving) -> None:
    with shared.client() as index:
        hits = index.lookup("m", PROMPT, namespace=FIELDS)
        assert hits.engines == (EngineHits("c:1#0", C, C, C, C), A, B)
        assert 0.25 <= hits.age_s <= 0.31
        assert index.lookup("m", PROMPT, namespace=FIELDS, engines=["a:1", "gone"]).engines == (A,)
        assert [
            hit.engine for hit in index.lookup("m", PROMPT, namespace=FIELDS, engines=["c:1"]).engines
        ] == ["c:1#0"]
        assert index.engines() == ("a:1", "b:1", "c:1#0")
        assert index.lookup("m", [1, *PROMPT], namespace=FIELDS).engines == ()
        assert index.lookup("m", [], namespace=FIELDS).engines == ()
        assert index.lookup("other", PROMPT, namespace=FIELDS).engines == ()
        assert index.lookup("m", PROMPT, salt="tenant", namespace={"block_tokens": 4}).engines == ()


def test_groups_come_by_depth_and_each_bit_once(shared: Serving) -> None:
    with shared.client() as index:
        found = index.find(Question("m", fields=tuple(sorted(FIELDS.items()))), *pack_keys(PROMPT))
    assert found.groups == ((640, 0xF00), (480, 0x0EE), (160, 0x001))


def test_numbers_are_found_however_engines_publish_them(shared: Serving) -> None:
    digests = vllm_block_hashes(list(range(640)), 16)
    numbers = [int.from_bytes(digest[-8:], "big") for digest in digests]
    signed = [number - (1 << 64) if number >> 63 else number for number in numbers]
    with shared.client() as index:
        for keys in (digests, numbers, signed, [digest[-9:] for digest in digests]):
            assert index.lookup("m", keys, namespace=FIELDS).engines[1] == A


def test_keys_that_are_bytes_are_found(shared: Serving) -> None:
    with shared.client() as index:
        hits = index.lookup("m", DIGESTS).engines
        assert [(hit.engine, hit.dram, hit.nvme) for hit in hits] == [("a:1", 0, 768), ("b:1", 0, 768)]


def test_tokens_are_hashed_by_the_index(shared: Serving) -> None:
    with shared.client() as index:
        assert index.lookup_tokens("m", list(range(640))).engines[1] == A
        assert index.lookup_tokens("m", list(range(640)), lora="adapter").engines == ()
        with pytest.raises(InvalidRequest, match=f"give at most {TOKENS_MAX} tokens"):
            index.lookup_tokens("m", [1] * (TOKENS_MAX + 1))
        with pytest.raises(InvalidRequest, match="without a namespace"):
            index.find_tokens(Question("m", fields=(("block_tokens", 16),)), bytes(4))


def test_names_are_fetched_anew_when_engines_have_come_or_gone() -> None:
    with serving() as server, server.client() as index:
        server.set_engines(Engine("a"), Engine("b"))
        server.store("b", PROMPT)
        assert [hit.engine for hit in index.lookup("m", PROMPT, namespace=FIELDS).engines] == ["b"]
        server.set_engines(Engine("b"), Engine("c"))
        assert [hit.engine for hit in index.lookup("m", PROMPT, namespace=FIELDS).engines] == ["b"]
        server.store("c", PROMPT)
        only = [index.lookup("m", PROMPT, namespace=FIELDS, engines=[name]).engines for name in "abc"]
        assert [[hit.engine for hit in found] for found in only] == [[], ["b"], ["c"]]


def test_a_publisher_that_begins_anew_or_is_silent_has_nothing_of_before() -> None:
    with serving() as server, server.client() as index:

        def names() -> list[str]:
            return [hit.engine for hit in index.lookup("m", PROMPT, namespace=FIELDS).engines]

        server.set_engines(Engine("a"), Engine("b"))
        server.store("a", PROMPT)
        server.store("b", PROMPT)
        assert names() == ["a", "b"]
        server.run(lambda: server.locality.mute("a"))
        assert names() == ["b"]
        server.run(lambda: server.locality.unmute("a"))
        server.run(lambda: server.locality.close(server.locality.holding("a")))  # type: ignore[arg-type]
        assert names() == ["b"]
        server.run(server.locality.tend)
        server.store("a", [1])
        assert names() == ["b"]
        server.store("a", PROMPT)
        assert names() == ["a", "b"]


def test_very_many_keys_are_answered_in_steps_and_in_their_turn() -> None:
    keys = list(range(1, 20_001))
    with serving() as server, server.connect() as sock:
        server.set_engines(Engine("a"), Engine("b"))
        server.store("a", keys, parent=None)  # nobody knows what precedes them, so all are walked
        server.store("b", keys[:15_000], parent=None)
        packed, width = pack_keys(keys)
        asked = [Hello(MAJOR, MINOR, bytes(32)), NameQuestion("m", fields=FIELDS)]
        frames = [frame(number, each) for number, each in enumerate(asked, 1)]
        frames.append(frame(3, Find(1, width), packed))
        frames.append(frame(4, Find(1, width), packed[: 100 * width]))
        sock.sendall(b"".join(frames))
        answers = [received(sock) for _ in range(4)]
        assert [answer and answer[0] for answer in answers] == [1, 2, 3, 4]
        found = [answer[1].tokens for answer in answers if answer and isinstance(answer[1], Found)]
        assert found == [[16 * 20_000, 16 * 15_000], [1600]]
        with server.client() as index:  # and another time, after somebody else
            assert index.lookup("m", keys, namespace=FIELDS).engines[0].gpu == 16 * 20_000


def run(steps: Generator[None, None, Any]) -> Any:
    """What a generator returns."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


ENGINES = (
    Engine("a"),
    Engine("b", ("n1",)),
    Engine("c", ("n1", "n2"), model="m"),
    Engine("n2", ("n2",)),
    Engine("other", ("n1",), model="other"),
)
SPACES = (
    NUMBERS,
    Namespace("m", 32, scheme=NUMBERS.scheme),
    Namespace("m", 16, scheme=NUMBERS.scheme, group="1"),
    Namespace("m", 16, shard="0/2"),
    Namespace("m", 16, shard="1/2"),
    Namespace("other", 8),
)
happened = st.tuples(
    st.sampled_from(["a", "b", "c", "n1", "n2"]),
    st.sampled_from(SPACES),
    st.sampled_from(list(Medium)),
    st.integers(0, 6),
    st.booleans(),
)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(happened, max_size=12),
    st.sets(st.sampled_from([0, 1, 2, 3, 5]), min_size=1),
    st.sets(st.sampled_from(["a", "b", "c", "n1", "n2"]), max_size=2),
)
def test_groups_say_what_placements_say(
    events: list[tuple[str, Namespace, Medium, int, bool]], asked: set[int], muted: set[str]
) -> None:
    locality = Locality()
    locality.set_engines(ENGINES)
    compact = Compact(locality)
    keys = [1, 2, 3, 4, 5, 6]
    question = {SPACES[number]: keys for number in sorted(asked)}

    def found() -> dict[Namespace, list[tuple[int, int]]]:
        return {space: locality.depths(space, keys) for space in question}

    for step, (name, space, medium, depth, stores) in enumerate(events):
        holding = locality.holding(name) or locality.open(name)
        locality.show(holding)
        if stores:
            holding.stored(space, medium, keys[:depth], ROOT if step % 2 else None)
        else:
            holding.removed(space, medium, keys[depth:])
        if step % 3 == 0:
            compact.groups(found())  # what it remembers must not outlive what it is about
    for name in muted:
        locality.mute(name)
    groups = compact.groups(found())
    assert run(search(locality, question, at_once=2)) == found()
    names = tuple(engine.name for engine in ENGINES)
    hits = {hit.engine: hit for hit in HitGroups(tuple(groups), names, 0.0).hits().engines}
    placements = locality.find(question)
    some = [*ENGINES[::2], Engine("unknown")]
    assert compact.placing(found())(some) == [*placements[::2], Placement("unknown")]
    for one in placements:
        hit = hits.get(one.engine, EngineHits(one.engine, 0, 0, 0, 0))
        assert (hit.gpu, hit.dram, hit.nvme, hit.remote) == (one.gpu, one.dram, one.nvme, one.remote)
    assert [tokens for tokens, _ in groups] == sorted((tokens for tokens, _ in groups), reverse=True)


# What may go wrong.


def test_a_token_is_proved_by_both_sides() -> None:
    with serving("secret") as server:
        server.set_engines(Engine("a"))
        with server.client(token="secret") as index:
            assert index.engines() == ("a",)
        with pytest.raises(Unauthorized, match="give token="):
            server.client()
        with pytest.raises(Unauthorized, match="does not know this token"):
            server.client(token="another")


@pytest.mark.parametrize("token", ["secret", None])
def test_a_router_proves_its_own_token_beside_the_stores(token: str | None) -> None:
    with serving(token, alpha="one", beta="two") as server:
        for known in filter(None, ("one", "two", token)):
            with server.client(token=known) as index:
                assert index.lookup("m", PROMPT).engines == ()
        for unknown in ("three", "alpha", ""):
            with pytest.raises(Unauthorized, match="does not know this token"):
                server.client(token=unknown)
        with pytest.raises(Unauthorized, match="give token="):
            server.client()


def test_whose_token_it_is_does_not_spare_the_proof() -> None:
    with serving("secret", alpha="one") as server, server.connect() as sock:
        sock.sendall(frame(1, Hello(MAJOR, MINOR, bytes(32), mark=token_mark("one"))))
        challenge = received(sock)
        assert challenge is not None
        assert isinstance(challenge[1], Challenge)
        proof = token_proof("secret", "client", bytes(32), challenge[1].nonce)
        sock.sendall(frame(2, Proof(proof)))
        refused = received(sock)
        assert refused is not None
        assert isinstance(refused[1], Failure)
        assert refused[1].code == "unauthorized"


def test_a_client_that_says_not_which_token_it_has_proves_the_stores() -> None:
    with serving("secret", alpha="one") as server, server.connect() as sock:
        sock.sendall(frame(1, Hello(MAJOR, MINOR, bytes(32))))
        challenge = received(sock)
        assert challenge is not None
        assert isinstance(challenge[1], Challenge)
        assert challenge[1].proof == token_proof("secret", "daemon", bytes(32), challenge[1].nonce)


def test_lookups_beyond_a_callers_rate_are_refused_and_the_connection_goes_on() -> None:
    with serving("secret", per_s=0.001, alpha="one") as server:
        server.set_engines(Engine("a"))
        with server.client(token="one") as index, server.client(token="secret") as other:
            for _ in range(2):
                index.lookup("m", PROMPT)
            for _ in range(2):
                with pytest.raises(TooManyRequests, match=r"more than 0\.001 requests a second; ask"):
                    index.lookup("m", PROMPT)
            with pytest.raises(TooManyRequests):
                index.lookup_tokens("m", [1, 2])
            assert index.engines() == ("a",)
            assert server.server.refused == 3
            with server.client(token="one") as again, pytest.raises(TooManyRequests):
                again.lookup("m", PROMPT)
            assert other.lookup("m", PROMPT).engines == ()


def test_a_question_that_is_none_is_refused_and_the_connection_goes_on(shared: Serving) -> None:
    with shared.client() as index:
        for refused, reason in (
            (lambda: index.lookup("", PROMPT), "model is empty"),
            (lambda: index.lookup("m", PROMPT, namespace={"colour": "red"}), "no field 'colour'"),
            (lambda: index.lookup("m", PROMPT, namespace={"block_tokens": 0}), "block_tokens is 0"),
            (lambda: index.lookup("m", [1] * (KEYS_MAX + 1)), f"give at most {KEYS_MAX} keys"),
            (lambda: index.lookup("m", [b"k" * 65]), "1 to 64 bytes"),
            (lambda: index.lookup("m", [b"k" * 5], namespace=FIELDS), "digests of 9 to 32"),
            (lambda: index.find(Question("m"), b"12345", 4), "5 bytes of keys of 4 bytes"),
            (lambda: index.find(Question("m", lora="l"), bytes(8)), "lora beside keys"),
            (lambda: index.lookup("m", PROMPT, engines=["e"] * 8193), "give at most 8192"),
            (lambda: index.lookup("m", [b"long", b"short"]), "all of 4 bytes"),
            (lambda: index.lookup("m", [1 << 64]), "64 bits"),
            (lambda: index.lookup("m", PROMPT, namespace={"block_tokens": 1.5}), "'block_tokens' is 1.5"),
            (lambda: index.lookup("m", PROMPT, namespace={"block_tokens": True}), "is True"),
            (lambda: index.lookup("m", PROMPT, namespace={"block_tokens": 1 << 64}), "64 bits"),
            (lambda: index.lookup("m", PROMPT, namespace={"scheme": ["a"]}), r"'scheme' is \['a'\]"),
            (lambda: index.lookup("m", PROMPT, namespace={"scheme": "a", 1: "b"}), "no strings"),  # type: ignore[dict-item]
            (lambda: index.lookup("m", PROMPT, engines=["a:1", 7]), "no strings"),  # type: ignore[list-item]
            (lambda: index.lookup("\ud800", PROMPT), "no strings"),
            (lambda: index.lookup("m", [1] * (1 << 20)), "send at most"),
            (lambda: index.lookup("m", PROMPT, engines=["e" * (5 << 20)]), "send at most"),
        ):
            with pytest.raises(InvalidRequest, match=reason):
                refused()
        assert index.lookup("m", PROMPT, namespace=FIELDS).engines[1] == A
        assert index.lookup("m", [1] * KEYS_MAX).engines == ()


def test_questions_that_the_index_has_forgotten_are_named_anew(shared: Serving) -> None:
    with shared.client() as index, shared.client() as other:
        question = Question("m", fields=tuple(sorted(FIELDS.items())))
        assert index.find(question, *pack_keys(PROMPT)).groups
        raw = index._link
        assert raw is not None
        for number in range(QUESTIONS_MAX):
            raw.call(NameQuestion(f"m{number}"), Named, time.monotonic() + 10)
        assert (
            index.find(question, *pack_keys(PROMPT)).groups == other.find(question, *pack_keys(PROMPT)).groups
        )


def received(sock: socket.socket) -> tuple[int, Answer] | None:
    """The next answer; None at the end of the connection."""
    head = _exactly(sock, HEADER.size)
    if head is None:
        return None
    size, request_id, _ = HEADER.unpack(head)
    body = _exactly(sock, size)
    assert body is not None
    return request_id, decode_answer(body)


def _exactly(sock: socket.socket, size: int) -> bytes | None:
    data = b""
    while len(data) < size:
        try:
            piece = sock.recv(size - len(data))
        except ConnectionResetError:
            return None
        if not piece:
            return None
        data += piece
    return data


HELLO = frame(1, Hello(MAJOR, MINOR, b"nonce"))


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
        bytes(64),
        HEADER.pack(HELLO_BYTES_MAX + 1, 1, 0),
        HEADER.pack(4, 1, 1 << 40),
        frame(1, NameQuestion("m")),
        frame(1, Hello(MAJOR + 1, 0, b"nonce")),
        HELLO + HELLO,
        HELLO + HEADER.pack(4, 2, 0) + b"\xc1\xff\x00\x01",
        HELLO + HEADER.pack(8, 2, KEYS_MAX * 64 + 1) + bytes(8),
    ],
)
def test_garbage_ends_its_connection_alone(shared: Serving, garbage: bytes) -> None:
    with shared.client() as index, shared.connect() as sock:
        sock.sendall(garbage)
        answers = iter(lambda: received(sock), None)
        *_, (request_id, last) = answers
        assert request_id == 0
        assert isinstance(last, Failure)
        assert index.lookup("m", PROMPT, namespace=FIELDS).engines[1] == A


def test_frames_in_one_read_or_in_crumbs_are_answered_in_order(shared: Serving) -> None:
    payload, _ = pack_keys(PROMPT)
    ask = frame(2, NameQuestion("m", fields=FIELDS))
    many = [frame(number, Find(1), payload) for number in range(3, 1003)]
    with shared.connect() as sock:
        sender = threading.Thread(target=sock.sendall, args=(HELLO + ask + b"".join(many),))
        sender.start()
        ids = [answer[0] for _ in range(1002) if (answer := received(sock))]
        sender.join()
        assert ids == list(range(1, 1003))
        for byte in many[0]:
            sock.send(bytes([byte]))
        answer = received(sock)
        assert answer is not None
        assert isinstance(answer[1], Found)
        assert answer[1].tokens == [640, 480, 160]


def test_who_sends_half_a_frame_or_nothing_is_disconnected(
    shared: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookup_server, "FRAME_TIMEOUT_S", 0.1)
    with shared.connect() as silent, shared.connect() as half, shared.client() as index:
        half.sendall(HELLO + HELLO[:5])
        assert received(half) is not None
        for sock in (silent, half):
            answer = received(sock)
            assert answer is not None
            assert isinstance(answer[1], Failure)
            assert received(sock) is None
        assert index.engines()


def test_who_takes_no_answers_is_read_no_further_and_disconnected(
    shared: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookup_server, "FRAME_TIMEOUT_S", 0.5)
    payload, _ = pack_keys(PROMPT)
    with shared.connect() as sock, shared.client() as index:
        sock.sendall(HELLO + frame(2, NameQuestion("m", fields=FIELDS)))
        flood = frame(3, Find(1), payload) * 100
        with pytest.raises(OSError, match=r"reset|Broken"):
            deque(map(sock.sendall, repeat(flood)))
        assert index.lookup("m", PROMPT, namespace=FIELDS).engines[1] == A


def test_there_is_a_limit_to_connections(shared: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup_server, "CONNECTIONS_MAX", 1)
    wait_for(lambda: not shared.server.connections)
    with shared.client() as index:
        with pytest.raises(ProtocolError, match="the limit is 1"):
            shared.client()
        assert index.engines()


def test_who_says_no_hello_takes_no_routers_place(shared: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup_server, "CONNECTIONS_MAX", 1)
    monkeypatch.setattr(lookup_server, "STRANGERS_MAX", 2)
    wait_for(lambda: not shared.server.connections)
    silent = [shared.connect() for _ in range(20)]
    try:
        with shared.client() as index:
            for sock in silent[:-2]:
                answer = received(sock)
                assert answer is not None
                assert isinstance(answer[1], Failure)
                assert "2 others came" in answer[1].text
                assert received(sock) is None
            assert index.engines()
    finally:
        for sock in silent:
            sock.close()


def test_questions_with_too_many_names_are_forgotten_early(
    shared: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookup_session, "NAMES_BYTES_MAX", 150_000)
    with shared.client() as index:
        session = next(iter(shared.server._sessions))
        for number in range(20):
            engines = ["a:1", *(f"{number}-{other}" for other in range(400))]
            assert index.lookup("m", PROMPT, namespace=FIELDS, engines=engines).engines == (A,)
        assert len(session._questions) == 2
        assert session._names_bytes == sum(one.names_bytes for one in session._questions.values()) <= 150_000
        # One alone may have more.
        engines = ["a:1", *(f"other-{other}" for other in range(2000))]
        for _ in range(2):
            assert index.lookup("m", PROMPT, namespace=FIELDS, engines=engines).engines == (A,)
        assert len(session._questions) == 1


def test_threads_share_a_client(shared: Serving) -> None:
    with shared.client(timeout_s=10.0) as index, ThreadPoolExecutor(8) as pool:
        found = pool.map(
            lambda number: index.lookup("m", PROMPT[: number % 10 + 1], namespace=FIELDS).engines[0].gpu,
            range(200),
        )
        assert list(found) == [16 * (number % 10 + 1) for number in range(200)]


def test_a_client_fails_at_once_while_its_index_is_away_and_then_comes_back() -> None:
    with Locator() as index, IndexClient.connect(f"tcp://{index.data}", timeout_s=5.0) as client:
        assert client.engines() == ()
        port = index.data
        index.kill()
        with pytest.raises(Unavailable):
            client.engines()
        began = time.monotonic()
        for _ in range(20):
            with pytest.raises(Unavailable, match="is away"):
                client.engines()
        assert time.monotonic() - began < SLACK_S
        index._words += ["--data", port]
        index.start()
        wait_for(lambda: answers(client))


def answers(client: IndexClient) -> bool:
    try:
        client.lookup("m", [b"key"])
    except Unavailable:
        return False
    return True


def test_an_index_that_hangs_costs_a_deadline() -> None:
    with Locator() as index, IndexClient.connect(f"tcp://{index.data}", timeout_s=0.2) as client:
        index.process.send_signal(signal.SIGSTOP)
        try:
            began = time.monotonic()
            with pytest.raises(DeadlineExceeded, match=r"within 0\.2 s"):
                client.lookup("m", [b"key"])
            assert time.monotonic() - began < 0.2 + SLACK_S
            with pytest.raises(Unavailable):
                client.lookup("m", [b"key"])
        finally:
            index.process.send_signal(signal.SIGCONT)
        wait_for(lambda: answers(client))


def test_a_closed_client_and_a_forked_one_say_so(shared: Serving) -> None:
    index = shared.client()
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            index.engines()
        except Unavailable as error:
            os.write(write, str(error).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert b"call IndexClient.connect in the child" in os.read(read, 1000)
    os.close(read)
    os.close(write)
    assert index.engines()
    index.close()
    with pytest.raises(Unavailable, match="the client is closed"):
        index.engines()


@pytest.mark.parametrize("address", ["localhost:7406", "unix:/tmp/x", "tcp://", "tcp://a:b"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(InvalidRequest, match="give tcp://host:7406"):
        IndexClient.connect(address)


def test_a_daemons_port_is_not_an_indexs(tmp_path: Path) -> None:
    path = tmp_path / "node.toml"
    path.write_text('data = "127.0.0.1:0"\n[events]\nfeed = "127.0.0.1:0"\n')
    with Node("16MiB", "--config", str(path)) as node:
        with pytest.raises(KVStoreError, match="no answer of an index"):
            IndexClient.connect(f"tcp://{node.endpoint('data')}")
        with Locator("--node", node.endpoint("feed")) as index:
            with pytest.raises(KVStoreError):
                StoreClient.connect(f"tcp://{index.data}")
            keys = [b"told-%d" % number for number in range(10)]
            with node.client() as store, store.reserve(BYTES, keys, 64, parent=b"") as write:
                write.commit()
            with IndexClient.connect(f"tcp://{index.data}") as client:
                wait_for(lambda: [hit.dram for hit in client.lookup("m", keys).engines] == [2560])
            assert index.metric("kvstore_index_compact_lookups_total") >= 1


def test_the_index_is_a_library_in_a_program_as_the_readme_shows(tmp_path: Path) -> None:
    example = readme.block("python", "import asyncio\n\nfrom kvstore.index.library")
    path = tmp_path / "node.toml"
    path.write_text('node = "gpu-5"\n[events]\nfeed = "127.0.0.1:0"\n')
    tokens = list(range(64))
    space = Namespace("llama-3.1-8b", 16, scheme=vllm_scheme())
    with Node("16MiB", "--config", str(path)) as node:
        keys = vllm_block_hashes(tokens, 16)
        with node.client() as store, store.reserve(space, keys, 64, parent=b"") as write:
            write.commit()
        names: dict[str, Any] = {}
        exec(example.replace("127.0.0.1:7404", node.endpoint("feed")), names)
        names["SETTINGS"] = replace(names["SETTINGS"], engines=())
        assert asyncio.run(names["route"](tokens)) == "gpu-5"
