"""The way to engines: requests of clients, and small questions. It chooses nothing and repeats nothing."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Final

import aiohttp

from connectors.proxy.answer import Answer, EngineFailed, Patience, Refusal, failures
from connectors.proxy.ask import Ask
from connectors.proxy.engine import Engine

_CLIENT_ERROR: Final = 400
_SERVER_ERROR: Final = 500
# Engines close idle connections after 5 s, and a request on one that is being closed would be lost.
_KEPT_S: Final = 2.0
_ERROR_WITHIN_S: Final = 10.0
_JSON: Final = {"Content-Type": "application/json"}


class Engines:
    """One pool of connections, which `close` ends."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEPT_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=patience.connect_s),
            auto_decompress=False,
        )

    @asynccontextmanager
    async def ask(self, engine: Engine, ask: Ask, rank: str = "") -> AsyncIterator[Answer]:
        """Its answer to a request, which is ended there when the block is left.

        Raises:
            EngineFailed: it cannot be reached, or answers with an error of its own.
        """
        headers = {**ask.headers, **_JSON, "Accept-Encoding": "identity"}
        if rank:
            headers["X-data-parallel-rank"] = rank
        url = engine.url.joinpath(ask.path[1:])
        limit_s = self._patience.first_token_s if ask.streams else self._patience.whole_s
        with failures(engine.name, "cannot be asked"):
            async with asyncio.timeout(limit_s):
                response = await self._session.post(url, data=ask.raw, headers=headers, allow_redirects=False)
        answer = Answer(response, engine.name, self._patience)
        whole = False
        try:
            if answer.status >= _SERVER_ERROR:
                with failures(engine.name, "gave no whole answer"):
                    raise await _refused(engine, response)
            yield answer
            whole = True
        finally:
            await answer.close(whole=whole)

    async def question(
        self,
        engine: Engine,
        path: str,
        headers: Mapping[str, str],
        timeout_s: float,
        body: bytes | None = None,
    ) -> bytes:
        """What it says there; with a body it is posted.

        Raises:
            EngineFailed: it does not, or not in time.
        """
        method = "GET" if body is None else "POST"
        url = engine.url.joinpath(path[1:])
        with failures(engine.name, f"does not answer {method} {path}"):
            async with (
                asyncio.timeout(timeout_s),
                self._session.request(method, url, data=body, headers={**headers, **_JSON}) as response,
            ):
                if response.status >= _CLIENT_ERROR:
                    raise await _refused(engine, response)
                return await response.read()

    async def close(self) -> None:
        """End all connections."""
        await self._session.close()


async def _refused(engine: Engine, response: aiohttp.ClientResponse) -> EngineFailed:
    """What is raised of an answer that is an error."""
    content_type = response.headers.get("Content-Type", "application/json")
    async with asyncio.timeout(_ERROR_WITHIN_S):
        refusal = Refusal(response.status, await response.read(), content_type)
    return EngineFailed(f"engine {engine.name} answered {response.status}", refusal)
