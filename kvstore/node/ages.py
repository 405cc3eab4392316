"""How long ago a numbered request was, without a clock at every request. Pure: the clock is an argument."""

from bisect import bisect_right
from collections import deque
from typing import Final

_SAMPLES_MAX: Final = 4096


class Ages:
    """Remembers at which request number each second began, for the last hour or so."""

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=_SAMPLES_MAX)
        self._stamps: deque[int] = deque(maxlen=_SAMPLES_MAX)

    def sample(self, now_s: float, stamp: int) -> None:
        """The latest request has this number now."""
        if not self._stamps or stamp > self._stamps[-1]:
            self._times.append(now_s)
            self._stamps.append(stamp)

    def age_s(self, now_s: float, stamp: int) -> float:
        """How long ago the request was; at least, where it is older than what is remembered."""
        if not self._stamps:
            return 0.0
        return now_s - self._times[max(0, bisect_right(self._stamps, stamp) - 1)]
