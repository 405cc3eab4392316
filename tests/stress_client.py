"""One process of the stress test: some clients on random operations, each checking every byte it sees.

It runs until it is told to stop, or killed. Silence means that all was well: whatever is wrong goes to its
standard error, which is a file. A block's length and bytes follow from its namespace and key alone, so that
every reader can tell right from wrong without asking anyone.
"""

import contextlib
import gc
import hashlib
import os
import random
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Final

import numpy as np

from kvstore.block import Namespace
from kvstore.client import StoreClient
from kvstore.errors import DeadlineExceeded, LeaseError, Unavailable
from kvstore.leases import EachLease, ReadLease

NAMESPACES: Final = [
    Namespace(model="stress", salt=salt, shard=shard) for salt in ("", "tenant") for shard in ("0/2", "1/2")
]
CHAINS: Final = 24
CHAIN_BLOCKS: Final = 16
# Whole pages and not, from one byte to two thousand times the least slot.
LENGTHS: Final = [
    *(1, 64, 4096, 5000, 8192, 12_288, 40_000, 65_536, 65_537, 100_000, 131_072, 262_144, 300_001, 1 << 19),
    *(1 << 20, 2_000_000),
]
TIMEOUT_S: Final = 60.0
_HELD_MAX: Final = 3

_Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]


def chain(number: int) -> list[bytes]:
    """The keys of one prefix."""
    return [f"chain{number}-{index}".encode() for index in range(CHAIN_BLOCKS)]


def length_of(namespace: Namespace, key: bytes) -> int:
    """How long this block always is."""
    return LENGTHS[_digest(namespace, key)[0] % len(LENGTHS)]


def content(namespace: Namespace, key: bytes) -> _Bytes:
    """What this block always holds."""
    digest = np.frombuffer(_digest(namespace, key), np.uint8)
    return np.resize(digest, length_of(namespace, key))


def _digest(namespace: Namespace, key: bytes) -> bytes:
    return hashlib.blake2b(namespace.id + key).digest()


class Held:
    """A lease that is kept for a while, and what its arrays must show until it ends."""

    def __init__(
        self,
        lease: ReadLease | EachLease,
        items: Sequence[tuple[Namespace, bytes]],
        views: Sequence[memoryview],
    ) -> None:
        self.lease = lease
        self.items = items
        self.arrays: list[_Bytes] = [np.frombuffer(view, np.uint8) for view in views]

    def check(self, when: str) -> None:
        """All bytes are as they should be."""
        for (namespace, key), array in zip(self.items, self.arrays, strict=True):
            wanted = content(namespace, key)
            if not np.array_equal(array, wanted):
                wrong = int(np.argmax(array != wanted)) if len(array) == len(wanted) else -1
                raise AssertionError(
                    f"{namespace} {key!r} {when}: {len(array)} bytes, {len(wanted)} wanted, "
                    f"the first wrong one at {wrong}: {bytes(array[max(wrong, 0) :][:16]).hex()}"
                )

    def end(self) -> None:
        """Check once more, and release."""
        self.check("at its release")
        self.arrays = []
        self.lease.release()


class Subject:
    """One client and its random life."""

    def __init__(self, address: str, seed: str, siblings: list["Subject"]) -> None:
        self._address = address
        self._random = random.Random(seed)
        self._siblings = siblings
        self._held: list[Held] = []
        self._store = StoreClient.connect(address, timeout_s=TIMEOUT_S)
        self._cuts = 0
        self._cuts_seen = 0
        self._verbs: list[tuple[int, Callable[[], None]]] = [
            (24, self._publish),
            (8, self._put),
            (12, self._get),
            (24, self._acquire),
            (10, self._acquire_each),
            (4, self._remove),
            (4, self._ask),
            (2, self._list),
            (10, self._release),
            (2, self._cut),
            (1, self._forget),
            (1, self._fork),
            (1, self._begin_anew),
        ]

    def run(self, stop: threading.Event) -> None:
        """Do something random again and again."""
        weights, verbs = zip(*self._verbs, strict=True)
        while not stop.wait(self._random.random() * 0.02):
            verb = self._random.choices(verbs, weights)[0]
            try:
                verb()
            except (Unavailable, LeaseError) as error:
                self._recover(error)
        while self._held:
            self._held.pop().end()
        self._store.close()

    # What it does.

    def _publish(self) -> None:
        namespace, keys = self._prefix()
        start = self._random.randrange(len(keys))
        parent, keys = (keys[start - 1] if start else None), keys[start:]
        lengths = [length_of(namespace, key) for key in keys]
        wait_s = self._random.choice([0.0, 0.0, 0.05])
        end = self._random.choice(["commit", "commit", "commit", "parts", "parts", "abort", "leave", "drop"])
        write = self._store.reserve(namespace, keys, lengths, parent=parent, wait_s=wait_s)
        states = [*write.granted, *write.present, *write.busy, *write.refused]
        assert sorted(states) == sorted(keys), f"{states} are not {keys}"
        if end == "drop":
            return
        with write:
            for key, view in zip(write.granted, write.views, strict=True):
                # In two halves, so that a torn write has something to show.
                array, wanted = np.frombuffer(view, np.uint8), content(namespace, key)
                half = len(wanted) // 2
                np.copyto(array[:half], wanted[:half])
                self._pause(0.1)
                if end != "abort":
                    np.copyto(array[half:], wanted[half:])
                if end == "parts" and self._random.random() < 0.5:
                    del array
                    write.commit([key])
            if end == "commit":
                write.commit()
            elif end == "abort" and write.granted:
                write.abort()

    def _put(self) -> None:
        namespace, key = self._item()
        with contextlib.suppress(DeadlineExceeded):
            self._store.put(namespace, key, content(namespace, key), timeout_s=0.2)

    def _get(self) -> None:
        namespace, key = self._item()
        data = self._store.get(namespace, key, timeout_s=self._random.choice([0.0, 0.02, 0.5]))
        if data is not None and data != content(namespace, key).tobytes():
            raise AssertionError(
                f"get of {namespace} {key!r} gave {len(data)} wrong bytes: {data[:16].hex()}"
            )

    def _acquire(self) -> None:
        namespace, keys = self._prefix()
        read = self._store.acquire(namespace, keys, wait_s=self._random.choice([0.0, 0.02, 0.3]))
        self._hold(read, [(namespace, key) for key in keys[: read.hit_length]], read.views)

    def _acquire_each(self) -> None:
        items = [self._item() for _ in range(self._random.randint(1, 12))]
        read = self._store.acquire_each(items, wait_s=self._random.choice([0.0, 0.0, 0.2]))
        found = [(item, view) for item, view in zip(items, read.views, strict=True) if view is not None]
        self._hold(read, [item for item, _ in found], [view for _, view in found])

    def _remove(self) -> None:
        namespace, keys = self._prefix()
        chosen = self._random.sample(keys, self._random.randint(1, 3))
        assert 0 <= self._store.remove(namespace, chosen) <= len(chosen)

    def _ask(self) -> None:
        namespace, keys = self._prefix()
        hits = self._store.hit_length(namespace, keys)
        assert 0 <= hits.gpu <= hits.dram <= hits.nvme <= hits.remote <= len(keys), hits
        assert len(self._store.hit_each([(namespace, key) for key in keys])) == len(keys)

    def _list(self) -> None:
        namespace = self._random.choice(NAMESPACES)
        page = self._store.list(namespace)
        for key, length in zip(page.keys, page.lengths, strict=True):
            assert length == length_of(namespace, key), f"{key!r} is listed with {length} bytes"
        assert self._store.statistics().connections > 0

    def _release(self) -> None:
        if self._held:
            self._held.pop(self._random.randrange(len(self._held))).end()

    def _forget(self) -> None:
        if self._held:
            self._held.pop().check("before it is forgotten")
        gc.collect()

    def _cut(self) -> None:
        """Cut a connection from outside it: its own, or one that another thread is in the midst of using."""
        self._random.choice(self._siblings)._be_cut()

    def _fork(self) -> None:
        """A child inherits no lease and no connection, and can have its own."""
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                signal.alarm(60)
                self._in_child()
                status = 0
            except BaseException:  # noqa: BLE001 - whatever it is, it is a finding
                os.write(2, traceback.format_exc().encode())
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status == 0, f"a forked child ended with {status}"

    def _begin_anew(self) -> None:
        """Close with leases in hand, and connect again."""
        for held in self._held:
            held.check("before the client closes")
            held.arrays = []
        self._held.clear()
        self._store.close()
        self._store = StoreClient.connect(self._address, timeout_s=TIMEOUT_S)
        self._cuts_seen = self._cuts

    # Helpers.

    def _item(self) -> tuple[Namespace, bytes]:
        namespace, keys = self._prefix()
        return namespace, self._random.choice(keys)

    def _prefix(self) -> tuple[Namespace, list[bytes]]:
        # Some prefixes are far more popular than others.
        number = min(int(self._random.expovariate(0.15)), CHAINS - 1)
        return self._random.choice(NAMESPACES), chain(number)

    def _hold(
        self,
        lease: ReadLease | EachLease,
        items: Sequence[tuple[Namespace, bytes]],
        views: Sequence[memoryview],
    ) -> None:
        held = Held(lease, items, views)
        held.check("when it was acquired")
        if lease.id and len(self._held) < _HELD_MAX and self._random.random() < 0.6:
            self._held.append(held)
        elif lease.id:
            self._pause(0.5)
            held.end()

    def _pause(self, probability: float) -> None:
        if self._random.random() < probability:
            time.sleep(self._random.random() * 0.05)

    def _be_cut(self) -> None:
        link = self._store._keeper._link
        if link is not None:
            self._cuts += 1
            with contextlib.suppress(OSError):
                link.channel._sock.shutdown(socket.SHUT_RDWR)

    def _recover(self, error: Exception) -> None:
        """An error is right if the connection was cut; then it must be back soon."""
        cuts = self._cuts
        if cuts == self._cuts_seen:
            raise AssertionError("an error without a cut connection") from error
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            try:
                self._store.statistics()
                break
            except Unavailable as away:
                if time.monotonic() > deadline:
                    raise AssertionError(f"not connected again after {TIMEOUT_S} s") from away
                time.sleep(0.005)
        self._cuts_seen = cuts

    def _in_child(self) -> None:
        for held in self._held:
            assert not held.lease.valid
            try:
                _ = held.lease.views
            except LeaseError:
                continue
            raise AssertionError("a forked child could use its parent's lease")
        try:
            self._store.statistics()
        except Unavailable:
            pass
        else:
            raise AssertionError("a forked child could use its parent's connection")
        self._held = []
        with StoreClient.connect(self._address, timeout_s=TIMEOUT_S) as self._store:
            self._get()


def live(address: str, seed: str, clients: int, log: str, pipe: Connection) -> None:
    """Be one process: say when all clients are connected, run until the other end of `pipe` is closed."""
    warnings.simplefilter("error")
    # From 3.12 on Python warns of forks beside threads, which is what is tested here.
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), 2)
    stop = threading.Event()
    subjects: list[Subject] = []
    subjects.extend(Subject(address, f"{seed}-{number}", subjects) for number in range(clients))
    failed: list[Subject] = []

    def run(subject: Subject) -> None:
        try:
            subject.run(stop)
        except BaseException:  # noqa: BLE001 - whatever it is, it is a finding
            failed.append(subject)
            os.write(2, traceback.format_exc().encode())

    threads = [threading.Thread(target=run, args=(subject,)) for subject in subjects]
    for thread in threads:
        thread.start()
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # told to stop already
        pipe.send("ready")
        pipe.recv()
    stop.set()
    for thread in threads:
        thread.join()
    sys.exit(1 if failed else 0)
