"""How fast engines are meant to be: as configured, and as the daemons near them have measured. Pure.

What nobody has configured or measured is that of a model of 8 billion parameters in 16 bits on a GPU with
312 TFLOP/s, half of which it gets: 16 GFLOP a token are 0.1 ms, 524 kFLOP a pair of tokens (four times the
hidden size, in each of 32 layers) 3.4 ns, and reading the weights once at 2 TB/s takes 8 ms a step.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from kvstore.block import Medium
from kvstore.index.chooser import Traits
from kvstore.index.estimate import Prefill, Speed
from kvstore.index.placement import Engine
from kvstore.index.speeds import Speeds

STEP_S: Final = 0.008
PREFILL_TOKENS_S: Final = 10_000.0
PREFILL_PAIR_NS: Final = 3.4
# Keys and values of 8 heads with 128 numbers of 16 bits, in 32 layers.
TOKEN_BYTES: Final = 131_072.0


@dataclass(frozen=True, slots=True)
class Pace:
    """What is configured of an engine; `token_bytes` None is as daemons measure."""

    prefill: Prefill
    token_bytes: float | None = None


DEFAULT: Final = Pace(Prefill(STEP_S, 1 / PREFILL_TOKENS_S, PREFILL_PAIR_NS * 1e-9))


class Paces:
    """Gives the traits of engines; `others` is for those that are not configured by name."""

    def __init__(
        self, speeds: Speeds, engines: Mapping[str, Pace] | None = None, others: Pace = DEFAULT
    ) -> None:
        self._speeds = speeds
        # Equal ones are one: what is estimated of one engine holds for others that have the same.
        paces = {others: others}
        self._engines = {name: paces.setdefault(pace, pace) for name, pace in (engines or {}).items()}
        self._others = others

    def of(self, model: str) -> Callable[[Engine], Traits]:
        """Says those of engines that serve a model, as they are now; a rank has those of its engine."""
        measured = self._speeds.token_bytes(model) or TOKEN_BYTES
        alike: dict[tuple[int, tuple[str, ...]], Traits] = {}

        def traits_of(engine: Engine) -> Traits:
            pace = self._pace(engine.name) if self._engines else self._others
            traits = alike.get((id(pace), engine.nodes))
            if traits is None:
                traits = Traits(pace.token_bytes or measured, self._near(engine.nodes), pace.prefill)
                alike[id(pace), engine.nodes] = traits
            return traits

        return traits_of

    def _pace(self, name: str) -> Pace:
        return self._engines.get(name) or self._engines.get(name.partition("#")[0], self._others)

    def _near(self, nodes: tuple[str, ...]) -> Mapping[Medium, Speed]:
        """Of several nodes, which read their shards together, the slowest counts, medium by medium."""
        if len(nodes) < 2:
            return self._speeds.of(nodes[0] if nodes else "")
        several = [self._speeds.of(node) for node in nodes]
        return {medium: max((each[medium] for each in several), key=_slowness) for medium in several[0]}


def _slowness(speed: Speed) -> float:
    """The time for a prompt's blocks, some hundred megabytes."""
    return speed.seconds(256e6)
