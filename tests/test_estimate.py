"""An estimate is the best there is between loading and computing, and more hits never make it worse."""

from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.block import Medium
from kvstore.index.estimate import MEDIA, Estimate, Prefill, Speed, estimate

PREFILL = Prefill(0.01, 4e-5, 7e-10)
SPEEDS = {Medium.DRAM: Speed(0.001, 25e9), Medium.NVME: Speed(0.003, 5e9), Medium.REMOTE: Speed(0.01, 2e9)}
TOKEN_BYTES = 327_680.0

prompts = st.integers(1, 200_000)
prefills = st.builds(Prefill, st.floats(0, 0.1), st.floats(1e-6, 1e-3), st.floats(0, 1e-8))
# Slower media are slower.
speeds = st.tuples(
    st.lists(st.floats(0, 0.1), min_size=3, max_size=3),
    st.lists(st.floats(1e8, 1e11), min_size=3, max_size=3),
).map(
    lambda pair: {
        medium: Speed(latency, rate)
        for medium, latency, rate in zip(
            MEDIA[1:], sorted(pair[0]), sorted(pair[1], reverse=True), strict=True
        )
    }
)


def cumulative(steps: list[int]) -> list[int]:
    return list(accumulate(steps))


hits = st.lists(st.integers(0, 50_000), min_size=4, max_size=4).map(cumulative)


def ask(
    prompt: int,
    tokens: list[int],
    speeds: dict[Medium, Speed] = SPEEDS,
    prefill: Prefill = PREFILL,
    wait_s: float = 0.0,
    price: float = 0.0,
) -> Estimate:
    return estimate(
        prompt, tokens, token_bytes=TOKEN_BYTES, speeds=speeds, prefill=prefill, wait_s=wait_s, price=price
    )


def seconds(
    prompt: int, tokens: list[int], split: int, speeds: dict[Medium, Speed], prefill: Prefill
) -> float:
    """The time if the first `split` tokens are had, and the rest is computed."""
    bounds = [0, *[min(reach, prompt, split) for reach in tokens]]
    loads = [
        (speeds[medium].latency_s, (end - begin) * TOKEN_BYTES / speeds[medium].bytes_per_s)
        for medium, begin, end in zip(MEDIA[1:], bounds[1:-1], bounds[2:], strict=True)
        if end > begin
    ]
    loading = max([latency for latency, _ in loads], default=0) + sum(moving for _, moving in loads)
    return loading + prefill.seconds(prompt - split, split)


@settings(max_examples=100)
@given(prompts, hits, speeds, prefills, st.floats(0, 1))
def test_no_other_split_is_sooner(
    prompt: int, tokens: list[int], speeds: dict[Medium, Speed], prefill: Prefill, share: float
) -> None:
    found = ask(prompt, tokens, speeds, prefill)
    least = min(tokens[0], prompt)
    within = least + int(share * (min(tokens[-1], prompt) - least))
    for split in {*[min(reach, prompt) for reach in tokens], within}:
        assert found.ttft_s <= seconds(prompt, tokens, split, speeds, prefill) * (1 + 1e-9)
    assert found.ttft_s == pytest.approx(seconds(prompt, tokens, found.load_tokens, speeds, prefill))


@settings(max_examples=100)
@given(prompts, hits, speeds, prefills, st.integers(0, 3), st.integers(0, 50_000))
def test_more_hits_never_make_it_later(
    prompt: int, tokens: list[int], speeds: dict[Medium, Speed], prefill: Prefill, place: int, more: int
) -> None:
    richer = list(tokens)
    richer[place] += more
    richer = list(accumulate(richer, max))
    better, worse = ask(prompt, richer, speeds, prefill), ask(prompt, tokens, speeds, prefill)
    assert better.ttft_s <= worse.ttft_s * (1 + 1e-9)


@settings(max_examples=50)
@given(prompts, hits, st.floats(0, 100), st.floats(0, 10))
def test_times_add_up(prompt: int, tokens: list[int], wait_s: float, price: float) -> None:
    found = ask(prompt, tokens, wait_s=wait_s, price=price)
    work_s = found.load_s + found.recompute_s
    assert min(found.wait_s, found.load_s, found.recompute_s) >= 0
    assert found.ttft_s == pytest.approx(wait_s + work_s)
    assert found.score_s == pytest.approx(found.ttft_s + price * work_s * (wait_s + work_s / 2))
    assert 0 <= found.load_tokens <= prompt


def test_what_is_in_the_gpu_costs_nothing() -> None:
    found = ask(1000, [600, 600, 600, 600])
    assert (found.load_tokens, found.load_s, found.medium) == (600, 0, None)


def test_a_slow_medium_is_left_alone() -> None:
    slow = {**SPEEDS, Medium.REMOTE: Speed(0.01, 1e8)}
    found = ask(8192, [0, 4096, 4096, 8192], slow)
    assert (found.load_tokens, found.medium) == (4096, Medium.DRAM)
    assert ask(8192, [0, 4096, 4096, 8192], {**SPEEDS, Medium.REMOTE: Speed(0, 1e11)}).load_tokens == 8192


def test_a_medium_without_a_speed_is_not_read() -> None:
    assert ask(8192, [0, 8192, 8192, 8192], {}).load_tokens == 0


def test_at_long_contexts_loading_pays_that_does_not_at_short_ones() -> None:
    speeds = {Medium.NVME: Speed(0.003, 6e9)}
    assert ask(4096, [0, 0, 4096, 4096], speeds).medium is None
    assert ask(120_000, [0, 0, 120_000, 120_000], speeds).medium is Medium.NVME


def test_more_hits_than_the_prompt_is_long_are_as_many() -> None:
    assert ask(100, [512] * 4) == ask(100, [100] * 4)


def test_work_costs_more_where_more_waits() -> None:
    free, busy = (ask(8192, [0] * 4, wait_s=wait_s, price=1.0) for wait_s in (0.0, 2.0))
    assert busy.score_s - busy.ttft_s > free.score_s - free.ttft_s > 0


def test_computing_takes_longer_behind_a_longer_context() -> None:
    assert PREFILL.seconds(512, 100_000) > PREFILL.seconds(512, 0)
    whole = PREFILL.seconds(4096, 0) + PREFILL.seconds(4096, 4096)
    assert whole - PREFILL.base_s == pytest.approx(PREFILL.seconds(8192, 0))
    assert Prefill(0.0, PREFILL.token_s, PREFILL.pair_s).seconds(0, 4096) == 0
