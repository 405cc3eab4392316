"""What a session needs of the server that it belongs to."""

from collections.abc import Sequence
from typing import Any, Protocol

from kvstore.node.connection import Connection
from kvstore.node.lease import Holder
from kvstore.node.store import Store
from kvstore.statistics import NodeStatistics


class Host(Protocol):
    """A server, as its sessions see it."""

    node: str
    epoch: int
    token: str | None
    store: Store

    def open_arena(self, arena: int, *, writable: bool) -> int:
        """A descriptor that the caller closes. Raises InvalidRequest when there is no such arena."""

    def arena_bytes(self) -> list[int]:
        """The size of each arena."""

    def statistics(self) -> NodeStatistics:
        """The node's."""

    def check(self) -> list[str]:
        """What is wrong in the node."""

    def open_writes(self) -> int:
        """Write leases of clients that are connected."""

    def hand_over(self, connection: Connection, request_id: int) -> None:
        """Stop, and hand the arena over to whoever asks for it on that connection of a unix socket.

        Raises:
            Unauthorized: it is another user's.
        """

    def reclaim(self, resume: Sequence[bytes], held: Sequence[int]) -> list[Holder]:
        """A client is back: those of its lost sessions that still hold some of the leases `held`."""

    def leave(self, session: Any) -> None:
        """The session's connection is lost."""

    def emptied(self, holder: Holder) -> None:
        """A quarantined holder may hold nothing any more."""
