"""What each salt has in all tiers of a node, and the quotas it has to keep."""

from collections.abc import Mapping, Sequence
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
        """The salts in use that have most, and what all others have together. Takes 0.3 us a salt in use."""
        tiers = [directory.accounts.all() for directory in self._directories]
        largest: dict[str, int] = {}
        for accounts in tiers:
            for account in nlargest(SALTS_MAX, accounts, key=attrgetter("block_bytes")):
                largest[account.salt] = largest.get(account.salt, 0) + account.block_bytes
        listed = sorted(largest, key=lambda salt: (-largest[salt], salt))[:SALTS_MAX]
        told = [list(map(directory.accounts.known, listed)) for directory in self._directories]
        states = [self._state(salt, of_salt) for salt, *of_salt in zip(listed, *told, strict=True)]
        if len(largest) == len(listed) and all(len(accounts) <= SALTS_MAX for accounts in tiers):
            return states
        return [*states, self._state(None, [*map(_others, tiers, told)])]

    def _state(self, salt: str | None, tiers: Sequence[Account | None]) -> SaltState:
        """What these accounts have together, one of each tier."""
        blocks: dict[Medium, int] = {}
        block_bytes: dict[Medium, int] = {}
        for directory, account in zip(self._directories, tiers, strict=True):
            here = account or Account("")
            blocks[directory.medium] = blocks.get(directory.medium, 0) + here.blocks
            block_bytes[directory.medium] = block_bytes.get(directory.medium, 0) + here.block_bytes
        media = [
            SaltUse(medium, blocks[medium], block_bytes[medium], self._quota_bytes(medium, salt))
            for medium in blocks
        ]
        arena = tiers[0] or Account("")
        return SaltState(salt, arena.hit_blocks, arena.missed_blocks, media)

    def _quota_bytes(self, medium: Medium, salt: str | None) -> int | None:
        quotas = self._quotas.get(medium)
        return None if quotas is None or salt is None else quotas.of(salt)


def _others(accounts: Sequence[Account], told: Sequence[Account | None]) -> Account:
    """What all have that are not told of, as if it were one."""
    others = Account("")
    for name in ("blocks", "block_bytes", "hit_blocks", "missed_blocks"):
        read = attrgetter(name)
        setattr(others, name, sum(map(read, accounts)) - sum(map(read, filter(None, told))))
    return others
