"""The vocabulary as types: namespaces, keys, media, hit lengths. No behaviour beyond checking them."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from functools import cached_property
from typing import Final

import msgspec

from kvstore.errors import InvalidRequest

KEY_BYTES_MAX: Final = 64
# A field longer than this is a mistake (a path, a prompt), not a name.
NAMESPACE_FIELD_CHARS_MAX: Final = 512
NAMESPACE_ID_BYTES: Final = 16
# RANK/WORLD, and where ranks of a node are counted apart :LOCAL_RANK/LOCAL_WORLD.
SHARD: Final = re.compile(r"(\d{1,9})/(\d{1,9})(?::(\d{1,9})/(\d{1,9}))?", re.ASCII)


class Medium(StrEnum):
    """What a tier is made of, fastest first."""

    GPU = "gpu"
    DRAM = "dram"
    NVME = "nvme"
    REMOTE = "remote"


@dataclass(frozen=True)
class Namespace:
    """Everything that makes two blocks interchangeable. Only `model` is required.

    Two clients share blocks if and only if all fields are equal, so whatever changes the bytes of a
    block (or who may see them) belongs here: `layout` names the order of the block's dimensions,
    `group` its KV-cache group, `shard` "rank/world" of the slice it holds, `salt` the tenant, and
    `scheme` how keys are made from tokens. Namespaces equal but for `shard` form one set.

    Raises:
        InvalidRequest: a field is empty where it may not be, too long, or of the wrong type.
    """

    model: str
    block_tokens: int = 256
    dtype: str = ""
    layout: str = ""
    group: str = "0"
    shard: str = "0/1"
    salt: str = ""
    scheme: str = ""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "block_tokens":
                if not isinstance(value, int) or not 1 <= value <= 1 << 20:
                    raise InvalidRequest(
                        f"namespace block_tokens is {value!r:.40}; give 1 to {1 << 20} tokens"
                    )
            elif not isinstance(value, str) or len(value) > NAMESPACE_FIELD_CHARS_MAX:
                raise InvalidRequest(
                    f"namespace {field.name} is {str(value)[:40]!r}; give a string of at most "
                    f"{NAMESPACE_FIELD_CHARS_MAX} characters"
                )
        if not self.model:
            raise InvalidRequest("namespace model is empty; give the model's name")
        object.__setattr__(self, "_hash", hash(tuple(getattr(self, field.name) for field in fields(self))))

    def __hash__(self) -> int:
        # Kept, since every request of a client looks its namespace up.
        return self._hash  # type: ignore[attr-defined, no-any-return]

    @cached_property
    def canonical(self) -> bytes:
        """The fields as JSON, the same in every process and release. `from_canonical` undoes it."""
        return msgspec.json.encode(asdict(self), order="sorted")

    @classmethod
    def from_canonical(cls, canonical: bytes) -> "Namespace":
        """The namespace of a canonical form.

        Raises:
            InvalidRequest: it is none.
        """
        try:
            return msgspec.json.decode(canonical, type=cls)
        except (msgspec.DecodeError, msgspec.ValidationError) as exc:
            raise InvalidRequest(f"namespace {canonical[:80]!r} is no canonical form: {exc}") from exc

    @cached_property
    def id(self) -> bytes:
        """The digest of the canonical form: 16 bytes."""
        return hashlib.blake2b(self.canonical, digest_size=NAMESPACE_ID_BYTES).digest()

    @cached_property
    def rank_and_world(self) -> tuple[int, int]:
        """Which of how many shards it holds; (0, 1) where `shard` does not say."""
        match = SHARD.fullmatch(self.shard)
        rank, world = (int(match[1]), int(match[2])) if match else (0, 1)
        return (rank, world) if rank < world else (0, 1)

    def __str__(self) -> str:
        return f"{self.model}[{self.id.hex()[:8]}]"


@dataclass(frozen=True, slots=True)
class HitLength:
    """Leading keys found, cumulative: `dram` counts what is in gpu or dram, and so on.

    So gpu <= dram <= nvme <= remote. `remote` is as last known; the others are the truth of now.
    """

    gpu: int = 0
    dram: int = 0
    nvme: int = 0
    remote: int = 0


def check_keys(keys: Iterable[bytes]) -> None:
    """Raise InvalidRequest unless every key is 1 to 64 bytes."""
    for key in keys:
        if not isinstance(key, bytes):
            raise InvalidRequest(f"key {key!r:.60} is a {type(key).__name__}; give bytes")
        if not 1 <= len(key) <= KEY_BYTES_MAX:
            raise InvalidRequest(f"key of {len(key)} bytes; give 1 to {KEY_BYTES_MAX} bytes")
