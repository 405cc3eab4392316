"""Copying many blocks at once, in threads that do not hold the GIL. It knows of no engine and no daemon."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Final

from connectors import pools
from kvstore.client import copy

# Less is copied sooner than other threads are awake.
_ALONE_BYTES: Final = 2 << 20

Pairs = Sequence[tuple[memoryview, memoryview]]


class Copier:
    """Copies with up to `threads` threads, the caller's among them. From any thread.

    Raises:
        InvalidRequest: so many threads cannot be had.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._others = pools.start("copy", max(1, threads - 1))

    def copy(self, pairs: Pairs) -> int:
        """Copy each source into its target, which is as long; returns how many bytes, when all are there."""
        nbytes = sum(len(source) for _, source in pairs)
        if nbytes < _ALONE_BYTES or self._threads == 1:
            _copy_all(pairs)
            return nbytes
        mine, *others = _shares(pairs, nbytes // self._threads + 1)
        pools.share(self._others, _copy_all, others, partial(_copy_all, mine))
        return nbytes

    def close(self) -> None:
        """End the threads once they have nothing left to copy."""
        self._others.shutdown(wait=True)


def bytes_of(buffer: Any) -> memoryview:
    """An engine's buffer as plain bytes, writable if it is."""
    return memoryview(buffer).cast("B")


def _copy_all(pairs: Pairs) -> None:
    for target, source in pairs:
        copy(target, source)


def _shares(pairs: Pairs, share_bytes: int) -> list[Pairs]:
    """Runs of pairs, all but the last of at least so many bytes."""
    shares: list[Pairs] = []
    start = nbytes = 0
    for end, (_, source) in enumerate(pairs, start=1):
        nbytes += len(source)
        if nbytes >= share_bytes or end == len(pairs):
            shares.append(pairs[start:end])
            start, nbytes = end, 0
    return shares
