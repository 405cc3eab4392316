"""An engine's answer to one request, and all the ways in which there is none."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final

import aiohttp

from kvstore.errors import Unavailable

_PIECE_BYTES: Final = 1 << 16
_END_WITHIN_S: Final = 1.0


class EngineFailed(Unavailable):
    """An engine gave no answer, half of one, or an error of its own, which is then `refusal`."""

    def __init__(self, text: str, refusal: "Refusal | None" = None) -> None:
        super().__init__(text)
        self.refusal = refusal


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer that is an error."""

    status: int
    body: bytes
    content_type: str


@dataclass(frozen=True, slots=True)
class Patience:
    """What may take how long, in seconds; `whole_s` is for an answer that comes in one piece."""

    connect_s: float
    first_token_s: float
    idle_s: float
    whole_s: float


class Answer:
    """An engine's answer whose headers are there."""

    def __init__(self, response: aiohttp.ClientResponse, name: str, patience: Patience) -> None:
        self.status = response.status
        self.content_type = response.headers.get("Content-Type", "application/json")
        self._response = response
        self._name = name
        self._patience = patience
        self._limit_s = patience.first_token_s

    @property
    def streams(self) -> bool:
        """Whether it comes in pieces."""
        return self.content_type.startswith("text/event-stream")

    async def body(self) -> bytes:
        """All of it.

        Raises:
            EngineFailed: it does not come, or not in time.
        """
        with failures(self._name, "gave no whole answer"):
            async with asyncio.timeout(self._patience.whole_s):
                return await self._response.read()

    async def piece(self) -> bytes:
        """What comes next of it; empty at its end.

        Raises:
            EngineFailed: it does not come, or not in time.
        """
        with failures(self._name, f"stopped in the middle, or gave nothing for {self._limit_s:g} s"):
            async with asyncio.timeout(self._limit_s):
                piece = await self._response.content.read(_PIECE_BYTES)
        self._limit_s = self._patience.idle_s
        return piece

    async def close(self, *, whole: bool) -> None:
        """End it at the engine. After a `whole` one the connection can be used again."""
        if whole:
            with suppress(aiohttp.ClientError, OSError):
                async with asyncio.timeout(_END_WITHIN_S):
                    await self._response.read()
        if not self._response.content.at_eof():
            self._response.close()
        self._response.release()


@contextmanager
def failures(name: str, what: str) -> Iterator[None]:
    """Whatever goes wrong between here and there, as the one error of engines."""
    try:
        yield
    except EngineFailed:
        raise
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as exc:
        reason = str(exc) or type(exc).__name__
        raise EngineFailed(f"engine {name} {what}: {reason}") from exc
