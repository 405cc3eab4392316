"""When what fails is left alone, and when it is asked again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.node.breaker import FAILURES_MAX, PROBE_FIRST_S, PROBE_LAST_S, SUCCESSES_MIN, WATCH_S, Breaker


def test_it_begins_closed_and_is_looked_at_now_and_then() -> None:
    breaker = Breaker()
    assert (breaker.open, breaker.opened) == (False, 0)
    assert breaker.pause_s(0.0) == breaker.pause_s(1.0) == WATCH_S


def test_failures_in_a_row_open_it_once() -> None:
    breaker = Breaker()
    assert [breaker.failed() for _ in range(FAILURES_MAX + 2)] == [False, False, True, False, False]
    assert (breaker.open, breaker.opened) == (True, 1)


def test_a_success_in_between_begins_the_count_anew() -> None:
    breaker = Breaker()
    for _ in range(10):
        assert not any(breaker.failed() for _ in range(FAILURES_MAX - 1))
        breaker.succeeded()
    assert not breaker.open


def test_a_late_call_opens_it_at_once() -> None:
    breaker = Breaker()
    assert breaker.trip()
    assert not breaker.trip(), "it is open already"
    assert (breaker.open, breaker.opened) == (True, 1)


def test_only_a_probe_closes_it() -> None:
    breaker = Breaker()
    breaker.trip()
    breaker.succeeded()
    assert breaker.open
    assert not breaker.probed(well=False)
    assert breaker.open
    assert breaker.probed(well=True)
    assert not breaker.open
    assert not breaker.probed(well=True), "it is closed already"


def test_closed_again_it_takes_as_many_failures_as_before() -> None:
    breaker = Breaker()
    for times in (1, 2):
        assert [breaker.failed() for _ in range(FAILURES_MAX)] == [False, False, True]
        assert breaker.opened == times
        assert breaker.probed(well=True)


def test_probes_come_ever_more_rarely() -> None:
    breaker = Breaker()
    breaker.trip()
    pauses = []
    for _ in range(30):
        pauses.append(breaker.pause_s(1.0))
        breaker.probed(well=False)
    assert pauses[0] == PROBE_FIRST_S
    assert pauses == sorted(pauses)
    assert pauses[-1] == PROBE_LAST_S


@pytest.mark.parametrize(
    ("successes", "pause_s"), [(SUCCESSES_MIN - 1, PROBE_LAST_S), (SUCCESSES_MIN, PROBE_FIRST_S)]
)
def test_after_enough_successes_it_is_probed_as_at_first(successes: int, pause_s: float) -> None:
    breaker = Breaker()
    for _ in range(10):
        breaker.trip()
        breaker.probed(well=True)
    for _ in range(successes):
        breaker.succeeded()
    breaker.trip()
    assert breaker.pause_s(1.0) == pause_s


@given(probes=st.integers(0, 2000), chance=st.floats(0, 1))
def test_chance_spreads_probes_over_half_of_the_pause(probes: int, chance: float) -> None:
    breaker = Breaker()
    breaker.trip()
    for _ in range(probes):
        breaker.probed(well=False)
    longest = breaker.pause_s(1.0)
    assert longest / 2 <= breaker.pause_s(chance) <= longest <= PROBE_LAST_S


@given(st.lists(st.sampled_from(["failed", "succeeded", "trip", "well", "ill"])))
def test_it_is_open_after_a_trip_or_failures_in_a_row_until_a_probe_goes_well(events: list[str]) -> None:
    breaker = Breaker()
    is_open, in_a_row, opened = False, 0, 0
    for event in events:
        before = is_open
        if event == "failed":
            in_a_row += 1
            is_open = is_open or in_a_row >= FAILURES_MAX
            assert breaker.failed() == (is_open and not before)
        elif event == "succeeded":
            in_a_row = 0
            breaker.succeeded()
        elif event == "trip":
            is_open = True
            assert breaker.trip() == (not before)
        else:
            closes = event == "well" and is_open
            assert breaker.probed(well=event == "well") == closes
            if closes:
                is_open, in_a_row = False, 0
        opened += is_open and not before
        assert (breaker.open, breaker.opened) == (is_open, opened)
