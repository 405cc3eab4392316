"""How a block lies in a shared key-value store: parts under names of their own, and a header that names them.

The header says which bytes the block is, and is what makes it one: parts without a header are nobody's. All
names of one block have one hash tag, so that it lies on one shard, and blocks spread over all.
"""

import re
import secrets
from collections.abc import Iterator
from typing import Final

import msgspec

from kvstore.block import Namespace
from kvstore.errors import ConfigError

FORMAT: Final = 1
# Larger values are slower in Redis, both ways: replies to them are buffered whole (benchmarks redis).
PART_BYTES: Final = 2 << 20
NONCE_BYTES: Final = 12
_PARTS_MAX: Final = 1 << 16
_PREFIX: Final = re.compile(r"[A-Za-z0-9._:-]{1,64}")


class Header(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What stands under a block's name. `nonce` is its writer's, `checksum` xxh3_64 of all its bytes."""

    format: int
    namespace: Namespace
    key: bytes
    length: int
    checksum: int
    nonce: bytes
    part_bytes: int

    @property
    def parts(self) -> int:
        """How many there are, the last of them perhaps shorter."""
        return -(-self.length // self.part_bytes)

    def same_block(self, other: "Header") -> bool:
        """Whether both have the same bytes, whoever wrote them."""
        return (self.length, self.checksum) == (other.length, other.checksum)

    def pieces(self, memory: memoryview) -> Iterator[memoryview]:
        """The block's bytes in `memory`, part by part."""
        for start in range(0, self.length, self.part_bytes):
            yield memory[start : min(start + self.part_bytes, self.length)]


def new_header(namespace: Namespace, key: bytes, length: int, checksum: int) -> Header:
    """The header of a block that is about to be written, with a nonce that nobody else has."""
    return Header(FORMAT, namespace, key, length, checksum, secrets.token_bytes(NONCE_BYTES), PART_BYTES)


def encode_header(header: Header) -> bytes:
    """What stands under the block's name: the same bytes for equal headers."""
    return msgspec.msgpack.encode(header)


class NewerFormat(Exception):
    """The header is of a release that writes another format. It is that release's to delete."""


def decode_header(data: bytes, namespace_id: bytes, key: bytes) -> Header | None:
    """The header that was read under a block's name, or None where it is damaged or another block's.

    Raises:
        NewerFormat: this release does not know the format.
    """
    try:
        fields = msgspec.msgpack.decode(data)
        if isinstance(fields, list) and fields and isinstance(fields[0], int) and fields[0] != FORMAT:
            raise NewerFormat(f"format {fields[0]}; this release writes {FORMAT}")
        header = msgspec.msgpack.decode(data, type=Header)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    sound = (
        header.namespace.id == namespace_id
        and header.key == key
        and header.length > 0
        and 0 < header.part_bytes <= PART_BYTES
        and 0 <= header.checksum < 1 << 64
        and header.parts <= _PARTS_MAX
        and len(header.nonce) == NONCE_BYTES
    )
    return header if sound else None


class Names:
    """The names of blocks, all of them beginning with `prefix`.

    Raises:
        ConfigError: the prefix could be taken for more than that.
    """

    def __init__(self, prefix: str) -> None:
        if not _PREFIX.fullmatch(prefix):
            raise ConfigError(f"prefix is {prefix!r}; give 1 to 64 letters, digits, or . _ : -")
        self.prefix = prefix

    def header(self, namespace_id: bytes, key: bytes) -> str:
        """Of the header."""
        return f"{self.prefix}:{{{namespace_id.hex()}:{key.hex()}}}"

    def parts(self, header: Header) -> list[str]:
        """Of the parts, in their order."""
        name = f"{self.header(header.namespace.id, header.key)}:{header.nonce.hex()}"
        return [f"{name}:{number}" for number in range(header.parts)]
