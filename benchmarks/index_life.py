"""How soon the index knows what a node has committed, and forgets a node that is gone."""

import gc
import random
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Final

from benchmarks.harness import OURS, BenchmarkError, Limit, Row, Settings, interleaved, row, seconds
from benchmarks.indexers import Http, OurIndex
from benchmarks.processes import start_process, stop_process, wait_for
from kvstore.block import Medium, Namespace
from kvstore.client import StoreClient
from kvstore.index.keytable import ROOT
from kvstore.index.locality import Locality
from kvstore.index.placement import Engine

PROMPT_BLOCKS: Final = 64
BLOCK_BYTES: Final = 4096
DEAD_BLOCKS: Final = 1_000_000
KNOWN: Final = "from commit to a lookup that finds it"
GONE: Final = "dead node with 1M blocks, gone from lookups"
STALL: Final = "dead node with 1M blocks, longest stall while swept"
LOOKUP, LOOKUP_OVER_HTTP, LONGEST = "one lookup", "one lookup over HTTP", "longest lookup"
NAMESPACE: Final = Namespace("model", block_tokens=16)
_COMMITS: Final = 100
# Between two commits, at most, so that they fall anywhere between what else happens.
_PAUSE_S_MAX: Final = 0.02
_KNOWN_S_MAX: Final = 10.0
_START_S_MAX: Final = 20.0
_SHARED: Final = 2
_READY: Final = "kvstore ready"


def known_rows(bench: str, settings: Settings) -> list[Row]:
    """A node commits, and an index is asked until it knows."""
    commits = settings.pick(_COMMITS, 10)
    with ExitStack() as exits:
        directory = Path(exits.enter_context(TemporaryDirectory(prefix="kvbench-")))
        feed = exits.enter_context(node_with_feed(directory))
        index = exits.enter_context(closing(OurIndex(directory, nodes=[feed])))
        store = exits.enter_context(StoreClient.connect(f"unix:{directory / 'node.sock'}", timeout_s=30.0))
        probe = _Probe(store, index.http)
        probe.wait_for_index()
        samplers = {OURS: partial(probe.learn, commits), LOOKUP_OVER_HTTP: partial(probe.ask, commits)}
        taken = interleaved(samplers, settings.rounds)
    rows = []
    for share in (0.5, 0.99):
        figures = {
            name: 1e3 * _quantile([s for some in many for s in some], share) for name, many in taken.items()
        }
        rows.append(row(bench, f"{KNOWN}, p{100 * share:.0f}", "ms", "lower", figures, LOOKUP_OVER_HTTP))
    return rows


@contextmanager
def node_with_feed(directory: Path) -> Iterator[str]:
    """A daemon that tells of its events; the address of its feed."""
    config, log = directory / "node.toml", directory / "node.log"
    config.write_text('[events]\nfeed = "127.0.0.1:0"\n')
    command = [sys.executable, "-m", "kvstore", "serve", "--dram", "64MiB", "--http", "127.0.0.1:0"]
    command += ["--socket", str(directory / "node.sock"), "--config", str(config)]
    process = start_process(command, log)
    try:
        wait_for(lambda: "\n" in log.read_text().partition(_READY)[2], process, log)
        yield log.read_text().partition(" feed=")[2].split()[0]
    finally:
        stop_process(process)


class _Probe:
    """A client of a node, and of an index that follows it."""

    def __init__(self, store: StoreClient, http: Http) -> None:
        self._store = store
        self._http = http
        self._random = random.Random(0)
        self._data = bytes(BLOCK_BYTES)
        self._known: list[bytes] = []

    def wait_for_index(self) -> None:
        """Return once the index follows the node.

        Raises:
            BenchmarkError: it does not.
        """
        deadline = time.monotonic() + _START_S_MAX
        self._commit(self._prompt())
        while not self._finds(self._known):
            if time.monotonic() > deadline:
                raise BenchmarkError(f"the index does not follow the node within {_START_S_MAX:.0f} s")

    def learn(self, commits: int) -> list[float]:
        """Seconds from each commit of a prompt until a lookup has found it."""
        taken = []
        for _ in range(commits):
            time.sleep(self._random.random() * _PAUSE_S_MAX)
            prompt = self._prompt()
            began = self._commit(prompt)
            while not self._finds(prompt):
                if time.perf_counter() - began > _KNOWN_S_MAX:
                    raise BenchmarkError(f"the index does not know a prompt after {_KNOWN_S_MAX:.0f} s")
            taken.append(time.perf_counter() - began)
        return taken

    def ask(self, lookups: int) -> list[float]:
        """Seconds that each lookup of a prompt takes that is known."""
        taken = []
        for _ in range(lookups):
            time.sleep(self._random.random() * _PAUSE_S_MAX)
            taken.append(seconds(partial(self._finds, self._known)))
        return taken

    def _prompt(self) -> list[bytes]:
        return [self._random.randbytes(32) for _ in range(PROMPT_BLOCKS)]

    def _commit(self, prompt: list[bytes]) -> float:
        """Store it; when the commit began."""
        with self._store.reserve(NAMESPACE, prompt, BLOCK_BYTES, parent=b"") as write:
            for view in write.views:
                view[:] = self._data
            began = time.perf_counter()
            write.commit()
        self._known = prompt
        return began

    def _finds(self, prompt: list[bytes]) -> bool:
        """Whether the index says that the node has all of it."""
        question = {"model": NAMESPACE.model, "keys": [key.hex() for key in prompt]}
        placements: list[dict[str, Any]] = self._http.post("/v1/lookup", question)["placements"]
        return [each["dram"] for each in placements] == [PROMPT_BLOCKS * NAMESPACE.block_tokens]


@dataclass(frozen=True, slots=True)
class _Death:
    """Seconds: of a lookup at most before it, until it answers no more, and of a lookup at most after it."""

    lookup_s: float
    longest_before_s: float
    gone_s: float
    stall_s: float


def dead_rows(bench: str, settings: Settings) -> list[Row]:
    """A node dies, in an index in this process."""
    blocks = settings.pick(DEAD_BLOCKS, 64_000)
    deaths = interleaved({OURS: partial(_die, blocks)}, settings.rounds)[OURS]
    lookup, before, gone, stall = (
        1e3 * median(getattr(death, name) for death in deaths)
        for name in ("lookup_s", "longest_before_s", "gone_s", "stall_s")
    )
    return [
        Row(bench, GONE, "ms", "lower", gone, Limit(LOOKUP, lookup), {}),
        Row(bench, STALL, "ms", "lower", stall, Limit(LONGEST, before), {}),
    ]


def _die(blocks: int) -> _Death:
    """A node dies that has so many blocks, each second prompt of them with another node."""
    index, prompts = Locality(), []
    dead, other = (index.open(name) for name in ("dead", "other"))
    for holding in (dead, other):
        index.show(holding)
    index.set_engines([Engine(name, (name,)) for name in ("dead", "other")])
    numbers = random.Random(0)
    for number in range(blocks // PROMPT_BLOCKS):
        prompt = [numbers.randbytes(32) for _ in range(PROMPT_BLOCKS)]
        prompts.append(prompt)
        for holding in (dead, other)[: 1 + number % _SHARED]:
            holding.stored(NAMESPACE, Medium.DRAM, prompt, ROOT)
    gc.collect()
    gc.freeze()  # as the process of an index seldom walks what it holds
    try:
        return _swept(index, prompts)
    finally:
        gc.unfreeze()


def _swept(index: Locality, prompts: list[list[bytes]]) -> _Death:
    def has(prompt: list[bytes]) -> list[int]:
        return [each.dram // NAMESPACE.block_tokens for each in index.find({NAMESPACE: prompt})]

    if has(prompts[1]) != [PROMPT_BLOCKS] * 2:
        raise BenchmarkError(f"both nodes have a prompt, and the index says {has(prompts[1])}")
    before = [seconds(partial(has, prompt)) for prompt in prompts]
    began = time.perf_counter()
    holding = index.holding("dead")
    assert holding is not None
    index.close(holding)
    answer = has(prompts[1])
    gone_s = time.perf_counter() - began
    if answer != [0, PROMPT_BLOCKS]:
        raise BenchmarkError(f"one node is dead, and the index says {answer}")
    stalls = [gone_s]
    for turn in range(sys.maxsize):
        began = time.perf_counter()
        more = index.tend()
        has(prompts[turn % len(prompts)])
        stalls.append(time.perf_counter() - began)
        if not more:
            break
    index.check()
    return _Death(median(before), max(before), gone_s, max(stalls))


def _quantile(taken: list[float], share: float) -> float:
    return sorted(taken)[min(len(taken) - 1, int(share * len(taken)))]
