"""What routing and the gate before it count, as Prometheus reads it. Nothing is counted here."""

from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from kvstore.gate import GateStatistics
from kvstore.index.placement import Engine
from kvstore.index.routing import RoutingStatistics
from kvstore.statistics import LATENCY_BOUNDS_S, Latencies


class RoutingCollector(Collector):
    """Prompts that were routed, what became of them, and how good the predictions were."""

    def __init__(
        self, read: Callable[[], RoutingStatistics], engines: Callable[[], Iterable[Engine]]
    ) -> None:
        """`engines` are those that the index knows: of names that routers say there is no series."""
        self._read = read
        self._engines = engines

    def collect(self) -> Iterator[Metric]:
        now = self._read()
        chooser = now.chooser
        for name, text, value in (
            ("routes_open", "Prompts that were routed and are under way", chooser.under_way),
            ("expected_keys", "Blocks expected in engines from prompts just routed", chooser.expected_keys),
        ):
            yield GaugeMetricFamily(f"kvstore_index_{name}", text, value=value)
        yield CounterMetricFamily("kvstore_index_routes", "Prompts that were routed", value=chooser.taken)
        yield _outcomes(now)
        yield _histogram(
            "prediction_error_seconds",
            "Difference of predicted and actual time to first token, either way",
            now.errors,
        )
        yield _histogram(
            "prediction_error_ratio", "The same as a part of the actual time to first token", chooser.errors
        )
        slowness = GaugeMetricFamily(
            "kvstore_index_engine_slowness",
            "How much longer an engine computes than it is meant to, by its outcomes",
            labels=["engine"],
        )
        for engine in self._engines():
            if (factor := chooser.engine_slowness.get(engine.name)) is not None:
                slowness.add_metric([engine.name], factor)
        yield slowness


class GateCollector(Collector):
    """Requests for values, by path and by who asked: names, never tokens."""

    def __init__(self, read: Callable[[], GateStatistics]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        now = self._read()
        paths = CounterMetricFamily(
            "kvstore_index_requests", "Requests, by path and status", labels=["path", "status"]
        )
        for (path, status), count in sorted(now.requests.items()):
            paths.add_metric([path, str(status)], count)
        callers = CounterMetricFamily(
            "kvstore_index_caller_requests",
            "Requests, by the name of the token and status",
            labels=["caller", "status"],
        )
        for (caller, status), count in sorted(now.callers.items()):
            callers.add_metric([caller, str(status)], count)
        yield from (paths, callers)


def _outcomes(now: RoutingStatistics) -> Metric:
    """What was reported of prompts, or was not."""
    outcomes = CounterMetricFamily(
        "kvstore_index_outcomes", "Reports of prompts that were routed, or none", labels=["what"]
    )
    chooser = now.chooser
    for what, count in (
        ("taken", chooser.outcomes - chooser.failed),
        ("failed", chooser.failed),
        ("missing", chooser.expired),
        ("late", now.late),
        ("unknown", now.unknown),
    ):
        outcomes.add_metric([what], count)
    return outcomes


def _histogram(name: str, text: str, latencies: Latencies) -> Metric:
    bounds = [*map(str, LATENCY_BOUNDS_S), "+Inf"]
    histogram = HistogramMetricFamily(f"kvstore_index_{name}", text, labels=[])
    buckets = list(zip(bounds, accumulate(latencies.counts), strict=True))
    histogram.add_metric([], buckets, latencies.sum_s)
    return histogram
