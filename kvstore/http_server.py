"""An HTTP server beside other work on one event loop: its token, and what every process answers.

Health and metrics are open, and tell nothing of any block.
"""

import asyncio
import hmac
import resource
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import cast

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import PlainTextResponse
from starlette.types import ASGIApp

from kvstore.http_connection import Connection, Limits, Silent


@dataclass(frozen=True, slots=True)
class Readiness:
    """What is `missing` until a process should be used, and what its users may know: lines for people."""

    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


# What a process counts, at once or made beside its loop.
Metrics = Callable[[], bytes | Awaitable[bytes]]


def health_app(title: str, readiness: Callable[[], Readiness], metrics: Metrics) -> FastAPI:
    """Whether it lives, whether it should be used, and what it counts."""
    app = FastAPI(title=title, docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/healthz", response_class=PlainTextResponse, summary="Whether the process lives")
    async def healthz() -> Response:
        return text("ok")

    @app.get(
        "/readyz",
        response_class=PlainTextResponse,
        responses={503: {"description": "what is missing, a line each", "content": {"text/plain": {}}}},
        summary="Whether it should be used",
    )
    async def readyz() -> Response:
        now = readiness()
        lines = now.missing or ["; ".join(["ready", *now.notes])]
        return text("\n".join(lines), 503 if now.missing else 200)

    @app.get("/metrics", response_class=PlainTextResponse, summary="What it counts, as Prometheus reads it")
    async def read_metrics() -> Response:
        told = metrics()
        body = told if isinstance(told, bytes) else await told
        return Response(body, media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


def text(line: str, status: int = 200) -> Response:
    """An answer for people."""
    return Response(f"{line}\n", status, media_type="text/plain")


def refusal(request: Request, token: str | None) -> Response | None:
    """The answer to a page in a browser, and to who does not know the token; None to who does."""
    if (origin := request.headers.get("origin")) is not None:
        return text(foreign(origin), 403)
    if _authorized(request.headers.get("authorization", ""), token):
        return None
    answer = text("give the token as Authorization: Bearer", 401)
    answer.headers["WWW-Authenticate"] = "Bearer"
    return answer


def foreign(origin: str) -> str:
    """What a page is told: where there is no token, any page that somebody looks at here could ask."""
    return f"a page of {origin:.100} asks; ask from a program, which sends no Origin"


def _authorized(header: str, token: str | None) -> bool:
    scheme, _, given = header.partition(" ")
    if token is None:
        return True
    # Headers are bytes, which arrive as Latin-1.
    same = hmac.compare_digest(given.strip().encode("latin-1", "replace"), token.encode())
    return same and scheme.lower() == "bearer"


class HttpServer(uvicorn.Server):
    """uvicorn on a loop that has signal handlers of its own."""

    def __init__(self, app: ASGIApp, limits: Limits | None = None) -> None:
        limits = _possible(limits or Limits())
        super().__init__(
            uvicorn.Config(
                app,
                http=cast(type[asyncio.Protocol], partial(Connection, limits, Silent())),
                ws="none",
                log_config=None,
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=1,
                # Longer than clients keep theirs: who is asked on a connection that ends just then, fails.
                timeout_keep_alive=75,
            )
        )
        self.config.load()  # which imports, and would hold the loop up for 10 ms once it runs

    def install_signal_handlers(self) -> None:
        """None: stopping is the process's own."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End all connections: those that nobody reads from before uvicorn would break off their requests."""
        grace_s = self.config.timeout_graceful_shutdown or 0
        timer = asyncio.get_running_loop().call_later(0.8 * grace_s, self._end_stalled)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()

    def _end_stalled(self) -> None:
        for connection in list(self.server_state.connections):
            cast(Connection, connection).end_stalled()


def _possible(limits: Limits) -> Limits:
    """With half of the process's descriptors at most: the others are for its own work."""
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if descriptors == resource.RLIM_INFINITY:
        return limits
    return replace(limits, connections=min(limits.connections, descriptors // 2))
