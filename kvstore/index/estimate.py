"""How soon an engine could give the first token of a prompt, from what it has and how fast it is. Pure.

A prompt waits for what the engine was given before; then leading blocks are loaded, and the rest is computed.
Nothing is loaded that is computed sooner. Only ends of media need trying: loading takes the same time for
every token of a medium and computing more for each later one, so the best split is never within a medium.
All media are asked at once and share the way into the engine, so their latencies overlap and their bytes add
up; computing begins when all is loaded. Who overlaps more is faster than this, which shows in outcomes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from kvstore.block import Medium

MEDIA: Final = tuple(Medium)  # fastest first, as in Placement
_LOADED: Final = MEDIA[1:]


@dataclass(frozen=True, slots=True)
class Speed:
    """How a medium is read into an engine of one node."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, nbytes: float) -> float:
        """The time for so many bytes at once."""
        return self.latency_s + nbytes / self.bytes_per_s


class Prefill(msgspec.Struct, frozen=True, gc=False):
    """How an engine computes: a step's own time, each token's, and each pair of tokens' in attention."""

    base_s: float
    token_s: float
    pair_s: float

    def seconds(self, computed: float, cached: float) -> float:
        """The time for so many tokens behind so many that are there."""
        pairs = computed * (cached + computed / 2)
        return self.base_s + self.token_s * computed + self.pair_s * pairs

    def slowed(self, times: float) -> "Prefill":
        """That of an engine that takes so many times as long."""
        return Prefill(self.base_s * times, self.token_s * times, self.pair_s * times)


class Estimate(msgspec.Struct, frozen=True, gc=False):
    """Of one engine for one prompt.

    `load_tokens` are had without computing, from the engine's own cache or loaded; `medium` is the slowest
    that is loaded from, None where nothing is. `ttft_s` is the sum of the three times before it, and
    `score_s`, least of the best engine, is that with what others will wait for it.
    """

    wait_s: float
    load_s: float
    recompute_s: float
    ttft_s: float
    load_tokens: int
    medium: Medium | None
    score_s: float


class Split(msgspec.Struct, frozen=True, gc=False):
    """A prompt between loading and computing, on an engine that is free; as in Estimate. `work_s` is both."""

    load_s: float
    recompute_s: float
    work_s: float
    load_tokens: int
    medium: Medium | None

    def after(self, wait_s: float, price: float) -> Estimate:
        """The estimate for an engine that is free in `wait_s`.

        The prompt's work delays who comes before the engine is idle again: `price` prompts a second do so,
        all of them while it is waiting, half of them, on average, while it is served.
        """
        ttft_s = wait_s + self.work_s
        others_s = price * self.work_s * (wait_s + self.work_s / 2)
        return Estimate(
            wait_s,
            self.load_s,
            self.recompute_s,
            ttft_s,
            self.load_tokens,
            self.medium,
            ttft_s + others_s,
        )


def estimate(
    prompt_tokens: int,
    tokens: Sequence[int],
    *,
    token_bytes: float,
    speeds: Mapping[Medium, Speed],
    prefill: Prefill,
    wait_s: float,
    price: float,
) -> Estimate:
    """The best split of a prompt, on an engine that is free in `wait_s`; `price` is as in `Split.after`."""
    best = split(prompt_tokens, tokens, token_bytes=token_bytes, speeds=speeds, prefill=prefill)
    return best.after(wait_s, price)


def split(
    prompt_tokens: int,
    tokens: Sequence[int],
    *,
    token_bytes: float,
    speeds: Mapping[Medium, Speed],
    prefill: Prefill,
) -> Split:
    """The best split of a prompt between loading and computing.

    `tokens` are leading tokens, cumulative, one number for each of MEDIA; a medium without a speed is not
    read.
    """
    cached = load_tokens = min(tokens[0], prompt_tokens)
    recompute_s = prefill.seconds(prompt_tokens - cached, cached)
    least_s, load_s = recompute_s, 0.0
    slowest: Medium | None = None
    latency_s = bytes_s = 0.0
    for medium, tier_tokens in zip(_LOADED, tokens[1:], strict=True):
        if tier_tokens <= cached or cached == prompt_tokens:
            continue
        speed = speeds.get(medium)
        if speed is None:
            continue
        reach = min(tier_tokens, prompt_tokens)
        latency_s = max(latency_s, speed.latency_s)
        bytes_s += (reach - cached) * token_bytes / speed.bytes_per_s
        cached = reach
        loading_s = latency_s + bytes_s
        if loading_s < least_s:
            computed_s = prefill.seconds(prompt_tokens - cached, cached)
            if loading_s + computed_s < least_s:
                least_s, load_s, recompute_s = loading_s + computed_s, loading_s, computed_s
                load_tokens, slowest = cached, medium
    return Split(load_s, recompute_s, least_s, load_tokens, slowest)
