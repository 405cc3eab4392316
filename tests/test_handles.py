"""Numbers that stand for a connection's namespaces: none given twice, and forgotten when not used."""

from collections.abc import Iterator, Sequence

import pytest

from kvstore import packing
from kvstore.block import Medium, Namespace
from kvstore.errors import InvalidRequest, UnknownNamespace
from kvstore.node import handles as handles_module
from kvstore.node.directory import Directory, TierDirectory
from kvstore.node.handles import Handles
from kvstore.node.policy import LRU

MAX = 4
NAMES = [Namespace(model="m", salt=f"salt {number}") for number in range(12)]


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection keeps four."""
    monkeypatch.setattr(handles_module, "NAMESPACES_MAX", MAX)


@pytest.fixture
def tier() -> TierDirectory:
    """The only tier."""
    return TierDirectory("dram", Medium.DRAM, LRU())


@pytest.fixture
def handles(tier: TierDirectory) -> Iterator[Handles]:
    """Of one connection."""
    handles = Handles(Directory([tier]))
    yield handles
    assert len(tier.shelves()) <= MAX


def opened(handles: Handles, names: Sequence[Namespace]) -> list[int]:
    return handles.open([name.id for name in names], names)


def test_a_handle_stands_for_its_namespace_until_as_many_others_were_used(handles: Handles) -> None:
    first = opened(handles, NAMES[:MAX])
    assert opened(handles, NAMES[:MAX]) == first
    assert [handles.shelves(handle)[0].namespace for handle in first] == NAMES[:MAX]
    opened(handles, NAMES[MAX : 2 * MAX])
    for handle in first:
        with pytest.raises(UnknownNamespace, match=f"namespace handle {handle} is forgotten"):
            handles.shelves(handle)


def test_what_is_used_is_kept(handles: Handles) -> None:
    kept, *_ = opened(handles, NAMES[:MAX])
    for name in NAMES[MAX:]:
        handles.items([kept], packing.pack_keys([b"k"]))
        opened(handles, [name])
    assert handles.shelves(kept)[0].namespace == NAMES[0]
    for name in NAMES[1:]:  # naming is a use, too
        assert opened(handles, [NAMES[0]]) == [kept]
        opened(handles, [name])


def test_no_number_is_given_twice(handles: Handles) -> None:
    seen = [handle for _ in range(3) for name in NAMES for handle in opened(handles, [name])]
    assert seen == list(range(3 * len(NAMES)))


def test_what_was_never_given_is_not_forgotten_but_wrong(handles: Handles) -> None:
    opened(handles, NAMES)
    for handle in (-1, len(NAMES), 1 << 63):
        with pytest.raises(InvalidRequest, match=f"namespace handle {handle}; .* has opened {len(NAMES)}"):
            handles.shelves(handle)


def test_a_request_finds_all_of_its_namespaces_or_none(handles: Handles) -> None:
    given = opened(handles, NAMES[:MAX])
    keys = packing.pack_keys([b"a", b"b", b"c", b"d"])
    found = [(shelves[0].namespace, key) for shelves, key in handles.items(given[::-1], keys)]
    assert found == list(zip(NAMES[:MAX][::-1], [b"a", b"b", b"c", b"d"], strict=True))
    opened(handles, NAMES[MAX : MAX + 1])
    with pytest.raises(UnknownNamespace):
        handles.items(given, keys)


def test_a_namespace_that_is_forgotten_and_empty_leaves_nothing_behind(
    handles: Handles, tier: TierDirectory
) -> None:
    for name in NAMES:
        opened(handles, [name])
    assert [shelf.namespace for shelf in tier.shelves()] == NAMES[-MAX:]
