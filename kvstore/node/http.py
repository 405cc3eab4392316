"""A daemon over HTTP: health, metrics, and what routers and operators have it do, which wants the token."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec
from fastapi import Request, Response
from fastapi.responses import JSONResponse

from kvstore.block import Namespace
from kvstore.callers import Caller, Callers
from kvstore.errors import ConfigError, DeadlineExceeded, InvalidRequest, TierError, Unavailable
from kvstore.gate import Gate, Problem
from kvstore.http_server import Readiness, health_app, refusal, text
from kvstore.node.clear import Scope, clear
from kvstore.node.store import Store
from kvstore.rate import Rate

# 4,096 keys of 64 bytes in hex, and some: 2 ms of the event loop.
BODY_BYTES_MAX: Final = 1 << 20
CLEAR_S: Final = 60.0
_STOPPING: Final = {503: "the daemon stops"}


class Others(msgspec.Struct, forbid_unknown_fields=True):
    """A namespace's fields but for model and salt: see `kvstore.block.Namespace`."""

    block_tokens: int = 256
    dtype: str = ""
    layout: str = ""
    group: str = "0"
    shard: str = "0/1"
    scheme: str = ""

    def namespace(self, model: str, salt: str) -> Namespace:
        """All of it; raises InvalidRequest."""
        return Namespace(model=model, salt=salt, **msgspec.structs.asdict(self))


class Prefetch(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A prefix: the namespace's fields, and keys as hex, head first; 4,096 at most."""

    model: str
    keys: list[str]
    salt: str = ""
    namespace: Others = msgspec.field(default_factory=Others)


class Pin(Prefetch, forbid_unknown_fields=True, kw_only=True):
    """A prefix, and for how many seconds it is to be held, at most 3,600."""

    ttl_s: float


class Held(msgspec.Struct):
    """Leading keys in the arena, those expected there, and all others; no `id` where nothing is held."""

    id: str | None
    pinned: int
    loading: int
    missing: int


class Unpin(msgspec.Struct, forbid_unknown_fields=True):
    """The id that a pin or a prefetch was answered with."""

    id: str


class Clear(msgspec.Struct, forbid_unknown_fields=True):
    """Whose blocks are to go: of the model, of the salt, of both; with `namespace` of just that one."""

    model: str | None = None
    salt: str | None = None
    namespace: Others | None = None

    def scope(self) -> Scope:
        """What that is; raises InvalidRequest."""
        if self.namespace is None:
            return Scope(model=self.model, salt=self.salt)
        return Scope(self.namespace.namespace(self.model or "", self.salt or ""))


class Cleared(msgspec.Struct):
    """How many blocks went."""

    blocks: int


def node_app(
    readiness: Callable[[], Readiness],
    metrics: Callable[[], bytes],
    reload: Callable[[], Awaitable[dict[str, list[str]]]],
    token: Callable[[], str | None],
    store: Store,
) -> Gate:
    """`reload` reads the configuration again and says what that changed; `token` is the one of now."""
    app = health_app("kvstore node", readiness, metrics)

    @app.post("/v1/reload", openapi_extra={"security": [{"token": []}]})
    async def reload_settings(request: Request) -> Response:
        if (refused := refusal(request, token())) is not None:
            return refused
        try:
            return JSONResponse(await reload())
        except ConfigError as error:
            return text(f"{error}; nothing has changed", 422)

    gate = Gate(app, tokens=_Token(token), rate=Rate(0), body_bytes_max=BODY_BYTES_MAX)
    upkeep = _Upkeep(store)
    gate.post("/v1/prefetch", Prefetch, Held, upkeep.prefetch, summary="Load a prefix", problems=_STOPPING)
    gate.post("/v1/pin", Pin, Held, upkeep.pin, summary="Hold a prefix for a time", problems=_STOPPING)
    gate.post(
        "/v1/unpin",
        Unpin,
        Unpin,
        upkeep.unpin,
        summary="End a hold before its time",
        problems={404: "there never was such a hold", 410: "the hold is over"},
    )
    gate.post(
        "/v1/clear",
        Clear,
        Cleared,
        upkeep.clear,
        summary="Remove all blocks of a model or a salt",
        problems={503: "a tier fails, and may bring them back; or there are more than can go within 60 s"},
    )
    return gate


class _Token:
    """Who asks, by a token that may change."""

    def __init__(self, token: Callable[[], str | None]) -> None:
        self._token = token
        self._known: str | None = None
        self._callers = Callers(None)

    def of(self, header: bytes) -> Caller | None:
        if (token := self._token()) != self._known:
            self._known, self._callers = token, Callers(token)
        return self._callers.of(header)


class _Upkeep:
    """The handlers."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def prefetch(self, asked: Prefetch) -> Held:
        return await self._hold(asked, 0.0)

    async def pin(self, asked: Pin) -> Held:
        return await self._hold(asked, asked.ttl_s)

    async def unpin(self, asked: Unpin) -> Unpin:
        holds, number = self._store.holds, _number(asked.id)
        if holds.end(number):
            return asked
        if holds.is_over(number):
            raise Problem(410, f"hold {number} is over")
        raise Problem(404, f"there never was a hold {number}; give the id of a pin or a prefetch")

    async def clear(self, asked: Clear) -> Cleared:
        try:
            return Cleared(await clear(self._store, asked.scope(), CLEAR_S))
        except (DeadlineExceeded, TierError) as error:
            raise Problem(503, str(error)) from error

    async def _hold(self, asked: Prefetch, ttl_s: float) -> Held:
        namespace, keys = asked.namespace.namespace(asked.model, asked.salt), _keys(asked.keys)
        await asyncio.sleep(0)  # to decode so many took its time
        try:
            hold = self._store.holds.hold(namespace, keys, ttl_s)
        except Unavailable as error:
            raise Problem(503, str(error)) from error
        return Held(str(hold.id) if hold.id else None, hold.pinned, hold.loading, hold.missing)


def _keys(keys: list[str]) -> list[bytes]:
    decoded = []
    for key in keys:
        try:
            decoded.append(bytes.fromhex(key))
        except ValueError:
            raise InvalidRequest(f"key {key!r:.60} is no hex; give 2 to 128 digits") from None
    return decoded


def _number(hold_id: str) -> int:
    # More digits than any id has, and few enough to be made a number.
    if not (hold_id.isascii() and hold_id.isdecimal() and len(hold_id) <= 20):
        raise InvalidRequest(f"id {hold_id!r:.60} is none; give the id of a pin or a prefetch, in digits")
    return int(hold_id)
