"""The messages between client and daemon: their shapes, their frames and their limits. No sockets.

A frame is a header of 16 bytes (body length u32, request id u32, payload length u64, little endian), a
msgpack body holding one message, and the payload: bytes of blocks, on connections that share no memory.
Answers carry the id of their request and come in any order. Request id 0 asks for no answer.

A connection begins with `Hello`, answered by `Welcome`, or by `Challenge` where a token is wanted.
"""

import hmac
import struct
from collections.abc import Callable
from functools import cache
from typing import Annotated, Final

import msgspec

from kvstore.block import Namespace
from kvstore.errors import KVStoreError, ProtocolError
from kvstore.statistics import NodeStatistics

# Another major version is refused. A minor version adds messages or fields at the end.
MAJOR: Final = 2
MINOR: Final = 0

HEADER: Final = struct.Struct("<IIQ")
# Keys of one request; a prompt of 1M tokens is 4,096 blocks of 256. Reserving so many takes some 15 ms, for
# which the event loop does nothing else.
KEYS_MAX: Final = 4096
# A body holds at most KEYS_MAX keys of 64 bytes, their lengths and their token ids.
BODY_BYTES_MAX: Final = 16 << 20
# Before a connection is welcome it may only send a Hello, with the leases it still uses, and a Proof.
HELLO_BYTES_MAX: Final = 1 << 20
# Namespaces that the daemon keeps for a connection, those used last; more than a request can name. Salts make
# namespaces, so one engine may use many: this bounds what they cost to some 70 MB.
NAMESPACES_MAX: Final = 65_536
LIST_PAGE_MAX: Final = KEYS_MAX
WAIT_S_MAX: Final = 3600.0
# Token ids of one reserve: 8 MiB of them.
TOKENS_MAX: Final = 2 << 20


class Message(msgspec.Struct, array_like=True):
    """Base of all messages; they travel as arrays, the tag first."""


class Keys(Message):
    """Keys joined end to end. `widths` is the length of each: one number where all are equal."""

    joined: bytes
    widths: int | list[int]


class Slots(Message):
    """Where blocks lie: arena, offset and length, each one number where all are equal."""

    arenas: int | list[int]
    offsets: list[int]
    lengths: int | list[int]


# Requests.


class Hello(Message, tag=1):
    """The first message. `resume` names the sessions this client lost, `held` the leases it still uses."""

    major: int
    minor: int
    nonce: bytes
    name: str = ""
    resume: list[bytes] = []
    held: list[int] = []


class Proof(Message, tag=2):
    """The answer to a challenge: that the client knows the token."""

    proof: bytes


class OpenArena(Message, tag=3):
    """Send me the arena's descriptor, read-only or writable. Answered with it as ancillary data."""

    arena: int
    writable: bool


class OpenNamespaces(Message, tag=4):
    """Name namespaces once, each with its id; `Opened.handles` stand for them on this connection."""

    ids: Annotated[list[bytes], msgspec.Meta(max_length=KEYS_MAX)]
    namespaces: list[Namespace]


class Reserve(Message, tag=5):
    namespace: int
    keys: Keys
    lengths: int | list[int]
    parent: bytes | None = None
    tokens: bytes | None = None
    wait_s: float = 0.0


class ReserveEach(Message, tag=19):
    """Keys of several namespaces, in no order: `namespaces` has a handle for each key."""

    namespaces: list[int]
    keys: Keys
    lengths: int | list[int]
    wait_s: float = 0.0


class Commit(Message, tag=6):
    """Seal all granted keys or those at `indices`. Where no memory is shared, the payload is their bytes."""

    lease: int
    indices: Annotated[list[int], msgspec.Meta(max_length=KEYS_MAX)] | None = None


class Abort(Message, tag=7):
    lease: int


class Acquire(Message, tag=8):
    namespace: int
    keys: Keys
    wait_s: float = 0.0


class AcquireEach(Message, tag=9):
    """Keys of several namespaces: `namespaces` has a handle for each key."""

    namespaces: list[int]
    keys: Keys
    wait_s: float = 0.0


class Release(Message, tag=10):
    leases: Annotated[list[int], msgspec.Meta(max_length=KEYS_MAX)]


class HitLengthOf(Message, tag=11):
    namespace: int
    keys: Keys


class HitEach(Message, tag=12):
    namespaces: list[int]
    keys: Keys


class Remove(Message, tag=13):
    """Hide blocks now; answered at once unless it is to be `lasting`, when it is."""

    namespace: int
    keys: Keys
    lasting: bool = True


class ListKeys(Message, tag=14):
    """A page of at most `limit` keys; 0 for as many as a page may have."""

    namespace: int
    after: int = 0
    limit: int = 0


class GetStatistics(Message, tag=15):
    pass


class Check(Message, tag=16):
    pass


class Verify(Message, tag=17):
    """Compare some blocks of a tier (by its place in the statistics) with their checksums; begin after 0."""

    tier: int
    after: int


class ListNamespaces(Message, tag=18):
    """A page of the namespaces that have blocks, in the order of their ids, behind the id `after`."""

    after: bytes = b""


class Goodbye(Message, tag=20):
    """The client ends all its leases, and those whose answers it did not wait for."""


# Answers.


class Failure(Message, tag=100):
    """The request changed nothing. `code` names a child of KVStoreError."""

    code: str
    text: str


class Challenge(Message, tag=101):
    """Prove that you know the token; `proof` shows that the daemon does."""

    nonce: bytes
    proof: bytes


class Welcome(Message, tag=102):
    """The connection stands. `session` is a secret, to be given as `Hello.resume` after a loss.

    `arena_bytes` has the size of each arena; it is empty where no memory is shared. A client may pin and
    reserve so many bytes at once.
    """

    major: int
    minor: int
    node: str
    epoch: int
    session: bytes
    arena_bytes: list[int]
    pinned_bytes_max: int
    reserved_bytes_max: int
    keys_max: int = KEYS_MAX


class Opened(Message, tag=103):
    handles: list[int]


class Granted(Message, tag=104):
    """`status` has a letter a key: g(ranted), p(resent), b(usy), r(efused). No lease is 0."""

    lease: int
    status: bytes
    slots: Slots


class Acquired(Message, tag=105):
    """`found` has a byte a key where holes are allowed, else it is empty. No lease is 0.

    Where no memory is shared, the payload is the blocks' bytes and nothing stays pinned.
    """

    lease: int
    slots: Slots
    limited: bool = False
    found: bytes = b""


class Hits(Message, tag=106):
    gpu: int
    dram: int
    nvme: int
    remote: int


class Found(Message, tag=107):
    """A byte for each item: here or not; and the lengths in bytes of those that are."""

    found: bytes
    lengths: int | list[int] = []


class Count(Message, tag=108):
    count: int


class Page(Message, tag=109):
    """Keys and lengths of blocks; `after` is for the next page, 0 when this was the last."""

    keys: Keys
    lengths: list[int]
    after: int


class Statistics(Message, tag=110):
    statistics: NodeStatistics


class Report(Message, tag=111):
    """What a check found wrong; nothing is well."""

    wrong: list[str]


class Done(Message, tag=112):
    pass


class Verified(Message, tag=113):
    """How many blocks were looked at, which were damaged, and `after` for more; 0 after the last."""

    blocks: int
    damaged: list[str]
    after: int


class NamespacePage(Message, tag=114):
    """Namespaces, with their blocks and bytes in the medium that has most; `after` is for the next page."""

    namespaces: list[Namespace]
    blocks: list[int]
    block_bytes: list[int]
    after: bytes


Request = (
    Hello
    | Proof
    | OpenArena
    | OpenNamespaces
    | Reserve
    | ReserveEach
    | Commit
    | Abort
    | Acquire
    | AcquireEach
    | Release
    | HitLengthOf
    | HitEach
    | Remove
    | ListKeys
    | GetStatistics
    | Check
    | Verify
    | ListNamespaces
    | Goodbye
)
Answer = (
    Failure
    | Challenge
    | Welcome
    | Opened
    | Granted
    | Acquired
    | Hits
    | Found
    | Count
    | Page
    | Statistics
    | Report
    | Done
    | Verified
    | NamespacePage
)

_encode = msgspec.msgpack.Encoder().encode
_decode_request: Callable[[bytes | memoryview], Request] = msgspec.msgpack.Decoder(Request).decode
_decode_answer: Callable[[bytes | memoryview], Answer] = msgspec.msgpack.Decoder(Answer).decode


def frame(request_id: int, message: Request | Answer, payload_bytes: int = 0) -> bytes:
    """Header and body; the payload is sent after them."""
    body = _encode(message)
    return HEADER.pack(len(body), request_id, payload_bytes) + body


def decode_request(body: bytes | memoryview) -> Request:
    """Raises ProtocolError when the body is no request."""
    try:
        return _decode_request(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ProtocolError(f"no request of protocol {MAJOR}.{MINOR}: {exc}") from None


def decode_answer(body: bytes | memoryview) -> Answer:
    """Raises ProtocolError when the body is no answer."""
    try:
        return _decode_answer(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ProtocolError(f"no answer of protocol {MAJOR}.{MINOR}: {exc}") from None


def failure(error: KVStoreError) -> Failure:
    """The error as it travels."""
    return Failure(error.code, str(error))


def error_of(answer: Failure) -> KVStoreError:
    """The travelled error, as the exception that it was."""
    return _kinds().get(answer.code, KVStoreError)(answer.text)


@cache
def _kinds() -> dict[str, type[KVStoreError]]:
    """The errors that travel, by their codes."""
    direct = KVStoreError.__subclasses__()
    kinds = [*direct, *[child for kind in direct for child in kind.__subclasses__()]]
    return {kind.code: kind for kind in kinds if "code" in vars(kind)}


def token_proof(token: str, side: str, client_nonce: bytes, daemon_nonce: bytes) -> bytes:
    """What `side` ("client" or "daemon") shows to prove that it knows the token, which never travels."""
    text = b"|".join((b"kvstore", side.encode(), client_nonce.hex().encode(), daemon_nonce.hex().encode()))
    return hmac.digest(token.encode(), text, "sha256")
