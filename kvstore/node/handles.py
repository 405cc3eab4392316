"""The namespaces that one connection has named, and the numbers that stand for them."""

from collections import OrderedDict
from collections.abc import Sequence

from kvstore import packing
from kvstore.block import Namespace
from kvstore.errors import InvalidRequest, UnknownNamespace
from kvstore.node.directory import Directory
from kvstore.node.promote import Shelves
from kvstore.protocol import NAMESPACES_MAX, Keys


class Handles:
    """Handles are given in the order of naming, from 0 on, and none twice in the connection's life.

    The namespaces used last are kept, as many as there may be. A handle of another one is an error and never
    another namespace; named anew, it gets a new handle.
    """

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._handles: dict[Namespace, int] = {}
        self._shelves: OrderedDict[int, Shelves] = OrderedDict()  # by handle, those used last at the end
        self._given = 0

    def open(self, ids: Sequence[bytes], namespaces: Sequence[Namespace]) -> list[int]:
        """The handles of these namespaces, each given with its id.

        Raises:
            InvalidRequest: an id is not its namespace's, or stands for another.
        """
        if len(ids) != len(namespaces):
            raise InvalidRequest(f"{len(ids)} ids for {len(namespaces)} namespaces; give one each")
        return list(map(self._open, ids, namespaces))

    def shelves(self, handle: int) -> Shelves:
        """Where the namespace's blocks are.

        Raises:
            InvalidRequest: it was never opened.
            UnknownNamespace: it was, and is forgotten.
        """
        shelves = self._shelves.get(handle)
        if shelves is not None:
            self._shelves.move_to_end(handle)
            return shelves
        if 0 <= handle < self._given:
            raise UnknownNamespace(
                f"namespace handle {handle} is forgotten, as {NAMESPACES_MAX} others were used since; open "
                "its namespace again"
            )
        raise InvalidRequest(
            f"namespace handle {handle}; this connection has opened {self._given}: open it first"
        )

    def items(self, handles: list[int], packed: Keys) -> list[tuple[Shelves, bytes]]:
        """Each key with the shelves of its handle; raises as `shelves` and `unpack_keys` do."""
        keys = packing.unpack_keys(packed)
        spread = packing.spread(handles, len(keys))
        shelves = {handle: self.shelves(handle) for handle in dict.fromkeys(spread)}
        return [(shelves[handle], key) for handle, key in zip(spread, keys, strict=True)]

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
            handle = self._given
            self._shelves[handle] = self._directory.shelves(namespace)
            self._handles[namespace] = handle
            self._given += 1
            if len(self._shelves) > NAMESPACES_MAX:
                _, forgotten = self._shelves.popitem(last=False)
                del self._handles[forgotten[0].namespace]
        else:
            self._shelves.move_to_end(handle)
        return handle
