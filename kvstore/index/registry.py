"""Daemons in Redis: each keeps a key that expires, and indexes read them all.

PREFIX:node:NAME holds {"feed", "epoch", "engines"} as JSON for some seconds, and PREFIX:nodes the names, by
when they registered last: a Redis that is shared with blocks has too many keys to look for some among them.
"""

import asyncio
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import msgspec

from kvstore.errors import ConfigError, Unavailable
from kvstore.index.member import MEMBERS_MAX, Member, Outage, checked_address

if TYPE_CHECKING:
    from redis.asyncio import Redis

BEAT_S: Final = 3.0
TTL_S: Final = 10
_DEADLINE_S: Final = 2.0
_SCHEMES: Final = ("redis", "rediss", "unix")
_VALUE_BYTES_MAX: Final = 64 << 10
# Names of nodes that have not registered for so long are taken off the list.
_FORGOTTEN_S: Final = 86_400.0


class _Record(msgspec.Struct, frozen=True):
    """What a daemon registers."""

    feed: str
    epoch: int
    engines: list[str] = []


_decoder: Final = msgspec.json.Decoder(_Record)


class Registered:
    """The daemons that keep a key in a Redis. Reads alone."""

    def __init__(self, url: str, prefix: str) -> None:
        self.label = _without_password(url)
        self.period_s = BEAT_S
        self.rubbish = 0
        self._redis = _Redis(url)
        self._prefix = prefix

    async def members(self) -> Collection[Member]:
        key = _names_key(self._prefix)
        names: list[bytes] = await self._redis.call("zrange", key, 0, MEMBERS_MAX - 1, desc=True)
        if not names:
            return []
        values: list[bytes | None] = await self._redis.call(
            "mget", [_node_key(self._prefix, name) for name in names]
        )
        found = [
            self._member(name, value) for name, value in zip(names, values, strict=True) if value is not None
        ]
        return [member for member in found if member is not None]

    def _member(self, name: bytes, value: bytes) -> Member | None:
        try:
            if len(value) > _VALUE_BYTES_MAX:
                raise ConfigError(f"{len(value)} bytes; the limit is {_VALUE_BYTES_MAX}")
            return Member(checked_address(_decoder.decode(value).feed), name.decode())
        except (ConfigError, UnicodeError, msgspec.MsgspecError):
            self.rubbish += 1
            return None

    async def close(self) -> None:
        await self._redis.close()


class Registration:
    """A daemon's key in Redis, from `start` to `stop`. Redis away costs a line in the log, nothing else."""

    def __init__(
        self,
        url: str,
        *,
        prefix: str = "kvstore",
        node: str,
        feed: str,
        epoch: int,
        engines: Sequence[str] = (),
    ) -> None:
        """`feed` is where indexes reach it, "HOST:PORT".

        Raises:
            ConfigError: the URL or the address is none.
        """
        self._redis = _Redis(url)
        self._node = node
        self._names_key = _names_key(prefix)
        self._node_key = _node_key(prefix, node.encode())
        self._value = msgspec.json.encode(_Record(checked_address(feed), epoch, list(engines)))
        self._outage = Outage(f"registering in {_without_password(url)}")
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Register, and go on doing so; never waits."""
        self._task = asyncio.create_task(self._go_on())

    async def stop(self) -> None:
        """Take the key away, unless another life of this node has it by now. At most 2 s."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        with suppress(OSError):
            async with asyncio.timeout(_DEADLINE_S):
                if await self._redis.call("get", self._node_key) == self._value:
                    await self._redis.call("delete", self._node_key)
        await self._redis.close()

    async def _go_on(self) -> None:
        while True:
            try:
                async with asyncio.timeout(_DEADLINE_S):
                    await self._beat()
            except OSError as error:
                self._outage.failed(error)
            else:
                self._outage.over()
            await asyncio.sleep(BEAT_S)

    async def _beat(self) -> None:
        now_s = time.time()
        await self._redis.call("set", self._node_key, self._value, ex=TTL_S)
        await self._redis.call("zadd", self._names_key, {self._node: now_s})
        await self._redis.call("zremrangebyscore", self._names_key, "-inf", now_s - _FORGOTTEN_S)


class _Redis:
    """One Redis, connected to when first asked."""

    def __init__(self, url: str) -> None:
        if urlsplit(url).scheme not in _SCHEMES:
            raise ConfigError(
                f"{_without_password(url)!r:.80} is no registry; give redis://HOST:PORT/0, rediss:// or unix:///PATH"
            )
        self._url = url
        self._client: Redis | None = None

    async def call(self, command: str, *arguments: Any, **options: Any) -> Any:
        """The answer to a command.

        Raises:
            Unavailable: there is none.
        """
        from redis.exceptions import RedisError  # 0.1 s, for those who use it

        try:
            if self._client is None:
                self._client = _connected(self._url)
            return await getattr(self._client, command)(*arguments, **options)
        except (RedisError, OSError, ValueError) as exc:
            raise Unavailable(f"{command}: {exc}") from exc

    async def close(self) -> None:
        """Say nothing more."""
        if self._client is not None:
            with suppress(OSError):
                await self._client.aclose()


def _connected(url: str) -> "Redis":
    from redis.asyncio import Redis
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff

    # Once more at once: a connection that was kept may have ended since.
    return Redis.from_url(
        url, retry=Retry(NoBackoff(), 1), socket_timeout=_DEADLINE_S, socket_connect_timeout=_DEADLINE_S
    )


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _names_key(prefix: str) -> str:
    return f"{prefix}:nodes"


def _node_key(prefix: str, node: bytes) -> bytes:
    return prefix.encode() + b":node:" + node
