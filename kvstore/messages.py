"""The messages between client and daemon: their shapes. `kvstore.protocol` frames them, and limits them.

A minor version adds messages, or fields at the end of one.
"""

from typing import Annotated

import msgspec

from kvstore.block import Namespace
from kvstore.message import KEYS_MAX as KEYS_MAX
from kvstore.message import Keys as Keys
from kvstore.message import Message as Message
from kvstore.message import Slots as Slots
from kvstore.statistics import NodeStatistics
from kvstore.upkeep_messages import Clear as Clear
from kvstore.upkeep_messages import Drain as Drain
from kvstore.upkeep_messages import Drained as Drained
from kvstore.upkeep_messages import Held as Held
from kvstore.upkeep_messages import Pin as Pin
from kvstore.upkeep_messages import Prefetch as Prefetch
from kvstore.upkeep_messages import Unpin as Unpin

# Requests.


class Hello(Message, tag=1):
    """The first message. `resume` names the sessions this client lost, `held` the leases it still uses.

    `mark` says which token it has, to an index that knows several: see `kvstore.protocol.token_mark`.
    """

    major: int
    minor: int
    nonce: bytes
    name: str = ""
    resume: list[bytes] = msgspec.field(default_factory=list)
    held: list[int] = msgspec.field(default_factory=list)
    mark: bytes = b""


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
    wait_s: float = 0.0


class HitEach(Message, tag=12):
    namespaces: list[int]
    keys: Keys
    wait_s: float = 0.0


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


class HandOver(Message, tag=22):
    """End, and hand the arena over to me, another daemon of the same user; since 2.1. Unix socket only.

    Answered with descriptors, of the arena and its state in this format, then of processes, and then by the
    end of the process; see `kvstore.node.handover`.
    """

    format: int


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
    lengths: int | list[int] = msgspec.field(default_factory=list)


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
    | Drain
    | Prefetch
    | Pin
    | Unpin
    | Clear
    | HandOver
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
    | Drained
    | Held
    | NamespacePage
)
