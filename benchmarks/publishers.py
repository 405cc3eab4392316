"""Clients in processes of their own that store blocks at the same time. They measure only themselves."""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.connection import Connection

from benchmarks.limits import MEMCPY, Memcpy
from benchmarks.peers.base import Contestant, WorkingSet, as_module, filled_buffer, warm


@dataclass(frozen=True, slots=True)
class Connect:
    """Become a client of the store in `module` at `address`, and touch all of its memory once."""

    name: str
    module: str
    address: str
    capacity_bytes: int


@dataclass(frozen=True, slots=True)
class Publish:
    """Store `blocks` new blocks, whose keys are made from `label`, in the store called `name`."""

    name: str
    label: str
    blocks: int
    block_bytes: int


class Publishers:
    """A fixed number of publishing processes, each with a buffer of its own to publish from."""

    def __init__(self, count: int, buffer_bytes: int) -> None:
        context = get_context("spawn")
        self._connections: list[Connection] = []
        self._processes = []
        for number in range(count):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, number, buffer_bytes), daemon=True)
            process.start()
            theirs.close()
            self._connections.append(mine)
            self._processes.append(process)

    def connect(self, command: Connect) -> None:
        """Connect one after the other, so that each has the store to itself while it warms it."""
        for connection in self._connections:
            connection.send(command)
            connection.recv()

    def begin(self, command: Publish) -> None:
        """Let all begin together, once all are prepared."""
        for connection in self._connections:
            connection.send(command)
        for connection in self._connections:
            connection.recv()
        for connection in self._connections:
            connection.send(None)

    def running(self) -> bool:
        """Whether one of them has not finished."""
        return not all(connection.poll() for connection in self._connections)

    def finish(self) -> float:
        """Wait for all; the seconds from the first one's begin to the last one's end."""
        spans: Sequence[tuple[float, float]] = [connection.recv() for connection in self._connections]
        return max(end for _, end in spans) - min(begin for begin, _ in spans)

    def close(self) -> None:
        """End all of them and wait for it."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join()


def _serve(connection: Connection, number: int, buffer_bytes: int) -> None:
    source = filled_buffer(buffer_bytes)
    contestants: dict[str, Contestant] = {MEMCPY: Memcpy(buffer_bytes)}
    with suppress(EOFError):  # the other end closes when it has seen enough
        while True:
            command = connection.recv()
            if isinstance(command, Connect):
                client = as_module(import_module(command.module)).connect(command.address, buffer_bytes)
                warm(client, command.capacity_bytes, source)
                contestants[command.name] = client
                connection.send(None)
            else:
                label = f"{command.label} {number}"
                work = WorkingSet.of(label, command.blocks, command.block_bytes, source, source[:0])
                connection.send(_publish(contestants[command.name], work, connection))
    for contestant in contestants.values():
        contestant.close()


def _publish(contestant: Contestant, work: WorkingSet, connection: Connection) -> tuple[float, float]:
    """When it began and ended, on the clock that all processes share."""
    contestant.prepare(work)
    connection.send(None)
    connection.recv()
    begin = time.monotonic()
    for batch in work.batches():
        contestant.put_batch(batch)
    return begin, time.monotonic()
