"""The feed: what a daemon tells our own indexes, and how. Messages and their limits; it opens no socket.

vLLM's event format (`kvstore.index.events`) has no place for a node, an epoch, a heartbeat or a snapshot, so
the feed is a socket of its own: the daemon's ROUTER, an index's DEALER, one msgpack message in each frame.

    index   Subscribe                                     again whenever it has missed something
    daemon  Hello, resumed                                it has all that followed, and sends it:
            Events, Events, ...
    daemon  Hello, not resumed                            it starts over:
            Part, Part, ..., End                          all it has, as of the Hello's seq
            Events, Events, ...                           what followed
    daemon  Heartbeat                                     every HEARTBEAT_S, after the Events that it counts
    index   Alive                                         every ALIVE_S, or the daemon forgets it
    index   Hold                                          keep blocks ready in DRAM for a while
    daemon  Held                                          how many are, or why it does not
    index   Unhold                                        they are needed no longer

Fields that a later release adds come last and have defaults: who does not know them passes them over.

`seq` numbers Events from 1 within an epoch, 0 is before the first. A message is whole or refused: unknown
versions and kinds end the subscription and nothing else.
"""

from typing import Final, TypeVar

import msgspec

from kvstore.block import Medium
from kvstore.errors import ProtocolError

VERSION: Final = 1
HEARTBEAT_S: Final = 0.5
ALIVE_S: Final = 2.0
# A subscriber that has said nothing for so long is forgotten.
SUBSCRIBER_S: Final = 10.0
# Of one frame: a Part or Events of 4,096 keys of 64 bytes with as many parents is 0.6 MB.
FRAME_BYTES_MAX: Final = 8 << 20
KEYS_MAX: Final = 4096
# How often a Heartbeat has measures.
MEASURES_S: Final = 4.0
# What subscribers say; a Hold has KEYS_MAX keys of 64 bytes, and a namespace.
SAID_BYTES_MAX: Final = 4096
HOLD_BYTES_MAX: Final = 320 << 10
# Namespaces in Measures.
SPACES_MAX: Final = 64
_NAME_CHARS_MAX: Final = 256
_ENGINES_MAX: Final = 1024
# The parent of a block that starts a prompt.
ROOT: Final = b""


class Stored(msgspec.Struct, frozen=True, array_like=True, tag="s", gc=False):
    """Blocks that can be read in a medium from now on.

    `namespace` is its canonical form. With `parent` None it is of no key known which one precedes it.
    Otherwise the keys follow each other, and the first of them follows `parent`, which is ROOT where it
    starts a prompt.
    """

    namespace: bytes
    medium: Medium
    parent: bytes | None
    keys: list[bytes]


class Removed(msgspec.Struct, frozen=True, array_like=True, tag="r", gc=False):
    """Blocks that can be read in a medium no longer."""

    namespace: bytes
    medium: Medium
    keys: list[bytes]


class Digest(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a medium holds: how many blocks, and the sum of their keys' CRC-32 modulo 2**64."""

    blocks: int
    crc_sum: int


class Subscribe(msgspec.Struct, frozen=True, array_like=True, tag="subscribe"):
    """Send what followed `seq` of `epoch`, or all there is: None has nothing yet."""

    version: int
    epoch: int | None = None
    seq: int | None = None


class Alive(msgspec.Struct, frozen=True, array_like=True, tag="alive"):
    """The index is still there."""


class Hold(msgspec.Struct, frozen=True, array_like=True, tag="hold"):
    """Keep these blocks in DRAM for `ttl_s`, and load what of them is below; only to who `takes_holds`.

    `id` is the index's own, and new in each.
    """

    id: int
    namespace: bytes
    keys: list[bytes]
    ttl_s: float


class Unhold(msgspec.Struct, frozen=True, array_like=True, tag="unhold"):
    """What was asked for under this id may go again."""

    id: int


class Held(msgspec.Struct, frozen=True, array_like=True, tag="held"):
    """What became of a Hold, in blocks: kept now, on their way, and nowhere; or why it is refused."""

    id: int
    pinned: int = 0
    loading: int = 0
    missing: int = 0
    refused: str = ""


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="hello"):
    """Who the daemon is, and the seq that what follows begins after.

    `engines` are the addresses of the engines that use it, as routers know them. `topology` is where it is,
    as "zone/rack". Who does not say that it `takes_holds` is to be sent none: an earlier release might end
    the connection for the length of it.
    """

    version: int
    node: str
    epoch: int
    seq: int
    resumed: bool
    engines: list[str]
    topology: str = ""
    takes_holds: bool = False


class Events(msgspec.Struct, frozen=True, array_like=True, tag="events"):
    """What happened, in its order. `at_s` is the daemon's wall clock when the first of it happened."""

    seq: int
    at_s: float
    events: list[Stored | Removed]


class Part(msgspec.Struct, frozen=True, array_like=True, tag="part"):
    """A piece of a snapshot."""

    stored: list[Stored]


class End(msgspec.Struct, frozen=True, array_like=True, tag="end"):
    """The snapshot is complete; `digests` are of what it held."""

    seq: int
    digests: dict[Medium, Digest]


class SpaceMeasure(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a daemon has of a namespace, salts left out, in its fullest medium."""

    namespace: bytes
    blocks: int
    block_bytes: int


class Measures(msgspec.Struct, frozen=True, array_like=True):
    """What a daemon has measured: of each medium seconds and bytes per second, and how large blocks are.

    Reading n bytes from a medium takes the seconds, and n by the bytes per second.
    """

    speeds: dict[str, tuple[float, float]]
    spaces: list[SpaceMeasure]


class Heartbeat(msgspec.Struct, frozen=True, array_like=True, tag="heartbeat"):
    """The daemon is there, `seq` was its last Events, and this is what it has after them.

    `at_s` is its wall clock: it tells the lag where nothing happens. `measures` come every MEASURES_S.
    """

    epoch: int
    seq: int
    at_s: float
    digests: dict[Medium, Digest]
    measures: Measures | None = None


ToDaemon = Subscribe | Alive | Hold | Unhold
ToIndex = Hello | Events | Part | End | Heartbeat | Held
_Message = TypeVar("_Message")

_Decoder = msgspec.msgpack.Decoder
_encoder: Final = msgspec.msgpack.Encoder()
_to_daemon: "Final[_Decoder[ToDaemon]]" = _Decoder(ToDaemon)
_to_index: "Final[_Decoder[ToIndex]]" = _Decoder(ToIndex)


def encode(message: ToDaemon | ToIndex) -> bytes:
    """The frame of a message."""
    return _encoder.encode(message)


def decode_to_daemon(frame: bytes) -> ToDaemon:
    """The message of a frame from an index.

    Raises:
        ProtocolError: it is none, or longer than a frame may be.
    """
    return _decoded(_to_daemon, frame)


def decode_to_index(frame: bytes) -> ToIndex:
    """The message of a frame from a daemon.

    Raises:
        ProtocolError: it is none, or longer than a frame may be.
    """
    return _decoded(_to_index, frame)


def check_hello(hello: Hello) -> None:
    """Raise ProtocolError unless it is of this version, and its names are some."""
    if hello.version != VERSION:
        raise ProtocolError(f"feed: version {hello.version}; this index speaks {VERSION}")
    lengths = [len(name) for name in (hello.node, *hello.engines)]
    longest = max(*lengths, len(hello.topology))
    if not 0 < min(lengths) <= longest <= _NAME_CHARS_MAX or len(lengths) > _ENGINES_MAX:
        raise ProtocolError(
            f"feed: {len(lengths)} names of {min(lengths)} to {longest} characters; "
            f"give {_ENGINES_MAX} at most, of 1 to {_NAME_CHARS_MAX}"
        )


def _decoded(decoder: "_Decoder[_Message]", frame: bytes) -> _Message:
    if len(frame) > FRAME_BYTES_MAX:
        raise ProtocolError(f"feed: a frame of {len(frame)} bytes; the limit is {FRAME_BYTES_MAX}")
    try:
        return decoder.decode(frame)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError) as exc:
        raise ProtocolError(f"feed: {len(frame)} bytes that are no message: {exc}") from exc
