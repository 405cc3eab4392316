"""A daemon that takes over from another: its blocks, its clients, its disks, and what must not be taken."""

import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import msgspec
import numpy as np
import pytest

from kvstore import protocol
from kvstore.block import Medium, Namespace
from kvstore.client import StoreClient
from kvstore.errors import ConfigError, LeaseError, Unavailable
from kvstore.node.arena import Arena
from kvstore.node.directory import TierDirectory
from kvstore.node.handover import FORMAT, Estate, Heir, Kept, Ward, digest, estate, send
from kvstore.node.lease import Holder
from kvstore.node.policy import LRU
from kvstore.node.quarantine import Quarantine
from kvstore.node.store import Store
from kvstore.node.takeover import Inheritance, take_over
from tests.forked import Forked
from tests.node import (
    Node,
    RawConnection,
    child,
    empty,
    idle,
    open_files,
    pinned,
    private_bytes,
    wait_for,
    written,
)
from tests.scripted import in_virtual_time
from tests.test_client import MIB, fill, keys, pattern
from tests.test_faults import NAMESPACE, Victim, copying, memory_files, reading
from tiers.dram import DramTier

TENANT = Namespace(model="faults", salt="tenant")


@pytest.fixture(scope="module")
def shared() -> Iterator[Node]:
    """A daemon that is taken over from again and again; whoever uses it empties it."""
    with Node("64MiB") as node:
        yield node
        node.check()


@pytest.fixture
def node(shared: Node) -> Iterator[Node]:
    """It, empty, and well before and after."""
    with shared.client() as store:
        empty(store)
        wait_for(lambda: idle(store))
    yield shared
    shared.check()


def hand_over(node: Node, *flags: str) -> None:
    """Have another daemon take over; the old one has ended well by then."""
    old = node.process
    node.start("--take-over", *flags)
    assert old.wait(20) == 0
    old.stdout.close()


def back(store: StoreClient) -> bool:
    """Whether the client has found a daemon again."""
    try:
        store.statistics()
    except Unavailable:
        return False
    return True


def contents(store: StoreClient, names: list[bytes], namespace: Namespace = NAMESPACE) -> list[bytes | None]:
    return [store.get(namespace, name) for name in names]


def patterns(names: list[bytes], nbytes: int = MIB) -> list[bytes | None]:
    return [pattern(name, nbytes) for name in names]


def churn(store: StoreClient) -> None:
    """Write four times what an arena of 64 MiB holds, and look at every block of it."""
    for turn in range(16):
        names = keys(16, f"churn{turn}.")
        with store.reserve(NAMESPACE, names, MIB, wait_s=5) as write:
            assert write.granted == names
            for name, view in zip(names, write.views, strict=True):
                view[:] = pattern(name, MIB)
            write.commit()
        assert contents(store, names) == patterns(names)


# Blocks.


def test_blocks_outlive_their_daemon_bit_for_bit_and_clients_go_on(node: Node) -> None:
    with node.client() as store:
        fill(store, NAMESPACE, keys(9), 5000)
        fill(store, TENANT, keys(5), MIB)
        store.remove(NAMESPACE, keys(3))
        epoch = store.statistics().epoch
        hand_over(node)
        wait_for(lambda: back(store))
        assert store.statistics().epoch > epoch
        assert contents(store, keys(9)) == [None] * 3 + patterns(keys(9), 5000)[3:]
        assert contents(store, keys(5), TENANT) == patterns(keys(5))
        assert {use.namespace for use in store.namespaces()} == {NAMESPACE, TENANT}
        fill(store, NAMESPACE, keys(3), 7000)
        assert store.hit_length(NAMESPACE, keys(9)).dram == 9
        assert store.check() == []


def test_the_order_in_which_blocks_leave_goes_over(node: Node) -> None:
    with node.client() as store:
        for name in keys(48):
            fill(store, NAMESPACE, [name], MIB)
        for name in keys(8):
            assert store.get(NAMESPACE, name) is not None
        hand_over(node)
        wait_for(lambda: back(store))
        for name in keys(40, "more"):
            fill(store, NAMESPACE, [name], MIB)
        here = [name for name in keys(48) if store.hit_length(NAMESPACE, [name]).dram]
        assert 8 < len(here) < 40
        assert here == [*keys(8), *keys(48)[8 - len(here) :]]


def test_a_prefix_loses_its_tail_before_its_head_after_it_too(node: Node) -> None:
    with node.client() as store:
        fill(store, NAMESPACE, keys(32), MIB)
        for name in reversed(keys(32)):  # the head is the oldest by use
            assert store.get(NAMESPACE, name) is not None
        hand_over(node)
        wait_for(lambda: back(store))
        fill(store, NAMESPACE, keys(32, "more"), MIB)
        for name in keys(16, "last"):
            fill(store, NAMESPACE, [name], MIB)
        found = [store.hit_length(NAMESPACE, [name]).dram for name in keys(32)]
        assert found == sorted(found, reverse=True), "a head has left before its tail"


def test_a_smaller_arena_is_the_same_with_a_limit_and_a_larger_one_is_new(tmp_path: Path) -> None:
    with Node("32MiB") as node, node.client() as store:
        fill(store, NAMESPACE, keys(8), MIB)
        hand_over(node, "--dram", "16MiB")
        wait_for(lambda: back(store))
        assert contents(store, keys(8)) == patterns(keys(8))
        tier = store.statistics().tiers[0]
        assert (tier.capacity_bytes, tier.limit_bytes) == (32 * MIB, 16 * MIB)
        hand_over(node, "--dram", "48MiB")
        wait_for(lambda: back(store))
        assert store.statistics().tiers[0].capacity_bytes == 48 * MIB
        assert store.hit_length(NAMESPACE, keys(8)).dram == 0
        assert f"has {32 * MIB} bytes, and ours is to have {48 * MIB}: starting afresh" in node.log
        node.check()


# Who still touches slots.


def test_a_reader_sees_its_bytes_until_it_releases_them(node: Node) -> None:
    with node.client() as store, node.client() as reader:
        fill(store, NAMESPACE, keys(16), MIB)
        read = reader.acquire(NAMESPACE, keys(16))
        arrays = [np.frombuffer(view, np.uint8) for view in read.views]
        expected = [np.frombuffer(pattern(name, MIB), np.uint8) for name in keys(16)]
        store.remove(NAMESPACE, keys(4))  # which must not be found, and not be used again either
        wrong: list[int] = []
        stop = threading.Event()

        def look() -> None:
            while not stop.is_set():
                wrong.extend(n for n in range(16) if not np.array_equal(arrays[n], expected[n]))

        looking = threading.Thread(target=look)
        looking.start()
        for _ in range(2):  # from the second daemon to a third as well
            hand_over(node)
            wait_for(lambda: back(store) and back(reader))
            tier = store.statistics().tiers[0]
            assert (tier.pinned_blocks, tier.doomed_blocks) == (16, 4)
            assert store.hit_length(NAMESPACE, keys(4)).dram == 0
            churn(store)
        stop.set()
        looking.join()
        assert not wrong
        assert contents(store, keys(16)) == [None] * 4 + patterns(keys(16))[4:]
        with pytest.raises(LeaseError, match="connection was lost"):
            _ = read.views
        read.release()
        wait_for(lambda: idle(store))
        assert store.statistics().quarantined_leases == 0


def test_a_reader_that_is_killed_frees_its_pins(node: Node) -> None:
    with node.client() as store:
        fill(store, NAMESPACE, keys(16), MIB)
        victim = Victim(reading, node.address, keys(16))
        try:
            hand_over(node)
            wait_for(lambda: back(store))
            assert pinned(store) == 16
            killed = victim.kill()
            wait_for(lambda: pinned(store) == 0)
            assert time.monotonic() - killed < 1
        finally:
            victim.close()


def test_a_reader_that_was_killed_meanwhile_frees_its_pins(node: Node) -> None:
    with node.client() as store:
        fill(store, NAMESPACE, keys(16), MIB)
        victim = Victim(reading, node.address, keys(16))
        try:
            with node.stopped():  # it does not know when it hands over
                victim.kill()
            hand_over(node)
        finally:
            victim.close()
        wait_for(lambda: back(store))
        wait_for(lambda: idle(store))


def test_a_writer_that_writes_on_damages_nobody(node: Node) -> None:
    with node.client() as store:
        fill(store, NAMESPACE, keys(8), MIB)
        victim = Victim(copying, node.address, keys(16, "more"))
        try:
            hand_over(node)
            wait_for(lambda: back(store))
            assert store.statistics().quarantined_leases == 1
            used = store.statistics().tiers[0].used_bytes
            assert used == 24 * MIB, "its keys are free, its slots are not"
            churn(store)
            assert store.hit_length(NAMESPACE, keys(16, "more")).dram == 0
            victim.kill()
            wait_for(lambda: store.statistics().quarantined_leases == 0)
            node.check()
        finally:
            victim.close()


def test_a_client_gives_up_what_it_let_go_of_while_nobody_listened(node: Node) -> None:
    with node.client() as store, node.client() as client:
        fill(store, NAMESPACE, keys(8), MIB)
        read = client.acquire(NAMESPACE, keys(8))
        write = client.reserve(NAMESPACE, keys(8, "more"), MIB)
        with RawConnection(node.socket) as raw:
            raw.send(protocol.frame(9, protocol.HandOver(FORMAT)))
            assert node.process.wait(20) == 0  # to one that is not there to take it
        node.process.stdout.close()
        read.release()
        write.abort()
        node.start("--take-over")
        wait_for(lambda: back(client))
        wait_for(lambda: back(store))
        wait_for(lambda: idle(store))


def resting(pipe: Connection, address: str, names: list[bytes]) -> None:
    """Many clients of one process, each with a lease."""
    clients = [StoreClient.connect(address) for _ in range(300)]
    leases = [client.acquire(NAMESPACE, names) for client in clients]
    pipe.send(sum(lease.hit_length for lease in leases))
    pipe.recv()


def test_more_processes_go_over_than_fit_into_one_message(node: Node) -> None:
    with node.client() as store:
        fill(store, NAMESPACE, keys(1), 100)
        victim = Victim(resting, node.address, keys(1))
        try:
            assert victim.ready == 300
            hand_over(node)
            wait_for(lambda: back(store))
            assert store.check() == []
            victim.kill()
            wait_for(lambda: idle(store))
        finally:
            victim.close()


def test_it_goes_over_with_slots_held_back_for_finding_mistakes() -> None:
    with Node("64MiB", environ={"KVSTORE_DEBUG": "1"}) as node, node.client() as store:
        fill(store, NAMESPACE, keys(16), MIB)
        store.remove(NAMESPACE, keys(4))
        with store.acquire(NAMESPACE, keys(16)[4:]) as read:
            arrays = [np.frombuffer(view, np.uint8) for view in read.views]
            hand_over(node)
            wait_for(lambda: back(store))
            churn(store)
            assert [array.tobytes() for array in arrays] == patterns(keys(16))[4:]
            del arrays
        wait_for(lambda: idle(store))
        node.check()


# Tiers below.


def test_directories_go_over_and_what_they_still_lacked_is_written(tmp_path: Path) -> None:
    faults = tmp_path / "faults"
    faults.write_text("writing 0.3\n")
    environ = {"KVSTORE_FAULTS": str(faults)}
    flags = ("16MiB", "--nvme", f"{tmp_path}/nvme:64MiB")
    with Node(*flags, environ=environ, module="tests.faulty_daemon") as node:
        with node.client() as store:
            fill(store, NAMESPACE, keys(8), MIB)
            assert store.statistics().tiers[1].backlog_blocks
            hand_over(node)
            faults.unlink()
            wait_for(lambda: back(store))
            wait_for(lambda: written(store))
            assert store.check() == []
        node.kill()
        node.start()
        with node.client() as store:
            assert store.hit_length(NAMESPACE, keys(8)).nvme == 8
            assert contents(store, keys(8)) == patterns(keys(8))


def test_nothing_is_handed_over_while_a_disk_hangs(tmp_path: Path) -> None:
    with stopping(tmp_path) as node:
        hand_over(node)
        with node.client() as store:
            assert store.hit_length(NAMESPACE, keys(8)).dram == 0
        assert "a tier hangs: nothing is handed over" in node.log
        assert "nothing was handed over" in node.log


def test_one_that_dies_while_it_hands_over_and_says_so_leaves_a_fresh_start(tmp_path: Path) -> None:
    with stopping(tmp_path, "30") as node:
        old, url = node.process, f"http://{node.endpoint('http')}/readyz"
        said: list[str] = []

        def kill() -> None:
            wait_for(lambda: "another daemon takes over" in node.log)
            with pytest.raises(HTTPError) as refused:
                urlopen(url, timeout=10)
            said.append(refused.value.read().decode())
            old.kill()

        killer = threading.Thread(target=kill)
        killer.start()
        node.start("--take-over")
        killer.join()
        old.stdout.close()
        assert said == ["handing over\n"]
        with node.client() as store:
            assert store.hit_length(NAMESPACE, keys(8)).dram == 0
        node.check()


@contextmanager
def stopping(tmp_path: Path, patience_s: str = "0.3") -> Iterator[Node]:
    """A daemon with blocks that it cannot write, and that waits so long for its disk when it stops."""
    faults = tmp_path / "faults"
    faults.touch()
    environ = {"KVSTORE_FAULTS": str(faults), "KVSTORE_STOP_S": patience_s}
    flags = ("16MiB", "--nvme", f"{tmp_path}/nvme:64MiB")
    with Node(*flags, environ=environ, module="tests.faulty_daemon") as node:
        faults.write_text("writing hang\n")
        with node.client() as store:
            fill(store, NAMESPACE, keys(8), MIB)
        yield node
        faults.unlink()
        node.check()


# Who may not, and what is not taken.


def test_only_another_daemon_of_the_same_user_gets_anything(node: Node) -> None:
    with RawConnection(node.socket) as raw:
        answer = raw.ask(protocol.HandOver(FORMAT + 1))
        assert isinstance(answer, protocol.Failure)
        assert f"format {FORMAT + 1}" in answer.text
    if os.geteuid() != 0:
        pytest.skip("becoming another user is not permitted")
    node.folder.chmod(0o755)
    node.socket.chmod(0o666)

    def ask() -> None:
        os.setuid(65534)
        with RawConnection(node.socket) as stranger:
            answer = stranger.ask(protocol.HandOver(FORMAT))
            assert isinstance(answer, protocol.Failure)
            assert answer.code == "unauthorized"

    with child(ask) as pid:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    node.check()


def test_one_whose_settings_are_wrong_ends_no_other(node: Node, tmp_path: Path) -> None:
    path = tmp_path / "node.toml"
    path.write_text(f'tls_certificate = "{tmp_path}/none"\ntls_key = "{tmp_path}/none"\n')
    words = ["kvstore", "serve", "--take-over", "--dram", "16MiB", "--socket", str(node.socket)]
    other = Forked([*words, "--config", str(path)], tmp_path / "log", dict(os.environ))
    assert other.wait(20) == 1
    other.stdout.close()
    assert f"tls_certificate {tmp_path}/none" in (tmp_path / "log").read_text()
    assert node.process.poll() is None


def test_nothing_is_handed_over_over_tcp() -> None:
    with Node("16MiB", "--data", "127.0.0.1:0", environ={"KVSTORE_TOKEN": ""}) as node:
        host, port = node.endpoint("data").split(":")
        with RawConnection((host, int(port))) as raw:
            answer = raw.ask(protocol.HandOver(FORMAT))
            assert isinstance(answer, protocol.Failure)
            assert answer.code == "unauthorized"
        node.check()


def test_where_nobody_listens_there_is_nothing_to_take(tmp_path: Path) -> None:
    assert take_over(tmp_path / "node.sock") is None
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "stale.sock"))
    assert take_over(tmp_path / "stale.sock") is None


def kept(number: int, **changes: object) -> Kept:
    """A block of three pages in the slot of that number."""
    block = Kept(0, b"k%d" % number, 9000, (number * 12288, 12288), None, None, False, False)
    return msgspec.structs.replace(block, **changes)


def said(**changes: object) -> Estate:
    """What a daemon might say of an arena of 2 MiB."""
    ward = Ward(b"session", "a client", False, {7: [0, 1]}, {8: [(5 * 12288, 12288)]})
    whole = Estate(2 * MIB, 2 * MIB, [NAMESPACE], [kept(0), kept(1, parent=0)], [1, 0], [ward])
    return msgspec.structs.replace(whole, **changes)


@contextmanager
def handing_over(path: Path, act: Callable[[Heir, int], None]) -> Iterator[int]:
    """A process that listens like a daemon, and does so with an arena when it is asked for one; its pid."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(path))

    def daemon() -> None:
        listening.listen()
        sock, _ = listening.accept()
        sock.recv(65536)
        limits = (b"session", [2 * MIB], 1, 1)
        welcome = protocol.Welcome(protocol.MAJOR, protocol.MINOR, "node", 1, *limits)
        sock.sendall(protocol.frame(1, welcome))
        sock.recv(65536)
        arena_fd = os.memfd_create("arena")
        os.ftruncate(arena_fd, 2 * MIB)
        act(Heir(sock, 2), arena_fd)

    with listening, child(daemon) as pid:
        wait_for(lambda: _listens(path))
        listening.close()
        yield pid


def _listens(path: Path) -> bool:
    return any(line.endswith(str(path)) and " 00010000 " in line for line in _unix_sockets())


def _unix_sockets() -> list[str]:
    return Path("/proc/net/unix").read_text().splitlines()


READER = Ward(b"session", "a client", False, {7: [0]}, {})
ESTATES = {
    "slots overlap": said(blocks=[kept(0), kept(1, slot=(8192, 12288))]),
    "a slot ends at": said(blocks=[kept(0), kept(1, slot=(2 * MIB - 8192, 12288))]),
    "does not begin on a page": said(blocks=[kept(0), kept(1, slot=(13000, 12288))]),
    "a slot is not whole pages": said(blocks=[kept(0), kept(1, slot=(12288, 10000))]),
    "a block is longer than its slot": said(blocks=[kept(0), kept(1, length=12289)]),
    "of an unknown namespace": said(blocks=[kept(0), kept(1, namespace=1)]),
    "before the one it continues": said(blocks=[kept(0, parent=1), kept(1)]),
    "2 blocks have 1 names": said(blocks=[kept(0), kept(1, key=b"k0")]),
    "removed blocks are not the first": said(blocks=[kept(0), kept(1, doomed=True)], order=[0]),
    "the order is not that of the blocks": said(order=[0]),
    "order is not that of": said(order=[0, 0]),
    "a lease reads a block that is not there": said(blocks=[kept(0)], order=[0]),
    "is said to have 4194304": said(capacity_bytes=4 * MIB),
    "are said to be populated": said(ready_bytes=4 * MIB),
    "0 pidfds came for 1 processes": said(wards=[msgspec.structs.replace(READER, watched=True)]),
    "2 lost connections have 1 names": said(wards=[READER, READER]),
}


@pytest.mark.parametrize("fault", ESTATES)
def test_a_state_that_cannot_be_is_not_taken(
    fault: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = memory_files()
    with handing_over(tmp_path / "node.sock", lambda heir, fd: send(heir, fd, ESTATES[fault], [])):
        assert take_over(tmp_path / "node.sock") is None
    assert fault in caplog.text
    assert memory_files() == files


def _raw(*descriptors: str, packed: bytes = b"") -> Callable[[Heir, int], None]:
    def act(heir: Heir, arena_fd: int) -> None:
        state_fd = os.memfd_create("state")
        os.write(state_fd, packed)
        fds = [{"arena": arena_fd, "state": state_fd}[name] for name in descriptors]
        socket.send_fds(heir.sock, [protocol.frame(2, protocol.Done())], fds)

    return act


PACKED = msgspec.msgpack.encode(said())
DEEDS: dict[str, Callable[[Heir, int], None]] = {
    "1 descriptors came": _raw("arena"),
    "the state is damaged": _raw("arena", "state", packed=digest(PACKED) + PACKED[:-1]),
    "or of another format": _raw("arena", "state"),
    "the state is none of format 1": _raw("arena", "state", packed=digest(b"{}") + b"{}"),
    "1 pidfds came for 0": _raw("arena", "state", "arena", packed=digest(PACKED) + PACKED),
    "nothing was handed over": lambda heir, _: heir.sock.close(),
}


@pytest.mark.parametrize("fault", DEEDS)
def test_what_is_no_hand_over_is_not_taken(
    fault: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = memory_files()
    with handing_over(tmp_path / "node.sock", DEEDS[fault]):
        assert take_over(tmp_path / "node.sock") is None
    assert fault in caplog.text
    assert memory_files() == files


def test_an_arena_is_not_used_before_its_daemon_is_gone(tmp_path: Path) -> None:
    def act(heir: Heir, arena_fd: int) -> None:
        send(heir, arena_fd, said(), [])
        heir.sock.close()
        signal.pause()

    files = memory_files()
    taken: list[Inheritance | None] = []
    with handing_over(tmp_path / "node.sock", act) as pid:
        taking = threading.Thread(target=lambda: taken.append(take_over(tmp_path / "node.sock")))
        taking.start()
        taking.join(0.2)
        assert taking.is_alive()
        os.kill(pid, signal.SIGKILL)
        taking.join()
    assert taken[0] is not None
    assert taken[0].spans() == [(0, 12288), (12288, 12288), (5 * 12288, 12288)]
    assert taken[0].lease_ids == [7, 8]
    assert memory_files() == files + 1
    taken[0].close()
    assert memory_files() == files


def test_one_that_refuses_goes_on(tmp_path: Path) -> None:
    def act(heir: Heir, _: int) -> None:
        heir.sock.sendall(protocol.frame(2, protocol.Failure("unauthorized", "not to you")))
        signal.pause()

    with (
        handing_over(tmp_path / "node.sock", act) as pid,
        pytest.raises(ConfigError, match="hands nothing over: not to you"),
    ):
        take_over(tmp_path / "node.sock")
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


# Memory and time.


def test_an_inherited_arena_keeps_its_bytes_and_is_populated_to_its_end() -> None:
    old = DramTier(16 * MIB)
    old.grow(8 * MIB)
    slot = old.take(5000, "block")
    assert slot is not None
    old.view(slot)[:] = pattern(b"key", slot.length)
    new = DramTier(16 * MIB, inherited=old.open(writable=True))
    old.close()
    (same,) = new.claim([(slot.offset, slot.length)], 8 * MIB)
    told: list[int] = []
    new.populate(told.append)
    assert told == [12 * MIB, 16 * MIB]
    new.grow(12 * MIB)
    new.grow(16 * MIB)
    assert bytes(new.view(same)) == pattern(b"key", slot.length)
    assert new.free_bytes == 16 * MIB - slot.length
    assert new.check() == []
    new.close()


def test_many_hand_overs_leave_nothing_behind_and_take_no_time() -> None:
    """Descriptors and memory are level, and with 10,000 blocks somebody listens again within a second."""
    names = [b"%d" % number for number in range(10_000)]
    with Node("64MiB") as node, node.client() as store, node.client() as reader:
        for start in range(0, len(names), 2500):
            fill(store, NAMESPACE, names[start : start + 2500], 100)
        held = [reader.acquire(NAMESPACE, names[:100]) for _ in range(3)]
        sizes, gaps = [], []
        for _ in range(10):
            with longest_silence(node) as gap:
                hand_over(node)
            gaps += gap
            wait_for(lambda: back(store) and back(reader))
            sizes.append((open_files(node.pid), private_bytes(node.pid)))
        assert store.hit_length(NAMESPACE, names[:4096]).dram == 4096
        assert store.statistics().quarantined_leases == 3
        assert len({files for files, _ in sizes[2:]}) == 1
        assert sizes[-1][1] - sizes[2][1] < 4 * MIB
        assert min(gaps) < 1  # others may keep this machine busy
        assert "have not ended" not in node.log, "a client that came late"
        for read in held:
            read.release()
        wait_for(lambda: idle(store))
        node.check()


@contextmanager
def longest_silence(node: Node) -> Iterator[list[float]]:
    """For how long nobody could connect; who does stays, and says nothing."""
    longest: list[float] = []
    stop = threading.Event()

    def knock() -> None:
        last, silence_s = time.monotonic(), 0.0
        with ExitStack() as stack:
            while not stop.wait(0.002):
                sock = stack.enter_context(socket.socket(socket.AF_UNIX))
                if sock.connect_ex(str(node.socket)) == 0:
                    silence_s, last = max(silence_s, time.monotonic() - last), time.monotonic()
        longest.append(silence_s)

    knocking = threading.Thread(target=knock)
    knocking.start()
    try:
        yield longest
    finally:
        stop.set()
        knocking.join()


# Any state at all.


class Side:
    """A store over an arena of 4 MiB, as one of the two daemons has it."""

    def __init__(self, tier: DramTier, first_lease: int) -> None:
        self.arena = Arena(tier, TierDirectory("dram", Medium.DRAM, LRU()), [], debug=False)
        self.store = Store(self.arena, [], first_lease=first_lease)
        self.quarantine = Quarantine(self.store)

    def everything(self) -> Estate:
        return estate(self.arena, self.quarantine.wards(), set())


@pytest.mark.parametrize("seed", range(20))
@in_virtual_time
async def test_whatever_there_is_goes_over_whole(seed: int) -> None:
    chance = random.Random(seed)
    tier = DramTier(4 * MIB)
    tier.grow(4 * MIB)
    old = Side(tier, 1)
    shelves = [old.store.directory.shelves(namespace) for namespace in (NAMESPACE, TENANT)]
    holders = [Holder(str(number), 2 * MIB, 2 * MIB, maps=True) for number in range(4)]
    for _ in range(400):
        holder, shelf = chance.choice(holders), chance.choice(shelves)
        first = chance.randrange(40)
        names = keys(50)[first : first + chance.randint(1, 6)]
        deed = chance.choice(["reserve", "commit", "acquire", "acquire", "remove", "end"])
        if deed == "reserve":
            lengths = [9000 * (name[2] % 7 + 1) for name in names]
            old.store.writers.reserve(holder, shelf, names, lengths, parent=keys(50)[first - 1])
        elif deed == "commit" and holder.writes:
            old.store.writers.commit(holder, chance.choice(list(holder.writes)))
        elif deed == "acquire":
            old.store.readers.acquire(holder, shelf[0], names)
        elif deed == "remove":
            old.store.remove(shelf, names)
        elif deed == "end" and holder.lease_ids():
            old.store.end_lease(holder, chance.choice(holder.lease_ids()))
    for number, holder in enumerate(holders):
        old.quarantine.admit(b"%d" % number, holder, None)
    said_of_old = old.everything()
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(said_of_old), type=Estate)
    taken = Inheritance(again, tier.open(writable=True))
    new_tier = DramTier(4 * MIB, inherited=taken.arena_fd)
    slots = new_tier.claim(taken.spans(), again.ready_bytes)
    new = Side(new_tier, max(taken.lease_ids, default=0) + 1)
    assert taken.enter(new.store, new.quarantine, slots) == []
    assert new.store.check(new.quarantine.holders()) == []
    assert new.everything() == said_of_old
    assert new.arena.room.used_bytes == old.arena.room.used_bytes
    new.quarantine.close()
    assert new.store.check() == []
    assert not new.arena.directory.statistics().pinned_blocks
    tier.close()
    new_tier.close()
