"""What a node counts, as Prometheus reads it. Nothing is counted here: a scrape reads the statistics."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from kvstore.statistics import (
    LATENCY_BOUNDS_S,
    Latencies,
    NodeStatistics,
    SaltState,
    StoreCounters,
    TierCounters,
    TierState,
)

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


class NodeCollector(Collector):
    """Turns one reading of the statistics into metric families."""

    def __init__(self, read: Callable[[], NodeStatistics]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        now = self._read()
        for counter in fields(StoreCounters):
            yield _family(
                CounterMetricFamily,
                counter.name,
                _COUNTERS[counter.name],
                getattr(now.counters, counter.name),
            )
        for name, (metric, text) in _NODE_GAUGES.items():
            yield _family(GaugeMetricFamily, metric, text, getattr(now, name))
        for name, text in _NODE_COUNTERS.items():
            yield _family(CounterMetricFamily, name, text, getattr(now, name))
        yield from _tier_families(now.tiers)
        yield from _salt_families(now.salts)


def _tier_families(tiers: Sequence[TierState]) -> Iterator[Metric]:
    labels = ["tier", "medium"]
    for gauge in fields(TierState):
        if gauge.name in ("name", "medium", "failing", "counters", "reads", "writes"):
            continue
        name = gauge.name.removesuffix("_s") + "_seconds" if gauge.name.endswith("_s") else gauge.name
        gauges = GaugeMetricFamily(f"kvstore_tier_{name}", f"{_words(gauge.name)} of a tier", labels=labels)
        for tier in tiers:
            gauges.add_metric([tier.name, tier.medium], float(getattr(tier, gauge.name)))
        yield gauges
    for counter in fields(TierCounters):
        text = f"{_words(counter.name)} of a tier"
        counters = CounterMetricFamily(f"kvstore_tier_{counter.name}", text, labels=labels)
        for tier in tiers:
            counters.add_metric([tier.name, tier.medium], getattr(tier.counters, counter.name))
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


def _words(name: str) -> str:
    return name.removesuffix("_s").replace("_", " ").capitalize()


def exposition(read: Callable[[], NodeStatistics]) -> Callable[[], bytes]:
    """A function that gives the text of /metrics."""
    registry = CollectorRegistry()
    registry.register(NodeCollector(read))
    return lambda: generate_latest(registry)


def _family(
    kind: type[CounterMetricFamily] | type[GaugeMetricFamily], name: str, text: str, value: float
) -> Metric:
    return kind(f"kvstore_{name}", text, value=value)
