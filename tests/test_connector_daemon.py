"""The daemon as a connector sees it: there, or away and known to be, at no cost to anybody."""

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from connectors.daemon import Daemon
from kvstore.block import Namespace
from kvstore.client import StoreClient
from kvstore.errors import (
    DeadlineExceeded,
    InvalidRequest,
    KVStoreError,
    ProtocolError,
    TierError,
    TransferTooSlow,
    Unavailable,
)
from tests.node import SLACK_S, Node, open_files, own_threads, wait_for
from tests.proxy import Proxy

MIB = 1 << 20
TOKEN = "a-token-that-stays-at-home"


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    """A daemon that every test leaves running."""
    with Node("64MiB", "--data", "127.0.0.1:0", environ={"KVSTORE_TOKEN": TOKEN}) as node:
        yield node
        node.check()


@pytest.fixture(autouse=True)
def it_runs_on(node: Node) -> Iterator[None]:
    """Also after a test that has failed before it could start it again."""
    yield
    if node.process.poll() is not None:
        node.start()


@pytest.fixture
def daemon(node: Node) -> Iterator[Daemon]:
    """The node's, with a short patience."""
    daemon = Daemon(node.address, timeout_s=0.3)
    yield daemon
    daemon.close()


def looks_after() -> int:
    """Threads that look whether the daemon is there."""
    return sum(thread.name == "kvstore-watch" for thread in own_threads())


def ask(daemon: Daemon) -> KVStoreError | None:
    """One call; its error."""
    try:
        with daemon.asking() as store:
            store.statistics()
    except KVStoreError as error:
        return error
    return None


def test_a_daemon_that_is_there_is_asked(daemon: Daemon, namespace: Namespace) -> None:
    assert daemon.away is None
    with daemon.asking() as store:
        store.put(namespace, b"k", b"value")
    with daemon.asking() as store:
        assert store.get(namespace, b"k") == b"value"
    assert looks_after() == 1


@pytest.mark.parametrize("address", ["", "nowhere", "http://x", "tcp://host:port", "unix:"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(InvalidRequest, match="address"):
        Daemon(address, timeout_s=0.3)
    wait_for(lambda: looks_after() == 0, 5)


def test_a_connector_may_start_before_the_daemon(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    node.kill()
    daemon = Daemon(node.address, timeout_s=0.3)
    assert daemon.away is not None
    assert "node.sock" in daemon.away
    started = time.monotonic()
    for _ in range(1000):
        with pytest.raises(Unavailable), daemon.asking():
            pytest.fail("it is not there to be asked")
    assert time.monotonic() - started < 1.0
    assert looks_after() == 1
    node.start()
    wait_for(lambda: daemon.away is None)
    assert ask(daemon) is None
    assert looks_after() == 1
    said = [record.getMessage() for record in caplog.records if record.name == "connectors.daemon"]
    assert len(said) == 2
    assert "going on without the store" in said[0]
    assert said[1] == f"the daemon at {node.address} is back"
    daemon.close()


def test_a_daemon_that_is_killed_is_away_until_it_is_back(node: Node, daemon: Daemon) -> None:
    for _ in range(2):
        node.kill()
        assert isinstance(ask(daemon), Unavailable)
        assert daemon.away is not None
        node.start()
        wait_for(lambda: daemon.away is None)
        assert ask(daemon) is None


def test_a_call_that_is_not_answered_is_the_last_that_anybody_waits_for(node: Node, daemon: Daemon) -> None:
    with node.stopped():
        started = time.monotonic()
        assert isinstance(ask(daemon), DeadlineExceeded)
        assert 0.2 < time.monotonic() - started < 0.3 + SLACK_S
        started = time.monotonic()
        for _ in range(1000):
            assert isinstance(ask(daemon), Unavailable)
        assert time.monotonic() - started < 1.0
        assert looks_after() == 1
    wait_for(lambda: daemon.away is None)
    assert ask(daemon) is None


def test_threads_that_wait_together_are_followed_by_nobody(
    node: Node, daemon: Daemon, caplog: pytest.LogCaptureFixture
) -> None:
    errors: list[KVStoreError | None] = []
    with node.stopped():
        threads = [threading.Thread(target=lambda: errors.append(ask(daemon))) for _ in range(8)]
        started = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert time.monotonic() - started < 0.3 + SLACK_S
        assert looks_after() == 1
    assert len(errors) == 8
    assert None not in errors
    assert sum("going on without" in record.getMessage() for record in caplog.records) == 1
    wait_for(lambda: daemon.away is None)


@pytest.mark.parametrize("error", [InvalidRequest("so"), TierError("so"), ValueError("so")])
def test_what_fails_for_another_reason_is_passed_on_and_is_no_absence(
    daemon: Daemon, error: Exception
) -> None:
    with pytest.raises(type(error), match="so"), daemon.asking():
        raise error
    assert daemon.away is None
    assert ask(daemon) is None
    assert looks_after() == 1


def test_an_absence_that_was_none_is_over_at_the_first_look(daemon: Daemon) -> None:
    with pytest.raises(ProtocolError), daemon.asking():
        raise ProtocolError("so it seems")
    assert daemon.away == "so it seems"
    wait_for(lambda: daemon.away is None, 5)


def test_complaints_are_few_and_none_while_it_is_away(
    node: Node, daemon: Daemon, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(100):
        daemon.complain(TierError(f"full {number}"))
    assert [record.getMessage()[:6] for record in caplog.records] == ["full 0"]
    node.kill()
    ask(daemon)
    caplog.clear()
    other = Daemon(node.address, timeout_s=0.3)
    other.complain(TierError("full"))
    assert not any("full" in record.getMessage() for record in caplog.records)
    other.close()
    node.start()


def test_after_close_nobody_is_asked(node: Node, daemon: Daemon) -> None:
    with daemon.asking() as store:
        daemon.close()
        with pytest.raises(Unavailable, match="closed"):
            store.statistics()
    daemon.close()
    error = ask(daemon)
    assert isinstance(error, Unavailable)
    assert "the connector is closed" in str(error)
    assert daemon.away == "the connector is closed"
    wait_for(lambda: looks_after() == 0, 5)


def test_close_ends_the_watch_and_leaves_nothing_open(node: Node) -> None:
    wait_for(lambda: not own_threads(), 5)
    descriptors = open_files(os.getpid())
    for round_number in range(5):
        daemon = Daemon(node.address, timeout_s=0.3)
        with node.stopped():
            if round_number % 2:
                ask(daemon)
            started = time.monotonic()
            daemon.close()
            assert time.monotonic() - started < 0.3 + SLACK_S
    node.kill()
    for _ in range(5):
        Daemon(node.address, timeout_s=0.3).close()
    wait_for(lambda: not own_threads(), 5)
    wait_for(lambda: open_files(os.getpid()) <= descriptors, 5)
    node.start()


def test_a_socket_that_accepts_and_says_nothing_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "mute.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(64)
        descriptors = open_files(os.getpid())
        started = time.monotonic()
        daemon = Daemon(f"unix:{path}", timeout_s=0.3)
        assert time.monotonic() - started < 0.3 + SLACK_S
        assert daemon.away is not None
        # Looks go on, one at a time, and each closes what it has opened.
        listener.setblocking(False)
        seen = 0

        def looked_again() -> bool:
            nonlocal seen
            try:
                listener.accept()[0].close()
                seen += 1
            except BlockingIOError:
                pass
            return seen >= 4

        wait_for(looked_again, 10)
        daemon.close()
        wait_for(lambda: looks_after() == 0)
        wait_for(lambda: open_files(os.getpid()) <= descriptors)


def test_a_restart_is_noticed_though_nobody_asks(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with node.client() as other:  # it notices only at a call
        daemon = Daemon(node.address, timeout_s=0.3)
        node.kill()
        node.start()
        back = f"the daemon at {node.address} is back"
        wait_for(lambda: back in [record.getMessage() for record in caplog.records], 5)
        assert ask(daemon) is None
        daemon.close()
        with pytest.raises(Unavailable):
            other.statistics()


def test_a_daemon_that_greets_and_answers_nothing_costs_no_descriptors(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_for(lambda: not own_threads(), 5)
    descriptors = open_files(os.getpid())
    node.kill()
    daemon = Daemon(node.address, timeout_s=0.3)
    real, unanswered = StoreClient.statistics, [1, 2, 3, 4, 5]

    def statistics(store: StoreClient) -> object:
        if threading.current_thread().name == "kvstore-watch" and unanswered:
            unanswered.pop()
            raise DeadlineExceeded("no answer")
        return real(store)

    monkeypatch.setattr(StoreClient, "statistics", statistics)
    node.start()
    wait_for(lambda: daemon.away is None)
    assert not unanswered
    daemon.close()
    wait_for(lambda: open_files(os.getpid()) <= descriptors, 5)


# Over TCP, where bytes have a connection of their own.


@pytest.fixture
def slow(node: Node) -> Iterator[Proxy]:
    """A way to the daemon of 4 MB/s."""
    host, port = node.endpoint("data").rsplit(":", 1)
    with Proxy((host, int(port)), 4e6) as proxy:
        yield proxy


@pytest.fixture
def far(slow: Proxy) -> Iterator[Daemon]:
    """The daemon over that way."""
    daemon = Daemon(slow.address, timeout_s=0.3, token=TOKEN)
    yield daemon
    daemon.close()


def test_shared_memory_has_one_connection(node: Node, daemon: Daemon) -> None:
    with daemon.asking() as asking, daemon.moving() as moving:
        assert moving is asking


def test_no_question_waits_behind_bytes(far: Daemon, slow: Proxy) -> None:
    namespace = Namespace(model="moving")
    assert slow.connections == 1

    def move() -> None:
        with far.moving() as store, store.reserve(namespace, [b"k"], 8 * MIB) as write:
            write.commit()

    moving = threading.Thread(target=move)
    moving.start()
    wait_for(lambda: len(slow.up) > MIB)
    assert slow.connections == 2
    started = time.monotonic()
    assert ask(far) is None
    assert time.monotonic() - started < 0.3
    assert moving.is_alive()
    moving.join()
    with far.asking() as store:
        assert list(store.hit_each([(namespace, b"k")])) == [True]
    with far.moving() as store:
        store.remove(namespace, [b"k"])
    assert slow.connections == 2
    assert far.away is None


def test_a_transfer_that_was_too_slow_is_no_absence(
    far: Daemon, node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    namespace = Namespace(model="moving")
    with node.client() as near:
        near.put(namespace, b"k", bytes(24 * MIB))
    with pytest.raises(TransferTooSlow), far.moving() as store:
        store.acquire_each([(namespace, b"k")], transfer_s=0.5)
    assert far.away is None
    assert ask(far) is None

    def moved() -> bool:
        try:
            with far.moving() as store:
                return store.put(namespace, b"small", b"small") is None
        except Unavailable:  # the second connection is being made anew
            assert far.away is None
            return False

    wait_for(moved, 5)
    assert not caplog.records
    with node.client() as near:
        near.remove(namespace, [b"k", b"small"])


@pytest.mark.parametrize("gone", [True, False])
def test_a_daemon_that_is_gone_or_silent_is_away_also_for_those_who_move(
    far: Daemon, node: Node, gone: bool
) -> None:
    with far.moving() as store:
        store.statistics()
    if gone:
        node.kill()
    with contextlib.nullcontext() if gone else node.stopped():
        with pytest.raises((Unavailable, DeadlineExceeded)), far.moving() as store:
            store.acquire(Namespace(model="moving"), [b"k"])
        wait_for(lambda: far.away is not None, 2)
        with pytest.raises(Unavailable), far.moving():
            pytest.fail("it is not there to be asked")
    if not gone:
        wait_for(lambda: far.away is None)


def test_a_second_connection_that_was_lost_is_made_anew_though_nobody_asks(far: Daemon, slow: Proxy) -> None:
    with far.moving() as store:
        store.statistics()
    assert slow.connections == 2
    slow.hang_up(1)
    wait_for(lambda: slow.connections == 3, 5)
    with far.moving() as again:
        assert again is store
        wait_for(lambda: again.lost is None, 1)
        again.statistics()
    assert far.away is None
    far.close()
    with pytest.raises(Unavailable, match="closed"), far.moving():
        pytest.fail("it is closed")
    with pytest.raises(Unavailable, match="closed"):
        again.statistics()
