"""How fast a tier gives blocks, as measured, to say when one would be here. Pure: times are the caller's."""

from typing import Final

# Weight of the latest call.
_WEIGHT: Final = 0.1
# A tier that is passed over cannot show that it has recovered: each time it is believed to be so much faster.
_HOPE: Final = 1.02


class Pace:
    """Bytes per second of one tier, all its calls together. It begins with a guess."""

    def __init__(self, bytes_per_s: float) -> None:
        self._guess = bytes_per_s
        self.bytes_per_s = bytes_per_s

    def observe(self, nbytes: int, seconds: float, calls: int) -> None:
        """A call has read `nbytes` within `seconds`, one of `calls` that were under way."""
        measured = nbytes * calls / max(seconds, 1e-6)
        self.bytes_per_s += _WEIGHT * (measured - self.bytes_per_s)

    def passed_over(self) -> None:
        """Another tier was expected to be faster."""
        self.bytes_per_s = min(self._guess, self.bytes_per_s * _HOPE) if self._slow else self.bytes_per_s

    def expected_s(self, nbytes: int) -> float:
        """How long so many bytes take, from the first to the last."""
        return nbytes / self.bytes_per_s

    @property
    def _slow(self) -> bool:
        return self.bytes_per_s < self._guess
