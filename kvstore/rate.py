"""How many requests a second each caller may make: a bucket of tokens for each. Pure; it refuses nobody."""

from typing import Final

# Seconds of its rate that a caller may ask for at once, after it was silent.
_BURST_S: Final = 2.0


class Rate:
    """Buckets that fill at `per_s` up to `burst`, one for each name; there are as many as names are known."""

    def __init__(self, per_s: float, burst: float | None = None) -> None:
        """Without a `burst` it is what comes together in two seconds; 0 a second is no limit."""
        self.per_s = per_s
        self.burst = max(1.0, per_s * _BURST_S if burst is None else burst)
        self._buckets: dict[str, tuple[float, float]] = {}

    def wait_s(self, name: str, now_s: float) -> float:
        """Take one from the bucket: 0.0, or in how many seconds there is one, where it is empty."""
        if not self.per_s:
            return 0.0
        left, then_s = self._buckets.get(name, (self.burst, now_s))
        left = min(self.burst, left + (now_s - then_s) * self.per_s)
        if left < 1.0:
            return (1.0 - left) / self.per_s
        self._buckets[name] = left - 1.0, now_s
        return 0.0
