"""The namespaces that one connection has named, and the numbers that stand for them."""

from collections.abc import Sequence
from typing import Final

from kvstore import packing
from kvstore.block import Namespace
from kvstore.errors import InvalidRequest
from kvstore.node.directory import Directory
from kvstore.node.promote import Shelves
from kvstore.protocol import Keys

# Salts make namespaces, so one engine may use many; this bounds what a runaway costs to some 10 MB.
NAMESPACES_MAX: Final = 65_536


class Handles:
    """Handles are given in the order of naming, from 0 on, and for the connection's life."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._handles: dict[Namespace, int] = {}
        self._shelves: list[Shelves] = []

    def open(self, ids: Sequence[bytes], namespaces: Sequence[Namespace]) -> list[int]:
        """The handles of these namespaces, each given with its id.

        Raises:
            InvalidRequest: an id is not its namespace's, or stands for another, or there are too many.
        """
        if len(ids) != len(namespaces):
            raise InvalidRequest(f"{len(ids)} ids for {len(namespaces)} namespaces; give one each")
        return list(map(self._open, ids, namespaces))

    def shelves(self, handle: int) -> Shelves:
        """Where the namespace's blocks are; raises InvalidRequest for what was not opened."""
        if not 0 <= handle < len(self._shelves):
            raise InvalidRequest(
                f"namespace handle {handle}; this connection has opened {len(self._shelves)}: open it first"
            )
        return self._shelves[handle]

    def items(self, handles: list[int], packed: Keys) -> list[tuple[Shelves, bytes]]:
        """Each key with the shelves of its handle; raises InvalidRequest as `shelves` and `unpack_keys`."""
        keys = packing.unpack_keys(packed)
        spread = packing.spread(handles, len(keys))
        return [(self.shelves(handle), key) for handle, key in zip(spread, keys, strict=True)]

    def _open(self, namespace_id: bytes, namespace: Namespace) -> int:
        # Compared with the namespace of that id first: two that claim one id are the graver mistake.
        for tier in self._directory.tiers:
            tier.compare(namespace_id, namespace)
        if namespace.id != namespace_id:
            raise InvalidRequest(
                f"namespace id {namespace_id.hex()} is not the digest of {namespace!r}, which is "
                f"{namespace.id.hex()}; use a client of the daemon's version"
            )
        handle = self._handles.get(namespace)
        if handle is None:
            if len(self._shelves) >= NAMESPACES_MAX:
                raise InvalidRequest(
                    f"{len(self._shelves)} namespaces on one connection; the limit is {NAMESPACES_MAX}: "
                    "open another connection"
                )
            handle = self._handles[namespace] = len(self._shelves)
            self._shelves.append(self._directory.shelves(namespace))
        return handle
