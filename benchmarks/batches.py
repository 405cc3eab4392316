"""KV events as engines and daemons send them, made for benchmarks. It sends nothing.

Hashes are random numbers: what reads them does not compare them with the tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Final

import numpy as np

from kvstore.block import Medium, Namespace
from kvstore.index import feed
from kvstore.index.events import BlockRemoved, BlockStored, Hash, encode_batch, pack_tokens

BLOCK_TOKENS: Final = 16
PROMPT_BLOCKS: Final = 64
HASH_BITS: Final = 64
DIGEST_BYTES: Final = 32
MODEL: Final = "model"
NODE: Final = "node"
_VOCABULARY: Final = 128_000
_SEED: Final = 1


@dataclass(frozen=True, slots=True)
class Prompt:
    """Blocks that follow each other, none of which is in another prompt."""

    hashes: Sequence[Hash]
    tokens: list[int]


def prompts(blocks: int, *, digests: bool = False) -> Iterator[Prompt]:
    """Prompts of PROMPT_BLOCKS each, as many as so many blocks take. Hashes are numbers, or digests."""
    random, numbers = Random(_SEED), np.random.default_rng(_SEED)
    for _ in range(0, blocks, PROMPT_BLOCKS):
        tokens = numbers.integers(_VOCABULARY, size=PROMPT_BLOCKS * BLOCK_TOKENS).tolist()
        if digests:
            yield Prompt([random.randbytes(DIGEST_BYTES) for _ in range(PROMPT_BLOCKS)], tokens)
        else:
            yield Prompt([random.getrandbits(HASH_BITS) for _ in range(PROMPT_BLOCKS)], tokens)


def stored_batches(prompt: Prompt, event_blocks: int, *, arrays: bool = False) -> Iterator[bytes]:
    """The batches with which an engine says that it has stored a prompt: an event in each."""
    for start in range(0, PROMPT_BLOCKS, event_blocks):
        stop = start + event_blocks
        event = BlockStored(
            block_hashes=list(prompt.hashes[start:stop]),
            parent_block_hash=prompt.hashes[start - 1] if start else None,
            token_ids=pack_tokens(prompt.tokens[start * BLOCK_TOKENS : stop * BLOCK_TOKENS]),
            block_size=BLOCK_TOKENS,
            medium="GPU",
        )
        yield encode_batch([event], 1.0, arrays=arrays, rank=0)


def removed_batch(prompt: Prompt) -> bytes:
    """The batch with which an engine says that it has it no longer, tail first."""
    event = BlockRemoved(block_hashes=list(prompt.hashes[::-1]), medium="GPU")
    return encode_batch([event], 1.0, arrays=False, rank=0)


def feed_frames(some: Sequence[Prompt], scheme: str) -> tuple[list[bytes], list[bytes]]:
    """The frames with which a daemon that had nothing greets, and those that say that it has stored these."""
    namespace = Namespace(MODEL, block_tokens=BLOCK_TOKENS, scheme=scheme).canonical
    hello = feed.Hello(feed.VERSION, NODE, epoch=1, seq=0, resumed=False, engines=[])
    frames = []
    for seq, prompt in enumerate(some, 1):
        keys = [key for key in prompt.hashes if isinstance(key, bytes)]
        stored = feed.Stored(namespace, Medium.DRAM, feed.ROOT, keys)
        frames.append(feed.encode(feed.Events(seq, 1.0, [stored])))
    return [feed.encode(hello), feed.encode(feed.End(0, {}))], frames
