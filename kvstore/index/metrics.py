"""What an index counts, as Prometheus reads it. Nothing is counted here: a scrape reads the statistics."""

import asyncio
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from itertools import accumulate, chain, islice

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from kvstore.index.engine_source import SourceStatistics
from kvstore.index.lookup_server import LookupServer
from kvstore.index.node_state import NodeStreamStatistics
from kvstore.index.saver import Saver
from kvstore.index.service import IndexStatistics
from kvstore.statistics import LATENCY_BOUNDS_S, Latencies

_LOCALITY = {
    "keys": "Blocks that somebody has, each counted once",
    "masks": "Sets of holders that are kept to be shared",
    "namespaces": "Namespaces that somebody has blocks in",
    "holdings": "Publishers that answers are made of",
    "to_tend": "What closed publishers have left that is not taken away yet",
}
# Totals that daemons and engines have both.
_TOTALS = {
    "gaps": "Times that something was missing between what came",
    "resyncs": "Times that all, or what was missed, was fetched",
    "restarts": "Times that a publisher was another one than before",
    "duplicates": "Messages that were here already",
    "malformed": "Messages that were none",
    "lost": "Batches that nobody had any more",
    "divergences": "Times that a publisher had something else than was known, though nothing was missing",
}


class IndexCollector(Collector):
    """Turns one reading of the statistics into metric families."""

    def __init__(self, read: Callable[[], IndexStatistics]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        now = self._read()
        for name, text in _LOCALITY.items():
            yield _gauge(name, text, getattr(now.locality, name))
        yield _gauge("uptime_seconds", "Seconds since start", now.uptime_s)
        yield _gauge("age_max_seconds", "Age of the oldest knowledge that lookups use", now.age_s)
        yield _gauge(
            "loop_late_max_seconds", "Longest lateness of the event loop since start", now.late_max_s
        )
        yield _gauge(
            "loop_stall_max_seconds",
            "Longest lateness of the event loop since start for which the process worked itself",
            now.stall_max_s,
        )
        yield _histogram("loop_late_seconds", "How late the event loop came to what was due", now.late)
        yield _histogram("lookup_seconds", "Seconds that lookups took, without HTTP", now.lookups)
        yield CounterMetricFamily(
            "kvstore_index_left_out",
            "Namespaces that lookups had no room for, each counted once a lookup",
            value=now.left_out,
        )
        yield _publishers(now)
        yield from _totals(now)
        yield from _speeds(now)
        yield from _reserving(now)
        yield _ignored(now)
        yield from _each(now)


def _publishers(now: IndexStatistics) -> Metric:
    """How many there are of each kind, by how they are."""
    gauges = GaugeMetricFamily(
        "kvstore_index_publishers", "Publishers, by what is known of them", labels=["kind", "state"]
    )
    states = Counter(("node", _node_state(node)) for node in now.nodes)
    states.update(("engine", _engine_state(each, now.engine_ages_s[each.name])) for each in now.engines)
    for kind in ("node", "engine"):
        for state in ("current", "filling", "incomplete", "silent", "unknown", "refused"):
            gauges.add_metric([kind, state], states[kind, state])
    return gauges


def _node_state(node: NodeStreamStatistics) -> str:
    if node.refused:
        return "refused"
    if node.silent:
        return "silent"
    if node.filling:
        return "filling"
    if math.isinf(node.age_s):
        return "unknown"
    return "incomplete" if node.over else "current"


def _engine_state(engine: SourceStatistics, age_s: float) -> str:
    if engine.muted:
        return "silent"
    if math.isinf(age_s):
        return "unknown"
    return "incomplete" if engine.incomplete or engine.over else "current"


def _totals(now: IndexStatistics) -> Iterator[Metric]:
    for name, text in _TOTALS.items():
        counters = CounterMetricFamily(f"kvstore_index_{name}", text, labels=["kind"])
        counters.add_metric(["node"], sum(getattr(node.counters, name, 0) for node in now.nodes))
        engine_name = "undecodable" if name == "malformed" else name
        counters.add_metric(["engine"], sum(getattr(engine, engine_name, 0) for engine in now.engines))
        yield counters


def _speeds(now: IndexStatistics) -> Iterator[Metric]:
    """What daemons have measured of themselves."""
    labels = ["node", "medium"]
    latency = GaugeMetricFamily(
        "kvstore_index_node_latency_seconds", "Seconds until a medium's first byte is there", labels=labels
    )
    bandwidth = GaugeMetricFamily(
        "kvstore_index_node_bytes_per_second", "Bytes per second from a medium, from then on", labels=labels
    )
    for node, speeds in now.speeds.speeds.items():
        for medium, speed in speeds.items():
            latency.add_metric([node, medium], speed.latency_s)
            bandwidth.add_metric([node, medium], speed.bytes_per_s)
    yield from (latency, bandwidth)
    yield CounterMetricFamily(
        "kvstore_index_refused_measures", "Figures of daemons that could not be", value=now.speeds.refused
    )


def _reserving(now: IndexStatistics) -> Iterator[Metric]:
    """What became of reserves, and of the holds that they are made of."""
    yield _gauge("reserves_open", "Reserves that are not over", now.reserving.open)
    for name, text in (
        ("reserves", "Reserves begun"),
        ("released", "Reserves ended before their time"),
        ("expired", "Reserves ended by their time"),
        ("refused", "Holds that daemons refused"),
        ("unanswered", "Holds that daemons did not answer in time"),
    ):
        what = name if name == "reserves" else f"reserves_{name}"
        yield CounterMetricFamily(f"kvstore_index_{what}", text, value=getattr(now.reserving, name))


def _ignored(now: IndexStatistics) -> Metric:
    counters = CounterMetricFamily(
        "kvstore_index_ignored", "Events and batches that were passed over, by why", labels=["kind", "why"]
    )
    whys: Counter[str] = Counter()
    for engine in now.engines:
        whys.update(engine.ignored)
    for why, count in sorted(whys.items()):
        counters.add_metric(["engine", why], count)
    counters.add_metric(["engine", "orphan"], sum(engine.orphans for engine in now.engines))
    counters.add_metric(["node", "namespace"], sum(node.counters.skipped for node in now.nodes))
    return counters


def _each(now: IndexStatistics) -> Iterator[Metric]:
    """What is worth a row for each publisher."""
    blocks = GaugeMetricFamily(
        "kvstore_index_blocks", "Blocks that a publisher has, in all media", labels=["kind", "publisher"]
    )
    ages = GaugeMetricFamily(
        "kvstore_index_age_seconds", "Age of what is known of a publisher", labels=["kind", "publisher"]
    )
    lag = GaugeMetricFamily(
        "kvstore_index_lag_now_seconds",
        "Seconds that a daemon's last message took, by the clocks of both machines",
        labels=["kind", "publisher"],
    )
    lags = HistogramMetricFamily(
        "kvstore_index_lag_seconds",
        "Seconds from an event to the index, by the clocks of both machines",
        labels=["kind", "publisher"],
    )
    for node in now.nodes:
        label = ["node", f"{node.name} {node.address}" if node.name else node.address]
        blocks.add_metric(label, node.blocks)
        lags.add_metric(label, _buckets(node.lags), node.lags.sum_s)
        if not math.isinf(node.age_s):
            ages.add_metric(label, node.age_s)
            lag.add_metric(label, node.lag_s)
    for engine in now.engines:
        blocks.add_metric(["engine", engine.name], engine.blocks)
        if not math.isinf(age_s := now.engine_ages_s[engine.name]):
            ages.add_metric(["engine", engine.name], age_s)
    yield from (blocks, ages, lag, lags)


class SaverCollector(Collector):
    """What is told of snapshots."""

    def __init__(self, saver: Saver) -> None:
        self._saver = saver

    def collect(self) -> Iterator[Metric]:
        saver = self._saver
        for name, text, count in (
            ("snapshots", "Snapshots written to disk", saver.written),
            ("failed_snapshots", "Snapshots that could not be written", saver.failed),
        ):
            yield CounterMetricFamily(f"kvstore_index_{name}", text, value=count)
        yield _gauge("snapshot_fork_seconds", "How long the last snapshot held lookups up", saver.fork_s)


class LookupsCollector(Collector):
    """What is told of compact lookups."""

    def __init__(self, server: LookupServer) -> None:
        self._server = server

    def collect(self) -> Iterator[Metric]:
        server = self._server
        yield _gauge("compact_connections", "Routers connected for compact lookups", server.connections)
        for name, text, count in (
            ("compact_lookups", "Compact lookups answered", server.lookups),
            ("compact_refused", "Requests for compact lookups that were refused", server.refused),
        ):
            yield CounterMetricFamily(f"kvstore_index_{name}", text, value=count)


def exposition(
    read: Callable[[], IndexStatistics],
    saver: Saver | None,
    lookups: LookupServer | None = None,
    *others: Collector,
) -> Callable[[], Awaitable[bytes]]:
    """A function that gives the text of /metrics.

    The statistics are read when it is called; the text is made beside the loop: 10 ms for 128 publishers.
    """
    collectors = [IndexCollector(read), *others]
    if saver is not None:
        collectors.append(SaverCollector(saver))
    if lookups is not None:
        collectors.append(LookupsCollector(lookups))

    async def exposed() -> bytes:
        begun = [_Begun(each) for each in collectors]
        return await asyncio.to_thread(lambda: b"".join(map(generate_latest, begun)))

    return exposed


class _Begun(Collector):
    """A collector that has read what it tells of, as all do before the first family."""

    def __init__(self, collector: Collector) -> None:
        families = iter(collector.collect())
        self._families = chain(list(islice(families, 1)), families)

    def collect(self) -> Iterator[Metric]:
        return self._families


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"kvstore_index_{name}", text, value=value)


def _histogram(name: str, text: str, latencies: Latencies) -> Metric:
    histogram = HistogramMetricFamily(f"kvstore_index_{name}", text, labels=[])
    histogram.add_metric([], _buckets(latencies), latencies.sum_s)
    return histogram


def _buckets(latencies: Latencies) -> Sequence[tuple[str, float]]:
    bounds = [*map(str, LATENCY_BOUNDS_S), "+Inf"]
    return list(zip(bounds, accumulate(latencies.counts), strict=True))
