"""What a namespace has, page by page: the arena first, then what the tiers below have beside it."""

from itertools import islice
from typing import Final

from kvstore.node.blocks import Block, Shelf
from kvstore.node.promote import Shelves

# A cursor is a tier's number times this, and a generation in that tier.
_TIER_STEP: Final = 1 << 48


class Listing:
    """One client's listings. A block that is here all the while is listed at least once."""

    def __init__(self) -> None:
        # The arena's generation when a listing of the namespace last left it: what has come there since, from
        # a tier below perhaps, is not left out of that tier's pages.
        self._left_arena: dict[Shelf, int] = {}

    def page(self, shelves: Shelves, cursor: int, limit: int) -> tuple[list[Block], int]:
        """Blocks in the order of sealing in their tier, and the next page's cursor, 0 after the last."""
        number, after = divmod(max(cursor, 0), _TIER_STEP)
        if number >= len(shelves):
            return [], 0
        arena, shelf = shelves[0], shelves[number]
        before = self._left_arena.get(arena, 0)

        def listed(block: Block) -> bool:
            above = arena.sealed.get(block.key) if number else None
            return above is not None and above.generation <= before

        later = (block for block in shelf.sealed.values() if block.generation > after and not listed(block))
        page = list(islice(later, limit + 1))
        if len(page) > limit:
            return page[:limit], number * _TIER_STEP + page[limit - 1].generation
        if number == 0:
            self._left_arena[arena] = arena.tier.generation
        return page, (number + 1) * _TIER_STEP if number + 1 < len(shelves) else 0
