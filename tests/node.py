"""A real daemon in a process of its own, and a raw connection to it, for tests."""

import contextlib
import os
import re
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from kvstore import protocol
from kvstore.block import Namespace
from kvstore.client import StoreClient
from tests.forked import Forked

# What a busy machine may add to a deadline.
SLACK_S: Final = 1.0


class Node:
    """`kvstore serve` with a socket in a folder of its own. Stops, or is killed, with the test."""

    def __init__(
        self,
        dram: str = "64MiB",
        *flags: str,
        environ: dict[str, str] | None = None,
        module: str = "kvstore",
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="kvstore-test-")
        self.folder = Path(self._folder.name)
        self.socket = self.folder / "node.sock"
        self.address = f"unix:{self.socket}"
        self._words = [module, "serve", "--dram", dram, "--socket", str(self.socket)]
        self._words += ["--http", "127.0.0.1:0", *flags]
        self._environ = {**os.environ, **(environ or {})}
        self.start()

    def start(self, *flags: str) -> None:
        """Start it, or start it again after `kill`; returns once it is ready and its arena populated.

        `flags` are for this time alone.
        """
        self.process = Forked([*self._words, *flags], self.folder / "log", self._environ)
        try:
            self.ready_line = self.process.stdout.readline()
            assert "kvstore ready" in self.ready_line, self.log
            with self.client() as store:
                wait_for(lambda: (tier := store.statistics().tiers[0]).ready_bytes == tier.capacity_bytes)
        except BaseException:
            self.kill()
            raise

    @property
    def pid(self) -> int:
        """Of the daemon."""
        return self.process.pid

    @property
    def log(self) -> str:
        """What it has logged so far."""
        return (self.folder / "log").read_text()

    def endpoint(self, name: str) -> str:
        """The host and port that it said it listens on, for `http` or `data`."""
        found = re.search(rf"{name}=(\S+)", self.ready_line)
        assert found, self.ready_line
        return found[1]

    def client(self, **options: Any) -> StoreClient:
        """A new client over the unix socket."""
        return StoreClient.connect(self.address, **options)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.process.kill()
        self._reap()

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self._reap()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """SIGSTOP: it does and answers nothing meanwhile."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def check(self) -> None:
        """Let it recount all it has: nothing may be wrong."""
        with self.client() as store:
            assert store.check() == []

    def _reap(self) -> int:
        try:
            return self.process.wait(20)
        finally:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.process.stdout.closed:
            self.stop()
        self._folder.cleanup()


class RawConnection:
    """The protocol by hand: for saying what no client would."""

    def __init__(self, address: Path | tuple[str, int], *, greet: bool = True) -> None:
        if isinstance(address, tuple):
            self.sock = socket.create_connection(address, timeout=20)
        else:
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(20)
            self.sock.connect(str(address))
        self.request_id = 0
        if greet:
            hello = protocol.Hello(protocol.MAJOR, protocol.MINOR, os.urandom(32))
            assert isinstance(self.ask(hello), protocol.Welcome)

    def ask(self, request: protocol.Request, payload: bytes = b"") -> protocol.Answer:
        """Send a request and return its answer."""
        self.request_id += 1
        self.send(protocol.frame(self.request_id, request, len(payload)) + payload)
        return self.answer()

    def send(self, data: bytes) -> None:
        """Send bytes as they are, or as many as the daemon takes before it refuses."""
        with contextlib.suppress(BrokenPipeError):
            self.sock.sendall(data)

    def answer(self) -> protocol.Answer:
        """The next answer; ConnectionResetError when there is none."""
        body_bytes, _, payload_bytes = protocol.HEADER.unpack(self._exactly(protocol.HEADER.size))
        answer = protocol.decode_answer(self._exactly(body_bytes))
        self.payload = self._exactly(payload_bytes)
        return answer

    def failure(self) -> protocol.Failure:
        """The next answer, which must be a failure."""
        answer = self.answer()
        assert isinstance(answer, protocol.Failure), answer
        return answer

    def closed(self) -> bool:
        """Whether the daemon ends the connection."""
        try:
            while self.sock.recv(65536):
                pass
        except ConnectionResetError:
            pass
        return True

    def open(self, namespace: Namespace) -> int:
        """A handle of the namespace."""
        answer = self.ask(protocol.OpenNamespaces([namespace.id], [namespace]))
        assert isinstance(answer, protocol.Opened), answer
        return answer.handles[0]

    def close(self) -> None:
        """Without a word."""
        self.sock.close()

    def _exactly(self, nbytes: int) -> bytes:
        data = b""
        while len(data) < nbytes:
            piece = self.sock.recv(nbytes - len(data))
            if not piece:
                raise ConnectionResetError("the daemon closed the connection")
            data += piece
        return data

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def wait_for(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    """Until the condition holds; fails when it does not within the time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.005)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@contextmanager
def node_with_disk(dram: str = "64MiB", capacity: str = "512MiB", *flags: str) -> Iterator[Node]:
    """A daemon with an NVMe tier in a directory that goes with it; at the end nothing may be wrong in it."""
    with (
        tempfile.TemporaryDirectory(prefix="kvstore-disk-") as folder,
        Node(dram, "--nvme", f"{folder}/nvme:{capacity}", *flags) as node,
    ):
        yield node
        node.check()


@contextmanager
def node_with_bad_disk(dram: str = "16MiB", capacity: str = "64MiB") -> Iterator[tuple[Node, Path]]:
    """The same with a disk that does as a file says, and that file: see `tests.faulty_daemon`."""
    with tempfile.TemporaryDirectory(prefix="kvstore-disk-") as folder:
        faults = Path(folder) / "faults"
        flags = (dram, "--nvme", f"{folder}/nvme:{capacity}")
        environ = {"KVSTORE_FAULTS": str(faults)}
        with Node(*flags, environ=environ, module="tests.faulty_daemon") as node:
            try:
                yield node, faults
                node.check()
            finally:
                faults.unlink(missing_ok=True)


def pinned(store: StoreClient) -> int:
    """Blocks of the arena that somebody has pinned."""
    return store.statistics().tiers[0].pinned_blocks


def idle(store: StoreClient) -> bool:
    """Whether nobody has anything of the arena pinned, reserved, or removed and still in use."""
    tier = store.statistics().tiers[0]
    return tier.pinned_blocks == tier.pending_blocks == tier.doomed_blocks == 0


def written(store: StoreClient) -> bool:
    """Whether everything is on disk."""
    return all(tier.backlog_blocks + tier.pending_blocks == 0 for tier in store.statistics().tiers[1:])


def empty(store: StoreClient) -> None:
    """Remove everything."""
    for use in store.namespaces():
        cursor: int | None = 0
        while cursor is not None:
            page = store.list(use.namespace, cursor)
            if page.keys:
                store.remove(use.namespace, page.keys)
            cursor = page.cursor


def own_threads() -> set[threading.Thread]:
    """The threads of clients and connectors in this process."""
    return {each for each in threading.enumerate() if each.name.startswith("kvstore-")}


def open_files(pid: int) -> int:
    """Descriptors of a process."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def threads(pid: int) -> int:
    """Threads of a process."""
    return len(os.listdir(f"/proc/{pid}/task"))


def private_bytes(pid: int) -> int:
    """Memory of a process that is not shared."""
    status = Path(f"/proc/{pid}/status").read_text()
    return sum(int(value) for value in re.findall(r"Rss(?:Anon|File):\s+(\d+) kB", status)) * 1024


@contextmanager
def child(body: Callable[[], None]) -> Iterator[int]:
    """Run `body` in a forked process; its pid. Killed at the end if it still runs."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            body()
            status = 0
        finally:
            os._exit(status)
    try:
        yield pid
    finally:
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
