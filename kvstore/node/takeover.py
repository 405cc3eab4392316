"""Taking over the arena of the daemon that listens now: asking for it, judging it, entering it in a store.

The old daemon must be gone before anything of its arena is used: then no thread of it can write there. What
is not exactly as it should be is not taken: a fresh arena loses hits, a wrong one would give wrong bytes.
"""

import logging
import mmap
import os
import secrets
import select
import socket
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Final

import msgspec

from kvstore import protocol
from kvstore.errors import ConfigError, ProtocolError
from kvstore.node.blocks import Block, State
from kvstore.node.handover import DESCRIPTORS_MAX, DIGEST_BYTES, FORMAT, Estate, digest, same_user
from kvstore.node.lease import Holder, ReadLease, WriteLease
from kvstore.node.quarantine import Quarantine, peer_pidfd
from kvstore.node.store import Store
from tiers.base import Slot

logger = logging.getLogger(__name__)

# How long a daemon may take to end: its disks have 12 s where they hang.
_PATIENCE_S: Final = 30.0
_decode = msgspec.msgpack.Decoder(Estate).decode


@dataclass
class Inheritance:
    """An arena that is ours now, with all that is known of it. Owns the descriptors."""

    estate: Estate
    arena_fd: int
    pidfds: list[int] = field(default_factory=list)

    def close(self) -> None:
        """Let go of it, unused."""
        for fd in (self.arena_fd, *self.pidfds):
            os.close(fd)

    @property
    def lease_ids(self) -> list[int]:
        """Of all leases that go on."""
        return [number for ward in self.estate.wards for number in (*ward.reads, *ward.writes)]

    def spans(self) -> list[tuple[int, int]]:
        """The slots that are taken, by address."""
        return _spans(self.estate)

    def enter(self, store: Store, quarantine: Quarantine, slots: Sequence[Slot]) -> list[Block]:
        """Enter everything, `slots` being those of `spans`. The blocks that tiers below are still to get."""
        directory = store.arena.directory
        offset_to_slot = {slot.offset: slot for slot in slots}
        shelves = [directory.shelf(namespace) for namespace in self.estate.namespaces]
        blocks: list[Block] = []
        for kept in self.estate.blocks:
            parent = None if kept.parent is None else blocks[kept.parent]
            slot = offset_to_slot[kept.slot[0]]
            shelf = shelves[kept.namespace]
            block = directory.add(shelf, kept.key, kept.length, slot, State.RESERVED, parent)
            slot.owner, block.checksum = block, kept.checksum
            blocks.append(block)
            if kept.doomed:  # before the next one, which may be of the same name
                directory.seal([block])
                directory.hold([block])
                directory.remove(block)
        readable = [b for b, kept in zip(blocks, self.estate.blocks, strict=True) if not kept.doomed]
        directory.seal(readable)
        for place in self.estate.order:
            directory.requested([blocks[place]])
        store.arena.announce_sealed(readable)
        pidfds = iter(self.pidfds)
        for ward in self.estate.wards:
            holder = Holder(ward.name, pinned_bytes_max=0, reserved_bytes_max=0, maps=True)
            for number, places in ward.reads.items():
                pinned = [blocks[place] for place in places]
                nbytes = sum([block.length for block in pinned])
                directory.pin(pinned)
                holder.reads[number] = ReadLease(number, pinned, nbytes, limited=False)
                holder.pinned_bytes += nbytes
            for number, spans in ward.writes.items():
                lease = holder.writes[number] = WriteLease(number, None)
                lease.orphans = [offset_to_slot[offset] for offset, _ in spans]
                for slot in lease.orphans:
                    slot.owner = lease
            quarantine.admit(ward.session, holder, next(pidfds) if ward.watched else None)
        free = [directory.let_go(block) for block in blocks if block.copies]
        store.arena.free([slot for slot in free if slot is not None])
        return [b for b, kept in zip(blocks, self.estate.blocks, strict=True) if kept.unwritten]


def take_over(path: Path) -> Inheritance | None:
    """Let the daemon that listens on `path` hand its arena over, and end. Blocks until it is gone.

    None where nobody listens, and where nothing of use was handed over.

    Raises:
        ConfigError: it goes on, or does not answer.
    """
    with ExitStack() as stack:
        sock = stack.enter_context(socket.socket(socket.AF_UNIX))
        sock.settimeout(_PATIENCE_S)
        try:
            sock.connect(str(path))
        except OSError:
            return None
        if not same_user(sock):
            raise ConfigError(f"the daemon that listens on {path} is another user's; stop it")
        _, pidfd = peer_pidfd(sock)
        if pidfd is None:
            raise ConfigError(f"nothing would tell the end of the daemon that listens on {path}; stop it")
        stack.callback(os.close, pidfd)
        logger.info("taking over from the daemon that listens on %s", path)
        try:
            descriptors = _ask(sock)
        except (ProtocolError, TimeoutError) as error:
            raise ConfigError(f"the daemon that listens on {path} hands nothing over: {error}") from error
        stack.callback(_close, descriptors)
        gone = select.poll()
        gone.register(pidfd, select.POLLIN)
        if not gone.poll(_PATIENCE_S * 1000):
            logger.error("the daemon that listened on %s does not end: starting afresh", path)
            return None
        if not descriptors:
            logger.warning("nothing was handed over, and the log of who listened says why: starting afresh")
            return None
        try:
            inherited = _judged(descriptors)
        except ValueError as error:
            logger.error("what was handed over cannot be used, starting afresh: %s", error)
            return None
        logger.info(
            "took over %d blocks, and the slots of %d processes that may still use them",
            len(inherited.estate.order),
            len(inherited.estate.wards),
        )
        return inherited


def _ask(sock: socket.socket) -> list[int]:
    """The descriptors that were handed over, none if it ended without.

    Raises:
        ProtocolError: it goes on, and why.
    """
    hello = protocol.Hello(protocol.MAJOR, protocol.MINOR, secrets.token_bytes(32), f"pid {os.getpid()}")
    descriptors: list[int] = []
    try:
        sock.sendall(protocol.frame(1, hello))
        _receive(sock, descriptors)
        sock.sendall(protocol.frame(2, protocol.HandOver(FORMAT)))
        while True:
            _receive(sock, descriptors)
    except (ConnectionError, EOFError):
        return descriptors
    except BaseException:
        _close(descriptors)
        raise


def _receive(sock: socket.socket, descriptors: list[int]) -> None:
    """Receive an answer, with the descriptors that come along."""
    size, flags = protocol.HEADER.size, socket.MSG_CMSG_CLOEXEC
    head, more, _, _ = socket.recv_fds(sock, size, DESCRIPTORS_MAX, flags)
    descriptors += more
    head += _exactly(sock, size - len(head))
    answer = protocol.decode_answer(_exactly(sock, protocol.HEADER.unpack(head)[0]))
    if isinstance(answer, protocol.Failure):
        raise ProtocolError(answer.text)


def _exactly(sock: socket.socket, nbytes: int) -> bytes:
    data = b""
    while len(data) < nbytes:
        piece = sock.recv(nbytes - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data


def _judged(descriptors: list[int]) -> Inheritance:
    """What they stand for; takes all of them but the state's out of the list.

    Raises:
        ValueError: that cannot be what a daemon has handed over.
    """
    if len(descriptors) < 2:
        raise ValueError(f"{len(descriptors)} descriptors came, and not an arena and its state")
    packed = memoryview(os.pread(descriptors[1], os.fstat(descriptors[1]).st_size, 0))
    if packed[:DIGEST_BYTES] != digest(packed[DIGEST_BYTES:]):
        raise ValueError(f"the state is damaged, or of another format than {FORMAT}")
    try:
        estate = _decode(packed[DIGEST_BYTES:])
    except msgspec.DecodeError as exc:
        raise ValueError(f"the state is none of format {FORMAT}: {exc}") from exc
    pidfds = descriptors[2:]
    faults = _faults(estate, os.fstat(descriptors[0]).st_size, len(pidfds))
    if (fault := next((text for bad, text in faults if bad), None)) is not None:
        raise ValueError(fault)
    inherited = Inheritance(estate, descriptors[0], pidfds)
    descriptors[:] = descriptors[1:2]
    return inherited


def _faults(estate: Estate, arena_bytes: int, pidfds: int) -> Iterable[tuple[bool, str]]:
    """What may be wrong, and whether it is. Each is judged only when those before it are well."""
    blocks, wards, slots = estate.blocks, estate.wards, _spans(estate)
    capacity, ready = estate.capacity_bytes, estate.ready_bytes
    yield capacity != arena_bytes, f"an arena of {arena_bytes} bytes is said to have {capacity}"
    yield not 0 < ready <= capacity, f"{ready} bytes of {capacity} are said to be populated"
    yield (
        any(n % mmap.PAGESIZE or not n for n in {length for _, length in slots}),
        "a slot is not whole pages",
    )
    yield any(offset % mmap.PAGESIZE for offset, _ in slots), "a slot does not begin on a page"
    ends = [0, *[offset + length for offset, length in slots]]
    yield any(slot[0] < end for slot, end in zip(slots, ends, strict=False)), "slots overlap"
    yield ends[-1] > ready, f"a slot ends at {ends[-1]}, beyond the {ready} bytes that are populated"
    yield any(kept.length > kept.slot[1] for kept in blocks), "a block is longer than its slot"
    named = {kept.namespace for kept in blocks}
    yield max(named, default=-1) >= len(estate.namespaces), "a block is of an unknown namespace"
    links = [(kept.parent, place) for place, kept in enumerate(blocks) if kept.parent is not None]
    yield any(parent >= place for parent, place in links), "a block is before the one it continues"
    doomed = sum(kept.doomed for kept in blocks)
    yield any(not kept.doomed for kept in blocks[:doomed]), "removed blocks are not the first"
    names = {(kept.namespace, kept.key) for kept in blocks[doomed:]}
    yield len(names) < len(blocks) - doomed, f"{len(blocks) - doomed} blocks have {len(names)} names"
    yield sorted(estate.order) != list(range(doomed, len(blocks))), "the order is not that of the blocks"
    read = chain.from_iterable(places for ward in wards for places in ward.reads.values())
    yield max(read, default=-1) >= len(blocks), "a lease reads a block that is not there"
    watched = sum(ward.watched for ward in wards)
    yield pidfds != watched, f"{pidfds} pidfds came for {watched} processes"
    sessions = {ward.session for ward in wards}
    yield len(sessions) < len(wards), f"{len(wards)} lost connections have {len(sessions)} names"


def _spans(estate: Estate) -> list[tuple[int, int]]:
    orphans = [span for ward in estate.wards for spans in ward.writes.values() for span in spans]
    return sorted([*[kept.slot for kept in estate.blocks], *orphans])


def _close(descriptors: list[int]) -> None:
    for fd in descriptors:
        os.close(fd)
