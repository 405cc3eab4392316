"""What is simulated: a model on its engines, and how fast their node reads which medium. Numbers alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from kvstore.block import Medium
from kvstore.index.estimate import Prefill, Speed

BLOCK_TOKENS: Final = 512  # the trace's

# One link of each kind. DRAM: PCIe 5 x16 of one engine of several that copy; NVMe: two drives of a node;
# Redis: four connections over 25 Gbit/s Ethernet.
SPEEDS: Final = {
    Medium.DRAM: Speed(0.001, 25e9),
    Medium.NVME: Speed(0.003, 5e9),
    Medium.REMOTE: Speed(0.010, 2.5e9),
}


@dataclass(frozen=True, slots=True)
class Served:
    """A model on one engine. Capacities are blocks: of an engine's GPU cache, of a node, of all of Redis for
    each engine."""

    name: str
    token_bytes: float
    prefill: Prefill
    gpu_blocks: int
    dram_blocks: int
    nvme_blocks: int
    remote_blocks: int
    engines_a_node: int = 1

    @property
    def speeds(self) -> Mapping[Medium, Speed]:
        """How fast an engine reads a medium."""
        return SPEEDS


def served(
    name: str,
    *,
    token_bytes: int,
    token_flop: float,
    pair_flop: float,
    flop_s: float,
    gpu_bytes: float,
    dram_bytes: float,
    nvme_bytes: float,
    engines_a_node: int = 1,
) -> Served:
    """A model by what its tokens take of a machine that does `flop_s` useful operations a second."""
    block_bytes = BLOCK_TOKENS * token_bytes
    return Served(
        name=name,
        token_bytes=token_bytes,
        prefill=Prefill(0.01, token_flop / flop_s, pair_flop / flop_s),
        gpu_blocks=int(gpu_bytes / block_bytes),
        dram_blocks=int(dram_bytes / block_bytes),
        nvme_blocks=int(nvme_bytes / block_bytes),
        remote_blocks=int(nvme_bytes / block_bytes),
        engines_a_node=engines_a_node,
    )


# 80 layers, 8 KV heads of 128 in bf16: 2 * 80 * 8 * 128 * 2 bytes a token; 70.6e9 parameters, two operations
# each; 4 * 8192 a layer for a pair of tokens. Eight H100: 8 * 989e12 dense bf16, 45 % of it used; 640 GB less
# weights, activations and a tenth.
LLAMA_70B: Final = served(
    "Llama-3.1-70B, tensor-parallel on 8 H100, one engine a node",
    token_bytes=327_680,
    token_flop=2 * 70.6e9,
    pair_flop=80 * 4 * 8192,
    flop_s=0.45 * 8 * 989e12,
    gpu_bytes=400e9,
    dram_bytes=1000e9,
    nvme_bytes=4000e9,
)
# 32 layers, 8 KV heads of 128 in bf16; 8.03e9 parameters; 4 * 4096 a layer for a pair.
LLAMA_8B: Final = served(
    "Llama-3.1-8B, one H100 each, four engines a node",
    token_bytes=131_072,
    token_flop=2 * 8.03e9,
    pair_flop=32 * 4 * 4096,
    flop_s=0.5 * 989e12,
    gpu_bytes=50e9,
    dram_bytes=800e9,
    nvme_bytes=4000e9,
    engines_a_node=4,
)
# Latent attention: 61 layers of 576 numbers in bf16; 37e9 parameters are active; 128 heads of 192 + 128.
DEEPSEEK: Final = served(
    "DeepSeek-V3, on 8 H200, one engine a node",
    token_bytes=70_272,
    token_flop=2 * 37e9,
    pair_flop=61 * 2 * 128 * 320,
    flop_s=0.25 * 8 * 1979e12,
    gpu_bytes=250e9,
    dram_bytes=1000e9,
    nvme_bytes=4000e9,
)
