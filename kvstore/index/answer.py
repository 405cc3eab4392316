"""What one lookup finds: an answer for each engine, and what routing goes on with. Values only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvstore.block import Namespace
from kvstore.index.keytable import Key
from kvstore.index.placement import Engine, Placement
from kvstore.index.query import Query


@dataclass(frozen=True, slots=True)
class Answer:
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


@dataclass(frozen=True, slots=True)
class Located:
    """The answers in no order, and the prompt's keys in the namespaces that were looked in."""

    answers: Sequence[Answer]
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
