"""A production trace through the real directory and policies: what hits in which tier, and what is written.

No bytes, no I/O and no clock: the figures are exact, and the same on every machine. The known ones are those
that come with the trace, computed by others with the same rules: a hole ends the hit, a request's blocks are
all in once it is over, and then the policy chooses among all of them.
"""

import lzma
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Final

import msgspec

from benchmarks.harness import OURS, Limit, Report, Row, Settings, Target, judge, row
from kvstore.block import Medium, Namespace
from kvstore.node.blocks import Block, State, evictable
from kvstore.node.directory import TierDirectory
from kvstore.node.policy import LRU, POLICIES, Policy

BENCH: Final = "trace"
TRACE: Final = Path(__file__).parent / "data" / "conversation_trace.jsonl.xz"
NAMESPACE: Final = Namespace(model="trace", block_tokens=512)
OPTIMUM: Final = "Belady's optimum"
# What hits of all blocks, in percent, by the tier's size in blocks.
KNOWN: Final = {
    1_000: {"fifo": 4.36, "lru": 4.45, "s3-fifo": 5.58, OPTIMUM: 19.07},
    3_000: {"fifo": 6.33, "lru": 6.53, "s3-fifo": 9.40, OPTIMUM: 29.45},
    10_000: {"fifo": 18.13, "lru": 21.16, "s3-fifo": 20.18, OPTIMUM: 36.64},
    30_000: {"fifo": 29.37, "lru": 32.57, "s3-fifo": 28.57, OPTIMUM: 36.64},
    100_000: {"fifo": 35.63, "lru": 36.37, "s3-fifo": 36.31, OPTIMUM: 36.64},
}
QUICK_SIZES: Final = (1_000, 3_000)
DRAM_BLOCKS, NVME_BLOCKS = 3_000, 30_000
RECURRING: Final = "blocks asked for again"
ROUNDING: Final = "known to two digits"
AGREEMENT: Final = "farthest from a known figure"
TARGETS: Final = (Target((AGREEMENT,), None, 0.01),)


class Way(StrEnum):
    """When a block goes down from DRAM, and whether it stays below when it comes back up."""

    WRITE_BEHIND = "write-behind, inclusive"
    DEMOTE = "demotion, inclusive"
    EXCLUSIVE = "demotion, exclusive"
    ADMIT_HIT = "demotion of blocks hit once, inclusive"


class Level:
    """One tier of a number of blocks of equal length, without any bytes."""

    def __init__(self, medium: Medium, policy: Policy, capacity_blocks: int) -> None:
        self.directory = TierDirectory(medium.value, medium, policy)
        self.capacity_blocks = capacity_blocks
        self.written = 0
        self._shelf = self.directory.shelf(NAMESPACE)

    def __contains__(self, key: bytes) -> bool:
        return key in self._shelf.sealed

    def hit_length(self, keys: Sequence[bytes]) -> int:
        """How many leading keys are here."""
        return next((length for length, key in enumerate(keys) if key not in self), len(keys))

    def request(self, keys: Sequence[bytes]) -> None:
        """Store what is missing, and count all as used, head first; it may be more than fits."""
        sealed = self._shelf.sealed
        missing = [key for key in keys if key not in sealed]
        # Without parents: what the trace's own figures know is the order of the policy.
        self.directory.seal(
            [self.directory.add(self._shelf, key, 1, None, State.RESERVED, None) for key in missing]
        )
        self.directory.requested([sealed[key] for key in keys])
        self.written += len(missing)

    def shrink(self) -> list[bytes]:
        """Evict what is too much; the keys in the order in which they leave."""
        excess = len(self._shelf.sealed) - self.capacity_blocks
        return [self._evict_next() for _ in range(excess)]

    def drop(self, keys: Iterable[bytes]) -> None:
        """Remove these, where they are here."""
        for block in [self._shelf.sealed[key] for key in keys if key in self]:
            self.directory.evict(block)

    def _evict_next(self) -> bytes:
        block = next(self.directory.policy.victims(evictable))
        assert isinstance(block, Block)
        self.directory.evict(block)
        return block.key


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of all blocks the percentage that hits in DRAM, and in DRAM or NVMe; blocks written to NVMe."""

    dram: float
    nvme: float
    written: int


class Hierarchy:
    """DRAM with NVMe below. What is asked for and lies below comes up; what is nowhere is stored above."""

    def __init__(self, way: Way, dram_blocks: int, nvme_blocks: int) -> None:
        self.way = way
        self.dram = Level(Medium.DRAM, LRU(), dram_blocks)
        self.nvme = Level(Medium.NVME, LRU(), nvme_blocks)
        self._hit: set[bytes] = set()

    def request(self, keys: Sequence[bytes]) -> tuple[int, int]:
        """Serve one prompt: the hit length in DRAM, and in both together."""
        in_dram = self.dram.hit_length(keys)
        reached = next(
            (n for n, k in enumerate(keys) if k not in self.dram and k not in self.nvme), len(keys)
        )
        below = [key for key in keys if key not in self.dram and key in self.nvme]
        new = [key for key in keys if key not in self.dram and key not in self.nvme]
        if self.way is Way.EXCLUSIVE:
            self.nvme.drop(below)
        else:
            self.nvme.request(below)
        self._hit.update(keys[:reached])
        self.dram.request(keys)
        if self.way is Way.WRITE_BEHIND:
            self.nvme.request(new)
        # Leaving tail first, and a request is head first.
        self._demote(self.dram.shrink()[::-1])
        self.nvme.shrink()
        return in_dram, reached

    def _demote(self, keys: Sequence[bytes]) -> None:
        """These leave DRAM: what has a copy below renews it there, and what has none is written if wanted."""
        if self.way is Way.WRITE_BEHIND:  # it was written once, when it was stored
            keys = [key for key in keys if key in self.nvme]
        elif self.way is Way.ADMIT_HIT:
            keys = [key for key in keys if key in self._hit or key in self.nvme]
        self._hit.difference_update(keys)
        self.nvme.request(keys)


@cache
def prompts(path: Path = TRACE) -> list[list[bytes]]:
    """The keys of every request's blocks, in order."""
    with lzma.open(path) as lines:
        return [[number.to_bytes(8, "big") for number in _ids(line)] for line in lines]


def replay_one(policy: Callable[[], Policy], capacity_blocks: int) -> float:
    """Percent of blocks that hit in one tier."""
    level = Level(Medium.DRAM, policy(), capacity_blocks)
    hits = 0
    for keys in prompts():
        hits += level.hit_length(keys)
        level.request(keys)
        level.shrink()
    assert level.directory.check() == []
    return _percent(hits)


def replay_two(way: Way, dram_blocks: int = DRAM_BLOCKS, nvme_blocks: int = NVME_BLOCKS) -> Outcome:
    """What hits where, and what is written, when blocks go down in one way."""
    tiers = Hierarchy(way, dram_blocks, nvme_blocks)
    dram = both = 0
    for keys in prompts():
        in_dram, reached = tiers.request(keys)
        dram += in_dram
        both += reached
    assert tiers.dram.directory.check() == tiers.nvme.directory.check() == []
    return Outcome(_percent(dram), _percent(both), tiers.nvme.written)


def run(settings: Settings) -> Report:
    """Every size of one tier with every policy, then every way between two tiers."""
    sizes = [size for size in KNOWN if size in QUICK_SIZES or not settings.quick]
    ways = [Way.DEMOTE] if settings.quick else list(Way)
    rows = [*_one_tier_rows(sizes), *_two_tier_rows(ways)]
    return Report(BENCH, rows, judge(rows, TARGETS), _caption())


def _one_tier_rows(sizes: Iterable[int]) -> list[Row]:
    rows = []
    differences = []
    for size in sizes:
        for name, policy in POLICIES.items():
            rate = replay_one(policy, size)
            differences.append(abs(rate - KNOWN[size][name]))
            rows.append(_rate_row(f"hits in {size:,} blocks, {name}", rate, KNOWN[size]))
    rounding = Limit(ROUNDING, 0.005)
    return [*rows, Row(BENCH, AGREEMENT, "% of blocks", "lower", max(differences), rounding, {})]


def _two_tier_rows(ways: Iterable[Way]) -> list[Row]:
    asked = Counter(chain.from_iterable(prompts()))
    recurring = Limit(RECURRING, sum(count > 1 for count in asked.values()))
    rows = []
    for way in ways:
        outcome = replay_two(way)
        rows += [
            _rate_row(f"hits in DRAM; {way}", outcome.dram, KNOWN[DRAM_BLOCKS]),
            _rate_row(f"hits in DRAM or NVMe; {way}", outcome.nvme, KNOWN[NVME_BLOCKS]),
            Row(BENCH, f"written to NVMe; {way}", "blocks", "lower", outcome.written, recurring, {}),
        ]
    return rows


def _rate_row(case: str, rate: float, known: Mapping[str, float]) -> Row:
    return row(BENCH, case, "% of blocks", "higher", {OURS: rate, **known}, OPTIMUM)


def _caption() -> str:
    return (
        "Pure computation on any core; every round would give the same, so there is one. Limits and peers are"
        " the figures that come with the trace, for one tier of that size; for two tiers, of NVMe's alone."
        " Tail-first insertion without parents gives them for fifo too: 4.36, 6.33 and 18.13 %. Two tiers:"
        f" DRAM {DRAM_BLOCKS:,} blocks, NVMe {NVME_BLOCKS:,}, lru in both. Blocks asked for again are all"
        " that need ever be written, by one who knows the future."
    )


def _ids(line: bytes) -> list[int]:
    ids: list[int] = msgspec.json.decode(line)["hash_ids"]
    return ids


def _percent(blocks: int) -> float:
    return 100 * blocks / sum(map(len, prompts()))
