"""The engines of one duty, and the watch that says which of them are there and which models they serve."""

import asyncio
import random
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

import msgspec

from connectors.proxy.answer import EngineFailed
from connectors.proxy.engine import Engine
from connectors.proxy.engines import Engines

_PROBE_FIRST_S: Final = 0.1
_PROBE_LAST_S: Final = 2.0
_PROBE_TIMEOUT_S: Final = 2.0
# How often an engine that is there is asked whether it is, and for its models: adapters come and go.
_LOOK_EVERY_S: Final = 10.0


class _Models(msgspec.Struct):
    data: list[dict[str, Any]] = []


class Fleet:
    """Who can be asked. `watch` runs for as long as that should be known."""

    def __init__(self, urls: Sequence[str], engines: Engines, headers: Mapping[str, str]) -> None:
        self.engines = [Engine(url) for url in urls]
        self._by_name = {engine.name: engine for engine in self.engines}
        self._ways = engines
        self._headers = headers

    def candidates(self, model: str, tried: Collection[Engine]) -> list[Engine]:
        """Who may be asked for a model and was not yet, in a random order.

        Those that are away only where nobody else is left, and those without the model only where nobody is
        known to have it: an engine says best itself what is wrong with a request.
        """
        left = [engine for engine in self.engines if engine not in tried]
        if any(model in engine.models for engine in self.engines):
            left = [engine for engine in left if model in engine.models or not engine.models]
        random.shuffle(left)
        return [engine for engine in left if engine.is_there] or left

    def parent(self, model: str) -> str | None:
        """Of an adapter that an engine knows, the model that it is for."""
        entries = (engine.models[model] for engine in self.engines if model in engine.models)
        parents = (entry.get("parent") for entry in entries)
        return next((parent for parent in parents if isinstance(parent, str)), None)

    def models(self) -> list[dict[str, Any]]:
        """The entries of all models of engines that are there."""
        there = [engine for engine in self.engines if engine.is_there]
        return list({name: entry for engine in there for name, entry in engine.models.items()}.values())

    def named(self, name: str) -> Engine | None:
        """The engine of a name as the index has it, HOST:PORT or HOST:PORT#RANK."""
        return self._by_name.get(name.partition("#")[0])

    async def watch(self) -> None:
        """Ask engines whether they are well and what they serve, those that are away often; for ever."""
        async with asyncio.TaskGroup() as tasks:
            for engine in self.engines:
                tasks.create_task(self._watch(engine))

    async def _watch(self, engine: Engine) -> None:
        while True:
            await self._until_well(engine)
            with suppress(EngineFailed):  # some serve what they are asked for and list nothing
                listed = await self._ways.question(engine, "/v1/models", self._headers, _PROBE_TIMEOUT_S)
                engine.models = _entries(listed)
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_EVERY_S):
                    await engine.away.wait()

    async def _until_well(self, engine: Engine) -> None:
        pause_s = _PROBE_FIRST_S
        while True:
            try:
                await self._ways.question(engine, "/health", self._headers, _PROBE_TIMEOUT_S)
            except EngineFailed as exc:
                engine.failed(str(exc))
            else:
                engine.is_well()
                return
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, _PROBE_LAST_S)


def least_loaded(candidates: Sequence[Engine]) -> Engine:
    """Who has the fewest tokens waiting, and of those the fewest requests; the first of equals."""
    return min(candidates, key=lambda engine: (engine.waiting_tokens, engine.running))


def _entries(listed: bytes) -> dict[str, dict[str, Any]]:
    """Of an answer to GET /v1/models, each entry by its model's name; of another answer none."""
    try:
        entries = msgspec.json.decode(listed, type=_Models).data
    except (msgspec.DecodeError, UnicodeDecodeError):
        return {}
    return {entry["id"]: entry for entry in entries if isinstance(entry.get("id"), str)}
