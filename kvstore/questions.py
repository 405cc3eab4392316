"""What a client may ask a daemon, without pinning, storing or removing anything."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from kvstore import packing, protocol
from kvstore.block import HitLength, Namespace
from kvstore.keeper import Keeper
from kvstore.statistics import NodeStatistics

Item = tuple[Namespace, bytes]


class KeyPage(NamedTuple):
    """Some keys of a namespace, their blocks' lengths in bytes, and where to go on; None at the end."""

    keys: Sequence[bytes]
    lengths: Sequence[int]
    cursor: int | None


class NamespaceUse(NamedTuple):
    """What a namespace has in the medium that has most of it: a block is often in two, and counts once."""

    namespace: Namespace
    blocks: int
    block_bytes: int


class Questions:
    """The asking part of `StoreClient`."""

    def __init__(self, keeper: Keeper) -> None:
        self._connected = keeper.connected
        self._call = keeper.call
        self._call_named = keeper.call_named

    def hit_length(self, namespace: Namespace, keys: Sequence[bytes], *, wait_s: float = 0.0) -> HitLength:
        """How many leading keys are here, cumulative per medium. Pins nothing: acquire is the truth.

        Of a tier shared with other nodes the daemon says what it last heard, and asks anew, in one batch,
        only if it may wait for the answer, up to `wait_s`.
        """
        packed = packing.pack_keys(keys)
        packing.check_wait(wait_s)
        link = self._connected()

        def request() -> protocol.HitLengthOf:
            return protocol.HitLengthOf(link.handle(namespace), packed, wait_s)

        answer = self._call_named(link, request, wait_s).answer
        assert isinstance(answer, protocol.Hits)
        return HitLength(answer.gpu, answer.dram, answer.nvme, answer.remote)

    def hit_each(self, items: Sequence[Item], *, wait_s: float = 0.0) -> Sequence[bool]:
        """For every item, whether it is here; else as `hit_length`."""
        return list(map(bool, self._found(items, wait_s).found))

    def length_each(self, items: Sequence[Item], *, wait_s: float = 0.0) -> Sequence[int]:
        """For every item its block's length in bytes, 0 where it is not here; else as `hit_length`."""
        answer = self._found(items, wait_s)
        lengths = iter(packing.spread(answer.lengths, sum(answer.found)))
        return [next(lengths) if found else 0 for found in answer.found]

    def list(self, namespace: Namespace, cursor: int | None = None, *, limit: int = 0) -> "KeyPage":
        """A page of what the namespace has, in the order of sealing; begin with no cursor.

        A block that is here all the while is listed at least once. `limit` makes pages smaller than the
        daemon would.
        """
        link = self._connected()
        after = cursor or 0
        answer = self._call_named(
            link, lambda: protocol.ListKeys(link.handle(namespace), after, limit)
        ).answer
        assert isinstance(answer, protocol.Page)
        keys = packing.unpack_keys(answer.keys) if answer.lengths else []
        return KeyPage(keys, answer.lengths, answer.after or None)

    def namespaces(self, after: bytes = b"") -> Iterator[NamespaceUse]:
        """The namespaces that have blocks here, in the order of their ids, behind one; asked for by pages."""
        while True:
            answer = self._call(self._connected(), protocol.ListNamespaces(after)).answer
            assert isinstance(answer, protocol.NamespacePage)
            yield from map(NamespaceUse, answer.namespaces, answer.blocks, answer.block_bytes)
            after = answer.after
            if not after:
                return

    def statistics(self) -> NodeStatistics:
        """The daemon's."""
        answer = self._call(self._connected(), protocol.GetStatistics()).answer
        assert isinstance(answer, protocol.Statistics)
        return answer.statistics

    def check(self) -> Sequence[str]:
        """Let the daemon recount everything: what is wrong, one line each. Stalls it for 1 us a block."""
        answer = self._call(self._connected(), protocol.Check()).answer
        assert isinstance(answer, protocol.Report)
        return answer.wrong

    def verify(self, tier: int, after: int = 0) -> protocol.Verified:
        """Let the daemon compare some blocks of a tier with their checksums; damaged ones are dropped.

        `tier` is its place in `statistics().tiers`, 1 or more; go on with the answer's `after` until it is 0.

        Raises:
            TierError: the tier fails now.
        """
        answer = self._call(self._connected(), protocol.Verify(tier, after)).answer
        assert isinstance(answer, protocol.Verified)
        return answer

    def _found(self, items: Sequence[Item], wait_s: float) -> protocol.Found:
        packing.check_wait(wait_s)
        link = self._connected()
        names, packed = packed_items(items)

        def request() -> protocol.HitEach:
            return protocol.HitEach(link.handles(names), packed, wait_s)

        answer = self._call_named(link, request, wait_s).answer
        assert isinstance(answer, protocol.Found)
        return answer


def packed_items(items: Sequence[Item]) -> tuple[list[Namespace], protocol.Keys]:
    """Namespaces, and the keys as they travel."""
    keys = packing.pack_keys([key for _, key in items])
    return [namespace for namespace, _ in items], keys
