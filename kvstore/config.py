"""The daemon's configuration: one TOML file, or flags, into frozen dataclasses. Objects never see it."""

import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Final

from kvstore.errors import ConfigError
from kvstore.knobs import Config as Config
from kvstore.knobs import DramConfig as DramConfig
from kvstore.knobs import EngineConfig as EngineConfig
from kvstore.knobs import EventsConfig as EventsConfig
from kvstore.knobs import IndexConfig as IndexConfig
from kvstore.knobs import LimitsConfig as LimitsConfig
from kvstore.knobs import NvmeConfig as NvmeConfig
from kvstore.knobs import QuotasConfig as QuotasConfig
from kvstore.knobs import RedisConfig as RedisConfig
from kvstore.knobs import default_socket as default_socket
from kvstore.knobs import parse_endpoint as parse_endpoint
from kvstore.knobs import parse_size as parse_size
from kvstore.validation import validate


def load(path: Path | None, overrides: Mapping[str, Any]) -> Config:
    """The file's settings, with `overrides` (flags, nested as the file is) on top.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, a value has the wrong type or is out of range.
    """
    data: dict[str, Any] = {}
    if path is not None:
        try:
            data = tomllib.loads(path.read_text())
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
            raise ConfigError(f"{path}: {exc}") from exc
    for key, value in overrides.items():
        below = data.get(key, {})
        if isinstance(value, Mapping) and not isinstance(below, Mapping):
            raise ConfigError(f"{key} is {below!r}; it is a section: write [{key}]")
        data[key] = {**below, **value} if isinstance(value, Mapping) else value
    config = _build(Config, data, "")
    assert isinstance(config, Config)
    if config.index.embedded and config.events is None:
        config = replace(config, events=EventsConfig())
    validate(config)
    return config


def as_toml(config: Config) -> str:
    """The configuration as a file that `load` reads back, each knob with its documentation; no secrets.

    Sections that are not there are shown as comments, with their defaults.
    """
    lines = [
        "# What this says (live) can change while the daemon runs: on SIGHUP, or POST /v1/reload, it reads",
        "# its file again. Everything else needs a restart.",
    ]
    sections = [f.name for f in fields(config) if f.name in _SECTIONS]
    lines += _knob_lines(config, skip=sections)
    for name in sections:
        section = getattr(config, name)
        there = section is not None
        shown = section if there else _SECTIONS[name]()
        tables = [knob.name for knob in fields(shown) if f"{name}.{knob.name}" in _TABLES]
        block = [f"[{name}]", *_knob_lines(shown, skip=tables)]
        lines += ["", *(block if there else _commented(block))]
        for table in tables:
            lines += _table_lines(f"{name}.{table}", getattr(shown, table))
    return "\n".join(lines) + "\n"


def _table_lines(name: str, tables: Sequence[Any]) -> Iterator[str]:
    """Each table of an array; where there is none, what one would look like."""
    for table in tables or [_TABLES[name]()]:
        block = ["", f"[[{name}]]", *_knob_lines(table)]
        yield from block if tables else _commented(block)


def _commented(block: Iterable[str]) -> Iterator[str]:
    return (line if line.startswith("#") or not line else f"#{line}" for line in block)


def _knob_lines(section: Any, skip: Sequence[str] = ()) -> Iterator[str]:
    for knob in fields(section):
        if knob.name in skip:
            continue
        value = getattr(section, knob.name)
        if (shown := _without_password(value)) != value:
            value = shown
            yield "# without its password"
        notes = [" (live)"] if knob.metadata["live"] else []
        if value != knob.default and knob.default not in ("", ()):
            notes.append(f" (default {_literal(knob.default)})")
        yield f"# {knob.metadata['doc']}{''.join(notes)}"
        yield f"{knob.name} = {_literal(value)}"


def _without_password(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_without_password, value))
    return _PASSWORD.sub(r"\1", value) if isinstance(value, str) else value


def _literal(value: Any) -> str:
    """A value as TOML has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for this one.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple):
        return f"[{', '.join(map(_literal, value))}]"
    return repr(value)


# Of a URL, whatever it may contain.
_PASSWORD: Final = re.compile(r"(?<=://)([^:@/]*):.*(?=@)")

_SECTIONS: Final = {
    "dram": DramConfig,
    "nvme": NvmeConfig,
    "redis": RedisConfig,
    "limits": LimitsConfig,
    "quotas": QuotasConfig,
    "events": EventsConfig,
    "index": IndexConfig,
}
# Arrays of tables.
_TABLES: Final = {"index.engines": EngineConfig}


def _build(kind: type, data: Mapping[str, Any], prefix: str) -> Any:
    assert is_dataclass(kind)
    known = {f.name: f for f in fields(kind)}
    values: dict[str, Any] = {}
    for key, value in data.items():
        table = _TABLES.get(f"{prefix}{key}")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            raise ConfigError(
                f"unknown configuration key {prefix}{key}; the nearest known one is {prefix}{near[0]}"
            )
        section = None if prefix else _SECTIONS.get(key)
        if section is not None:
            if not isinstance(value, Mapping):
                raise ConfigError(f"{key} is {value!r}; it is a section: write [{key}]")
            values[key] = _build(section, value, f"{key}.")
        elif table is not None:
            values[key] = _built_tables(table, value, f"{prefix}{key}")
        else:
            values[key] = _typed(f"{prefix}{key}", value, known[key].default)
    return kind(**values)


def _built_tables(kind: type, value: Any, name: str) -> tuple[Any, ...]:
    if not isinstance(value, list) or not all(isinstance(table, Mapping) for table in value):
        raise ConfigError(f"{name} is {value!r:.80}; it is an array of tables: write [[{name}]]")
    return tuple(_build(kind, table, f"{name}.") for table in value)


def _typed(name: str, value: Any, default: Any) -> Any:
    assert default is not MISSING
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if name == "dram.capacity" or type(value) is type(default):
        return value
    if isinstance(default, tuple) and isinstance(value, list) and all(isinstance(v, str) for v in value):
        return tuple(value)
    raise ConfigError(f"{name} is {value!r}; give a {type(default).__name__}, as {default!r}")
