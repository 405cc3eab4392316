"""An engine's event publisher as a process: vLLM's sockets and numbers, with the events that a test wants.

    python -m tests.event_publisher PORT REPLAY_PORT TOPIC DROPPED

Ports may be 0; the first line of stdout names them. Each line of stdin is a JSON list of batches, each of
them a list of events, [hash, parent] or [-hash] of blocks stored and removed; the answer is the number of the
last batch. null instead waits for one more subscriber. DROPPED is the share of batches that are kept for a
replay and not sent. As in vLLM one thread answers replays between batches.
"""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Final, Self

import zmq

from kvstore.index.events import BlockRemoved, BlockStored, encode_batch, pack_tokens

_TOKENS: Final = pack_tokens([1])
_KEPT: Final = 10_000


def main(port: str, replay_port: str, topic: str, dropped: str) -> None:
    """Publish until stdin ends."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    publish, replay = context.socket(zmq.XPUB), context.socket(zmq.ROUTER)
    publish.set_hwm(100_000)
    publish.setsockopt(zmq.XPUB_VERBOSE, 1)  # each subscriber is told of, though another has come before
    ports = [_bind(publish, port), _bind(replay, replay_port)]
    print(*ports, flush=True)
    poller = zmq.Poller()
    poller.register(sys.stdin, zmq.POLLIN)
    poller.register(replay, zmq.POLLIN)
    payloads: list[bytes] = []
    chance = random.Random(port)
    while True:
        ready = dict(poller.poll())
        if replay in ready:
            _answer(replay, topic.encode(), payloads)
        if sys.stdin.fileno() in ready:
            line = sys.stdin.readline()
            if not line:
                os._exit(0)
            batches = json.loads(line)
            while batches is None and not publish.recv().startswith(b"\x01"):
                pass
            for events in batches or ():
                payload = encode_batch(
                    [_event(*event) for event in events], time.time(), arrays=False, rank=0
                )
                if chance.random() >= float(dropped):
                    publish.send_multipart((topic.encode(), len(payloads).to_bytes(8, "big"), payload))
                payloads.append(payload)
            print(len(payloads) - 1, flush=True)


def _bind(socket: "zmq.Socket[bytes]", port: str) -> str:
    socket.bind(f"tcp://127.0.0.1:{port if port != '0' else '*'}")
    return socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2]


def _event(block_hash: int, parent: int | None = None) -> BlockStored | BlockRemoved:
    if block_hash < 0:
        return BlockRemoved([-block_hash], "GPU")
    return BlockStored([block_hash], parent, _TOKENS, 16, None, "GPU")


def _answer(replay: "zmq.Socket[bytes]", topic: bytes, payloads: Sequence[bytes]) -> None:
    identity, _, start = replay.recv_multipart()
    first = max(int.from_bytes(start, "big"), len(payloads) - _KEPT)
    for seq in range(first, len(payloads)):
        replay.send_multipart((identity, b"", topic, seq.to_bytes(8, "big"), payloads[seq]))
    replay.send_multipart((identity, b"", b"", (-1).to_bytes(8, "big", signed=True), b""))


class EventPublisher:
    """Such a process. Killed with the test, or before, to be started again at the same ports."""

    def __init__(self, topic: str = "", dropped: float = 0.0) -> None:
        self._words = (topic, str(dropped))
        self._ports = ["0", "0"]
        self.start()

    def start(self) -> None:
        """Start it, or start it again."""
        command = [sys.executable, "-m", "tests.event_publisher", *self._ports, *self._words]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self._ports = self.process.stdout.readline().split()
        self.endpoint, self.replay = (f"tcp://127.0.0.1:{port}" for port in self._ports)

    def publish(self, *batches: Sequence[Sequence[int | None]]) -> int:
        """Publish these batches; the number of the last one."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(batches) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait_for_subscriber(self) -> None:
        """Return once one more is there: what is published from now on, it gets."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("null\n")
        self.process.stdin.flush()
        self.process.stdout.readline()

    def kill(self) -> None:
        """End it with SIGKILL."""
        self.process.kill()
        self.process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


if __name__ == "__main__":
    main(*sys.argv[1:])
