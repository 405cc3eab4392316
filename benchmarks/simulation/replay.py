"""A trace through a cluster, routed by a policy: times to first token. Its clock is the trace's."""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from benchmarks.simulation.cluster import Cluster
from benchmarks.simulation.policies import Policy
from benchmarks.simulation.workload import Prompt


@dataclass(frozen=True, slots=True)
class Played:
    """Of each prompt the time to first token, and what was predicted, where something was.

    `busy` is the part of all engines' time that they worked, `cached` that of all tokens that were not
    computed.
    """

    ttft_s: list[float]
    predicted_s: list[float | None]
    busy: float
    cached: float


def quantile(values: Sequence[float], fraction: float) -> float:
    """The value that this fraction of them does not exceed."""
    return sorted(values)[min(len(values) - 1, int(fraction * len(values)))]


def replay(prompts: Sequence[Prompt], cluster: Cluster, policy: Policy) -> Played:
    """Route every prompt when it comes, and serve them all."""
    return _Replay(prompts, cluster, policy).run()


class _Replay:
    def __init__(self, prompts: Sequence[Prompt], cluster: Cluster, policy: Policy) -> None:
        self._prompts = prompts
        self._cluster = cluster
        self._policy = policy
        self._ends: list[tuple[float, int, int]] = []  # when, which engine, how much was cached
        self._ttft_s = [0.0] * len(prompts)
        self._predicted_s: list[float | None] = [None] * len(prompts)
        self._cached = 0

    def run(self) -> Played:
        for id, prompt in enumerate(self._prompts):
            while self._ends and self._ends[0][0] <= prompt.at_s:
                self._end(*heappop(self._ends))
            engine = self._policy.choose(id, prompt, self._cluster, prompt.at_s)
            self._predicted_s[id] = self._policy.predicted_s(id)
            queue = self._cluster.servers[engine].queue
            queue.append(id)
            if len(queue) == 1:
                self._begin(engine, prompt.at_s)
        last_s = self._prompts[-1].at_s
        while self._ends:
            self._end(*heappop(self._ends))
        busy_s = sum(server.busy_s for server in self._cluster.servers)
        tokens = sum(prompt.tokens for prompt in self._prompts)
        return Played(
            self._ttft_s,
            self._predicted_s,
            busy_s / last_s / len(self._cluster.servers),
            self._cached / tokens,
        )

    def _begin(self, engine: int, now_s: float) -> None:
        server = self._cluster.servers[engine]
        seconds, cached = self._cluster.serve(server, self._prompts[server.queue[0]])
        server.busy_s += seconds
        heappush(self._ends, (now_s + seconds, engine, cached))

    def _end(self, now_s: float, engine: int, cached: int) -> None:
        server = self._cluster.servers[engine]
        id = server.queue.popleft()
        prompt = self._prompts[id]
        self._cluster.store(server, prompt)
        self._cached += cached
        self._ttft_s[id] = now_s - prompt.at_s
        self._policy.done(id, now_s, self._ttft_s[id], cached)
        if server.queue:
            self._begin(engine, now_s)
