"""What subscribers of a feed have asked a daemon to hold, and within which limits. It has no socket.

A hold takes memory from others, so it is taken only from those who may: see `refusal`. What it does is the
store's: `Holds` is the little that is needed of that.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from kvstore.block import Namespace
from kvstore.errors import KVStoreError
from kvstore.index import feed

# Longer ones are made so short: a router's reserve is of seconds.
TTL_S_MAX: Final = 300.0
# Of one subscriber, at a time.
OPEN_MAX: Final = 1024
# Of one subscriber: a key takes 0.65 us in all, so this is a quarter of the loop's time. A hold counts as
# some keys beside its own.
_KEYS_PER_S: Final = 400_000.0
_BURST_KEYS: Final = 65_536.0
_HOLD_IN_KEYS: Final = 64


class Hold(Protocol):
    """A hold of the store, in leading keys. `id` is 0 where nothing is held."""

    @property
    def id(self) -> int: ...
    @property
    def pinned(self) -> int: ...
    @property
    def loading(self) -> int: ...
    @property
    def missing(self) -> int: ...


class Holds(Protocol):
    """The store's."""

    def hold(self, namespace: Namespace, keys: Sequence[bytes], ttl_s: float) -> Hold:
        """Pin the leading keys for a time, and load what of them is below.

        Raises:
            KVStoreError: it cannot, and why.
        """

    def end(self, hold_id: int) -> bool:
        """End it before its time; False where there is none."""


@dataclass(slots=True)
class _Account:
    """What one subscriber holds, by its own ids: that of the store, and until when; and what it may ask."""

    left_s: float
    open: dict[int, tuple[int, float]] = field(default_factory=dict)
    keys_left: float = _BURST_KEYS


class FeedHolds:
    """`refusal` says why holds are not taken from who follows the feed; empty: they are."""

    def __init__(self, holds: Holds, refusal: Callable[[], str]) -> None:
        self.refusal = refusal
        self.taken = self.refused = 0
        self._holds = holds
        self._accounts: dict[bytes, _Account] = {}

    def hold(self, subscriber: bytes, wish: feed.Hold, now_s: float) -> feed.Held:
        """Do as a subscriber wishes, or say why not."""
        account = self._accounts.setdefault(subscriber, _Account(now_s))
        refused = self.refusal() or _limit(account, wish, now_s)
        if not refused:
            ttl_s = min(wish.ttl_s, TTL_S_MAX)
            try:
                hold = self._holds.hold(Namespace.from_canonical(wish.namespace), wish.keys, ttl_s)
            except KVStoreError as error:
                refused = str(error)
            else:
                self.taken += 1
                if hold.id:
                    account.open[wish.id] = hold.id, now_s + ttl_s
                return feed.Held(wish.id, hold.pinned, hold.loading, hold.missing)
        self.refused += 1
        return feed.Held(wish.id, refused=refused)

    def end(self, subscriber: bytes, wish: feed.Unhold) -> None:
        """Hold no longer what it asked for under that id, if that is held still."""
        account = self._accounts.get(subscriber)
        found = None if account is None else account.open.pop(wish.id, None)
        if found is not None:
            self._holds.end(found[0])

    def forget(self, subscriber: bytes) -> None:
        """It is gone; its holds end by their time."""
        self._accounts.pop(subscriber, None)


def _limit(account: _Account, wish: feed.Hold, now_s: float) -> str:
    """Why this one is too much; empty if it is not."""
    mine = account.open
    if len(mine) >= OPEN_MAX:
        for number in [number for number, (_, until_s) in mine.items() if until_s <= now_s]:
            del mine[number]
    if len(mine) >= OPEN_MAX:
        return f"{len(mine)} holds of one index; the limit is {OPEN_MAX}: end one"
    if wish.id in mine:
        return f"hold {wish.id} is there; give each a number of its own"
    if not wish.ttl_s >= 0 or not 1 <= len(wish.keys) <= feed.KEYS_MAX:
        return f"{len(wish.keys)} keys for {wish.ttl_s} s; give 1 to {feed.KEYS_MAX}, for 0 s or more"
    fresh = (now_s - account.left_s) * _KEYS_PER_S
    account.keys_left, account.left_s = min(_BURST_KEYS, account.keys_left + fresh), now_s
    cost = _HOLD_IN_KEYS + len(wish.keys)
    if cost > account.keys_left:
        return f"holds of more than {_KEYS_PER_S:.0f} keys a second; ask for fewer, or less often"
    account.keys_left -= cost
    return ""
