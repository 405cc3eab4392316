"""Health and metrics over HTTP. Open to whoever reaches the port, and telling nothing of any block."""

from collections.abc import Callable

import uvicorn
from fastapi import FastAPI, Response


def health_app(not_ready: Callable[[], list[str]], metrics: Callable[[], bytes]) -> FastAPI:
    """`not_ready` names what is still missing; nothing is ready."""
    app = FastAPI(title="kvstore node", docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/healthz")
    async def healthz() -> Response:
        return Response("ok\n", media_type="text/plain")

    @app.get("/readyz")
    async def readyz() -> Response:
        missing = not_ready()
        return Response(
            "\n".join(missing or ["ready"]) + "\n", 503 if missing else 200, media_type="text/plain"
        )

    @app.get("/metrics")
    async def read_metrics() -> Response:
        return Response(metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


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
