"""How full an arena stays when blocks of all sizes come and go, and what making room costs. On paper:
the real directory, policy, planner and allocator, over an arena without memory.

Steady state: log-uniform sizes from 4 KiB to 64 MiB, a tenth of the blocks pinned, pins turning over. The
peer is the plain way: evict in the policy's order until a free piece fits.
"""

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean, median
from typing import Any, Final

from benchmarks.harness import GIB, KIB, MIB, OURS, Report, Row, Settings, Target, judge, row
from kvstore.block import Medium, Namespace
from kvstore.node.blocks import Block, State, evictable
from kvstore.node.directory import TierDirectory
from kvstore.node.policy import LRU
from kvstore.node.room import Room
from tiers.allocator import ALIGNMENT_BYTES, Allocator
from tiers.base import Slot, TierStatistics

BENCH: Final = "allocator"
PLAIN: Final = "evict in order"
ARENA: Final = "the arena"
SIZES: Final = (4 * KIB, 64 * MIB)
PINNED: Final = 0.1
CAPACITIES: Final = {"1GiB": GIB, "16GiB": 16 * GIB}
# Allocations, as multiples of the blocks that fit: the first part fills the arena and is not counted.
FILLING, COUNTED = 4, 6


class PaperTier:
    """A slot tier of any size that has no memory."""

    name = "paper"
    medium = Medium.DRAM
    arena = 0

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.allocator = Allocator(capacity_bytes)

    def slot_length(self, length: int) -> int:
        return -(-length // ALIGNMENT_BYTES) * ALIGNMENT_BYTES

    def take(self, length: int, owner: object, within: Slot | None = None) -> Slot | None:
        return self.allocator.take(self.slot_length(length), owner, within)

    def free(self, slot: Slot) -> Slot:
        return self.allocator.free(slot)

    def move(self, slot: Slot, to: Slot) -> None:
        """Nothing is there to be moved."""

    def poison(self, slot: Slot) -> None:
        """Nothing is there to be spoilt."""

    def grow(self, ready_bytes: int) -> None:
        self.allocator.grow(ready_bytes)

    def largest(self, count: int) -> list[Slot]:
        return self.allocator.largest(count)

    @property
    def free_bytes(self) -> int:
        return self.allocator.free_bytes

    def open(self, *, writable: bool) -> int:
        raise NotImplementedError("an arena on paper cannot be mapped")

    def view(self, slot: Slot) -> memoryview:
        raise NotImplementedError("an arena on paper cannot be read")

    def statistics(self) -> TierStatistics:
        raise NotImplementedError("ask the allocator")

    def check(self) -> list[str]:
        return self.allocator.check()

    def close(self) -> None:
        """Nothing is held."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run: fractions of the arena, and counts an allocation."""

    live_mean: float
    live_p5: float
    evicted: float
    age_p5: float
    moved_bytes: float
    refused: float
    microseconds: float


class Arena:
    """A directory over an arena on paper, and the two ways of finding a slot in it."""

    def __init__(self, capacity_bytes: int) -> None:
        self.tier = PaperTier(capacity_bytes)
        self.directory = TierDirectory("paper", Medium.DRAM, LRU())
        self.room = Room(self.tier, self.directory, memory=self.tier)
        self.room.grow(capacity_bytes)
        self.shelf = self.directory.shelf(Namespace(model="paper"))
        self.evicted: list[Block] = []

    def planned(self, length: int) -> Slot | None:
        """Ours."""
        self.room.begin()
        slot = self.room.take(length)
        self.evicted += self.room.evicted
        return slot

    def plain(self, length: int) -> Slot | None:
        """Evict the coldest until something fits."""
        slot = self.tier.take(length, self)
        while slot is None:
            block = next(self.directory.policy.victims(evictable), None)
            if block is None:
                return None
            assert isinstance(block, Block)
            self.tier.free(self.directory.evict(block))
            self.evicted.append(block)
            slot = self.tier.take(length, self)
        return slot


def simulate(capacity_bytes: int, seed: int, way: Callable[[Arena], Callable[[int], Slot | None]]) -> Outcome:
    """Run to steady state and beyond."""
    chance = random.Random(seed)
    arena = Arena(capacity_bytes)
    directory, take = arena.directory, way(arena)
    low, high = map(math.log, SIZES)
    fitting = int(capacity_bytes / ((SIZES[1] - SIZES[0]) / (high - low)))
    pinned: list[Block] = []
    shares: list[float] = []
    refused = taken_bytes = 0
    spent_s = 0.0
    ages: list[int] = []
    for number in range(fitting * (FILLING + COUNTED)):
        if number == fitting * FILLING:
            moved_from = arena.room.statistics().moved_bytes
            ages = []
            refused = taken_bytes = 0
            spent_s = 0.0
        length = int(math.exp(chance.uniform(low, high)))
        started = time.perf_counter()
        slot = take(length)
        spent_s += time.perf_counter() - started
        ages += [number - int.from_bytes(block.key, "big") for block in arena.evicted]
        arena.evicted.clear()
        if slot is None:
            refused += 1
        else:
            block = directory.add(arena.shelf, number.to_bytes(8, "big"), length, slot, State.RESERVED, None)
            slot.owner = block
            directory.seal([block])
            directory.requested([block])
            taken_bytes += length
        _turn_pins(chance, directory, arena.shelf.sealed, pinned)
        if number >= fitting * FILLING:
            shares.append(directory.statistics().block_bytes / capacity_bytes)
    assert directory.check() == arena.tier.check() == []
    allocations = fitting * COUNTED
    moved = arena.room.statistics().moved_bytes - moved_from
    return Outcome(
        live_mean=mean(shares),
        live_p5=sorted(shares)[len(shares) // 20],
        evicted=len(ages) / (allocations - refused),
        age_p5=sorted(ages)[len(ages) // 20] / mean(ages),
        moved_bytes=moved / taken_bytes,
        refused=refused / allocations,
        microseconds=spent_s / allocations * 1e6,
    )


def run(settings: Settings) -> Report:
    """All sizes of arena, ours and the plain way with the same seeds."""
    rows: list[Row] = []
    ways: dict[str, Callable[[Arena], Callable[[int], Slot | None]]] = {
        OURS: lambda arena: arena.planned,
        PLAIN: lambda arena: arena.plain,
    }
    for name, capacity in CAPACITIES.items():
        if settings.quick and capacity > GIB:
            continue
        outcomes: dict[str, list[Outcome]] = {way: [] for way in ways}
        for seed in range(settings.rounds):
            for way, take in ways.items():
                outcomes[way].append(simulate(capacity, seed, take))
        rows += _rows(name, outcomes)
    targets = [
        Target((f"live bytes mean {name}",), None, bound) for name, bound in (("1GiB", 0.80), ("16GiB", 0.90))
    ]
    caption = (
        "Pure computation on any core, no memory behind it. Fractions of the arena are live bytes over its "
        f"size; medians over {settings.rounds} seeds. In the long run"
        " each stored block is evicted once; fewer here, since small blocks still gather."
    )
    return Report(BENCH, rows, judge(rows, targets), caption)


def _rows(name: str, outcomes: dict[str, list[Outcome]]) -> list[Row]:
    measured: list[tuple[str, str, Any, float]] = [
        ("live bytes mean", "of the arena", "higher", 1.0),
        ("live bytes 5th percentile", "of the arena", "higher", 1.0),
        ("blocks evicted per allocation", "blocks", "lower", 1.0),
        ("age when evicted, 5th percentile", "of the mean", "higher", 1.0),
        ("bytes moved per byte stored", "bytes", "lower", 0.0),
        ("allocations refused", "of all", "lower", 0.0),
        ("time to find a slot", "us", "lower", 0.0),
    ]
    rows = []
    for (case, unit, better, limit), field in zip(measured, Outcome.__dataclass_fields__, strict=True):
        figures = {way: median(getattr(o, field) for o in runs) for way, runs in outcomes.items()}
        rows.append(row(BENCH, f"{case} {name}", unit, better, {**figures, ARENA: limit}, ARENA))
    return rows


def _turn_pins(
    chance: random.Random, directory: TierDirectory, sealed: dict[bytes, Block], pinned: list[Block]
) -> None:
    """Unpin one at random, half of the time; then pin young blocks until a tenth is pinned."""
    if pinned and chance.random() < 0.5:
        index = chance.randrange(len(pinned))
        pinned[index], pinned[-1] = pinned[-1], pinned[index]
        directory.unpin([pinned.pop()])
    keys = None
    while len(pinned) < PINNED * len(sealed):
        keys = keys or list(sealed)
        block = sealed[chance.choice(keys)]
        if block.pins == 0:
            directory.pin([block])
            pinned.append(block)
