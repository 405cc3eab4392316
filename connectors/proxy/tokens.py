"""The token ids of prompts: as given, remembered, or asked of an engine.

Where they cannot be had in time there are none, and after a few times nobody waits for them for a while.
"""

import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any, Final

import msgspec

from connectors.proxy.answer import EngineFailed
from connectors.proxy.ask import Ask
from connectors.proxy.engine import Engine
from connectors.proxy.engines import Engines
from connectors.proxy.fleet import least_loaded
from connectors.proxy.pause import Pause
from kvstore.tokens import TOKEN_MAX

# Lists of numbers take 8 to 36 bytes a token.
_REMEMBERED_TOKENS: Final = 1 << 20
_BYTES_PER_TOKEN: Final = 4
_BAD_PROMPT: Final = (400, 401, 403, 413, 422)


class Tokenizer:
    """Remembers the prompts of late: conversations ask for the same prompt when they are repeated."""

    def __init__(self, engines: Engines, deadline_s: float) -> None:
        self._engines = engines
        self._deadline_s = deadline_s
        self._pause = Pause()
        self._remembered: OrderedDict[bytes, list[int]] = OrderedDict()
        self._remembered_tokens = 0

    async def tokens_of(self, ask: Ask, candidates: Sequence[Engine]) -> list[int] | None:
        """The prompt's, or None where they cannot be had within the deadline."""
        if ask.tokens is not None:
            return ask.tokens
        question = ask.question
        if question is None:
            return None
        body = msgspec.json.encode({"model": ask.model, **question})
        digest = blake2b(body, digest_size=16).digest()
        if digest in self._remembered:
            self._remembered.move_to_end(digest)
            return self._remembered[digest]
        tokens = await self._asked(least_loaded(candidates), body, ask.headers)
        if tokens is not None:
            self._remember(digest, tokens)
        return tokens

    async def _asked(self, engine: Engine, body: bytes, headers: Mapping[str, str]) -> list[int] | None:
        if not self._pause.asks(time.monotonic()):
            return None
        try:
            answer = await self._engines.question(engine, "/tokenize", headers, self._deadline_s, body)
        except EngineFailed as exc:
            # A prompt that is none says nothing of the next one.
            if exc.refusal is None or exc.refusal.status not in _BAD_PROMPT:
                self._pause.failed(time.monotonic())
            return None
        self._pause.succeeded()
        return _tokens(answer)

    def _remember(self, digest: bytes, tokens: list[int]) -> None:
        if digest in self._remembered:
            return
        self._remembered[digest] = tokens
        self._remembered_tokens += len(tokens)
        while self._remembered_tokens > _REMEMBERED_TOKENS:
            _, oldest = self._remembered.popitem(last=False)
            self._remembered_tokens -= len(oldest)


def about(ask: Ask) -> int:
    """How many tokens a request has, where that is all that is known of them."""
    return len(ask.raw) // _BYTES_PER_TOKEN


def _tokens(answer: Any) -> list[int] | None:
    tokens = answer.get("tokens") if isinstance(answer, dict) else None
    if isinstance(tokens, list) and tokens and isinstance(tokens[0], list):
        tokens = tokens[0]
    if not isinstance(tokens, list) or not tokens:
        return None
    return tokens if all(type(one) is int and 0 <= one <= TOKEN_MAX for one in tokens) else None
