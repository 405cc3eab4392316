"""What the router counts, as Prometheus reads it."""

from collections.abc import Callable, Iterable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from connectors.proxy.engine import Engine

_TTFT_BOUNDS_S: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_LOOKUP_BOUNDS_S: Final = (5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25)


class Metrics:
    """Counts since start."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = self._counter("requests", "Requests, by how they were answered", "path", "status")
        self._choices = self._counter("choices", "Engines chosen, by what for", "engine", "reason")
        self._fallbacks = self._counter("fallbacks", "Choices without the index, by why", "why")
        self._retries = self._counter("retries", "Requests that were asked again elsewhere", "engine")
        self._outcomes = self._counter("outcomes", "Reports to the index, by what became of them", "state")
        self._prefills = self._counter("prefills", "Prefills elsewhere than the decode", "engine", "state")
        self._lookups = Histogram(
            "kvstore_proxy_lookup_seconds",
            "Seconds that answers of the index took",
            buckets=_LOOKUP_BOUNDS_S,
            registry=self._registry,
        )
        self._ttft = Histogram(
            "kvstore_proxy_ttft_seconds",
            "Seconds to the first byte of an answer's body",
            ["engine"],
            buckets=_TTFT_BOUNDS_S,
            registry=self._registry,
        )

    def request(self, path: str, status: int | str) -> None:
        """One has ended; `status` is "cancelled" where the client has left."""
        self._requests.labels(path, status).inc()

    def choice(self, engine: str, reason: str) -> None:
        """An engine was chosen."""
        self._choices.labels(engine, reason).inc()

    def fallback(self, why: str) -> None:
        """The index had no say."""
        self._fallbacks.labels(why).inc()

    def retry(self, engine: str) -> None:
        """This engine failed, and another one is asked."""
        self._retries.labels(engine).inc()

    def outcome(self, state: str) -> None:
        """A report was taken, refused, lost or dropped."""
        self._outcomes.labels(state).inc()

    def prefill(self, engine: str, state: str) -> None:
        """A prefill is done, or has failed."""
        self._prefills.labels(engine, state).inc()

    def lookup(self, seconds: float) -> None:
        """The index has answered."""
        self._lookups.observe(seconds)

    def first_byte(self, engine: str, seconds: float) -> None:
        """An engine has begun to answer."""
        self._ttft.labels(engine).observe(seconds)

    def exposition(self, engines: Iterable[Engine]) -> Callable[[], bytes]:
        """A function that gives the text of /metrics."""
        self._registry.register(_EngineCollector(engines))
        return lambda: generate_latest(self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"kvstore_proxy_{name}", text, labels, registry=self._registry)


class _EngineCollector(Collector):
    """Reads engines when they are asked for."""

    def __init__(self, engines: Iterable[Engine]) -> None:
        self._engines = engines

    def collect(self) -> Iterator[Metric]:
        running = GaugeMetricFamily("kvstore_proxy_running", "Requests under way", labels=["engine"])
        waiting = GaugeMetricFamily(
            "kvstore_proxy_waiting_tokens", "Of prompts that wait for their first token", labels=["engine"]
        )
        there = GaugeMetricFamily("kvstore_proxy_up", "Whether an engine is there", labels=["engine"])
        for engine in self._engines:
            running.add_metric([engine.name], engine.running)
            waiting.add_metric([engine.name], engine.waiting_tokens)
            there.add_metric([engine.name], engine.is_there)
        yield from (running, waiting, there)
