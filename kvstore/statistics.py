"""What a node counts, as it travels to clients, to /metrics and to the command line. Values only."""

from dataclasses import dataclass, field


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


@dataclass(frozen=True, slots=True)
class TierState:
    """One tier now. `used_bytes` counts slots, `block_bytes` the readable blocks on them."""

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


@dataclass(frozen=True, slots=True)
class NodeStatistics:
    """Everything a daemon has to say of itself.

    `loop_late_max_s` is the longest time since start by which the event loop was late, for whatever reason,
    and `loop_stall_max_s` the longest in which it was late and busy itself: the difference is the system's.
    `quarantined_leases` are those of lost connections whose processes may still touch their slots.
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
