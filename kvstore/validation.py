"""Which settings are possible, alone and together. An error names the value, the limit and the remedy."""

import ipaddress
import re
from pathlib import Path

from kvstore.errors import ConfigError
from kvstore.index.settings import validate_index
from kvstore.knobs import Config, DramConfig, EventsConfig, NvmeConfig, RedisConfig, parse_endpoint

_TOPOLOGY = re.compile(r"|(?=.{1,256}$)[^/\s]+(/[^/\s]+)?")


def validate(config: Config) -> None:
    """Raise ConfigError for a value that is out of range, or does not go with another."""
    if config.dram is not None:
        _validate_dram(config.dram)
    if config.nvme is not None:
        _validate_nvme(config.nvme)
    if config.redis is not None:
        _validate_redis(config.redis)
    if config.events is not None:
        _validate_events(config.events)
    validate_index(config.index)
    _ = config.quotas.dram_bytes, config.quotas.nvme_bytes  # or ConfigError
    for name in ("client_pinned_fraction", "client_reserved_fraction"):
        value = getattr(config.limits, name)
        if not 0 < value <= 1:
            raise ConfigError(f"limits.{name} is {value}; give more than 0 and at most 1")
    if not 0 <= config.limits.held_fraction <= 1:
        raise ConfigError(f"limits.held_fraction is {config.limits.held_fraction}; give 0 to 1")
    if config.limits.clients < 1:
        raise ConfigError(f"limits.clients is {config.limits.clients}; give 1 or more")
    if not re.fullmatch(r"0?[0-7]{3}", config.socket_mode):
        raise ConfigError(f"socket_mode is {config.socket_mode!r}; give three octal digits, as 0660")
    if config.log_level not in ("debug", "info", "warning", "error"):
        raise ConfigError(f"log_level is {config.log_level!r}; give debug, info, warning or error")
    if config.log_format not in ("plain", "json"):
        raise ConfigError(f"log_format is {config.log_format!r}; give plain or json")
    if bool(config.tls_certificate) != bool(config.tls_key):
        raise ConfigError("tls_certificate and tls_key go together; give both or none")
    if not Path(config.socket).name:
        raise ConfigError(f"socket is {config.socket!r}; give the path of a file")
    for name, address in (
        ("http", config.http),
        ("data", config.data),
        ("index.http", config.index.http),
        ("index.data", config.index.data),
    ):
        if address and not is_loopback(parse_endpoint(address, name)[0]) and config.token is None:
            raise ConfigError(
                f"{name} is {address}, which is beyond loopback, and no token is set; give token_file"
            )


def _validate_dram(dram: DramConfig) -> None:
    if dram.capacity_bytes and dram.policy not in ("lru", "fifo"):
        raise ConfigError(f"dram.policy is {dram.policy!r}; give lru or fifo")
    low, high = dram.low_watermark, dram.high_watermark
    if not 0 < low <= high <= 1:
        raise ConfigError(
            f"dram.low_watermark is {low} and dram.high_watermark {high}; give 0 < low <= high <= 1"
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


def _validate_redis(redis: RedisConfig) -> None:
    if not redis.url:
        raise ConfigError("redis.url is empty; give redis://host:6379, or leave [redis] out")
    if redis.write not in ("behind", "owed"):
        raise ConfigError(f"redis.write is {redis.write!r}; give behind or owed")
    if bool(redis.tls_certificate) != bool(redis.tls_key):
        raise ConfigError("redis.tls_certificate and redis.tls_key go together; give both or none")
    if not 2 <= redis.threads <= 64:
        raise ConfigError(f"redis.threads is {redis.threads}; give 2 to 64, for readers and writers")
    if redis.admit_hits < 0:
        raise ConfigError(f"redis.admit_hits is {redis.admit_hits}; give 0 or more")
    if not 1024 <= redis.known_blocks <= 1 << 26:
        raise ConfigError(f"redis.known_blocks is {redis.known_blocks}; give 1024 to {1 << 26}")
    if redis.ttl_s and not 1 <= redis.ttl_s <= 1e9:
        raise ConfigError(f"redis.ttl_s is {redis.ttl_s}; give 0 for never, or 1 second or more")
    if not 0 <= redis.missing_s <= 3600:
        raise ConfigError(f"redis.missing_s is {redis.missing_s}; give 0 to 3600 seconds")
    if not 0.01 <= redis.timeout_s <= 600:
        raise ConfigError(f"redis.timeout_s is {redis.timeout_s}; give 0.01 to 600 seconds")


def _validate_events(events: EventsConfig) -> None:
    if events.ports not in ("shared", "each"):
        raise ConfigError(f"events.ports is {events.ports!r}; give shared or each")
    if events.format not in ("maps", "arrays"):
        raise ConfigError(f"events.format is {events.format!r}; give maps or arrays")
    for engine in events.engines:
        address, at, model = engine.partition("@")
        if not address or (at and not model):
            raise ConfigError(
                f'events.engines: {engine!r}; give ADDRESS or ADDRESS@MODEL, as "10.0.0.1:8000"'
            )
    if not _TOPOLOGY.fullmatch(events.topology):
        raise ConfigError(
            f'events.topology is {events.topology!r:.80}; give "zone/rack" or "zone", 256 characters at most'
        )
    if len(set(events.engines)) != len(events.engines):
        raise ConfigError(f"events.engines names an engine twice: {', '.join(events.engines)}")
    if not is_loopback(parse_endpoint(events.feed, "events.feed")[0]) and not events.key_file:
        raise ConfigError(
            f"events.feed is {events.feed}, which is beyond loopback, and no key is set; give key_file"
        )
    if events.registry and not events.advertise and parse_endpoint(events.feed)[0] in ("0.0.0.0", "::"):
        raise ConfigError(f"events.feed is {events.feed}, which nobody can reach; give events.advertise")
    for name in ("publish", "replay"):
        address = getattr(events, name)
        if not is_loopback(parse_endpoint(address, f"events.{name}")[0]) and not events.plain:
            raise ConfigError(
                f"events.{name} is {address}, which is beyond loopback, and whoever can connect may read "
                "what is announced; set plain = true if that is meant"
            )
    _check_ports(events)


def _check_ports(events: EventsConfig) -> None:
    """No port may be wanted twice, on whatever host."""
    engines = len(events.engine_addresses)
    doors = engines if events.ports == "each" else min(1, engines)
    wanted = [parse_endpoint(events.feed)[1]]
    for address in (events.publish, events.replay):
        port = parse_endpoint(address)[1]
        wanted += [port + number if port else 0 for number in range(doors)]
    ports = [port for port in wanted if port]
    if len(set(ports)) != len(ports) or max(wanted) > 65535:
        raise ConfigError(
            f"events: feed {events.feed}, publish {events.publish} and replay {events.replay} with {doors} "
            "ports each meet; give others"
        )


def is_loopback(host: str) -> bool:
    """Whether nobody beyond this machine can connect there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name may lead anywhere
        return False
