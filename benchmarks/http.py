"""Lookups by routers: compact, and over HTTP in our shape and in Dynamo's, beside Dynamo's indexer.

The same client asks both, whose content is the same. CPU is that of the server's process for each request,
with all its threads. The limit is the same port without an index behind it: requests read, answers of the
same length written.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Final

from benchmarks import http_beside
from benchmarks.harness import OURS, Report, Row, Settings, Target, interleaved, judge, row
from benchmarks.load import Asked, Caller
from benchmarks.peers import dynamo
from benchmarks.processes import pin
from benchmarks.routers import COMPACT, WAYS, Echo, Indexes, Prompt, Way, prompts, wait_until_known

BENCH: Final = "http"
INDEXER: Final = "dynamo.indexer"
ECHO: Final = "same port, no index"
ENGINES: Final = (8, 64)
# How many of a prompt's blocks engines have.
MATCHES: Final = {"full": 512, "half": 256}
# Prompts of each kind, asked for in turns.
_PROMPTS: Final = 4
# A sample takes about so long.
_SAMPLE_S: Final = 0.25
_FIRST: Final = 16

_CASES: Final = tuple(
    f"{COMPACT.name}, {engines} engines, {match}" for engines in ENGINES for match in MATCHES
)
TARGETS: Final = (
    Target(tuple(f"{case}: lookups" for case in _CASES), INDEXER, 1.0),
    Target(tuple(f"{case}: CPU" for case in _CASES), INDEXER, 1.0),
    *http_beside.TARGETS,
)


def run(settings: Settings) -> Report:
    """Both indexes for each number of engines, and then ours beside a daemon that works."""
    absent = dynamo.missing()
    rows = []
    pin(os.getpid(), {settings.cores.client})
    try:
        for engines in ENGINES[:1] if settings.quick else ENGINES:
            rows += _stage(engines, settings, with_dynamo=absent is None)
    finally:
        pin(os.getpid(), settings.cores.all)
    rows += http_beside.rows(BENCH, settings)
    versions = {} if absent else {"dynamo": dynamo.installed_version()}
    missing = {"dynamo": absent} if absent else {}
    return Report(BENCH, rows, judge(rows, TARGETS), _caption(settings), versions, missing)


@dataclass(frozen=True, slots=True)
class _Both:
    """A sample: one connection, and several at once."""

    alone: Asked
    at_once: Asked


def _stage(engines: int, settings: Settings, *, with_dynamo: bool) -> list[Row]:
    """Rows of every way and match for so many engines."""
    count = settings.pick(_PROMPTS, 1)
    match_to_prompts = {
        match: prompts(count, blocks, seed) for seed, (match, blocks) in enumerate(MATCHES.items())
    }
    with ExitStack() as exits:
        directory = Path(exits.enter_context(TemporaryDirectory(prefix="kvbench-")))
        indexes = Indexes(exits, directory, settings, with_dynamo=with_dynamo)
        indexes.fill(engines, [prompt for some in match_to_prompts.values() for prompt in some])
        answers: dict[Way, bytes] = {}
        for prompt in [prompt for some in match_to_prompts.values() for prompt in some]:
            for way, peer in WAYS.items():
                answers[way] = wait_until_known(indexes.connect, way, prompt)
                if with_dynamo:
                    wait_until_known(indexes.connect_peer, peer, prompt)
        echo = Echo(exits, directory, settings, answers)
        rows = []
        for way, peer in WAYS.items():
            for match, some in match_to_prompts.items():
                samplers = {
                    OURS: _Sampler(indexes.connect, way, some, settings),
                    ECHO: _Sampler(echo.connect, way, some, settings),
                }
                if with_dynamo:
                    samplers[INDEXER] = _Sampler(indexes.connect_peer, peer, some, settings)
                rows += _rows(f"{way.name}, {engines} engines, {match}", samplers, settings)
        return rows


def _rows(case: str, samplers: Mapping[str, Callable[[], _Both]], settings: Settings) -> list[Row]:
    taken = interleaved(samplers, settings.rounds)

    def figures(of: Callable[[_Both], float]) -> dict[str, float]:
        return {name: median(map(of, samples)) for name, samples in taken.items()}

    return [
        row(BENCH, f"{case}: lookups", "1/s", "higher", figures(lambda both: both.at_once.rate), ECHO),
        row(BENCH, f"{case}: CPU", "us", "lower", figures(lambda both: 1e6 * both.at_once.cpu_s), ECHO),
        row(BENCH, f"{case}: p50", "us", "lower", figures(lambda both: 1e6 * both.alone.p50_s), ECHO),
    ]


class _Sampler:
    """Asks for prompts in turns, as many times as take about `_SAMPLE_S`, on connections of its own."""

    def __init__(
        self, connect: Callable[[Way], Caller], way: Way, some: Sequence[Prompt], settings: Settings
    ) -> None:
        self._connect = partial(connect, way)
        self._requests = [way.request(prompt) for prompt in some]
        self._alone = self._at_once = _FIRST
        if not settings.quick:
            first = self()
            self._alone = max(_FIRST, int(_SAMPLE_S * first.alone.rate))
            self._at_once = max(_FIRST, int(_SAMPLE_S * first.at_once.rate))

    def __call__(self) -> _Both:
        with closing(self._connect()) as caller:
            return _Both(
                caller.one_by_one(self._requests, self._alone), caller.at_once(self._requests, self._at_once)
            )


def _caption(settings: Settings) -> str:
    return (
        f"{settings.cores}. p50 on one connection; lookups and CPU with 8, each of which has one request "
        "under way. Prompts of 8,192 tokens in blocks of 16, of which engines have all, or the first half. "
        "Ours makes keys of tokens, as Dynamo's does; our /query and /query_by_hash get the bytes that "
        f"Dynamo's get, the others stand beside those. {http_beside.CAPTION}"
    )
