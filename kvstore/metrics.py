"""What a node counts, as Prometheus reads it. Nothing is counted here: a scrape reads the statistics."""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from kvstore.statistics import LATENCY_BOUNDS_S, Latencies, NodeStatistics, SaltState, TierState

_COUNTERS = {
    "reserved_blocks": "Blocks that writers reserved",
    "sealed_blocks": "Blocks that became readable",
    "aborted_blocks": "Reserved blocks that were dropped",
    "removed_blocks": "Blocks removed on request",
    "refused_blocks": "Blocks that found no room",
    "hit_blocks": "Blocks that readers asked for and got",
    "missed_blocks": "Blocks that readers asked for and did not get",
    "limited_requests": "Requests cut short by a client's limits",
    "evicted_blocks": "Blocks that left to make room",
    "evicted_bytes": "Bytes that left to make room",
    "moved_blocks": "Blocks moved within the arena to make room",
    "moved_bytes": "Bytes moved within the arena to make room",
}
_NODE_GAUGES = {
    "uptime_s": ("uptime_seconds", "Seconds since start"),
    "connections": ("connections", "Clients connected"),
    "leases": ("leases", "Leases held by connected clients"),
    "draining": ("draining", "Whether the node takes nothing new and writes what it has below"),
    "holds": ("holds", "Prefixes held for a time, for routers and operators"),
    "held_bytes": ("held_bytes", "Bytes that holds pin"),
    "quarantined_leases": ("quarantined_leases", "Leases of lost connections whose processes still live"),
    "loop_late_max_s": ("loop_late_max_seconds", "Longest lateness of the event loop since start"),
    "loop_stall_max_s": (
        "loop_stall_max_seconds",
        "Longest time since start that the event loop was late and busy",
    ),
}
_NODE_COUNTERS = {
    "refused_frames": "Connections ended for what they sent",
    "bytes_received": "Bytes received from clients",
    "bytes_sent": "Bytes sent to clients",
}
_EVENTS_GAUGES = {
    "seq": "Frames of events so far",
    "frames": "Frames of events that are kept",
    "frame_bytes": "Bytes of the frames of events that are kept",
    "subscribers": "Indexes that follow the feed of events",
    "topics": "Topics that events are announced under",
}
_EVENTS_COUNTERS = {
    "stored_blocks": "Blocks told of as stored in a medium",
    "removed_blocks": "Blocks told of as removed from a medium",
    "dropped": "Followers of the feed that were silent, or too slow",
    "refused": "Messages to the feed that were none",
    "refused_holds": "Holds that indexes wanted in vain",
}
_TIER_GAUGES = {
    "capacity_bytes": "Bytes that a tier was made with; of a remote one, of what the node remembers of it",
    "ready_bytes": "Bytes of a tier that are populated, and can be used",
    "used_bytes": "Bytes of a tier's slots in use; of a remote one 1 KiB for each block known there",
    "largest_free_bytes": "Bytes of the longest free piece of a tier",
    "blocks": "Blocks that can be read in a tier",
    "block_bytes": "Bytes of the blocks that can be read in a tier",
    "pending_blocks": "Blocks on their way into a tier",
    "pinned_blocks": "Blocks of a tier that somebody reads or copies",
    "pinned_bytes": "Bytes of the blocks of a tier that somebody reads or copies",
    "doomed_blocks": "Blocks of a tier that were removed while somebody reads them",
    "backlog_blocks": "Blocks that wait to be written to a tier",
    "backlog_bytes": "Bytes that wait to be written to a tier",
    "enabled": "Whether the configuration lets a tier be used",
    "breaker_open": "Whether a tier is left alone because it fails or is not enabled",
    "eviction_age_s": "Seconds for which the block that left a tier last had not been used",
    "limit_bytes": "Bytes of a tier that may be used, less than its capacity where that was lowered",
}
_TIER_COUNTERS = {
    "hit_blocks": "Blocks that readers asked for and a tier had, and none above it",
    "missed_blocks": "Blocks that readers asked for and neither a tier nor one above it had",
    "evicted_blocks": "Blocks that left a tier to make room",
    "evicted_bytes": "Bytes that left a tier to make room",
    "recovered_blocks": "Blocks that a tier held when it was opened",
    "read_blocks": "Blocks read from a tier",
    "read_bytes": "Bytes read from a tier",
    "written_blocks": "Blocks written to a tier",
    "written_bytes": "Bytes written to a tier",
    "dropped_blocks": "Blocks that left the tier above without having been written to a tier",
    "refused_blocks": "Blocks that a tier would not take, as where another's has the same name",
    "damaged_blocks": "Blocks of a tier that had other bytes than were written",
    "lost_blocks": "Blocks that were gone from a shared tier",
    "asked_blocks": "Blocks that a shared tier was asked for",
    "failed_calls": "Calls to a tier's device that failed",
    "late_calls": "Calls to a tier's device that took longer than they may",
    "breaker_opened": "Times that a tier was left alone because it failed",
}


class NodeCollector(Collector):
    """Turns one reading of the statistics into metric families."""

    def __init__(self, read: Callable[[], NodeStatistics]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        now = self._read()
        for name, text in _COUNTERS.items():
            yield _family(CounterMetricFamily, name, text, getattr(now.counters, name))
        for name, (metric, text) in _NODE_GAUGES.items():
            yield _family(GaugeMetricFamily, metric, text, getattr(now, name))
        for name, text in _NODE_COUNTERS.items():
            yield _family(CounterMetricFamily, name, text, getattr(now, name))
        if now.events is not None:
            for name, text in _EVENTS_GAUGES.items():
                yield _family(GaugeMetricFamily, f"events_{name}", text, getattr(now.events, name))
            for name, text in _EVENTS_COUNTERS.items():
                yield _family(CounterMetricFamily, f"events_{name}", text, getattr(now.events, name))
        yield from _tier_families(now.tiers)
        yield from _salt_families(now.salts)


def _tier_families(tiers: Sequence[TierState]) -> Iterator[Metric]:
    labels = ["tier", "medium"]
    for field, text in _TIER_GAUGES.items():
        name = field.removesuffix("_s") + "_seconds" if field.endswith("_s") else field
        gauges = GaugeMetricFamily(f"kvstore_tier_{name}", text, labels=labels)
        for tier in tiers:
            gauges.add_metric([tier.name, tier.medium], float(getattr(tier, field)))
        yield gauges
    for field, text in _TIER_COUNTERS.items():
        counters = CounterMetricFamily(f"kvstore_tier_{field}", text, labels=labels)
        for tier in tiers:
            counters.add_metric([tier.name, tier.medium], getattr(tier.counters, field))
        yield counters
    for name, what in (("reads", "reading from"), ("writes", "writing to")):
        histograms = HistogramMetricFamily(
            f"kvstore_tier_{name}_seconds",
            f"Seconds that calls took {what} a tier below the arena",
            labels=labels,
        )
        for tier in tiers:
            latencies: Latencies = getattr(tier, name)
            histograms.add_metric([tier.name, tier.medium], _buckets(latencies), latencies.sum_s)
        yield histograms


def _salt_families(salts: Sequence[SaltState]) -> Iterator[Metric]:
    """A bounded number of rows: those of the salts with most, and one of all others.

    Of the others there are no counters: who moves between them and the rest would make them fall.
    """
    labels = ["salt", "medium"]
    for name, field_name, text in (
        ("blocks", "blocks", "Blocks that a salt has in a medium"),
        ("bytes", "block_bytes", "Bytes of the blocks that a salt has in a medium"),
        ("quota_bytes", "quota_bytes", "Bytes that a salt may have in a medium, where it has a quota"),
    ):
        gauges = GaugeMetricFamily(f"kvstore_salt_{name}", text, labels=labels)
        for salt in salts:
            for use in salt.media:
                value = getattr(use, field_name)
                if value is not None:
                    gauges.add_metric([salt.label, use.medium], value)
        yield gauges
    for name, text in (
        ("hit_blocks", "Blocks that readers asked for and got, by salt"),
        ("missed_blocks", "Blocks that readers asked for and did not get, by salt"),
    ):
        counters = CounterMetricFamily(f"kvstore_salt_{name}", text, labels=labels[:1])
        for salt in salts:
            if salt.salt is not None:
                counters.add_metric([salt.label], getattr(salt, name))
        yield counters


def _buckets(latencies: Latencies) -> list[tuple[str, float]]:
    bounds = [*map(str, LATENCY_BOUNDS_S), "+Inf"]
    return list(zip(bounds, accumulate(latencies.counts), strict=True))


def exposition(read: Callable[[], NodeStatistics]) -> Callable[[], bytes]:
    """A function that gives the text of /metrics."""
    registry = CollectorRegistry()
    registry.register(NodeCollector(read))
    return lambda: generate_latest(registry)


def _family(
    kind: type[CounterMetricFamily] | type[GaugeMetricFamily], name: str, text: str, value: float
) -> Metric:
    return kind(f"kvstore_{name}", text, value=value)
