"""What `[index]` means: which engines publish where, and under which schemes. It checks; it opens nothing."""

import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import Final

from kvstore.engine_hashes import VLLM_ALGORITHMS
from kvstore.engine_keys import vllm_scheme
from kvstore.errors import ConfigError, InvalidRequest
from kvstore.hashing import VLLM_SEED
from kvstore.index.engine_source import EngineKind, EngineSource
from kvstore.index.membership import source_of
from kvstore.index.placement import Engine
from kvstore.knobs import Config, EngineConfig, IndexConfig, RedisConfig, parse_endpoint

_RANKS_MAX: Final = 1024
# Where to connect to who listens everywhere.
_LOOPBACK: Final = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}
_ENDPOINT: Final = re.compile(r"(tcp://.+):(\d{1,5})")


@dataclass(frozen=True, slots=True)
class Rank:
    """One publisher of an engine, and what answers are told about it."""

    source: EngineSource
    engine: Engine


def ranks_of(config: IndexConfig) -> list[Rank]:
    """All publishers that are engines.

    Raises:
        ConfigError: a setting is out of range, or says the same twice.
    """
    ranks = [rank for engine in config.engines for rank in _ranks(engine)]
    for name, count in Counter(rank.engine.name for rank in ranks).items():
        if count > 1:
            raise ConfigError(f"index.engines: {name} is there {count} times; give each engine its own name")
    return ranks


def beside(config: Config, feed: str) -> Config:
    """What an index is told that runs beside a daemon, whose feed is bound to HOST:PORT."""
    host, port = parse_endpoint(feed, "events.feed")
    here = _LOOPBACK.get(host, f"[{host}]" if ":" in host else host)
    nodes = (f"{config.node}={here}:{port}", *config.index.nodes)
    return replace(config, index=replace(config.index, nodes=nodes))


def registry_prefix(config: Config) -> str:
    """What names in a registry begin with: the same as those of blocks in Redis, used or not."""
    return (config.redis or RedisConfig()).prefix


def validate_index(config: IndexConfig) -> None:
    """Raise ConfigError for a value that is out of range."""
    parse_endpoint(config.http, "index.http")
    for place in config.nodes:
        source_of(place)
    if not 1 <= config.snapshot_s <= 86400:
        raise ConfigError(f"index.snapshot_s is {config.snapshot_s}; give 1 to 86400 seconds")
    if not 1 <= config.blocks_max <= 1 << 30:
        raise ConfigError(f"index.blocks_max is {config.blocks_max}; give 1 to {1 << 30}")
    ranks_of(config)


def _ranks(engine: EngineConfig) -> list[Rank]:
    if not engine.name or not engine.events or not engine.model:
        raise ConfigError(
            f"index.engines: name is {engine.name!r}, events {engine.events!r} and model {engine.model!r}; "
            "give all three"
        )
    if not 1 <= engine.ranks <= _RANKS_MAX:
        raise ConfigError(f"index.engines {engine.name}: ranks is {engine.ranks}; give 1 to {_RANKS_MAX}")
    if not 1 <= engine.block_tokens <= 1 << 20:
        raise ConfigError(
            f"index.engines {engine.name}: block_tokens is {engine.block_tokens}; give 1 to {1 << 20}"
        )
    if engine.kind not in tuple(EngineKind):
        raise ConfigError(f"index.engines {engine.name}: kind is {engine.kind!r}; give vllm or sglang")
    scheme = _scheme(engine)
    return [_rank(engine, rank, scheme) for rank in range(engine.ranks)]


def _rank(engine: EngineConfig, rank: int, scheme: str) -> Rank:
    name = f"{engine.name}#{rank}" if engine.ranks > 1 else engine.name
    source = EngineSource(
        name=name,
        kind=EngineKind(engine.kind),
        model=engine.model,
        block_tokens=engine.block_tokens,
        scheme=scheme,
        endpoint=_endpoint(engine, engine.events, rank),
        replay=_endpoint(engine, engine.replay, rank) if engine.replay else "",
        topic=engine.topic,
    )
    return Rank(source, Engine(name, engine.nodes, engine.model))


def _endpoint(engine: EngineConfig, text: str, rank: int) -> str:
    match = _ENDPOINT.fullmatch(text)
    if match is None or int(match[2]) + rank > 65535:
        raise ConfigError(
            f"index.engines {engine.name}: endpoint {text!r} for rank {rank}; give tcp://HOST:PORT"
        )
    return f"{match[1]}:{int(match[2]) + rank}"


def _scheme(engine: EngineConfig) -> str:
    """How the keys are made that the engine's blocks have here."""
    algorithms = VLLM_ALGORITHMS if engine.kind == EngineKind.VLLM else ("sha256",)
    if engine.hash and engine.hash not in algorithms:
        raise ConfigError(
            f"index.engines {engine.name}: hash is {engine.hash!r}; "
            f"give one of {', '.join(algorithms)}, or none"
        )
    if engine.kind == EngineKind.SGLANG:
        return ("sglang" if engine.hash else "tokens") + ("-eagle" if engine.eagle else "")
    if not engine.hash:
        return "tokens"
    if engine.hash.startswith("xxhash") and not engine.seed:
        raise ConfigError(
            f"index.engines {engine.name}: hash is {engine.hash} without a seed, which is then a "
            "secret of each process; set PYTHONHASHSEED there and seed here"
        )
    try:
        return vllm_scheme(engine.hash, engine.seed or VLLM_SEED)
    except InvalidRequest as exc:
        raise ConfigError(f"index.engines {engine.name}: {exc}") from exc
