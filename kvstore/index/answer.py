"""What one lookup finds: an answer for each engine, and what routing goes on with. Values only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from kvstore.block import Namespace
from kvstore.index.keytable import Key
from kvstore.index.placement import Engine, Placement
from kvstore.index.query import Query


class Answer(msgspec.Struct, frozen=True, gc=False):
    """What an engine has of a prompt, and how good that knowledge is.

    `age_s` is that of the oldest of what is known of the engine and its nodes, infinite where one of them was
    never heard; `epochs` are the lives of its nodes that are known. `incomplete` says that one of them has
    more than is known here: its events are lost, or it is over its limit.
    """

    engine: Engine
    placement: Placement
    age_s: float
    epochs: dict[str, int]
    incomplete: bool


class Freshness(msgspec.Struct, frozen=True, gc=False):
    """How good what is known of some nodes is, as in Answer; of no nodes, `age_s` is below all ages."""

    age_s: float
    epochs: dict[str, int]
    incomplete: bool


@dataclass(frozen=True, slots=True)
class Located:
    """What each engine has, in no order, and the prompt's keys in the namespaces that were looked in."""

    engines: Sequence[Engine]
    placements: Sequence[Placement]
    keys: Mapping[Namespace, Sequence[Key]]
    prompt_tokens: int


def prompt_tokens_of(query: Query, spaces: Sequence[Namespace]) -> int:
    """How long the prompt is; by keys it is as long as their blocks, of which the shortest count."""
    if query.tokens is not None:
        return len(query.tokens)
    known = query.fields.get("block_tokens") or min((space.block_tokens for space in spaces), default=None)
    return len(query.keys or ()) * (known or Namespace(query.model).block_tokens)


def best_first(answer: Answer) -> tuple[int, int, int, int, str]:
    """Most tokens in any medium, then most of them in the faster ones."""
    placement = answer.placement
    return -placement.remote, -placement.gpu, -placement.dram, -placement.nvme, placement.engine
