"""Other indexers' HTTP, for routers that speak it: Dynamo's and Mooncake's, on the same paths.

Who names a `model_name` speaks Dynamo's, who names a `modelname` or a `model` the Conductor's. Where ignoring
a field would answer wrongly, it is refused. LMCache's controller is `kvstore.index.lmcache_controller`.
"""

import asyncio
import struct
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Final

import msgspec

from kvstore.content_keys import sequence_hashes
from kvstore.errors import InvalidRequest
from kvstore.gate import Gate, Problem
from kvstore.index.dialect_requests import (
    U64_MAX,
    Asked,
    Listener,
    Named,
    QueryHashes,
    QueryTokens,
    Register,
    Unregister,
    Worker,
)
from kvstore.index.dump import dump
from kvstore.index.engine_source import EngineKind
from kvstore.index.keytable import Key
from kvstore.index.overlaps import DynamoAnswer, Instances, conductors
from kvstore.index.packed import numbers, packed
from kvstore.index.placement import Placement
from kvstore.index.query import KEYS_MAX, SPACES_MAX, Query
from kvstore.index.registrations import GROUP, Registration, Registrations, Taken
from kvstore.index.service import Index
from kvstore.index.turns import parts, pause

_KINDS: Final = {"vllm": EngineKind.VLLM, "sglang": EngineKind.SGLANG}
_SCHEMES: Final = ("tokens", "tokens-eagle")
# How 64 bits are packed, and what numbers they may be.
_SIGNED: Final = ("q", -(1 << 63), (1 << 63) - 1)
_UNSIGNED: Final = ("Q", 0, U64_MAX)
_HASH_BYTES: Final = 8
# To chain more hashes takes 2 ms: that is done beside the loop.
_ASIDE_HASHES: Final = 8192
# A dump goes on for so long until others have their turn, and there are so many at once.
_TURN_S: Final = 0.0005
_DUMPS_MAX: Final = 2


class Dialects:
    """Their handlers."""

    def __init__(self, index: Index, registrations: Registrations) -> None:
        self._index = index
        self._registrations = registrations
        self._dumps = 0

    def mount(self, gate: Gate) -> None:
        """Answer their paths."""
        unknown = {404: "no such model or instance is known here"}
        gate.post(
            "/register",
            Register,
            dict[str, Any],
            self._register,
            summary="Follow an engine (Dynamo, Mooncake Conductor)",
            problems={409: "the instance is registered otherwise"},
            json_errors=True,
            status=201,
        )
        gate.post(
            "/unregister",
            Unregister,
            dict[str, Any],
            self._unregister,
            summary="Follow an engine no longer (Dynamo, Mooncake Conductor)",
            problems=unknown,
            json_errors=True,
        )
        gate.post(
            "/query",
            QueryTokens,
            dict[str, Any],
            self._query,
            summary="Who has a prompt's prefix (Dynamo, Mooncake Conductor)",
            problems=unknown,
            json_errors=True,
            for_routers=True,
        )
        gate.post(
            "/query_by_hash",
            QueryHashes,
            dict[str, Any],
            self._query_by_hash,
            summary="Who has a prefix, by its hashes (Dynamo, Mooncake Conductor)",
            problems=unknown,
            json_errors=True,
            for_routers=True,
        )
        gate.stream(
            "/workers",
            list[Worker],
            self._workers,
            summary="Registered instances whose id is a number (Dynamo); of a model_name, of a routing_group",
            json_errors=True,
            for_routers=True,
        )
        gate.stream(
            "/dump",
            dict[str, Any],
            self._dump,
            summary="All blocks of these, for --peers of Dynamo's indexer",
            json_errors=True,
        )

    # Engines.

    async def _register(self, asked: Register) -> dict[str, Any]:
        is_dynamo, model, group = _whose(asked.model_name, asked.modelname, asked)
        kind = _KINDS.get(asked.type.lower())
        if kind is None:
            raise InvalidRequest(f"type is {asked.type!r:.40}; give vLLM or SGLang, whose events have tokens")
        try:
            self._registrations.add(
                Registration(
                    instance=asked.instance,
                    rank=asked.dp_rank or 0,
                    group=group,
                    model=model,
                    block_tokens=asked.block_size,
                    endpoint=asked.endpoint,
                    replay=asked.replay_endpoint or "",
                    kind=kind,
                    lora=asked.lora_name or "",
                    salt=asked.additionalsalt or asked.additional_salt or "",
                )
            )
        except Taken as error:
            raise Problem(409, str(error)) from None
        if is_dynamo:
            return {"status": "ok"}
        return {"status": "registered successfully", "instance_id": asked.instance}

    async def _unregister(self, asked: Unregister) -> dict[str, Any]:
        is_dynamo, model, group = _whose(asked.model_name, asked.modelname, asked)
        any_group = is_dynamo and asked.routing_group is None
        ranks = self._registrations.of(asked.instance)
        gone = [
            each
            for each in ranks
            if each.model == model
            and (any_group or each.group == group)
            and asked.dp_rank in (None, each.rank)
        ]
        if not gone:
            there = ", ".join(f"dp_rank {one.rank} of model={one.model}, {one.group}" for one in ranks[:8])
            raise Problem(404, f"instance {asked.instance}: not found so; there is {there or 'none of it'}")
        for each in gone:
            self._registrations.remove(each)
        if is_dynamo:
            return {"status": "ok"}
        removed = [f"{each.instance}|{each.group}|{each.rank}" for each in gone]
        return {"status": "unregistered successfully", "removed_instances": removed}

    async def _workers(self, wanted: Mapping[str, str]) -> AsyncIterator[bytes]:
        model, group = wanted.get("model_name"), wanted.get("routing_group")
        instances: dict[str, list[Registration]] = {}
        for each in self._registrations:
            if each.is_number and model in (None, each.model) and group in (None, each.group):
                instances.setdefault(each.instance, []).append(each)
        return _one(msgspec.json.encode([self._worker(ranks) for ranks in instances.values()]))

    def _worker(self, ranks: Sequence[Registration]) -> Worker:
        first = ranks[0]
        listeners = {str(each.rank): Listener(each.endpoint, self._status(each)) for each in ranks}
        return Worker(
            instance_id=int(first.instance),
            source="zmq",
            status="pending" if any(one.status == "pending" for one in listeners.values()) else "active",
            model_name=first.model,
            routing_group=first.group,
            block_size=first.block_tokens,
            endpoints={str(each.rank): each.endpoint for each in ranks},
            listeners=listeners,
        )

    def _status(self, registration: Registration) -> str:
        stream = self._registrations.stream(registration)
        return "active" if stream is not None and stream.statistics().connected else "pending"

    # Lookups.

    async def _query(self, asked: QueryTokens) -> dict[str, Any]:
        is_dynamo, model, group = _whose(asked.model_name, asked.model, asked)
        if asked.lora_id is not None and not asked.lora_name:
            raise InvalidRequest(f"lora_id is {asked.lora_id}; give lora_name, which engines announce")
        self._check_known(is_dynamo, model, group)
        query = Query(
            model=model, tokens=asked.token_ids, salt=asked.cache_salt or "", lora=asked.lora_name or ""
        )
        found = (await self._index.find(query)).placements
        return await self._answer(asked, is_dynamo, group, found)

    async def _query_by_hash(self, asked: QueryHashes) -> dict[str, Any]:
        is_dynamo, model, group = _whose(asked.model_name, asked.model, asked)
        if asked.cache_salt is not None and is_dynamo:
            raise Problem(400, "cache_salt is not accepted by /query_by_hash; block_hashes must hold it")
        if not is_dynamo and (asked.cache_salt or asked.lora_name):
            raise InvalidRequest(
                "cache_salt and lora_name beside seq_hashes, which must hold them; leave them out"
            )
        self._check_known(is_dynamo, model, group)
        keys = await self._keys(asked, is_dynamo)
        spaces = [space for space in self._index.locality.namespaces(model, "") if space.scheme in _SCHEMES]
        wanted = dict.fromkeys(spaces[:SPACES_MAX], keys)
        found = await self._index.placements(wanted, self._index.locality.engines)
        return await self._answer(asked, is_dynamo, group, found)

    async def _keys(self, asked: QueryHashes, is_dynamo: bool) -> Sequence[Key]:
        """The keys of the prefixes that are asked for."""
        if not is_dynamo:
            given = asked.block_hash if asked.seq_hashes is None else asked.seq_hashes
            return packed(_checked("seq_hashes", given, _UNSIGNED), _HASH_BYTES, are_numbers=True)
        hashes = memoryview(_checked("block_hashes", asked.block_hashes, _SIGNED)).cast("Q")
        if len(hashes) <= _ASIDE_HASHES:
            return numbers(sequence_hashes(None, hashes))
        loop = asyncio.get_running_loop()
        return numbers(await loop.run_in_executor(None, sequence_hashes, None, hashes))

    def _check_known(self, is_dynamo: bool, model: str, group: str) -> None:
        if is_dynamo and not self._registrations.knows(model, group):
            raise Problem(404, f"no indexer for model={model} routing_group={group}")

    async def _answer(
        self, asked: Asked, is_dynamo: bool, group: str, placements: Sequence[Placement]
    ) -> dict[str, Any]:
        instances: dict[str, dict[int, Placement]] = {}
        for some in parts(placements):
            self._registrations.gather(some, group, instances)
            await pause(len(placements))
        if not is_dynamo:
            return conductors(self._asked_of(asked, instances), group)
        answer = DynamoAnswer()
        for each in parts(list(instances.items())):
            answer.add(each)
            await pause(len(instances))
        return answer.told()

    def _asked_of(self, asked: Asked, instances: Instances) -> Instances:
        """Those that the Conductor answers about: registered for the model and the size, or with a hit."""
        registered = {
            each.instance: each.model == asked.model and asked.block_size in (None, each.block_tokens)
            for each in self._registrations
        }
        return {
            instance: ranks
            for instance, ranks in instances.items()
            if asked.instance_id in (None, instance)
            and registered.get(instance, any(one.remote for one in ranks.values()))
        }

    # Everything.

    async def _dump(self, _: Mapping[str, str]) -> AsyncIterator[bytes]:
        if self._dumps >= _DUMPS_MAX:
            raise Problem(
                429, f"{self._dumps} dumps are under way, the most; ask again", {"Retry-After": "5"}
            )
        return self._dumped()

    async def _dumped(self) -> AsyncIterator[bytes]:
        self._dumps += 1
        try:
            began_s, pieces = time.perf_counter(), []
            for piece in dump(self._registrations):
                pieces.append(piece)
                if time.perf_counter() - began_s >= _TURN_S:
                    yield b"".join(pieces)
                    await asyncio.sleep(0)
                    began_s, pieces = time.perf_counter(), []
            yield b"".join(pieces)
        finally:
            self._dumps -= 1


def _whose(dynamo: str | None, conductor: str | None, asked: Named | Asked) -> tuple[bool, str, str]:
    """Whether it is Dynamo's dialect; the model; and the group that is asked for."""
    if (dynamo is None) == (conductor is None):
        raise InvalidRequest("the model is named twice, or not; give model_name (Dynamo) or model (Mooncake)")
    if dynamo is None:
        return False, conductor or "", asked.tenant_id or GROUP
    if asked.tenant_id not in (None, GROUP):
        raise InvalidRequest(f"tenant_id is {asked.tenant_id!r:.40}; give a routing_group, as Dynamo has it")
    return True, dynamo, asked.routing_group or GROUP


def _checked(name: str, hashes: list[int] | None, limits: tuple[str, int, int]) -> bytes:
    """The hashes end to end, which must be within the limits."""
    if hashes is None:
        raise InvalidRequest(f"{name} is missing; give the hashes of the prompt's blocks")
    if len(hashes) > KEYS_MAX:
        raise InvalidRequest(f"{len(hashes)} {name}; give at most {KEYS_MAX}")
    code, least, most = limits
    try:
        return struct.pack(f"{len(hashes)}{code}", *hashes)
    except struct.error:
        bad = next(one for one in hashes if not least <= one <= most)
        raise InvalidRequest(f"one of {name} is {bad}; give numbers from {least} to {most}") from None


async def _one(piece: bytes) -> AsyncIterator[bytes]:
    yield piece
