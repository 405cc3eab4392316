"""What a publisher is to be asked, and when: what followed, or all there is, less often each time in vain.

Pure: it knows no message and no socket.
"""

import math
from typing import Final

# How long to wait for an answer, the first time, the second, and from then on; and for more of one.
_PATIENCE_S: Final = (0.5, 1.0, 2.0)


class Inquiry:
    """Open as long as something is to be asked or answered; at first that is `everything`."""

    def __init__(self, now_s: float) -> None:
        self.everything = True
        self._open = True
        self._at_s = now_s
        self._asked_s = -math.inf
        self._in_vain = 0

    @property
    def is_open(self) -> bool:
        """Whether something is to be asked, or its answer awaited."""
        return self._open

    def is_due(self, now_s: float) -> bool:
        """Whether to ask now."""
        return self._open and now_s >= self._at_s

    def open(self, now_s: float, *, everything: bool = False) -> None:
        """Something is missing, or all of it wrong: ask as soon as what was asked before has had its time."""
        self.everything |= everything
        soon_s = max(now_s, self._asked_s + self._patience_s)
        self._at_s = min(self._at_s, soon_s) if self._open else soon_s
        self._open = True

    def repeat(self, at_s: float) -> None:
        """Ask again then, whatever was asked."""
        self._at_s = at_s
        self._open = True

    def go_on(self, now_s: float) -> None:
        """A piece of the answer has come; the next must come soon."""
        self.repeat(now_s + _PATIENCE_S[-1])

    def asked(self, now_s: float) -> None:
        """It has been sent."""
        self._in_vain += 1
        self._asked_s = now_s
        self._at_s = now_s + self._patience_s

    def answered(self) -> None:
        """Nothing is missing, as far as one can see."""
        self._open = self.everything = False

    def forgive(self) -> None:
        """The publisher has proved that its answers help: the next question need not wait."""
        self._in_vain = 0

    @property
    def _patience_s(self) -> float:
        return _PATIENCE_S[min(self._in_vain, len(_PATIENCE_S)) - 1] if self._in_vain else 0.0
