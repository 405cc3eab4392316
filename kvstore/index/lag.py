"""How late what a daemon says gets here, by the clocks of both machines. Pure."""

from typing import Final

from kvstore.statistics import Latencies

_LAG_MAX_S: Final = 3600.0


class Lag:
    """`now_s` is that of the last message, `events` those of all events."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.events = Latencies()

    def happened(self, at_s: float, wall_s: float) -> None:
        """Events of then are here."""
        self.beat(at_s, wall_s)
        self.events.observe(self.now_s)

    def beat(self, at_s: float, wall_s: float) -> None:
        """A message of then, which tells of nothing new, is here; within reason, since clocks differ."""
        self.now_s = max(0.0, min(wall_s - at_s, _LAG_MAX_S))
