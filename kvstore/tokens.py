"""Token ids as the bytes that hashes are made of: numbers of 32 bits, CBOR. Nothing is hashed here."""

from array import array
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Final

from kvstore.errors import InvalidRequest

TOKEN_MAX: Final = (1 << 32) - 1
# Encoded at once: 1 ms, in which other threads wait.
_CBOR_TOKENS: Final = 1 << 14


def token_array(tokens: Sequence[int]) -> "array[int]":
    """Return the tokens as 32-bit numbers.

    Raises:
        InvalidRequest: one of them is none.
    """
    if isinstance(tokens, array) and tokens.typecode == "I":
        return tokens
    try:
        return array("I", tokens if isinstance(tokens, list) else list(tokens))
    except (OverflowError, TypeError):
        for position, token in enumerate(tokens):
            if not hasattr(token, "__index__") or not 0 <= token <= TOKEN_MAX:
                raise InvalidRequest(
                    f"token {position} is {token!r:.40}; give token ids from 0 to {TOKEN_MAX}"
                ) from None
        raise


def cbor_chunks(ids: "array[int]", chunk_tokens: int) -> Iterator[bytes]:
    """Return the tokens of each complete chunk in canonical CBOR, many of them encoded at once."""
    many = max(1, _CBOR_TOKENS // chunk_tokens) * chunk_tokens
    for start in range(0, len(ids), many):
        yield from _cbor_chunks(ids[start : start + many], chunk_tokens)


def _cbor_chunks(ids: "array[int]", chunk_tokens: int) -> Iterator[bytes]:
    import numpy as np

    values = np.asarray(ids)
    # A number is a head of one byte (itself below 24) and then 0, 1, 2 or 4 bytes. So a row of 5 bytes is the
    # head and the whole number, of which only the last `length` bytes are kept.
    length = (values >= 24).astype(np.uint8) + (values >= 1 << 8) + 2 * (values >= 1 << 16).astype(np.uint8)
    heads = np.array([0, 24, 25, 0, 26], np.uint8)
    rows = np.empty((len(values), 5), np.uint8)
    rows[:, 0] = np.where(length == 0, values, heads.take(length))
    rows[:, 1:] = values.astype(">u4").view(np.uint8).reshape(-1, 4)
    column = np.arange(5)
    kept = (column == 0) | (column > 4 - column[:, None])
    data = rows[kept.take(length, axis=0)].tobytes()
    ends = np.cumsum(length + 1, dtype=np.int64)[chunk_tokens - 1 :: chunk_tokens].tolist()
    return (data[start:end] for start, end in pairwise([0, *ends]))


def cbor(value: object) -> bytes:
    """Return None, a number of 64 bits, bytes, a string or a tuple of such in canonical CBOR."""
    match value:
        case None:
            return b"\xf6"
        case int():
            return cbor_head(0, value) if value >= 0 else cbor_head(1, -1 - value)
        case bytes():
            return cbor_head(2, len(value)) + value
        case str():
            text = value.encode(errors="surrogatepass")
            return cbor_head(3, len(text)) + text
        case tuple():
            return cbor_head(4, len(value)) + b"".join(map(cbor, value))
    raise InvalidRequest(f"{value!r:.40} is a {type(value).__name__}; give numbers, bytes, strings or tuples")


def cbor_head(major: int, value: int) -> bytes:
    """Return what a value of CBOR begins with: its major type, and its length or itself."""
    if value < 24:
        return bytes([major << 5 | value])
    power = next(power for power in range(4) if value < 1 << (8 << power))
    return bytes([major << 5 | 24 + power]) + value.to_bytes(1 << power, "big")
