"""What a node counts, as Prometheus reads it. Nothing is counted here: a scrape reads the statistics."""

from collections.abc import Callable, Iterator
from dataclasses import fields

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvstore.statistics import NodeStatistics, StoreCounters, TierState

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
        for gauge in fields(TierState):
            if gauge.name in ("name", "medium"):
                continue
            family = GaugeMetricFamily(
                f"kvstore_tier_{gauge.name}",
                f"{gauge.name.replace('_', ' ')} of a tier",
                labels=["tier", "medium"],
            )
            for tier in now.tiers:
                family.add_metric([tier.name, tier.medium], getattr(tier, gauge.name))
            yield family


def exposition(read: Callable[[], NodeStatistics]) -> Callable[[], bytes]:
    """A function that gives the text of /metrics."""
    registry = CollectorRegistry()
    registry.register(NodeCollector(read))
    return lambda: generate_latest(registry)


def _family(
    kind: type[CounterMetricFamily] | type[GaugeMetricFamily], name: str, text: str, value: float
) -> Metric:
    return kind(f"kvstore_{name}", text, value=value)
