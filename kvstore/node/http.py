"""Health, metrics and reloading over HTTP. All but reloading is open, and tells nothing of any block."""

import hmac
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from kvstore.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Readiness:
    """What is `missing` until engines should use this node, and what they may know: lines for people."""

    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def health_app(
    readiness: Callable[[], Readiness],
    metrics: Callable[[], bytes],
    reload: Callable[[], Awaitable[dict[str, list[str]]]],
    token: Callable[[], str | None],
) -> FastAPI:
    """`reload` reads the configuration again and says what that changed; whoever asks must know the token."""
    app = FastAPI(title="kvstore node", docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/healthz")
    async def healthz() -> Response:
        return Response("ok\n", media_type="text/plain")

    @app.get("/readyz")
    async def readyz() -> Response:
        now = readiness()
        lines = now.missing or ["; ".join(["ready", *now.notes])]
        return Response("\n".join(lines) + "\n", 503 if now.missing else 200, media_type="text/plain")

    @app.get("/metrics")
    async def read_metrics() -> Response:
        return Response(metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.post("/v1/reload")
    async def reload_settings(request: Request) -> Response:
        if not _authorized(request.headers.get("authorization", ""), token()):
            text = "give the token as Authorization: Bearer\n"
            return Response(text, 401, {"WWW-Authenticate": "Bearer"}, media_type="text/plain")
        try:
            return JSONResponse(await reload())
        except ConfigError as error:
            return Response(f"{error}; nothing has changed\n", 422, media_type="text/plain")

    return app


def _authorized(header: str, token: str | None) -> bool:
    scheme, _, given = header.partition(" ")
    if token is None:
        return True
    # Headers are bytes, which arrive as Latin-1.
    same = hmac.compare_digest(given.strip().encode("latin-1", "replace"), token.encode())
    return same and scheme.lower() == "bearer"


class HttpServer(uvicorn.Server):
    """uvicorn on a loop that has signal handlers of its own."""

    def __init__(self, app: FastAPI) -> None:
        super().__init__(
            uvicorn.Config(
                app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1
            )
        )

    def install_signal_handlers(self) -> None:
        """None: stopping is the daemon's."""
