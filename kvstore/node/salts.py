"""What each salt has in all tiers of a node, and the quotas it has to keep."""

from collections.abc import Mapping
from heapq import nlargest
from operator import attrgetter
from typing import Final

from kvstore.block import Medium
from kvstore.node.accounts import Account, Quotas
from kvstore.node.arena import ROOM, Arena
from kvstore.node.movement import Movements
from kvstore.statistics import SaltState, SaltUse

# Salts told of one by one, those with the most bytes; the others are told of together.
SALTS_MAX: Final = 32
# Blocks of salts above their quotas that leave a tier at a time, about 3 us each.
_TURN: Final = 512


class Salts:
    """The salts of an arena and of the tiers below it."""

    def __init__(self, arena: Arena, movements: Movements) -> None:
        self._arena = arena
        self._movements = movements
        self._directories = [arena.directory, *[lower.directory for lower in movements.lowers]]
        self._quotas: Mapping[Medium, Quotas] = {}

    def set_quotas(self, quotas: Mapping[Medium, Quotas]) -> None:
        """Have these quotas from now on, and none in media that are not named.

        Tiers of one medium share a quota by their capacities. What a salt has beyond its quota leaves
        in time, see `keep_quotas`; until then it gets no more.
        """
        self._quotas = dict(quotas)
        tiers = [self._arena.tier, *[lower.tier for lower in self._movements.lowers]]
        for tier, directory in zip(tiers, self._directories, strict=True):
            whole = sum([other.capacity_bytes for other in tiers if other.medium is tier.medium])
            directory.set_quotas(quotas.get(tier.medium, Quotas()).share(tier.capacity_bytes / whole))

    def keep_quotas(self) -> None:
        """Bring salts a step nearer to quotas that they are above. To be called twice a second or so."""
        arena = self._arena
        arena.room.begin()
        arena.room.shed(_TURN)
        arena.settle()
        if arena.room.evicted:
            arena.waiting.wake(ROOM)
        for lower in self._movements.lowers:
            if not lower.breaker.open:
                lower.room.begin()
                lower.room.shed(_TURN)
                lower.settle()
        if arena.directory.accounts.over:
            self._movements.demoter.pump()

    def statistics(self) -> list[SaltState]:
        """The salts in use that have most, and what all others have together. Takes 1 us a salt in use."""
        tiers = [directory.accounts.all() for directory in self._directories]
        largest: dict[str, int] = {}
        for accounts in tiers:
            for account in nlargest(SALTS_MAX, accounts, key=attrgetter("block_bytes")):
                largest[account.salt] = largest.get(account.salt, 0) + account.block_bytes
        listed = sorted(largest, key=lambda salt: (-largest[salt], salt))[:SALTS_MAX]
        states = [
            self._state(salt, [[a] if (a := d.accounts.known(salt)) else [] for d in self._directories])
            for salt in listed
        ]
        told = set(listed)
        others = [[account for account in accounts if account.salt not in told] for accounts in tiers]
        return [*states, self._state(None, others)] if any(others) else states

    def _state(self, salt: str | None, tiers: list[list[Account]]) -> SaltState:
        """What these accounts have together; `tiers` has those of each tier."""
        blocks: dict[Medium, int] = {}
        block_bytes: dict[Medium, int] = {}
        for directory, accounts in zip(self._directories, tiers, strict=True):
            medium = directory.medium
            blocks[medium] = blocks.get(medium, 0) + sum([a.blocks for a in accounts])
            block_bytes[medium] = block_bytes.get(medium, 0) + sum([a.block_bytes for a in accounts])
        media = [
            SaltUse(medium, blocks[medium], block_bytes[medium], self._quota_bytes(medium, salt))
            for medium in blocks
        ]
        hits, missed = sum([a.hit_blocks for a in tiers[0]]), sum([a.missed_blocks for a in tiers[0]])
        return SaltState(salt, hits, missed, media)

    def _quota_bytes(self, medium: Medium, salt: str | None) -> int | None:
        quotas = self._quotas.get(medium)
        return None if quotas is None or salt is None else quotas.of(salt)
