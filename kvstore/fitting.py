"""A line through what was measured lately: seconds against bytes, or any two numbers. Pure.

It keeps no points.
What is old counts less with each new point, so that a device that has become slower shows within some dozens.
A point far above the line counts as one at a bound: one stall is no new speed, and many of them are.
"""

from dataclasses import dataclass
from math import isfinite
from typing import Final

# Each point counts so much of what the one after it counts: about the last 100 matter.
_KEPT: Final = 0.98
# Points before a line is more than a guess.
_READY: Final = 8
# A point counts as one so many times above the line, at most.
_FAR: Final = 4.0
# Variance of x, in parts of its mean square, below which x is as good as constant, and no line shows.
_FLAT: Final = 1e-3


@dataclass(slots=True)
class LineFit:
    """Weighted least squares of y >= 0 against x >= 0, with slope and intercept >= 0."""

    count: int = 0
    _weight: float = 0.0
    _x: float = 0.0  # weighted means
    _y: float = 0.0
    _xx: float = 0.0
    _xy: float = 0.0

    def observe(self, x: float, y: float) -> None:
        """One more point; one that is negative, infinite or no number is left out."""
        if not (isfinite(x) and isfinite(y)) or x < 0 or y < 0:
            return
        if self.ready:
            y = min(y, _FAR * max(self.at(x), self._y))
        self.count += 1
        self._weight = _KEPT * self._weight + 1
        share = 1 / self._weight
        self._x += share * (x - self._x)
        self._y += share * (y - self._y)
        self._xx += share * (x * x - self._xx)
        self._xy += share * (x * y - self._xy)

    @property
    def ready(self) -> bool:
        """Whether there were points enough to believe it."""
        return self.count >= _READY

    @property
    def slope(self) -> float:
        """Of y by x; 0 before the first point. Where all x are about equal, y is taken for proportional."""
        if self._x <= 0:
            return 0.0
        variance = self._xx - self._x * self._x
        if variance <= _FLAT * self._xx:
            return self._y / self._x
        slope = (self._xy - self._x * self._y) / variance
        # With an intercept below 0 the best line goes through the origin.
        return max(0.0, min(slope, self._xy / self._xx))

    @property
    def intercept(self) -> float:
        """The line's y at x = 0."""
        return max(0.0, self._y - self.slope * self._x)

    def at(self, x: float) -> float:
        """The line's y at x."""
        return self.intercept + self.slope * x
