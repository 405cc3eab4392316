"""What no store can pass: copying in memory, and a round trip over a unix socket.

As a program (`python -m benchmarks.limits FD`) it is the other end of that round trip.
"""

import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Final

import numpy as np

from benchmarks.peers.base import KEY_BYTES, Bytes, WorkingSet, touched_buffer

MEMCPY: Final = "memcpy"
ROUND_TRIP: Final = "unix-socket round trip"
# What an answer needs for one block: where it is.
PLACE_BYTES: Final = 16
_REQUEST_BYTES_MAX: Final = 1 << 20
# What a request says first: its length without this, and the length of the answer it wants.
_LENGTHS: Final = struct.Struct("<II")
_ROOT: Final = Path(__file__).parent.parent


class Memcpy:
    """numpy's copy, block by block, from the caller's buffer to another one and back."""

    def __init__(self, buffer_bytes: int) -> None:
        self._store = touched_buffer(buffer_bytes)
        self._sources: list[Bytes] = []
        self._stored: list[Bytes] = []
        self._destinations: list[Bytes] = []

    def prepare(self, work: WorkingSet) -> None:
        self._sources = work.slices(work.source)
        self._stored = work.slices(self._store)
        self._destinations = work.slices(work.destination)

    def put_batch(self, batch: range) -> None:
        for number in batch:
            np.copyto(self._stored[number], self._sources[number])

    def get_batch(self, batch: range) -> None:
        for number in batch:
            np.copyto(self._destinations[number], self._stored[number])

    def put_single(self, number: int) -> None:
        np.copyto(self._stored[number], self._sources[number])

    def get_single(self, number: int) -> None:
        np.copyto(self._destinations[number], self._stored[number])

    def look_up(self, batch: range) -> None:
        """Nothing to ask."""

    def holds(self, number: int) -> bool:
        return bool(np.array_equal(self._stored[number], self._sources[number]))

    def remove_all(self) -> None:
        """Nothing to remove."""

    def close(self) -> None:
        """Nothing to give back."""


class Echo:
    """A process that answers messages as long as a store's, and does nothing else."""

    def __init__(self) -> None:
        self._socket, other = socket.socketpair()
        with other:
            command = [sys.executable, "-m", "benchmarks.limits", str(other.fileno())]
            self._process = subprocess.Popen(command, pass_fds=[other.fileno()], cwd=_ROOT)
        self.pids = [self._process.pid]
        self.round_trip(1, 1)

    def round_trip(self, request_bytes: int, answer_bytes: int) -> None:
        """Send a request of one length, receive an answer of another."""
        self._socket.sendall(_LENGTHS.pack(request_bytes, answer_bytes) + bytes(request_bytes))
        left = answer_bytes
        while left:
            left -= len(self._socket.recv(left))

    def look_up(self, batch: range) -> None:
        """The keys go, one number comes."""
        self.round_trip(KEY_BYTES * len(batch), PLACE_BYTES)

    def pin_and_unpin(self, batch: range) -> None:
        """The keys go, a place for each comes; unpinning needs no answer."""
        self.round_trip(KEY_BYTES * len(batch), PLACE_BYTES * len(batch))

    def close(self) -> None:
        self._socket.close()
        self._process.wait()


def serve(connection: socket.socket) -> None:
    """Answer until the other end closes."""
    request, answer = memoryview(bytearray(_REQUEST_BYTES_MAX)), memoryview(bytes(_REQUEST_BYTES_MAX))
    filled = 0
    while count := connection.recv_into(request[filled:]):
        filled += count
        if filled >= _LENGTHS.size:
            request_bytes, answer_bytes = _LENGTHS.unpack_from(request)
            if filled == _LENGTHS.size + request_bytes:
                connection.sendall(answer[:answer_bytes])
                filled = 0


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as inherited:
        serve(inherited)
