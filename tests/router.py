"""The router before engines as a process, and what clients make of its streams."""

import http.client
import json
import os
import signal
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.forked import Forked
from tests.node import wait_for


class Router:
    """`python -m connectors.proxy` with these settings, as they stand in its file."""

    def __init__(
        self,
        engines: Sequence[str],
        *,
        environ: Mapping[str, str] | None = None,
        **said: Any,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="kvstore-proxy-")
        folder = self.folder = Path(self._folder.name)
        named = {"engines": [f"http://{engine}" for engine in engines], "listen": "127.0.0.1:0", **said}
        lines = [f"{name} = {json.dumps(value)}\n" for name, value in named.items()]
        (folder / "proxy.toml").write_text("".join(lines))
        words = ["connectors.proxy", "--config", str(folder / "proxy.toml")]
        self.process = Forked(words, folder / "log", {**os.environ, **(environ or {})})
        line = self.process.stdout.readline()
        assert line.startswith("kvstore proxy ready: http="), (folder / "log").read_text()
        host, _, port = line.strip().partition("=")[2].rpartition(":")
        self.address = (host, int(port))
        wait_for(lambda: all(map(self.is_up, engines)))

    @property
    def log(self) -> str:
        """What it has logged so far."""
        return (self.folder / "log").read_text()

    @contextmanager
    def asked(
        self, body: Any, path: str = "", headers: Mapping[str, str] | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        """The answer to a request, whose body is bytes as they are or becomes JSON."""
        if isinstance(body, dict):
            path = path or ("/v1/chat/completions" if "messages" in body else "/v1/completions")
            body = json.dumps(body).encode()
        connection = http.client.HTTPConnection(*self.address, timeout=20)
        try:
            connection.request("POST" if body is not None else "GET", path, body, dict(headers or {}))
            with connection.getresponse() as response:
                yield response
        finally:
            connection.close()

    def ask(self, body: Any, path: str = "", headers: Mapping[str, str] | None = None) -> tuple[int, bytes]:
        """Status and body of the answer."""
        with self.asked(body, path, headers) as response:
            return response.status, response.read()

    def stream(self, body: dict[str, Any]) -> bytes:
        """All events of an answer."""
        with self.asked({**body, "stream": True}) as response:
            assert response.status == 200, response.read()
            assert response.getheader("content-type", "").startswith("text/event-stream")
            return response.read()

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the samples that have these labels."""
        lines = self.ask(None, "/metrics")[1].decode().splitlines()
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        samples = [
            line for line in lines if line.partition("{")[0].partition(" ")[0] == f"kvstore_proxy_{name}"
        ]
        return sum(
            float(line.rpartition(" ")[2]) for line in samples if all(label in line for label in wanted)
        )

    def is_up(self, engine: str) -> bool:
        """Whether the router thinks that the engine at HOST:PORT is there."""
        return self.metric("up", engine=engine) == 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            assert self.process.wait(20) == 0
        finally:
            self.process.kill()
            self.process.stdout.close()
            self._folder.cleanup()


class Said:
    """What a client makes of a stream's events."""

    def __init__(self, events: bytes) -> None:
        self.pieces = [
            json.loads(line[6:]) for line in events.decode().split("\n\n") if line.startswith("data: {")
        ]
        self.is_whole = events.endswith(b"data: [DONE]\n\n")
        self.ids = {(piece.get("id"), piece.get("created")) for piece in self.pieces if "choices" in piece}
        self.text = ""
        self.arguments = ""
        self.calls: list[tuple[str, str]] = []
        self.roles: list[str] = []
        self.reasons: list[str] = []
        for piece in self.pieces:
            for choice in piece.get("choices", ()):
                delta = choice.get("delta", {})
                self.text += choice.get("text", "") or delta.get("content", "")
                self.roles += [delta["role"]] if "role" in delta else []
                self.reasons += [choice["finish_reason"]] if choice.get("finish_reason") else []
                for call in delta.get("tool_calls", ()):
                    self.arguments += call["function"]["arguments"]
                    if "id" in call:
                        self.calls.append((call["id"], call["function"]["name"]))

    @property
    def content(self) -> tuple[str, str, list[str], list[str], list[str]]:
        """What must be the same in any two answers to one request."""
        return self.text, self.arguments, [name for _, name in self.calls], self.roles, self.reasons
