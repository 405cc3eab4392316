"""The verbs as a client sees them, against a real daemon."""

import gc
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from kvstore import link as link_module
from kvstore.block import HitLength, Namespace
from kvstore.client import KEYS_MAX, StoreClient, copy
from kvstore.errors import DeadlineExceeded, InvalidRequest, LeaseError, Unavailable
from kvstore.protocol import LIST_PAGE_MAX, NAMESPACES_MAX
from tests.node import Node, empty, idle, node_with_bad_disk, wait_for, written

MIB = 1 << 20


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    """A daemon with an arena of 64 MiB for all tests, emptied after each."""
    with Node() as node:
        yield node


@pytest.fixture
def own_node() -> Iterator[Node]:
    """A daemon whose arena nobody else has cut into pieces."""
    with Node() as node:
        yield node
        node.check()


@pytest.fixture(autouse=True)
def nothing_is_left(node: Node) -> Iterator[None]:
    """In the end nothing is held, nothing is here, and a recount finds nothing wrong."""
    yield
    with node.client() as store:
        wait_for(lambda: idle(store) and store.statistics().connections == 1)
        assert store.check() == []
        empty(store)
        assert store.statistics().tiers[0].used_bytes == 0


def keys(count: int, tag: str = "k") -> list[bytes]:
    return [f"{tag}{index}".encode().ljust(32, b".") for index in range(count)]


def fill(store: StoreClient, namespace: Namespace, names: list[bytes], nbytes: int = 4096) -> None:
    with store.reserve(namespace, names, nbytes, wait_s=5) as write:
        assert write.granted == names
        for key, view in zip(write.granted, write.views, strict=True):
            view[:] = pattern(key, nbytes)
        write.commit()


def pattern(key: bytes, nbytes: int) -> bytes:
    return (key * (nbytes // len(key) + 1))[:nbytes]


def test_what_is_committed_is_read_bit_for_bit(store: StoreClient, namespace: Namespace) -> None:
    fill(store, namespace, keys(9), 5000)
    with store.acquire(namespace, keys(9)) as read:
        assert read.hit_length == 9
        assert [bytes(view) for view in read.views] == [pattern(key, 5000) for key in keys(9)]


def test_a_reserved_block_is_invisible_until_commit(store: StoreClient, namespace: Namespace) -> None:
    with store.reserve(namespace, keys(2), 100) as write:
        assert store.hit_length(namespace, keys(2)) == HitLength()
        write.commit()
    assert store.hit_length(namespace, keys(2)) == HitLength(0, 2, 2, 2)


def test_leaving_without_commit_aborts(store: StoreClient, namespace: Namespace) -> None:
    with store.reserve(namespace, keys(2), 100) as write:
        assert len(write.granted) == 2
    assert store.get(namespace, keys(1)[0], timeout_s=0) is None
    assert store.statistics().tiers[0].pending_blocks == 0


def test_some_keys_can_be_committed_before_the_others(store: StoreClient, namespace: Namespace) -> None:
    names = keys(4)
    with store.reserve(namespace, names, 100) as write:
        write.commit(names[:1])
        assert store.hit_length(namespace, names).dram == 1
        write.commit([names[2], names[1]])
        assert store.hit_length(namespace, names).dram == 3
    assert store.hit_length(namespace, names).dram == 3


def test_reserve_tells_present_busy_and_missing_apart(node: Node, namespace: Namespace) -> None:
    names = keys(4)
    with node.client() as one, node.client() as two:
        fill(one, namespace, names[:1])
        with one.reserve(namespace, names[1:2], 4096) as first, two.reserve(namespace, names, 4096) as second:
            assert (second.present, second.busy, second.granted) == (names[:1], names[1:2], names[2:])
            first.commit()
            second.commit()
        assert two.hit_length(namespace, names).dram == 4


def test_a_key_that_is_being_written_with_another_length_is_busy(node: Node, namespace: Namespace) -> None:
    names = keys(3)
    with node.client() as one, node.client() as two, one.reserve(namespace, names[:1], 100) as first:
        with two.reserve(namespace, names, 64) as second:
            assert (second.busy, second.granted) == (names[:1], names[1:])
        with two.reserve_each([(namespace, key) for key in names], 64) as second:
            assert (second.busy, len(second.granted)) == ([(namespace, names[0])], 2)
        first.commit()
        with pytest.raises(InvalidRequest, match=r"nbytes is 64 .* here with 100 bytes"):
            two.reserve(namespace, names, 64)


def test_a_put_beside_one_of_another_length_says_so_once_that_is_there(
    node: Node, namespace: Namespace
) -> None:
    with node.client() as one, node.client() as two, one.reserve(namespace, keys(1), 100) as first:
        threading.Timer(0.1, first.commit).start()
        with pytest.raises(InvalidRequest, match=r"nbytes is 64 .* here with 100 bytes"):
            two.put(namespace, keys(1)[0], bytes(64))


def test_a_hole_ends_the_hit(store: StoreClient, namespace: Namespace) -> None:
    names = keys(5)
    fill(store, namespace, names)
    assert store.remove(namespace, [names[2]]) == 1
    with store.acquire(namespace, names) as read:
        assert read.hit_length == len(read.views) == 2


def test_acquire_each_allows_holes_and_mixes_namespaces(store: StoreClient, namespace: Namespace) -> None:
    other = Namespace(model=namespace.model, salt="tenant")
    fill(store, namespace, keys(1))
    fill(store, other, keys(1, "o"), 200)
    items = [(namespace, keys(1)[0]), (other, keys(1)[0]), (other, keys(1, "o")[0])]
    with store.acquire_each(items) as read:
        assert [view is not None and len(view) for view in read.views] == [4096, False, 200]
    assert list(store.hit_each(items)) == [True, False, True]


def test_acquire_waits_for_a_block_that_is_being_written(node: Node, namespace: Namespace) -> None:
    with node.client() as writer, node.client() as reader, writer.reserve(namespace, keys(2), 64) as write:
        hits: list[int] = []
        waiting = threading.Thread(
            target=lambda: hits.append(reader.acquire(namespace, keys(2), wait_s=10).hit_length)
        )
        waiting.start()
        write.commit(keys(1))
        # The reader's other calls are not held up by the one that waits.
        assert reader.hit_length(namespace, keys(2)).dram == 1
        assert waiting.is_alive()
        write.commit()
        waiting.join(5)
        assert hits == [2]


def test_acquire_stops_waiting_when_the_writer_aborts(node: Node, namespace: Namespace) -> None:
    with node.client() as writer, node.client() as reader:
        write = writer.reserve(namespace, keys(1), 64)
        threading.Timer(0.1, write.abort).start()
        started = time.monotonic()
        assert reader.get(namespace, keys(1)[0], timeout_s=10) is None
        assert time.monotonic() - started < 5


def test_acquire_does_not_wait_for_what_nobody_announced(store: StoreClient, namespace: Namespace) -> None:
    started = time.monotonic()
    assert store.get(namespace, b"nobody", timeout_s=10) is None
    assert time.monotonic() - started < 5


def test_acquire_gives_what_is_ready_at_its_deadline(node: Node, namespace: Namespace) -> None:
    with node.client() as writer, node.client() as reader:
        write = writer.reserve(namespace, keys(3), 64)
        write.commit(keys(1))
        with reader.acquire(namespace, keys(3), wait_s=0.1) as read:
            assert read.hit_length == 1
        write.abort()


def test_reserve_waits_for_room(own_node: Node, namespace: Namespace) -> None:
    with own_node.client() as one, own_node.client() as two, own_node.client() as three:
        fill(one, namespace, keys(32), MIB)
        fill(two, namespace, keys(32, "x"), MIB)
        pinned = one.acquire(namespace, keys(32))
        others = two.acquire(namespace, keys(32, "x"))
        assert pinned.hit_length == others.hit_length == 32
        assert three.reserve(namespace, keys(1, "new"), 2 * MIB).refused == keys(1, "new")
        threading.Timer(0.1, pinned.release).start()
        with three.reserve(namespace, keys(1, "new"), 2 * MIB, wait_s=10) as write:
            assert write.granted == keys(1, "new")
        with pytest.raises(DeadlineExceeded, match="no room for 67108864 bytes"):
            three.put(namespace, b"all", bytes(64 * MIB), timeout_s=0.2)
        others.release()


def test_pinned_blocks_survive_twice_the_arena_of_new_ones(store: StoreClient, namespace: Namespace) -> None:
    before = store.statistics().counters.evicted_blocks
    fill(store, namespace, keys(8), MIB)
    with store.acquire(namespace, keys(8)) as read:
        for batch in range(8):
            fill(store, namespace, keys(16, f"batch{batch}-"), MIB)
        assert [bytes(view) for view in read.views] == [pattern(key, MIB) for key in keys(8)]
    assert store.statistics().counters.evicted_blocks - before > 50


def test_a_client_at_its_pin_limit_gets_shorter_hits(store: StoreClient, namespace: Namespace) -> None:
    fill(store, namespace, keys(32), MIB)
    fill(store, namespace, keys(20, "x"), MIB)
    with store.acquire(namespace, keys(32)) as first, store.acquire(namespace, keys(20, "x")) as second:
        assert (first.hit_length, first.limited) == (32, False)
        assert (second.hit_length, second.limited) == (0, True)
    with store.acquire(namespace, keys(20, "x")) as again:
        assert (again.hit_length, again.limited) == (20, False)


def test_a_client_at_its_reserve_limit_is_refused_the_rest(store: StoreClient, namespace: Namespace) -> None:
    with store.reserve(namespace, keys(40), MIB) as write:
        assert (len(write.granted), len(write.refused)) == (32, 8)
    fill(store, namespace, keys(32), MIB)


def test_put_and_get_copy(store: StoreClient, namespace: Namespace) -> None:
    data = np.arange(1000, dtype=np.float32)
    store.put(namespace, b"k", data)
    assert store.get(namespace, b"k") == data.tobytes()
    store.put(namespace, b"k", data)  # there already
    with pytest.raises(InvalidRequest, match=r"nbytes is 5 .* here with 4000 bytes"):
        store.put(namespace, b"k", b"other")


def test_removed_blocks_are_hidden_at_once_and_freed_at_the_last_release(
    store: StoreClient, namespace: Namespace
) -> None:
    fill(store, namespace, keys(1))
    with store.acquire(namespace, keys(1)) as read:
        assert store.remove(namespace, keys(1)) == 1
        assert store.hit_length(namespace, keys(1)).dram == 0
        fill(store, namespace, keys(1), 5000)  # another length: another block under the same key
        assert bytes(read.views[0]) == pattern(keys(1)[0], 4096)
        assert store.statistics().tiers[0].doomed_blocks == 1
    assert store.remove(namespace, keys(1)) == 1
    wait_for(lambda: store.statistics().tiers[0].doomed_blocks == 0)


def test_a_remove_waits_for_a_disk_that_takes_longer_than_any_other_call_may(namespace: Namespace) -> None:
    with node_with_bad_disk() as (node, faults), node.client(timeout_s=0.3) as store:
        fill(store, namespace, keys(3))
        wait_for(lambda: written(store))
        faults.write_text("forgetting 0.8\n")
        started = time.monotonic()
        assert store.remove(namespace, keys(2)) == 2
        assert time.monotonic() - started > 0.8
        assert store.lost is None
        assert store.hit_each([(namespace, key) for key in keys(3)]) == [False, False, True]


def test_list_pages_through_a_namespace(store: StoreClient, namespace: Namespace) -> None:
    names = keys(6000)
    for start in range(0, 6000, 2000):
        fill(store, namespace, names[start : start + 2000], 64)
    found: dict[bytes, int] = {}
    cursor: int | None = None
    while True:
        page = store.list(namespace, cursor)
        found.update(zip(page.keys, page.lengths, strict=True))
        if (cursor := page.cursor) is None:
            break
    assert found == dict.fromkeys(names, 64)
    assert store.list(Namespace(model="empty")).keys == []


def test_a_page_is_no_longer_than_asked_for(store: StoreClient, namespace: Namespace) -> None:
    names = keys(10)
    fill(store, namespace, names, 64)
    found, cursor = [], None
    for _ in range(4):
        page = store.list(namespace, cursor, limit=3)
        found.append(list(page.keys))
        cursor = page.cursor
    assert cursor is None
    assert found == [names[:3], names[3:6], names[6:9], names[9:]]


def test_namespaces_are_listed_with_what_they_hold(store: StoreClient, namespace: Namespace) -> None:
    assert list(store.namespaces()) == []
    salted = replace(namespace, salt="a")
    fill(store, namespace, keys(3), 100)
    fill(store, salted, keys(2), 1000)
    with store.acquire(replace(namespace, salt="only asked for"), keys(1)):
        pass
    found = {use.namespace: (use.blocks, use.block_bytes) for use in store.namespaces()}
    assert found == {namespace: (3, 300), salted: (2, 2000)}
    store.remove(salted, keys(2))
    assert [use.namespace for use in store.namespaces()] == [namespace]


def test_more_namespaces_than_a_page_holds_are_all_listed() -> None:
    salts = [f"salt {number}" for number in range(LIST_PAGE_MAX + 10)]
    items = [(Namespace(model="m", salt=salt), b"k") for salt in salts]
    with Node("32MiB") as node, node.client() as store:
        for start in range(0, len(items), KEYS_MAX):
            with store.reserve_each(items[start : start + KEYS_MAX], 16) as write:
                write.commit()
        assert sorted(use.namespace.salt for use in store.namespaces()) == sorted(salts)
        node.check()


def test_a_listing_of_namespaces_begins_behind_an_id(store: StoreClient, namespace: Namespace) -> None:
    salted = sorted([replace(namespace, salt=f"{number}") for number in range(5)], key=lambda each: each.id)
    for each in salted:
        fill(store, each, keys(1), 100)
    assert [use.namespace for use in store.namespaces()] == salted
    assert [use.namespace for use in store.namespaces(salted[1].id)] == salted[2:]
    assert [use.namespace for use in store.namespaces(after=salted[4].id)] == []


# Namespaces that one connection names: as many as it likes.

Verb = Callable[[StoreClient, Namespace, bytes], object]
VERBS: dict[str, Verb] = {
    "reserve": lambda store, name, key: store.reserve(name, [key], 64).present == [key],
    "reserve_each": lambda store, name, key: store.reserve_each([(name, key)], 64).present == [(name, key)],
    "acquire": lambda store, name, key: store.acquire(name, [key]).hit_length,
    "acquire_each": lambda store, name, key: store.acquire_each([(name, key)]).views[0],
    "hit_length": lambda store, name, key: store.hit_length(name, [key]).dram,
    "hit_each": lambda store, name, key: store.hit_each([(name, key)])[0],
    "length_each": lambda store, name, key: store.length_each([(name, key)])[0],
    "list": lambda store, name, key: store.list(name).keys,
    "get": lambda store, name, key: store.get(name, key),
    "put": lambda store, name, key: store.put(name, key, bytes(64)) is None,
    "remove": lambda store, name, key: store.remove(name, [key]),
}


def salted_items(salts: range) -> list[tuple[Namespace, bytes]]:
    return [(Namespace(model="salted", salt=f"{salt}"), b"k") for salt in salts]


def look_at(store: StoreClient, salts: range) -> None:
    """Name so many namespaces, as many at once as may be."""
    for start in range(salts.start, salts.stop, KEYS_MAX):
        assert not any(store.hit_each(salted_items(range(start, min(start + KEYS_MAX, salts.stop)))))


def test_a_connection_names_more_namespaces_than_the_daemon_keeps(
    store: StoreClient, namespace: Namespace
) -> None:
    store.put(namespace, b"k", bytes(64))
    look_at(store, range(NAMESPACES_MAX + 1000))
    assert store.get(namespace, b"k") == bytes(64)
    look_at(store, range(10))
    link = store._keeper._link
    assert link is not None
    assert len(link._handles) < NAMESPACES_MAX


@pytest.mark.parametrize("threads_", [1, 4])
def test_every_verb_names_anew_what_the_daemon_has_forgotten(
    store: StoreClient, namespace: Namespace, monkeypatch: pytest.MonkeyPatch, threads_: int
) -> None:
    monkeypatch.setattr(
        link_module, "NAMESPACES_MAX", 1 << 30
    )  # so that the client does not forget by itself
    store.put(namespace, b"k", bytes(64))
    look_at(store, range(NAMESPACES_MAX))
    link = store._keeper._link
    assert link is not None
    stale = link._handles[namespace]
    failures: list[str] = []

    def work() -> None:
        for name, verb in list(VERBS.items())[: None if threads_ == 1 else -1]:
            link._handles[namespace] = stale
            if not verb(store, namespace, b"k"):
                failures.append(name)

    working = [threading.Thread(target=work) for _ in range(threads_)]
    for thread in working:
        thread.start()
    for thread in working:
        thread.join()
    assert failures == []
    assert link._handles[namespace] > NAMESPACES_MAX
    gc.collect()


def test_a_request_of_which_each_key_has_a_forgotten_namespace_is_done(
    store: StoreClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "NAMESPACES_MAX", 1 << 30)
    items = salted_items(range(KEYS_MAX))
    with store.reserve_each(items, 16) as write:
        write.commit()
    look_at(store, range(KEYS_MAX, KEYS_MAX + NAMESPACES_MAX))
    assert all(store.hit_each(items))
    with store.acquire_each(items) as read:
        assert all(read.views)


def test_lengths_of_several_namespaces_are_told_at_once(store: StoreClient, namespace: Namespace) -> None:
    salted = replace(namespace, salt="a")
    fill(store, namespace, keys(1), 100)
    fill(store, salted, keys(1), 1000)
    items = [(namespace, keys(1)[0]), (namespace, b"absent"), (salted, keys(1)[0])]
    assert store.length_each(items) == [100, 0, 1000]


def test_namespaces_do_not_see_each_other(store: StoreClient) -> None:
    salted, plain = Namespace(model="m", salt="a"), Namespace(model="m")
    fill(store, salted, keys(1))
    assert store.get(plain, keys(1)[0]) is None


@pytest.mark.parametrize(
    ("verb", "message"),
    [
        (lambda lease: (lease.commit(), lease.commit()), "commit on a lease that has ended"),
        (lambda lease: (lease.abort(), lease.commit()), "commit on a lease that has ended"),
        (lambda lease: (lease.abort(), lease.abort()), "abort of a lease that has ended"),
        (lambda lease: (lease.commit(keys(1)), lease.commit(keys(1))), "was committed before"),
        (lambda lease: (lease.abort(), lease.views), "views on a lease that has ended"),
    ],
)
def test_a_write_lease_ends_once(
    store: StoreClient, namespace: Namespace, verb: object, message: str
) -> None:
    lease = store.reserve(namespace, keys(2), 64)
    assert callable(verb)
    with pytest.raises(LeaseError, match=message):
        verb(lease)


def test_a_read_lease_ends_once(store: StoreClient, namespace: Namespace) -> None:
    fill(store, namespace, keys(1))
    lease = store.acquire(namespace, keys(1))
    view = lease.views[0]
    assert lease.valid
    lease.release()
    assert not lease.valid
    with pytest.raises(LeaseError, match="release of a lease that has ended"):
        lease.release()
    with pytest.raises(LeaseError, match="views on a lease that has ended"):
        _ = lease.views
    with pytest.raises(ValueError, match="released memoryview"):
        view[0]


def test_read_views_cannot_be_written(store: StoreClient, namespace: Namespace) -> None:
    fill(store, namespace, keys(1))
    with store.acquire(namespace, keys(1)) as read, pytest.raises(TypeError, match="read-only"):
        read.views[0][0] = 1


def test_a_lease_may_be_released_from_another_thread(store: StoreClient, namespace: Namespace) -> None:
    fill(store, namespace, keys(1))
    lease = store.acquire(namespace, keys(1))
    releasing = threading.Thread(target=lease.release)
    releasing.start()
    releasing.join()
    wait_for(lambda: store.statistics().tiers[0].pinned_blocks == 0)


def test_a_forgotten_lease_is_given_up(store: StoreClient, namespace: Namespace) -> None:
    fill(store, namespace, keys(1))
    store.acquire(namespace, keys(1))
    gc.collect()
    wait_for(lambda: store.statistics().tiers[0].pinned_blocks == 0)


def test_many_threads_share_one_client(store: StoreClient, namespace: Namespace) -> None:
    failures: list[str] = []

    def work(number: int) -> None:
        for turn in range(60):
            names = keys(3, f"{number}-{turn}-")
            fill(store, namespace, names, 1000)
            with store.acquire(namespace, names, wait_s=turn % 2) as read:
                if [bytes(view) for view in read.views] != [pattern(key, 1000) for key in names]:
                    failures.append(f"{number} {turn}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_parent_is_not_evicted_before_its_child(store: StoreClient, namespace: Namespace) -> None:
    names = keys(8)
    fill(store, namespace, names[:4], MIB)
    with store.reserve(namespace, names[4:], MIB, parent=names[3]) as write:
        write.commit()
    for batch in range(8):
        fill(store, namespace, keys(10, f"batch{batch}-"), MIB)
        present = list(store.hit_each([(namespace, key) for key in names]))
        assert present == sorted(present, reverse=True), "a block is here whose parent is not"


def test_blocks_of_several_namespaces_are_reserved_and_committed_at_once(
    node: Node, store: StoreClient, namespace: Namespace
) -> None:
    salted = replace(namespace, salt="a")
    fill(store, namespace, [b"present"], 100)
    with node.client() as other, other.reserve(salted, [b"busy"], 10) as writing:
        assert writing.granted
        items = [
            (namespace, b"x"),
            (salted, b"x"),
            (salted, b"busy"),
            (namespace, b"present"),
            (salted, b"y"),
        ]
        with store.reserve_each(items, [10, 20, 10, 100, 30]) as write:
            assert write.granted == [items[0], items[1], items[4]]
            assert (write.present, write.busy, write.refused) == ([items[3]], [items[2]], [])
            for (_, key), view in zip(write.granted, write.views, strict=True):
                view[:] = pattern(key, len(view))
            assert store.hit_each(items) == [False, False, False, True, False]
            write.commit([items[1]])
            with pytest.raises(LeaseError, match=r"key 78 of llama-test\[.*\] was committed before"):
                write.commit([items[1]])
            write.commit([items[0], items[4]])
    assert store.get(namespace, b"x") == pattern(b"x", 10)
    assert store.get(salted, b"x") == pattern(b"x", 20)
    assert store.get(salted, b"y") == pattern(b"y", 30)


def test_an_item_may_not_be_reserved_twice_at_once(store: StoreClient, namespace: Namespace) -> None:
    with store.reserve_each([(namespace, b"k"), (replace(namespace, salt="a"), b"k")], 10) as write:
        assert len(write.granted) == 2
    with pytest.raises(InvalidRequest, match="key 6b occurs twice in 2 keys"):
        store.reserve_each([(namespace, b"k"), (namespace, b"k")], 10)


def test_items_in_no_order_do_not_hold_each_other(store: StoreClient, namespace: Namespace) -> None:
    """Of a chain nothing may leave while its tail is pinned; of these all others may."""
    items = [(namespace, key) for key in keys(30)]
    with store.reserve_each(items, MIB) as write:
        write.commit()
    with store.acquire_each(items[-1:]):
        for batch in range(3):
            fill(store, namespace, keys(20, f"batch{batch}-"), MIB)
        present = store.hit_each(items)
    assert present[-1]
    assert sum(present) < 10


def test_reserving_items_waits_for_room(own_node: Node, namespace: Namespace) -> None:
    with own_node.client() as reader, own_node.client() as store, own_node.client() as other:
        for client, tag in ((store, "a"), (other, "b")):
            fill(client, namespace, keys(31, tag), MIB)
        first = reader.acquire(namespace, keys(31, "a"))
        second = store.acquire(namespace, keys(31, "b"))
        items = [(namespace, key) for key in keys(8, "c")]
        assert len(other.reserve_each(items, MIB).refused) > 0
        threading.Timer(0.2, first.release).start()
        with other.reserve_each(items, MIB, wait_s=10) as write:
            assert write.granted == items
        second.release()


def test_48_blocks_of_1_mib_and_one_of_4_fit_64_mib_in_pieces(own_node: Node, namespace: Namespace) -> None:
    names = keys(64)
    with own_node.client() as store:
        for start in range(0, 64, 16):
            fill(store, namespace, names[start : start + 16], MIB)
        assert store.remove(namespace, names[::4]) == 16
        kept = [name for index, name in enumerate(names) if index % 4]
        store.put(namespace, b"large", bytes(4 * MIB))
        assert all(store.hit_each([(namespace, key) for key in [*kept, b"large"]]))
        for name in kept:
            assert store.get(namespace, name) == pattern(name, MIB)


def test_a_closed_client_says_so(node: Node, namespace: Namespace) -> None:
    store = node.client()
    lease = store.reserve(namespace, keys(1), 64)
    store.close()
    assert not lease.valid
    with pytest.raises(Unavailable, match="the client is closed"):
        store.get(namespace, b"k")
    node.check()


def test_connecting_to_nobody_says_so(tmp_path: object) -> None:
    with pytest.raises(Unavailable, match="is `kvstore serve` running"):
        StoreClient.connect(f"unix:{tmp_path}/none.sock")
    with pytest.raises(InvalidRequest, match="address 'nonsense'"):
        StoreClient.connect("nonsense")


def test_copy_refuses_unequal_lengths() -> None:
    with pytest.raises(InvalidRequest, match="copy of 3 bytes into 2"):
        copy(memoryview(bytearray(2)), memoryview(b"abc"))


def test_tokens_and_many_lengths_travel(store: StoreClient, namespace: Namespace) -> None:
    lengths = [100, 200, 300]
    with store.reserve(namespace, keys(3), lengths, tokens=list(range(768))) as write:
        assert [len(view) for view in write.views] == lengths
        write.commit()
    with store.acquire(namespace, keys(3)) as read:
        assert [len(view) for view in read.views] == lengths
