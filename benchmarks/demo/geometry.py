"""The sizes of the demo: model, prompt and blocks. Numbers only, so that every module may import them."""

from math import prod
from typing import Final

LAYERS: Final = 4
KV_HEADS: Final = 2
HEAD_DIM: Final = 64

PROMPT_TOKENS: Final = 4096
NEW_TOKENS: Final = 32

BLOCK_TOKENS: Final = 256
# The KV of a block's tokens: [layers, keys and values, kv_heads, block_tokens, head_dim], float32.
BLOCK_SHAPE: Final = (LAYERS, 2, KV_HEADS, BLOCK_TOKENS, HEAD_DIM)
BLOCK_BYTES: Final = prod(BLOCK_SHAPE) * 4
PROMPT_BLOCKS: Final = PROMPT_TOKENS // BLOCK_TOKENS
