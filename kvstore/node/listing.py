"""What a node has, page by page: its namespaces, and the blocks of one.

A namespace's blocks are those in the arena, what the tiers below have beside it, and the arena again. The
second time is for what has come up from a tier that gave it up before that tier's turn came.
"""

import itertools
import random
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Final

from kvstore.block import Medium
from kvstore.node.blocks import Block, Shelf
from kvstore.node.directory import Directory
from kvstore.node.promote import Shelves

# A cursor is a listing's number, a turn's (the arena, each tier, the arena) and a place in that turn's tier.
_TURN_STEP: Final = 1 << 48
_LISTING_STEP: Final = 1 << 54
_LISTINGS: Final = 1 << 9


class Listings:
    """One client's listings. A block that is here all the while is listed at least once."""

    def __init__(self) -> None:
        # The arena's generation when a listing went on from it to the tiers below, by the listing's number.
        self._left_arena: dict[int, int] = {}
        # A cursor that another connection has given out is then hardly taken for one of ours.
        self._numbers = itertools.count(random.randrange(_LISTINGS))

    def page(self, shelves: Shelves, cursor: int, limit: int) -> tuple[list[Block], int]:
        """Blocks in the order of sealing in their tier, and the next page's cursor, 0 after the last."""
        number, place = divmod(max(cursor, 0), _LISTING_STEP)
        turn, after = divmod(place, _TURN_STEP)
        if not cursor:
            number = next(self._numbers) % _LISTINGS
            self._left_arena.pop(number, None)
        turns = len(shelves) + 1 if len(shelves) > 1 else 1
        if turn >= turns:
            return [], 0
        arena = shelves[0]
        shelf = shelves[turn % len(shelves)]
        before = self._left_arena.get(number, 0)

        def listed(block: Block) -> bool:
            if turn == 0:
                return False
            if turn < len(shelves):
                above = arena.sealed.get(block.key)
                return above is not None and above.place <= before
            return block.place <= before or any(block.key in below.sealed for below in shelves[1:])

        later = (block for block in shelf.sealed.values() if block.place > after and not listed(block))
        page = list(islice(later, limit + 1))
        if len(page) > limit:
            return page[:limit], number * _LISTING_STEP + turn * _TURN_STEP + page[limit - 1].place
        if turn == 0:
            self._left_arena[number] = arena.tier.generation
        return page, number * _LISTING_STEP + (turn + 1) * _TURN_STEP if turn + 1 < turns else 0


def namespaces(directory: Directory, after: bytes, limit: int) -> tuple[list[list[Shelf]], bytes]:
    """The shelves of namespaces that have blocks, by id behind `after`; the next page's `after`, or none."""
    found: dict[bytes, list[Shelf]] = {}
    for tier in directory.tiers:
        for shelf in tier.shelves():
            if shelf.sealed and shelf.namespace.id > after:
                found.setdefault(shelf.namespace.id, []).append(shelf)
    ids = sorted(found)
    page = ids[:limit]
    return [found[name] for name in page], page[-1] if len(ids) > limit else b""


def most_in_a_medium(shelves: Iterable[Shelf], count: Callable[[Shelf], int]) -> int:
    """What the medium has that has the most: in each medium a block is in one tier, or in none."""
    by_medium: dict[Medium, int] = {}
    for shelf in shelves:
        by_medium[shelf.tier.medium] = by_medium.get(shelf.tier.medium, 0) + count(shelf)
    return max(by_medium.values())
