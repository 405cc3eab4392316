"""Leaving alone what fails. Pure: the clock is the caller's."""

from typing import Final

_FAILURES_MAX: Final = 3
PAUSE_S: Final = 1.0


class Pause:
    """After some failures in a row nothing is asked for a while; then one request tries."""

    def __init__(self) -> None:
        self._failures = 0
        self._until_s = 0.0

    def asks(self, now_s: float) -> bool:
        """Whether to ask now. Who is told so while it failed before is the one that tries."""
        if self._failures < _FAILURES_MAX:
            return True
        if now_s < self._until_s:
            return False
        self._until_s = now_s + PAUSE_S
        return True

    def succeeded(self) -> None:
        """It answered."""
        self._failures = 0

    def failed(self, now_s: float) -> None:
        """It did not."""
        self._failures += 1
        self._until_s = now_s + PAUSE_S
