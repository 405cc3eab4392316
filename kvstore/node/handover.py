"""What a daemon that ends hands over to another: its arena, what lies there, and who may still touch it.

Nothing is shared. The old daemon has ended its connections and its I/O before it sends anything, and itself
right after; the new one begins when that process is gone. Descriptors travel over the unix socket, and the
state in a memfd of its own, behind a digest that holds for one `FORMAT` alone.
"""

import hashlib
import os
import socket
import struct
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, Final, cast

import msgspec

from kvstore import protocol
from kvstore.block import KEY_BYTES_MAX, Namespace
from kvstore.node.arena import Arena
from kvstore.node.blocks import Block, State
from kvstore.node.lease import Holder

FORMAT: Final = 1
DIGEST_BYTES: Final = 32
# The kernel's limit for one message.
DESCRIPTORS_MAX: Final = 253
# Two messages, and one for each 253 clients: the socket takes them whether they are read or not.
_SEND_S: Final = 2.0

Count = Annotated[int, msgspec.Meta(ge=0)]
Span = tuple[Count, Count]  # a slot: offset and length


class Kept(msgspec.Struct, array_like=True, gc=False):
    """A block. `parent` is the place of an earlier one; a `doomed` one is there for its readers alone.

    `unwritten` says that some tier below is still to get it.
    """

    namespace: Count
    key: Annotated[bytes, msgspec.Meta(min_length=1, max_length=KEY_BYTES_MAX)]
    length: Annotated[int, msgspec.Meta(ge=1)]
    slot: Span
    parent: Count | None
    checksum: int | None
    doomed: bool
    unwritten: bool


class Ward(msgspec.Struct, array_like=True):
    """Who lost its connection: of each lease the places of blocks that it reads, or slots it may write.

    `watched` says that a pidfd of its process comes along.
    """

    session: bytes
    name: str
    watched: bool
    reads: dict[int, list[Count]]
    writes: dict[int, list[Span]]


class Estate(msgspec.Struct):
    """All that is handed over of one arena. `order` has the places of readable blocks, coldest first."""

    capacity_bytes: Count
    ready_bytes: Count
    namespaces: list[Namespace]
    blocks: list[Kept]
    order: list[Count]
    wards: list[Ward]


@dataclass(frozen=True, slots=True)
class Heir:
    """Who wants to take over: a connection that is this object's own, and the request to answer there."""

    sock: socket.socket
    request_id: int


def same_user(sock: socket.socket) -> bool:
    """Whether the process at the other end of a unix socket is root's, or of the same user as this one."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("iII"))
    return struct.unpack("iII", credentials)[1] in (0, os.geteuid())


def digest(packed: bytes | memoryview) -> bytes:
    """What goes before a packed estate."""
    return hashlib.blake2b(packed, digest_size=DIGEST_BYTES, person=b"kvstore-arena-%d" % FORMAT).digest()


def estate(
    arena: Arena, wards: Sequence[tuple[bytes, Holder, int | None]], unwritten: Collection[Block]
) -> Estate:
    """The arena as it is: no connection and no I/O is left, so that nothing of it is reserved or loading.

    What debug holds back is free.
    """
    order = cast(list[Block], list(arena.directory.policy.coldest()))
    pinned = [block for _, holder, _ in wards for lease in holder.reads.values() for block in lease.blocks]
    # Doomed ones first, so that none is in the way of a readable one of its name; parents before children.
    doomed = dict.fromkeys([block for block in pinned if block.state is State.DOOMED])
    listed = [*doomed]
    waiting: dict[Block | None, None] = dict.fromkeys(order)
    for block in order:
        line: list[Block] = []
        ancestor: Block | None = block
        while ancestor in waiting:
            del waiting[ancestor]
            line.append(cast(Block, ancestor))
            ancestor = line[-1].parent
        listed += line[::-1]
    places = {block: place for place, block in enumerate(listed)}
    shelves = {shelf: number for number, shelf in enumerate({block.shelf: 0 for block in listed})}
    tier = arena.tier.statistics()
    return Estate(
        tier.capacity_bytes,
        tier.ready_bytes,
        [shelf.namespace for shelf in shelves],
        [
            Kept(
                shelves[block.shelf],
                block.key,
                block.length,
                (block.slot.offset, block.slot.length),
                None if block.parent is None else places.get(block.parent),
                block.checksum,
                block in doomed,
                block in unwritten,
            )
            for block in listed
        ],
        [places[block] for block in order],
        [
            Ward(
                session,
                holder.name,
                pidfd is not None,
                {number: [places[block] for block in lease.blocks] for number, lease in holder.reads.items()},
                {n: [(slot.offset, slot.length) for slot in w.orphans] for n, w in holder.writes.items()},
            )
            for session, holder, pidfd in wards
        ],
    )


def send(heir: Heir, arena_fd: int, state: Estate, pidfds: Sequence[int]) -> None:
    """Hand over: from here on the arena is the heir's. The caller keeps its descriptors.

    Raises:
        OSError: the heir is gone.
    """
    packed = msgspec.msgpack.encode(state)
    with ExitStack() as stack:
        file = stack.enter_context(os.fdopen(os.memfd_create("kvstore-estate", os.MFD_CLOEXEC), "wb"))
        file.write(digest(packed))
        file.write(packed)
        file.flush()
        heir.sock.settimeout(_SEND_S)
        answer = protocol.frame(heir.request_id, protocol.Done())
        socket.send_fds(heir.sock, [answer], [arena_fd, file.fileno()])
        for start in range(0, len(pidfds), DESCRIPTORS_MAX):
            socket.send_fds(heir.sock, [answer], pidfds[start : start + DESCRIPTORS_MAX])
