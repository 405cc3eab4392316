"""The locality index as a router asks it: lookups with a deadline, and outcomes in the background.

An index that is away, slow, or of another version costs a request its deadline at most, and a few in a row
nothing.
"""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any, Final

import aiohttp
import msgspec

from connectors.proxy.engine import Engine
from connectors.proxy.metrics import Metrics
from connectors.proxy.pause import Pause

logger = logging.getLogger(__name__)

# The index closes idle connections after 5 s, and a lookup on one that is being closed would be lost.
_KEPT_S: Final = 2.0
_OUTCOMES_MAX: Final = 1024
_OUTCOME_TASKS: Final = 4
_OUTCOME_TIMEOUT_S: Final = 2.0


class Why(StrEnum):
    """Why a request was not routed by what the index knows."""

    OFF = "no-index"
    TOKENS = "no-tokens"
    AWAY = "index-away"
    LATE = "index-late"
    REFUSED = "index-refused"
    UNKNOWN = "no-known-engine"


class Placement(msgspec.Struct):
    """What is used of a placement: `remote` tokens of the prompt are anywhere near, `expected` will be."""

    engine: str
    remote: int = 0
    expected: int = 0


class Found(msgspec.Struct):
    """The answer to a lookup, best first."""

    placements: list[Placement]
    id: str | None = None


class Question(msgspec.Struct, omit_defaults=True):
    """A prompt to look up."""

    model: str
    tokens: msgspec.Raw
    salt: str = ""
    lora: str = ""
    engines: list[Mapping[str, Any]] = []
    route: bool = False


class Outcome(msgspec.Struct, omit_defaults=True):
    """What became of the lookup `id`; `ended`: nobody saw when the first token came."""

    id: str
    engine: str
    ttft_ms: float | None = None
    cached_tokens: int | None = None
    failed: bool = False
    ended: bool = False


_found: Final = msgspec.json.Decoder(Found).decode


class Index:
    """One index, at `url`. `run` sends outcomes for as long as it runs."""

    def __init__(self, url: str, token: str | None, deadline_s: float, metrics: Metrics) -> None:
        self._url = url.rstrip("/")
        self._headers = {"Content-Type": "application/json"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        self._deadline_s = deadline_s
        self._metrics = metrics
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEPT_S),
            timeout=aiohttp.ClientTimeout(total=None),
        )
        self._pause = Pause()
        self._state: Why | None = None
        self._problem = ""  # of the last lookup that failed
        self._outcomes: asyncio.Queue[Outcome] = asyncio.Queue(_OUTCOMES_MAX)

    async def lookup(self, question: Question, candidates: Sequence[Engine]) -> Found | Why:
        """Where a prompt should go of these, or why that is not known. Never later than the deadline."""
        began_s = time.monotonic()
        if not self._pause.asks(began_s):
            return Why.AWAY
        engines = [_load(engine) for engine in candidates]
        asked = msgspec.structs.replace(question, engines=engines, route=True)
        found = await self._asked(msgspec.json.encode(asked))
        self._note(found if isinstance(found, Why) else None)
        if found in (Why.AWAY, Why.LATE):
            self._pause.failed(time.monotonic())
        else:
            self._pause.succeeded()
            self._metrics.lookup(time.monotonic() - began_s)
        return found

    def outcome(self, outcome: Outcome) -> None:
        """Report how it went, later; dropped where too many wait."""
        try:
            self._outcomes.put_nowait(outcome)
        except asyncio.QueueFull:
            self._metrics.outcome("dropped")

    async def run(self) -> None:
        """Send outcomes, for ever."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(_OUTCOME_TASKS):
                tasks.create_task(self._report())

    async def close(self) -> None:
        """End all connections."""
        await self._session.close()

    async def _asked(self, body: bytes) -> Found | Why:
        try:
            async with asyncio.timeout(self._deadline_s):
                status, answer = await self._post("/v1/lookup", body)
            if status == 200:
                return _found(answer)
            self._problem = f"{status} {answer.decode(errors='replace').strip():.200}"
            return Why.REFUSED
        except TimeoutError:
            self._problem = f"no answer within {self._deadline_s:g} s"
            return Why.LATE
        except (aiohttp.ClientError, OSError) as exc:
            self._problem = str(exc) or type(exc).__name__
            return Why.AWAY
        except msgspec.DecodeError as exc:
            self._problem = f"its answer is of another kind: {exc}"
            return Why.REFUSED

    async def _report(self) -> None:
        while True:
            outcome = await self._outcomes.get()
            try:
                async with asyncio.timeout(_OUTCOME_TIMEOUT_S):
                    status, _ = await self._post("/v1/outcome", msgspec.json.encode(outcome))
                self._metrics.outcome("taken" if status == 200 else "refused")
            except (aiohttp.ClientError, OSError, TimeoutError):
                self._metrics.outcome("lost")

    async def _post(self, path: str, body: bytes) -> tuple[int, bytes]:
        async with self._session.post(self._url + path, data=body, headers=self._headers) as response:
            return response.status, await response.read()

    def _note(self, state: Why | None) -> None:
        """A line in the log for what is new; None: it answers."""
        if state != self._state:
            self._state = state
            said = f"{state}: {self._problem}" if state else "answers again"
            logger.warning("the index at %s: %s", self._url, said)


def _load(engine: Engine) -> Mapping[str, Any]:
    return {"name": engine.name, "waiting_tokens": engine.waiting_tokens, "running": engine.running}
