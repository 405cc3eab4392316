"""A circuit breaker: whether what fails is asked again. Pure: clock and randomness are the caller's.

closed -> open      after some failures in a row, or at once when a call was late
open   -> closed    when a probe succeeded; probes come ever more rarely
"""

from typing import Final

# A single failure may be one bad sector; a tier that fails three times in a row fails.
FAILURES_MAX: Final = 3
PROBE_FIRST_S: Final = 0.5
PROBE_LAST_S: Final = 5.0
# So many calls must go well before a tier that fails again is probed as often as one that never failed.
SUCCESSES_MIN: Final = 32
WATCH_S: Final = 1.0


class Breaker:
    """Counts failures and says when it has had enough. It begins closed."""

    def __init__(self) -> None:
        self.open = False
        self.opened = 0  # how often, since start
        self._failures = 0
        self._successes = 0
        self._probes = 0

    def succeeded(self) -> None:
        """A call went well."""
        self._failures = 0
        self._successes += 1
        if self._successes >= SUCCESSES_MIN:
            self._probes = 0

    def failed(self) -> bool:
        """A call failed; whether that opened the breaker."""
        self._failures += 1
        return self._failures >= FAILURES_MAX and self.trip()

    def trip(self) -> bool:
        """Open at once; whether it was closed."""
        if self.open:
            return False
        self.open = True
        self.opened += 1
        self._successes = 0
        return True

    def probed(self, *, well: bool) -> bool:
        """A probe has ended; whether that closed the breaker."""
        self._probes += 1
        if not well or not self.open:
            return False
        self.open = False
        self._failures = 0
        return True

    def pause_s(self, chance: float) -> float:
        """How long to wait before the next look; `chance` is 0 to 1 and spreads those of many nodes."""
        if not self.open:
            return WATCH_S
        longest = min(PROBE_LAST_S, PROBE_FIRST_S * 2.0 ** min(self._probes, 10))
        return longest * (0.5 + chance / 2)
