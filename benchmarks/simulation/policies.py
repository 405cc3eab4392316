"""Ways to choose an engine. All of them see the same placements, and count what they sent where themselves.

What is not ours follows what its authors publish, with their defaults.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, pstdev
from typing import Final, Protocol

from benchmarks.simulation.models import BLOCK_TOKENS, Served
from benchmarks.simulation.workload import Prompt
from kvstore.index.chooser import Candidate, Chain, Chooser, Traits
from kvstore.index.placement import Placement
from kvstore.index.recent import Recent

OURS: Final = "ours"
GREEDY: Final = "greedy TTFT"


class Index(Protocol):
    """What policies know of engines' blocks."""

    def look_up(self, prompt: Prompt) -> list[Placement]:
        """What each engine has of a prompt."""


class Policy(Protocol):
    """Routes prompts. Engines are numbers, in the order of the placements."""

    def choose(self, id: int, prompt: Prompt, index: Index, now_s: float) -> int:
        """Where the prompt goes."""

    def predicted_s(self, id: int) -> float | None:
        """The time to first token that was expected, where it says one."""

    def done(self, id: int, now_s: float, ttft_s: float, cached_tokens: int) -> None:
        """Its first token came."""


@dataclass(slots=True)
class _Sent:
    engine: int
    tokens: float


class Counting:
    """What peers know of engines' load: requests, and tokens that are still to be computed."""

    def __init__(self, engines: int, served: Served) -> None:
        self.requests = [0] * engines
        self.tokens = [0.0] * engines
        self._sent: dict[int, _Sent] = {}

    def choose(self, id: int, prompt: Prompt, index: Index, now_s: float) -> int:
        """Where the prompt goes."""
        engine, tokens = self.pick(prompt, index, now_s)
        self._sent[id] = _Sent(engine, tokens)
        self.requests[engine] += 1
        self.tokens[engine] += tokens
        return engine

    def pick(self, prompt: Prompt, index: Index, now_s: float) -> tuple[int, float]:
        """The policy: an engine, and the tokens that it is taken to have to compute."""
        raise NotImplementedError

    def predicted_s(self, id: int) -> float | None:
        """It says none."""
        return None

    def done(self, id: int, now_s: float, ttft_s: float, cached_tokens: int) -> None:
        """Its first token came."""
        sent = self._sent.pop(id)
        self.requests[sent.engine] -= 1
        self.tokens[sent.engine] -= sent.tokens

    def least_loaded(self, engines: Sequence[int] | None = None) -> int:
        """Fewest requests, then fewest tokens."""
        among = range(len(self.requests)) if engines is None else engines
        return min(among, key=lambda engine: (self.requests[engine], self.tokens[engine]))


class RoundRobin(Counting):
    """One after another."""

    _next = -1

    def pick(self, prompt: Prompt, index: Index, now_s: float) -> tuple[int, float]:
        self._next = (self._next + 1) % len(self.requests)
        return self._next, prompt.tokens


class LeastTokens(Counting):
    """Fewest tokens of prompts that are not answered yet."""

    def pick(self, prompt: Prompt, index: Index, now_s: float) -> tuple[int, float]:
        return min(range(len(self.tokens)), key=lambda engine: self.tokens[engine]), prompt.tokens


class LeastRequests(Counting):
    """Fewest requests that are not answered yet."""

    def pick(self, prompt: Prompt, index: Index, now_s: float) -> tuple[int, float]:
        return self.least_loaded(), prompt.tokens


class LongestPrefix(Counting):
    """Most tokens in the engine's GPU or its node; of equals the one with fewest tokens."""

    def pick(self, prompt: Prompt, index: Index, now_s: float) -> tuple[int, float]:
        found = index.look_up(prompt)
        best = min(range(len(found)), key=lambda engine: (-found[engine].nvme, self.tokens[engine]))
        return best, prompt.tokens - found[best].nvme


class Dynamo(Counting):
    """The cost of Dynamo 1.6.1's KV router, as its router of a prefill pool has it: no decode blocks.

    Credit 1 for device, 0.75 for host and 0.25 for disk; no decay; blocks of prompts just routed are
    predicted for their time to live. There is no credit for a shared cache unless one is configured: Redis
    here is slower than computing, and with it Dynamo would lose.
    """

    _TTL_S = 5.0  # of what is predicted

    def __init__(self, engines: int, served: Served) -> None:
        super().__init__(engines, served)
        self._recent = Recent()
        self._count = 0

    def pick(self, prompt: Prompt, index: Index, now_s: float) -> tuple[int, float]:
        self._recent.expire(now_s)
        computed = []
        for each in index.look_up(prompt):
            predicted = BLOCK_TOKENS * self._recent.depth(each.engine, prompt.keys, now_s)
            computed.append(prompt.tokens - _tiers(each, max(each.gpu, predicted)))
        costs = [max(0.0, active + more) for active, more in zip(self.tokens, computed, strict=True)]
        engine = min(range(len(costs)), key=lambda at: (costs[at], self.requests[at]))
        self._count += 1
        self._recent.expect(f"engine {engine}", str(self._count), prompt.keys, now_s + self._TTL_S)
        return engine, max(0.0, computed[engine])


def _tiers(found: Placement, device: int) -> float:
    host = max(0, found.dram - device)
    disk = max(0, found.nvme - max(device, found.dram))
    return device + 0.75 * host + 0.25 * disk


class SGLang(Counting):
    """The gateway's cache_aware: shortest queue while unbalanced, else the best match of over a half."""

    def pick(self, prompt: Prompt, index: Index, now_s: float) -> tuple[int, float]:
        most, fewest = max(self.requests), min(self.requests)
        if most - fewest > 32 and most > 1.1 * fewest:
            return self.least_loaded(), prompt.tokens
        found = index.look_up(prompt)
        best = max(range(len(found)), key=lambda engine: found[engine].nvme)
        matched = found[best].nvme > 0.5 * prompt.tokens
        return best if matched else self.least_loaded(), prompt.tokens


class AIBrix(Counting):
    """prefix-cache: least loaded while unbalanced, else the best match of those not above the mean by more
    than a standard deviation."""

    def pick(self, prompt: Prompt, index: Index, now_s: float) -> tuple[int, float]:
        if max(self.requests) - min(self.requests) > 8:
            return self.least_loaded(), prompt.tokens
        found = index.look_up(prompt)
        bound = mean(self.requests) + pstdev(self.requests)
        among = [engine for engine, count in enumerate(self.requests) if count <= bound]
        best = min(among, key=lambda engine: (-found[engine].nvme, self.requests[engine]))
        return best, prompt.tokens


class Ours:
    """The chooser of the service, told how fast engines are meant to be."""

    def __init__(self, engines: int, served: Served, chooser: Chooser | None = None) -> None:
        self.chooser = chooser or Chooser()
        self._traits = Traits(served.token_bytes, served.speeds, served.prefill)
        self._predicted_s: dict[int, float] = {}

    def choose(self, id: int, prompt: Prompt, index: Index, now_s: float) -> int:
        """Where the prompt goes."""
        found = index.look_up(prompt)
        chain = Chain(prompt.keys, BLOCK_TOKENS)
        candidates = [Candidate(each, self._traits) for each in found]
        best = self.chooser.rank(prompt.tokens, chain, candidates, now_s)[0]
        self.chooser.take(str(id), prompt.tokens, chain, best, now_s)
        self._predicted_s[id] = best.estimate.ttft_s
        return next(at for at, each in enumerate(found) if each is best.placement)

    def predicted_s(self, id: int) -> float | None:
        """The estimate's."""
        return self._predicted_s.pop(id)

    def done(self, id: int, now_s: float, ttft_s: float, cached_tokens: int) -> None:
        """Its first token came."""
        self.chooser.outcome(str(id), now_s, ttft_s=ttft_s, cached_tokens=cached_tokens)


class Greedy(Ours):
    """The same estimates, and the engine that gives the first token soonest, whatever work that makes."""

    def __init__(self, engines: int, served: Served) -> None:
        super().__init__(engines, served, Chooser(price=0.0))


POLICIES: Final[dict[str, type[Counting] | type[Ours]]] = {
    OURS: Ours,
    "round-robin": RoundRobin,
    "least tokens": LeastTokens,
    "least requests": LeastRequests,
    "longest prefix": LongestPrefix,
    "Dynamo": Dynamo,
    "SGLang": SGLang,
    "AIBrix": AIBrix,
    GREEDY: Greedy,
}
