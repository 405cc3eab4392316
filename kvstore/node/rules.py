"""How blocks come into a tier below the arena, and how they leave it. Values only."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rules:
    """How blocks come into a tier and leave it.

    They are written behind every commit, or with `on_eviction` when the arena's use passes `high_watermark`,
    until it is below `low_watermark`, coldest first; only those that were hit `admit_hits` times or more.
    Unless they are `owed`, blocks may leave the arena before they are written, and are then written no more.
    An `exclusive` tier gives a block up once it has been promoted. A call that takes longer than `timeout_s`
    is late; `jobs` are under way at once.
    """

    on_eviction: bool = False
    exclusive: bool = False
    owed: bool = True
    admit_hits: int = 0
    high_watermark: float = 0.95
    low_watermark: float = 0.90
    timeout_s: float = 2.0
    jobs: int = 4
