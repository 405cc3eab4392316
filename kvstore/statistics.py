"""What a node counts, as it travels to clients, to /metrics and to the command line. Values only."""

from bisect import bisect_left
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import accumulate
from math import inf
from typing import Final

# Upper bounds of the buckets of latencies, in seconds; a last bucket takes what is longer.
LATENCY_BOUNDS_S: Final = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


@dataclass(slots=True)
class StoreCounters:
    """Totals since the daemon's start, in blocks unless named otherwise."""

    reserved_blocks: int = 0
    sealed_blocks: int = 0
    aborted_blocks: int = 0
    removed_blocks: int = 0
    refused_blocks: int = 0
    hit_blocks: int = 0
    missed_blocks: int = 0
    limited_requests: int = 0
    evicted_blocks: int = 0
    evicted_bytes: int = 0
    moved_blocks: int = 0
    moved_bytes: int = 0


@dataclass(slots=True)
class Latencies:
    """How long calls took: `counts` has a number for each bucket of LATENCY_BOUNDS_S, one for the rest."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(LATENCY_BOUNDS_S) + 1))
    sum_s: float = 0.0

    def observe(self, seconds: float) -> None:
        """One more call."""
        self.counts[bisect_left(LATENCY_BOUNDS_S, seconds)] += 1
        self.sum_s += seconds

    @property
    def count(self) -> int:
        """Calls so far."""
        return sum(self.counts)

    def at_most_s(self, fraction: float) -> float:
        """The upper bound of the bucket within which this fraction of calls ended; infinite above all."""
        bounds = (*LATENCY_BOUNDS_S, inf)
        reached = accumulate(self.counts)
        return next(bound for bound, n in zip(bounds, reached, strict=True) if n >= fraction * self.count)


@dataclass(slots=True)
class TierCounters:
    """Totals of one tier since the daemon's start, in blocks unless named otherwise.

    A block is missed in a tier when a reader asked for it and neither this tier nor one above had it.
    `dropped` left the tier above without having been written here; `refused` is what the tier would not take,
    such as another's block of the same name; `damaged` had other bytes than were written; `lost` were gone
    from a shared tier, which was asked for `asked`. Calls are those to the device: `failed` with an error,
    `late` beyond their time limit.
    """

    hit_blocks: int = 0
    missed_blocks: int = 0
    evicted_blocks: int = 0
    evicted_bytes: int = 0
    recovered_blocks: int = 0
    read_blocks: int = 0
    read_bytes: int = 0
    written_blocks: int = 0
    written_bytes: int = 0
    dropped_blocks: int = 0
    refused_blocks: int = 0
    damaged_blocks: int = 0
    lost_blocks: int = 0
    asked_blocks: int = 0
    failed_calls: int = 0
    late_calls: int = 0
    breaker_opened: int = 0


@dataclass(frozen=True, slots=True)
class TierState:
    """One tier now. `used_bytes` counts slots, `block_bytes` the readable blocks on them.

    Of a remote tier `used_bytes` and `capacity_bytes` are of the node's memory of it, and say nothing of it.

    `limit_bytes` is how much of the capacity may be used, less where that was lowered while the daemon ran.
    `backlog` is what waits to be written here, `breaker_open` whether the tier is left alone because it fails
    or is not `enabled`, `failing` why, and `eviction_age_s` how long ago the block that left last had been
    used.
    """

    name: str
    medium: str
    capacity_bytes: int
    ready_bytes: int
    used_bytes: int
    largest_free_bytes: int
    blocks: int
    block_bytes: int
    pending_blocks: int
    pinned_blocks: int
    pinned_bytes: int
    doomed_blocks: int
    backlog_blocks: int = 0
    backlog_bytes: int = 0
    enabled: bool = True
    breaker_open: bool = False
    eviction_age_s: float = 0.0
    limit_bytes: int = 0
    failing: str = ""
    counters: TierCounters = field(default_factory=TierCounters)
    reads: Latencies = field(default_factory=Latencies)
    writes: Latencies = field(default_factory=Latencies)


@dataclass(frozen=True, slots=True)
class SaltUse:
    """What one salt has in one medium, blocks being written, loaded or removed included."""

    medium: str
    blocks: int
    block_bytes: int
    quota_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class SaltState:
    """One salt now; `salt` None is all together that are not told of one by one.

    Hits and misses count from when the salt came into use; of one that nobody uses any more nothing is kept.
    """

    salt: str | None
    hit_blocks: int
    missed_blocks: int
    media: list[SaltUse] = field(default_factory=list)

    @property
    def medium_to_bytes(self) -> dict[str, int]:
        """Of its blocks, fastest medium first."""
        return {use.medium: use.block_bytes for use in self.media}

    @property
    def label(self) -> str:
        """What may be shown to everybody: a salt can be a secret, so it is the first bytes of its digest."""
        if not self.salt:
            return "other" if self.salt is None else "none"
        return blake2b(self.salt.encode(errors="surrogatepass"), digest_size=6).hexdigest()


@dataclass(frozen=True, slots=True)
class EventsState:
    """What is told of blocks. `seq` is that of the last frame, of which the last `frames` are kept.

    `dropped` subscribers were silent or too slow, `refused` are messages of theirs that were none. `topics`
    are those announced to others' routers, `refused_holds` what indexes wanted held in vain.
    """

    seq: int
    frames: int
    frame_bytes: int
    stored_blocks: int
    removed_blocks: int
    subscribers: int
    dropped: int
    refused: int
    topics: int = 0
    refused_holds: int = 0


@dataclass(frozen=True, slots=True)
class NodeStatistics:
    """Everything a daemon has to say of itself.

    `loop_late_max_s` is the longest time since start by which the event loop was late, for whatever reason,
    and `loop_stall_max_s` the longest in which it was late and busy itself: the difference is the system's.
    `quarantined_leases` are those of lost connections whose processes may still touch their slots. `holds`
    are prefixes held for whoever maps nothing, as routers, with `held_bytes` pinned.
    """

    node: str
    epoch: int
    uptime_s: float
    connections: int
    leases: int
    quarantined_leases: int
    refused_frames: int
    loop_late_max_s: float
    loop_stall_max_s: float
    bytes_received: int
    bytes_sent: int
    tiers: list[TierState] = field(default_factory=list)
    counters: StoreCounters = field(default_factory=StoreCounters)
    salts: list[SaltState] = field(default_factory=list)
    draining: bool = False
    events: EventsState | None = None
    holds: int = 0
    held_bytes: int = 0
