"""The life of blocks in tiers, and what readers see of it."""

from itertools import takewhile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvstore.block import HitLength, Medium, Namespace
from kvstore.errors import InvalidRequest
from kvstore.node.blocks import Block, Shelf, State, evictable
from kvstore.node.directory import Directory, TierDirectory
from kvstore.node.policy import FIFO, LRU
from tests.test_room import PHASES

NAMESPACE = Namespace(model="directory")
LENGTH = 100


@pytest.fixture
def tier() -> TierDirectory:
    return TierDirectory("dram", Medium.DRAM, LRU())


@pytest.fixture
def shelf(tier: TierDirectory) -> Shelf:
    return tier.shelf(NAMESPACE)


def reserve(shelf: Shelf, key: bytes, parent: Block | None = None, state: State = State.RESERVED) -> Block:
    return shelf.tier.add(shelf, key, LENGTH, f"slot of {key.decode()}", state, parent)


def sealed(shelf: Shelf, key: bytes, parent: Block | None = None) -> Block:
    block = reserve(shelf, key, parent)
    shelf.tier.seal([block])
    shelf.tier.requested([block])
    return block


def victims(tier: TierDirectory) -> list[bytes]:
    return [block.key for block in tier.policy.victims(evictable) if isinstance(block, Block)]


def test_another_policy_goes_on_with_the_order_and_the_same_one_stays(
    tier: TierDirectory, shelf: Shelf
) -> None:
    first, second = sealed(shelf, b"a"), sealed(shelf, b"b")
    tier.requested([first])
    tier.set_policy(FIFO)
    tier.requested([second, first])
    assert victims(tier) == [b"b", b"a"]
    before = tier.policy
    tier.set_policy(FIFO)
    assert tier.policy is before
    tier.set_policy(LRU)
    tier.requested([second])
    assert victims(tier) == [b"a", b"b"]
    assert tier.check() == []


# Reserved and loading.


def test_a_reserved_block_is_pending_until_it_is_sealed(tier: TierDirectory, shelf: Shelf) -> None:
    block = reserve(shelf, b"a")
    assert (block.state, list(shelf.pending), list(shelf.sealed)) == (State.RESERVED, [b"a"], [])
    assert tier.statistics().pending_blocks == 1
    tier.seal([block])
    tier.requested([block])
    assert (block.state, list(shelf.pending), list(shelf.sealed)) == (State.SEALED, [], [b"a"])
    assert (tier.statistics().blocks, tier.statistics().block_bytes) == (1, LENGTH)
    assert tier.check() == []


def test_an_aborted_block_is_absent_and_gives_its_slot_back(tier: TierDirectory, shelf: Shelf) -> None:
    block = reserve(shelf, b"a")
    assert tier.abort(block) == "slot of a"
    assert (block.state, block.slot, shelf.pending, shelf.sealed) == (State.ABSENT, None, {}, {})
    assert tier.check() == []


def test_a_load_that_comes_in_time_seals_its_block(tier: TierDirectory, shelf: Shelf) -> None:
    block = reserve(shelf, b"a", state=State.LOADING)
    assert tier.finish(block, block.generation)
    tier.requested([block])
    assert shelf.sealed == {b"a": block}
    assert tier.check() == []


def test_a_load_that_comes_late_is_ignored(tier: TierDirectory, shelf: Shelf) -> None:
    block = reserve(shelf, b"a", state=State.LOADING)
    generation = block.generation
    tier.abort(block)
    again = reserve(shelf, b"a", state=State.LOADING)
    assert not tier.finish(block, generation)
    assert not tier.finish(again, generation)
    assert (again.state, shelf.sealed) == (State.LOADING, {})
    assert tier.finish(again, again.generation)
    assert not tier.finish(again, again.generation), "it is loaded already"
    tier.requested([again])
    assert tier.check() == []


# Pins.


def test_a_pinned_block_is_passed_over_until_its_last_unpin(tier: TierDirectory, shelf: Shelf) -> None:
    a, _ = sealed(shelf, b"a"), sealed(shelf, b"b")
    tier.pin([a])
    tier.pin([a])
    assert victims(tier) == [b"b"]
    assert tier.unpin([a]) == []
    assert victims(tier) == [b"b"]
    assert (tier.statistics().pinned_blocks, tier.statistics().pinned_bytes) == (1, LENGTH)
    assert tier.unpin([a]) == []
    assert victims(tier) == [b"a", b"b"]
    assert tier.statistics().pinned_blocks == 0
    assert tier.check() == []


def test_an_evicted_block_is_absent_and_gives_its_slot_back(tier: TierDirectory, shelf: Shelf) -> None:
    block = sealed(shelf, b"a")
    assert tier.evict(block) == "slot of a"
    assert (block.state, shelf.sealed, len(tier.policy)) == (State.ABSENT, {}, 0)
    assert tier.check() == []


# Removing.


def test_a_removed_block_is_absent_at_once(tier: TierDirectory, shelf: Shelf) -> None:
    block = sealed(shelf, b"a")
    assert tier.remove(block) == (True, "slot of a")
    assert (block.state, shelf.sealed) == (State.ABSENT, {})
    assert tier.check() == []


def test_a_block_removed_while_pinned_is_doomed_until_its_last_unpin(
    tier: TierDirectory, shelf: Shelf
) -> None:
    block = sealed(shelf, b"a")
    tier.pin([block, block])
    assert tier.remove(block) == (False, None)
    assert (block.state, block.slot, shelf.sealed) == (State.DOOMED, "slot of a", {})
    assert tier.statistics().doomed_blocks == 1
    successor = sealed(shelf, b"a")
    assert tier.unpin([block]) == []
    assert tier.check() == []
    assert tier.unpin([block]) == ["slot of a"]
    assert (block.state, successor.state) == (State.ABSENT, State.SEALED)
    assert (tier.statistics().doomed_blocks, tier.statistics().pinned_blocks) == (0, 0)
    assert tier.check() == []


def test_a_block_can_be_removed_while_it_is_demoted(tier: TierDirectory, shelf: Shelf) -> None:
    block = sealed(shelf, b"a")
    generation = tier.demote(block)
    assert tier.remove(block) == (True, "slot of a")
    assert tier.finish_demotion(block, generation) == (False, None)
    assert tier.check() == []


# Demoting.


def test_a_demoted_block_is_read_until_its_bytes_are_below(tier: TierDirectory, shelf: Shelf) -> None:
    block = sealed(shelf, b"a")
    generation = tier.demote(block)
    assert (block.state, shelf.sealed, victims(tier)) == (State.DEMOTING, {b"a": block}, [])
    assert tier.check() == []
    assert tier.finish_demotion(block, generation) == (True, "slot of a")
    assert (block.state, shelf.sealed) == (State.ABSENT, {})
    assert tier.check() == []


def test_an_acquire_during_a_demotion_wins(tier: TierDirectory, shelf: Shelf) -> None:
    block = sealed(shelf, b"a")
    generation = tier.demote(block)
    tier.pin([block])
    assert block.state is State.SEALED
    assert tier.finish_demotion(block, generation) == (False, None)
    assert tier.unpin([block]) == []
    assert tier.finish_demotion(block, generation) == (False, None), "nor after its release"
    assert victims(tier) == [b"a"]
    assert tier.check() == []


def test_the_end_of_an_earlier_demotion_does_not_end_a_later_one(tier: TierDirectory, shelf: Shelf) -> None:
    block = sealed(shelf, b"a")
    first = tier.demote(block)
    tier.pin([block])
    tier.unpin([block])
    second = tier.demote(block)
    assert tier.finish_demotion(block, first) == (False, None)
    assert block.state is State.DEMOTING
    assert tier.finish_demotion(block, second) == (True, "slot of a")
    assert tier.finish_demotion(block, second) == (False, None)
    assert tier.check() == []


def test_a_block_that_gets_a_child_while_it_is_demoted_stays(tier: TierDirectory, shelf: Shelf) -> None:
    parent = sealed(shelf, b"a")
    generation = tier.demote(parent)
    child = reserve(shelf, b"b", parent)
    assert tier.finish_demotion(parent, generation) == (False, None)
    assert (parent.state, victims(tier)) == (State.SEALED, [])
    tier.abort(child)
    assert victims(tier) == [b"a"]
    assert tier.check() == []


def test_a_demotion_that_failed_leaves_the_block_as_it_was(tier: TierDirectory, shelf: Shelf) -> None:
    block = sealed(shelf, b"a")
    generation = tier.demote(block)
    assert victims(tier) == []
    tier.resume(block)
    assert victims(tier) == [b"a"]
    assert tier.finish_demotion(block, generation) == (False, None)
    assert tier.check() == []


# Parents and children.


def test_a_parent_leaves_after_its_last_child(tier: TierDirectory, shelf: Shelf) -> None:
    a = sealed(shelf, b"a")
    b, c = sealed(shelf, b"b", a), sealed(shelf, b"c", a)
    tier.requested([c, b])
    assert victims(tier) == [b"b", b"c"]
    tier.evict(b)
    assert (a.children, victims(tier)) == (1, [b"c"])
    tier.remove(c)
    assert (a.children, victims(tier)) == (0, [b"a"])
    assert tier.check() == []


def test_a_doomed_child_holds_its_parent_no_longer(tier: TierDirectory, shelf: Shelf) -> None:
    parent = sealed(shelf, b"a")
    child = sealed(shelf, b"b", parent)
    tier.pin([child])
    tier.remove(child)
    assert victims(tier) == [b"a"]
    tier.evict(parent)
    assert tier.unpin([child]) == ["slot of b"]
    assert tier.check() == []


def test_a_child_outlives_a_parent_that_was_removed(tier: TierDirectory, shelf: Shelf) -> None:
    parent = sealed(shelf, b"a")
    child = sealed(shelf, b"b", parent)
    tier.remove(parent)
    assert victims(tier) == [b"b"]
    assert tier.check() == []
    again = sealed(shelf, b"a")
    tier.evict(child)
    assert (parent.children, again.children) == (0, 0)
    assert tier.check() == []


def test_a_reserved_block_can_be_a_parent(tier: TierDirectory, shelf: Shelf) -> None:
    parent = reserve(shelf, b"a")
    child = reserve(shelf, b"b", parent)
    assert tier.check() == []
    tier.abort(parent)
    tier.seal([child])
    tier.requested([child])
    assert victims(tier) == [b"b"]
    assert tier.check() == []
    tier.evict(child)
    assert tier.check() == []


def test_an_absent_block_is_nobodys_parent(tier: TierDirectory, shelf: Shelf) -> None:
    parent = sealed(shelf, b"a")
    tier.evict(parent)
    assert reserve(shelf, b"b", parent).parent is None
    assert tier.check() == []


# Namespaces.


def test_namespaces_have_shelves_of_their_own(tier: TierDirectory, shelf: Shelf) -> None:
    other = tier.shelf(Namespace(model="directory", salt="tenant"))
    sealed(shelf, b"a")
    assert (list(shelf.sealed), list(other.sealed)) == ([b"a"], [])
    assert tier.shelf(NAMESPACE) is shelf
    assert tier.shelves() == [shelf, other]


def test_a_shelf_lives_as_long_as_there_is_a_block_on_it(tier: TierDirectory) -> None:
    block = sealed(tier.shelf(NAMESPACE), b"a")
    assert tier.shelf(NAMESPACE).sealed == {b"a": block}
    tier.evict(block)
    del block
    assert tier.shelves() == []


def test_two_namespaces_of_one_id_are_told_apart(tier: TierDirectory, shelf: Shelf) -> None:
    with pytest.raises(InvalidRequest, match=r"stands for Namespace\(model='directory'"):
        tier.compare(shelf.namespace.id, Namespace(model="impostor"))
    tier.compare(shelf.namespace.id, Namespace(model="directory"))


def test_check_finds_what_is_wrong(tier: TierDirectory, shelf: Shelf) -> None:
    block = sealed(shelf, b"a")
    block.pins = 1
    block.children = 2
    block.state = State.LOADING
    found = "\n".join(tier.check())
    for text in ("0 pinned counted, 1 found", "bytes of pinned", "2 children counted", "is readable"):
        assert text in found
    assert Directory([tier]).check() == tier.check()


# Hits over several tiers.

MEDIA = [Medium.GPU, Medium.DRAM, Medium.DRAM, Medium.NVME, Medium.REMOTE]


@given(
    used=st.lists(st.sampled_from(range(len(MEDIA))), min_size=1, unique=True).map(sorted),
    held=st.lists(st.sets(st.integers(0, 7)), min_size=len(MEDIA), max_size=len(MEDIA)),
    asked=st.integers(0, 9),
)
def test_hit_length_is_cumulative_over_tiers(used: list[int], held: list[set[int]], asked: int) -> None:
    tiers = [TierDirectory(f"tier{number}", MEDIA[number], LRU()) for number in used]
    shelves = [tier.shelf(NAMESPACE) for tier in tiers]
    for number, shelf in zip(used, shelves, strict=True):
        for key in held[number]:
            sealed(shelf, b"%d" % key)
        if 3 not in held[number]:
            reserve(shelf, b"3")  # which nobody may see
    order = list(Medium)
    expected = []
    for medium in order:
        within = {key for n in used if order.index(MEDIA[n]) <= order.index(medium) for key in held[n]}
        expected.append(len(list(takewhile(within.__contains__, range(asked)))))
    hits = Directory(tiers).hit_length(shelves, [b"%d" % key for key in range(asked)])
    assert hits == HitLength(*expected)
    assert hits.gpu <= hits.dram <= hits.nvme <= hits.remote <= asked


# Anything at all, against a dict.


class Life(RuleBasedStateMachine):
    """Random operations on one tier; the model is a state and a number of pins for each block."""

    def __init__(self) -> None:
        super().__init__()
        self.tier = TierDirectory("dram", Medium.DRAM, LRU())
        self.shelves = [self.tier.shelf(Namespace(model="life", salt=salt)) for salt in "ab"]
        self.states: dict[Block, State] = {}
        self.pins: dict[Block, int] = {}
        self.parents: dict[Block, Block | None] = {}
        self.owned: dict[Block, object] = {}
        self.late: list[tuple[Block, int, State]] = []
        self.number = 0

    def having(self, *states: State) -> list[Block]:
        return [block for block, state in self.states.items() if state in states]

    def draw(self, data: st.DataObject, *states: State) -> Block | None:
        blocks = self.having(*states)
        return data.draw(st.sampled_from(blocks)) if blocks else None

    def absent(self, block: Block, slot: object) -> None:
        assert slot is self.owned.pop(block), "not the slot of this block"
        self.states[block] = State.ABSENT
        self.parents[block] = None

    def children(self, block: Block) -> int:
        return sum(parent is block for parent in self.parents.values())

    @rule(shelf=st.integers(0, 1), key=st.integers(0, 7), loading=st.booleans(), data=st.data())
    def add(self, shelf: int, key: int, loading: bool, data: st.DataObject) -> None:
        home, name = self.shelves[shelf], b"%d" % key
        if name in home.sealed or name in home.pending:
            return
        parent = data.draw(st.sampled_from([None, *self.states]))
        state, slot = State.LOADING if loading else State.RESERVED, object()
        block = self.tier.add(home, name, 10 * key + 1, slot, state, parent)
        self.states[block], self.pins[block], self.owned[block] = state, 0, slot
        resident = parent is not None and self.states[parent] is not State.ABSENT
        self.parents[block] = parent if resident else None
        if loading:
            self.late.append((block, block.generation, State.LOADING))

    @rule(data=st.data())
    def seal(self, data: st.DataObject) -> None:
        if (block := self.draw(data, State.RESERVED)) is not None:
            self.tier.seal([block])
            self.tier.requested([block])
            self.states[block] = State.SEALED

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        if (block := self.draw(data, State.RESERVED, State.LOADING)) is not None:
            self.absent(block, self.tier.abort(block))

    @rule(data=st.data(), times=st.integers(1, 2))
    def pin(self, data: st.DataObject, times: int) -> None:
        if (block := self.draw(data, State.SEALED, State.DEMOTING)) is not None:
            self.tier.pin([block] * times)
            self.pins[block] += times
            self.states[block] = State.SEALED

    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        pinned = [block for block, pins in self.pins.items() if pins]
        if not pinned:
            return
        block = data.draw(st.sampled_from(pinned))
        slots = self.tier.unpin([block])
        self.pins[block] -= 1
        if self.pins[block] == 0 and self.states[block] is State.DOOMED:
            self.absent(block, *slots)
        else:
            assert slots == []

    @rule(data=st.data())
    def request(self, data: st.DataObject) -> None:
        if (block := self.draw(data, State.SEALED, State.DEMOTING)) is not None:
            self.tier.requested([block])

    @rule()
    def evict(self) -> None:
        victim = next(self.tier.policy.victims(evictable), None)
        if isinstance(victim, Block):
            self.absent(victim, self.tier.evict(victim))

    @rule()
    def demote(self) -> None:
        victim = next(self.tier.policy.victims(evictable), None)
        if isinstance(victim, Block):
            self.late.append((victim, self.tier.demote(victim), State.DEMOTING))
            self.states[victim] = State.DEMOTING

    @precondition(lambda self: self.late)
    @rule(data=st.data(), again=st.booleans())
    def complete(self, data: st.DataObject, again: bool) -> None:
        """A load or a demotion ends: in time, late, or a second time."""
        index = data.draw(st.integers(0, len(self.late) - 1))
        block, generation, kind = self.late[index] if again else self.late.pop(index)
        current = self.states[block] is kind and block.generation == generation
        if kind is State.LOADING:
            assert self.tier.finish(block, generation) == current
            if current:
                self.tier.requested([block])
                self.states[block] = State.SEALED
            return
        gone, slot = self.tier.finish_demotion(block, generation)
        assert gone == (current and self.children(block) == 0)
        if gone:
            self.absent(block, slot)
        elif current:
            self.states[block] = State.SEALED

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        if (block := self.draw(data, State.SEALED, State.DEMOTING)) is None:
            return
        gone, slot = self.tier.remove(block)
        assert gone == (self.pins[block] == 0)
        if gone:
            self.absent(block, slot)
        else:
            self.states[block] = State.DOOMED
            self.parents[block] = None

    @invariant()
    def equals_the_model(self) -> None:
        assert self.tier.check() == []
        for block, state in self.states.items():
            assert (block.state, block.pins, block.children) == (
                state,
                self.pins[block],
                self.children(block),
            )
            assert block.slot is self.owned.get(block)
        for number, shelf in enumerate(self.shelves):
            mine = [block for block in self.states if block.shelf is self.shelves[number]]
            readable = {b.key: b for b in mine if self.states[b] in (State.SEALED, State.DEMOTING)}
            pending = {b.key: b for b in mine if self.states[b] in (State.RESERVED, State.LOADING)}
            assert (shelf.sealed, shelf.pending) == (readable, pending)
        now, sealed_blocks = self.tier.statistics(), self.having(State.SEALED, State.DEMOTING)
        assert (now.blocks, now.block_bytes) == (len(sealed_blocks), sum(b.length for b in sealed_blocks))
        assert now.doomed_blocks == len(self.having(State.DOOMED))

    @invariant()
    def offers_just_what_may_leave(self) -> None:
        wanted = {b for b in self.having(State.SEALED) if not self.pins[b] and not self.children(b)}
        assert set(self.tier.policy.victims(evictable)) == wanted


TestDirectoryAgainstModel = Life.TestCase
TestDirectoryAgainstModel.settings = settings(
    max_examples=150, stateful_step_count=50, deadline=None, phases=PHASES
)
