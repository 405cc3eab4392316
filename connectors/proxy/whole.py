"""What a router reads in an answer that came in one piece. Pure, and lenient: other answers say nothing."""

from typing import Any, Final

import msgspec


class Details(msgspec.Struct):
    """Of the prompt's tokens."""

    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    """Of an answer's tokens."""

    completion_tokens: int | None = None
    prompt_tokens_details: Details | None = None


class Whole(msgspec.Struct):
    """An answer; `kv_transfer_params` say where the prompt's KV is, to whom they mean something."""

    usage: Usage | None = None
    kv_transfer_params: dict[str, Any] | None = None

    @property
    def is_first_token(self) -> bool:
        """Whether the first token was all that was waited for."""
        return self.usage is not None and self.usage.completion_tokens == 1

    @property
    def cached_tokens(self) -> int | None:
        """How many of the prompt's tokens the engine had not to compute, where it says."""
        details = None if self.usage is None else self.usage.prompt_tokens_details
        return None if details is None else details.cached_tokens


_decode: Final = msgspec.json.Decoder(Whole).decode


def whole_of(body: bytes) -> Whole:
    """What a body says."""
    try:
        return _decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return Whole()
