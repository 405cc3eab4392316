"""How lists travel in messages: keys end to end, numbers once where all are equal. And what is refused.

Both sides check by the same functions: the client so that the error comes at once and costs nothing, the
daemon because it trusts nothing.
"""

import struct
from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any, Final

from kvstore.block import KEY_BYTES_MAX
from kvstore.errors import InvalidRequest
from kvstore.protocol import KEYS_MAX, TOKENS_MAX, WAIT_S_MAX, Keys

# More than any arena holds; above it msgpack has no integers.
_LENGTH_MAX: Final = 1 << 60
_GROUP: Final = 32
_GROUPS: Final = [struct.Struct(f"{width}s" * _GROUP) for width in range(KEY_BYTES_MAX + 1)]


def pack_keys(keys: Sequence[bytes]) -> Keys:
    """Join keys.

    Raises:
        InvalidRequest: no keys, too many, or one that is not 1 to 64 bytes.
    """
    if not 1 <= len(keys) <= KEYS_MAX:
        raise InvalidRequest(f"{len(keys)} keys in one request; give 1 to {KEYS_MAX}")
    try:
        joined = b"".join(keys)
        widths = set(map(len, keys))
    except TypeError as exc:
        raise InvalidRequest(f"keys must be bytes: {exc}") from None
    for width in widths:
        if not 1 <= width <= KEY_BYTES_MAX:
            raise InvalidRequest(f"key of {width} bytes; give 1 to {KEY_BYTES_MAX} bytes")
    return Keys(joined, widths.pop() if len(widths) == 1 else list(map(len, keys)))


def unpack_keys(keys: Keys) -> list[bytes]:
    """Undo `pack_keys`, trusting nothing. Raises InvalidRequest as it does."""
    joined, widths = keys.joined, keys.widths
    if not isinstance(widths, int):
        return _unpack_mixed(joined, widths)
    if not 1 <= widths <= KEY_BYTES_MAX:
        raise InvalidRequest(f"key of {widths} bytes; give 1 to {KEY_BYTES_MAX} bytes")
    count, rest = divmod(len(joined), widths)
    if rest:
        raise InvalidRequest(f"{len(joined)} bytes of keys are no multiple of {widths} bytes a key")
    _check_count(count)
    if count < _GROUP:
        return [joined[start : start + widths] for start in range(0, len(joined), widths)]
    # Whole groups at once: a third of the time of slicing key by key.
    grouped = _GROUPS[widths].iter_unpack(memoryview(joined)[: count // _GROUP * _GROUP * widths])
    result = list(chain.from_iterable(grouped))
    result += [joined[start : start + widths] for start in range(len(result) * widths, len(joined), widths)]
    return result


def spread(value: int | list[int], count: int) -> Sequence[int]:
    """One number for each of `count`, from one for all or a list.

    Raises:
        InvalidRequest: the list has another length.
    """
    if isinstance(value, int):
        return [value] * count
    if len(value) != count:
        raise InvalidRequest(f"{len(value)} numbers for {count} keys; give one for all, or one each")
    return value


def gather(values: Sequence[int]) -> int | list[int]:
    """Undo `spread`: one number where all are equal."""
    if values and values.count(values[0]) == len(values):
        return values[0]
    return list(values)


def _unpack_mixed(joined: bytes, widths: list[int]) -> list[bytes]:
    _check_count(len(widths))
    for width in widths:
        if not 1 <= width <= KEY_BYTES_MAX:
            raise InvalidRequest(f"key of {width} bytes; give 1 to {KEY_BYTES_MAX} bytes")
    if sum(widths) != len(joined):
        raise InvalidRequest(f"{len(joined)} bytes of keys, but their lengths add up to {sum(widths)}")
    ends = list(accumulate(widths))
    return [joined[end - width : end] for end, width in zip(ends, widths, strict=True)]


def _check_count(count: int) -> None:
    if not 1 <= count <= KEYS_MAX:
        raise InvalidRequest(f"{count} keys in one request; give 1 to {KEYS_MAX}")


def check_lengths(lengths: Any, count: int) -> int | list[int]:
    """The lengths of `count` blocks as they travel.

    Raises:
        InvalidRequest: one is no whole number, or there are not as many as keys.
    """
    values = [lengths] if isinstance(lengths, int) else list(lengths)
    for value in values:
        # What the arena's capacity is, and so whether a number is too large, the daemon knows.
        if not isinstance(value, int) or abs(value) > _LENGTH_MAX:
            raise InvalidRequest(f"nbytes is {value!r}; give whole bytes, 1 to the arena's capacity")
    checked = values[0] if isinstance(lengths, int) else values
    spread(checked, count)
    return checked


def check_wait(wait_s: float) -> float:
    """Raise InvalidRequest unless the wait is 0 to an hour."""
    if not 0 <= wait_s <= WAIT_S_MAX:
        raise InvalidRequest(f"wait_s is {wait_s}; give 0 to {WAIT_S_MAX} seconds")
    return wait_s


def pack_tokens(tokens: Sequence[int] | None) -> bytes | None:
    """Token ids as u32, little endian.

    Raises:
        InvalidRequest: too many, or one that is no u32.
    """
    if tokens is None:
        return None
    if len(tokens) > TOKENS_MAX:
        raise InvalidRequest(f"{len(tokens)} tokens in one request; the limit is {TOKENS_MAX}")
    try:
        return struct.pack(f"<{len(tokens)}I", *tokens)
    except struct.error as exc:
        raise InvalidRequest(f"token ids must be 0 to 4294967295: {exc}") from None
