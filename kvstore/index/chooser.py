"""Which engine a prompt goes to: estimates, with what routing itself knows of the engines. Pure.

The index knows what engines have. The chooser adds what happened since: prompts that were routed and wait
there, blocks that they will leave there, and how fast each engine proves to be. It is soft state, and
bounded: what nobody reports the end of is over some time after it was expected to be.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from heapq import heapify, heappop, heappush
from math import isfinite
from typing import Final

from kvstore.index.backlog import Backlog, Work
from kvstore.index.correction import Corrections
from kvstore.index.demand import Demand
from kvstore.index.ranking import Candidate as Candidate
from kvstore.index.ranking import Chain as Chain
from kvstore.index.ranking import Choice as Choice
from kvstore.index.ranking import Load as Load
from kvstore.index.ranking import Ranking
from kvstore.index.ranking import Traits as Traits
from kvstore.index.recent import Recent
from kvstore.statistics import Latencies

# The part of what others will wait for a prompt's work that counts in its placement; see docs/decisions.md.
PRICE: Final = 0.3
# Prompts under way, of all engines, and keys of theirs that are kept in case they fail.
WORKS_MAX: Final = 1 << 14
_WORK_KEYS_MAX: Final = 1 << 21
# A prompt whose end is not reported is over after twice its time and so much, and at most so much.
_GRACE_S: Final = 5.0
_LIFE_MAX_S: Final = 600.0
# Where less than a half of the last outcomes were reported, prompts are over when they were expected to be:
# their ids are kept a little longer, for routers that begin to report.
_TOLD_GAIN: Final = 0.05
_TOLD_MIN: Final = 0.5
_LATE: Final = 1.25
_LATE_S: Final = 0.1
# Blocks are expected so long after the first token: by then the engine has told of them.
_EXPECTED_S: Final = 5.0
# Relative; of what took no time at all it would be infinite.
_ERROR_MAX: Final = 10.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a prompt: `error_s` is the actual time to first token less the predicted one."""

    engine: str
    predicted_s: float
    error_s: float | None


@dataclass(frozen=True, slots=True)
class ChooserStatistics:
    """All of it now. `errors` are relative: the difference of prediction and outcome, by the outcome.

    `expired` prompts ended without a word; `engine_slowness` is learned from outcomes.
    """

    under_way: int
    expected_keys: int
    taken: int
    outcomes: int
    failed: int
    expired: int
    errors: Latencies
    engine_slowness: dict[str, float] = field(default_factory=dict)


class Chooser:
    """The state of routing. One owner calls it, from one thread, with a clock that never goes back."""

    def __init__(self, *, price: float = PRICE) -> None:
        self._price = price
        self._works: dict[str, Work] = {}
        self._ends: list[tuple[float, int, Work]] = []  # a heap, with works that are over since
        self._work_keys = 0
        self._backlogs: dict[str, Backlog] = {}
        self._recent = Recent()
        self._demand = Demand()
        self._corrections = Corrections()
        self._taken = self._outcomes = self._failed = self._expired = 0
        self._errors = Latencies()
        self._told = 1.0  # the part of outcomes that is reported

    def rank(
        self,
        prompt_tokens: int,
        chain: Chain | None,
        candidates: Sequence[Candidate],
        now_s: float,
        *,
        fleet: str = "",
    ) -> list[Choice]:
        """What each engine could do for the prompt, best first.

        Each call counts as a prompt that comes to a `fleet`, such as all engines of a model: the more there
        are, the more does work cost.
        """
        if not candidates:
            self._expire(now_s)
            return []
        ranking = self.ranking(prompt_tokens, chain, len(candidates), now_s, fleet=fleet)
        ranking.weigh(candidates)
        return ranking.done()

    def ranking(
        self, prompt_tokens: int, chain: Chain | None, candidates: int, now_s: float, *, fleet: str = ""
    ) -> Ranking:
        """The same in steps, for so many candidates, of which there is one; it counts when it is done."""
        self._expire(now_s)
        demand = self._demand.of(fleet, now_s)
        return Ranking(
            prompt_tokens,
            chain,
            now_s,
            price=self._price * demand.price(candidates),
            told=self._is_told,
            recent=self._recent,
            corrections=self._corrections,
            backlogs=self._backlogs,
            arrived=demand.arrive,
        )

    def take(self, id: str, prompt_tokens: int, chain: Chain | None, choice: Choice, now_s: float) -> None:
        """The prompt goes there: its work waits there, and its blocks are expected there.

        An `id` that is under way is taken anew.
        """
        self._end_silently(id)
        self._expire(now_s)
        engine, found = choice.placement.engine, choice.estimate
        keys, place = (chain.keys, (engine, chain.space)) if chain is not None else ((), engine)
        kept = keys if self._work_keys + len(keys) <= _WORK_KEYS_MAX else ()
        work = Work(
            id=id,
            engine=engine,
            taken_s=now_s,
            prompt_tokens=prompt_tokens,
            load_s=found.load_s,
            load_tokens=found.load_tokens,
            nominal_s=found.recompute_s / choice.slowness,
            work_s=found.load_s + found.recompute_s,
            ttft_s=found.ttft_s,
            place=place,
            keys=kept,
        )
        self._works[id] = work
        self._work_keys += len(kept)
        self._backlogs.setdefault(engine, Backlog()).add(work, now_s)
        heappush(self._ends, (self._over_s(work), self._taken, work))
        self._recent.expect(place, id, keys, min(work.due_s, now_s + _LIFE_MAX_S) + _EXPECTED_S)
        self._taken += 1
        if len(self._works) > WORKS_MAX:
            self._end_silently(next(iter(self._works)))
            self._expired += 1
        if len(self._ends) > 2 * WORKS_MAX:
            self._ends = [end for end in self._ends if self._works.get(end[2].id) is end[2]]
            heapify(self._ends)

    def outcome(
        self,
        id: str,
        now_s: float,
        *,
        engine: str | None = None,
        ttft_s: float | None = None,
        cached_tokens: int | None = None,
        failed: bool = False,
        ended: bool = False,
    ) -> Outcome | None:
        """The first token came, after `ttft_s` since it was taken or just now; or none ever will.

        `ended`: it came, and nobody saw when; it is taken to have come when it was expected, or just now if
        that is earlier, and nothing is learned from it. None: the prompt is not known, or over. One that
        `engine` got instead was never at the one chosen.
        """
        work = self._works.get(id)
        if work is None:
            return None
        self._outcomes += 1
        if failed or engine not in (None, work.engine):
            self._failed += failed
            self._recent.forget(work.place, id, work.keys)
            self._end_silently(id)
            return Outcome(work.engine, work.ttft_s, None)
        self._told += _TOLD_GAIN * (1 - self._told)
        if ended:
            self._end(work, min(now_s, work.due_s))
            return Outcome(work.engine, work.ttft_s, None)
        took_s = now_s - work.taken_s
        if ttft_s is not None and isfinite(ttft_s):
            took_s = min(max(0.0, ttft_s), took_s)
        had_s = self._backlogs[work.engine].had_s(work, work.taken_s + took_s)
        self._end(work, work.taken_s + took_s)
        self._corrections.observe(work, had_s, cached_tokens)
        if took_s > 0:
            self._errors.observe(min(abs(work.ttft_s - took_s) / took_s, _ERROR_MAX))
        return Outcome(work.engine, work.ttft_s, took_s - work.ttft_s)

    def statistics(self) -> ChooserStatistics:
        """All of it now."""
        return ChooserStatistics(
            under_way=len(self._works),
            expected_keys=len(self._recent),
            taken=self._taken,
            outcomes=self._outcomes,
            failed=self._failed,
            expired=self._expired,
            errors=replace(self._errors, counts=list(self._errors.counts)),
            engine_slowness=self._corrections.all(),
        )

    def _expire(self, now_s: float) -> None:
        """End what is long overdue."""
        while self._ends and self._ends[0][0] <= now_s:
            over_s, _, work = heappop(self._ends)
            if self._works.get(work.id) is work:
                self._end(work, over_s if self._is_told else min(over_s, work.due_s))
                self._told -= _TOLD_GAIN * self._told
                self._expired += 1
        self._recent.expire(now_s)

    @property
    def _is_told(self) -> bool:
        return self._told >= _TOLD_MIN

    def _over_s(self, work: Work) -> float:
        """When it is taken to be over if nobody says so."""
        late_s = 2 * work.ttft_s + _GRACE_S if self._is_told else _LATE * work.ttft_s + _LATE_S
        return work.taken_s + min(late_s, _LIFE_MAX_S)

    def _end_silently(self, id: str) -> None:
        work = self._works.get(id)
        if work is not None:
            self._end(work, None)

    def _end(self, work: Work, ended_s: float | None) -> None:
        """It is over; None: nobody tells when, or it was never there."""
        del self._works[work.id]
        self._work_keys -= len(work.keys)
        backlog = self._backlogs[work.engine]
        backlog.end(work, ended_s)
        if not backlog.works:
            del self._backlogs[work.engine]
