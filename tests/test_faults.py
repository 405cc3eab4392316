"""What happens to leases when processes die, fork, or lose their connection. All with real processes."""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from kvstore import packing, protocol
from kvstore.block import Namespace
from kvstore.channel import Channel, Reply
from kvstore.client import StoreClient
from kvstore.errors import DeadlineExceeded, LeaseError, Unavailable
from kvstore.protocol import frame
from tests.forked import FORKS
from tests.node import Node, RawConnection, child, idle, open_files, pinned, wait_for
from tests.test_client import MIB, fill, keys, pattern
from tests.test_tcp import TOKEN, greeted

NAMESPACE = Namespace(model="faults")


class Victim:
    """Another process that uses the store, step by step, until something happens to it."""

    def __init__(self, role: Callable[..., None], *args: object) -> None:
        self.pipe, theirs = FORKS.Pipe()
        self.process = FORKS.Process(target=role, args=(theirs, *args))
        self.process.start()
        theirs.close()
        assert self.pipe.poll(30), "the other process did not get ready"
        self.ready = self.pipe.recv()

    def kill(self) -> float:
        """SIGKILL; when."""
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGKILL)
        killed = time.monotonic()
        self.process.join()
        return killed

    def close(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def reserving(pipe: Connection, address: str, names: list[bytes]) -> None:
    store = StoreClient.connect(address)
    write = store.reserve(NAMESPACE, names, MIB)
    pipe.send(len(write.granted))
    pipe.recv()


def reading(pipe: Connection, address: str, names: list[bytes]) -> None:
    store = StoreClient.connect(address)
    read = store.acquire(NAMESPACE, names)
    pipe.send(read.hit_length)
    pipe.recv()


def copying(pipe: Connection, address: str, names: list[bytes]) -> None:
    store = StoreClient.connect(address)
    write = store.reserve(NAMESPACE, names, MIB)
    views = [np.frombuffer(view, np.uint8) for view in write.views]
    source = np.full(MIB, 7, np.uint8)
    pipe.send(len(views))
    while True:
        for view in views:
            np.copyto(view, source)


def forking(pipe: Connection, address: str, names: list[bytes]) -> None:
    store = StoreClient.connect(address)
    write = store.reserve(NAMESPACE, names[:1], MIB)
    read = store.acquire(NAMESPACE, names[1:])
    view = read.views[0]
    theirs, ours = os.pipe()
    child = os.fork()
    if child == 0:
        seen = []
        for use in (
            lambda: write.views,
            lambda: read.views,
            lambda: store.get(NAMESPACE, b"k"),
            lambda: view[0],
        ):
            try:
                use()
                seen.append("nothing")
            except (LeaseError, Unavailable, ValueError) as error:
                seen.append(str(error))
        maps = Path("/proc/self/maps").read_text().count("memfd")
        sockets = sum("socket" in os.readlink(f"/proc/self/fd/{fd}") for fd in _descriptors())
        with StoreClient.connect(address) as anew:
            seen.append(anew.hit_length(NAMESPACE, names[1:]).dram)
        os.write(ours, repr((seen, maps, sockets)).encode())
        os.close(ours)
        signal.pause()
    os.close(ours)
    with os.fdopen(theirs) as answer:
        pipe.send((child, answer.read()))
    pipe.recv()


def _descriptors() -> list[str]:
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            os.readlink(f"/proc/self/fd/{fd}")
            links.append(fd)
        except FileNotFoundError:
            pass
    return links


@pytest.mark.parametrize("role", [reserving, copying], ids=["between reserve and commit", "in a copy"])
def test_a_writer_that_is_killed_frees_its_slots_within_a_second(
    node: Node, store: StoreClient, role: Callable[..., None]
) -> None:
    victim = Victim(role, node.address, keys(32))
    assert victim.ready == 32
    assert store.statistics().tiers[0].used_bytes == 32 * MIB
    killed = victim.kill()
    wait_for(lambda: store.statistics().tiers[0].pending_blocks == 0)
    with store.reserve(NAMESPACE, keys(32), MIB) as write:
        assert len(write.granted) == 32
    assert time.monotonic() - killed < 1
    assert store.hit_length(NAMESPACE, keys(32)).dram == 0
    victim.close()


def test_a_reader_that_is_killed_frees_its_pins_within_a_second(node: Node, store: StoreClient) -> None:
    fill(store, NAMESPACE, keys(8), MIB)
    victim = Victim(reading, node.address, keys(8))
    assert victim.ready == 8
    assert store.statistics().tiers[0].pinned_blocks == 8
    killed = victim.kill()
    wait_for(lambda: store.statistics().tiers[0].pinned_blocks == 0)
    assert time.monotonic() - killed < 1
    victim.close()


def test_a_forked_child_holds_nothing_and_says_so(node: Node, store: StoreClient) -> None:
    names = keys(3)
    fill(store, NAMESPACE, names[1:], MIB)
    victim = Victim(forking, node.address, names)
    child, answer = victim.ready
    try:
        seen, maps, sockets = eval(answer)
        lost = "a lease whose connection was lost"
        assert lost in seen[0]
        assert lost in seen[1]
        assert "belongs to the parent process; call StoreClient.connect in the child" in seen[2]
        assert "released memoryview" in seen[3]
        assert seen[4] == 2, "the child can connect for itself"
        assert maps == 0
        assert sockets == 1, "only the pipe of this test"
        # The parent dies, its child lives: everything is free all the same.
        assert store.statistics().tiers[0].pinned_blocks == 2
        killed = victim.kill()
        wait_for(lambda: (tier := store.statistics().tiers[0]).pinned_blocks + tier.pending_blocks == 0)
        assert store.statistics().quarantined_leases == 0
        assert time.monotonic() - killed < 1
        os.kill(child, 0)
    finally:
        os.kill(child, signal.SIGKILL)
        victim.close()


def test_a_child_lets_go_of_all_clients_also_where_one_has_been_closed(node: Node) -> None:
    with contextlib.ExitStack() as opened:
        clients = [opened.enter_context(node.client()) for _ in range(8)]
        channels = [client._connected().channel for client in clients]
        for channel in channels[::2]:  # as when the daemon has gone and nobody has noticed yet
            channel.close()

        def body() -> None:
            assert [channel._sock.fileno() for channel in channels] == [-1] * 8
            for client in clients:
                with pytest.raises(Unavailable, match="belongs to the parent process"):
                    client.statistics()

        with child(body) as pid:
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def cut(client: StoreClient) -> None:
    """Cut a client's connection from outside it, as a broken daemon or a full system would."""
    link = client._keeper._link
    assert link is not None
    link.channel._sock.shutdown(socket.SHUT_RDWR)


def test_slots_of_a_cut_connection_stay_taken_until_the_writer_ends_its_lease(
    node: Node, store: StoreClient
) -> None:
    with node.client() as writer:
        write = writer.reserve(NAMESPACE, keys(16), MIB)
        arrays = [np.frombuffer(view, np.uint8) for view in write.views]
        stop = threading.Event()

        def scribble() -> None:
            while not stop.is_set():
                for array in arrays:
                    array[:] = 0xEE

        scribbling = threading.Thread(target=scribble)
        scribbling.start()
        cut(writer)
        wait_for(lambda: store.statistics().quarantined_leases == 1)
        # The keys are free at once, for others; the memory is not.
        assert store.statistics().tiers[0].pending_blocks == 0
        fill(store, NAMESPACE, keys(16), MIB)
        fill(store, NAMESPACE, keys(16, "more"), MIB)
        assert store.statistics().tiers[0].used_bytes == 48 * MIB
        assert not write.valid
        wait_for(lambda: _answers(writer))
        with pytest.raises(LeaseError, match="connection was lost"):
            write.commit()
        assert store.statistics().quarantined_leases == 1, "it has not given up its lease"
        for name in [*keys(16), *keys(16, "more")]:
            assert store.get(NAMESPACE, name) == pattern(name, MIB)
        stop.set()
        scribbling.join()
        write.abort()
        wait_for(lambda: store.statistics().quarantined_leases == 0)
        assert store.statistics().tiers[0].used_bytes == 32 * MIB


def _answers(client: StoreClient) -> bool:
    try:
        client.hit_length(NAMESPACE, [b"k"])
    except Unavailable:
        return False
    return True


def test_a_reader_whose_connection_was_cut_keeps_its_bytes(node: Node, store: StoreClient) -> None:
    fill(store, NAMESPACE, keys(8), MIB)
    with node.client() as reader:
        read = reader.acquire(NAMESPACE, keys(8))
        views = list(read.views)
        cut(reader)
        wait_for(lambda: store.statistics().quarantined_leases == 1)
        for batch in range(8):
            fill(store, NAMESPACE, keys(16, f"batch{batch}-"), MIB)
        assert [bytes(view) for view in views] == [pattern(key, MIB) for key in keys(8)]
        wait_for(lambda: _answers(reader))
        read.release()
        wait_for(lambda: store.statistics().quarantined_leases == 0)
        wait_for(lambda: store.statistics().tiers[0].pinned_blocks == 0)


def test_leases_that_ended_while_the_connection_was_down_are_given_up(node: Node, store: StoreClient) -> None:
    fill(store, NAMESPACE, keys(8), MIB)
    with node.client() as reader:
        kept, ended = reader.acquire(NAMESPACE, keys(4)), reader.acquire(NAMESPACE, keys(8))
        cut(reader)
        ended.release()
        wait_for(lambda: _answers(reader))
        wait_for(lambda: store.statistics().quarantined_leases == 1)
        assert store.statistics().tiers[0].pinned_blocks == 4
        cut(reader)  # and a second time: what the first loss left is not forgotten
        wait_for(lambda: not _answers(reader))
        wait_for(lambda: _answers(reader))
        assert store.statistics().tiers[0].pinned_blocks == 4
        kept.release()
        wait_for(lambda: store.statistics().quarantined_leases == 0)
        wait_for(lambda: store.statistics().tiers[0].pinned_blocks == 0)


def test_quarantined_slots_come_back_when_the_process_ends(node: Node, store: StoreClient) -> None:
    victim = Victim(reserving_then_cut, node.address, keys(8))
    wait_for(lambda: store.statistics().quarantined_leases == 1)
    assert store.statistics().tiers[0].used_bytes == 8 * MIB
    killed = victim.kill()
    wait_for(lambda: store.statistics().tiers[0].used_bytes == 0)
    assert time.monotonic() - killed < 1
    victim.close()


def reserving_then_cut(pipe: Connection, address: str, names: list[bytes]) -> None:
    store = StoreClient.connect(address)
    write = store.reserve(NAMESPACE, names, MIB)
    cut(store)
    pipe.send(len(write.granted))
    pipe.recv()


def test_a_client_that_never_releases_harms_nobody_else(node: Node, store: StoreClient) -> None:
    fill(store, NAMESPACE, keys(32), MIB)
    with node.client() as hoarder:
        leases = [hoarder.acquire(NAMESPACE, keys(32)[index : index + 1]) for index in range(32)]
        assert hoarder.acquire(NAMESPACE, keys(1)).limited
        for batch in range(4):
            names = keys(16, f"batch{batch}-")
            fill(store, NAMESPACE, names, MIB)
            assert store.get(NAMESPACE, names[-1]) == pattern(names[-1], MIB)
        assert all(lease.valid for lease in leases)
    wait_for(lambda: store.statistics().tiers[0].pinned_blocks == 0)


def test_a_daemon_that_is_killed_and_restarted_is_found_again(node: Node) -> None:
    with node.client() as store:
        fill(store, NAMESPACE, keys(4), MIB)
        read = store.acquire(NAMESPACE, keys(4))
        views = list(read.views)
        write = store.reserve(NAMESPACE, keys(2, "w"), MIB)
        epoch = store.statistics().epoch
        node.kill()
        started = time.monotonic()
        with pytest.raises(Unavailable):
            store.get(NAMESPACE, keys(1)[0])
        with pytest.raises(Unavailable):
            store.get(NAMESPACE, keys(1)[0])
        assert time.monotonic() - started < 1, "being away costs nothing"
        assert not read.valid
        assert not write.valid
        assert [bytes(view) for view in views] == [pattern(key, MIB) for key in keys(4)], (
            "no crash, no change"
        )
        node.start()
        wait_for(lambda: _answers(store))
        assert store.statistics().epoch > epoch
        assert store.hit_length(NAMESPACE, keys(4)).dram == 0, "no stale block"
        with pytest.raises(LeaseError):
            write.commit()
        read.release()
        write.abort()
        fill(store, NAMESPACE, keys(4), MIB)
        assert store.get(NAMESPACE, keys(4)[3]) == pattern(keys(4)[3], MIB)


def test_a_stopped_daemon_costs_one_deadline_and_is_found_again(node: Node) -> None:
    with node.client(timeout_s=0.5) as store:
        fill(store, NAMESPACE, keys(1))
        os.kill(node.pid, signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises((Unavailable, TimeoutError)):
            store.hit_length(NAMESPACE, keys(1))
        assert time.monotonic() - started < 2
        os.kill(node.pid, signal.SIGCONT)
        wait_for(lambda: _answers(store))
        assert store.hit_length(NAMESPACE, keys(1)).dram == 1


def test_connections_leave_no_descriptors_behind(node: Node, store: StoreClient) -> None:
    before = open_files(node.pid)
    for turn in range(50):
        with node.client() as one:
            fill(one, NAMESPACE, keys(1, f"turn{turn}-"))
    wait_for(lambda: store.statistics().connections == 1)
    wait_for(lambda: open_files(node.pid) <= before)


# Over TCP, where what is pinned is being sent.


@pytest.fixture
def remote() -> Iterator[Node]:
    """A daemon with a data port."""
    with Node("64MiB", "--data", "127.0.0.1:0", environ={"KVSTORE_TOKEN": TOKEN}) as node:
        yield node
        node.check()
        assert node.stop() == 0
        assert "Traceback" not in node.log, node.log


def asked(raw: RawConnection, store: StoreClient, names: list[bytes]) -> None:
    """Ask for blocks, more than sockets hold, of which no byte is read yet: the daemon is sending them."""
    raw.send(frame(9, protocol.Acquire(raw.open(NAMESPACE), packing.pack_keys(names))))
    wait_for(lambda: pinned(store) == len(names))


def test_a_client_that_says_goodbye_and_goes_while_blocks_are_sent_leaves_nothing_behind(
    remote: Node,
) -> None:
    with remote.client() as store:
        fill(store, NAMESPACE, keys(24), MIB)
        with greeted(remote) as raw:
            asked(raw, store, keys(24))
            raw.send(frame(0, protocol.Goodbye()))
        wait_for(lambda: store.statistics().connections == 1 and idle(store))


@pytest.mark.parametrize("verb", ["goodbye", "release"])
def test_what_is_being_sent_stays_pinned_whatever_its_client_says_meanwhile(remote: Node, verb: str) -> None:
    with remote.client() as store, greeted(remote) as raw:
        fill(store, NAMESPACE, keys(24), MIB)
        with store.acquire(NAMESPACE, keys(1)) as lease:
            asked(raw, store, keys(24))
            # Leases are numbered one by one, so a client can guess.
            request = protocol.Goodbye() if verb == "goodbye" else protocol.Release([lease.id + 1])
        raw.send(frame(10, request))
        for batch in range(8):
            fill(store, NAMESPACE, keys(16, f"batch{batch}-"), MIB)
        assert isinstance(raw.answer(), protocol.Acquired)
        assert raw.payload == b"".join(pattern(key, MIB) for key in keys(24))
        answer = raw.answer()
        assert isinstance(answer, protocol.Done if verb == "goodbye" else protocol.Failure)
        wait_for(lambda: pinned(store) == 0)


def memory_files() -> int:
    """Descriptors of arenas in this process."""
    return sum("memfd" in os.readlink(f"/proc/self/fd/{fd}") for fd in _descriptors())


def test_a_connection_that_fails_half_way_leaves_no_descriptor_behind(
    node: Node, store: StoreClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = Channel.call

    def hanging(channel: Channel, request: protocol.Request, timeout_s: float, **options: bool) -> Reply:
        if not isinstance(request, protocol.OpenArena) or not request.writable:
            return call(channel, request, timeout_s, **options)
        with node.stopped():
            return call(channel, request, timeout_s, **options)

    before = memory_files()
    with monkeypatch.context() as patch:
        patch.setattr(Channel, "call", hanging)
        with pytest.raises(DeadlineExceeded) as caught:
            node.client(timeout_s=0.2)
    assert memory_files() == before
    wait_for(lambda: store.statistics().connections == 1)
    del caught  # whose traceback would have kept the connection open


def test_a_client_that_can_have_no_more_threads_maps_memory_and_connects_anew_once_it_can(
    node: Node, namespace: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def refused(thread: threading.Thread) -> None:
        if thread.name.startswith("kvstore-"):
            raise RuntimeError("can't start new thread")
        start(thread)

    with node.client() as store:
        monkeypatch.setattr(threading.Thread, "start", refused)
        descriptors = open_files(os.getpid())
        with pytest.raises(Unavailable, match="thread"):
            node.client()
        assert open_files(os.getpid()) == descriptors
        store.put(namespace, b"k", b"mapped")
        assert store.get(namespace, b"k") == b"mapped"
        node.kill()
        with pytest.raises(Unavailable):
            store.statistics()
        monkeypatch.undo()
        node.start()
        wait_for(lambda: answers(store))


def answers(store: StoreClient) -> bool:
    """Whether there is a daemon."""
    try:
        store.statistics()
    except Unavailable:
        return False
    return True
