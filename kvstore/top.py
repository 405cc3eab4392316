"""What a node has done between two looks at its statistics. Arithmetic only: it neither asks nor prints.

Counters of a daemon that has started anew meanwhile are taken from its start on; no rate is below 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kvstore.block import Medium
from kvstore.statistics import Latencies, NodeStatistics, SaltState, StoreCounters, TierState


@dataclass(frozen=True, slots=True)
class Calls:
    """Calls to a tier in the interval: how many, and within which time half and 99 of 100 ended."""

    count: int
    p50_s: float
    p99_s: float


@dataclass(frozen=True, slots=True)
class TierRow:
    """One tier. Calls are None where there were none; `failing` says why it is left alone.

    How full a remote tier is, no node knows.
    """

    name: str
    medium: str
    used_bytes: int | None
    capacity_bytes: int | None
    blocks: int
    hits_per_s: float
    missed_per_s: float
    read_bytes_per_s: float
    written_bytes_per_s: float
    reads: Calls | None
    writes: Calls | None
    backlog_blocks: int
    backlog_bytes: int
    failing: str


@dataclass(frozen=True, slots=True)
class SaltRow:
    """One salt, or all others; `hit_rate` None where nothing was asked for."""

    label: str
    salt: str | None
    medium_to_bytes: dict[str, int]
    hits_per_s: float
    missed_per_s: float
    hit_rate: float | None


@dataclass(frozen=True, slots=True)
class Frame:
    """One look at a node. The loop's lateness is the longest since its start."""

    node: str
    epoch: int
    uptime_s: float
    connections: int
    loop_late_max_s: float
    loop_stall_max_s: float
    hits_per_s: float
    missed_per_s: float
    hit_rate: float | None
    tiers: list[TierRow]
    salts: list[SaltRow]


def frame(before: NodeStatistics, now: NodeStatistics) -> Frame:
    """What happened between two readings of one node's statistics, by the daemon's own clock."""
    if before.epoch == now.epoch:
        elapsed_s = now.uptime_s - before.uptime_s
        counters, tiers, salts = before.counters, before.tiers, before.salts
    else:
        elapsed_s, counters, tiers, salts = now.uptime_s, StoreCounters(), [], []
    name_to_tier = {tier.name: tier for tier in tiers}
    name_to_salt = {salt.salt: salt for salt in salts}
    hits = _gained(counters.hit_blocks, now.counters.hit_blocks)
    missed = _gained(counters.missed_blocks, now.counters.missed_blocks)
    return Frame(
        now.node,
        now.epoch,
        now.uptime_s,
        now.connections,
        now.loop_late_max_s,
        now.loop_stall_max_s,
        _rate(hits, elapsed_s),
        _rate(missed, elapsed_s),
        _share(hits, missed),
        [_tier(name_to_tier.get(tier.name), tier, elapsed_s) for tier in now.tiers],
        [_salt(name_to_salt.get(salt.salt), salt, elapsed_s) for salt in now.salts],
    )


def _tier(before: TierState | None, now: TierState, elapsed_s: float) -> TierRow:
    def per_s(name: str) -> float:
        earlier = 0 if before is None else getattr(before.counters, name)
        return _rate(_gained(earlier, getattr(now.counters, name)), elapsed_s)

    remote = now.medium == Medium.REMOTE
    return TierRow(
        now.name,
        now.medium,
        None if remote else now.used_bytes,
        None if remote else now.limit_bytes or now.capacity_bytes,
        now.blocks,
        per_s("hit_blocks"),
        per_s("missed_blocks"),
        per_s("read_bytes"),
        per_s("written_bytes"),
        _calls(None if before is None else before.reads, now.reads),
        _calls(None if before is None else before.writes, now.writes),
        now.backlog_blocks,
        now.backlog_bytes,
        now.failing or ("it fails" if now.breaker_open else ""),
    )


def _salt(before: SaltState | None, now: SaltState, elapsed_s: float) -> SaltRow:
    hits = _gained(0 if before is None else before.hit_blocks, now.hit_blocks)
    missed = _gained(0 if before is None else before.missed_blocks, now.missed_blocks)
    rates = _rate(hits, elapsed_s), _rate(missed, elapsed_s)
    return SaltRow(now.label, now.salt, now.medium_to_bytes, *rates, _share(hits, missed))


def _calls(before: Latencies | None, now: Latencies) -> Calls | None:
    earlier: Sequence[int] = [0] * len(now.counts) if before is None else before.counts
    gained = Latencies([_gained(was, counts) for was, counts in zip(earlier, now.counts, strict=True)])
    return Calls(gained.count, gained.at_most_s(0.5), gained.at_most_s(0.99)) if gained.count else None


def _gained(before: int, now: int) -> int:
    return max(0, now - before)


def _rate(gained: int, elapsed_s: float) -> float:
    return gained / elapsed_s if elapsed_s > 0 else 0.0


def _share(hits: int, missed: int) -> float | None:
    return hits / (hits + missed) if hits + missed else None
