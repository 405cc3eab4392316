"""How much slower or faster engines compute than they are meant to, learned from outcomes. Pure.

One factor for each engine: the time that it took for its last dozens of prompts by the time that it was meant
to take. Sums are compared, so an engine that serves several prompts at once may seem slow for the first of
them and quick for the others. Each outcome counts little and within bounds: a router that lies, or a clock
that jumps, does some harm and no lasting one.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from kvstore.index.backlog import Work

# Within what factors an engine is believed to be, and how far one outcome may seem to be off the present one.
_FARTHEST: Final = 8.0
_STEP_UP: Final = 4.0
_STEP_DOWN: Final = 1 / 8
# Each outcome counts so much of what the one after it counts; and no more than so many of mean length.
_KEPT: Final = 0.95
_LENGTHS: Final = 3.0
# An engine begins with the fleet's factor, as if it had been seen so many times.
_PRIOR: Final = 4.0
# The one whose last outcome is longest ago is forgotten first: names that are made up displace no others.
ENGINES_MAX: Final = 1 << 14


@dataclass(slots=True)
class _Pace:
    """Of one engine, or of all: sums of meant and of taken seconds, each of which fades."""

    factor: float = 1.0
    meant_s: float = 0.0
    taken_s: float = 0.0
    weight: float = 0.0

    def observe(self, meant_s: float, taken_s: float, prior: float) -> None:
        if self.weight:
            meant, taken_s = meant_s, taken_s / meant_s
            meant_s = min(meant, _LENGTHS * self.meant_s / self.weight)
            taken_s *= meant_s
        expected_s = meant_s * self.factor
        taken_s = max(_STEP_DOWN * expected_s, min(taken_s, _STEP_UP * expected_s))
        self.weight = _KEPT * self.weight + 1
        self.meant_s = _KEPT * self.meant_s + meant_s
        self.taken_s = _KEPT * self.taken_s + taken_s
        believed_s = _PRIOR * self.meant_s / self.weight
        factor = (self.taken_s + prior * believed_s) / (self.meant_s + believed_s)
        self.factor = max(1 / _FARTHEST, min(factor, _FARTHEST))


class Corrections:
    """A factor for each engine, and one that new engines begin with."""

    def __init__(self) -> None:
        self._engines: OrderedDict[str, _Pace] = OrderedDict()
        self._fleet = _Pace()

    def slowness(self, engine: str) -> float:
        """How many times as long as configured it computes."""
        return self._engines.get(engine, self._fleet).factor

    def all(self) -> dict[str, float]:
        """Of engines with outcomes."""
        return {engine: pace.factor for engine, pace in self._engines.items()}

    def observe(self, work: Work, had_s: float, cached_tokens: int | None) -> None:
        """An engine had itself so long to a prompt, of which so many tokens were cached or loaded.

        Nothing is learned of one that was mostly loaded.
        """
        meant_s = work.nominal_s
        if cached_tokens is not None and work.prompt_tokens > work.load_tokens:
            computed = work.prompt_tokens - max(0, min(cached_tokens, work.prompt_tokens))
            meant_s *= computed / (work.prompt_tokens - work.load_tokens)
        if meant_s <= 0 or work.load_s > meant_s:
            return
        pace = self._engines.get(work.engine)
        if pace is None:
            pace = self._engines[work.engine] = _Pace(self._fleet.factor)
            if len(self._engines) > ENGINES_MAX:
                self._engines.popitem(last=False)
        self._engines.move_to_end(work.engine)
        taken_s = max(0.0, had_s - work.load_s)
        pace.observe(meant_s, taken_s, self._fleet.factor)
        self._fleet.observe(meant_s, taken_s, 1.0)
