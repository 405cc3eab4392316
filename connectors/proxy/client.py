"""The client's side of one request: its body, what it is told, and whether it is still there."""

import asyncio
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

import msgspec
from starlette.types import Receive, Scope, Send

from connectors.proxy.events import event_of

# What is between two neighbours alone, or is made anew for the next.
_NOT_PASSED_ON: Final = {
    "accept-encoding",
    "authorization",
    "connection",
    "content-length",
    "content-type",
    "expect",
    "host",
    "keep-alive",
    "proxy-authorization",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "x-data-parallel-rank",
}

_NONE: Final[Mapping[str, str]] = MappingProxyType({})


class ClientGone(Exception):
    """Nobody waits for the answer."""


class Problem(Exception):
    """A request that is not passed on: an HTTP status and one sentence."""

    def __init__(self, status: int, sentence: str, headers: Mapping[str, str] = _NONE) -> None:
        super().__init__(sentence)
        self.status = status
        self.headers = headers


class Client:
    """Who waits for one answer. A piece that it does not take in time ends its connection."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, timeout_s: float) -> None:
        self.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        self.status: int | None = None
        self.body_bytes = 0  # that have come
        self._receive = receive
        self._send = send
        self._timeout_s = timeout_s

    def passed_on(self) -> dict[str, str]:
        """The headers that go to an engine, but for what says who the client is."""
        return {name: value for name, value in self.headers.items() if name not in _NOT_PASSED_ON}

    async def body(self, limit_bytes: int, timeout_s: float, came: Callable[[int], None]) -> bytes:
        """All of it, while `came` is told of each piece's length and may raise Problem.

        Of one that is too long as much again is read, so that who sends it has the answer.

        Raises:
            Problem: it is too long, or late.
            ClientGone: it does not come.
        """
        body = bytearray()
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    piece = message.get("body", b"")
                    body += piece
                    self.body_bytes += len(piece)
                    came(len(piece))
                    is_last = not message.get("more_body", False)
                    if len(body) > (limit_bytes if is_last else 2 * limit_bytes):
                        raise Problem(413, f"the body is longer than {limit_bytes} bytes; send less")
                    if is_last:
                        return bytes(body)
        except TimeoutError:
            raise Problem(
                408, f"the body has not come within {timeout_s:g} s, {len(body)} bytes have; send it faster"
            ) from None

    async def gone(self) -> None:
        """Wait until the client has left; the body must have been read."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def answer(
        self, status: int, content_type: str, body: bytes, headers: Mapping[str, str] = _NONE
    ) -> None:
        """The whole answer."""
        length = {"content-length": str(len(body)), **headers}
        await self._start(status, content_type, length)
        await self._give({"type": "http.response.body", "body": body})

    async def refuse(self, status: int, sentence: str, headers: Mapping[str, str] = _NONE) -> None:
        """An error as the API has them; in an answer that has begun, as its last event."""
        error = _error(status, sentence)
        if self.status is None:
            await self.answer(status, "application/json", msgspec.json.encode(error), headers)
        else:
            await self.write(event_of(error))
            await self.end()

    async def begin(self, content_type: str) -> None:
        """An answer comes in pieces."""
        await self._start(200, content_type, {"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def write(self, piece: bytes) -> None:
        """The next piece; returns once the connection has taken it."""
        await self._give({"type": "http.response.body", "body": piece, "more_body": True})

    async def end(self) -> None:
        """That was the last piece."""
        await self._give({"type": "http.response.body", "body": b""})

    async def _start(self, status: int, content_type: str, headers: Mapping[str, str]) -> None:
        named = {"content-type": content_type, **headers}
        pairs = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in named.items()]
        self.status = status
        await self._give({"type": "http.response.start", "status": status, "headers": pairs})

    async def _give(self, message: dict[str, Any]) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._send(message)
        except TimeoutError:
            raise ClientGone from None


def _error(status: int, sentence: str) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": sentence, "type": kind, "param": None, "code": status}}
