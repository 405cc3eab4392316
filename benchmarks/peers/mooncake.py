"""Mooncake Store's shared-memory client: a "dummy" client beside a "real" one on the same node.

The real client holds the segment and does the copies, between its segment and buffers that the dummy
registered with it; every verb crosses to the real client and from there to the master. The segment is
mapped afresh and must be warmed before anything is timed.
"""

import ctypes
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Final

# Before the library is loaded, or it tells of every buffer.
os.environ.setdefault("MC_LOG_LEVEL", "ERROR")

import numpy as np
from mooncake.store import MooncakeDistributedStore

from benchmarks.peers.base import Bytes, WorkingSet
from benchmarks.processes import free_ports, listens, private_bytes, start_process, stop_process, wait_for

LOCAL_BUFFER_BYTES: Final = 256 << 20
NO_AVAILABLE_HANDLE: Final = -200
SPACE_S_MAX: Final = 30.0
# Mooncake evicts in the background above 90%; what a benchmark puts must fit beneath that.
SEGMENT_PART_USED: Final = 0.85


class MooncakeServer:
    """A master, which holds the metadata, and a real client, which holds the segment."""

    def __init__(self, directory: Path, capacity_bytes: int) -> None:
        master_port, metrics_port, metadata_port, client_port = free_ports(4)
        self._segment_bytes = int(capacity_bytes / SEGMENT_PART_USED) >> 24 << 24
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            self._start(
                directory / "mooncake_master.log",
                "mooncake_master",
                master_port,
                f"--rpc_port={master_port}",
                f"--metrics_port={metrics_port}",
                "--enable_http_metadata_server=true",
                f"--http_metadata_server_port={metadata_port}",
                "--http_metadata_server_host=127.0.0.1",
                "--default_kv_lease_ttl=5000",
            )
            self._start(
                directory / "mooncake_client.log",
                "mooncake_client",
                client_port,
                "--host=127.0.0.1",
                f"--global_segment_size={self._segment_bytes}",
                f"--master_server_address=127.0.0.1:{master_port}",
                f"--metadata_server=http://127.0.0.1:{metadata_port}/metadata",
                "--protocol=tcp",
                f"--port={client_port}",
            )
        except BaseException:
            self.close()
            raise
        self.address = f"127.0.0.1:{client_port}"
        self.version = version("mooncake-transfer-engine-non-cuda")
        self.pids = [process.pid for process in self._processes]

    def _start(self, log: Path, program: str, port: int, *options: str) -> None:
        process = start_process([str(_program(program)), *options], log)
        self._processes.append(process)
        wait_for(lambda: listens(port), process, log)

    def settle(self) -> None:
        """Nothing goes on."""

    def overhead_bytes(self, payload_bytes: int) -> int:
        """All private memory less the touched part of the segment, which is private here."""
        return sum(private_bytes(pid) - _resident_bytes(pid, self._segment_bytes) for pid in self.pids)

    def close(self) -> None:
        for process in reversed(self._processes):
            stop_process(process)


class MooncakeClient:
    """A dummy client with both of the caller's buffers in memory that it shares with the real client."""

    def __init__(self, address: str, buffer_bytes: int) -> None:
        self._store = MooncakeDistributedStore()
        with _silence():
            _check(self._store.setup_dummy(LOCAL_BUFFER_BYTES, LOCAL_BUFFER_BYTES, address))
        self._source = _shared_buffer(self._store, buffer_bytes)
        self._destination = _shared_buffer(self._store, buffer_bytes)
        self._keys: list[str] = []
        self._sources: list[int] = []
        self._destinations: list[int] = []
        self._block_bytes = 0

    def prepare(self, work: WorkingSet) -> None:
        np.copyto(self._source[: work.source.size], work.source)
        self._keys = [key.hex() for key in work.keys]
        offsets = list(map(work.offset, range(len(work.keys))))
        self._sources = [self._source.ctypes.data + offset for offset in offsets]
        self._destinations = [self._destination.ctypes.data + offset for offset in offsets]
        self._block_bytes = work.block_bytes

    def put_batch(self, batch: range) -> None:
        """Waits for space where there is none, as our reserve does."""
        deadline = time.monotonic() + SPACE_S_MAX
        left = slice(batch.start, batch.stop)
        keys, pointers = self._keys[left], self._sources[left]
        while keys:
            results = self._store.batch_put_from(keys, pointers, [self._block_bytes] * len(keys))
            again = [number for number, result in enumerate(results) if result == NO_AVAILABLE_HANDLE]
            _check(min((result for result in results if result != NO_AVAILABLE_HANDLE), default=0))
            if again and time.monotonic() > deadline:
                raise RuntimeError(f"mooncake: no space for {len(again)} blocks in {SPACE_S_MAX} s")
            keys, pointers = [keys[number] for number in again], [pointers[number] for number in again]

    def get_batch(self, batch: range) -> None:
        chosen = slice(batch.start, batch.stop)
        sizes = [self._block_bytes] * len(batch)
        results = self._store.batch_get_into(self._keys[chosen], self._destinations[chosen], sizes)
        _check(min(results))

    def put_single(self, number: int) -> None:
        _check(self._store.put_from(self._keys[number], self._sources[number], self._block_bytes))

    def get_single(self, number: int) -> None:
        _check(self._store.get_into(self._keys[number], self._destinations[number], self._block_bytes))

    def look_up(self, batch: range) -> None:
        self._store.batch_is_exist(self._keys[batch.start : batch.stop])

    def pin_and_unpin(self, batch: range) -> None:
        """What comes closest: asking whether a block is there leases it for a time, but tells no place."""
        self._store.batch_is_exist(self._keys[batch.start : batch.stop])

    def holds(self, number: int) -> bool:
        start = self._destinations[number] - self._destination.ctypes.data
        place = slice(start, start + self._block_bytes)
        self._destination[place] = 0
        self.get_single(number)
        return bool(np.array_equal(self._destination[place], self._source[place]))

    def remove_all(self) -> None:
        self._store.batch_remove(self._keys, True)

    def close(self) -> None:
        with _silence():
            self._store.close()


def start(directory: Path, capacity_bytes: int) -> MooncakeServer:
    """See StoreModule."""
    return MooncakeServer(directory, capacity_bytes)


def connect(address: str, buffer_bytes: int) -> MooncakeClient:
    """See StoreModule."""
    return MooncakeClient(address, buffer_bytes)


def _program(name: str) -> Path:
    spec = find_spec("mooncake")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / name


def _resident_bytes(pid: int, size_min: int) -> int:
    """What is in memory of mappings at least as large as the segment."""
    resident, counted = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "Size":
            counted = int(value.split()[0]) << 10 >= size_min
        elif name == "Rss" and counted:
            resident += int(value.split()[0]) << 10
    return resident


def _shared_buffer(store: MooncakeDistributedStore, size: int) -> Bytes:
    address = store.alloc_from_mem_pool(size)
    if not address:
        raise MemoryError(f"mooncake: no shared buffer of {size} bytes")
    _check(store.register_buffer(address, size))
    buffer = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
    buffer.fill(0)
    return buffer


@contextmanager
def _silence() -> Iterator[None]:
    """Drop what the library writes to standard error: it calls errors what is none (no hot cache)."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _check(result: int) -> None:
    """Mooncake answers with 0 or a number of bytes, or with a negative code."""
    if result < 0:
        raise RuntimeError(f"mooncake answered {result}; see mooncake_client.log")
