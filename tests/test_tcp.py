"""TCP, where blocks are copied: bit for bit, only with the token, and bounded for those who stop half-way."""

import os
import re
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore import protocol
from kvstore.block import HitLength, Namespace
from kvstore.client import StoreClient
from kvstore.config import load
from kvstore.errors import (
    ConfigError,
    DeadlineExceeded,
    InvalidRequest,
    KVStoreError,
    LeaseError,
    TransferTooSlow,
    Unauthorized,
    Unavailable,
)
from kvstore.protocol import Keys, frame
from tests.node import SLACK_S, Node, RawConnection, open_files, wait_for
from tests.proxy import Proxy

MIB = 1 << 20
TOKEN = "a-token-that-stays-at-home"


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    """A daemon with a data port on loopback, and a token."""
    with Node("64MiB", "--data", "127.0.0.1:0", environ={"KVSTORE_TOKEN": TOKEN}) as node:
        yield node
        assert node.stop() == 0
        assert "Traceback" not in node.log, node.log


@pytest.fixture(autouse=True)
def nothing_is_left(node: Node) -> Iterator[None]:
    """The daemon holds in the end what it held before, and a recount finds nothing wrong."""
    with node.client() as store:
        descriptors = open_files(node.pid)
        yield

        def settled() -> bool:
            now = store.statistics()
            tier = now.tiers[0]
            held = (now.connections, now.leases, now.quarantined_leases, tier.pending_blocks)
            return held == (1, 0, 0, 0) and tier.pinned_blocks == tier.doomed_blocks == 0

        wait_for(settled)
        assert store.check() == []
        wait_for(lambda: open_files(node.pid) == descriptors)


@pytest.fixture
def store(node: Node) -> Iterator[StoreClient]:
    """A client over TCP."""
    with over_tcp(node) as store:
        yield store


@pytest.fixture
def namespace(request: pytest.FixtureRequest) -> Namespace:
    """One of the test's own."""
    return Namespace(model="tcp", salt=request.node.name)


def over_tcp(node: Node, **options: object) -> StoreClient:
    return StoreClient.connect(f"tcp://{node.endpoint('data')}", **{"token": TOKEN, **options})  # type: ignore[arg-type]


def endpoint(node: Node) -> tuple[str, int]:
    host, port = node.endpoint("data").rsplit(":", 1)
    return host, int(port)


def greeted(node: Node) -> RawConnection:
    """The protocol by hand, past hello and proof."""
    raw = RawConnection(endpoint(node), greet=False)
    nonce = os.urandom(32)
    challenge = raw.ask(protocol.Hello(protocol.MAJOR, protocol.MINOR, nonce))
    assert isinstance(challenge, protocol.Challenge)
    assert challenge.proof == protocol.token_proof(TOKEN, "daemon", nonce, challenge.nonce)
    welcome = raw.ask(protocol.Proof(protocol.token_proof(TOKEN, "client", nonce, challenge.nonce)))
    assert isinstance(welcome, protocol.Welcome)
    assert welcome.arena_bytes == []
    return raw


def reserve(raw: RawConnection, namespace: Namespace, names: Keys, lengths: int | list[int]) -> int:
    """The id of a write lease."""
    answer = raw.ask(protocol.Reserve(raw.open(namespace), names, lengths))
    assert isinstance(answer, protocol.Granted)
    assert answer.lease
    assert answer.slots.offsets == []
    return answer.lease


# Bit for bit.


def test_blocks_of_8_mib_are_read_bit_for_bit(store: StoreClient, node: Node, namespace: Namespace) -> None:
    blocks = {b"block-%d" % index: os.urandom(8 * MIB) for index in range(3)}
    for key, data in blocks.items():
        store.put(namespace, key, data)
    with store.acquire(namespace, list(blocks)) as read:
        assert read.hit_length == 3
        assert [bytes(view) for view in read.views] == list(blocks.values())
        with pytest.raises(TypeError, match="read-only"):
            read.views[0][0] = 1
    with node.client() as local:  # what TCP wrote, shared memory reads
        assert [local.get(namespace, key) for key in blocks] == list(blocks.values())
    assert store.remove(namespace, list(blocks)) == 3


def test_mixed_lengths_are_committed_in_parts_and_read_bit_for_bit(
    store: StoreClient, node: Node, namespace: Namespace
) -> None:
    lengths = [1, 4095, 4096, 4097, 3 * MIB + 17, 64]
    names = [b"k%d" % index for index in range(6)]
    blocks = [os.urandom(length) for length in lengths]
    with store.reserve(namespace, names, lengths, tokens=range(6 * 256)) as write:
        assert [len(view) for view in write.views] == lengths
        for view, data in zip(write.views, blocks, strict=True):
            view[:] = data
        write.commit([names[4], names[0]])
        assert list(store.hit_each([(namespace, key) for key in names])) == [True, *[False] * 3, True, False]
        write.commit([names[1]])
        with store.acquire(namespace, names) as read:
            assert [bytes(view) for view in read.views] == blocks[:2]
        write.commit()
    with store.acquire(namespace, names) as read:
        assert [bytes(view) for view in read.views] == blocks
    with node.client() as local, local.acquire(namespace, names) as read:
        assert [bytes(view) for view in read.views] == blocks
    assert store.hit_length(namespace, [*names, b"more"]) == HitLength(0, 6, 6, 6)
    page = store.list(namespace)
    assert dict(zip(page.keys, page.lengths, strict=True)) == dict(zip(names, lengths, strict=True))


def test_each_answers_with_holes_over_namespaces(store: StoreClient, namespace: Namespace) -> None:
    other = Namespace(model="tcp", salt="each")
    store.put(namespace, b"a", b"first")
    store.put(other, b"a", b"second block")
    items = [(other, b"a"), (namespace, b"hole"), (namespace, b"a"), (other, b"a")]
    with store.acquire_each(items) as read:
        found = [view if view is None else bytes(view) for view in read.views]
        assert found == [b"second block", None, b"first", b"second block"]
    assert list(store.hit_each(items)) == [True, False, True, True]
    with store.acquire_each([(namespace, b"hole")]) as nothing:
        assert list(nothing.views) == [None]
    assert store.remove(other, [b"a", b"hole"]) == 1
    assert store.get(other, b"a", timeout_s=0) is None


def test_what_is_not_committed_is_not_there(store: StoreClient, namespace: Namespace) -> None:
    with store.reserve(namespace, [b"a", b"b"], 100) as write:
        write.commit([b"a"])
        with pytest.raises(LeaseError, match="committed before"):
            write.commit([b"a"])
    assert list(store.hit_each([(namespace, b"a"), (namespace, b"b")])) == [True, False]
    with pytest.raises(LeaseError, match="ended"):
        write.commit()


def test_a_reader_over_tcp_waits_for_a_writer(store: StoreClient, node: Node, namespace: Namespace) -> None:
    with over_tcp(node) as writer, writer.reserve(namespace, [b"k"], 5) as write:
        write.views[0][:] = b"hello"
        timer = threading.Timer(0.1, write.commit)
        timer.start()
        assert store.get(namespace, b"k", timeout_s=10) == b"hello"
        timer.join()


def test_a_commit_whose_payload_takes_long_has_the_usual_time_for_its_answer(
    node: Node, namespace: Namespace
) -> None:
    data = os.urandom(16 * MIB)
    pause = threading.Event()
    with (
        Proxy(endpoint(node)) as proxy,
        StoreClient.connect(proxy.address, token=TOKEN, timeout_s=1.0) as store,
    ):

        def hold_up() -> None:
            pause.wait(0.7)
            proxy.up_open.set()
            wait_for(lambda: len(proxy.up) > len(data))
            pause.wait(0.7)
            proxy.down_open.set()

        with store.reserve(namespace, [b"k"], len(data)) as write:
            write.views[0][:] = data
            proxy.up_open.clear()
            proxy.down_open.clear()
            holding = threading.Thread(target=hold_up)
            holding.start()
            started = time.monotonic()
            write.commit()
            assert time.monotonic() - started > 1.4
            holding.join()
        assert store.lost is None
        assert store.get(namespace, b"k") == data


def test_many_threads_share_one_connection(store: StoreClient, namespace: Namespace) -> None:
    failures: list[str] = []

    def work(number: int) -> None:
        for turn in range(20):
            key, data = b"%d-%d" % (number, turn), os.urandom(50_000)
            store.put(namespace, key, data)
            if store.get(namespace, key) != data:
                failures.append(f"{number} {turn}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


# Slow connections: bytes that flow have `transfer_s`, silence `timeout_s`.


@pytest.fixture
def slow(node: Node) -> Iterator[Proxy]:
    """A way to the daemon of 2 MB/s."""
    with Proxy(endpoint(node), 2e6) as proxy:
        yield proxy


def slow_client(slow: Proxy) -> StoreClient:
    """Who is not patient with silence."""
    return StoreClient.connect(slow.address, token=TOKEN, timeout_s=0.5)


def test_a_slow_payload_has_as_long_as_was_said_and_longer_than_silence(
    slow: Proxy, namespace: Namespace
) -> None:
    data = os.urandom(3 * MIB)
    with slow_client(slow) as store:
        with store.reserve(namespace, [b"k"], len(data)) as write:
            write.views[0][:] = data
            write.commit(transfer_s=10)
        with store.acquire(namespace, [b"k"], transfer_s=10) as read:
            assert read.views[0] == data
        assert store.lost is None


def test_a_payload_that_is_sent_too_slowly_ends_the_connection_in_time(
    slow: Proxy, store: StoreClient, namespace: Namespace
) -> None:
    with slow_client(slow) as sender:
        with sender.reserve(namespace, [b"k"], 24 * MIB) as write:
            started = time.monotonic()
            with pytest.raises(TransferTooSlow):
                write.commit(transfer_s=1.0)
            assert 0.9 < time.monotonic() - started < 1.0 + SLACK_S
            assert not write.valid
        wait_for(lambda: sender.lost is None)
        assert sender.hit_length(namespace, [b"k"]).dram == 0
    wait_for(lambda: store.statistics().tiers[0].pending_blocks == 0)


def test_a_payload_that_comes_too_slowly_ends_the_connection_in_time(
    slow: Proxy, store: StoreClient, namespace: Namespace
) -> None:
    store.put(namespace, b"k", bytes(24 * MIB))
    with slow_client(slow) as reader:
        for verb in (
            lambda: reader.acquire(namespace, [b"k"], transfer_s=1.0),
            lambda: reader.acquire_each([(namespace, b"k")], transfer_s=1.0),
            lambda: reader.get(namespace, b"k", timeout_s=1.0),
        ):
            wait_for(lambda: reader.lost is None)
            started = time.monotonic()
            with pytest.raises(TransferTooSlow):
                verb()
            assert 0.9 < time.monotonic() - started < 1.0 + SLACK_S
            assert reader.lost is not None
    store.remove(namespace, [b"k"])


def test_a_payload_that_stops_ends_the_connection_after_silence(
    slow: Proxy, store: StoreClient, namespace: Namespace
) -> None:
    store.put(namespace, b"k", bytes(8 * MIB))
    with slow_client(slow) as reader:
        errors: list[KVStoreError] = []

        def read() -> None:
            try:
                reader.acquire(namespace, [b"k"])
            except KVStoreError as error:
                errors.append(error)

        reading = threading.Thread(target=read)
        reading.start()
        wait_for(lambda: len(slow.down) > MIB)
        slow.down_open.clear()
        started = time.monotonic()
        reading.join()
        assert time.monotonic() - started < 0.5 + SLACK_S
        assert [type(error) for error in errors] == [DeadlineExceeded]
        assert reader.lost is not None
        slow.down_open.set()


def test_who_waits_behind_a_payload_that_comes_is_not_given_up_while_it_flows(
    slow: Proxy, store: StoreClient, namespace: Namespace
) -> None:
    data = os.urandom(4 * MIB)
    store.put(namespace, b"large", data)
    store.put(namespace, b"small", b"small")
    with slow_client(slow) as reader:
        found: list[bool] = []

        def read() -> None:
            with reader.acquire(namespace, [b"large"]) as lease:
                found.append(lease.views[0] == data)

        reading = threading.Thread(target=read)
        reading.start()
        wait_for(lambda: len(slow.down) > MIB // 4)
        started = time.monotonic()
        with pytest.raises(TransferTooSlow):
            reader.acquire(namespace, [b"small"], transfer_s=0.3)
        assert 0.7 < time.monotonic() - started < 0.8 + SLACK_S
        assert reader.hit_length(namespace, [b"small"]).dram == 1
        assert time.monotonic() - started > 1.0
        reading.join()
        assert found == [True]
        assert reader.get(namespace, b"small") == b"small"


def test_who_waits_behind_a_payload_that_is_sent_leaves_the_connection_whole(
    slow: Proxy, namespace: Namespace
) -> None:
    data = os.urandom(12 * MIB)
    with slow_client(slow) as store, store.reserve(namespace, [b"k"], len(data)) as write:
        write.views[0][:] = data
        committing = threading.Thread(target=write.commit)
        committing.start()
        wait_for(lambda: len(slow.up) > MIB // 4)
        started = time.monotonic()
        with pytest.raises(TransferTooSlow):
            store.acquire(namespace, [b"k"], transfer_s=0.5)
        assert time.monotonic() - started < 0.5 + SLACK_S
        assert store.hit_length(namespace, [b"none"]).dram == 0
        assert time.monotonic() - started > 1.0
        committing.join()
        assert store.lost is None
        assert list(store.length_each([(namespace, b"k")])) == [len(data)]


def test_closing_does_not_wait_for_a_payload(slow: Proxy, namespace: Namespace) -> None:
    store = slow_client(slow)
    write = store.reserve(namespace, [b"k"], 24 * MIB)
    errors: list[type[KVStoreError]] = []

    def commit() -> None:
        try:
            write.commit()
        except KVStoreError as error:
            errors.append(type(error))

    committing = threading.Thread(target=commit)
    committing.start()
    wait_for(lambda: len(slow.up) > MIB)
    started = time.monotonic()
    store.close()
    committing.join()
    assert time.monotonic() - started < SLACK_S
    assert errors == [Unavailable]


# Only with the token.


def test_a_wrong_token_and_none_are_refused(node: Node) -> None:
    with pytest.raises(Unauthorized, match="wants a token"):
        over_tcp(node, token=None)
    for wrong in ("wrong", TOKEN + " ", TOKEN.upper(), ""):
        with pytest.raises(Unauthorized, match="does not know this token"):
            over_tcp(node, token=wrong)


def test_a_client_that_guesses_is_told_that_the_token_is_wrong(node: Node) -> None:
    for proof in (b"", bytes(32), os.urandom(32), bytes(1000)):
        with RawConnection(endpoint(node), greet=False) as raw:
            assert isinstance(raw.ask(protocol.Hello(protocol.MAJOR, 0, bytes(32))), protocol.Challenge)
            raw.send(frame(2, protocol.Proof(proof)))
            failure = raw.failure()
            assert (failure.code, failure.text) == (
                "unauthorized",
                "the token is wrong; give the daemon's token",
            )
            assert raw.closed()


def test_a_client_that_skips_the_proof_is_not_heard(node: Node, namespace: Namespace) -> None:
    for request in (
        protocol.OpenNamespaces([namespace.id], [namespace]),
        protocol.GetStatistics(),
        protocol.ListKeys(0),
        protocol.Hello(protocol.MAJOR, 0, bytes(32)),
    ):
        with RawConnection(endpoint(node), greet=False) as raw:
            assert isinstance(raw.ask(protocol.Hello(protocol.MAJOR, 0, bytes(32))), protocol.Challenge)
            raw.send(frame(2, request))
            assert raw.failure().code == "protocol"
            assert raw.closed()


def test_the_daemons_own_proof_is_not_the_clients(node: Node) -> None:
    with RawConnection(endpoint(node), greet=False) as raw:
        challenge = raw.ask(protocol.Hello(protocol.MAJOR, 0, bytes(32)))
        assert isinstance(challenge, protocol.Challenge)
        raw.send(frame(2, protocol.Proof(challenge.proof)))
        assert raw.failure().code == "unauthorized"


def test_the_token_never_travels_and_a_recorded_proof_is_worth_nothing(
    node: Node, namespace: Namespace
) -> None:
    with Proxy(endpoint(node)) as proxy, StoreClient.connect(proxy.address, token=TOKEN) as store:
        store.put(namespace, b"k", b"recorded")
        assert store.get(namespace, b"k") == b"recorded"
    said = bytes(proxy.up + proxy.down)
    assert b"recorded" in said
    for secret in (TOKEN.encode(), TOKEN.encode().hex().encode(), TOKEN[::-1].encode()):
        assert secret not in said
    with RawConnection(endpoint(node), greet=False) as raw:
        raw.send(bytes(proxy.up))  # the same hello and nonce, the same proof, the same requests
        assert isinstance(raw.answer(), protocol.Challenge)
        assert raw.failure().code == "unauthorized"
        assert raw.closed()


def test_the_unix_socket_wants_no_token(node: Node) -> None:
    with node.client() as store:
        assert store.check() == []


def test_listening_beyond_loopback_without_a_token_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KVSTORE_TOKEN", raising=False)
    for host in ("0.0.0.0", "[::]", "127.example.org"):
        with pytest.raises(
            ConfigError, match=f"data is {re.escape(host)}:0, which is beyond loopback, and no"
        ):
            load(None, {"dram": {"capacity": "4MiB"}, "data": f"{host}:0"})
    command = [sys.executable, "-m", "kvstore", "serve", "--dram", "4MiB", "--http", "127.0.0.1:0"]
    command += ["--socket", str(tmp_path / "node.sock"), "--data", "0.0.0.0:0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert "data is 0.0.0.0:0, which is beyond loopback, and no token is set" in done.stderr
    assert "Traceback" not in done.stderr


# What has no place over TCP, and payloads that do not fit.


def test_arenas_cannot_be_opened(node: Node) -> None:
    with greeted(node) as raw:
        for writable in (False, True):
            answer = raw.ask(protocol.OpenArena(0, writable))
            assert isinstance(answer, protocol.Failure)
            assert "arenas are not mapped over TCP" in answer.text
        assert raw.ask(protocol.Check()) == protocol.Report([])


def test_a_payload_of_another_length_than_the_blocks_changes_nothing(
    node: Node, store: StoreClient, namespace: Namespace
) -> None:
    data = os.urandom(250)
    with greeted(node) as raw:
        lease = reserve(raw, namespace, Keys(b"ab", 1), [100, 150])
        for payload in (b"x", bytes(249), bytes(251), bytes(300_000)):
            answer = raw.ask(protocol.Commit(lease), payload)
            assert isinstance(answer, protocol.Failure)
            assert answer.text == f"payload is {len(payload)} bytes; the blocks have 250"
        answer = raw.ask(protocol.Commit(lease, [1]), data)
        assert isinstance(answer, protocol.Failure)
        assert answer.text == "payload is 250 bytes; the blocks have 150"
        answer = raw.ask(protocol.Commit(lease))
        assert isinstance(answer, protocol.Failure)
        assert "commit without the blocks' bytes" in answer.text
        assert store.hit_length(namespace, [b"a"]).dram == 0
        assert raw.ask(protocol.Commit(lease), data) == protocol.Count(2)
    assert (store.get(namespace, b"a"), store.get(namespace, b"b")) == (data[:100], data[100:])


def test_a_payload_for_a_lease_that_is_none_is_read_and_dropped(
    node: Node, store: StoreClient, namespace: Namespace
) -> None:
    with greeted(node) as raw, greeted(node) as other:
        lease = reserve(other, namespace, Keys(b"k", 1), 100)
        for wrong in (lease, 0, -1, 1 << 40):
            answer = raw.ask(protocol.Commit(wrong), bytes(100))
            assert isinstance(answer, protocol.Failure)
            assert f"write lease {wrong} is not held by this connection" in answer.text
        answer = other.ask(protocol.Commit(lease, [0, 1]), bytes(100))
        assert isinstance(answer, protocol.Failure)
        assert "commit of index 1" in answer.text
        assert store.hit_length(namespace, [b"k"]).dram == 0
        assert other.ask(protocol.Commit(lease, [0, 0]), bytes(100)) == protocol.Count(1)
        answer = other.ask(protocol.Commit(lease), bytes(100))
        assert isinstance(answer, protocol.Failure)
        assert answer.code == "lease"
        assert raw.ask(protocol.Check()) == protocol.Report([])


def test_a_payload_larger_than_allowed_ends_the_connection(node: Node, namespace: Namespace) -> None:
    for payload_bytes in (32 * MIB + 1, 1 << 40, (1 << 64) - 1):
        with greeted(node) as raw:
            lease = reserve(raw, namespace, Keys(b"k", 1), 100)
            raw.send(frame(9, protocol.Commit(lease), payload_bytes))
            text = raw.failure().text
            assert f"{payload_bytes} bytes of payload after Commit" in text
            assert "at most 33554432 bytes" in text
            assert raw.closed()
    with greeted(node) as raw:
        raw.send(frame(9, protocol.GetStatistics(), 10))
        assert "10 bytes of payload after GetStatistics; only Commit over TCP has any" in raw.failure().text
        assert raw.closed()


def test_a_block_larger_than_a_client_may_reserve_is_refused(
    store: StoreClient, namespace: Namespace
) -> None:
    with store.reserve(namespace, [b"k"], 33 * MIB) as write:
        assert write.refused == [b"k"]
    with pytest.raises(InvalidRequest, match="nbytes is 67108865; give 1 to 67108864 bytes"):
        store.reserve(namespace, [b"k"], 64 * MIB + 1)


# Those who stop half-way.


def test_a_client_that_disappears_in_the_middle_of_its_payload_leaves_nothing(
    node: Node, store: StoreClient, namespace: Namespace
) -> None:
    used = store.statistics().tiers[0].used_bytes
    for sent in (0, 1, 70_000, 8 * MIB - 1):
        with greeted(node) as raw:
            lease = reserve(raw, namespace, Keys(b"k", 1), 8 * MIB)
            raw.send(frame(9, protocol.Commit(lease), 8 * MIB) + bytes(sent))
            assert store.statistics().tiers[0].pending_blocks == 1
        wait_for(lambda: store.statistics().tiers[0].pending_blocks == 0)
        assert store.hit_length(namespace, [b"k"]).dram == 0
    if os.environ.get("KVSTORE_DEBUG") != "1":
        assert store.statistics().tiers[0].used_bytes == used
    store.put(namespace, b"k", b"again")
    assert store.get(namespace, b"k") == b"again"


@pytest.fixture
def impatient_node() -> Iterator[Node]:
    """A daemon that waits for its clients 2 s, not 5 s as it usually does."""
    environ = {"KVSTORE_TOKEN": TOKEN, "KVSTORE_FRAME_TIMEOUT_S": "2.0"}
    with Node("64MiB", "--data", "127.0.0.1:0", environ=environ, module="tests.faulty_daemon") as node:
        yield node
        node.check()
        assert "Traceback" not in node.log, node.log


def test_those_who_stop_half_way_hold_nothing_for_ever_and_slow_nobody(
    impatient_node: Node, namespace: Namespace
) -> None:
    node = impatient_node
    with (
        over_tcp(node) as store,
        greeted(node) as deaf,
        greeted(node) as deaf_to_many,
        greeted(node) as mute,
        RawConnection(endpoint(node), greet=False) as stranger,
    ):
        for index in range(3):
            store.put(namespace, b"%d" % index, bytes(8 * MIB))
        # One asks for 24 MiB and reads none of it; one asks again and again; one sends half of a payload;
        # one is challenged and does not answer.
        handle = deaf.open(namespace)
        deaf.send(frame(3, protocol.Acquire(handle, Keys(b"012", 1))))
        deaf_to_many.open(namespace)
        many = b"".join(frame(index, protocol.Acquire(0, Keys(b"0", 1))) for index in range(1, 4))
        deaf_to_many.send(many + b"".join(frame(index, protocol.Check()) for index in range(4, 2000)))
        lease = reserve(mute, namespace, Keys(b"half", 4), 4 * MIB)
        mute.send(frame(9, protocol.Commit(lease), 4 * MIB) + bytes(2 * MIB))
        assert isinstance(stranger.ask(protocol.Hello(protocol.MAJOR, 0, bytes(32))), protocol.Challenge)
        started = time.monotonic()
        wait_for(lambda: store.statistics().tiers[0].pinned_blocks == 3)
        refused = store.statistics().refused_frames

        slowest_s, turns = 0.0, 0
        while True:
            begun = time.monotonic()
            store.put(namespace, b"turn-%d" % turns, bytes(100_000))
            assert store.get(namespace, b"turn-%d" % turns) == bytes(100_000)
            store.remove(namespace, [b"turn-%d" % turns])
            slowest_s, turns = max(slowest_s, time.monotonic() - begun), turns + 1
            now = store.statistics()
            if now.refused_frames >= refused + 4:
                break
            assert time.monotonic() - started < 15, now
        assert slowest_s < 1.0
        tier = now.tiers[0]
        assert (tier.pinned_blocks, tier.pending_blocks, now.connections) == (0, 0, 1)
        assert time.monotonic() - started > 1.8
        assert "a frame was incomplete for 2.0 s, which is the limit" in mute.failure().text
        assert "no hello for 2.0 s, which is the limit" in stranger.failure().text
        assert mute.closed()
        assert stranger.closed()


# TLS.


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for localhost, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
    ]
    command += ["-keyout", str(key), "-out", str(certificate), "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return certificate, key


@pytest.fixture(scope="module")
def tls_node(certificate: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A daemon that speaks TLS on its data port."""
    config = tmp_path_factory.mktemp("config") / "node.toml"
    config.write_text(
        f'data = "127.0.0.1:0"\ntls_certificate = "{certificate[0]}"\ntls_key = "{certificate[1]}"\n'
    )
    with Node("64MiB", "--config", str(config), environ={"KVSTORE_TOKEN": TOKEN}) as node:
        yield node
        node.check()
        assert node.stop() == 0
        assert "Traceback" not in node.log, node.log


def test_blocks_travel_over_tls_bit_for_bit(
    tls_node: Node, certificate: tuple[Path, Path], namespace: Namespace
) -> None:
    context = ssl.create_default_context(cafile=str(certificate[0]))
    with over_tcp(tls_node, tls=context) as store:
        large = {b"large-%d" % index: os.urandom(8 * MIB) for index in range(2)}
        for key, data in large.items():
            store.put(namespace, key, data)
        names, lengths = [b"a", b"b", b"c"], [1, 70_001, 4096]
        blocks = [os.urandom(length) for length in lengths]
        with store.reserve(namespace, names, lengths) as write:
            for view, data in zip(write.views, blocks, strict=True):
                view[:] = data
            write.commit([b"b"])
            write.commit()
        with store.acquire(namespace, [*names, *large]) as read:
            assert [bytes(view) for view in read.views] == [*blocks, *large.values()]
        failures: list[int] = []

        def work(number: int) -> None:
            for turn in range(10):
                key, data = b"%d-%d" % (number, turn), os.urandom(100_000)
                store.put(namespace, key, data)
                if store.get(namespace, key) != data:
                    failures.append(number)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        with pytest.raises(InvalidRequest, match="nbytes is 0"):
            store.put(namespace, b"empty", b"")
        assert store.check() == []


def test_over_tls_the_token_is_wanted_all_the_same(tls_node: Node, certificate: tuple[Path, Path]) -> None:
    context = ssl.create_default_context(cafile=str(certificate[0]))
    with pytest.raises(Unauthorized, match="does not know this token"):
        over_tcp(tls_node, tls=context, token="wrong")


def test_a_client_that_does_not_trust_the_certificate_says_so(tls_node: Node) -> None:
    with pytest.raises(Unavailable, match=r"(?i)certificate.verify.failed"):
        over_tcp(tls_node, tls=ssl.create_default_context())


def test_tls_and_plain_do_not_mix_and_nobody_hangs(
    tls_node: Node, node: Node, certificate: tuple[Path, Path]
) -> None:
    context = ssl.create_default_context(cafile=str(certificate[0]))
    started = time.monotonic()
    with pytest.raises(KVStoreError):
        over_tcp(tls_node)
    with pytest.raises(KVStoreError):
        over_tcp(node, tls=context)
    assert time.monotonic() - started < 10
    with over_tcp(tls_node, tls=context) as store:
        assert store.check() == []


@pytest.mark.parametrize("missing", ["certificate", "key", "both swapped"])
def test_a_certificate_that_cannot_be_read_is_a_clear_error(
    tmp_path: Path, certificate: tuple[Path, Path], missing: str
) -> None:
    files = {
        "certificate": (tmp_path / "none.pem", certificate[1]),
        "key": (certificate[0], tmp_path / "none.pem"),
        "both swapped": (certificate[1], certificate[0]),
    }
    config = tmp_path / "node.toml"
    tls_certificate, tls_key = files[missing]
    config.write_text(f'data = "127.0.0.1:0"\ntls_certificate = "{tls_certificate}"\ntls_key = "{tls_key}"\n')
    command = [sys.executable, "-m", "kvstore", "serve", "--dram", "4MiB", "--http", "127.0.0.1:0"]
    command += ["--socket", str(tmp_path / "node.sock"), "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert re.search(rf"kvstore: tls_certificate {re.escape(str(tls_certificate))}", done.stderr)
    assert "Traceback" not in done.stderr
