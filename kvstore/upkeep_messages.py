"""The messages of whoever keeps blocks in their places without reading them: routers and operators.

All but `Drain` came with 2.2, that with 2.1.
"""

import msgspec

from kvstore.block import Namespace
from kvstore.message import Keys, Message

# Requests.


class Drain(Message, tag=21):
    """Take nothing new and write what is in the arena below. Answered when that is done, or late.

    To `cancel` is to go on as before. Draining goes on when the client or its patience has gone.
    """

    wait_s: float = 0.0
    cancel: bool = False


class Prefetch(Message, tag=23):
    """Load what of a prefix is below the arena; answered with `Held` before it is there."""

    namespace: int
    keys: Keys


class Pin(Message, tag=24):
    """Load a prefix and hold it in the arena, whatever becomes of this connection; answered with `Held`."""

    namespace: int
    keys: Keys
    ttl_s: float


class Unpin(Message, tag=25):
    """End what `Pin` or `Prefetch` was answered with."""

    id: int


class Clear(Message, tag=26):
    """Remove all blocks of one namespace, or of all that have this model, this salt, or both. For good."""

    namespace: Namespace | None = None
    model: str | None = None
    salt: str | None = None
    wait_s: float = 0.0


# Answers.


class Drained(Message, tag=115):
    """What remains: blocks of the arena that no tier below has, and open write leases.

    `tiers` below the arena, where there are none nothing can be written. `owed_blocks` are what tiers that
    work are still to get, `away` says which do not, and why. Once it is `over`, waiting changes nothing.
    """

    draining: bool
    tiers: int
    blocks: int
    block_bytes: int
    leases: int
    owed_blocks: int = 0
    away: list[str] = msgspec.field(default_factory=list)
    over: bool = False


class Held(Message, tag=116):
    """Leading keys in the arena, those expected there, and all others; no hold is 0."""

    id: int
    pinned: int
    loading: int
    missing: int
