"""Whether what is known of an engine counts in answers, and how old it is. Pure: its owner says what happens.

It is left out where its publisher is away for long, and at once where another process may have taken its
place, until that is clear.
"""

import math
from typing import Final

from kvstore.index.locality import Locality

# Without a connection for so long, the engine is left out of answers.
DEAD_AFTER_S: Final = 3.0


class Standing:
    """Of what answers under `name`."""

    def __init__(self, locality: Locality, name: str) -> None:
        self.muted = False
        self._locality = locality
        self._name = name
        self._lost_s: float | None = None
        self._current_s = -math.inf

    def current(self, now_s: float) -> None:
        """Nothing is missing, or in doubt."""
        self._current_s = now_s

    def age_s(self, now_s: float) -> float:
        """How long ago that was; infinite for never."""
        return now_s - self._current_s

    def lost(self, now_s: float) -> None:
        """Its publisher is away."""
        if self._lost_s is None:
            self._lost_s = now_s

    def tick(self, now_s: float) -> None:
        """Time has passed."""
        if self._lost_s is not None and now_s - self._lost_s >= DEAD_AFTER_S:
            self.doubt()

    def doubt(self) -> None:
        """Leave it out."""
        if not self.muted:
            self.muted = True
            self._locality.mute(self._name)

    def trust(self) -> None:
        """Its publisher is there, and the same."""
        self._lost_s = None
        if self.muted:
            self.muted = False
            self._locality.unmute(self._name)
