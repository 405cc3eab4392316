"""The daemon's settings, as frozen dataclasses: each knob with its default and its documentation.

Every knob has a default that works on a laptop, but for the tiers: those are there only when asked for.
"""

import os
import re
import socket
from dataclasses import dataclass, field
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


def _knob(default: Any, doc: str, *, live: bool = False) -> Any:
    """A setting; a `live` one can change without a restart."""
    return field(default=default, metadata={"doc": doc, "live": live})


@dataclass(frozen=True, slots=True)
class DramConfig:
    """`[dram]`: the arena that clients map."""

    capacity: str | int = _knob(
        "1GiB", "bytes of the arena, populated at start; live down, and up again to that", live=True
    )
    policy: str = _knob("lru", "which unpinned blocks leave first: lru or fifo", live=True)
    high_watermark: float = _knob(
        0.95, "when fuller than this, blocks move to tiers that write on eviction", live=True
    )
    low_watermark: float = _knob(0.90, "until it is no fuller than this", live=True)

    @property
    def capacity_bytes(self) -> int:
        return parse_size(self.capacity, "dram.capacity")


@dataclass(frozen=True, slots=True)
class NvmeConfig:
    """`[nvme]`: a tier on local disks, one for each directory."""

    enabled: bool = _knob(True, "false: left alone, as if it failed, until it is true again", live=True)
    directories: tuple[str, ...] = _knob(
        (),
        "PATH:CAPACITY of each device's directory, as /mnt/nvme0:500GiB; capacities live, as the arena's",
        live=True,
    )
    policy: str = _knob("lru", "which blocks leave first: lru or fifo", live=True)
    write: str = _knob(
        "behind", "behind: after every commit; on-eviction: when the arena fills up", live=True
    )
    exclusive: bool = _knob(
        False, "a block that has been promoted leaves; only with write on-eviction", live=True
    )
    admit_hits: int = _knob(0, "write only blocks that were hit as often; 0 for all", live=True)
    threads: int = _knob(4, "calls under way at once, for each directory")
    timeout_s: float = _knob(
        2.0, "a call that takes longer is late: the tier is then left alone until it is back", live=True
    )

    @property
    def places(self) -> list[tuple[Path, int]]:
        """Directories, and bytes for each."""
        return [parse_place(text, "nvme.directories") for text in self.directories]


@dataclass(frozen=True, slots=True)
class RedisConfig:
    """`[redis]`: a tier that all nodes share, in Redis or Valkey."""

    enabled: bool = _knob(True, "false: left alone, as if it failed, until it is true again", live=True)
    url: str = _knob(
        "",
        "redis://host:6379/0, unix:///path, redis+sentinel://host:26379,host:26379/primary or "
        "redis+cluster://host:6379,host:6379; rediss for TLS",
    )
    username: str = _knob("", "of an ACL; empty for the default user")
    password_file: str = _knob("", "file with the password, read whenever a connection is made")
    sentinel_password_file: str = _knob("", "file with the sentinels' password, if they have one")
    tls_ca: str = _knob("", "PEM file of whom to trust; empty for the system's")
    tls_certificate: str = _knob("", "PEM file to show, where the servers ask for one")
    tls_key: str = _knob("", "PEM file of that certificate's key")
    prefix: str = _knob("kvstore", "what all names in Redis begin with; nodes that share blocks share it")
    ttl_s: float = _knob(0.0, "blocks expire so long after they were written; 0 for never")
    write: str = _knob(
        "behind",
        "behind: after every commit, and blocks may leave DRAM before; owed: they stay until written",
        live=True,
    )
    admit_hits: int = _knob(0, "write only blocks that were hit as often; 0 for all", live=True)
    known_blocks: int = _knob(262144, "blocks in Redis that this node remembers, 1 KiB each")
    missing_s: float = _knob(2.0, "what is not in Redis is not asked for again so long")
    threads: int = _knob(4, "calls under way at once")
    timeout_s: float = _knob(
        2.0,
        "a call that takes longer, and longer than its bytes at 8 MB/s, is late: the tier is then left alone",
    )


@dataclass(frozen=True, slots=True)
class LimitsConfig:
    """`[limits]`: what one client may hold, and what is held for routers."""

    client_pinned_fraction: float = _knob(0.5, "of the arena, that one client may have pinned", live=True)
    client_reserved_fraction: float = _knob(0.5, "of the arena, that one client may have reserved", live=True)
    clients: int = _knob(4096, "connections at a time", live=True)
    held_fraction: float = _knob(
        0.25, "of the arena, that routers and operators may have pinned for a time; 0 for none", live=True
    )


@dataclass(frozen=True, slots=True)
class QuotasConfig:
    """`[quotas]`: what the blocks of a salt may take. Ceilings, not reservations; empty for none."""

    dram: str = _knob("", "bytes of the arena that each salt may have, as 10GiB", live=True)
    nvme: str = _knob("", "bytes of all directories together that each salt may have", live=True)
    dram_salts: tuple[str, ...] = _knob(
        (), "SALT:BYTES of salts that may have more or less, as tenant-a:20GiB; tenant-a: for all", live=True
    )
    nvme_salts: tuple[str, ...] = _knob((), "the same on disk", live=True)

    @property
    def dram_bytes(self) -> tuple[int | None, dict[str, int | None]]:
        """For each salt, and of those with a quota of their own; None for no quota."""
        return _parse_quotas(self.dram, self.dram_salts, "dram")

    @property
    def nvme_bytes(self) -> tuple[int | None, dict[str, int | None]]:
        """The same on disk."""
        return _parse_quotas(self.nvme, self.nvme_salts, "nvme")


def _parse_quotas(
    default: str, salts: tuple[str, ...], name: str
) -> tuple[int | None, dict[str, int | None]]:
    salt_to_bytes: dict[str, int | None] = {}
    for text in salts:
        salt, colon, size = text.rpartition(":")
        if not colon or salt in salt_to_bytes:
            what = "names a salt twice" if colon else "has no salt"
            raise ConfigError(
                f'quotas.{name}_salts: {text!r} {what}; give SALT:BYTES once, as "tenant-a:20GiB"'
            )
        salt_to_bytes[salt] = parse_size(size, f"quotas.{name}_salts {salt}") if size else None
    return parse_size(default, f"quotas.{name}") if default else None, salt_to_bytes


@dataclass(frozen=True, slots=True)
class EventsConfig:
    """`[events]`: what the daemon tells of its blocks, to our indexes and to others' routers."""

    feed: str = _knob(
        "127.0.0.1:7404", "HOST:PORT for our indexes, port 0 for any; beyond loopback with a key"
    )
    key_file: str = _knob("", "file that `kvstore key` made: only who has the same one may follow the feed")
    registry: str = _knob("", "a Redis to register in, as redis://host:6379, where indexes find this daemon")
    advertise: str = _knob("", "HOST:PORT of the feed as indexes reach it; empty: as it listens")
    engines: tuple[str, ...] = _knob(
        (),
        "ADDRESS, or ADDRESS@MODEL, of each engine that uses this daemon, as routers know it; without any, "
        "others' routers are told nothing",
    )
    publish: str = _knob(
        "127.0.0.1:7402", "HOST:PORT for others' routers, as vLLM's events; used with engines"
    )
    replay: str = _knob("127.0.0.1:7403", "HOST:PORT where they can ask for what they have missed")
    ports: str = _knob(
        "shared",
        "shared: a topic for each engine; each: ports of its own, counted up, for routers without topics",
    )
    format: str = _knob("maps", "maps as vLLM 0.32 has them, or arrays as before, for llm-d and AIBrix")
    tokens: bool = _knob(False, "keep token ids, 4 bytes each, and tell them to others' routers")
    clear: bool = _knob(
        True,
        "say at start that all is cleared, or routers go on believing the daemon before; false where they "
        "would take that for the engine's own blocks, and that is worse",
    )
    topology: str = _knob(
        "", 'where this node is, as "zone/rack": one that has measured nothing is taken for its neighbours'
    )
    plain: bool = _knob(False, "let publish and replay be beyond loopback: who can connect may read them")

    @property
    def engine_addresses(self) -> list[str]:
        """Without their models, each once."""
        return list(dict.fromkeys(engine.partition("@")[0] for engine in self.engines))


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """`[[index.engines]]`: an engine whose KV events the index follows, or of which it is told the speed."""

    name: str = _knob("", "the engine's address, as routers know it")
    events: str = _knob("", "ZeroMQ endpoint of its events, as tcp://10.0.0.5:5557; empty for none")
    replay: str = _knob("", "that of its replay socket; without one, what is missed is lost")
    topic: str = _knob("", "the topic that it publishes under")
    kind: str = _knob("vllm", "vllm or sglang")
    model: str = _knob("", "the model, as requests name it")
    block_tokens: int = _knob(16, "tokens of a block, or of a page")
    hash: str = _knob(
        "",
        "its prefix-caching hash: sha256, sha256_cbor, xxhash or xxhash_cbor of vLLM, sha256 of SGLang; "
        "empty: whatever it is, keys are made anew of tokens, which costs more",
    )
    seed: str = _knob("", "PYTHONHASHSEED of the engine, if it has one")
    eagle: bool = _knob(False, "SGLang with EAGLE, whose pages are of pairs")
    ranks: int = _knob(
        1, "data-parallel ranks: each at the port plus its number, and by the name of ADDRESS#RANK"
    )
    nodes: tuple[str, ...] = _knob((), "names of daemons that it uses, beside those that name it")
    prefill_tokens_s: float = _knob(0.0, "tokens a second that it computes of a short prompt; 0: as [index]")
    prefill_pair_ns: float = _knob(
        0.0, "nanoseconds for each pair of a prompt's tokens beside that, in attention; 0: as [index]"
    )
    kv_bytes_per_token: float = _knob(
        0.0, "bytes of a token's keys and values in all layers; 0: as daemons measure its model"
    )


@dataclass(frozen=True, slots=True)
class IndexConfig:
    """`[index]`: who has how much of a prompt, for routers. `kvstore index` runs one."""

    embedded: bool = _knob(False, "run one beside this daemon, as a process of its own; it implies [events]")
    http: str = _knob("127.0.0.1:7405", "HOST:PORT of lookups, health and metrics, port 0 for any")
    data: str = _knob("127.0.0.1:7406", "HOST:PORT of compact lookups, port 0 for any; empty for none")
    nodes: tuple[str, ...] = _knob(
        (),
        "feeds of daemons: HOST:PORT, dns://NAME:PORT for all addresses of a name, or the URL of a Redis "
        "where they say that they are there",
    )
    key_file: str = _knob("", "file with the key of the feeds; else that of [events]")
    snapshot: str = _knob("", "file that holds what the index knows across restarts; empty for none")
    snapshot_s: float = _knob(60.0, "how often it is written")
    router_tokens: str = _knob(
        "", 'file with a line "NAME TOKEN" for each router, which may look up and report, and nothing else'
    )
    price: float = _knob(
        0.3, "the part of what others will wait for a prompt's work that counts in where it goes; 0: none"
    )
    prefill_tokens_s: float = _knob(
        10_000.0, "tokens a second that an engine computes of a short prompt; outcomes correct it"
    )
    prefill_pair_ns: float = _knob(3.4, "nanoseconds for each pair of a prompt's tokens beside that")
    rate: float = _knob(0.0, "requests a second that each token may make; 0 for any")
    blocks_max: int = _knob(4_000_000, "blocks that one publisher may claim, 100 to 300 bytes each")
    engines: tuple[EngineConfig, ...] = _knob((), "engines that publish events: a table each")


@dataclass(frozen=True, slots=True)
class Config:
    """All of it."""

    node: str = _knob(
        os.environ.get("KVSTORE_NODE") or socket.gethostname(),
        "this daemon's name in answers and metrics; else KVSTORE_NODE, or the host's name",
    )
    socket: str = _knob(default_socket(), "unix socket for clients of this node")
    take_over: bool = _knob(
        False, "where another daemon listens on the socket, it ends and hands its arena over to this one"
    )
    socket_mode: str = _knob("0660", "permissions of the socket: who may open it may read and write blocks")
    http: str = _knob(DEFAULT_HTTP, "health and metrics; port 0 for any")
    data: str = _knob("", "TCP for clients off this node, HOST:PORT; empty for none")
    token_file: str = _knob(
        "", "file with the token that TCP clients must know; also from KVSTORE_TOKEN", live=True
    )
    tls_certificate: str = _knob("", "PEM file: speak TLS on the data port")
    tls_key: str = _knob("", "PEM file of the certificate's key")
    log_level: str = _knob("info", "debug, info, warning or error", live=True)
    log_format: str = _knob("plain", "plain or json, one object a line", live=True)
    dram: DramConfig | None = None
    nvme: NvmeConfig | None = None
    redis: RedisConfig | None = None
    limits: LimitsConfig = LimitsConfig()
    quotas: QuotasConfig = QuotasConfig()
    events: EventsConfig | None = None
    index: IndexConfig = IndexConfig()

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
