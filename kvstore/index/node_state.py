"""What one feed counts, and its state as others see it. Values, no rules."""

from dataclasses import dataclass

from kvstore.statistics import Latencies


@dataclass(slots=True)
class NodeStreamCounters:
    """Totals of one feed. `resyncs` are snapshots that took the place of what was known, `skipped` events
    of namespaces that are none.
    """

    gaps: int = 0
    duplicates: int = 0
    resyncs: int = 0
    restarts: int = 0
    divergences: int = 0
    malformed: int = 0
    skipped: int = 0


@dataclass(frozen=True, slots=True)
class NodeStreamStatistics:
    """One feed now. `epoch` and `seq` are None as long as nothing is known.

    `age_s` is how long ago all of it was known, infinite for never; `lag_s` how long the last events, or a
    heartbeat since, had taken to get here, by the clocks of both machines, `lags` of events alone; `filling`
    whether a snapshot is under way; `refused` why the daemon is not listened to.
    """

    address: str
    name: str | None
    epoch: int | None
    seq: int | None
    engines: tuple[str, ...]
    blocks: int
    over: bool
    silent: bool
    filling: bool
    refused: str
    age_s: float
    lag_s: float
    lags: Latencies
    counters: NodeStreamCounters
