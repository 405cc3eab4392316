"""What routers are told over HTTP, as types, and how those are made of what routing found."""

import math
from collections.abc import Iterable, Mapping
from typing import Annotated

import msgspec

from kvstore.index.chooser import Choice, Outcome
from kvstore.index.routing import Routed

_Tokens = Annotated[int, msgspec.Meta(ge=0, description="leading tokens of the prompt")]


class Estimated(msgspec.Struct, frozen=True, gc=False):
    """When an engine could give the first token, in milliseconds: `ttft_ms` is the sum of the three before.

    `load_tokens` are had without computing, from its own cache or loaded; `medium` is the slowest that is
    loaded from. Placements are in the order of `score_ms`, the time with the price of the work.
    """

    wait_ms: float
    load_ms: float
    recompute_ms: float
    ttft_ms: float
    load_tokens: _Tokens
    medium: str | None
    score_ms: float


class Placed(msgspec.Struct, frozen=True, omit_defaults=True):
    """What an engine need not compute, cumulative from gpu to remote, in tokens.

    `expected` will be in its GPU cache from prompts that were routed there. `age_ms` is the age of the oldest
    of what is known of it, in milliseconds, null where one of its publishers was never heard; `epochs` the
    lives of its nodes by their names. `incomplete`: it has more than is known here.
    """

    engine: str
    gpu: _Tokens
    dram: _Tokens
    nvme: _Tokens
    remote: _Tokens
    expected: _Tokens
    age_ms: float | None
    epochs: dict[str, int]
    incomplete: bool
    estimate: Estimated
    reasons: list[str] | None = None


class NodeHeld(msgspec.Struct, frozen=True):
    """Blocks of a reserve on one node: pinned in DRAM, on their way up, and not there after all."""

    pinned: int
    loading: int
    missing: int


class Held(msgspec.Struct, frozen=True):
    """A reserve at the engine that was chosen, for `expires_ms` milliseconds from now.

    `blocks` are in DRAM or will be. `problems` say in a sentence each what is not held, or is not known to
    be, and why.
    """

    engine: str
    nodes: dict[str, NodeHeld]
    blocks: int
    expires_ms: int
    problems: list[str]


class Placements(msgspec.Struct, frozen=True):
    """The answer to a lookup, best first. `id` is for the outcome, null where nothing was routed."""

    id: str | None
    prompt_tokens: int
    placements: list[Placed]
    reserved: Held | None


class Reported(msgspec.Struct, frozen=True):
    """What was predicted, and by how much later than that the first token came, both in milliseconds.

    `error_ms` is null where there is no time to compare: the prompt failed, went to another engine, or ended
    without a time.
    """

    predicted_ms: float
    error_ms: float | None


class Telling:
    """One answer, engines some at a time; estimates that several share are told of once."""

    def __init__(self, routed: Routed, *, explain: bool) -> None:
        self._routed = routed
        self._explain = explain
        self._placed: list[Placed] = []
        self._estimated: dict[int, Estimated] = {}

    def tell(self, places: Iterable[int]) -> None:
        """Add the engines at these places."""
        for place in places:
            self._placed.append(self._place(place))

    def placements(self, reserve_ms: int) -> Placements:
        """All that was added, and the reserve."""
        routed = self._routed
        return Placements(routed.id, routed.prompt_tokens, self._placed, _held(routed, reserve_ms))

    def _place(self, place: int) -> Placed:
        one = self._routed.ranked[place]
        answer, choice, had = one.answer, one.choice, one.answer.placement
        estimated = self._estimated.get(id(choice.estimate))
        if estimated is None:
            estimated = self._estimated[id(choice.estimate)] = _estimated(choice)
        return Placed(
            had.engine,
            had.gpu,
            had.dram,
            had.nvme,
            had.remote,
            choice.expected,
            None if answer.age_s == math.inf else int(answer.age_s * 10_000) / 10,
            answer.epochs,
            answer.incomplete,
            estimated,
            self._routed.reasons(place) if self._explain else None,
        )


def reported(outcome: Outcome) -> Reported:
    """An outcome."""
    error_s = outcome.error_s
    return Reported(_ms(outcome.predicted_s), None if error_s is None else _ms(error_s))


def _estimated(choice: Choice) -> Estimated:
    found = choice.estimate
    return Estimated(
        _ms(found.wait_s),
        _ms(found.load_s),
        _ms(found.recompute_s),
        _ms(found.ttft_s),
        found.load_tokens,
        found.medium,
        _ms(found.score_s),
    )


def _held(routed: Routed, reserve_ms: int) -> Held | None:
    reserved = routed.reserved
    if reserved is None:
        return None
    nodes: Mapping[str, NodeHeld] = {
        name: NodeHeld(node.pinned, node.loading, node.missing) for name, node in reserved.nodes.items()
    }
    return Held(
        routed.ranked[0].answer.engine.name, dict(nodes), reserved.blocks, reserve_ms, list(reserved.problems)
    )


def _ms(seconds: float) -> float:
    """Milliseconds with three digits; `round` takes four times as long."""
    return int(seconds * 1e6) / 1000
