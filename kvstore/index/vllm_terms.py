"""What happens to our blocks, said in vLLM's terms: 64-bit hashes, its media, groups, salts, whole blocks.

A hash stands for a key alone where that is vLLM's own, of a prompt without salt: then it is what vLLM itself
announces. Every other key is hashed together with its namespace, salt included, so that no two namespaces
share a hash. Shards are no matter of routers: a block is there when all of its shards are.
"""

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import groupby
from typing import Final

from xxhash import xxh3_64_intdigest

from kvstore.block import Medium, Namespace
from kvstore.index import feed
from kvstore.index.events import BlockRemoved, BlockStored, Event, pack_tokens
from kvstore.index.outbox import chains

# Of one event, so that a frame has 160 KB at most.
TOKENS_MAX: Final = 1 << 15
_SHARDS_MAX: Final = 4096
_MEDIA: Final = {
    Medium.GPU: "GPU",
    Medium.DRAM: "CPU",
    Medium.NVME: "STORAGE",
    Medium.REMOTE: "EXTERNAL",
}
_NO_TOKENS: Final = pack_tokens([])

# Namespace and key to token ids, u32 little endian.
TokensOf = Callable[[Namespace, bytes], bytes | None]


class _Terms:
    """What a namespace is in vLLM's terms. `whole` is the id of all its shards together."""

    def __init__(self, canonical: bytes) -> None:
        self.namespace = Namespace.from_canonical(canonical)
        self.rank, self.world = self.namespace.rank_and_world
        if 1 < self.world <= _SHARDS_MAX:
            self.whole = replace(self.namespace, shard="").id
        else:  # whole, or no shard of anything that is known here
            self.rank, self.world, self.whole = 0, 1, self.namespace.id
        self.salt = self.namespace.salt
        group = self.namespace.group
        self.group_idx = int(group) if group.isdecimal() and len(group) < 6 else None
        self._is_engines = self.namespace.scheme.startswith("vllm-") and not self.salt

    def hash_of(self, key: bytes) -> int:
        if self._is_engines:
            return int.from_bytes(key[-8:], "big")
        return xxh3_64_intdigest(self.whole + key)


_terms_of = lru_cache(maxsize=4096)(_Terms)


class VllmTerms:
    """Says one event after the other, and remembers which shards are there of blocks that have several.

    With `arrays`, which have no place for a salt that its readers respect, nothing is said of salted blocks.
    """

    def __init__(self, tokens_of: TokensOf, *, arrays: bool) -> None:
        self._tokens_of = tokens_of
        self._arrays = arrays
        self._shards: dict[tuple[bytes, Medium], dict[bytes, int]] = {}

    def say(self, event: feed.Stored | feed.Removed) -> tuple[str, list[Event]]:
        """The model, and what is to be said of it."""
        terms = _terms_of(event.namespace)
        if terms.salt and self._arrays:
            return terms.namespace.model, []
        if isinstance(event, feed.Removed):
            return terms.namespace.model, list(self._removed(terms, event))
        return terms.namespace.model, list(self._stored(terms, event))

    def _stored(self, terms: _Terms, event: feed.Stored) -> Iterator[Event]:
        keys: Sequence[bytes] = event.keys
        predecessors: Sequence[bytes | None] = [event.parent, *keys[:-1]]
        if event.parent is None:
            predecessors = [None] * len(keys)
        if terms.world > 1:
            complete = [self._gain(terms, event.medium, key) for key in keys]
            predecessors = [before for before, now in zip(predecessors, complete, strict=True) if now]
            keys = [key for key, now in zip(keys, complete, strict=True) if now]
        if keys:
            for parent, run in chains(keys, predecessors):
                yield from self._run(terms, event.medium, parent, run)

    def _removed(self, terms: _Terms, event: feed.Removed) -> Iterator[Event]:
        keys = event.keys
        if terms.world > 1:
            keys = [key for key in keys if self._lose(terms, event.medium, key)]
        if keys:
            yield BlockRemoved(
                list(map(terms.hash_of, keys)),
                medium=_MEDIA[event.medium],
                group_idx=terms.group_idx,
                locality=_locality(event.medium),
            )

    # Shards.

    def _gain(self, terms: _Terms, medium: Medium, key: bytes) -> bool:
        """Whether that completes the block."""
        masks = self._shards.setdefault((terms.whole, medium), {})
        before = masks.get(key, 0)
        masks[key] = before | 1 << terms.rank
        return masks[key] != before and masks[key] == (1 << terms.world) - 1

    def _lose(self, terms: _Terms, medium: Medium, key: bytes) -> bool:
        """Whether the block was complete until then."""
        masks = self._shards.get((terms.whole, medium), {})
        before = masks.pop(key, 0)
        if after := before & ~(1 << terms.rank):
            masks[key] = after
        elif not masks:
            self._shards.pop((terms.whole, medium), None)
        return before == (1 << terms.world) - 1

    # Tokens.

    def _run(
        self, terms: _Terms, medium: Medium, parent: bytes | None, keys: Sequence[bytes]
    ) -> Iterator[BlockStored]:
        """Blocks that follow each other; those whose place and tokens are known with these."""
        tokens = [None if parent is None else self._tokens_of(terms.namespace, key) for key in keys]
        before = parent
        start = 0
        for known, group in groupby(tokens, lambda each: each is not None):
            end = start + len(list(group))
            step = max(1, TOKENS_MAX // terms.namespace.block_tokens) if known else len(keys)
            for first in range(start, end, step):
                some = slice(first, min(first + step, end))
                told = [each for each in tokens[some] if each is not None]
                yield self._blocks(terms, medium, before if known else None, keys[some], told)
                before = keys[some][-1]
            start = end

    def _blocks(
        self,
        terms: _Terms,
        medium: Medium,
        parent: bytes | None,
        keys: Sequence[bytes],
        tokens: Sequence[bytes],
    ) -> BlockStored:
        """With `tokens`, those of each key; else as vLLM says where it does not know them."""
        joined = b"".join(tokens)
        first = bool(tokens and terms.salt and parent == feed.ROOT)
        return BlockStored(
            list(map(terms.hash_of, keys)),
            terms.hash_of(parent) if parent else None,
            pack_tokens(struct.unpack(f"<{len(joined) // 4}I", joined)) if joined else _NO_TOKENS,
            terms.namespace.block_tokens if tokens else 0,
            medium=_MEDIA[medium],
            extra_keys=[(terms.salt,), *[None] * (len(keys) - 1)] if first else None,
            group_idx=terms.group_idx,
            locality=_locality(medium),
            cache_salt=terms.salt or None,
        )


def _locality(medium: Medium) -> str | None:
    return "REMOTE" if medium is Medium.REMOTE else None
