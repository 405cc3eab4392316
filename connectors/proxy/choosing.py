"""Which engine gets a request: as the index says, or else the least loaded. It sends no request on."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from connectors.proxy.ask import Ask
from connectors.proxy.engine import Engine
from connectors.proxy.fleet import Fleet, least_loaded
from connectors.proxy.index import Index, Outcome, Question, Why
from connectors.proxy.metrics import Metrics
from connectors.proxy.token_ids import TokenIds
from connectors.proxy.tokens import Tokenizer, about


class Reason(StrEnum):
    """What an engine was chosen for: something of the prompt that it has, what the index expects of it
    otherwise, or its load."""

    PREFIX = "prefix"
    ESTIMATE = "estimate"
    LEAST_LOADED = "least-loaded"


@dataclass(frozen=True, slots=True)
class Choice:
    """An engine for a request of about so many tokens, and its data-parallel rank where the index names one.

    `id` is what the index calls the choice, where it is to hear what became of it.
    """

    engine: Engine
    tokens: int
    reason: Reason
    rank: str = ""
    id: str | None = None


class Chooser:
    """Chooses among the engines of one duty."""

    def __init__(
        self,
        fleet: Fleet,
        index: Index | None,
        tokenizer: Tokenizer,
        adapters: Mapping[str, str],
        metrics: Metrics,
    ) -> None:
        """`adapters` are models that are LoRA adapters, beside those that engines say are."""
        self.fleet = fleet
        self._index = index
        self._tokenizer = tokenizer
        self._adapters = adapters
        self._metrics = metrics

    async def choose(self, ask: Ask, tried: Collection[Engine]) -> Choice | None:
        """The best engine of those not tried, or None where there is none left."""
        candidates = self.fleet.candidates(ask.model, tried)
        if not candidates:
            return None
        choice = await self._known(ask, candidates)
        if isinstance(choice, Why):
            self._metrics.fallback(choice)
            choice = Choice(least_loaded(candidates), about(ask), Reason.LEAST_LOADED)
        self._metrics.choice(choice.engine.name, choice.reason)
        return choice

    def report(
        self,
        choice: Choice,
        *,
        ttft_s: float | None = None,
        cached_tokens: int | None = None,
        failed: bool = False,
    ) -> None:
        """Tell the index what became of a choice that it has made: the first token came after `ttft_s`,
        or when nobody saw it, or never will."""
        if self._index is not None and choice.id is not None:
            name = f"{choice.engine.name}#{choice.rank}" if choice.rank else choice.engine.name
            ttft_ms = None if ttft_s is None else round(ttft_s * 1000, 3)
            ended = ttft_s is None and not failed
            self._index.outcome(Outcome(choice.id, name, ttft_ms, cached_tokens, failed, ended))

    async def _known(self, ask: Ask, candidates: Sequence[Engine]) -> Choice | Why:
        """What the index says, or why it says nothing."""
        if self._index is None:
            return Why.OFF
        tokens = await self._tokenizer.tokens_of(ask, candidates)
        if tokens is None:
            return Why.TOKENS
        found = await self._index.lookup(self._question(ask, tokens), candidates)
        if isinstance(found, Why):
            return found
        for placement in found.placements:
            engine = self.fleet.named(placement.engine)
            if engine is not None and engine in candidates:
                reason = Reason.PREFIX if placement.remote or placement.expected else Reason.ESTIMATE
                _, _, rank = placement.engine.partition("#")
                return Choice(engine, tokens.count, reason, rank, found.id)
        return Why.UNKNOWN

    def _question(self, ask: Ask, tokens: TokenIds) -> Question:
        base = self._adapters.get(ask.model) or self.fleet.parent(ask.model)
        model, lora = (base, ask.model) if base else (ask.model, "")
        return Question(model, tokens.json, ask.salt, lora)
