"""The leases that a client holds: views of blocks, and the ways to end them.

Views point into memory that the daemon owns. They, and every array made from them, are good until the
lease ends or its connection is lost; `valid` says whether that has happened. Ended leases release their
views, so that using one raises ValueError; an array made from a view cannot be revoked: let it go first.
"""

from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np

from kvstore import packing, protocol
from kvstore.channel import TRANSFER_S
from kvstore.errors import InvalidRequest, LeaseError
from kvstore.link import Link

N = TypeVar("N")


class Owner(Protocol):
    """What a lease needs of its client."""

    def lease_ended(self, lease: "Lease") -> bool:
        """Strike the lease off; False when it was struck off before."""

    def lease_alive(self, lease: "Lease") -> bool:
        """Whether its connection stands, in this process."""

    def send_end(self, lease: "Lease") -> None:
        """Let the daemon know, soon, that the lease has ended. Safe within a garbage collection."""

    def lease_dropped(self, lease: "Lease") -> None:
        """The lease was garbage before it ended."""

    def send_commit(self, lease: "WriteLease[Any]", indices: Sequence[int] | None, transfer_s: float) -> None:
        """Tell the daemon, and send the bytes where no memory is shared, within `transfer_s`."""


class Lease:
    """What both kinds have. `id` is 0 when nothing is held: such a lease has ended from the start."""

    def __init__(self, owner: Owner, link: Link, lease_id: int) -> None:
        self._owner = owner
        self.link = link
        self.id = lease_id
        self._ended = lease_id == 0
        self._all_views: Sequence[memoryview | None] = ()

    @property
    def valid(self) -> bool:
        """Whether the views may be used: the lease has not ended and its connection stands."""
        return not self._ended and self._owner.lease_alive(self) and not self.link.channel.lost()

    def end_quietly(self) -> None:
        """End the lease if it has not ended."""
        if not self._ended and self._finish():
            self._owner.send_end(self)

    def let_go(self) -> None:
        """Release the views, so that using one raises; the lease itself is as before."""
        for view in self._all_views:
            if view is not None:
                try:  # noqa: SIM105  a context manager a view would cost three times the rest
                    view.release()
                except BufferError:  # an array still looks at it: that is its owner's to mend
                    pass

    def _end(self, verb: str) -> None:
        if self.id:
            if self._ended or not self._finish():
                raise LeaseError(f"{verb} of a lease that has ended; end it once")
            self._owner.send_end(self)

    def _check(self, verb: str) -> None:
        if self._ended:
            raise LeaseError(f"{verb} on a lease that has ended; reserve or acquire again")
        if not self._owner.lease_alive(self):
            raise LeaseError(f"{verb} on a lease whose connection was lost; end it, then begin again")

    def _finish(self) -> bool:
        """Strike the lease off and release its views; False when another thread was faster."""
        self._ended = True
        self.let_go()
        return self._owner.lease_ended(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end_quietly()

    def __del__(self) -> None:
        if not self._ended:
            self._owner.lease_dropped(self)


class ReadLease(Lease):
    """Pinned blocks: `views` are read-only, for the leading `hit_length` keys.

    `limited` says that this client's pin limit or the quota of a salt, and not absence, ended the hit:
    release leases first.
    """

    def __init__(
        self, owner: Owner, link: Link, lease_id: int, views: Sequence[memoryview], *, limited: bool
    ) -> None:
        super().__init__(owner, link, lease_id)
        self._views = self._all_views = views
        self.hit_length = len(views)
        self.limited = limited

    @property
    def views(self) -> Sequence[memoryview]:
        """The blocks' bytes.

        Raises:
            LeaseError: the lease has ended or its connection was lost.
        """
        if self.id:
            self._check("views")
        return self._views

    def release(self) -> None:
        """Unpin the blocks. From any thread.

        Raises:
            LeaseError: it was released before.
        """
        self._end("release")


class EachLease(Lease):
    """Pinned blocks of several namespaces: `views` has an entry for every item, None where it is absent."""

    def __init__(
        self, owner: Owner, link: Link, lease_id: int, views: Sequence[memoryview | None], *, limited: bool
    ) -> None:
        super().__init__(owner, link, lease_id)
        self._views = self._all_views = views
        self.limited = limited

    @property
    def views(self) -> Sequence[memoryview | None]:
        """The blocks' bytes; raises LeaseError as `ReadLease.views` does."""
        if self.id:
            self._check("views")
        return self._views

    def release(self) -> None:
        """Unpin the blocks; raises LeaseError as `ReadLease.release` does."""
        self._end("release")


class WriteLease(Lease, Generic[N]):
    """Reserved blocks: `views` are writable, one for each key of `granted`.

    `granted` is a leading run of what was missing, `refused` the rest of it, for want of room or by this
    client's limit; `present` keys were here already, `busy` ones are being written by somebody else.
    Blocks become readable by `commit`; leaving the `with` block without it aborts.
    """

    def __init__(
        self,
        owner: Owner,
        link: Link,
        lease_id: int,
        keys: Sequence[N],
        status: bytes,
        views: Sequence[memoryview],
    ) -> None:
        super().__init__(owner, link, lease_id)
        if status.count(b"g") == len(keys):
            self.granted, self.present, self.busy, self.refused = list(keys), [], [], []
        else:
            self.granted, self.present, self.busy, self.refused = (
                [key for key, letter in zip(keys, status, strict=True) if letter == wanted]
                for wanted in b"gpbr"
            )
        self._views = self._all_views = views
        self._open = dict.fromkeys(self.granted)

    @property
    def views(self) -> Sequence[memoryview]:
        """Where to write the blocks' bytes.

        Raises:
            LeaseError: the lease has ended or its connection was lost.
        """
        if self.id:
            self._check("views")
        return self._views

    def open_views(self) -> list[memoryview]:
        """The views of what is not committed yet, in the order of `granted`."""
        return [view for key, view in zip(self.granted, self._views, strict=True) if key in self._open]

    def commit(self, keys: Iterable[N] | None = None, *, transfer_s: float = TRANSFER_S) -> None:
        """Seal all granted blocks, or those of some keys as they are done; they can be read from now on.

        The views of sealed blocks must not be written any more. Over TCP their bytes are sent now, within
        `transfer_s`.

        Raises:
            TransferTooSlow: it took longer; where sending had begun, the connection is lost.
            LeaseError: the lease has ended, or a key was committed before.
            InvalidRequest: a key was not granted.
        """
        if not self.id and not self.granted:
            return
        self._check("commit")
        indices = None
        if keys is not None:
            chosen = list(keys)
            for key in chosen:
                if key not in self._open:
                    if key in self.granted:
                        raise LeaseError(f"key {_text(key)} was committed before; commit once")
                    raise InvalidRequest(f"key {_text(key)} was not granted by this lease")
            position = {key: index for index, key in enumerate(self.granted)}
            indices = [position[key] for key in chosen]
            if not indices:
                return
        self._owner.send_commit(self, indices, transfer_s)
        for key in list(self._open) if keys is None else chosen:
            self._open.pop(key, None)
        if not self._open:
            self._finish()

    def abort(self) -> None:
        """Drop what is not committed; nobody will see it.

        Raises:
            LeaseError: the lease has ended.
        """
        self._end("abort")


def map_views(link: Link, slots: protocol.Slots, *, writable: bool) -> list[memoryview]:
    """The slots' bytes in the mapped arenas."""
    offsets, lengths = slots.offsets, slots.lengths
    if not offsets:
        return []
    if isinstance(slots.arenas, int):
        memory = link.memory(slots.arenas, writable=writable)
        if isinstance(lengths, int):
            return [memory[offset : offset + lengths] for offset in offsets]
        return [memory[o : o + n] for o, n in zip(offsets, lengths, strict=True)]
    spread = zip(slots.arenas, offsets, packing.spread(lengths, len(offsets)), strict=True)
    return [link.memory(a, writable=writable)[o : o + n] for a, o, n in spread]


def _text(name: Any) -> str:
    """A key, or an item of namespace and key, as errors name it."""
    return name.hex() if isinstance(name, bytes) else f"{name[1].hex()} of {name[0]}"


def split_payload(payload: memoryview | None, lengths: int | Sequence[int]) -> list[memoryview]:
    """The blocks of a payload that lie end to end; read-only, as those in shared memory are."""
    if payload is None:
        return []
    sizes = [lengths] * (len(payload) // lengths) if isinstance(lengths, int) else lengths
    ends = np.cumsum(sizes).tolist()
    whole = payload.toreadonly()
    return [whole[end - size : end] for end, size in zip(ends, sizes, strict=True)]
