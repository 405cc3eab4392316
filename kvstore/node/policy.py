"""The order in which unpinned blocks leave a tier. A policy orders blocks and nothing more.

It holds no bytes, takes no locks, does no I/O and knows no tier: what may leave is the directory's to
say. A third policy is one class with the methods of `Policy` and one entry in `POLICIES`.
"""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import islice
from typing import Any, Final, Protocol


class Entry(Protocol):
    """What a policy sees of a block: an identity, and a name that outlives it (for ghost lists)."""

    def __hash__(self) -> int: ...

    @property
    def identity(self) -> Hashable:
        """Equal for two blocks of the same namespace and key, also after one of them has left."""


class Policy(Protocol):
    """Chooses victims. Called with whole requests, so that it may see prefixes and not only blocks."""

    def requested(self, prefix: Sequence[Entry]) -> None:
        """One request stored or hit these resident blocks, head first; new ones enter the order."""

    def victims(self, evictable: Callable[[Any], bool]) -> Iterator[Entry]:
        """Yield blocks in the order in which they should leave, only those that `evictable` allows.

        The blocks stay in the order until `left`. The caller stops iterating once anything changed.
        Blocks that are refused may be set aside until `freed` names them, so that a thousand pinned
        blocks are passed over once and not at every eviction.
        """

    def coldest(self) -> Iterator[Entry]:
        """All blocks about in the order in which they should leave, refused or not; sets none aside."""

    def freed(self, blocks: Sequence[Entry]) -> None:
        """These blocks may be evictable again: their last pin or their last child is gone."""

    def left(self, block: Entry, *, evicted: bool) -> None:
        """The block has left the tier, evicted to make room or removed for another reason."""

    def inherit(self, other: Any) -> None:
        """Begin, while empty, with all that another policy has, in its order; the other is of no more use."""

    def __len__(self) -> int:
        """Blocks in the order, set aside or not."""


class FIFO:
    """First in, first out; of one request's blocks the tail leaves before the head."""

    def __init__(self) -> None:
        # An OrderedDict, since deleting at a dict's front again and again is quadratic.
        self._order: OrderedDict[Entry, None] = OrderedDict()
        # Blocks that were refused, and those of them that are back; all are older than the rest of the
        # order, and their rank is their place among each other.
        self._aside: dict[Entry, int] = {}
        self._back: list[tuple[int, Entry]] = []
        self._back_rank: dict[Entry, int] = {}
        self._ranks = 0

    def requested(self, prefix: Sequence[Entry]) -> None:
        order, aside, back = self._order, self._aside, self._back_rank
        for block in reversed(prefix):
            if block not in aside and block not in back:
                order[block] = None

    def victims(self, evictable: Callable[[Any], bool]) -> Iterator[Entry]:
        passed = 0
        while passed < len(self._back):
            rank, block = self._back[passed]
            if evictable(block):
                passed += 1
                yield block
            else:
                del self._back[passed], self._back_rank[block]
                self._aside[block] = rank
        passed, chunk = 0, 1
        while blocks := list(islice(self._order, passed, passed + chunk)):
            for block in blocks:
                if evictable(block):
                    passed += 1
                    yield block
                else:
                    del self._order[block]
                    self._ranks += 1
                    self._aside[block] = self._ranks
            chunk *= 4  # most callers want one; for those who want many, linear in all

    def coldest(self) -> Iterator[Entry]:
        # Those aside and those back are all older than the rest; between the two the order is not kept.
        yield from self._aside
        for _, block in self._back:
            yield block
        yield from self._order

    def freed(self, blocks: Sequence[Entry]) -> None:
        if not self._aside:
            return
        for block in blocks:
            rank = self._aside.pop(block, None)
            if rank is not None:
                insort(self._back, (rank, block))  # ranks differ, so blocks are never compared
                self._back_rank[block] = rank

    def left(self, block: Entry, *, evicted: bool) -> None:
        if block in self._order:
            del self._order[block]
        else:
            self._forget(block)

    def inherit(self, other: "FIFO") -> None:
        # Both keep the order in the same way, so that this takes no time however many blocks there are.
        vars(self).update(vars(other))

    def __len__(self) -> int:
        return len(self._order) + len(self._aside) + len(self._back)

    def _forget(self, block: Entry) -> None:
        """Drop what is known of a block that is not in the order itself."""
        self._aside.pop(block, None)
        rank = self._back_rank.pop(block, None)
        if rank is not None:
            del self._back[bisect_left(self._back, rank, key=_rank)]


class LRU(FIFO):
    """Least recently requested first; of one request's blocks the tail leaves before the head."""

    def requested(self, prefix: Sequence[Entry]) -> None:
        order = self._order
        if self._aside or self._back:
            for block in prefix:
                self._forget(block)
        renew = order.move_to_end
        for block in reversed(prefix):
            try:
                renew(block)
            except KeyError:
                order[block] = None


def _rank(ranked: tuple[int, Entry]) -> int:
    return ranked[0]


POLICIES: Final[dict[str, Callable[[], Policy]]] = {"lru": LRU, "fifo": FIFO}
