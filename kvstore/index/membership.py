"""Which daemons exist: from a list, from DNS, from Redis. It connects to none of them.

10.0.0.7:7404, NODE=10.0.0.7:7404    that one
dns://kvstore-nodes.ns.svc:7404      one at each address, as a headless service of Kubernetes has them
redis://HOST:6379/0                  those that have registered there; rediss://, unix:///PATH
"""

import asyncio
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final

from kvstore.errors import Unavailable
from kvstore.index.member import (
    MEMBERS_MAX,
    Member,
    Outage,
    Source,
    address_of,
    checked_address,
    host_and_port,
)
from kvstore.index.registry import Registered

logger = logging.getLogger(__name__)

# What a source that fails has said last counts so long.
KEPT_S: Final = 30.0
# A member that no source names any more and that is not heard is one no longer after so long.
GRACE_S: Final = 10.0
_DNS_PERIOD_S: Final = 5.0
_DEADLINE_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class SourceStatistics:
    """One source: how many it has named last and how long ago, how often it failed, and why it does now.

    `rubbish` counts what it named that is no member.
    """

    label: str
    members: int
    age_s: float
    failures: int
    failing: str
    rubbish: int


@dataclass(frozen=True, slots=True)
class MembershipStatistics:
    """Those there are, and who says so."""

    members: int
    sources: list[SourceStatistics]


class Membership:
    """Asks its sources from `start` to `close`, and tells of those who joined and those who left.

    A member leaves when no source names it and its feed has not been heard for GRACE_S. As long as it is
    heard it stays, whatever is said of it: a pod that is not ready or a Redis that was emptied takes nothing
    from what can be read there. Whoever is gone is silent, so nothing stale answers meanwhile.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        on_change: Callable[[Collection[Member], Collection[Member]], None],
        is_heard: Callable[[Member], bool],
    ) -> None:
        self._listings = [_Listing(source) for source in sources]
        self._on_change = on_change
        self._is_heard = is_heard
        self._members: dict[str, Member] = {}
        self._wanted_s: dict[str, float] = {}
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to ask, on the running loop."""
        self._tasks = [asyncio.create_task(self._follow(listing)) for listing in self._listings]

    async def close(self) -> None:
        """Ask nobody any more; the members stay."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for listing in self._listings:
            await listing.source.close()

    @property
    def members(self) -> Collection[Member]:
        """All there are now."""
        return self._members.values()

    def statistics(self) -> MembershipStatistics:
        """All of it now."""
        now_s = time.monotonic()
        return MembershipStatistics(
            len(self._members), [listing.statistics(now_s) for listing in self._listings]
        )

    async def _follow(self, listing: "_Listing") -> None:
        while True:
            await listing.ask()
            self._merge(time.monotonic())
            await asyncio.sleep(listing.source.period_s)

    def _merge(self, now_s: float) -> None:
        listed: dict[str, Member] = {}
        for listing in self._listings:
            for member in listing.standing(now_s):
                if member.name is not None or member.address not in listed:
                    listed[member.address] = member
        joined = [member for member in listed.values() if self._is_new(member)]
        for address, member in self._members.items():
            if address in listed or self._is_heard(member):
                self._wanted_s[address] = now_s
        left = [self._members[address] for address, at_s in self._wanted_s.items() if now_s - at_s > GRACE_S]
        room = MEMBERS_MAX - len(self._members) + len(left)
        self._change(joined[:room], left, now_s)

    def _is_new(self, member: Member) -> bool:
        known = self._members.get(member.address)
        return known is None or member.name not in (None, known.name)

    def _change(self, joined: list[Member], left: list[Member], now_s: float) -> None:
        # Another daemon at the address of one that is known takes its place.
        replaced = [self._members.get(member.address) for member in joined]
        left = left + [member for member in replaced if member is not None]
        for member in left:
            del self._members[member.address]
            del self._wanted_s[member.address]
        for member in joined:
            self._members[member.address] = member
            self._wanted_s[member.address] = now_s
        if joined or left:
            logger.info("members: %d joined, %d left, %d in all", len(joined), len(left), len(self._members))
            self._on_change(joined, left)


class _Listing:
    """What a source said last."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._said: frozenset[Member] = frozenset()
        self._said_s = time.monotonic()
        self._outage = Outage(f"members from {source.label}")

    async def ask(self) -> None:
        """Let it say again; where it cannot, what it said before stands for a while."""
        try:
            async with asyncio.timeout(_DEADLINE_S):
                self._said = frozenset(await self.source.members())
        except OSError as error:
            self._outage.failed(error)
            return
        self._said_s = time.monotonic()
        self._outage.over()

    def standing(self, now_s: float) -> Collection[Member]:
        """What it said, unless that is too long ago."""
        return self._said if now_s - self._said_s <= KEPT_S else ()

    def statistics(self, now_s: float) -> SourceStatistics:
        """All of it now."""
        source, outage = self.source, self._outage
        age_s = now_s - self._said_s
        return SourceStatistics(
            source.label, len(self._said), age_s, outage.count, outage.reason, source.rubbish
        )


# Sources.


def source_of(place: str, *, prefix: str = "kvstore") -> Source:
    """The source that a place names: see the top. `prefix` is what the daemons' keys in Redis begin with.

    Raises:
        ConfigError: it names none.
    """
    scheme, found, _ = place.partition("://")
    if not found:
        name, _, address = place.rpartition("=")
        return Listed(Member(checked_address(address, place), name or None))
    if scheme == "dns":
        host, port = host_and_port(place.removeprefix("dns://"), place)
        return Resolved(host, port)
    return Registered(place, prefix)


class Listed:
    """One daemon that is always a member."""

    def __init__(self, member: Member) -> None:
        self.label = member.address
        self.period_s = GRACE_S
        self.rubbish = 0
        self._member = member

    async def members(self) -> Collection[Member]:
        return [self._member]

    async def close(self) -> None:
        """Nothing."""


async def resolve(host: str, port: int) -> Collection[str]:
    """The IP addresses of a host, as this machine's resolver has them."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return {str(address[0]) for *_, address in found}


class Resolved:
    """The daemons at all addresses of one host. A resolver that hangs is waited for, not asked again."""

    def __init__(
        self, host: str, port: int, resolve: Callable[[str, int], Awaitable[Collection[str]]] = resolve
    ) -> None:
        self.label = f"dns://{host}:{port}"
        self.period_s = _DNS_PERIOD_S
        self.rubbish = 0
        self._host, self._port = host, port
        self._resolve = resolve
        self._asking: asyncio.Future[Collection[str]] | None = None

    async def members(self) -> Collection[Member]:
        if self._asking is None:
            self._asking = asyncio.ensure_future(self._resolve(self._host, self._port))
        await asyncio.wait({self._asking})  # leaves it alone when the time is over
        asking, self._asking = self._asking, None
        try:
            hosts = asking.result()
        except UnicodeError as exc:
            raise Unavailable(f"{self._host!r} is no name of a host: {exc}") from exc
        if not hosts:
            raise Unavailable(f"{self._host} has no address")
        return [Member(address_of(host, self._port)) for host in hosts]

    async def close(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait({self._asking})
