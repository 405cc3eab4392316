"""What a node has measured of itself, for those who send requests there: how fast its media are, how large
its blocks. Nothing is measured here but copying; the loads of readers are, as they happen.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import nlargest
from operator import attrgetter
from typing import Final

import numpy as np

from kvstore.block import Medium, Namespace
from kvstore.node.blocks import Shelf
from kvstore.node.directory import TierDirectory
from kvstore.node.lower import Lower

_COPIED_BYTES: Final = 16 << 20
_COPIES: Final = 4
_BYTES_PER_S_MAX: Final = 1e12
# All that tells blocks apart but for whose they are.
_kind = attrgetter("model", "block_tokens", "dtype", "layout", "group", "shard", "scheme")


@dataclass(frozen=True, slots=True)
class Measured:
    """A medium gives n bytes in `latency_s` and n / `bytes_per_s`."""

    latency_s: float
    bytes_per_s: float


def copying() -> Measured:
    """How fast one thread copies memory that it has touched: the best of some copies, 20 ms in all.

    What engines do with blocks in the arena is not seen here: a copy in the host takes this long, one to a
    device over PCIe mostly less. Blocks for that long; for a thread beside the event loop.
    """
    source, target = np.ones(_COPIED_BYTES, np.uint8), np.ones(_COPIED_BYTES, np.uint8)
    best_s = 1.0
    for _ in range(_COPIES):
        began_s = time.perf_counter()
        np.copyto(target, source)
        best_s = min(best_s, time.perf_counter() - began_s)
    return Measured(0.0, _COPIED_BYTES / best_s)


def loading(lowers: Iterable[Lower]) -> dict[Medium, Measured]:
    """What readers' loads have shown of each medium below the arena, where there were enough.

    A prefix lies on all tiers of a medium, which are read at once: together they give what each gives.
    """
    found: dict[Medium, list[Lower]] = {}
    for lower in lowers:
        if lower.line.ready and lower.line.slope > 1 / _BYTES_PER_S_MAX:
            found.setdefault(lower.tier.medium, []).append(lower)
    return {
        medium: Measured(
            max([lower.line.intercept for lower in some]), sum([1 / lower.line.slope for lower in some])
        )
        for medium, some in found.items()
    }


def fullest(tiers: Sequence[TierDirectory], looked: int, count: int) -> list[tuple[Namespace, int, int]]:
    """Namespaces with their blocks and the bytes of those: those with most of `looked` at in each tier.

    Blocks are as large in every tier and for every salt, so each kind counts where there are most.
    """
    best: dict[tuple[object, ...], Shelf] = {}
    for tier in tiers:
        for shelf in tier.some_shelves(looked):
            kind = _kind(shelf.namespace)
            if shelf.sealed and (kind not in best or len(best[kind].sealed) < len(shelf.sealed)):
                best[kind] = shelf
    shelves = nlargest(count, best.values(), key=lambda shelf: len(shelf.sealed))
    return [(shelf.namespace, len(shelf.sealed), shelf.sealed_bytes) for shelf in shelves]
