"""Where a Redis is and how to reach it: one server, the primary that Sentinel names, or a cluster.

redis-py finds, connects, authenticates and encrypts; this chooses between its classes, from a URL, and gives
out their connections. Valkey is the same. Nothing here knows a block.
"""

import socket
import ssl
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from redis import Redis, RedisCluster
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode
from redis.connection import ConnectionPool
from redis.credentials import CredentialProvider
from redis.exceptions import AskError, ClusterError, RedisClusterException, RedisError, TryAgainError
from redis.retry import Retry
from redis.sentinel import Sentinel

from kvstore.errors import ConfigError

# All that redis-py raises for what is not a mistake of ours.
FAILURES: Final = (RedisError, RedisClusterException, OSError)
# What a command meets while a cluster changes: later it will go.
CHANGING: Final = (AskError, TryAgainError, ClusterError, RedisClusterException)
_KINDS: Final = ("", "sentinel", "cluster")
_PORT: Final = 6379
_SENTINEL_PORT: Final = 26379
_FORMS: Final = (
    "redis://host:6379/0, unix:///path, redis+sentinel://host:26379,host:26379/primary or "
    "redis+cluster://host:6379,host:6379; rediss for TLS"
)


@dataclass(frozen=True, slots=True)
class RedisPlace:
    """Where it is. Files are read whenever a connection is made, so what is put there anew is used."""

    url: str
    username: str = ""
    password_file: str = ""
    sentinel_password_file: str = ""
    tls_ca: str = ""
    tls_certificate: str = ""
    tls_key: str = ""
    timeout_s: float = 2.0


class RedisServers:
    """The servers behind one URL. Connects to nothing before `open`; all methods block, and raise FAILURES.

    Raises:
        ConfigError: the URL is none of those forms.
    """

    def __init__(self, place: RedisPlace) -> None:
        parts = urlsplit(place.url)
        scheme, _, kind = parts.scheme.partition("+")
        hosts, user, password = _split_hosts(parts.netloc)
        self._place = place
        self._tls = scheme == "rediss"
        self._kind = kind
        self._name = parts.path.strip("/")
        known = (scheme, kind) == ("unix", "") or (scheme in ("redis", "rediss") and kind in _KINDS)
        if not known or (scheme == "unix") == bool(hosts) or (not kind and len(hosts) > 1):
            raise ConfigError(f"redis.url is {_without_password(place.url)!r}; give {_FORMS}")
        if kind == "sentinel" and not self._name:
            raise ConfigError(
                f"redis.url {_without_password(place.url)!r} names no primary; "
                "give redis+sentinel://host:26379/primary, as Sentinel calls it"
            )
        self._path = unquote(parts.path) if scheme == "unix" else ""
        self._addresses = [_address(host, _SENTINEL_PORT if kind == "sentinel" else _PORT) for host in hosts]
        self._database = _database(self._name, place.url) if not kind and scheme != "unix" else 0
        self._credentials = _Credentials(place.username or user, password, place.password_file)
        self.client: Redis | RedisCluster | None = None

    def __str__(self) -> str:
        return _without_password(self._place.url)

    def open(self) -> None:
        """Connect anew, to whatever is there now."""
        self.close()
        made: dict[str, Callable[[], Redis | RedisCluster]]
        made = {"": self._single, "sentinel": self._sentinel, "cluster": self._cluster}
        self.client = made[self._kind]()
        self.ping()

    def ping(self) -> None:
        """Ask every server that takes writes whether it answers; finds out where a cluster's have gone."""
        self.client.ping(**self._everywhere())  # type: ignore[union-attr]

    def pool(self, name: str) -> ConnectionPool:
        """Connections to the server that keeps what is called `name`."""
        if isinstance(self.client, RedisCluster):
            node = self.client.nodes_manager.get_node_from_slot(self.client.keyslot(name))
            return self.client.get_redis_connection(node).connection_pool
        return self.client.connection_pool  # type: ignore[union-attr]

    def values(self, names: Sequence[str]) -> list[bytes | None]:
        """What stands under each name, in one round; None for nothing, and for what is no string."""
        if not isinstance(self.client, RedisCluster):
            values: Any = self.client.mget(names)  # type: ignore[union-attr]
            if not isinstance(values, list) or len(values) != len(names):
                raise ConnectionError(
                    f"{len(names)} values were asked for, and {values!r:.40} is no such list"
                )
            return values
        pipeline = self.client.pipeline()
        for name in names:
            pipeline.get(name)
        found = pipeline.execute(raise_on_error=False)
        for value in found:
            if isinstance(value, Exception) and not str(value).startswith("WRONGTYPE"):
                raise value
        return [None if isinstance(value, Exception) else value for value in found]

    def covering(self, prefix: str) -> list[str]:
        """Names that begin with `prefix`, at least one for every server."""
        if not isinstance(self.client, RedisCluster):
            return [prefix]
        found: dict[int, str] = {}
        servers = len(self.client.get_primaries())
        for number in range(64 * servers):
            found.setdefault(id(self.pool(f"{prefix}:{number}")), f"{prefix}:{number}")
            if len(found) == servers:
                break
        return list(found.values())

    def interrupt(self) -> None:
        """Shut down all connections in use: whoever waits for an answer there gets an error now."""
        for pool in self._pools():
            for connection in list(pool._in_use_connections):
                if (sock := connection._sock) is not None:
                    with suppress(OSError):
                        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # also below TLS

    def close(self) -> None:
        """Close all idle connections; those in use when they are given back."""
        client, self.client = self.client, None
        if client is not None:
            client.close()

    def _everywhere(self) -> dict[str, Any]:
        return {"target_nodes": RedisCluster.PRIMARIES} if isinstance(self.client, RedisCluster) else {}

    def _pools(self) -> list[Any]:
        if isinstance(self.client, RedisCluster):
            clients = [node.redis_connection for node in self.client.get_nodes()]
        else:
            clients = [self.client]
        return [client.connection_pool for client in clients if client is not None]

    # One for each form of URL.

    def _single(self) -> Redis:
        if self._path:
            return Redis(unix_socket_path=self._path, **self._options(), **self._once())
        host, port = self._addresses[0]
        return Redis(host=host, port=port, db=self._database, **self._options(), **self._once())

    def _sentinel(self) -> Redis:
        secret = _Credentials("", "", self._place.sentinel_password_file)
        to_sentinels = {**self._options(), **self._once(), "credential_provider": secret}
        sentinel = Sentinel(self._addresses, sentinel_kwargs=to_sentinels, **self._options(), **self._once())
        primary: Redis = sentinel.master_for(self._name)
        return primary

    def _cluster(self) -> RedisCluster:
        nodes = [ClusterNode(host, port) for host, port in self._addresses]
        # Once more after it has been found out where the servers are now.
        return RedisCluster(startup_nodes=nodes, retry=Retry(NoBackoff(), 1), **self._options())

    def _once(self) -> dict[str, Any]:
        """Whether to ask again is decided above."""
        return {"retry": Retry(NoBackoff(), 0)}

    def _options(self) -> dict[str, Any]:
        place = self._place
        options: dict[str, Any] = {
            "credential_provider": self._credentials,
            "socket_timeout": place.timeout_s,
            "socket_connect_timeout": place.timeout_s,
            "socket_keepalive": True,
            "protocol": 2,
        }
        if self._tls:
            options |= {
                "ssl": True,
                "ssl_ca_certs": place.tls_ca or None,
                "ssl_certfile": place.tls_certificate or None,
                "ssl_keyfile": place.tls_key or None,
                "ssl_min_version": ssl.TLSVersion.TLSv1_2,
            }
        return options


@contextmanager
def socket_of(pool: ConnectionPool) -> Iterator[socket.socket]:
    """A connection's socket, for a conversation past redis-py; one that fails in the middle is closed."""
    connection: Any = pool.get_connection()
    try:
        sock = connection._sock
        yield sock
        sock.settimeout(connection.socket_timeout)
    except BaseException:
        connection.disconnect()
        raise
    finally:
        pool.release(connection)


class _Credentials(CredentialProvider):
    def __init__(self, username: str, password: str, password_file: str) -> None:
        self._username = username
        self._password = password
        self._file = password_file

    def get_credentials(self) -> Any:
        password = Path(self._file).read_text().strip() if self._file else self._password
        if not password:
            return ()
        return (self._username, password) if self._username else (password,)


def _split_hosts(netloc: str) -> tuple[list[str], str, str]:
    """Hosts, user and password of a URL with perhaps several hosts."""
    login, _, hosts = netloc.rpartition("@")
    user, _, password = login.partition(":")
    return [host for host in hosts.split(",") if host], unquote(user), unquote(password)


def _address(text: str, port: int) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{text}")
        if parts.hostname:
            return parts.hostname, parts.port or port
    except ValueError:
        pass
    raise ConfigError(f"redis.url has {text!r} for a host; give {_FORMS}")


def _database(text: str, url: str) -> int:
    if text and not text.isdecimal():
        raise ConfigError(
            f"redis.url {_without_password(url)!r}: database {text!r} is no number; give {_FORMS}"
        )
    return int(text or 0)


def _without_password(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"
