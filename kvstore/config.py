"""The daemon's configuration: one TOML file, or flags, into frozen dataclasses. Objects never see it.

Every knob has a default that works on a laptop, but for the tiers: those are there only when asked for.
"""

import difflib
import ipaddress
import os
import re
import socket
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Final

from kvstore.errors import ConfigError

DEFAULT_HTTP: Final = "127.0.0.1:7400"
_UNITS: Final = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_DIGITS_MAX: Final = 24
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)(KiB|MiB|GiB|TiB)|(\d+)")


def parse_size(value: Any, name: str = "size") -> int:
    """Bytes from "4GiB", "512MiB" or a plain number of bytes.

    Raises:
        ConfigError: it is anything else, or not above zero.
    """
    match = _SIZE.fullmatch(str(value))
    size = 0
    if match is not None and not isinstance(value, bool | float) and len(str(value)) <= _DIGITS_MAX:
        number, unit, plain = match.groups()
        size = int(plain) if plain else int(float(number) * _UNITS[unit])
    if not 0 < size < 1 << 60:
        raise ConfigError(
            f'{name} is {value!r}; give bytes as "4GiB", "512MiB" (KiB, MiB, GiB, TiB) or 1048576'
        )
    return size


def parse_endpoint(value: Any, name: str = "address") -> tuple[str, int]:
    """Host and port from "127.0.0.1:7400" or "[::1]:7400"; port 0 is any free one."""
    host, _, port = str(value).rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f'{name} is {value!r}; give HOST:PORT, as "127.0.0.1:7400"')
    return host, int(port)


def parse_place(value: Any, name: str) -> tuple[Path, int]:
    """A directory and its bytes from "/mnt/nvme0:500GiB"."""
    path, _, size = str(value).rpartition(":")
    if not path:
        raise ConfigError(f'{name} is {value!r}; give PATH:CAPACITY, as "/mnt/nvme0:500GiB"')
    return Path(path), parse_size(size, f"{name} {path}")


def default_socket() -> str:
    """Where the daemon of this user listens: under /run for root, else in the user's runtime directory."""
    if os.geteuid() == 0:
        return "/run/kvstore/node.sock"
    return f"{os.environ.get('XDG_RUNTIME_DIR', f'/tmp/kvstore-{os.geteuid()}')}/kvstore/node.sock"


def _knob(default: Any, doc: str) -> Any:
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True, slots=True)
class DramConfig:
    """`[dram]`: the arena that clients map."""

    capacity: str | int = _knob("1GiB", "bytes of the arena, populated at start")
    policy: str = _knob("lru", "which unpinned blocks leave first: lru or fifo")
    high_watermark: float = _knob(0.95, "when fuller than this, blocks move to tiers that write on eviction")
    low_watermark: float = _knob(0.90, "until it is no fuller than this")

    @property
    def capacity_bytes(self) -> int:
        return parse_size(self.capacity, "dram.capacity")


@dataclass(frozen=True, slots=True)
class NvmeConfig:
    """`[nvme]`: a tier on local disks, one for each directory."""

    directories: tuple[str, ...] = _knob((), "PATH:CAPACITY of each device's directory, as /mnt/nvme0:500GiB")
    policy: str = _knob("lru", "which blocks leave first: lru or fifo")
    write: str = _knob("behind", "behind: after every commit; on-eviction: when the arena fills up")
    exclusive: bool = _knob(False, "a block that has been promoted leaves; only with write on-eviction")
    admit_hits: int = _knob(0, "write only blocks that were hit as often; 0 for all")
    threads: int = _knob(4, "calls under way at once, for each directory")
    timeout_s: float = _knob(
        2.0, "a call that takes longer is late: the tier is then left alone until it is back"
    )

    @property
    def places(self) -> list[tuple[Path, int]]:
        """Directories, and bytes for each."""
        return [parse_place(text, "nvme.directories") for text in self.directories]


@dataclass(frozen=True, slots=True)
class LimitsConfig:
    """`[limits]`: what one client may hold."""

    client_pinned_fraction: float = _knob(0.5, "of the arena, that one client may have pinned")
    client_reserved_fraction: float = _knob(0.5, "of the arena, that one client may have reserved")
    clients: int = _knob(4096, "connections at a time")


@dataclass(frozen=True, slots=True)
class Config:
    """All of it."""

    node: str = _knob(socket.gethostname(), "this daemon's name in answers and metrics")
    socket: str = _knob(default_socket(), "unix socket for clients of this node")
    socket_mode: str = _knob("0660", "permissions of the socket: who may open it may read and write blocks")
    http: str = _knob(DEFAULT_HTTP, "health and metrics; port 0 for any")
    data: str = _knob("", "TCP for clients off this node, HOST:PORT; empty for none")
    token_file: str = _knob("", "file with the token that TCP clients must know; also from KVSTORE_TOKEN")
    tls_certificate: str = _knob("", "PEM file: speak TLS on the data port")
    tls_key: str = _knob("", "PEM file of the certificate's key")
    log_level: str = _knob("info", "debug, info, warning or error")
    dram: DramConfig | None = None
    nvme: NvmeConfig | None = None
    limits: LimitsConfig = LimitsConfig()

    @property
    def token(self) -> str | None:
        """The token, None when none is set."""
        if self.token_file:
            try:
                text = Path(self.token_file).read_text().strip()
            except OSError as exc:
                raise ConfigError(f"token_file {self.token_file}: {exc.strerror}") from exc
            except UnicodeDecodeError as exc:
                raise ConfigError(f"token_file {self.token_file} is no text: {exc}") from exc
            if not text:
                raise ConfigError(f"token_file {self.token_file} is empty; put the token into it")
            return text
        return os.environ.get("KVSTORE_TOKEN") or None


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
    _validate(config)
    return config


_SECTIONS: Final = {"dram": DramConfig, "nvme": NvmeConfig, "limits": LimitsConfig}


def _build(kind: type, data: Mapping[str, Any], prefix: str) -> Any:
    assert is_dataclass(kind)
    known = {f.name: f for f in fields(kind)}
    values: dict[str, Any] = {}
    for key, value in data.items():
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
        else:
            values[key] = _typed(f"{prefix}{key}", value, known[key].default)
    return kind(**values)


def _typed(name: str, value: Any, default: Any) -> Any:
    assert default is not MISSING
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if name == "dram.capacity" or type(value) is type(default):
        return value
    if isinstance(default, tuple) and isinstance(value, list) and all(isinstance(v, str) for v in value):
        return tuple(value)
    raise ConfigError(f"{name} is {value!r}; give a {type(default).__name__}, as {default!r}")


def _validate(config: Config) -> None:
    if config.dram is None:
        raise ConfigError("no tier is configured; give --dram 4GiB, or [dram] capacity in the file")
    if config.dram.capacity_bytes and config.dram.policy not in ("lru", "fifo"):
        raise ConfigError(f"dram.policy is {config.dram.policy!r}; give lru or fifo")
    low, high = config.dram.low_watermark, config.dram.high_watermark
    if not 0 < low <= high <= 1:
        raise ConfigError(
            f"dram.low_watermark is {low} and dram.high_watermark {high}; give 0 < low <= high <= 1"
        )
    if config.nvme is not None:
        _validate_nvme(config.nvme)
    for name in ("client_pinned_fraction", "client_reserved_fraction"):
        value = getattr(config.limits, name)
        if not 0 < value <= 1:
            raise ConfigError(f"limits.{name} is {value}; give more than 0 and at most 1")
    if config.limits.clients < 1:
        raise ConfigError(f"limits.clients is {config.limits.clients}; give 1 or more")
    if not re.fullmatch(r"0?[0-7]{3}", config.socket_mode):
        raise ConfigError(f"socket_mode is {config.socket_mode!r}; give three octal digits, as 0660")
    if config.log_level not in ("debug", "info", "warning", "error"):
        raise ConfigError(f"log_level is {config.log_level!r}; give debug, info, warning or error")
    if bool(config.tls_certificate) != bool(config.tls_key):
        raise ConfigError("tls_certificate and tls_key go together; give both or none")
    if not Path(config.socket).name:
        raise ConfigError(f"socket is {config.socket!r}; give the path of a file")
    for name, address in (("http", config.http), ("data", config.data)):
        if address and not _is_loopback(parse_endpoint(address, name)[0]) and config.token is None:
            raise ConfigError(
                f"{name} is {address}, which is beyond loopback, and no token is set; give token_file"
            )


def _validate_nvme(nvme: NvmeConfig) -> None:
    paths = [path.absolute() for path, _ in nvme.places]
    if not paths:
        raise ConfigError('nvme.directories is empty; give ["/mnt/nvme0:500GiB"], or leave [nvme] out')
    if len(set(paths)) != len(paths):
        raise ConfigError(f"nvme.directories names a directory twice: {', '.join(nvme.directories)}")
    if nvme.policy not in ("lru", "fifo"):
        raise ConfigError(f"nvme.policy is {nvme.policy!r}; give lru or fifo")
    if nvme.write not in ("behind", "on-eviction"):
        raise ConfigError(f"nvme.write is {nvme.write!r}; give behind or on-eviction")
    if nvme.exclusive and nvme.write == "behind":
        raise ConfigError('nvme.exclusive is true, and nvme.write "behind": then write on-eviction')
    if not 2 <= nvme.threads <= 64:
        raise ConfigError(f"nvme.threads is {nvme.threads}; give 2 to 64, for readers and writers")
    if nvme.admit_hits < 0:
        raise ConfigError(f"nvme.admit_hits is {nvme.admit_hits}; give 0 or more")
    if not 0.01 <= nvme.timeout_s <= 600:
        raise ConfigError(f"nvme.timeout_s is {nvme.timeout_s}; give 0.01 to 600 seconds")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name may lead anywhere
        return False
