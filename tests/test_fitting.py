"""A line is found through what was measured, follows changes, and is not moved far by one odd point."""

from math import inf, nan

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.fitting import LineFit

positive = st.floats(1e-6, 1e3)


def fit(points: list[tuple[float, float]]) -> LineFit:
    line = LineFit()
    for x, y in points:
        line.observe(x, y)
    return line


@settings(max_examples=50)
@given(positive, positive, st.lists(st.integers(1, 1000), min_size=10, max_size=60, unique=True))
def test_points_on_a_line_give_that_line(intercept: float, slope: float, xs: list[int]) -> None:
    line = fit([(x, intercept + slope * x) for x in xs])
    assert line.ready
    for x in (min(xs), max(xs)):
        assert line.at(x) == pytest.approx(intercept + slope * x, rel=1e-3)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.floats(0, 1e12), st.floats(0, 1e6)), max_size=40))
def test_neither_slope_nor_intercept_is_ever_negative(points: list[tuple[float, float]]) -> None:
    line = fit(points)
    assert line.slope >= 0
    assert line.intercept >= 0


def test_a_device_that_has_become_slower_shows() -> None:
    sizes = [1e6 * (1 + number % 10) for number in range(200)]
    line = fit([(x, 0.001 + x / 5e9) for x in sizes] + [(x, 0.002 + x / 1e9) for x in sizes])
    assert line.slope == pytest.approx(1e-9, rel=0.1)
    assert line.intercept == pytest.approx(0.002, rel=0.3)


def test_one_stall_is_no_new_speed() -> None:
    points = [(1e6 * (1 + number % 10), 0.001 * (1 + number % 10)) for number in range(100)]
    line = fit([*points, (1e6, 1e9)])
    assert line.at(5e6) < 1.5 * fit(points).at(5e6)


def test_equal_sizes_are_taken_for_proportional() -> None:
    line = fit([(100.0, 2.0)] * 20)
    assert line.slope == pytest.approx(0.02)
    assert line.at(100) == pytest.approx(2.0)


def test_what_is_no_time_is_left_out() -> None:
    line = fit([(1, nan), (inf, 1), (-1, 1), (1, -1), (nan, nan)])
    assert line.count == 0
    assert not line.ready
    assert line.at(5) == 0
