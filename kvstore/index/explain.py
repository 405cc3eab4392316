"""An engine's estimate in words, for people who wonder why a prompt went there. Pure."""

from typing import Final

from kvstore.index.chooser import Choice

# Slowness worth a line.
_NOTABLE: Final = 0.05


def explain(choice: Choice, best: Choice | None = None) -> list[str]:
    """The reasons for an engine's rank: what its time goes to, then how that compares to the best one's."""
    found = choice.estimate
    computed = choice.prompt_tokens - found.load_tokens
    own = min(max(choice.placement.gpu, choice.expected), found.load_tokens)
    reasons = []
    if found.wait_s > 0:
        ahead = (
            f" for {choice.ahead} prompts" if choice.ahead > 1 else " for a prompt" if choice.ahead else ""
        )
        reasons.append(f"waits {_ms(found.wait_s)}{ahead}")
    if own:
        soon = " or will soon" if choice.expected > choice.placement.gpu else ""
        reasons.append(f"has {own:,} tokens in its own cache{soon}")
    if found.medium is not None:
        loaded = found.load_tokens - own
        reasons.append(f"loads {loaded:,} tokens from {found.medium} in {_ms(found.load_s)}")
    reasons.append(f"computes {computed:,} tokens in {_ms(found.recompute_s)}")
    there = max(choice.placement.remote, choice.expected) - found.load_tokens
    if there > 0:
        reasons.append(f"computes {there:,} of them sooner than it could load them")
    if abs(choice.slowness - 1) >= _NOTABLE:
        pace = "slower" if choice.slowness > 1 else "faster"
        reasons.append(f"computes {100 * abs(choice.slowness - 1):.0f} % {pace} than configured")
    if best is not None and best.placement.engine != choice.placement.engine:
        reasons.append(_against(choice, best))
    return reasons


def _against(choice: Choice, best: Choice) -> str:
    later = choice.estimate.ttft_s - best.estimate.ttft_s
    if later <= 0:
        return f"{_ms(-later)} sooner than {best.placement.engine}, for more work"
    if best.estimate.ttft_s <= 0:
        return f"{_ms(later)} later than {best.placement.engine}"
    return f"{100 * later / best.estimate.ttft_s:.0f} % later than {best.placement.engine}"


def _ms(seconds: float) -> str:
    milliseconds = 1e3 * seconds
    return f"{milliseconds:,.0f} ms" if milliseconds >= 10 else f"{milliseconds:.1f} ms"
