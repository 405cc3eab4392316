"""What every request for a value goes through: its token, its rate, its body, its errors, its document.

A gate stands before the application and answers the paths that it was given; the rest goes on. Handlers get a
decoded value and return one; they never see HTTP. It stands before the framework's routes since those cost
more than a lookup does: 115 us of the process's time against 48 us for a body of 8 kB.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import Any, Final, Protocol, TypeVar
from urllib.parse import parse_qsl

import msgspec
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from kvstore.callers import Caller
from kvstore.decoding import NotJson, RequestDecoder
from kvstore.errors import InvalidRequest, KVStoreError
from kvstore.http_server import foreign
from kvstore.openapi import Operation, document_of
from kvstore.rate import Rate
from kvstore.request_body import BODY_S, RequestBody, TooLong, TooSlow

logger = logging.getLogger(__name__)

# A million tokens, or 65,536 keys of 64 bytes in hex, and some.
BODY_BYTES_MAX: Final = 16 << 20
_TEXT: Final = b"text/plain; charset=utf-8"
_JSON: Final = b"application/json"
_encoder: Final = msgspec.json.Encoder()

Q = TypeVar("Q")
A = TypeVar("A")


class Problem(KVStoreError):
    """An answer that is none: its status, and a sentence for people."""

    def __init__(self, status: int, sentence: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(sentence)
        self.status = status
        self.headers = headers or {}


class Tokens(Protocol):
    """Who knows who asks."""

    def of(self, header: bytes) -> Caller | None:
        """Whose authorization it is; None is nobody that is known."""


@dataclass(frozen=True, slots=True)
class GateStatistics:
    """Requests since start: by path and status, and by who asked and status."""

    requests: Counter[tuple[str, int]]
    callers: Counter[tuple[str, int]]


@dataclass(frozen=True, slots=True)
class _Door:
    """One method of one path; `handle` takes the body of a POST, the query string of a GET."""

    operation: Operation
    handle: Callable[[bytes], Awaitable[bytes | AsyncIterator[bytes]]]


@dataclass(slots=True)
class _Visit:
    """One request as far as it has come."""

    headers: dict[bytes, bytes]
    body: RequestBody
    query: bytes = b""
    caller: str = "unknown"


@dataclass(slots=True)
class _Reply:
    status: int
    body: bytes | AsyncIterator[bytes]
    media_type: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


class Gate:
    """An ASGI application: its own paths, and `app` for all others.

    Raises (in handlers): `InvalidRequest` is answered with 422, `Problem` with its status, anything else with
    500 and a line in the log.
    """

    def __init__(
        self, app: FastAPI, *, tokens: Tokens, rate: Rate, body_bytes_max: int = BODY_BYTES_MAX
    ) -> None:
        self._app = app
        self._body_bytes_max = body_bytes_max
        self._tokens = tokens
        self._rate = rate
        self._paths: dict[str, dict[str, _Door]] = {}
        self._requests: Counter[tuple[str, int]] = Counter()
        self._callers: Counter[tuple[str, int]] = Counter()
        self.get("/openapi.json", dict[str, Any], self._document, summary="This document")

    def post(
        self,
        path: str,
        request: type[Q],
        answer: Any,
        handle: Callable[[Q], Awaitable[A]],
        *,
        summary: str,
        problems: Mapping[int, str] | None = None,
        json_errors: bool = False,
        status: int = 200,
        for_routers: bool = False,
    ) -> None:
        """Answer POSTs: JSON of a `request` becomes JSON of an `answer`, with `status`.

        `problems` are the statuses that `handle` raises beyond the gate's own, and when. `json_errors`: the
        body of an error is {"error": sentence}. `for_routers`: who has a router's token may ask, too.
        """
        decoder = RequestDecoder(request)

        async def handle_body(body: bytes) -> bytes:
            return _encoder.encode(await handle(await decoder.decode(body)))

        operation = Operation(
            "post", path, summary, request, answer, status, dict(problems or {}), json_errors, for_routers
        )
        self._add(_Door(operation, handle_body))

    def get(
        self,
        path: str,
        answer: Any,
        handle: Callable[[], Awaitable[A]],
        *,
        summary: str,
        problems: Mapping[int, str] | None = None,
        json_errors: bool = False,
        for_routers: bool = False,
    ) -> None:
        """Answer GETs with JSON of an `answer`; the rest is as in `post`."""

        async def handle_nothing(_: bytes) -> bytes:
            return _encoder.encode(await handle())

        operation = Operation(
            "get", path, summary, None, answer, 200, dict(problems or {}), json_errors, for_routers
        )
        self._add(_Door(operation, handle_nothing))

    def stream(
        self,
        path: str,
        answer: Any,
        handle: Callable[[Mapping[str, str]], Awaitable[AsyncIterator[bytes]]],
        *,
        summary: str,
        problems: Mapping[int, str] | None = None,
        json_errors: bool = False,
        for_routers: bool = False,
    ) -> None:
        """Answer GETs with the JSON of an `answer` in pieces, as `handle` gives them for the query's words.

        What it does before the first piece may raise as others do; the rest is as in `post`.
        """

        async def handle_query(query: bytes) -> AsyncIterator[bytes]:
            return await handle(dict(parse_qsl(query.decode("latin-1"))))

        operation = Operation(
            "get", path, summary, None, answer, 200, dict(problems or {}), json_errors, for_routers
        )
        self._add(_Door(operation, handle_query))

    def statistics(self) -> GateStatistics:
        """Counts of now."""
        return GateStatistics(Counter(self._requests), Counter(self._callers))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        doors = self._paths.get(scope["path"]) if scope["type"] == "http" else None
        if doors is None:
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        body = RequestBody(headers, receive, unread=scope["method"] == "POST")
        visit = _Visit(headers, body, scope["query_string"])
        reply = await self._reply(doors, scope["method"], visit)
        if reply is None:
            return
        self._requests[scope["path"], reply.status] += 1
        self._callers[visit.caller, reply.status] += 1
        if body.held_back:  # it may come or not: what follows on this connection would be taken for it
            reply.headers = {**reply.headers, "Connection": "close"}
            body.unread = False
        await _send(reply, receive, send, more=body.unread)
        if body.unread:
            await body.pass_over()
            await send({"type": "http.response.body"})

    async def _reply(self, doors: Mapping[str, _Door], method: str, visit: _Visit) -> _Reply | None:
        """The answer; None where nobody waits for it any more."""
        door = doors.get(method)
        if door is None:
            allowed = ", ".join(sorted(doors))
            return _refusal(Problem(405, f"{method} is not for this path; use {allowed}", {"Allow": allowed}))
        try:
            self._admit(door.operation, visit)
            body = await self._body(visit) if method == "POST" else visit.query
            return None if body is None else _Reply(door.operation.status, await door.handle(body), _JSON)
        except NotJson as error:
            problem = Problem(400, str(error))
        except InvalidRequest as error:
            problem = Problem(422, str(error))
        except Problem as error:
            problem = error
        except Exception:
            logger.exception("%s %s", method, door.operation.path)
            problem = Problem(500, "a mistake of the server; its log says which")
        return _refusal(problem, in_json=door.operation.json_errors)

    def _admit(self, operation: Operation, visit: _Visit) -> None:
        """Raise Problem unless whoever asks may, now."""
        if (origin := visit.headers.get(b"origin")) is not None:
            raise Problem(403, foreign(origin.decode("latin-1")))
        caller = self._tokens.of(visit.headers.get(b"authorization", b""))
        if caller is None:
            raise Problem(401, "give the token as Authorization: Bearer", {"WWW-Authenticate": "Bearer"})
        visit.caller = caller.name
        if not caller.all and not operation.for_routers:
            raise Problem(
                403, f"a router's token is for lookups and outcomes; {operation.path} needs the store's"
            )
        wait_s = self._rate.wait_s(caller.name, time.monotonic())
        if wait_s:
            raise Problem(
                429,
                f"more than {self._rate.per_s:g} requests a second; ask again in {wait_s:.3f} s",
                {"Retry-After": str(ceil(wait_s))},
            )

    async def _body(self, visit: _Visit) -> bytes | None:
        """The whole body; None once who sends it is gone.

        Raises:
            Problem: it is too long (413), or does not come (408).
        """
        try:
            return await visit.body.read(self._body_bytes_max)
        except TooLong as exc:
            limit = f"the limit is {self._body_bytes_max} bytes"
            raise Problem(413, f"the body is too long: {exc} bytes; {limit}") from None
        except TooSlow as exc:
            sentence = f"{exc} bytes of the body came in {BODY_S:g} s, and not all; send all within that time"
            raise Problem(408, sentence, {"Connection": "close"}) from None

    def _add(self, door: _Door) -> None:
        methods = self._paths.setdefault(door.operation.path, {})
        methods[door.operation.method.upper()] = door

    async def _document(self) -> dict[str, Any]:
        doors = [door for methods in self._paths.values() for door in methods.values()]
        return document_of(self._app, [door.operation for door in doors], self._body_bytes_max)


async def _send(reply: _Reply, receive: Receive, send: Send, *, more: bool) -> None:
    """`more`: it is not to end yet, though all of it is sent."""
    headers = [
        (b"content-type", reply.media_type),
        *[(name.encode(), value.encode()) for name, value in reply.headers.items()],
    ]
    body = reply.body
    if isinstance(body, bytes):
        headers.append((b"content-length", b"%d" % len(body)))
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    if isinstance(body, bytes):
        await send({"type": "http.response.body", "body": body, "more_body": more})
        return
    gone = asyncio.ensure_future(_gone(receive))
    try:
        async for piece in body:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            if gone.done():
                return
    finally:
        gone.cancel()
    await send({"type": "http.response.body", "body": b""})


async def _gone(receive: Receive) -> None:
    """Until nobody is there to send to, when sending does nothing."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _refusal(problem: Problem, *, in_json: bool = False) -> _Reply:
    sentence = str(problem)
    if in_json:
        return _Reply(problem.status, _encoder.encode({"error": sentence}), _JSON, problem.headers)
    return _Reply(problem.status, f"{sentence}\n".encode(errors="replace"), _TEXT, problem.headers)
