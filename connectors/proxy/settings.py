"""What a router is told at its start: a TOML file with flags on top, into values that are checked."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from kvstore.config import parse_endpoint
from kvstore.errors import ConfigError
from kvstore.validation import is_loopback

Seconds = Annotated[float, msgspec.Meta(gt=0, le=86400)]


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All there is to say; times are in seconds but where they say ms."""

    engines: tuple[str, ...] = ()
    prefill: tuple[str, ...] = ()
    index: str = ""
    listen: str = "127.0.0.1:8080"
    lora: dict[str, str] = {}
    lookup_ms: Annotated[float, msgspec.Meta(gt=0, le=60_000)] = 50.0
    tokenize_ms: Annotated[float, msgspec.Meta(gt=0, le=60_000)] = 1000.0
    attempts: Annotated[int, msgspec.Meta(ge=1, le=100)] = 3
    connect_s: Seconds = 2.0
    first_token_s: Seconds = 120.0
    idle_s: Seconds = 60.0
    whole_s: Seconds = 600.0
    client_s: Seconds = 60.0
    body_s: Seconds = 30.0
    drain_s: Annotated[int, msgspec.Meta(ge=1, le=86400)] = 30
    body_bytes_max: Annotated[int, msgspec.Meta(ge=1024, le=1 << 30)] = 16 << 20
    bodies_bytes_max: Annotated[int, msgspec.Meta(ge=1024, le=1 << 40)] = 256 << 20
    requests_max: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)] = 1024
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["plain", "json"] = "plain"


def load(path: Path | None, flags: Mapping[str, Any], *, has_token: bool) -> Settings:
    """The file's settings with the flags on top; `has_token` says whether clients must know one.

    Raises:
        ConfigError: the file cannot be read, or a setting is unknown, of a wrong type or out of range.
    """
    try:
        data = {} if path is None else tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path}: {exc}") from exc
    try:
        settings = msgspec.convert({**data, **flags}, Settings)
    except msgspec.ValidationError as exc:
        raise ConfigError(f"a setting of the router: {exc}") from exc
    _check(settings, has_token)
    return settings


def _check(settings: Settings, has_token: bool) -> None:
    if not settings.engines:
        raise ConfigError("there is no engine to route to; give --engine http://HOST:PORT")
    for urls in (settings.engines, settings.prefill):
        if len(set(urls)) < len(urls):
            raise ConfigError(f"the engines {', '.join(urls)} are not all different; give each once")
    if settings.bodies_bytes_max < settings.body_bytes_max:
        raise ConfigError(
            f"bodies_bytes_max is {settings.bodies_bytes_max}, and one body may have "
            f"{settings.body_bytes_max}; give at least as much"
        )
    if settings.index and not settings.index.startswith(("http://", "https://")):
        raise ConfigError(f"index is {settings.index!r}; give http://HOST:PORT")
    host, _ = parse_endpoint(settings.listen, "listen")
    if not has_token and not is_loopback(host):
        raise ConfigError(
            f"listen is {settings.listen}, which is beyond loopback, and clients need no token; "
            "set KVSTORE_PROXY_TOKEN"
        )
