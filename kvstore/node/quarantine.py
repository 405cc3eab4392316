"""Leases that outlived their connection, until nobody can be touching their slots any more.

A client maps the arena, so a lost connection does not mean that its process has stopped writing or
reading. Its leases end for the protocol at once; its slots wait here until the process has ended (its
pidfd says so) or the client, connected anew, gives them up.
"""

import asyncio
import logging
import os
import socket
import struct
from dataclasses import dataclass
from typing import Final

from kvstore.node.lease import Holder
from kvstore.node.store import Store

logger = logging.getLogger(__name__)

_SO_PEERPIDFD: Final = 77  # Linux 6.5 and later


@dataclass(slots=True)
class _Ward:
    holder: Holder
    pidfd: int


class Quarantine:
    """Holders whose connection is lost, by the session's id."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._wards: dict[bytes, _Ward] = {}

    def admit(self, session_id: bytes, holder: Holder, pidfd: int | None) -> None:
        """Take over what a lost connection's holder may still be touching. Owns `pidfd` from now on.

        Without a pidfd nobody can say when the process ends: its slots stay taken until it gives them up.
        """
        if not self._store.disconnect(holder):
            if pidfd is not None:
                os.close(pidfd)
            return
        if pidfd is None:
            logger.warning("no pidfd of %s: its slots stay taken until it reconnects", holder.name)
            pidfd = -1
        else:
            asyncio.get_running_loop().add_reader(pidfd, self._dismiss, session_id)
        self._wards[session_id] = _Ward(holder, pidfd)
        logger.info("%s lost its connection and holds %d leases", holder.name, len(holder.lease_ids()))

    def reclaim(self, session_id: bytes, held: set[int]) -> Holder | None:
        """The client is back and still touches the slots of the leases `held`, of no others."""
        ward = self._wards.get(session_id)
        if ward is None:
            return None
        for lease_id in ward.holder.lease_ids():
            if lease_id not in held:
                self._store.end_lease(ward.holder, lease_id)
        self.emptied(ward.holder)
        return ward.holder if session_id in self._wards else None

    def emptied(self, holder: Holder) -> None:
        """Let the holder go if it holds nothing any more."""
        if holder.lease_ids():
            return
        for session_id, ward in list(self._wards.items()):
            if ward.holder is holder:
                self._dismiss(session_id)

    def close(self) -> None:
        """The daemon ends, and its memory with it."""
        for session_id in list(self._wards):
            self._dismiss(session_id)

    def holders(self) -> list[Holder]:
        """Those who are here."""
        return [ward.holder for ward in self._wards.values()]

    def wards(self) -> list[tuple[bytes, Holder, int | None]]:
        """Those who are here, as they were admitted; their pidfds are still owned here."""
        wards = self._wards.items()
        return [(id_, ward.holder, None if ward.pidfd < 0 else ward.pidfd) for id_, ward in wards]

    def _dismiss(self, session_id: bytes) -> None:
        ward = self._wards.pop(session_id)
        if ward.pidfd >= 0:
            asyncio.get_running_loop().remove_reader(ward.pidfd)
            os.close(ward.pidfd)
        self._store.end(ward.holder)


def peer_pidfd(sock: socket.socket) -> tuple[int, int | None]:
    """The process id and a pidfd of the process that connected this unix socket; the caller closes it."""
    size = struct.calcsize("3i")
    pid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))[0]
    try:
        return pid, sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError:
        pass
    try:
        return pid, os.pidfd_open(pid)
    except OSError:
        return pid, None
