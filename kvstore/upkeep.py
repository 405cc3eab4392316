"""What a client may have a daemon do with blocks that it neither reads nor writes: routers and operators do.

What is begun so goes on without the client.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

from kvstore import packing, protocol
from kvstore.block import Namespace
from kvstore.errors import ProtocolError
from kvstore.link import Link
from kvstore.questions import Questions

# The minor version that each verb came with.
_DRAIN: Final = 1
_HOLD: Final = 2


class Hold(NamedTuple):
    """A hold, in leading keys: those in the arena, those expected there, and all others; no hold is 0.

    Expected is what is in a tier below, or being written. What only a shared tier may have is `missing` here,
    and is asked for and loaded all the same.
    """

    id: int
    pinned: int
    loading: int
    missing: int


class Upkeep(Questions):
    """The part of `StoreClient` that does something to blocks without looking at them."""

    def prefetch(self, namespace: Namespace, keys: Sequence[bytes]) -> Hold:
        """Let the daemon load a prefix into its arena, from wherever it is below. Returns at once.

        While it goes on the keys are held, as by `pin`; then they stay as long as others do.

        Raises:
            InvalidRequest: a value is out of its limits, or more is held than the daemon allows.
            ProtocolError: the daemon is older than this verb.
        """
        packed = packing.pack_keys(keys)
        link = self._link_of("prefetch", _HOLD)
        reply = self._call_named(link, lambda: protocol.Prefetch(link.handle(namespace), packed))
        return _held(reply.answer)

    def pin(self, namespace: Namespace, keys: Sequence[bytes], ttl_s: float) -> Hold:
        """Let the daemon load a prefix and hold it in its arena for `ttl_s`. Returns at once.

        It is held whatever becomes of this client, until its time is over, `unpin`, or the daemon's end.

        Raises:
            InvalidRequest: a value is out of its limits, or more is held than the daemon allows.
            ProtocolError: the daemon is older than this verb.
        """
        packed = packing.pack_keys(keys)
        link = self._link_of("pin", _HOLD)
        reply = self._call_named(link, lambda: protocol.Pin(link.handle(namespace), packed, ttl_s))
        return _held(reply.answer)

    def unpin(self, hold_id: int) -> None:
        """End a hold, whoever began it.

        Raises:
            LeaseError: it is over, or was never there.
        """
        self._call(self._link_of("unpin", _HOLD), protocol.Unpin(hold_id))

    def clear(
        self,
        namespace: Namespace | None = None,
        *,
        model: str | None = None,
        salt: str | None = None,
        timeout_s: float = 60.0,
    ) -> int:
        """Remove all blocks of a namespace, or of all of this model, of this salt, or of both, for good.

        How many were here, in any tier. Of a tier that nodes share goes what this daemon knows of there.

        Raises:
            InvalidRequest: neither is given, or a namespace beside the others.
            DeadlineExceeded: there is more than `timeout_s` is enough for: some are removed, ask again.
            TierError: they are hidden, but a tier that fails now may bring some back.
            ProtocolError: the daemon is older than this verb.
        """
        packing.check_wait(timeout_s)
        link = self._link_of("clear", _HOLD)
        request = protocol.Clear(namespace, model, salt, timeout_s)
        answer = self._call(link, request, timeout_s).answer
        assert isinstance(answer, protocol.Count)
        return answer.count

    def drain(self, wait_s: float = 0.0, *, cancel: bool = False) -> protocol.Drained:
        """Let the daemon take nothing new and write what only its arena has below, or go on as before.

        Returns when nothing remains, or with what does after `wait_s`. The daemon drains on, whatever
        becomes of this client; ask again to see how far it is.

        Raises:
            ProtocolError: the daemon is older than this verb.
        """
        packing.check_wait(wait_s)
        link = self._link_of("drain", _DRAIN)
        answer = self._call(link, protocol.Drain(wait_s, cancel), wait_s).answer
        assert isinstance(answer, protocol.Drained)
        return answer

    def _link_of(self, verb: str, minor: int) -> Link:
        """The link, to a daemon that knows the verb."""
        link = self._connected()
        if link.welcome.minor < minor:
            raise ProtocolError(
                f"the daemon speaks protocol {link.welcome.major}.{link.welcome.minor}; {verb} came with "
                f"{link.welcome.major}.{minor}: upgrade it, or do without"
            )
        return link


def _held(answer: object) -> Hold:
    assert isinstance(answer, protocol.Held)
    return Hold(answer.id, answer.pinned, answer.loading, answer.missing)
