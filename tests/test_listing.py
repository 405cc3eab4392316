"""Listing what a namespace has, page by page, while blocks come, go and move."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.node.blocks import Block
from kvstore.node.listing import Listings
from kvstore.node.rules import Rules
from tests.scripted import MIB, Disk, Stage, in_virtual_time, quiet, virtual_time

LENGTH = 64 << 10
NAMES = [b"%d" % number for number in range(40)]
ON_EVICTION = Rules(on_eviction=True, high_watermark=1.0, low_watermark=1.0)


def pages(stage: Stage, limit: int, between: Callable[[], object] = lambda: None) -> list[list[bytes]]:
    """The keys of all pages; something happens between two of them."""
    listings, cursor, found = Listings(), 0, []
    for _ in range(1000):
        page, cursor = listings.page(stage.shelves, cursor, limit)
        assert len(page) <= limit
        found.append([block.key for block in page])
        if not cursor:
            return found
        between()
    raise AssertionError("it never ends")


def rest(listings: Listings, stage: Stage, cursor: int) -> list[Block]:
    """The blocks of the pages from a cursor on."""
    blocks: list[Block] = []
    while cursor:
        page, cursor = listings.page(stage.shelves, cursor, 10)
        blocks += page
    return blocks


def listed(stage: Stage, limit: int = 1000) -> list[bytes]:
    return [key for page in pages(stage, limit) for key in page]


@in_virtual_time
async def test_an_empty_namespace_has_no_keys() -> None:
    async with Stage([Disk(MIB)]) as stage:
        assert listed(stage) == []
    async with Stage([]) as stage:
        assert pages(stage, 10) == [[]]


@in_virtual_time
async def test_blocks_are_listed_in_the_order_of_their_sealing_in_pages_of_any_size() -> None:
    async with Stage([]) as stage:
        stage.put(*NAMES[:7])
        assert [len(page) for page in pages(stage, 3)] == [3, 3, 1]
        assert [len(page) for page in pages(stage, 7)] == [7]
        for limit in range(1, 9):
            assert listed(stage, limit) == NAMES[:7]


@in_virtual_time
async def test_a_block_in_two_tiers_is_listed_once_and_those_below_come_after() -> None:
    disk = Disk(8 * MIB)
    async with Stage([disk]) as stage:
        stage.put(*NAMES[:8])
    async with Stage([disk]) as stage:
        stage.put(*NAMES[8:12])
        stage.release(await stage.acquiring(*NAMES[:4]))
        await quiet()
        for limit in (1, 2, 3, 5, 100):
            keys = listed(stage, limit)
            assert sorted(keys) == sorted(NAMES[:12])
            assert keys[-4:] == NAMES[4:8]


@in_virtual_time
async def test_reserved_and_removed_blocks_are_not_listed() -> None:
    async with Stage([Disk(MIB)]) as stage:
        stage.put(*NAMES[:4])
        stage.reserve([NAMES[4]], LENGTH)
        await stage.remove(NAMES[1])
        assert listed(stage) == [NAMES[0], NAMES[2], NAMES[3]]
        stage.store.end(stage.holder)


@in_virtual_time
async def test_what_is_promoted_after_the_arena_was_listed_is_listed_below() -> None:
    disk = Disk(8 * MIB)
    async with Stage([disk]) as stage:
        stage.put(*NAMES[:4])
    async with Stage([disk]) as stage:
        listings = Listings()
        page, cursor = listings.page(stage.shelves, 0, 10)
        assert page == []
        stage.release(await stage.acquiring(NAMES[0]))
        page += rest(listings, stage, cursor)
        assert [block.key for block in page] == NAMES[:4]


@in_virtual_time
async def test_what_is_demoted_while_it_is_listed_is_listed_below() -> None:
    async with Stage([Disk(8 * MIB)], ON_EVICTION) as stage:
        for name in NAMES[:8]:
            stage.put(name)
        listings = Listings()
        page, cursor = listings.page(stage.shelves, 0, 2)
        keys = [block.key for block in page]
        stage.store.movements.demoter.want(3 * LENGTH, stage.shelves[0].account)
        await quiet()
        assert len(stage.shelves[1].sealed) == 3
        while cursor:
            page, cursor = listings.page(stage.shelves, cursor, 2)
            keys += [block.key for block in page]
        assert set(keys) == set(NAMES[:8])


@pytest.mark.parametrize("cursor", [-1, 1 << 60, 5 << 48])
def test_a_cursor_that_was_never_given_out_does_no_harm(cursor: int) -> None:
    with virtual_time() as loop:

        async def scenario() -> None:
            async with Stage([Disk(MIB)]) as stage:
                stage.put(*NAMES[:3])
                await quiet()
                page, _ = Listings().page(stage.shelves, cursor, 10)
                assert [block.key for block in page] in ([], NAMES[:3])

        loop.run_until_complete(scenario())


@settings(max_examples=60, deadline=None)
@given(limit=st.integers(1, 5), moves=st.lists(st.integers(0, 39), max_size=12))
def test_a_block_that_is_here_all_the_while_is_listed_though_others_come_and_go(
    limit: int, moves: list[int]
) -> None:
    with virtual_time() as loop:

        async def scenario() -> None:
            async with Stage([Disk(32 * LENGTH)]) as stage:
                stage.put(*NAMES[:16])
                await quiet()
                here = set(NAMES[:16])
                left = list(moves)

                listings, cursor, keys = Listings(), 0, []
                while True:
                    page, cursor = listings.page(stage.shelves, cursor, limit)
                    keys += [block.key for block in page]
                    if not cursor:
                        break
                    if left:
                        number = left.pop()
                        if number < 8:
                            stage.store.remove(stage.shelves, [NAMES[number]])[1].close()  # type: ignore[union-attr]
                        elif number < 20:
                            stage.put(NAMES[16 + number], length=3 * LENGTH)
                        else:
                            stage.release(await stage.acquiring(NAMES[number - 20]))
                        await quiet()
                    here &= {key for shelf in stage.shelves for key in shelf.sealed}
                assert here <= set(keys)

        loop.run_until_complete(scenario())


@in_virtual_time
async def test_a_page_that_ends_with_a_block_being_demoted_does_not_end_the_list() -> None:
    async with Stage([Disk(MIB)], ON_EVICTION) as stage:
        for name in NAMES[:3]:
            stage.put(name)
        stage.tier.holding = {"write"}
        stage.store.movements.demoter.want(1, stage.shelves[0].account)
        await quiet()
        assert set(listed(stage, 1)) == set(NAMES[:3])


@in_virtual_time
async def test_two_listings_of_one_client_do_not_disturb_each_other() -> None:
    disk = Disk(8 * MIB)
    async with Stage([disk]) as stage:
        stage.put(*NAMES[:4])
    async with Stage([disk]) as stage:
        listings = Listings()
        page, cursor = listings.page(stage.shelves, 0, 10)
        assert page == []
        stage.release(await stage.acquiring(*NAMES[:4]))
        _, other = listings.page(stage.shelves, 0, 10)
        assert other > 0
        page += rest(listings, stage, cursor)
        assert [block.key for block in page] == NAMES[:4]


@in_virtual_time
async def test_what_an_exclusive_tier_gave_up_after_the_arena_was_listed_is_listed() -> None:
    disk = Disk(8 * MIB)
    async with Stage([disk]) as stage:
        stage.put(*NAMES[:4])
    async with Stage([disk], Rules(on_eviction=True, exclusive=True)) as stage:
        listings = Listings()
        page, cursor = listings.page(stage.shelves, 0, 10)
        stage.release(await stage.acquiring(NAMES[0]))
        page += rest(listings, stage, cursor)
        assert {block.key for block in page} == set(NAMES[:4])
