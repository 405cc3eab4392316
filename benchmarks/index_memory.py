"""What a block costs in the memory of an index, each measured in a process that does nothing else.

As a program (`python -m benchmarks.index_memory WHAT BLOCKS HOLDERS`) it is such a process, and prints bytes.
"""

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Final

from benchmarks.batches import BLOCK_TOKENS, MODEL, PROMPT_BLOCKS, Prompt, prompts, stored_batches
from benchmarks.harness import OURS, Row, Settings, medians, row
from benchmarks.peers import dynamo
from benchmarks.processes import private_bytes
from kvstore.content_keys import KEY_MASK
from kvstore.index.engine_source import EngineKind, EngineSource
from kvstore.index.engine_stream import EngineStream
from kvstore.index.locality import Locality

TREE: Final = "dynamo RadixTree"
KEYS: Final = "a dict of keys"
ENGINES: Final = 64
BLOCKS: Final = 1_000_000
CASE: Final = "memory, 1M blocks on 64 engines"
# How many engines have each block.
CASE_TO_HOLDERS: Final = {CASE: 1, f"{CASE}, each on 4": 4}
_ROOT: Final = Path(__file__).parent.parent


def rows(bench: str, settings: Settings, *, with_tree: bool) -> list[Row]:
    """Bytes for a block, that one engine has, or some. They are nearly the same each time: one round."""
    blocks = settings.pick(BLOCKS, 64_000)
    names = (OURS, KEYS, TREE) if with_tree else (OURS, KEYS)
    cases = [*CASE_TO_HOLDERS.items()]
    rows = []
    for case, holders in cases[:1] if settings.quick else cases:
        samplers = {name: partial(_sample, name, blocks, holders) for name in names}
        rows.append(row(bench, case, "bytes/block", "lower", medians(samplers, 1), KEYS))
    return rows


def _sample(what: str, blocks: int, holders: int) -> float:
    command = [sys.executable, "-m", "benchmarks.index_memory", what, str(blocks), str(holders)]
    done = subprocess.run(command, cwd=_ROOT, stdout=subprocess.PIPE, check=True)
    return int(done.stdout) / blocks


def main(what: str, blocks: int, holders: int) -> None:
    """Fill an index, and print by how much this process has grown."""
    take = {OURS: _ours, KEYS: _keys, TREE: _tree}[what]()
    random = Random(holders)
    gc.collect()
    before = private_bytes(os.getpid())
    for prompt in prompts(blocks):
        take(prompt, random.sample(range(ENGINES), holders))
    gc.collect()
    print(private_bytes(os.getpid()) - before)


_Take = Callable[[Prompt, Sequence[int]], None]


def _ours() -> _Take:
    index = Locality()
    streams = [
        EngineStream(
            EngineSource(f"engine {n}", EngineKind.VLLM, MODEL, BLOCK_TOKENS, "vllm-sha256", ""), index
        )
        for n in range(ENGINES)
    ]
    seqs = [0] * ENGINES

    def take(prompt: Prompt, engines: Sequence[int]) -> None:
        (batch,) = stored_batches(prompt, PROMPT_BLOCKS)
        for engine in engines:
            streams[engine].batch(seqs[engine], b"", batch, 0.0)
            seqs[engine] += 1

    return take


def _keys() -> _Take:
    key_to_none: dict[int, None] = {}

    def take(prompt: Prompt, engines: Sequence[int]) -> None:
        key_to_none.update(dict.fromkeys(_numbers(prompt)))

    return take


def _tree() -> _Take:
    tree = dynamo.Tree()

    def take(prompt: Prompt, engines: Sequence[int]) -> None:
        events = dynamo.stored_events(_numbers(prompt), PROMPT_BLOCKS)
        for engine in engines:
            tree.apply(engine, events)

    return take


def _numbers(prompt: Prompt) -> list[int]:
    """Its hashes, as many bits of them as the index keeps."""
    return [key & KEY_MASK for key in prompt.hashes if isinstance(key, int)]


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
