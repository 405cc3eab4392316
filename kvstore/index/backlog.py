"""The prompts that an engine was given and has not begun to answer, as far as routing knows. Pure.

An engine serves them one after another, in the order in which they came. How long it still needs is what
they were estimated to take, less the time that the first of them has had.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvstore.index.recent import Key, Place


@dataclass(slots=True, eq=False)
class Work:
    """A prompt under way. Times are the chooser's; `work_s` is what it takes the engine from others.

    `nominal_s` is the part of it that is computed, for an engine as fast as it is configured; `due_s` is
    when its first token was expected; `keys` are expected at `place`.
    """

    id: str
    engine: str
    taken_s: float
    prompt_tokens: int
    load_s: float
    load_tokens: int
    nominal_s: float
    work_s: float
    ttft_s: float
    place: Place
    keys: Sequence[Key] = ()

    @property
    def due_s(self) -> float:
        """When it was expected to be over."""
        return self.taken_s + self.ttft_s


@dataclass(slots=True)
class Backlog:
    """Of one engine, first come first."""

    works: dict[str, Work] = field(default_factory=dict)
    work_s: float = 0.0  # of all of them
    began_s: float = 0.0  # when the first of them had the engine to itself

    def add(self, work: Work, now_s: float) -> None:
        """It waits behind the others."""
        if not self.works:
            self.began_s = max(self.began_s, now_s)
        self.works[work.id] = work
        self.work_s += work.work_s

    def had_s(self, work: Work, ended_s: float) -> float:
        """How long the engine had itself to a prompt that it ends now."""
        return max(0.0, ended_s - max(self.began_s, work.taken_s))

    def end(self, work: Work, ended_s: float | None) -> None:
        """It is over; None: it was never there, or nobody tells when it ended."""
        del self.works[work.id]
        if ended_s is not None:
            self.began_s = max(self.began_s, ended_s)
        self.work_s = self.work_s - work.work_s if self.works else 0.0

    def wait_s(self, now_s: float, *, told: bool = True) -> float:
        """How long a prompt that comes now has to wait.

        Where ends are `told`, the others have not begun before the first one's; else they end as estimated.
        """
        for first in self.works.values():
            had_s = max(0.0, now_s - max(self.began_s, first.taken_s))
            return max(0.0, self.work_s - (min(had_s, first.work_s) if told else had_s))
        return 0.0
