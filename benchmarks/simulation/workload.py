"""Prompts of the trace with times of arrival: as many copies, and as fast, as a load needs."""

import lzma
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Final

import msgspec

from benchmarks.simulation.models import BLOCK_TOKENS, Served
from benchmarks.trace import TRACE

# The trace's times are multiples of it: what came within is at once there.
_BIN_S: Final = 3.0


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request: when it comes, its length, and its blocks' keys, the last of which may be partial."""

    at_s: float
    tokens: int
    keys: Sequence[int]


@cache
def trace(path: Path = TRACE, seed: int = 0) -> list[Prompt]:
    """The trace in its order, with each 3 s of arrivals spread evenly at random over them."""
    random = Random(seed)
    with lzma.open(path) as lines:
        rows = [msgspec.json.decode(line) for line in lines]
    bins = [round(row["timestamp"] / 1e3 / _BIN_S) for row in rows]
    times = sorted(_BIN_S * (number + random.random()) for number in bins)
    return [Prompt(at_s, row["input_length"], row["hash_ids"]) for at_s, row in zip(times, rows, strict=True)]


def copies(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """So many clusters' users on one: copies with keys of their own, each shifted by its part of the whole.

    What a shift pushes over the end comes at the beginning, in front of what preceded it.
    """
    span_s = _BIN_S + prompts[-1].at_s
    width = 1 + max(max(prompt.keys) for prompt in prompts)
    all_of_them = [
        replace(
            prompt,
            at_s=(prompt.at_s + span_s * number / count) % span_s,
            keys=[key + width * number for key in prompt.keys],
        )
        for number in range(count)
        for prompt in prompts
    ]
    return sorted(all_of_them, key=lambda prompt: prompt.at_s)


def least_seconds(prompts: Iterable[Prompt], served: Served) -> list[float]:
    """The time of an engine of nominal speed for each of them, if nothing were forgotten nor to be loaded."""
    seen: set[int] = set()
    seconds = []
    for prompt in prompts:
        known = next((at for at, key in enumerate(prompt.keys) if key not in seen), len(prompt.keys))
        cached = cached_tokens(prompt, known)
        seconds.append(served.prefill.seconds(prompt.tokens - cached, cached))
        seen.update(prompt.keys)
    return seconds


def cached_tokens(prompt: Prompt, blocks: int) -> int:
    """What so many leading blocks save: the last token is always computed."""
    return min(blocks * BLOCK_TOKENS, prompt.tokens - 1)


def faster(prompts: Sequence[Prompt], factor: float) -> list[Prompt]:
    """The same, so many times as fast."""
    return [replace(prompt, at_s=prompt.at_s / factor) for prompt in prompts]
