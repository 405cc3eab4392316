"""One prompt before the engines that it could go to: what each could do, best first. Pure.

Most engines have the same of a prompt, most often nothing: what is the same of several is estimated once.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter

import msgspec

from kvstore.block import Medium
from kvstore.index.backlog import Backlog
from kvstore.index.correction import Corrections
from kvstore.index.estimate import Estimate, Prefill, Speed, Split, split
from kvstore.index.placement import Placement
from kvstore.index.recent import Key, Recent


class Load(msgspec.Struct, frozen=True, gc=False):
    """What the router says of an engine now; None is what it does not say."""

    waiting_tokens: int | None = None
    running: int | None = None
    wait_s: float | None = None


class Traits(msgspec.Struct, frozen=True, gc=False):
    """How fast an engine is meant to be."""

    token_bytes: float
    speeds: Mapping[Medium, Speed]
    prefill: Prefill


class Candidate(msgspec.Struct, frozen=True, gc=False):
    """An engine that the prompt could go to."""

    placement: Placement
    traits: Traits
    load: Load | None = None


class Chain(msgspec.Struct, frozen=True, gc=False):
    """The prompt's chained keys in one scheme. Equal keys are equal prefixes where `space` is the same: the
    model, adapter and salt."""

    keys: Sequence[Key]
    block_tokens: int
    space: str = ""


class Choice(msgspec.Struct, frozen=True, gc=False):
    """One engine's answer.

    `expected` leading tokens will be in its GPU cache from prompts that were just routed there; `ahead` is
    how many prompts it was given before, and `slowness` how much longer it computes than it is meant to.
    """

    placement: Placement
    estimate: Estimate
    expected: int
    prompt_tokens: int = 0
    ahead: int = 0
    slowness: float = 1.0
    running: int = 0


class Ranking:
    """Begun by a chooser, whose state it reads. Engines come some at a time; others may act in between."""

    def __init__(
        self,
        prompt_tokens: int,
        chain: Chain | None,
        now_s: float,
        *,
        price: float,
        told: bool,
        recent: Recent,
        corrections: Corrections,
        backlogs: Mapping[str, Backlog],
        arrived: Callable[[float, float], None],
    ) -> None:
        """`arrived` is told of the best engine's work, in seconds, and of `now_s`."""
        self._prompt_tokens = prompt_tokens
        self._chain = chain
        self._now_s = now_s
        self._price = price
        self._told = told
        self._recent = recent
        self._corrections = corrections
        self._backlogs = backlogs
        self._arrived = arrived
        self._alike: dict[tuple[object, ...], _Alike] = {}
        self._runs: list[list[Choice]] = []

    def weigh(self, candidates: Iterable[Candidate]) -> None:
        """Estimate for some more of them."""
        chain = self._chain if len(self._recent) else None
        choices = [self._choice(each, chain) for each in candidates]
        choices.sort(key=_best_first)
        self._runs.append(choices)

    def done(self) -> list[Choice]:
        """All of them, best first; there is one at least. The prompt counts as one that came."""
        choices = self._runs[0]
        if len(self._runs) > 1:
            choices = [choice for run in self._runs for choice in run]
            choices.sort(key=_best_first)  # merges the runs
        best = choices[0].estimate
        self._arrived(best.load_s + best.recompute_s, self._now_s)
        return choices

    def _choice(self, candidate: Candidate, chain: Chain | None) -> Choice:
        placement, load = candidate.placement, candidate.load
        engine = placement.engine
        expected = 0
        if chain is not None:
            depth = self._recent.depth((engine, chain.space), chain.keys, self._now_s)
            expected = chain.block_tokens * depth
        slowness = self._corrections.slowness(engine)
        alike = self._alike_of(placement, expected, candidate.traits, slowness)
        backlog = self._backlogs.get(engine)
        ahead = running = 0
        found = alike.idle
        if backlog is not None or load is not None:
            found = alike.after(self._wait_s(backlog, load, alike.prefill), self._price)
            ahead = len(backlog.works) if backlog else 0
            running = load.running or 0 if load else 0
        tokens = self._prompt_tokens
        return Choice(placement, found, min(expected, tokens), tokens, ahead, slowness, running)

    def _alike_of(self, placement: Placement, expected: int, traits: Traits, slowness: float) -> "_Alike":
        """What is the same of all that have as much, are as fast, and read it as fast where there is any."""
        had = placement.gpu, placement.dram, placement.nvme, placement.remote
        if expected > had[0]:
            had = expected, max(expected, had[1]), max(expected, had[2]), max(expected, had[3])
        loads = had[3] > had[0]
        media = (id(traits.speeds), traits.token_bytes) if loads else None
        key = had, slowness, id(traits.prefill), media
        alike = self._alike.get(key)
        if alike is None:
            alike = self._alike[key] = self._made(had, traits, slowness)
        return alike

    def _made(self, had: Sequence[int], traits: Traits, slowness: float) -> "_Alike":
        prefill = traits.prefill.slowed(slowness)
        best = split(
            self._prompt_tokens,
            had,
            token_bytes=traits.token_bytes,
            speeds=traits.speeds,
            prefill=prefill,
        )
        return _Alike(traits, prefill, best, best.after(0.0, self._price))

    def _wait_s(self, backlog: Backlog | None, load: Load | None, prefill: Prefill) -> float:
        """The longer of what was given to the engine from here and of what the router says of it."""
        known_s = backlog.wait_s(self._now_s, told=self._told) if backlog else 0.0
        if load is None:
            return known_s
        if load.wait_s is not None:
            return max(known_s, load.wait_s)
        return max(known_s, prefill.seconds(load.waiting_tokens, 0)) if load.waiting_tokens else known_s


class _Alike(msgspec.Struct, frozen=True, gc=False):
    """Of engines that are alike for a prompt. `traits` are kept: what they are known by is where they are."""

    traits: Traits
    prefill: Prefill
    split: Split
    idle: Estimate

    def after(self, wait_s: float, price: float) -> Estimate:
        """The estimate of one that is free in `wait_s`."""
        return self.split.after(wait_s, price) if wait_s else self.idle


_best_first = attrgetter("estimate.score_s", "running", "placement.engine")
