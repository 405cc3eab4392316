"""Dynamo's own indexer as a process, and engines' publishers that it and our index can follow."""

import contextlib
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import zmq

from kvstore.index.events import Event, encode_batch
from tests.node import free_ports, wait_for


class DynamoIndexer:
    """`python -m dynamo.indexer` with these flags, until it is stopped."""

    def __init__(self, log: Path, *flags: str) -> None:
        self.url = f"http://127.0.0.1:{free_ports(1)[0]}"
        port = self.url.rpartition(":")[2]
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "dynamo.indexer", "--port", port, "--threads", "1", *flags],
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        wait_for(self._is_up)

    def ask(self, path: str, body: Any = None) -> tuple[int, str]:
        """Status and text of the answer; without a body it is a GET."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def _is_up(self) -> bool:
        with contextlib.suppress(OSError):
            return self.ask("/health")[0] == 200
        return False

    def stop(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(20)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class Publisher:
    """One rank's publisher, in vLLM's format. It knows who has subscribed."""

    def __init__(self, rank: int = 0) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.XPUB)
        self._socket.setsockopt(zmq.XPUB_VERBOSE, 1)
        self._socket.set_hwm(100_000)
        port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        self.endpoint = f"tcp://127.0.0.1:{port}"
        self._rank = rank
        self._seq = 0

    def await_subscribers(self, count: int) -> None:
        """Until so many more have come."""
        for _ in range(count):
            assert self._socket.poll(20_000), "nobody subscribes"
            assert self._socket.recv() == b"\x01"

    def publish(self, *batches: Sequence[Event]) -> None:
        """These batches, to all who have subscribed."""
        for events in batches:
            payload = encode_batch(events, time.time(), arrays=False, rank=self._rank)
            self._socket.send_multipart((b"", self._seq.to_bytes(8, "big"), payload))
            self._seq += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._context.destroy(linger=0)
