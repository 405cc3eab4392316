"""What the index believes of nodes' media: their own measurements, their neighbours', and no lies."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.block import Medium, Namespace
from kvstore.index.estimate import Speed
from kvstore.index.feed import Measures, SpaceMeasure
from kvstore.index.speeds import DEFAULTS, KEPT_S, Source, Speeds

NVME, REMOTE = Medium.NVME, Medium.REMOTE
SPACE = Namespace("m", 16, group="0")


def having(*spaces: tuple[Namespace, int, int]) -> Measures:
    return Measures({}, [SpaceMeasure(space.canonical, *counts) for space, *counts in spaces])


def measured(
    bytes_per_s: float,
    latency_s: float = 0.001,
    medium: Medium = NVME,
    spaces: Sequence[tuple[Namespace, int, int]] = (),
) -> Measures:
    return Measures({medium: (latency_s, bytes_per_s)}, having(*spaces).spaces)


def test_a_node_s_own_measurement_counts_first() -> None:
    speeds = Speeds()
    speeds.observe("a", "eu/r1", measured(1e9), 0.0)
    speeds.observe("b", "eu/r1", measured(2e9), 0.0)
    assert speeds.of("a")[NVME] == Speed(0.001, 1e9)
    assert speeds.sources("a")[NVME] is Source.OWN
    speeds.observe("a", "eu/r1", measured(3e9), 0.1)
    assert speeds.of("a")[NVME].bytes_per_s == 3e9


def test_who_has_not_measured_is_taken_for_its_nearest_neighbours_medium_by_medium() -> None:
    speeds = Speeds()
    for number, gigabytes in enumerate((1, 2, 9)):
        speeds.observe(f"r1-{number}", "eu/r1", measured(gigabytes * 1e9), 0.0)
    speeds.observe("r2", "eu/r2", measured(30e9), 0.0)
    speeds.observe("us", "us", measured(5e8, medium=REMOTE), 0.0)
    for place, wanted, source in (
        ("eu/r1", 2e9, Source.RACK),
        ("eu/r3", 5.5e9, Source.ZONE),
        ("eu", 5.5e9, Source.ZONE),
        ("ap/r1", 5.5e9, Source.ALL),
        ("", 5.5e9, Source.ALL),
    ):
        speeds.observe("new", place, None, 1.0)
        assert speeds.of("new")[NVME].bytes_per_s == wanted
        assert speeds.sources("new")[NVME] is source
        assert speeds.sources("new")[REMOTE] is Source.ALL
        assert speeds.sources("new")[Medium.DRAM] is Source.DEFAULT
        speeds.forget("new")
    assert speeds.of("nobody")[NVME].bytes_per_s == 5.5e9


def test_without_any_measurement_there_are_defaults() -> None:
    speeds = Speeds()
    assert speeds.of("a") == DEFAULTS
    assert set(speeds.sources("a").values()) == {Source.DEFAULT}
    assert speeds.token_bytes("m") is None


def test_a_zone_is_not_taken_for_a_rack_of_the_same_name() -> None:
    speeds = Speeds()
    speeds.observe("a", "eu/r1", measured(1e9), 0.0)
    speeds.observe("b", "r1/x", measured(9e9), 0.0)
    speeds.observe("new", "r1", None, 2.0)
    assert speeds.of("new")[NVME].bytes_per_s == 9e9


@pytest.mark.parametrize(
    ("latency_s", "bytes_per_s"),
    [(0.0, 1e30), (0.0, math.nan), (0.0, math.inf), (0.0, 0.0), (0.0, -1e9), (-1.0, 1e9), (math.nan, 1e9)],
)
def test_what_cannot_be_is_not_believed(latency_s: float, bytes_per_s: float) -> None:
    speeds = Speeds()
    speeds.observe("liar", "eu/r1", measured(bytes_per_s, latency_s), 0.0)
    speeds.observe("new", "eu/r1", None, 2.0)
    assert speeds.of("liar") == speeds.of("new") == DEFAULTS
    assert speeds.statistics().refused == 1


def test_one_liar_moves_no_median() -> None:
    speeds = Speeds()
    for number in range(9):
        speeds.observe(f"n{number}", "eu/r1", measured(1e9, spaces=[(SPACE, 9, 9 * 1600)]), 0.0)
    speeds.observe("liar", "eu/r1", measured(9e11, spaces=[(SPACE, 1 << 50, 1 << 60)]), 2.0)
    speeds.observe("new", "eu/r1", None, 4.0)
    assert speeds.of("new")[NVME].bytes_per_s == 1e9
    assert speeds.token_bytes("m") == 100


def test_what_is_not_heard_for_long_is_forgotten() -> None:
    speeds = Speeds()
    speeds.observe("gone", "eu/r1", measured(1e9, spaces=[(SPACE, 1, 1600)]), 0.0)
    speeds.observe("here", "eu/r1", None, KEPT_S)
    assert speeds.sources("here")[NVME] is Source.RACK
    speeds.observe("here", "eu/r1", None, KEPT_S + 1)
    assert speeds.of("gone") == speeds.of("here") == DEFAULTS
    assert speeds.token_bytes("m") is None


def test_a_token_has_the_bytes_of_all_groups_and_shards() -> None:
    speeds = Speeds()
    first, second = replace(SPACE, shard="0/2"), replace(SPACE, shard="1/2:1/2")
    window = replace(SPACE, group="1", block_tokens=32, shard="0/2")
    speeds.observe("a", "", having((first, 10, 16_000), (window, 5, 5 * 3200)), 0.0)
    speeds.observe("b", "", having((second, 30, 48_000)), 0.0)
    assert speeds.token_bytes("m") == 2 * 100 + 2 * 100
    assert speeds.token_bytes("other") is None


def test_of_two_kinds_of_blocks_that_of_most_nodes_counts() -> None:
    speeds = Speeds()
    small = replace(SPACE, dtype="fp8")
    speeds.observe("a", "", having((SPACE, 1000, 1600_000)), 0.0)
    for node in "bc":
        speeds.observe(node, "", having((small, 1, 800)), 0.0)
    assert speeds.token_bytes("m") == 50
    for node in "bc":
        speeds.observe(node, "", having((SPACE, 1, 1600)), 2.0)
    assert speeds.token_bytes("m") == 100


def test_salts_make_no_other_kind_of_block() -> None:
    speeds = Speeds()
    speeds.observe("a", "", having((replace(SPACE, salt="s"), 1, 1600), (SPACE, 3, 4800)), 0.0)
    assert speeds.token_bytes("m") == 100


_FIGURES = st.floats() | st.sampled_from([0.0, 1e-3, 1e9, 1e30])
_COUNTS = st.integers(-1, 1 << 63)


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.sampled_from("abcd"),
            st.sampled_from(["", "z", "z/r", "//", "z/r/x"]),
            st.dictionaries(st.sampled_from([*Medium, "tape"]), st.tuples(_FIGURES, _FIGURES), max_size=3),
            st.lists(
                st.tuples(st.sampled_from([SPACE.canonical, b"", b"{}", b"\xff" * 40_000]), _COUNTS, _COUNTS),
                max_size=3,
            ),
            st.floats(0, 400),
        ),
        max_size=12,
    )
)
def test_whatever_is_said_answers_are_whole_and_possible(
    said: list[tuple[str, str, dict[str, tuple[float, float]], list[tuple[bytes, int, int]], float]],
) -> None:
    speeds, now_s = Speeds(), 0.0
    for node, topology, figures, spaces, seconds in said:
        now_s += seconds
        speeds.observe(node, topology, Measures(figures, [SpaceMeasure(*one) for one in spaces]), now_s)
        for asked in "abcde":
            assert set(speeds.of(asked)) == set(DEFAULTS)
            for speed in speeds.of(asked).values():
                assert 0 <= speed.latency_s <= 10
                assert 1e3 <= speed.bytes_per_s <= 1e12
        token_bytes = speeds.token_bytes("m")
        assert token_bytes is None or 0 < token_bytes < math.inf
