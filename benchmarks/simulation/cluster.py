"""Engines and their nodes' tiers, with what they have told the index. Time is the replay's.

An engine serves one prompt after another. When it begins, it looks what it has of it, loads what is sooner
loaded than computed, and computes the rest; then all of the prompt is in its GPU cache, in its node's DRAM
and NVMe, and in Redis. Each of them loses what was used longest ago, a prompt's tail before its head.
"""

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Final

from benchmarks.simulation.models import BLOCK_TOKENS, Served
from benchmarks.simulation.workload import Prompt, cached_tokens
from kvstore.block import Medium, Namespace
from kvstore.index.estimate import estimate
from kvstore.index.holding import Holding
from kvstore.index.keytable import ROOT
from kvstore.index.locality import Locality
from kvstore.index.masks import SLOT_BITS
from kvstore.index.placement import Placement

# Standard deviations of a prompt's luck, in the logarithm of its times.
COMPUTING_LUCK: Final = 0.05
LOADING_LUCK: Final = 0.2
_SPACE: Final = Namespace("trace", block_tokens=BLOCK_TOKENS, scheme="vllm-sha256:00000000")
_NOTHING: Final = [0] * SLOT_BITS
_DIGIT_TO_ONES: Final = {f"{bits:x}": [bits >> place & 1 for place in range(SLOT_BITS)] for bits in range(16)}


class Store:
    """Blocks in the order of their use. Of what comes and goes it tells the index, if it has a holding."""

    def __init__(self, medium: Medium, capacity_blocks: int, holding: Holding | None = None) -> None:
        self._medium = medium
        self._capacity_blocks = capacity_blocks
        self._holding = holding
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def depth(self, keys: Sequence[int], begin: int = 0) -> int:
        """Where its run of keys from `begin` on ends."""
        blocks = self._blocks
        for at in range(begin, len(keys)):
            if keys[at] not in blocks:
                return at
        return len(keys)

    def use(self, keys: Sequence[int]) -> None:
        """All of a prompt's blocks are in, and were used now, its head last."""
        blocks = self._blocks
        known = self.depth(keys)
        for key in reversed(keys):
            blocks[key] = None
            blocks.move_to_end(key)
        gone = [blocks.popitem(last=False)[0] for _ in range(len(blocks) - self._capacity_blocks)]
        if self._holding is not None:
            if gone:
                self._holding.removed(_SPACE, self._medium, gone)
            if known < len(keys):
                self._holding.stored(_SPACE, self._medium, keys[known:], keys[known - 1] if known else ROOT)
            self._holding.settle()


@dataclass(slots=True)
class Node:
    """What engines of one machine share."""

    dram: Store
    nvme: Store
    holding: Holding


@dataclass(slots=True)
class Server:
    """An engine: what it has, how fast it really is, and the prompts that wait there."""

    name: str
    gpu: Store
    holding: Holding
    node: Node
    slowness: float
    queue: deque[int] = field(default_factory=deque)
    busy_s: float = 0.0


class Cluster:
    """All engines, the index that hears of their blocks, and what only the simulation knows: true speeds."""

    def __init__(self, served: Served, engines: int, seed: int = 0) -> None:
        self.served = served
        self._seed = seed
        random = Random(seed)
        self.locality = Locality()
        self.remote = Store(Medium.REMOTE, served.remote_blocks * engines)
        self.servers: list[Server] = []
        nodes: list[Node] = []
        for number in range(engines):
            if number % served.engines_a_node == 0:
                nodes.append(self._node(f"node {len(nodes)}"))
            holding = self._holding(f"engine {number}")
            gpu = Store(Medium.GPU, served.gpu_blocks, holding)
            self.servers.append(Server(holding.name, gpu, holding, nodes[-1], random.uniform(0.8, 1.2)))

    def look_up(self, prompt: Prompt) -> list[Placement]:
        """What the index answers, with what Redis has."""
        remote = self.remote.depth(prompt.keys) * BLOCK_TOKENS
        slot_to_depths = _by_slot(self.locality.depths(_SPACE, prompt.keys))
        found = []
        for server in self.servers:
            gpu = slot_to_depths.get(server.holding.slot(_SPACE.shard), _NOTHING)[0] * BLOCK_TOKENS
            near = slot_to_depths.get(server.node.holding.slot(_SPACE.shard), _NOTHING)
            dram, nvme = max(gpu, near[1] * BLOCK_TOKENS), max(gpu, near[2] * BLOCK_TOKENS)
            found.append(Placement(server.name, gpu, dram, nvme, max(nvme, remote)))
        return found

    def serve(self, server: Server, prompt: Prompt) -> tuple[float, int]:
        """How long the engine takes for the prompt now, and how much of it was there.

        A prompt's luck is its own, whatever engine it goes to: policies differ in nothing else.
        """
        luck = Random(f"{self._seed} {prompt.keys[-1]} {prompt.tokens}")
        keys = prompt.keys
        gpu = server.gpu.depth(keys)
        dram = server.node.dram.depth(keys, gpu)
        nvme = server.node.nvme.depth(keys, dram)
        remote = self.remote.depth(keys, nvme)
        served = self.served
        had = [cached_tokens(prompt, depth) for depth in (gpu, dram, nvme, remote)]
        # Engine and store decide by the speeds that they are configured with.
        split = estimate(
            prompt.tokens,
            had,
            token_bytes=served.token_bytes,
            speeds=served.speeds,
            prefill=served.prefill,
            wait_s=0,
            price=0,
        )
        computing_s = split.recompute_s * server.slowness * luck.lognormvariate(0, COMPUTING_LUCK)
        return computing_s + split.load_s * luck.lognormvariate(0, LOADING_LUCK), split.load_tokens

    def store(self, server: Server, prompt: Prompt) -> None:
        """It is computed."""
        for store in (server.gpu, server.node.dram, server.node.nvme, self.remote):
            store.use(prompt.keys)

    def _node(self, name: str) -> Node:
        holding = self._holding(name)
        return Node(
            Store(Medium.DRAM, self.served.dram_blocks, holding),
            Store(Medium.NVME, self.served.nvme_blocks, holding),
            holding,
        )

    def _holding(self, name: str) -> Holding:
        holding = self.locality.open(name)
        self.locality.show(holding)
        return holding


def _by_slot(groups: Sequence[tuple[int, int]]) -> dict[int | None, list[int]]:
    """Leading blocks by the index's slots, for each medium of the slot."""
    found: dict[int | None, list[int]] = {}
    for depth, bits in groups:
        for slot, digit in enumerate(reversed(f"{bits:x}")):
            if digit != "0":
                depths = [depth * one for one in _DIGIT_TO_ONES[digit]]
                before = found.get(slot)
                found[slot] = depths if before is None else list(map(max, before, depths))
    return found
