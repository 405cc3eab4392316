"""A prompt's token ids as the JSON that they come in: counted, and never made into numbers. Pure."""

from dataclasses import dataclass
from typing import Final

import msgspec

# The index looks for no longer prompts.
TOKENS_MAX: Final = 1 << 20
_NUMBERS: Final = b"0123456789 \t\r\n"


@dataclass(frozen=True, slots=True)
class TokenIds:
    """A list of numbers; which of them are ids is for the index to say."""

    json: msgspec.Raw
    count: int


def token_ids_in(raw: msgspec.Raw) -> TokenIds | None:
    """The ids of valid JSON that is a list of them, or of such lists: then those of the first. None: it is
    none, or too long."""
    text = bytes(raw)
    end = text.find(b"]") + 1
    begin = text.rfind(b"[", 0, end)
    if begin < 0 or text[:begin].strip() not in (b"", b"["):
        return None
    ids = text[begin:end]
    commas = ids.translate(None, _NUMBERS)[1:-1]
    if len(commas) >= TOKENS_MAX or commas.strip(b",") or not ids[1:-1].strip():
        return None
    return TokenIds(msgspec.Raw(ids), len(commas) + 1)
