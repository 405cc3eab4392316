"""The router's HTTP side: who may ask, and how much at once. It chooses no engine."""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from connectors.proxy.ask import CHAT, COMPLETIONS, ask_of
from connectors.proxy.client import Client, ClientGone, Problem
from connectors.proxy.exchange import Means, answer
from connectors.proxy.fleet import Fleet
from connectors.proxy.settings import Settings
from kvstore.errors import InvalidRequest
from kvstore.http_server import Readiness, health_app, refusal


@dataclass(frozen=True, slots=True)
class Tokens:
    """`clients` is what clients must know, `engines` what engines are told; without either, clients'
    own words go on to engines."""

    clients: str | None
    engines: str | None

    def passed_on(self, given: str | None) -> dict[str, str]:
        """What an engine is told of who asks."""
        said = f"Bearer {self.engines}" if self.engines else given if self.clients is None else None
        return {} if said is None else {"Authorization": said}


def proxy_app(
    means: Means, fleet: Fleet, settings: Settings, tokens: Tokens, metrics: Callable[[], bytes]
) -> FastAPI:
    """Everything that clients can ask."""
    app = health_app("kvstore proxy", lambda: readiness(fleet), metrics)
    door = Door(means, settings, tokens)
    app.router.routes += [Route(path, door, methods=["POST"]) for path in (COMPLETIONS, CHAT)]

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        if (refused := refusal(request, tokens.clients)) is not None:
            return refused
        listed = {"object": "list", "data": fleet.models()}
        return Response(msgspec.json.encode(listed), media_type="application/json")

    return app


def readiness(fleet: Fleet) -> Readiness:
    """Ready is who has an engine to ask."""
    away = [f"engine {one.name} is away: {one.why_away}" for one in fleet.engines if not one.is_there]
    return Readiness(away if len(away) == len(fleet.engines) else [], away)


class Door:
    """Lets requests in: an ASGI application."""

    def __init__(self, means: Means, settings: Settings, tokens: Tokens) -> None:
        self._means = means
        self._settings = settings
        self._tokens = tokens
        self._inside = 0
        self._bodies_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, from its first byte to its answer's last."""
        client = Client(scope, receive, send, self._settings.client_s)
        self._inside += 1
        try:
            with contextlib.suppress(ClientGone):
                try:
                    await self._let_in(scope["path"], client, Request(scope))
                except Problem as exc:
                    await client.refuse(exc.status, str(exc), exc.headers)
        finally:
            self._inside -= 1
            self._bodies_bytes -= client.body_bytes
            self._means.metrics.request(scope["path"], client.status or "gone")

    async def _let_in(self, path: str, client: Client, request: Request) -> None:
        if (refused := refusal(request, self._tokens.clients)) is not None:
            sentence = bytes(refused.body).decode().strip()
            raise Problem(refused.status_code, sentence, {"www-authenticate": "Bearer"})
        if self._inside > self._settings.requests_max:
            sentence = f"{self._settings.requests_max} requests are under way; ask again later"
            raise Problem(503, sentence, {"retry-after": "1"})
        body = await client.body(self._settings.body_bytes_max, self._settings.body_s, self._came)
        headers = client.passed_on() | self._tokens.passed_on(client.headers.get("authorization"))
        try:
            ask = ask_of(path, body, headers)
        except InvalidRequest as exc:
            raise Problem(400, str(exc)) from exc
        await _while_there(client, answer(ask, client, self._means))

    def _came(self, nbytes: int) -> None:
        """So many bytes more are there, until their request is over."""
        self._bodies_bytes += nbytes
        if self._bodies_bytes > self._settings.bodies_bytes_max:
            sentence = f"bodies of {self._settings.bodies_bytes_max} bytes are under way; ask again later"
            raise Problem(503, sentence, {"retry-after": "1"})


async def _while_there(client: Client, answering: Coroutine[Any, Any, None]) -> None:
    """Answer a client for as long as it waits; whoever leaves has its request ended.

    Raises:
        ClientGone: it has left.
    """
    answered = asyncio.ensure_future(answering)
    gone = asyncio.ensure_future(client.gone())
    try:
        await asyncio.wait((answered, gone), return_when=asyncio.FIRST_COMPLETED)
        if not answered.done():
            raise ClientGone
        await answered
    finally:
        answered.cancel()
        gone.cancel()
        await asyncio.gather(answered, gone, return_exceptions=True)
