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
from kvstore.index.estimate import Prefill
from kvstore.index.membership import source_of
from kvstore.index.placement import Engine
from kvstore.index.traits import STEP_S, Pace
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
    ranks = [rank for engine in config.engines if engine.events for rank in _ranks(engine)]
    for name, count in Counter(rank.engine.name for rank in ranks).items():
        if count > 1:
            raise ConfigError(f"index.engines: {name} is there {count} times; give each engine its own name")
    return ranks


def paces_of(config: IndexConfig) -> tuple[dict[str, Pace], Pace]:
    """How fast engines are meant to be that are named, and all others."""
    return {engine.name: _pace(config, engine) for engine in config.engines}, _pace(config, EngineConfig())


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
    if config.data:
        parse_endpoint(config.data, "index.data")
    for place in config.nodes:
        source_of(place)
    if not 1 <= config.snapshot_s <= 86400:
        raise ConfigError(f"index.snapshot_s is {config.snapshot_s}; give 1 to 86400 seconds")
    if not 1 <= config.blocks_max <= 1 << 30:
        raise ConfigError(f"index.blocks_max is {config.blocks_max}; give 1 to {1 << 30}")
    if not 0 <= config.rate <= 1e6:
        raise ConfigError(
            f"index.rate is {config.rate}; give 0 for any, or at most 1000000 requests a second"
        )
    _validate_pace("index", config, 1)
    if not 0 <= config.price <= 100:
        raise ConfigError(f"index.price is {config.price}; give 0 to 100")
    for engine in config.engines:
        _validate_pace(f"index.engines {engine.name}", engine, 0)
        if not 0 <= engine.kv_bytes_per_token <= 1 << 30:
            raise ConfigError(
                f"index.engines {engine.name}: kv_bytes_per_token is {engine.kv_bytes_per_token}; "
                "give at most 1 GiB, 0 for as measured"
            )
        if not engine.events:
            _validate_engine_alone(engine)
    ranks_of(config)


def _pace(config: IndexConfig, engine: EngineConfig) -> Pace:
    tokens_s = engine.prefill_tokens_s or config.prefill_tokens_s
    pair_ns = engine.prefill_pair_ns or config.prefill_pair_ns
    return Pace(Prefill(STEP_S, 1 / tokens_s, pair_ns * 1e-9), engine.kv_bytes_per_token or None)


def _validate_pace(where: str, config: IndexConfig | EngineConfig, least: float) -> None:
    if not (least <= config.prefill_tokens_s <= 1e9) or 0 < config.prefill_tokens_s < 1:
        raise ConfigError(
            f"{where}: prefill_tokens_s is {config.prefill_tokens_s}; give 1 to 1e9 tokens a second"
        )
    if not 0 <= config.prefill_pair_ns <= 1e6:
        raise ConfigError(f"{where}: prefill_pair_ns is {config.prefill_pair_ns}; give 0 to 1e6 nanoseconds")


def _validate_engine_alone(engine: EngineConfig) -> None:
    """One that publishes no events is known by what daemons say of it; here it is said how fast it is."""
    has_pace = engine.prefill_tokens_s or engine.prefill_pair_ns or engine.kv_bytes_per_token
    if not engine.name or not has_pace:
        _ranks(engine)  # which says what is missing
    if engine.nodes or engine.replay or engine.ranks != 1:
        raise ConfigError(
            f"index.engines {engine.name}: nodes, replay or ranks without events; give events too"
        )


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
