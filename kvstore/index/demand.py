"""How many prompts come, and how busy they keep engines: what an engine's work costs others. Pure.

An engine that is given more work delays all who come to it before it is idle again. By the theory of queues
that is, in seconds of waiting, the work times what is waiting there times the rate of arrivals at one engine,
divided by the part of its time that is idle. A part of that is charged, for those who come can go elsewhere.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

# Fleets, which are engines that take each other's prompts: one a model.
FLEETS_MAX: Final = 1024
# Each arrival counts so much of the means.
_GAIN: Final = 0.01
# Beyond it the rate of arrivals is what engines can do, or the work is not known well.
_BUSY_MAX: Final = 0.95


@dataclass(slots=True)
class Fleet:
    """Means of the last hundred prompts."""

    last_s: float
    count: int = 0
    gap_s: float = 0.0
    work_s: float = 0.0

    def arrive(self, work_s: float, now_s: float) -> None:
        """One more prompt, of which the engine that is best for it has so much work."""
        gap_s = max(0.0, now_s - self.last_s)
        self.last_s = now_s
        self.count += 1
        gain = max(_GAIN, 1 / self.count)
        self.work_s += gain * (work_s - self.work_s)
        if self.count > 1:
            self.gap_s += max(_GAIN, 1 / (self.count - 1)) * (gap_s - self.gap_s)

    def price(self, engines: int) -> float:
        """Prompts a second that come to one of so many engines, by its idle part; 0 before there are some."""
        if self.gap_s <= 0 or self.work_s <= 0:
            return 0.0
        busy = min(self.work_s / (self.gap_s * engines), _BUSY_MAX)
        return busy / self.work_s / (1 - busy)


class Demand:
    """Fleets by their names; who was asked for longest ago is forgotten first."""

    def __init__(self) -> None:
        self._fleets: OrderedDict[str, Fleet] = OrderedDict()

    def of(self, name: str, now_s: float) -> Fleet:
        """A fleet, begun now if it is not known."""
        fleet = self._fleets.get(name)
        if fleet is None:
            fleet = self._fleets[name] = Fleet(now_s)
            if len(self._fleets) > FLEETS_MAX:
                self._fleets.popitem(last=False)
        self._fleets.move_to_end(name)
        return fleet
