"""What lookups find, as Dynamo's indexer and Mooncake's Conductor answer it. Pure.

Both count leading tokens, each tier those of the faster ones as well. Their disk is whatever is below host
memory here, Redis included.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kvstore.index.placement import Placement

# What instances have, by rank.
Instances = Mapping[str, Mapping[int, Placement]]


class DynamoAnswer:
    """Dynamo's: instances and ranks that have something. Its own `frequencies` are empty, too."""

    def __init__(self) -> None:
        self._scores: dict[str, dict[str, int]] = {}
        self._summaries: dict[str, dict[str, Any]] = {}

    def add(self, instances: Iterable[tuple[str, Mapping[int, Placement]]]) -> None:
        """Tell of some more of them."""
        for instance, placements in instances:
            ranks = [(str(rank), one) for rank, one in placements.items() if one.remote]
            if not ranks:
                continue
            gpu = {rank: one.gpu for rank, one in ranks}
            if scores := gpu if all(gpu.values()) else {rank: has for rank, has in gpu.items() if has}:
                self._scores[instance] = scores
            most = ranks[0][1] if len(ranks) == 1 else _most([one for _, one in ranks])
            self._summaries[instance] = {
                "longest_matched": most.remote,
                "gpu": most.gpu,
                "dp": gpu,
                "cpu": most.dram,
                "disk": most.remote,
            }

    def told(self) -> dict[str, Any]:
        """All of it."""
        return {"scores": self._scores, "frequencies": [], "instances": self._summaries}


def conductors(instances: Instances, tenant: str) -> dict[str, Any]:
    """The Conductor's answer: all instances of the tenant, and of each rank the most in any tier."""
    summaries = {}
    for instance, ranks in instances.items():
        most = _most(list(ranks.values()))
        summaries[instance] = {
            "longest_matched": most.remote,
            "GPU": most.gpu,
            "CPU": most.dram,
            "DISK": most.remote,
            "DP": {str(rank): one.remote for rank, one in ranks.items()},
        }
    return {tenant: summaries}


def _most(ranks: Sequence[Placement]) -> Placement:
    """Of each medium the most that a rank has; mostly there is one."""
    if len(ranks) == 1:
        return ranks[0]
    media = zip(*[(one.gpu, one.dram, one.nvme, one.remote) for one in ranks], strict=True)
    return Placement(ranks[0].engine, *map(max, media))
