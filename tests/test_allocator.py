"""Slots in an arena: never overlapping, merged when freed, found where they fit."""

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.test_room import PAGE, PHASES
from tiers.allocator import Allocator
from tiers.base import Slot

PAGES = 600


class AgainstModel(RuleBasedStateMachine):
    """Random operations; the model is one letter a page."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = Allocator(PAGES * PAGE)
        self.pages: list[str] = []  # a page that may be given out is free or used
        self.taken: list[Slot] = []

    def free_runs(self) -> dict[int, int]:
        """Offset to length of every run of free pages, in pages."""
        runs: dict[int, int] = {}
        start: int | None = None
        for number, page in enumerate([*self.pages, "end"]):
            if page == "free" and start is None:
                start = number
            elif page != "free" and start is not None:
                runs[start] = number - start
                start = None
        return runs

    def mark(self, slot: Slot, before: str, after: str) -> None:
        span = range(slot.offset // PAGE, (slot.offset + slot.length) // PAGE)
        assert all(self.pages[number] == before for number in span), f"{slot} overlaps another"
        for number in span:
            self.pages[number] = after

    @precondition(lambda self: len(self.pages) < PAGES)
    @rule(pages=st.integers(1, 200))
    def grow(self, pages: int) -> None:
        more = min(pages, PAGES - len(self.pages))
        self.pages += ["free"] * more
        self.allocator.grow(len(self.pages) * PAGE)

    @rule(pages=st.one_of(st.integers(1, 12), st.integers(1, 150)))
    def take(self, pages: int) -> None:
        fitting = [length for length in self.free_runs().values() if length >= pages]
        slot = self.allocator.take(pages * PAGE, owner := object())
        assert (slot is not None) == bool(fitting)
        if slot is None:
            return
        assert slot.length == pages * PAGE
        assert slot.owner is owner
        # Of all runs that fit it took one that is at most an eighth longer than the shortest.
        assert self.free_runs()[slot.offset // PAGE] <= min(fitting) * 9 / 8
        self.mark(slot, "free", "used")
        self.taken.append(slot)

    @precondition(lambda self: self.free_runs())
    @rule(data=st.data())
    def take_within(self, data: st.DataObject) -> None:
        span = data.draw(st.sampled_from(self.allocator.largest(100)))
        pages = data.draw(st.integers(1, span.length // PAGE))
        start = span.offset
        slot = self.allocator.take(pages * PAGE, object(), span)
        assert slot is not None
        assert slot.offset == start
        self.mark(slot, "free", "used")
        self.taken.append(slot)

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        slot = self.taken.pop(data.draw(st.integers(0, len(self.taken) - 1)))
        self.mark(slot, "used", "free")
        merged = self.allocator.free(slot)
        assert self.free_runs()[merged.offset // PAGE] == merged.length // PAGE

    @invariant()
    def is_whole(self) -> None:
        runs = self.free_runs()
        assert self.allocator.check() == []
        assert self.allocator.free_bytes == sum(runs.values()) * PAGE
        assert self.allocator.ready_bytes == len(self.pages) * PAGE
        largest = self.allocator.largest(1)
        assert bool(largest) == bool(runs)
        if largest:
            assert max(runs.values()) <= largest[0].length / PAGE * 9 / 8


TestAllocatorAgainstModel = AgainstModel.TestCase
TestAllocatorAgainstModel.settings = settings(
    max_examples=120, stateful_step_count=50, deadline=None, phases=PHASES
)


def filled(lengths: Sequence[int]) -> tuple[Allocator, list[Slot]]:
    """An allocator full of slots of these many pages, in this order."""
    allocator = Allocator(sum(lengths) * PAGE)
    allocator.grow(sum(lengths) * PAGE)
    slots = [allocator.take(length * PAGE, "taken") for length in lengths]
    assert allocator.free_bytes == 0
    return allocator, [slot for slot in slots if slot is not None]


def test_neighbours_are_merged_in_whatever_order_they_are_freed() -> None:
    for order in ((0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)):
        allocator, slots = filled([3, 5, 7])
        for index in order:
            merged = allocator.free(slots[index])
        assert (merged.offset, merged.length) == (0, 15 * PAGE)
        assert allocator.check() == []


def test_the_best_of_what_fits_is_taken() -> None:
    allocator, slots = filled([9, 1, 5, 1, 20, 1])
    wanted = slots[2].offset
    for slot in slots[::2]:
        allocator.free(slot)
    taken = allocator.take(4 * PAGE, "new")
    assert taken is not None
    assert taken.offset == wanted


def test_what_fits_is_found_among_many_that_almost_do() -> None:
    # 16 and 17 pages share a bin, in which only the first few are compared.
    allocator, slots = filled([16, 1] * 40 + [17, 1])
    wanted = slots[-2].offset
    for slot in slots[::2]:
        allocator.free(slot)
    taken = allocator.take(17 * PAGE, "new")
    assert taken is not None
    assert taken.offset == wanted


def test_nothing_is_given_out_before_it_is_there() -> None:
    allocator = Allocator(8 * PAGE)
    assert allocator.take(PAGE, "early") is None
    allocator.grow(2 * PAGE)
    assert allocator.take(3 * PAGE, "large") is None
    assert allocator.take(2 * PAGE, "fits") is not None
    allocator.grow(8 * PAGE)
    later = allocator.take(6 * PAGE, "rest")
    assert later is not None
    assert later.offset == 2 * PAGE
    assert allocator.check() == []


@given(data=st.data())
def test_what_is_claimed_is_taken_and_the_rest_is_free(data: st.DataObject) -> None:
    pages = data.draw(st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=30))
    pieces, runs, offset = [], [], 0
    for taken, length in pages:
        if taken:
            pieces.append((offset * PAGE, length * PAGE, f"owner of {offset}"))
        elif runs and runs[-1][0] + runs[-1][1] == offset:
            runs[-1] = (runs[-1][0], runs[-1][1] + length)
        else:
            runs.append((offset, length))
        offset += length
    allocator = Allocator(offset * PAGE)
    slots = allocator.claim(pieces)
    assert [(slot.offset, slot.length, slot.owner) for slot in slots] == pieces
    assert allocator.ready_bytes == allocator.capacity_bytes
    free = allocator.largest(len(runs) + 1)
    assert sorted((slot.offset // PAGE, slot.length // PAGE) for slot in free) == runs
    assert allocator.check() == []
    # They are slots like others.
    for slot in slots:
        allocator.free(slot)
        assert allocator.check() == []
    assert allocator.free_bytes == offset * PAGE
    assert len(allocator.largest(2)) == (offset > 0)


def test_check_finds_what_is_wrong() -> None:
    allocator, slots = filled([2, 2, 2])
    slots[1].owner = None
    assert any("in no bin" in line for line in allocator.check())
    slots[1].owner = "taken"
    slots[2].offset += PAGE
    assert any("should start at" in line for line in allocator.check())
