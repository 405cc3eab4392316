"""What every benchmark is made of: settings, rows, targets and interleaved rounds. It starts nothing.

A row is one figure of ours beside the limit that physics sets and beside every peer. All figures of a
row come from the same rounds of the same run: round 1 of each, then round 2 of each, and the medians
count, so that whatever else the machine does falls on all of them.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, TypeVar

from benchmarks.processes import Cores

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30
OURS: Final = "ours"
# Rounds of a full run: enough for a median that one bad second of a shared machine does not move.
ROUNDS_MIN: Final = 7

Better = Literal["higher", "lower"]
Sample = TypeVar("Sample")


class BenchmarkError(Exception):
    """The benchmark cannot say anything: a store refused, failed or answered wrongly."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How much to measure, and where a picture goes, of a benchmark that draws one.

    A quick run shows that everything works; its figures say nothing.
    """

    rounds: int
    quick: bool
    cores: Cores
    plot: Path | None = None

    def pick(self, full: int, quick: int) -> int:
        """The number for this run."""
        return quick if self.quick else full


@dataclass(frozen=True, slots=True)
class Limit:
    """What no store can pass: its name and its figure in the same rounds."""

    name: str
    value: float


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of ours, its limit and its peers', all in `unit`."""

    bench: str
    case: str
    unit: str
    better: Better
    ours: float
    limit: Limit
    peers: dict[str, float]

    def times(self, other: float) -> float:
        """How many times better ours is than `other`; 1 is equal, whichever way the unit points."""
        better, worse = (self.ours, other) if self.better == "higher" else (other, self.ours)
        return better / worse if worse > 0 else math.inf


@dataclass(frozen=True, slots=True)
class Target:
    """What some rows are meant to reach.

    `against` is "limit" or a peer's name, and `bound` how many times as good ours must be; or it is
    None, and `bound` is in the rows' unit. With `mean` the rows count together, by geometric mean.
    """

    cases: tuple[str, ...]
    against: str | None
    bound: float
    mean: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a target is met: `met` is None where its rows or its peer were not measured."""

    case: str
    wanted: str
    got: float | None
    met: bool | None


@dataclass(frozen=True, slots=True)
class Report:
    """What one benchmark found. `caption` says which process ran on which cores, and what a row means."""

    bench: str
    rows: list[Row]
    verdicts: list[Verdict]
    caption: str
    versions: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def interleaved(samplers: Mapping[str, Callable[[], Sample]], rounds: int) -> dict[str, list[Sample]]:
    """Every sampler's samples, one a round; who begins moves on by one each round.

    A first round warms caches and mappings and is not counted.
    """
    names = list(samplers)
    taken: dict[str, list[Sample]] = {name: [] for name in names}
    for number in range(rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            sample = samplers[name]()
            if number:
                taken[name].append(sample)
    return taken


def medians(samplers: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """The median of every sampler over interleaved rounds."""
    return {name: statistics.median(taken) for name, taken in interleaved(samplers, rounds).items()}


def row(bench: str, case: str, unit: str, better: Better, figures: Mapping[str, float], limit: str) -> Row:
    """The row of `figures`, which name ours, the limit and the peers."""
    peers = {name: value for name, value in figures.items() if name not in (OURS, limit)}
    return Row(bench, case, unit, better, figures[OURS], Limit(limit, figures[limit]), peers)


def seconds(work: Callable[[], object]) -> float:
    """How long `work` takes once."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def judge(rows: Iterable[Row], targets: Iterable[Target]) -> list[Verdict]:
    """One verdict for each target and case, or for each target that takes its cases together."""
    by_case = {row.case: row for row in rows}
    verdicts = []
    for target in targets:
        found = [by_case[case] for case in target.cases if case in by_case]
        if target.mean:
            verdicts.append(_mean_verdict(found, target))
        else:
            verdicts += [_verdict(row, target) for row in found]
    return verdicts


def _verdict(row: Row, target: Target) -> Verdict:
    if target.against is None:
        higher = row.better == "higher"
        reached = row.ours >= target.bound if higher else row.ours <= target.bound
        return Verdict(row.case, f"{'≥' if higher else '≤'} {target.bound:g} {row.unit}", row.ours, reached)
    got = _times(row, target.against)
    name = row.limit.name if target.against == "limit" else target.against
    met = None if got is None else got >= target.bound
    return Verdict(row.case, f"≥ {target.bound:.2f} of {name}", got, met)


def _mean_verdict(rows: Sequence[Row], target: Target) -> Verdict:
    assert target.against is not None
    ratios = [ratio for row in rows if (ratio := _times(row, target.against)) is not None]
    wanted = f"≥ {target.bound:.2f} of {target.against}, geometric mean"
    if len(ratios) < len(rows) or not ratios:
        return Verdict(f"all {len(rows)} rows", wanted, None, None)
    got = statistics.geometric_mean(ratios)
    return Verdict(f"all {len(rows)} rows", wanted, got, got >= target.bound)


def _times(row: Row, against: str) -> float | None:
    other = row.limit.value if against == "limit" else row.peers.get(against)
    return None if other is None else row.times(other)
