"""Redis through redis-py (with hiredis where installed) over a unix socket. It never persists.

redis-py is given its best case: values are `bytes` made beforehand (it copies any other buffer once
more), and what it fetches stays the `bytes` that it makes, where others copy into the caller's buffer.
"""

from pathlib import Path
from typing import Final

import redis

from benchmarks.peers.base import WorkingSet
from benchmarks.processes import private_bytes, start_process, stop_process, wait_for
from benchmarks.redis_server import server_binary

# Replies wait in the server's output buffers: of 1, 4 and 16 in flight 4 was the fastest for most sizes.
PIPELINE_BLOCKS: Final = 4
# Found on import: without a server this peer is not installed.
SERVER_BINARY: Final = server_binary()


class RedisServer:
    """A redis-server on a unix socket that drops the least recently used values when full."""

    def __init__(self, directory: Path, capacity_bytes: int) -> None:
        socket = directory / "redis.sock"
        log = directory / "redis.log"
        options = {
            "--port": "0",
            "--unixsocket": str(socket),
            "--save": "",
            "--appendonly": "no",
            "--maxmemory": str(capacity_bytes),
            "--maxmemory-policy": "allkeys-lru",
            "--proto-max-bulk-len": "512mb",
            "--io-threads": "1",
            "--dir": str(directory),
        }
        words = [word for option in options.items() for word in option]
        self._process = start_process([SERVER_BINARY, *words], log)
        wait_for(socket.exists, self._process, log)
        self.address = str(socket)
        self.pids = [self._process.pid]
        with redis.Redis(unix_socket_path=self.address) as client:
            self.version = f"{redis.__version__}, redis-server {client.info()['redis_version']}"

    def settle(self) -> None:
        """Nothing goes on."""

    def overhead_bytes(self, payload_bytes: int) -> int:
        """All private memory less the values' bytes, which Redis keeps among its own."""
        return private_bytes(self._process.pid) - payload_bytes

    def close(self) -> None:
        stop_process(self._process)


class RedisClient:
    """One redis-py client."""

    def __init__(self, address: str) -> None:
        self._client = redis.Redis(unix_socket_path=address)
        self._keys: list[bytes] = []
        self._values: list[bytes] = []

    def prepare(self, work: WorkingSet) -> None:
        self._values = []  # the old values go before the new ones come
        by_offset: dict[int, bytes] = {}
        for number in range(len(work.keys)):
            start = work.offset(number)
            if start not in by_offset:
                by_offset[start] = work.source[start : start + work.block_bytes].tobytes()
            self._values.append(by_offset[start])
        self._keys = work.keys

    def put_batch(self, batch: range) -> None:
        for start in range(batch.start, batch.stop, PIPELINE_BLOCKS):
            with self._client.pipeline(transaction=False) as pipeline:
                for number in range(start, min(start + PIPELINE_BLOCKS, batch.stop)):
                    pipeline.set(self._keys[number], self._values[number])
                pipeline.execute()

    def get_batch(self, batch: range) -> None:
        for start in range(batch.start, batch.stop, PIPELINE_BLOCKS):
            self._client.mget(self._keys[start : min(start + PIPELINE_BLOCKS, batch.stop)])

    def put_single(self, number: int) -> None:
        self._client.set(self._keys[number], self._values[number])

    def get_single(self, number: int) -> None:
        self._client.get(self._keys[number])

    def look_up(self, batch: range) -> None:
        with self._client.pipeline(transaction=False) as pipeline:
            for number in batch:
                pipeline.exists(self._keys[number])
            pipeline.execute()

    def holds(self, number: int) -> bool:
        return bool(self._client.get(self._keys[number]) == self._values[number])

    def remove_all(self) -> None:
        self._client.flushall()

    def close(self) -> None:
        self._client.close()


def start(directory: Path, capacity_bytes: int) -> RedisServer:
    """See StoreModule. A quarter more than the room for blocks: what Redis itself needs counts too."""
    return RedisServer(directory, capacity_bytes + capacity_bytes // 4)


def connect(address: str, buffer_bytes: int) -> RedisClient:
    """See StoreModule."""
    return RedisClient(address)
