"""What no lookup is faster than here: the index's two ports without an index behind them, as a process.

    python -m benchmarks.echo '{"": LENGTH, PATH: LENGTH, ...}'

Its first line names the ports of HTTP and of frames. Answers have bodies of so many bytes: "" is for frames.
"""

import asyncio
import gc
import json
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import uvloop

from kvstore.http_server import HttpServer
from kvstore.index.lookup_connection import LookupConnection
from kvstore.lookup_messages import BODY_BYTES_MAX
from kvstore.protocol import HEADER


class _Echo:
    """Answers every frame with as many bytes."""

    body_bytes_max = payload_bytes_max = BODY_BYTES_MAX

    def __init__(self, body: bytes) -> None:
        self._body = body

    def answer(self, request_id: int, body: memoryview, payload: bytes) -> bytes:
        return HEADER.pack(len(self._body), request_id, 0) + self._body

    def lost(self) -> None:
        """Nothing is kept."""


class _Empty:
    """An application that reads a body and answers with as many bytes as its path says."""

    def __init__(self, path_to_length: Mapping[str, int]) -> None:
        self._path_to_answer = {path: _answer(bytes(length)) for path, length in path_to_length.items()}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        for message in self._path_to_answer[scope["path"]]:
            await send(message)


def _answer(body: bytes) -> Sequence[Mapping[str, Any]]:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    start = {"type": "http.response.start", "status": 200, "headers": headers}
    return start, {"type": "http.response.body", "body": body}


async def main(path_to_length: Mapping[str, int]) -> None:
    """Answer until the process is told to stop."""
    http, frames = (socket.create_server(("127.0.0.1", 0)) for _ in range(2))
    echo = _Echo(bytes(path_to_length[""]))
    await asyncio.get_running_loop().create_server(lambda: LookupConnection(echo), sock=frames)
    gc.freeze()
    print(f"echo ready: {http.getsockname()[1]} {frames.getsockname()[1]}", flush=True)
    await HttpServer(_Empty(path_to_length)).serve(sockets=[http])


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(json.loads(sys.argv[1])))
