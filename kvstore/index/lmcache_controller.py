"""LMCache's controller, for routers that ask it where a prompt's blocks are: its lookups alone.

Its questions name no model: they are about the only one that is known here. Instances are engines, by their
addresses, and where a daemon has no engine, daemons, by their names. It has no groups, and is told nothing of
those that are registered in another than GROUP.
"""

from typing import Annotated, Final
from uuid import uuid4

import msgspec

from kvstore.errors import InvalidRequest
from kvstore.gate import Gate, Problem
from kvstore.index.placement import Placement
from kvstore.index.query import Query
from kvstore.index.registrations import GROUP, Registrations
from kvstore.index.service import Index
from kvstore.tokens import TOKEN_MAX

_NAMED_MAX: Final = 8


class LookupTokens(msgspec.Struct):
    """Who has a prompt's prefix; LMCache's own question has no `model`."""

    tokens: list[Annotated[int, msgspec.Meta(ge=0, le=TOKEN_MAX)]]
    model: str | None = None


class Layout(msgspec.Struct, frozen=True):
    """Instances with where the last of their leading tokens are, and how many there are; best first."""

    event_id: str
    layout_info: dict[str, tuple[str, int]]


class QueryInstance(msgspec.Struct):
    """Which instance is at an address."""

    event_id: str
    ip: str


class Instance(msgspec.Struct, frozen=True):
    """Its id."""

    event_id: str
    res: str


class LmcacheController:
    """Its handlers."""

    def __init__(self, index: Index, registrations: Registrations) -> None:
        self._index = index
        self._registrations = registrations

    def mount(self, gate: Gate) -> None:
        """Answer its paths."""
        gate.post(
            "/lookup",
            LookupTokens,
            Layout,
            self._lookup,
            summary="Who has a prompt's prefix (LMCache's controller)",
            for_routers=True,
        )
        gate.post(
            "/query_instance",
            QueryInstance,
            Instance,
            self._query_instance,
            summary="Which instance is at an address (LMCache's controller)",
            problems={404: "no instance is at that address"},
            for_routers=True,
        )

    async def _lookup(self, asked: LookupTokens) -> Layout:
        model = asked.model or self._only_model()
        layout: dict[str, tuple[str, int]] = {}
        if model is not None:
            for answer in await self._index.lookup(Query(model=model, tokens=asked.tokens)):
                if answer.placement.remote and self._registrations.group_of(answer.engine.name) == GROUP:
                    layout.setdefault(_instance(answer.placement.engine), _layout(answer.placement))
        return Layout(f"Lookup{uuid4()}", layout)

    def _only_model(self) -> str | None:
        """The model that is known here; None where nobody has said anything yet.

        Raises:
            InvalidRequest: there are several.
        """
        ours: set[str] = set()
        theirs: set[str] = set()
        for engine in self._index.locality.engines:
            if engine.model:
                (ours if self._registrations.group_of(engine.name) == GROUP else theirs).add(engine.model)
        models = sorted(ours.union(self._index.locality.models) - (theirs - ours))
        if len(models) > 1:
            some = ", ".join(f"{model:.80}" for model in models[:_NAMED_MAX])
            raise InvalidRequest(f"{len(models)} models are known here, {some}; give one of them as model")
        return models[0] if models else None

    async def _query_instance(self, asked: QueryInstance) -> Instance:
        by_host = {each.host: each.instance for each in self._registrations if each.group == GROUP}
        for engine in self._index.locality.engines:
            if self._registrations.group_of(engine.name) != GROUP:
                continue
            address = _instance(engine.name)
            by_host.setdefault(address.rpartition(":")[0].strip("[]"), address)
        if not asked.ip or asked.ip not in by_host:
            raise Problem(404, f"no instance is at {asked.ip!r:.80}; register it, or name it by its address")
        return Instance(f"QueryInst{uuid4()}", by_host[asked.ip])


def _instance(engine: str) -> str:
    """Of an engine's rank, its engine's address."""
    return engine.partition("#")[0]


def _layout(placement: Placement) -> tuple[str, int]:
    """LMCache's name of where the last of the leading tokens are, and their number."""
    if placement.remote > placement.nvme:
        return "RemoteBackend", placement.remote
    if placement.nvme > placement.dram:
        return "LocalDiskBackend", placement.nvme
    return ("LocalCPUBackend" if placement.dram > placement.gpu else "GPU"), placement.dram
