"""What a directory is made of: blocks, their states, and the shelves that they stand on. Values, no rules."""

from enum import StrEnum
from typing import TYPE_CHECKING, Any

from kvstore.block import Namespace

if TYPE_CHECKING:
    from kvstore.node.accounts import Account
    from kvstore.node.directory import TierDirectory


class State(StrEnum):
    """Where a block is in its life in one tier; absent is no block at all."""

    RESERVED = "reserved"
    LOADING = "loading"
    SEALED = "sealed"
    DEMOTING = "demoting"
    DOOMED = "doomed"
    ABSENT = "absent"


class Shelf:
    """One namespace's blocks in one tier: `sealed` is what readers may see, `pending` what they may not.

    `sealed_bytes` is their length, counted by the directory; `account` is what their salt has in the tier.
    Shelves live as long as somebody uses them: a connection, or a block on them.
    """

    __slots__ = ("__weakref__", "account", "namespace", "pending", "sealed", "sealed_bytes", "tier")

    def __init__(self, tier: "TierDirectory", namespace: Namespace) -> None:
        self.tier = tier
        self.namespace = namespace
        self.account: Account = tier.accounts.of(namespace.salt)
        self.sealed: dict[bytes, Block] = {}
        self.sealed_bytes = 0
        self.pending: dict[bytes, Block] = {}

    def resident(self, key: bytes) -> "Block | None":
        """The block, readable or not."""
        return self.sealed.get(key) or self.pending.get(key)


class Block:
    """One block in one tier. `slot` is the tier's own (an arena span, a place in a file).

    `generation` is new at every change of state that somebody else will finish, so that a late
    completion can be told from a current one; `place` is the generation of its sealing. `stamp` is the number
    of the request that used it last, of `TierDirectory.requests`. `parent` and `children` link resident
    blocks of a prefix. `pins` are those of readers, `copies` those of the node's own I/O. `owed` says how
    many tiers below must still get the block before it may leave. `checksum` is None until somebody has
    computed it; `record` is how its tier knows it.
    """

    __slots__ = (
        "checksum",
        "children",
        "copies",
        "generation",
        "key",
        "length",
        "owed",
        "parent",
        "pins",
        "place",
        "record",
        "shelf",
        "slot",
        "stamp",
        "state",
    )

    def __init__(self, shelf: Shelf, key: bytes, length: int, slot: Any, state: State) -> None:
        self.shelf = shelf
        self.key = key
        self.length = length
        self.slot = slot
        self.state = state
        self.generation = 0
        self.place = 0
        self.stamp = 0
        self.pins = 0
        self.copies = 0
        self.owed = 0
        self.parent: Block | None = None
        self.children = 0
        self.checksum: int | None = None
        self.record: Any = None

    @property
    def identity(self) -> tuple[bytes, bytes]:
        """Namespace id and key: equal for two blocks of the same content."""
        return self.shelf.namespace.id, self.key

    @property
    def readable(self) -> bool:
        """Whether readers may see it."""
        return self.state is State.SEALED or self.state is State.DEMOTING

    def __repr__(self) -> str:
        return f"<{self.state} {self.shelf.namespace} {self.key.hex()[:16]} pins={self.pins}>"


def evictable(block: Block) -> bool:
    """Whether a policy may choose the block: idle and owed to nobody, and no resident block continues it."""
    return block.children == 0 and block.owed == 0 and idle(block)


def idle(block: Block) -> bool:
    """Whether the block is readable and nobody reads it, or copies it, now."""
    return block.pins == 0 and block.copies == 0 and block.state is State.SEALED
