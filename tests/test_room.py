"""Room for new blocks: who leaves, who moves, and who is left alone."""

import random
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.block import Medium, Namespace
from kvstore.node.blocks import Block, Shelf, State, evictable
from kvstore.node.directory import TierDirectory
from kvstore.node.policy import LRU, Policy
from kvstore.node.room import MOVE_BYTES_MAX, Room
from tiers.allocator import ALIGNMENT_BYTES, Allocator
from tiers.base import Slot, TierStatistics

PAGE = ALIGNMENT_BYTES
MIB = 1 << 20
NAMESPACE = Namespace(model="room")


class PaperTier:
    """An allocator as a slot tier: its slots have places and no bytes."""

    medium = Medium.DRAM
    name = "paper"
    arena = 0

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.allocator = Allocator(capacity_bytes)

    def open(self, *, writable: bool) -> int:
        raise NotImplementedError("paper cannot be mapped")

    def slot_length(self, length: int) -> int:
        return -(-length // PAGE) * PAGE

    def take(self, length: int, owner: object, within: Slot | None = None) -> Slot | None:
        return self.allocator.take(self.slot_length(length), owner, within)

    def free(self, slot: Slot) -> Slot:
        return self.allocator.free(slot)

    def move(self, slot: Slot, to: Slot) -> None:
        assert to.length >= slot.length

    def poison(self, slot: Slot) -> None:
        pass

    def grow(self, ready_bytes: int) -> None:
        self.allocator.grow(ready_bytes)

    def view(self, slot: Slot) -> memoryview:
        raise NotImplementedError("paper has no bytes")

    def largest(self, count: int) -> list[Slot]:
        return self.allocator.largest(count)

    @property
    def free_bytes(self) -> int:
        return self.allocator.free_bytes

    def statistics(self) -> TierStatistics:
        ready, free = self.allocator.ready_bytes, self.allocator.free_bytes
        largest = max((slot.length for slot in self.slots() if slot.owner is None), default=0)
        return TierStatistics(self.name, "dram", self.capacity_bytes, ready, ready - free, largest)

    def check(self) -> list[str]:
        return self.allocator.check()

    def close(self) -> None:
        pass

    def slots(self) -> list[Slot]:
        """All slots by address, as they are linked."""
        slots: list[Slot] = []
        slot = self.allocator._last
        while slot is not None:
            slots.append(slot)
            slot = slot.before
        return slots[::-1]


class BytesTier(PaperTier):
    """The same with bytes, to see that moving keeps them."""

    name = "bytes"

    def __init__(self, capacity_bytes: int) -> None:
        super().__init__(capacity_bytes)
        self._bytes = memoryview(bytearray(capacity_bytes))

    def move(self, slot: Slot, to: Slot) -> None:
        super().move(slot, to)
        self._bytes[to.offset : to.offset + slot.length] = self.view(slot)

    def poison(self, slot: Slot) -> None:
        self.view(slot)[:] = b"\xdb" * slot.length

    def view(self, slot: Slot) -> memoryview:
        return self._bytes[slot.offset : slot.offset + slot.length]


class Shop:
    """A directory and a room over a tier: what `Store` is made of, without clients."""

    def __init__(
        self, tier: PaperTier, policy: Policy | None = None, *, debug: bool = False, populated: bool = True
    ) -> None:
        self.tier = tier
        self.directory = TierDirectory(tier.name, tier.medium, LRU() if policy is None else policy)
        self.room = Room(tier, self.directory, memory=tier, debug=debug)
        if populated:
            self.room.grow(tier.capacity_bytes)
        self.shelf: Shelf = self.directory.shelf(NAMESPACE)

    def reserve(self, key: bytes, length: int, parent: Block | None = None) -> Block | None:
        """A reserved block, or None without room."""
        self.room.begin()
        slot = self.room.take(length)
        if slot is None:
            return None
        if parent is not None and parent.state is State.ABSENT:
            parent = None
        block = self.directory.add(self.shelf, key, length, slot, State.RESERVED, parent)
        slot.owner = block
        return block

    def seal(self, blocks: Sequence[Block]) -> None:
        """Make them readable; one request."""
        self.directory.seal(blocks)
        self.directory.requested(blocks)

    def put(self, key: bytes, length: int = PAGE, parent: Block | None = None) -> Block | None:
        """A sealed block, or None without room."""
        block = self.reserve(key, length, parent)
        if block is not None:
            self.seal([block])
        return block

    def give_back(self, slots: Sequence[Slot]) -> None:
        """These slots are used no more."""
        for slot in slots:
            self.room.free(slot)

    def remove(self, block: Block) -> None:
        """Remove a readable block."""
        gone, slot = self.directory.remove(block)
        if gone:
            self.give_back([slot])

    def check(self) -> list[str]:
        """All that is wrong."""
        return [*self.directory.check(), *self.tier.check()]


CAPACITY_PAGES = 96
# Without explaining, which takes minutes.
PHASES = (Phase.explicit, Phase.generate, Phase.shrink)
LENGTHS = st.one_of(
    st.integers(1, 4 * PAGE),
    st.integers(1, 40 * PAGE),
    st.sampled_from([PAGE, 2 * PAGE, 8 * PAGE, 16 * PAGE]),
)


class Occupied(RuleBasedStateMachine):
    """Random blocks, pins and foreign slots in a small arena, compared with a dict of what each one holds."""

    @initialize(debug=st.booleans())
    def open(self, debug: bool) -> None:
        self.tier = BytesTier(CAPACITY_PAGES * PAGE)
        self.shop = Shop(self.tier, debug=debug)
        self.debug = debug
        self.number = 0
        self.bytes: dict[Block, bytes] = {}  # of every block that is reserved, sealed or doomed
        self.pinned: list[Block] = []
        self.foreign: dict[Slot, tuple[int, bytes]] = {}

    # What may happen.

    @rule(lengths=st.lists(LENGTHS, min_size=1, max_size=4), seal=st.booleans(), data=st.data())
    def store_chain(self, lengths: list[int], seal: bool, data: st.DataObject) -> None:
        parent = data.draw(
            st.sampled_from([None, *self.in_state(State.SEALED), *self.in_state(State.RESERVED)])
        )
        chain: list[Block] = []
        for length in lengths:
            block = self.reserve(length, chain[-1] if chain else parent)
            if block is None:
                break
            chain.append(block)
        if seal and chain:
            self.shop.seal(chain)

    @rule(length=LENGTHS)
    def store_alone(self, length: int) -> None:
        block = self.reserve(length, None)
        if block is not None:
            self.shop.seal([block])

    @precondition(lambda self: self.in_state(State.RESERVED))
    @rule(data=st.data(), seal=st.booleans())
    def end_a_write(self, data: st.DataObject, seal: bool) -> None:
        block = data.draw(st.sampled_from(self.in_state(State.RESERVED)))
        if seal:
            self.shop.seal([block])
        else:
            del self.bytes[block]
            self.shop.give_back([self.shop.directory.abort(block)])

    @precondition(lambda self: self.in_state(State.SEALED))
    @rule(data=st.data(), count=st.integers(1, 3))
    def pin(self, data: st.DataObject, count: int) -> None:
        sealed = self.in_state(State.SEALED)
        blocks = data.draw(st.lists(st.sampled_from(sealed), min_size=1, max_size=count, unique=True))
        self.shop.directory.pin(blocks)
        self.shop.directory.requested(blocks)
        self.pinned += blocks

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        block = self.pinned.pop(data.draw(st.integers(0, len(self.pinned) - 1)))
        self.see(block)
        slots = self.shop.directory.unpin([block])
        if slots:
            del self.bytes[block]
        self.shop.give_back(slots)

    @precondition(lambda self: self.in_state(State.SEALED))
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.in_state(State.SEALED)))
        self.shop.remove(block)
        if block.state is State.ABSENT:
            del self.bytes[block]

    @rule(pages=st.one_of(st.just(CAPACITY_PAGES), st.integers(1, CAPACITY_PAGES)))
    def limit(self, pages: int) -> None:
        self.shop.room.limit_bytes = pages * PAGE

    @rule(blocks=st.integers(1, 20))
    def shrink(self, blocks: int) -> None:
        before = self.places()
        over = self.shop.room.used_bytes - self.shop.room.limit_bytes
        shrunk = self.shop.room.shrink(blocks)
        self.notice_leaving(before)
        if shrunk:
            assert over > 0
        elif over > 0:
            assert not any(map(evictable, self.bytes)), "somebody could have left"

    @rule(length=st.integers(1, 6 * PAGE))
    def quarantine(self, length: int) -> None:
        self.shop.room.begin()
        before = self.places()
        slot = self.shop.room.take(length)
        self.notice_leaving(before)
        if slot is not None:
            assert self.shop.room.used_bytes <= self.shop.room.limit_bytes
            slot.owner = "somebody who is no block"
            self.number += 1
            self.tier.view(slot)[:] = wanted = self.number.to_bytes(4, "big") * (slot.length // 4)
            self.foreign[slot] = slot.offset, wanted

    @precondition(lambda self: self.foreign)
    @rule(data=st.data())
    def end_quarantine(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(list(self.foreign)))
        self.see_foreign(slot)
        del self.foreign[slot]
        self.shop.give_back([slot])

    # What must hold.

    @invariant()
    def all_is_as_it_should_be(self) -> None:
        if not hasattr(self, "shop"):
            return
        assert self.shop.check() == []
        for block in self.bytes:
            self.see(block)
        for slot in self.foreign:
            self.see_foreign(slot)
        owned = [(block.slot.offset, block.slot.length) for block in self.bytes]
        owned += [(slot.offset, slot.length) for slot in self.foreign]
        owned.sort()
        for (offset, length), (following, _) in pairwise(owned):
            assert offset + length <= following, "two slots overlap"
        used = sum(length for _, length in owned)
        assert self.shop.room.used_bytes == used
        if not self.debug:
            assert self.tier.free_bytes == self.tier.capacity_bytes - used

    # Helpers.

    def in_state(self, state: State) -> list[Block]:
        return [block for block in self.bytes if block.state is state]

    def places(self) -> dict[Block, tuple[int, bool, State]]:
        """Of every block that is here: its offset, whether it may not be touched, and its state."""
        return {
            block: (block.slot.offset, block.pins > 0 or block.state is not State.SEALED, block.state)
            for block in self.bytes
        }

    def reserve(self, length: int, parent: Block | None) -> Block | None:
        if parent is not None and parent.state is State.ABSENT:
            parent = None
        if parent is not None and parent.state is State.SEALED:
            self.shop.directory.pin([parent])  # as the store does, so that it does not leave for its child
        self.number += 1
        before = self.places()
        block = self.shop.reserve(self.number.to_bytes(8, "big"), length, parent)
        self.notice_leaving(before)
        if parent is not None and parent.state is State.SEALED:
            self.shop.directory.unpin([parent])
        if block is not None:
            assert self.shop.room.used_bytes <= self.shop.room.limit_bytes
            self.bytes[block] = random.Random(self.number).randbytes(length)
            self.tier.view(block.slot)[:length] = self.bytes[block]
        return block

    def notice_leaving(self, before: dict[Block, tuple[int, bool, State]]) -> None:
        """After room was made: only those left who might, and they were announced, children first."""
        left = [block for block in before if block.state is State.ABSENT]
        assert sorted(map(id, left)) == sorted(map(id, self.shop.room.evicted)), (
            "who left is not who was announced"
        )
        for block, (offset, fixed, state) in before.items():
            if fixed:
                assert block.state is state, f"{block} left"
                assert block.slot.offset == offset, f"{block} was moved"
        for block in left:
            del self.bytes[block]
        for block in self.bytes:
            assert block.parent not in left, f"{block} has lost its parent"

    def see(self, block: Block) -> None:
        assert block.slot.owner is block
        assert self.tier.view(block.slot)[: block.length] == self.bytes[block], f"{block} has other bytes"

    def see_foreign(self, slot: Slot) -> None:
        offset, wanted = self.foreign[slot]
        assert (slot.offset, slot.owner) == (offset, "somebody who is no block")
        assert self.tier.view(slot) == wanted, "a slot that is not ours was written"


TestRoomAgainstModel = Occupied.TestCase
TestRoomAgainstModel.settings = settings(
    max_examples=200, stateful_step_count=50, deadline=None, phases=PHASES
)


def key(number: int) -> bytes:
    return number.to_bytes(8, "big")


def filled(shop: Shop, length: int) -> list[Block]:
    """Fill the arena with blocks of one length; they lie in the order of their age."""
    blocks = []
    for number in range(shop.tier.capacity_bytes // length):
        block = shop.put(key(number), length)
        assert block is not None
        blocks.append(block)
    assert shop.tier.free_bytes == 0
    return blocks


def test_16_mib_free_in_pieces_among_48_blocks_of_1_mib_take_one_of_4_mib_without_evicting() -> None:
    shop = Shop(BytesTier(64 * MIB))
    blocks = filled(shop, MIB)
    holes = [4 * group + random.Random(group).randrange(4) for group in range(16)]
    for number, block in enumerate(blocks):
        if number in holes:
            shop.remove(block)
        else:
            shop.tier.view(block.slot)[:] = key(number) * (MIB // 8)
    assert shop.put(b"large", 4 * MIB) is not None
    assert shop.room.evicted == []
    assert shop.room.statistics().moved_blocks > 0
    for number, block in enumerate(blocks):
        if number not in holes:
            assert shop.tier.view(block.slot) == key(number) * (MIB // 8)
    assert shop.check() == []


def test_the_coldest_leave_first() -> None:
    shop = Shop(PaperTier(16 * PAGE))
    blocks = filled(shop, PAGE)
    for number in range(4):
        assert shop.put(key(100 + number)) is not None
    assert [block.state for block in blocks] == [State.ABSENT] * 4 + [State.SEALED] * 12


def test_a_run_of_neighbours_leaves_for_a_larger_block_and_is_announced() -> None:
    shop = Shop(PaperTier(16 * PAGE))
    blocks = filled(shop, PAGE)
    assert shop.put(b"large", 4 * PAGE) is not None
    assert len(shop.room.evicted) == 4
    assert {block for block in blocks if block.state is State.ABSENT} == set(shop.room.evicted)


@pytest.mark.parametrize("debug", [False, True])
def test_there_is_no_room_where_all_is_pinned_or_reserved(debug: bool) -> None:
    shop = Shop(PaperTier(16 * PAGE), debug=debug)
    blocks = filled(shop, PAGE)
    shop.directory.pin(blocks[2:])
    assert shop.reserve(b"two", 2 * PAGE) is not None
    assert shop.reserve(b"more", PAGE) is None
    assert shop.room.evicted == []
    assert all(block.state is State.SEALED for block in blocks[2:])


def test_a_debugged_room_frees_what_it_holds_back_in_a_few_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = 4096
    shop = Shop(PaperTier(pages * PAGE), debug=True)
    blocks = [shop.put(b"%d" % number) for number in range(pages)]
    for block in blocks[: pages // 8]:
        assert block is not None
        shop.remove(block)
    assert shop.room.late_bytes == pages // 8 * PAGE
    tries, take = [], shop.room._take
    monkeypatch.setattr(shop.room, "_take", lambda length: tries.append(length) or take(length))
    shop.directory.pin([block for block in blocks[pages // 8 :] if block is not None])
    assert shop.reserve(b"more than there is", pages // 4 * PAGE) is None
    assert len(tries) < 20
    assert shop.reserve(b"all there is", pages // 8 * PAGE) is not None
    assert shop.check() == []


def test_no_block_leaves_while_the_arena_is_being_populated() -> None:
    shop = Shop(PaperTier(16 * PAGE), populated=False)
    assert shop.put(key(0)) is None
    shop.room.grow(2 * PAGE)
    assert shop.put(key(1), 2 * PAGE) is not None
    assert shop.put(key(2), 2 * PAGE) is None
    shop.room.grow(16 * PAGE)
    assert shop.put(key(3), 14 * PAGE) is not None
    assert shop.put(key(4), 2 * PAGE) is not None
    assert len(shop.room.evicted) == 1


def test_a_request_moves_no_more_than_its_bound() -> None:
    shop = Shop(PaperTier(256 * MIB))
    blocks = filled(shop, MIB)
    for block in blocks[::2]:
        shop.remove(block)
    shop.room.begin()
    taken = [shop.room.take(4 * MIB) for _ in range(8)]
    assert all(taken)
    assert 0 < shop.room.statistics().moved_bytes <= MOVE_BYTES_MAX
    assert shop.tier.check() == []


def test_a_parent_leaves_with_its_children_and_not_before_them() -> None:
    shop = Shop(PaperTier(8 * PAGE))
    parent = shop.put(b"parent", 4 * PAGE)
    child = shop.put(b"child", 4 * PAGE, parent)
    assert parent is not None
    assert child is not None
    shop.directory.requested([child])
    assert shop.put(b"new", 4 * PAGE) is not None
    assert (parent.state, child.state) == (State.SEALED, State.ABSENT)
    assert shop.put(b"all", 8 * PAGE) is not None
    assert shop.check() == []


def test_free_memory_that_was_overlooked_is_used_before_anyone_leaves() -> None:
    # 16 and 17 pages share a bin of the allocator, in which only the first few are compared.
    shop = Shop(PaperTier((17 * 40 + 18 + 4000) * PAGE))
    pairs = [(shop.put(b"gap%d" % n, 16 * PAGE), shop.put(b"wall%d" % n, PAGE)) for n in range(40)]
    fits, wall = shop.put(b"fits", 17 * PAGE), shop.put(b"wall", PAGE)
    rest = shop.put(b"rest", 4000 * PAGE)
    walls = [wall for _, wall in pairs]
    assert wall is not None
    assert rest is not None
    for block in [*(gap for gap, _ in pairs), fits]:
        assert block is not None
        shop.remove(block)
    shop.directory.pin([block for block in [*walls, rest] if block is not None])
    assert shop.put(b"new", 17 * PAGE) is not None
    assert wall.state is State.SEALED
    assert shop.room.evicted == []
    assert shop.check() == []


def test_no_parent_leaves_for_its_neighbours_while_its_child_lies_elsewhere() -> None:
    shop = Shop(PaperTier(6 * PAGE))
    parent = shop.put(b"parent", PAGE)
    neighbour = shop.put(b"neighbour", PAGE)
    wall = shop.put(b"wall", PAGE)
    child = shop.put(b"child", PAGE, parent)
    other_wall = shop.put(b"other wall", 2 * PAGE)
    assert parent is not None
    assert neighbour is not None
    assert wall is not None
    assert child is not None
    assert other_wall is not None
    shop.directory.pin([wall, other_wall])
    # From now on the child is the coldest, then come parent and neighbour, which lie together.
    shop.directory.requested([parent])
    shop.directory.requested([neighbour])
    shop.put(b"new", 2 * PAGE)
    assert child.parent is None or child.parent.state is not State.ABSENT
    if parent.state is State.ABSENT:
        assert child.state is State.ABSENT
    assert shop.check() == []


def test_what_need_not_leave_stays() -> None:
    shop = Shop(PaperTier(16 * PAGE))
    small, large, wall = shop.put(b"small"), shop.put(b"large", 8 * PAGE), shop.put(b"wall", 7 * PAGE)
    assert wall is not None
    shop.directory.pin([wall])
    assert shop.put(b"new", 8 * PAGE) is not None
    assert shop.room.evicted == [large]
    assert small is not None
    assert small.state is State.SEALED
