"""A daemon over HTTP: beside health and metrics, reloading, which is for who knows the token."""

from collections.abc import Awaitable, Callable

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from kvstore.errors import ConfigError
from kvstore.http_server import Readiness, health_app, refusal, text


def node_app(
    readiness: Callable[[], Readiness],
    metrics: Callable[[], bytes],
    reload: Callable[[], Awaitable[dict[str, list[str]]]],
    token: Callable[[], str | None],
) -> FastAPI:
    """`reload` reads the configuration again and says what that changed."""
    app = health_app("kvstore node", readiness, metrics)

    @app.post("/v1/reload")
    async def reload_settings(request: Request) -> Response:
        if (refused := refusal(request, token())) is not None:
            return refused
        try:
            return JSONResponse(await reload())
        except ConfigError as error:
            return text(f"{error}; nothing has changed", 422)

    return app
