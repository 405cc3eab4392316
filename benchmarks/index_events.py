"""Events from bytes into the index, in this process and on one core: blocks a second."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Final, Protocol

from benchmarks.batches import (
    BLOCK_TOKENS,
    MODEL,
    NODE,
    PROMPT_BLOCKS,
    Prompt,
    feed_frames,
    prompts,
    removed_batch,
    stored_batches,
)
from benchmarks.harness import OURS, BenchmarkError, Row, Settings, medians, row, seconds
from benchmarks.peers import dynamo
from kvstore.index import feed
from kvstore.index.engine_source import EngineKind, EngineSource
from kvstore.index.engine_stream import EngineStream
from kvstore.index.events import decode_batch
from kvstore.index.locality import Locality
from kvstore.index.node_stream import Names, NodeStream

TREE: Final = "dynamo RadixTree"
DECODING: Final = "decoding alone"
BLOCKS: Final = 1_000_000
QUICK_BLOCKS: Final = 6_400
# A fifth is enough of what costs more.
FEWER: Final = 5
VLLM, TOKENS, LMCACHE = "vllm-sha256:00000000", "tokens", "lmcache-blake3:00000000"
LONG, SHORT = "ingest 64-block events", "ingest 1-block events"


class Publisher(Protocol):
    """Somebody whose messages an index is given, with nobody else in it."""

    def take(self, messages: Sequence[bytes]) -> None:
        """Give it these, in this order."""
        ...

    def blocks(self) -> int:
        """What the publisher has now, as the index knows it."""
        ...


class Engine:
    """An engine."""

    def __init__(self, scheme: str = VLLM) -> None:
        source = EngineSource("engine", EngineKind.VLLM, MODEL, BLOCK_TOKENS, scheme, endpoint="")
        self._stream = EngineStream(source, Locality())
        self._seq = 0

    def take(self, messages: Sequence[bytes]) -> None:
        for payload in messages:
            self._stream.batch(self._seq, b"", payload, 0.0)
            self._seq += 1

    def blocks(self) -> int:
        return self._stream.statistics().blocks


class Node:
    """A daemon, by its feed."""

    def __init__(self) -> None:
        self._stream = NodeStream(Locality(), Names(), NODE, 0.0)

    def take(self, messages: Sequence[bytes]) -> None:
        for frame in messages:
            self._stream.received(frame, 0.0, 1.0)

    def blocks(self) -> int:
        return self._stream.statistics(0.0).blocks


@dataclass(frozen=True, slots=True)
class Case:
    """What is said to an index: `before` while nobody looks at the clock, then `messages`."""

    name: str
    publisher: Callable[[], Publisher]
    decode: Callable[[bytes], object]
    messages: Sequence[bytes]
    blocks: int
    before: Sequence[bytes] = ()
    tree_events: Sequence[bytes] = ()

    def ours(self) -> float:
        """Blocks a second into a fresh index."""
        publisher = self.publisher()
        publisher.take(self.before)
        there = publisher.blocks()
        rate = self.blocks / seconds(partial(publisher.take, self.messages))
        changed = abs(publisher.blocks() - there)
        if changed != self.blocks:
            raise BenchmarkError(f"{self.name}: {changed:,} of {self.blocks:,} blocks are in the index")
        return rate

    def decoding(self) -> float:
        """Blocks a second of the same messages, only decoded."""
        return self.blocks / seconds(lambda: deque(map(self.decode, self.messages), 0))

    def tree(self) -> float:
        """Blocks a second into a fresh tree of Dynamo's."""
        return self.blocks / seconds(partial(dynamo.Tree().apply, 0, self.tree_events))


def rows(bench: str, settings: Settings, *, with_tree: bool) -> list[Row]:
    """A row for each case."""
    rows = []
    for case in _cases(settings, with_tree=with_tree):
        samplers = {OURS: case.ours, DECODING: case.decoding}
        if case.tree_events:
            samplers[TREE] = case.tree
        rows.append(row(bench, case.name, "blocks/s", "higher", medians(samplers, settings.rounds), DECODING))
    return rows


def _cases(settings: Settings, *, with_tree: bool) -> Iterator[Case]:
    blocks = settings.pick(BLOCKS, QUICK_BLOCKS)
    every = list(prompts(blocks))
    some = every[: len(every) // FEWER]
    fewer = len(some) * PROMPT_BLOCKS
    long, short = _batches(every, PROMPT_BLOCKS), _batches(some, 1)
    trees = [_tree_events(every, PROMPT_BLOCKS), _tree_events(some, 1)] if with_tree else [(), ()]
    rehashing = partial(Engine, TOKENS)
    yield Case(LONG, Engine, decode_batch, long, blocks, tree_events=trees[0])
    yield Case(SHORT, Engine, decode_batch, short, fewer, tree_events=trees[1])
    yield Case(f"{LONG}, arrays", Engine, decode_batch, _batches(every, PROMPT_BLOCKS, arrays=True), blocks)
    yield Case(f"{LONG}, re-hashed", rehashing, decode_batch, long[: len(some)], fewer)
    yield Case(f"{SHORT}, re-hashed", rehashing, decode_batch, short, fewer)
    removed = [removed_batch(prompt) for prompt in every]
    yield Case(f"{LONG}, removed", Engine, decode_batch, removed, blocks, before=long)
    every = list(prompts(blocks, digests=True))
    yield Case(f"{LONG}, 32-byte hashes", Engine, decode_batch, _batches(every, PROMPT_BLOCKS), blocks)
    for name, scheme in {"numbers": VLLM, "keys of 32 bytes": LMCACHE}.items():
        greeting, frames = feed_frames(every, scheme)
        yield Case(f"{LONG}, feed, {name}", Node, feed.decode_to_index, frames, blocks, before=greeting)


def _batches(some: Sequence[Prompt], event_blocks: int, *, arrays: bool = False) -> list[bytes]:
    return [batch for prompt in some for batch in stored_batches(prompt, event_blocks, arrays=arrays)]


def _tree_events(some: Sequence[Prompt], event_blocks: int) -> list[bytes]:
    numbers = ([key for key in prompt.hashes if isinstance(key, int)] for prompt in some)
    return list(chain.from_iterable(dynamo.stored_events(keys, event_blocks) for keys in numbers))
