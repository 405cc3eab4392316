"""How long ago a request was, from a sample a second."""

from bisect import bisect_right

from hypothesis import given
from hypothesis import strategies as st

from kvstore.node.ages import Ages


def test_without_a_sample_nothing_is_known() -> None:
    assert Ages().age_s(100.0, 5) == 0.0


def test_a_request_is_as_old_as_the_last_sample_before_it() -> None:
    ages = Ages()
    for second in range(10):
        ages.sample(float(second), 100 * second)
    assert ages.age_s(10.0, 0) == 10.0
    assert ages.age_s(10.0, 499) == 6.0
    assert ages.age_s(10.0, 500) == 5.0
    assert ages.age_s(10.0, 10_000) == 1.0


def test_seconds_without_requests_take_no_place() -> None:
    ages = Ages()
    ages.sample(0.0, 1)
    for second in range(1, 20_000):
        ages.sample(float(second), 2)
    assert ages.age_s(20_000.0, 1) == 20_000.0
    assert ages.age_s(20_000.0, 2) == 19_999.0


def test_what_is_older_than_all_that_is_remembered_is_at_least_that_old() -> None:
    ages = Ages()
    for second in range(100_000):
        ages.sample(float(second), second)
    remembered = ages.age_s(100_000.0, 0)
    assert 3600 <= remembered <= 2 * 3600
    assert ages.age_s(100_000.0, 99_000) == 1000.0


@given(
    steps=st.lists(st.tuples(st.floats(0.5, 3.0), st.integers(0, 50)), min_size=1, max_size=60),
    stamp=st.integers(0, 3000),
)
def test_an_age_is_right_to_within_the_time_between_samples(
    steps: list[tuple[float, int]], stamp: int
) -> None:
    ages = Ages()
    now, latest = 0.0, 0
    times: list[float] = []  # when each request was: all of a step at its beginning
    samples = [(0.0, 0)]
    for pause_s, requests in steps:
        times += [now] * requests
        now += pause_s
        latest += requests
        ages.sample(now, latest)
        samples.append((now, latest))
    if 1 <= stamp <= latest:
        true_age = now - times[stamp - 1]
        after = samples[bisect_right([number for _, number in samples], stamp - 1)]
        # Not older than by the pause before, and not younger than the sample that came after it.
        assert now - after[0] <= ages.age_s(now, stamp) <= max(true_age, now - samples[1][0])
