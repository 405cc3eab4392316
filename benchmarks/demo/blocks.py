"""KV to blocks and back: their bytes, their keys, and the way to and from the store. No forward passes.

A block is the KV of 256 tokens, all layers: [layers, 2, kv_heads, block_tokens, head_dim], float32.
"""

import hashlib
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch

from benchmarks.demo.geometry import BLOCK_SHAPE, BLOCK_TOKENS, HEAD_DIM, KV_HEADS, LAYERS
from kvstore.block import Namespace
from kvstore.client import StoreClient

NAMESPACE: Final = Namespace(
    model="demo-llama-1234",
    block_tokens=BLOCK_TOKENS,
    dtype="float32",
    layout="layer,kv,head,token,dim",
    scheme="demo-sha256",
)


def block_keys(tokens: Sequence[int]) -> list[bytes]:
    """One key for each full block: sha256 over the key before it and the block's tokens, 4 bytes each."""
    keys: list[bytes] = []
    parent = b""
    for start in range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        block = np.asarray(tokens[start : start + BLOCK_TOKENS], dtype="<u4").tobytes()
        parent = hashlib.sha256(parent + block).digest()
        keys.append(parent)
    return keys


def write_block(layers: Sequence[tuple[torch.Tensor, torch.Tensor]], index: int, into: memoryview) -> None:
    """Copy block `index` of a cache's `layers` (keys, values: [kv_heads, tokens, head_dim]) `into` a slot."""
    block = np.frombuffer(into, dtype=np.float32).reshape(BLOCK_SHAPE)
    for layer, keys_and_values in enumerate(layers):
        for half, source in enumerate(keys_and_values):
            np.copyto(block[layer, half], source[:, _span(index)].numpy())


def fetch(store: StoreClient, keys: Sequence[bytes], wait_s: float) -> torch.Tensor:
    """The KV of the leading keys that the store has: [layers, 2, kv_heads, hit tokens, head_dim].

    Blocks that are being published are waited for, up to `wait_s`. The result is a copy, so it outlives
    the lease; the views of the lease do not.
    """
    with store.acquire(NAMESPACE, list(keys), wait_s=wait_s) as read:
        kv = torch.empty((LAYERS, 2, KV_HEADS, read.hit_length * BLOCK_TOKENS, HEAD_DIM))
        # Through numpy: torch.frombuffer warns of a read-only view even where it is only read.
        target = kv.numpy()
        for index, view in enumerate(read.views):
            block = np.frombuffer(view, dtype=np.float32).reshape(BLOCK_SHAPE)
            np.copyto(target[:, :, :, _span(index)], block)
            del block  # it holds the view, which ends with the lease
    return kv


def digests(kv: torch.Tensor) -> list[str]:
    """sha256 of each block's bytes in `kv`: [layers, 2, kv_heads, tokens, head_dim]."""
    array = kv.numpy()
    blocks = array.shape[3] // BLOCK_TOKENS
    return [hashlib.sha256(array[:, :, :, _span(index)].tobytes()).hexdigest() for index in range(blocks)]


def _span(index: int) -> slice:
    return slice(index * BLOCK_TOKENS, (index + 1) * BLOCK_TOKENS)
