"""Our own store, measured through the public client, with the daemon as a child process."""

import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Final

import numpy as np

from benchmarks.harness import BenchmarkError
from benchmarks.peers.base import Bytes, WorkingSet
from benchmarks.processes import private_bytes, start_process, stop_process, wait_for
from kvstore.block import Namespace
from kvstore.client import StoreClient
from kvstore.statistics import NodeStatistics

NAMESPACE: Final = Namespace(model="bench")
# Long enough that a stall shows as a figure and not as a refusal.
WAIT_S: Final = 5.0
_POLL_S: Final = 0.01


class OurServer:
    """A daemon with one DRAM tier."""

    def __init__(self, directory: Path, capacity_bytes: int) -> None:
        socket = directory / "node.sock"
        log = directory / "node.log"
        command = [sys.executable, "-m", "kvstore", "serve", "--dram", f"{capacity_bytes >> 20}MiB"]
        command += ["--socket", str(socket), "--http", "127.0.0.1:0"]
        self._process = start_process(command, log)
        wait_for(socket.exists, self._process, log)
        self.address = f"unix:{socket}"
        self.version = version("kvstore-service")
        self.pids = [self._process.pid]

    def overhead_bytes(self, payload_bytes: int) -> int:
        """All private memory: the arena is shared memory."""
        return private_bytes(self._process.pid)

    def statistics(self) -> NodeStatistics:
        """What the daemon says of itself."""
        with StoreClient.connect(self.address) as client:
            return client.statistics()

    def settle(self) -> None:
        """All of the arena has memory behind it, which it gets after the daemon is ready."""
        with StoreClient.connect(self.address) as client:
            while any(tier.ready_bytes < tier.capacity_bytes for tier in client.statistics().tiers):
                time.sleep(_POLL_S)

    def close(self) -> None:
        stop_process(self._process)


class OurClient:
    """One client: writers and readers map the arena, and copy with numpy, which releases the GIL."""

    def __init__(self, address: str) -> None:
        self._client = StoreClient.connect(address, timeout_s=30.0)
        self._work: WorkingSet | None = None
        self._keys: list[bytes] = []
        self._sources: list[Bytes] = []
        self._destinations: list[Bytes] = []
        self._block_bytes = 0

    def prepare(self, work: WorkingSet) -> None:
        self._keys = work.keys
        self._block_bytes = work.block_bytes
        self._sources = work.slices(work.source)
        self._destinations = work.slices(work.destination)

    def put_batch(self, batch: range) -> None:
        """Waits for room where there is none, which is what a publisher does that may wait."""
        chosen = slice(batch.start, batch.stop)
        with self._client.reserve(NAMESPACE, self._keys[chosen], self._block_bytes, wait_s=WAIT_S) as write:
            if len(write.granted) != len(batch):
                raise BenchmarkError(f"{len(write.granted)} of {len(batch)} blocks granted: {write.refused=}")
            for view, source in zip(write.views, self._sources[chosen], strict=True):
                np.copyto(np.frombuffer(view, np.uint8), source)
            write.commit()

    def get_batch(self, batch: range) -> None:
        chosen = slice(batch.start, batch.stop)
        with self._client.acquire(NAMESPACE, self._keys[chosen]) as read:
            self._check_hit(read.hit_length, len(batch))
            for view, destination in zip(read.views, self._destinations[chosen], strict=True):
                np.copyto(destination, np.frombuffer(view, np.uint8))

    def put_single(self, number: int) -> None:
        self.put_batch(range(number, number + 1))

    def get_single(self, number: int) -> None:
        self.get_batch(range(number, number + 1))

    def look_up(self, batch: range) -> None:
        self._client.hit_length(NAMESPACE, self._keys[batch.start : batch.stop])

    def pin_and_unpin(self, batch: range) -> None:
        with self._client.acquire(NAMESPACE, self._keys[batch.start : batch.stop]) as read:
            self._check_hit(len(read.views), len(batch))

    def holds(self, number: int) -> bool:
        self._destinations[number][:] = 0
        self.get_single(number)
        return bool(np.array_equal(self._destinations[number], self._sources[number]))

    def remove_all(self) -> None:
        for start in range(0, len(self._keys), 4096):
            self._client.remove(NAMESPACE, self._keys[start : start + 4096])

    def close(self) -> None:
        self._client.close()

    @staticmethod
    def _check_hit(hit_length: int, wanted: int) -> None:
        if hit_length != wanted:
            raise BenchmarkError(f"{hit_length} of {wanted} blocks found")


def start(directory: Path, capacity_bytes: int) -> OurServer:
    """See StoreModule."""
    return OurServer(directory, capacity_bytes)


def connect(address: str, buffer_bytes: int) -> OurClient:
    """See StoreModule."""
    return OurClient(address)
