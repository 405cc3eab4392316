"""Clearing: all blocks of some namespaces go for good, in every tier, while others have their turns.

What was sealed when it began can be read no longer when it has returned. What was sealed meanwhile may stay.
Of a tier that nodes share goes what this node knows of there, whoever stored it, and nothing else: what it
has never heard of stays, until its time is over there.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Final

from kvstore.block import Namespace
from kvstore.errors import DeadlineExceeded, InvalidRequest, TierError
from kvstore.node.blocks import Shelf
from kvstore.node.store import Store
from tiers.base import SharedTier

# Blocks removed before others have their turn, some 20 us each.
_TURN: Final = 64
# Namespaces looked at before others have theirs, under 1 us each.
_LOOKS: Final = 1024
# Blocks that tiers are told of at a time, which each of them must do within its time limit.
_BURIED_AT_ONCE: Final = 4096


@dataclass(frozen=True, slots=True)
class Scope:
    """One namespace, or all of this model, of this salt, or of both.

    Raises:
        InvalidRequest: it is none of these, or too many.
    """

    namespace: Namespace | None = None
    model: str | None = None
    salt: str | None = None

    def __post_init__(self) -> None:
        whole = self.model is not None or self.salt is not None
        if (self.namespace is not None) == whole:
            given = "a namespace beside a model or a salt" if whole else "nothing"
            raise InvalidRequest(f"{given} to clear; give a namespace, or a model, a salt or both")

    def has(self, namespace: Namespace) -> bool:
        """Whether it is one of them."""
        if self.namespace is not None:
            return namespace == self.namespace
        right_model = self.model is None or namespace.model == self.model
        return right_model and (self.salt is None or namespace.salt == self.salt)


async def clear(store: Store, scope: Scope, wait_s: float) -> int:
    """Remove all blocks of the scope for good; how many were here. Pinned ones are freed at their release.

    Cancelling, and the end of the time, leave removed what is by then.

    Raises:
        DeadlineExceeded: there were more than `wait_s` is enough for.
        TierError: they are hidden, but a restart may bring them back.
    """
    clearing = _Clearing(store)
    try:
        async with asyncio.timeout(wait_s):
            for namespace in await _namespaces(store, scope):
                await clearing.clear(namespace)
            await clearing.bury()
    except TimeoutError:
        raise DeadlineExceeded(
            f"{clearing.count} blocks are cleared after {wait_s:g} s, and there are more: clear again"
        ) from None
    away = clearing.failing | {
        f"tier {lower.name} is not open": None
        for lower in store.movements.lowers
        if not lower.recovered and not isinstance(lower.tier, SharedTier)
    }
    if away:
        raise TierError(
            f"{clearing.count} blocks are hidden, but {', '.join(away)}: what it has may come back with it, "
            "or with a restart of the daemon; clear again once it is back"
        )
    return clearing.count


class _Clearing:
    """One run of it: how many blocks have gone, and why some tiers cannot promise it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._unburied: list[tuple[bytes, bytes]] = []
        self.count = 0
        self.failing: dict[str, None] = {}

    async def clear(self, namespace: Namespace) -> None:
        """All of one namespace, in whatever tier a block is by the time of its turn."""
        shelves = self._store.directory.shelves(namespace)
        seen: set[bytes] = set()
        for keys in [list(shelf.sealed) for shelf in shelves]:
            for start in range(0, len(keys), _TURN):
                turn = [key for key in keys[start : start + _TURN] if key not in seen]
                if turn:
                    seen.update(turn)
                    self.count += self._store.hide(shelves, turn)
                    self._unburied += [(namespace.id, key) for key in turn]
                await asyncio.sleep(0)
                if len(self._unburied) >= _BURIED_AT_ONCE:
                    await self.bury()

    async def bury(self) -> None:
        """Have no restart bring back what has gone so far, or what had left a tier before."""
        names, self._unburied = self._unburied, []
        self.failing |= dict.fromkeys(await self._store.movements.bury(names))


async def _namespaces(store: Store, scope: Scope) -> list[Namespace]:
    """Those of the scope that have anything in any tier."""
    if scope.namespace is not None:
        return [scope.namespace]
    found: dict[Namespace, None] = {}
    for tier in store.directory.tiers:
        async for shelf in _in_turns(tier.shelves_in_use()):
            if scope.has(shelf.namespace):
                found[shelf.namespace] = None
    return list(found)


async def _in_turns(shelves: list[Callable[[], Shelf | None]]) -> AsyncIterator[Shelf]:
    for number, find in enumerate(shelves):
        if number % _LOOKS == _LOOKS - 1:
            await asyncio.sleep(0)
        if (shelf := find()) is not None:
            yield shelf
