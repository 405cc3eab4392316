"""Our index as a process, and publishers of this process that feed it or another. It measures nothing.

The publishers are what engines have: a ZeroMQ socket each, on loopback. Nothing that they send is lost: what
an indexer has not taken yet waits here.
"""

import http.client
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec
import zmq

from benchmarks.batches import BLOCK_TOKENS, MODEL, Prompt
from benchmarks.harness import BenchmarkError
from benchmarks.processes import start_process, stop_process, wait_for
from kvstore.engine_keys import vllm_scheme

HASH: Final = "sha256"
_READY: Final = "kvstore index ready: http=127.0.0.1:"
_SUBSCRIBED_S_MAX: Final = 30.0
_ANSWER_S_MAX: Final = 30.0


class Publishers:
    """Engines by number, each with an endpoint and with batches numbered from 0."""

    def __init__(self, count: int) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._sockets = [self._context.socket(zmq.XPUB) for _ in range(count)]
        self._seqs = [0] * count
        for socket in self._sockets:
            socket.setsockopt(zmq.SNDHWM, 0)
            socket.setsockopt(zmq.RCVTIMEO, int(_SUBSCRIBED_S_MAX * 1000))
            socket.bind("tcp://127.0.0.1:*")
        self.endpoints = [socket.getsockopt_string(zmq.LAST_ENDPOINT) for socket in self._sockets]

    def wait_for_subscriber(self) -> None:
        """Return once somebody listens to each.

        Raises:
            BenchmarkError: nobody does.
        """
        try:
            for socket in self._sockets:
                socket.recv()
        except zmq.Again as exc:
            raise BenchmarkError(f"nobody has subscribed within {_SUBSCRIBED_S_MAX:.0f} s") from exc

    def publish(self, number: int, payload: bytes) -> None:
        """The engine of this number sends a batch."""
        seq = self._seqs[number]
        self._sockets[number].send_multipart([b"", seq.to_bytes(8, "big"), payload])
        self._seqs[number] = seq + 1

    def close(self) -> None:
        """Leave, with what nobody has taken."""
        self._context.destroy(linger=0)


class Indexer(Protocol):
    """A process that follows engines."""

    pid: int

    def knows(self, number: int, prompt: Prompt) -> bool:
        """Whether it answers that the engine of this number has the whole prompt."""
        ...

    def close(self) -> None:
        """Stop it."""
        ...


class Http:
    """A connection to a process of this machine that is asked in JSON."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_ANSWER_S_MAX)

    def post(self, path: str, question: Any) -> Any:
        """Its answer.

        Raises:
            BenchmarkError: it has none.
        """
        body = msgspec.json.encode(question)
        return msgspec.json.decode(self._ask("POST", path, body))

    def text(self, path: str) -> str:
        """What is there.

        Raises:
            BenchmarkError: nothing is.
        """
        return self._ask("GET", path, None).decode()

    def close(self) -> None:
        """Hang up."""
        self._connection.close()

    def _ask(self, method: str, path: str, body: bytes | None) -> bytes:
        self._connection.request(method, path, body, {"Content-Type": "application/json"})
        answer = self._connection.getresponse()
        text = answer.read()
        if answer.status >= 300:
            raise BenchmarkError(f"{path}: {answer.status} {text[:200]!r}")
        return text


class OurIndex:
    """`kvstore index`, of the engines at some endpoints and the daemons whose feeds are at some addresses."""

    def __init__(
        self,
        directory: Path,
        endpoints: Sequence[str] = (),
        nodes: Sequence[str] = (),
        *,
        algorithm: str = HASH,
    ) -> None:
        """Engines hash by the algorithm, or as nobody knows where it is empty."""
        config, log = directory / "index.toml", directory / "index.log"
        config.write_text("\n".join(_config(endpoints, nodes, algorithm)))
        command = [sys.executable, "-m", "kvstore", "index", "--http", "127.0.0.1:0", "--data", "127.0.0.1:0"]
        command += ["--config", str(config)]
        self._process = start_process(command, log)
        try:
            wait_for(lambda: "\n" in log.read_text().partition(_READY)[2], self._process, log)
        except BaseException:
            stop_process(self._process)
            raise
        self.pid = self._process.pid
        port, data = log.read_text().partition(_READY)[2].split()[:2]
        self.port, self.data_port = int(port), int(data.rpartition(":")[2])
        self.http = Http(self.port)

    def knows(self, number: int, prompt: Prompt) -> bool:
        namespace = {"block_tokens": BLOCK_TOKENS, "scheme": vllm_scheme(HASH)}
        question = {
            "model": MODEL,
            "keys": prompt.hashes,
            "namespace": namespace,
            "engines": [f"engine{number}"],
        }
        answers = self.http.post("/v1/lookup", question)["placements"]
        return [answer["gpu"] for answer in answers] == [len(prompt.tokens)]

    def close(self) -> None:
        self.http.close()
        stop_process(self._process)


def _config(endpoints: Sequence[str], nodes: Sequence[str], algorithm: str) -> list[str]:
    lines = ["[index]", f"nodes = {msgspec.json.encode(list(nodes)).decode()}"]
    for number, endpoint in enumerate(endpoints):
        lines += ["[[index.engines]]", f'name = "engine{number}"', f'events = "{endpoint}"']
        lines += [f'model = "{MODEL}"', f"block_tokens = {BLOCK_TOKENS}", f'hash = "{algorithm}"']
    return lines
