"""The OpenAPI document of a process, from what its gate was given. It describes; it answers nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

_REF: Final = "#/components/schemas/{name}"
# What the gate answers of itself.
_OF_ALL: Final = {
    401: "no token, or another one than those that are known",
    403: "a router's token, which is for lookups and outcomes; or a page in a browser, with an Origin",
    405: "another method than those of this path",
    429: "more requests a second than each caller may make; Retry-After says when to ask again, in seconds",
}
_OF_BODIES: Final = {
    400: "the body is no JSON, or no UTF-8",
    408: "the body did not come within 5 seconds",
    413: "the body is longer than {most} bytes",
    422: "a value is out of its limits, or does not go with another; or a long body is not of long lists",
}


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path: what it takes and gives, both as types; `request` None is no body."""

    method: str
    path: str
    summary: str
    request: Any
    answer: Any
    status: int
    problems: Mapping[int, str]
    json_errors: bool
    for_routers: bool


def document_of(app: FastAPI, operations: Sequence[Operation], body_bytes_max: int) -> dict[str, Any]:
    """All of it: the application's own routes, which are open, and the gate's, which need a token."""
    types = [each for one in operations for each in (one.request, one.answer) if each is not None]
    schemas, components = _plain(msgspec.json.schema_components(types, ref_template=_REF))
    document = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes
    )
    schema_of = {id(each): schema for each, schema in zip(types, schemas, strict=True)}
    for one in operations:
        document["paths"].setdefault(one.path, {})[one.method] = _described(one, schema_of, body_bytes_max)
    document.setdefault("components", {}).setdefault("schemas", {}).update(components)
    document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    return document


def _described(one: Operation, schema_of: Mapping[int, Any], body_bytes_max: int) -> dict[str, Any]:
    problems = {**_OF_ALL, **({} if one.request is None else _OF_BODIES), **one.problems}
    media = (
        {"application/json": {"schema": _ERROR}} if one.json_errors else {"text/plain": {"schema": _SENTENCE}}
    )
    answers: dict[str, Any] = {
        str(one.status): {"description": "the answer", "content": _json(schema_of[id(one.answer)])}
    }
    for status, text in sorted(problems.items()):
        # A method that is none of the path's is refused before it is known what its errors look like.
        content = {"text/plain": {"schema": _SENTENCE}} if status == 405 else media
        answers[str(status)] = {"description": text.format(most=body_bytes_max), "content": content}
    described: dict[str, Any] = {"summary": one.summary, "security": [{"token": []}], "responses": answers}
    described["operationId"] = f"{one.method}{one.path.replace('/', '_').replace('.', '_')}"
    if one.request is not None:
        described["requestBody"] = {"required": True, "content": _json(schema_of[id(one.request)])}
    return described


def _plain(schema: Any) -> Any:
    """The same without schemas of lists whose items differ by their place, which many tools do not know."""
    if isinstance(schema, tuple | list):
        return [_plain(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    plain = {name: _plain(each) for name, each in schema.items()}
    if "prefixItems" in plain:
        plain["items"] = {"anyOf": plain.pop("prefixItems")}
    return plain


def _json(schema: Any) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


_SENTENCE: Final = {"type": "string", "description": "one sentence: the value, the limit and the remedy"}
_ERROR: Final = {
    "type": "object",
    "properties": {"error": _SENTENCE},
    "required": ["error"],
}
