"""Lookups over HTTP, for routers. Whoever asks must know the token, where there is one."""

import math
import re
from collections.abc import Callable
from typing import Annotated, Any, Final

import msgspec
from fastapi import FastAPI, Request, Response

from kvstore.block import KEY_BYTES_MAX
from kvstore.engine_hashes import MediaItem
from kvstore.errors import InvalidRequest
from kvstore.http_server import Readiness, health_app, refusal, text
from kvstore.index.query import Query
from kvstore.index.service import Answer, Index
from kvstore.tokens import TOKEN_MAX

# A million tokens, or 65,536 keys of 64 bytes in hex, and some.
BODY_BYTES_MAX: Final = 16 << 20
_ENGINES_MAX: Final = 8192
_HEX: Final = re.compile(r"(?:[0-9a-fA-F]{2})*")


class Item(msgspec.Struct, forbid_unknown_fields=True):
    """An image or a clip of a prompt: see `kvstore.engine_hashes.MediaItem`."""

    identifier: str
    offset: Annotated[int, msgspec.Meta(ge=0)]
    length: Annotated[int, msgspec.Meta(ge=0)]


class Lookup(msgspec.Struct, forbid_unknown_fields=True):
    """A question: see `kvstore.index.query.Query`. Of keys, numbers are as they are, strings hex of bytes."""

    model: str
    tokens: list[Annotated[int, msgspec.Meta(ge=0, le=TOKEN_MAX)]] | None = None
    keys: list[int | str] | None = None
    namespace: dict[str, Any] = {}
    salt: str = ""
    lora: str = ""
    media: list[Item] = []
    engines: list[str] | None = None

    def query(self) -> Query:
        """What is asked of the index.

        Raises:
            InvalidRequest: a value is out of its limits, or does not go with another.
        """
        return Query(
            model=self.model,
            tokens=self.tokens,
            keys=None if self.keys is None else _keys(self.keys),
            fields=self.namespace,
            salt=self.salt,
            lora=self.lora,
            media=[MediaItem(item.identifier, item.offset, item.length) for item in self.media],
        )


_decoder: Final = msgspec.json.Decoder(Lookup)
_encoder: Final = msgspec.json.Encoder()


def index_app(index: Index, metrics: Callable[[], bytes], token: str | None) -> FastAPI:
    """The index's HTTP side."""
    app = health_app("kvstore index", lambda: readiness(index), metrics)

    @app.post("/v1/lookup")
    async def lookup(request: Request) -> Response:
        if (refused := refusal(request, token)) is not None:
            return refused
        body = await _body(request)
        if body is None:
            return text(f"the body is too long; the limit is {BODY_BYTES_MAX} bytes", 413)
        try:
            asked = _decoded(body)
            answers = await index.lookup(asked.query(), asked.engines)
        except InvalidRequest as error:
            return text(str(error), 422)
        data = {"placements": list(map(_placement, answers))}
        return Response(_encoder.encode(data), media_type="application/json")

    return app


def readiness(index: Index) -> Readiness:
    """Ready is who has heard everybody, or has waited long enough for them."""
    notes = [f"the oldest knowledge is of {index.age_s():.1f} s ago", *index.unknown()]
    return Readiness(index.missing(), notes)


def _placement(answer: Answer) -> dict[str, Any]:
    """What routers are told of an engine; an age that is infinite is null."""
    placement = answer.placement
    return {
        "engine": placement.engine,
        "gpu": placement.gpu,
        "dram": placement.dram,
        "nvme": placement.nvme,
        "remote": placement.remote,
        "age_ms": None if math.isinf(answer.age_s) else round(answer.age_s * 1000, 1),
        "epochs": answer.epochs,
        "incomplete": answer.incomplete,
    }


async def _body(request: Request) -> bytes | None:
    """The body, None of one that is too long; as much again is read, so that who sends it has the answer."""
    body = bytearray()
    read_bytes = 0
    async for piece in request.stream():
        read_bytes += len(piece)
        if read_bytes <= BODY_BYTES_MAX:
            body += piece
        elif read_bytes > 2 * BODY_BYTES_MAX:
            break
    return bytes(body) if read_bytes <= BODY_BYTES_MAX else None


def _decoded(body: bytes) -> Lookup:
    try:
        asked = _decoder.decode(body)
    except (msgspec.DecodeError, msgspec.ValidationError, RecursionError) as exc:
        raise InvalidRequest(f"a lookup of {len(body)} bytes that is none: {exc}") from exc
    if asked.engines is not None and len(asked.engines) > _ENGINES_MAX:
        raise InvalidRequest(f"{len(asked.engines)} engines; give at most {_ENGINES_MAX}")
    return asked


def _keys(keys: list[int | str]) -> list[int] | list[bytes]:
    """Numbers as they are, strings as the bytes that they are hex of."""
    numbers = [key for key in keys if isinstance(key, int)]
    if len(numbers) == len(keys):
        return numbers
    try:
        return [bytes.fromhex(key) for key in keys]  # type: ignore[arg-type]
    except (TypeError, ValueError):
        bad = next(key for key in keys if not isinstance(key, str) or not _HEX.fullmatch(key))
        raise InvalidRequest(
            f"key {bad!r:.60} is no hex; give numbers alone, or hex of 1 to {KEY_BYTES_MAX} bytes each"
        ) from None
