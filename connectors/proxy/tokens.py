"""The token ids of prompts: as given, remembered, or asked of an engine.

Where they cannot be had in time there are none, and after a few times nobody waits for them for a while.
"""

import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Final

import msgspec

from connectors.proxy.answer import EngineFailed
from connectors.proxy.ask import Ask
from connectors.proxy.engine import Engine
from connectors.proxy.engines import Engines
from connectors.proxy.fleet import least_loaded
from connectors.proxy.pause import Pause
from connectors.proxy.token_ids import TokenIds, token_ids_in

# As JSON they take up to 12 bytes each.
_REMEMBERED_TOKENS: Final = 1 << 22
_BYTES_PER_TOKEN: Final = 4
_BAD_PROMPT: Final = (400, 401, 403, 413, 422)


class _Tokenized(msgspec.Struct):
    tokens: msgspec.Raw = msgspec.Raw()


_decode: Final = msgspec.json.Decoder(_Tokenized).decode


class Tokenizer:
    """Remembers the prompts of late: conversations ask for the same prompt when they are repeated."""

    def __init__(self, engines: Engines, deadline_s: float) -> None:
        self._engines = engines
        self._deadline_s = deadline_s
        self._pause = Pause()
        self._remembered: OrderedDict[bytes, TokenIds] = OrderedDict()
        self._remembered_tokens = 0

    async def tokens_of(self, ask: Ask, candidates: Sequence[Engine]) -> TokenIds | None:
        """The prompt's, or None where they cannot be had within the deadline."""
        if ask.tokens is not None:
            return ask.tokens
        question = ask.question
        if question is None:
            return None
        digest = blake2b(question, digest_size=16).digest()
        if digest in self._remembered:
            self._remembered.move_to_end(digest)
            return self._remembered[digest]
        tokens = await self._asked(least_loaded(candidates), question, ask.headers)
        if tokens is not None:
            self._remember(digest, tokens)
        return tokens

    async def _asked(self, engine: Engine, body: bytes, headers: Mapping[str, str]) -> TokenIds | None:
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

    def _remember(self, digest: bytes, tokens: TokenIds) -> None:
        if digest in self._remembered:
            return
        self._remembered[digest] = tokens
        self._remembered_tokens += tokens.count
        while self._remembered_tokens > _REMEMBERED_TOKENS:
            _, oldest = self._remembered.popitem(last=False)
            self._remembered_tokens -= oldest.count


def about(ask: Ask) -> int:
    """How many tokens a request has, where that is all that is known of them."""
    return len(ask.raw) // _BYTES_PER_TOKEN


def _tokens(answer: bytes) -> TokenIds | None:
    try:
        return token_ids_in(_decode(answer).tokens)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
