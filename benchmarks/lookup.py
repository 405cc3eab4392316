"""How long the index takes to say who has how much of a prompt, in one process, beside Dynamo's radix tree.

Ours answers in groups of equal depth (`lookup`), or engine by engine (`find`). The tree answers with an
object that has yet to be read, or with its scores, a dict of all workers. The keys that are looked up are
other objects than those that were stored, as they are when a request brings them.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Final

import msgspec

from benchmarks.harness import (
    OURS,
    BenchmarkError,
    Report,
    Row,
    Settings,
    Target,
    judge,
    medians,
    row,
    seconds,
)
from benchmarks.peers import dynamo
from benchmarks.processes import pin
from kvstore.block import Medium, Namespace
from kvstore.index.keytable import ROOT, Key
from kvstore.index.locality import Locality
from kvstore.index.placement import Engine

BENCH: Final = "lookup"
TREE, WITH_SCORES = "dynamo RadixTree", "dynamo with scores"
DICT_GET: Final = "one dict.get"
CLOSED: Final = Namespace("closed", block_tokens=16, scheme="vllm-sha256:00000000")
# A space of its own: of an engine that leaves one parent out, all blocks beside that one are walked.
OPEN: Final = Namespace("open", block_tokens=16, scheme="vllm-sha256:00000000")
KEYS: Final = (64, 512, 2048, 8192)
ENGINES: Final = (8, 64, 512)
OTHER_BLOCKS: Final = 1_000_000
EVENT_BLOCKS: Final = 64
KEY_BITS: Final = 60
# Calls timed together take about so long; they go round as many copies of the keys.
_SAMPLE_S: Final = 0.02
_COPIES: Final = 4


@dataclass(frozen=True, slots=True)
class Shape:
    """How much of a prompt each engine has. With `walked` nobody says of a block what precedes it.

    Engines have the `shares` of it in turns; where there are none, each another one.
    """

    name: str
    shares: tuple[float, ...] = ()
    walked: bool = False

    @property
    def namespace(self) -> Namespace:
        """Where such prompts are."""
        return OPEN if self.walked else CLOSED

    def depth(self, keys: int, engine: int, engines: int) -> int:
        """How many leading keys an engine has."""
        if self.shares:
            return int(keys * self.shares[engine % len(self.shares)])
        return keys * (engine + 1) // engines


SHAPES: Final = (
    Shape("equal", (1,)),
    Shape("equal in part", (7 / 8,)),
    Shape("4 depths", (1, 1 / 2, 1 / 3, 1 / 5)),
    Shape("4 depths in part", (7 / 8, 1 / 2, 1 / 3, 1 / 5)),
    Shape("all different"),
)
WALKED: Final = Shape("equal, walked", (1,), walked=True)
WALKED_KEYS: Final = (512, 8192)
WALKED_ENGINES: Final = 64

_CASES: Final = tuple(
    f"{keys} keys {engines} engines {shape.name}"
    for keys in KEYS
    for engines in ENGINES
    for shape in (*SHAPES, WALKED)
)
TARGETS: Final = (
    Target(tuple(f"lookup 8192 keys 64 engines {shape.name}" for shape in SHAPES if shape.shares), None, 5.0),
    Target(tuple(f"lookup {case}" for case in _CASES), TREE, 1.0),
    Target(tuple(f"find {case}" for case in _CASES), WITH_SCORES, 1.0),
)


def run(settings: Settings) -> Report:
    """An index and a tree for each number of engines, with a prompt in it for each size and shape."""
    absent = dynamo.missing()
    rows = []
    pin(os.getpid(), {settings.cores.client})
    try:
        others = _Others(settings.pick(OTHER_BLOCKS, OTHER_BLOCKS // 100))
        for engines in ENGINES[:2] if settings.quick else ENGINES:
            rows += _Stage(engines, others, with_tree=absent is None).rows(settings)
    finally:
        pin(os.getpid(), settings.cores.all)
    versions = {} if absent else {"dynamo": dynamo.installed_version()}
    missing = {"dynamo": absent} if absent else {}
    return Report(BENCH, rows, judge(rows, TARGETS), _caption(settings), versions, missing)


class _Others:
    """What else is in every index: prompts of one event each. And a dict of as many keys, the limit."""

    def __init__(self, count: int) -> None:
        random = Random(0)
        self.prompts = [_prompt(random, EVENT_BLOCKS) for _ in range(count // EVENT_BLOCKS)]
        keys = [key for prompt in self.prompts for key in prompt]
        self._keys = dict.fromkeys(keys)
        self._asked = random.sample(keys, 4096)

    def get_us(self) -> float:
        """How long one of them takes, of many in random order."""
        gets = map(self._keys.__getitem__, self._asked)
        return 1e6 * seconds(lambda: deque(gets, 0)) / len(self._asked)


class _Stage:
    """Engines in one index of ours and in one tree, where there is one; the other prompts are shared out."""

    def __init__(self, engines: int, others: _Others, *, with_tree: bool) -> None:
        self._random = Random(engines)
        self._others = others
        self._engines = [Engine(f"engine {number}") for number in range(engines)]
        self._index = Locality(blocks_max=1 << 40)
        self._index.set_engines(self._engines)
        self._holdings = [self._index.open(engine.name) for engine in self._engines]
        for holding in self._holdings:
            self._index.show(holding)
        self._tree = dynamo.Tree() if with_tree else None
        for number, prompt in enumerate(others.prompts):
            self._store(prompt, [number % engines], CLOSED)

    def rows(self, settings: Settings) -> list[Row]:
        """Those of every size and shape."""
        rows = []
        for count in (KEYS[0], KEYS[-1]) if settings.quick else KEYS:
            for shape in SHAPES:
                rows += self._rows(count, shape, settings.rounds)
            if count in WALKED_KEYS and len(self._engines) == WALKED_ENGINES:
                rows += self._rows(count, WALKED, settings.rounds)
        return rows

    def _rows(self, count: int, shape: Shape, rounds: int) -> list[Row]:
        prompt = _prompt(self._random, count)
        depths = [shape.depth(count, engine, len(self._engines)) for engine in range(len(self._engines))]
        for depth in set(depths):
            those = [engine for engine, its in enumerate(depths) if its == depth]
            self._store(prompt[:depth], those, shape.namespace)
        self._check(prompt, depths, shape.namespace)
        copies = _copies(prompt)
        samplers: dict[str, Callable[[], float]] = {
            "lookup": _Calls(partial(self._index.depths, shape.namespace), copies),
            "find": _Calls(lambda keys: self._index.find({shape.namespace: keys}), copies),
            DICT_GET: self._others.get_us,
        }
        if self._tree is not None:
            samplers |= {TREE: _Calls(self._tree.look_up, copies)}
            samplers |= {WITH_SCORES: _Calls(self._tree.scores, copies)}
        figures = medians(samplers, rounds)
        case = f"{count} keys {len(self._engines)} engines {shape.name}"
        return [
            row(BENCH, f"{verb} {case}", "us", "lower", _beside(figures, verb, peers), DICT_GET)
            for verb, peers in {"lookup": (TREE, WITH_SCORES), "find": (WITH_SCORES,)}.items()
        ]

    def _store(self, keys: Sequence[int], engines: Sequence[int], namespace: Namespace) -> None:
        """These engines have the whole of it."""
        events = dynamo.stored_events(keys, EVENT_BLOCKS) if self._tree else []
        for engine in engines:
            for start in range(0, len(keys), EVENT_BLOCKS):
                parent: Key | None = None
                if namespace is CLOSED:
                    parent = keys[start - 1] if start else ROOT
                event = keys[start : start + EVENT_BLOCKS]
                self._holdings[engine].stored(namespace, Medium.GPU, event, parent)
            if self._tree:
                self._tree.apply(engine, events)

    def _check(self, keys: list[int], depths: Sequence[int], namespace: Namespace) -> None:
        """All answers are the same, and right."""
        groups = self._index.depths(namespace, keys)
        placements = self._index.find({namespace: keys})
        answers = {
            "groups": ([depth for depth, _ in groups], sorted({*depths} - {0}, reverse=True)),
            "placements": ([each.gpu // namespace.block_tokens for each in placements], [*depths]),
        }
        if self._tree:
            scores = self._tree.scores(keys)
            answers[TREE] = ([scores.get((engine, 0), 0) for engine in range(len(depths))], [*depths])
        for name, (got, right) in answers.items():
            if got != right:
                raise BenchmarkError(f"{name}: {got} where engines have {right} of {len(keys)} keys")


class _Calls:
    """A sample is what one call takes, of as many as take `_SAMPLE_S` together, going round the copies."""

    def __init__(self, call: Callable[[list[int]], object], copies: Sequence[list[int]]) -> None:
        self._call = call
        self._copies = copies
        self._rounds = max(1, int(_SAMPLE_S / seconds(self._go_round)))

    def __call__(self) -> float:
        return 1e6 * seconds(self._go_round_often) / self._rounds / len(self._copies)

    def _go_round_often(self) -> None:
        for _ in range(self._rounds):
            self._go_round()

    def _go_round(self) -> None:
        for keys in self._copies:
            self._call(keys)


def _prompt(random: Random, count: int) -> list[int]:
    return [random.getrandbits(KEY_BITS) for _ in range(count)]


def _copies(keys: Sequence[int]) -> list[list[int]]:
    """Other objects each, as requests bring them."""
    packed = msgspec.msgpack.encode(keys)
    return [msgspec.msgpack.decode(packed, type=list[int]) for _ in range(_COPIES)]


def _beside(figures: Mapping[str, float], verb: str, peers: Iterable[str]) -> dict[str, float]:
    """Ours by this verb, the limit, and these peers where they were measured."""
    others = {name: figures[name] for name in (DICT_GET, *peers) if name in figures}
    return {OURS: figures[verb], **others}


def _caption(settings: Settings) -> str:
    return (
        f"One process, all its threads on core {settings.cores.client}: the tree is slower on two cores, or "
        f"on any. Index and tree hold {OTHER_BLOCKS:,} blocks of other prompts besides. The limit is one "
        "lookup in a dict of as many keys. `lookup` answers in groups, `find` for each engine. The deepest "
        "engine has the whole prompt, or 7/8 of it `in part`; `walked`: nobody said what precedes what. What "
        "is asked again and again is in the processor's caches, ours as the tree's."
    )
