"""What can change while the daemon runs: its file is read again, and what is live is applied.

Nothing is applied piece by piece: whoever has a setting is told what it is now, changed or not.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from typing import Any

from kvstore import logs
from kvstore.block import Medium
from kvstore.config import Config
from kvstore.errors import ConfigError
from kvstore.node.accounts import Quotas
from kvstore.node.policy import POLICIES
from kvstore.node.rules import Rules
from kvstore.node.server import Limits, Server
from kvstore.validation import validate

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Change:
    """Names of settings: those that changed, and those that are otherwise in the file but need a restart."""

    changed: list[str]
    needs_restart: list[str]


@dataclass(frozen=True, slots=True)
class TierSettings:
    """What is live of a tier below the arena. Without `capacity_bytes` it has what it was made with."""

    enabled: bool
    policy: str
    rules: Rules
    capacity_bytes: int | None


class Live:
    """The settings of a running daemon. `read` gives the configuration as its file and flags are by then."""

    def __init__(self, config: Config, server: Server, read: Callable[[], Config]) -> None:
        self._made = self._running = config
        self._server = server
        self._read = read
        self._one_at_a_time = asyncio.Lock()

    async def reload(self) -> Change:
        """Read the file again and apply what can be.

        Raises:
            ConfigError: the file is wrong, or wants together what only a restart can give. Nothing changed.
        """
        async with self._one_at_a_time:
            try:
                wanted = await asyncio.to_thread(self._read)
                running, change = compare(self._running, wanted, self._made)
                token = await asyncio.to_thread(lambda: running.token)
            except ConfigError as error:
                logger.error("reload: %s; nothing has changed", error)
                raise
            if token != self._server.token and "token_file" not in change.changed:
                change.changed.append("token_file")
            self._running = running
            self.apply(token)
        changed, others = ", ".join(change.changed) or "nothing", ", ".join(change.needs_restart)
        logger.info("reload: changed %s%s", changed, others and f"; needs a restart: {others}")
        return change

    def apply(self, token: str | None) -> None:
        """Tell everyone what is."""
        config, server = self._running, self._server
        assert config.dram is not None
        store = server.store
        logs.configure(config.log_level, config.log_format, config.node)
        store.movements.set_limit(store.arena, config.dram.capacity_bytes)
        store.arena.directory.set_policy(POLICIES[config.dram.policy])
        for lower, settings in zip(store.movements.lowers, tier_settings(config), strict=True):
            store.movements.set_rules(lower, settings.rules)
            lower.directory.set_policy(POLICIES[settings.policy])
            if settings.capacity_bytes is not None:
                store.movements.set_limit(lower, settings.capacity_bytes)
            if settings.enabled != lower.enabled:
                lower.turn(on=settings.enabled)
        server.token = token
        server.set_limits(limits(config))
        store.salts.set_quotas(quotas(config))


def limits(config: Config) -> Limits:
    """What may be held."""
    return Limits(**asdict(config.limits))


def quotas(config: Config) -> dict[Medium, Quotas]:
    """What salts may have."""
    return {
        Medium.DRAM: Quotas(*config.quotas.dram_bytes),
        Medium.NVME: Quotas(*config.quotas.nvme_bytes),
    }


def tier_settings(config: Config) -> list[TierSettings]:
    """Of each tier below the arena, in their order."""
    nvme, redis, dram = config.nvme, config.redis, config.dram
    settings = []
    if nvme is not None and dram is not None:
        rules = Rules(
            on_eviction=nvme.write == "on-eviction",
            exclusive=nvme.exclusive,
            admit_hits=nvme.admit_hits,
            high_watermark=dram.high_watermark,
            low_watermark=dram.low_watermark,
            timeout_s=nvme.timeout_s,
            jobs=nvme.threads,
        )
        settings += [TierSettings(nvme.enabled, nvme.policy, rules, nbytes) for _, nbytes in nvme.places]
    if redis is not None:
        rules = Rules(
            owed=redis.write == "owed",
            admit_hits=redis.admit_hits,
            timeout_s=redis.timeout_s,
            jobs=redis.threads,
        )
        settings.append(TierSettings(redis.enabled, "lru", rules, None))
    return settings


def compare(running: Config, wanted: Config, made: Config) -> tuple[Config, Change]:
    """The running configuration with what of the wanted one can be had now, and what that changes.

    `made` is what the daemon began with: what has been made no larger cannot grow beyond it.

    Raises:
        ConfigError: what can be had does not go with what stays.
    """
    change = Change([], [])
    values: dict[str, Any] = {}
    for section in fields(Config):
        now: Any = getattr(running, section.name)
        new = getattr(wanted, section.name)
        if is_dataclass(now) and not isinstance(now, type) and is_dataclass(new):
            taken = _taken(now, new, getattr(made, section.name), f"{section.name}.", change)
            values[section.name] = replace(now, **taken)
    values |= _taken(running, wanted, made, "", change)
    config = replace(running, **values)
    validate(config)
    return config, change


def _taken(now: Any, new: Any, made: Any, prefix: str, change: Change) -> dict[str, Any]:
    """The knobs of a section that change; all that differ are named."""
    values: dict[str, Any] = {}
    for knob in fields(now):
        name, before, value = f"{prefix}{knob.name}", getattr(now, knob.name), getattr(new, knob.name)
        if value == before or (is_dataclass(value) and is_dataclass(before)):
            continue
        if knob.metadata.get("live") and _within(name, new, made):
            values[knob.name] = value
            change.changed.append(name)
        else:
            change.needs_restart.append(name)
    return values


def _within(name: str, new: Any, made: Any) -> bool:
    """Whether a capacity is no more than what was made, and of the same places."""
    if name == "dram.capacity":
        return bool(new.capacity_bytes <= made.capacity_bytes)
    if name == "nvme.directories":
        there = dict(made.places)
        same = [path for path, _ in new.places] == [*there]
        return same and all(nbytes <= there[path] for path, nbytes in new.places)
    return True
