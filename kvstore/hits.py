"""What routers ask the index and what it answers, as values: questions, hits, packed keys. No connection."""

import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from kvstore.errors import InvalidRequest

MEDIA: Final = 4
NUMBER_BYTES: Final = 8
_DIGIT_TO_PLACES: Final = {
    f"{bits:x}": [place for place in range(MEDIA) if bits >> place & 1] for bits in range(1 << MEDIA)
}


@dataclass(frozen=True)
class Question:
    """What is asked, but for the prompt. `fields` are those of a namespace; `engines` None asks for all.

    Raises:
        InvalidRequest: a value cannot be sent.
    """

    model: str
    salt: str = ""
    lora: str = ""
    fields: tuple[tuple[str, str | int], ...] = ()
    engines: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        texts = [self.model, self.salt, self.lora, *(self.engines or ())]
        for name, value in self.fields:
            texts.append(name)
            if isinstance(value, str):
                texts.append(value)
            elif type(value) is not int or not -(1 << 63) <= value < 1 << 64:
                raise InvalidRequest(f"namespace {name!r} is {value!r:.40}; give a string, or 64 bits")
        try:
            "".join(texts).encode()
        except (TypeError, UnicodeEncodeError) as exc:
            raise InvalidRequest(f"model, salt, lora, engines or fields are no strings: {exc}") from exc


@dataclass(frozen=True, slots=True)
class EngineHits:
    """Leading tokens that an engine need not compute, cumulative: `dram` counts what is in gpu or dram."""

    engine: str
    gpu: int
    dram: int
    nvme: int
    remote: int


@dataclass(frozen=True, slots=True)
class Hits:
    """The engines that have something of a prompt, most first. `age_s` is that of the oldest knowledge."""

    engines: tuple[EngineHits, ...]
    age_s: float


@dataclass(frozen=True, slots=True)
class HitGroups:
    """The same as it comes: `groups` of (leading tokens, bits), most tokens first.

    Bit 4 * number + medium (gpu, dram, nvme, remote) is of the engine that has this number in `engines`, and
    is in one group: that of all that the engine has in the medium or a faster one.
    """

    groups: tuple[tuple[int, int], ...]
    engines: tuple[str, ...]
    age_s: float

    def hits(self) -> Hits:
        """Engine by engine."""
        number_to_tokens: dict[int, list[int]] = {}
        for tokens, bits in self.groups:
            first = ((bits & -bits).bit_length() - 1) // MEDIA
            for number, digit in enumerate(reversed(f"{bits >> MEDIA * first:x}"), first):  # one an engine
                for place in _DIGIT_TO_PLACES[digit]:
                    number_to_tokens.setdefault(number, [0] * MEDIA)[place] = tokens
        found = [EngineHits(self.engines[number], *had) for number, had in number_to_tokens.items()]
        found.sort(key=lambda one: (-one.remote, -one.gpu, -one.dram, -one.nvme, one.engine))
        return Hits(tuple(found), self.age_s)


def pack_keys(keys: Sequence[int] | Sequence[bytes]) -> tuple[bytes, int]:
    """Return keys end to end, as `IndexClient.find` takes them, and the width of each.

    Raises:
        InvalidRequest: they are neither numbers of 64 bits, signed or not, nor bytes of one length.
    """
    some: Sequence[Any] = keys
    if some and isinstance(some[0], bytes):
        width = len(some[0])
        with suppress(TypeError):
            if set(map(len, some)) == {width}:
                return b"".join(some), width
        raise InvalidRequest(
            f"keys that are not all of {width} bytes, as the first is; give one kind at a time"
        )
    for letter in "Qq":
        with suppress(struct.error):
            return struct.pack(f"<{len(some)}{letter}", *some), NUMBER_BYTES
    raise InvalidRequest("a key is no number of 64 bits; give all signed or all unsigned, or bytes")
