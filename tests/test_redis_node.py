"""Daemons of two nodes, each with its own arena, that share one Redis; and that Redis when it fails.

Through all of it no wrong byte is read, no call outlasts its deadline, memory goes on at its usual speed, the
log says once that the tier fails and once that it is back, nothing stays in Redis that nobody names, and
afterwards blocks pass between the nodes again.
"""

import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import pytest
from redis.crc import key_slot

from kvstore.block import HitLength, Namespace
from kvstore.errors import DeadlineExceeded, TierError
from kvstore.statistics import TierCounters
from tests.node import Node, wait_for, written
from tests.proxy import Proxy
from tests.redis_servers import Cluster, Sentinels, Server
from tests.test_cli import Command, on
from tests.test_client import MIB, keys
from tests.test_nvme_faults import BACK, FAILS, Pace, mixed, promptly
from tests.test_nvme_node import KIB, NOISE_S, config, metrics, noise
from tests.test_redis_tier import closed_to, cluster_url, names, sentinel_url
from tiers.header import Names

NAMESPACE = Namespace(model="shared")
TIMEOUT_S = 0.5
OPENED = 'kvstore_tier_breaker_opened_total{medium="remote",tier="redis"}'
OPEN = 'kvstore_tier_breaker_open{medium="remote",tier="redis"}'

Item = tuple[bytes, int]


@dataclass
class Site:
    """A Redis, two nodes that use it, and a third that has what it has from there."""

    server: Server
    first: Node
    second: Node
    third: Node

    @property
    def pair(self) -> tuple[Node, Node]:
        """The two."""
        return self.first, self.second


@contextmanager
def node(url: str, dram: str = "32MiB") -> Iterator[Node]:
    """A daemon that finds a slow Redis late sooner than others would, and soon asks again."""
    settings = f'[redis]\nurl = "{url}"\ntimeout_s = {TIMEOUT_S}\nmissing_s = 0.1\n'
    with (
        TemporaryDirectory(prefix="kvstore-test-") as folder,
        Node(dram, "--config", config(Path(folder), settings)) as node,
    ):
        yield node


@pytest.fixture(scope="module")
def _site() -> Iterator[Site]:
    with (
        Server(user="kv", password="secret") as server,
        node(server.url) as first,
        node(server.url) as second,
        node(server.url) as third,
    ):
        yield Site(server, first, second, third)


@pytest.fixture
def site(_site: Site) -> Iterator[Site]:
    """Nodes that trust their Redis, before and after; at the end nothing may be wrong anywhere."""
    yield _site
    for each in (*_site.pair, _site.third):
        wait_for(lambda each=each: healthy(each))
        each.check()
        assert "Traceback" not in each.log
    wait_for(lambda: not left_for_ever(_site.server))


def healthy(node: Node) -> bool:
    """Whether its daemon trusts Redis."""
    with node.client() as store:
        return not store.statistics().tiers[-1].breaker_open


def put_all(node: Node, items: Sequence[Item]) -> None:
    """Store blocks, and wait until Redis has them."""
    with node.client() as store:
        for key, nbytes in items:
            store.put(NAMESPACE, key, noise(key, nbytes), timeout_s=20)
        wait_for(lambda: written(store))


def get_all(node: Node, items: Sequence[Item], within_s: float = 5.0) -> int:
    """How many of these are there; each must be right, and told of in time."""
    found = 0
    with node.client() as store:
        for key, nbytes in items:
            data = promptly(lambda key=key: store.get(NAMESPACE, key, timeout_s=within_s), within_s)
            assert data is None or data == noise(key, nbytes), f"wrong bytes for {key!r}"
            found += data is not None
    return found


def transitions(node: Node, since: int = 0) -> list[str]:
    """What the log says of the tier's state, in order."""
    return re.findall(f"tier redis (?:{FAILS}|{BACK})", node.log[since:])


def reason(node: Node) -> str:
    """Why the tier failed last, as the log has it."""
    return str(re.findall(f"{FAILS}: (.*)", node.log)[-1])


def left_for_ever(server: Server) -> list[bytes]:
    """Parts that no header names and that do not go by themselves."""
    nonces: dict[bytes, bytes] = {}
    left = []
    for name in names(server):
        block, _, rest = name.partition(b"}:")
        if rest and server.client.pttl(name) == -1:
            if block not in nonces:
                header = server.client.get(block + b"}")
                nonces[block] = b"" if header is None else msgspec.msgpack.decode(header)[5].hex().encode()
            if rest.partition(b":")[0] != nonces[block]:
                left.append(name)
    return left


def assert_blocks_pass(site: Site, tag: str) -> None:
    """What either stores, the other gets."""
    for number, (giver, taker) in enumerate((site.pair, site.pair[::-1])):
        items = mixed(keys(10, f"{tag} {number}"))
        put_all(giver, items)
        assert get_all(taker, items) == len(items)


# What nodes share.


def test_what_one_node_stores_the_other_gets_bit_for_bit(site: Site) -> None:
    items = [*mixed(keys(20, "shared")), (b"two parts", 3 * MIB)]
    names = [key for key, _ in items]
    put_all(site.first, items)
    with site.second.client() as store:
        # Who does not wait asks nobody.
        assert store.hit_length(NAMESPACE, names) == HitLength()
        with store.acquire(NAMESPACE, names, wait_s=0) as read:
            assert read.hit_length == 0
        with store.acquire(NAMESPACE, names, wait_s=5) as read:
            assert [bytes(view) for view in read.views] == [noise(key, nbytes) for key, nbytes in items]
        assert store.hit_length(NAMESPACE, names).dram == len(items)
    assert_blocks_pass(site, "both ways")


def test_who_acquires_from_memory_does_not_wait_for_anothers_load_from_redis(site: Site) -> None:
    many = [(key, 2 * MIB) for key in keys(8, "much")]
    put_all(site.first, many)
    with (
        Proxy(("127.0.0.1", site.server.port), bytes_per_s=10e6) as slow,
        node(slow.address.replace("tcp", "redis").replace("//", "//kv:secret@"), "64MiB") as late,
        late.client() as loading,
        late.client() as reading,
    ):
        reading.put(NAMESPACE, b"here", bytes(KIB))
        loaded = threading.Event()

        def load() -> None:
            with loading.acquire(NAMESPACE, [key for key, _ in many], wait_s=10) as lease:
                assert [bytes(view) for view in lease.views] == [noise(*each) for each in many]
            loaded.set()

        thread = threading.Thread(target=load)
        thread.start()
        took_s = []
        while not loaded.wait(0.005):
            started = time.monotonic()
            with reading.acquire(NAMESPACE, [b"here"]) as lease:
                assert lease.hit_length == 1
            took_s.append(time.monotonic() - started)
            assert thread.is_alive() or loaded.is_set()
        thread.join()
        assert len(took_s) > 50  # 16 MiB took more than a second
        assert max(took_s) < 0.5


def test_blocks_outlive_the_node_that_stored_them(site: Site) -> None:
    items = mixed(keys(20, "outlived"))
    with node(site.server.url) as brief:
        put_all(brief, items)
        brief.kill()
        assert get_all(site.second, items) == len(items)
        brief.start()
        assert get_all(brief, items) == len(items)
        brief.check()


def test_a_key_that_nobody_has_is_a_miss_at_once_and_not_asked_for_again_so_soon(site: Site) -> None:
    with site.second.client() as store:
        asked = store.statistics().tiers[-1].counters.asked_blocks
        for _ in range(3):
            assert promptly(lambda: store.get(NAMESPACE, b"nobody", timeout_s=20), 0.2) is None
        assert asked < store.statistics().tiers[-1].counters.asked_blocks <= asked + 3
        put_all(site.first, [(b"nobody", 5000)])
        wait_for(lambda: store.get(NAMESPACE, b"nobody", timeout_s=5) == noise(b"nobody", 5000))


def test_what_is_removed_on_one_node_is_gone_from_redis(site: Site) -> None:
    items = mixed(keys(10, "removed"))
    put_all(site.first, items)
    assert get_all(site.second, items[:5]) == 5
    held = set(names(site.server))
    with site.first.client() as store:
        assert store.remove(NAMESPACE, [key for key, _ in items]) == 10
    gone = held - set(names(site.server))
    assert len(gone) == 20
    assert get_all(site.first, items) == get_all(site.second, items[5:]) == 0


def test_of_different_bytes_under_one_key_one_is_shared_and_none_is_mixed(site: Site) -> None:
    ours, theirs = b"\x01" * (3 * MIB), b"\x02" * (3 * MIB)
    before = site.first.log + site.second.log
    refused = sum(remote_counters(each).refused_blocks for each in site.pair)
    for turn in range(4):
        key = b"disputed %d" % turn
        with site.first.client() as one, site.second.client() as two:
            threads = [
                threading.Thread(target=store.put, args=(NAMESPACE, key, data))
                for store, data in ((one, ours), (two, theirs))
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(20)
            wait_for(lambda one=one, two=two: written(one) and written(two))
            assert (one.get(NAMESPACE, key), two.get(NAMESPACE, key)) == (ours, theirs)
    with site.third.client() as store:
        shared = [store.get(NAMESPACE, b"disputed %d" % turn) for turn in range(4)]
        assert all(data in (ours, theirs) for data in shared)
    assert sum(remote_counters(each).refused_blocks for each in site.pair) == refused + 4
    log = site.first.log + site.second.log
    assert "is there with other bytes, written by somebody else" in log
    assert len(log) > len(before)


def remote_counters(node: Node) -> TierCounters:
    """What its daemon has counted of Redis."""
    with node.client() as store:
        return store.statistics().tiers[-1].counters


def block_names(server: Server, key: bytes) -> list[bytes]:
    """What Redis holds of one block, its header first."""
    return sorted(server.client.scan_iter(f"kvstore:{{{NAMESPACE.id.hex()}:{key.hex()}}}*"))


def test_a_missing_part_is_a_miss_that_takes_the_rest_along(site: Site) -> None:
    put_all(site.first, [(b"cut", 5 * MIB), (b"whole", 5000)])
    lost = remote_counters(site.second).lost_blocks
    header, _, part, _ = block_names(site.server, b"cut")
    site.server.client.delete(part)
    assert get_all(site.second, [(b"cut", 5 * MIB), (b"whole", 5000)]) == 1
    assert remote_counters(site.second).lost_blocks == lost + 1
    wait_for(lambda: block_names(site.server, b"cut") == [])
    assert header not in names(site.server)
    put_all(site.second, [(b"cut", 5 * MIB)])
    assert get_all(site.third, [(b"cut", 5 * MIB)]) == 1


@pytest.mark.parametrize("change", [b"altered", b"short"])
def test_a_value_that_is_not_what_it_was_is_a_miss_counted_and_removed(site: Site, change: bytes) -> None:
    key = b"value " + change
    put_all(site.first, [(key, 3 * MIB)])
    damaged = remote_counters(site.second).damaged_blocks
    _, part, _ = block_names(site.server, key)
    if change == b"short":
        site.server.client.set(part, site.server.client.get(part)[:1000])
    else:
        site.server.client.setrange(part, 99, b"\x00\xff\x00")
    assert get_all(site.second, [(key, 3 * MIB)]) == 0
    assert remote_counters(site.second).damaged_blocks == damaged + 1
    assert "tier redis: a block is damaged and dropped" in site.second.log
    wait_for(lambda: block_names(site.server, key) == [])
    assert healthy(site.second)


def test_a_node_killed_amid_writing_leaves_nothing_for_ever(site: Site) -> None:
    items = [(key, 5 * MIB) for key in keys(12, "killed")]
    with node(site.server.url, "128MiB") as victim, victim.client() as store:
        for key, nbytes in items:
            store.put(NAMESPACE, key, noise(key, nbytes))
        wait_for(lambda: len(names(site.server, f"*:{b'killed'.hex()}*")) > 10)
        victim.kill()
    wait_for(lambda: not left_for_ever(site.server))
    assert get_all(site.second, items) >= 1


def test_the_command_line_asks_redis_and_does_not_say_how_full_it_is(site: Site) -> None:
    put_all(site.first, [(b"looked up", KIB)])
    lookup = ["lookup", "looked up", "--model", NAMESPACE.model, *on(site.third)]
    assert Command(*lookup, "--wait", "0").text == "gpu 0  dram 0  nvme 0  remote 0\n"
    assert Command(*lookup, "--wait", "5").text == "gpu 0  dram 0  nvme 0  remote 1\n"
    redis = Command("stats", *on(site.third)).text.partition("tier redis")[2].partition("salts")[0]
    assert re.search(r"\bblocks\b", redis)
    assert not re.search("capacity_bytes|used_bytes|free_bytes|limit_bytes", redis)


# When Redis fails.


@contextmanager
def killed(server: Server) -> Iterator[None]:
    server.kill()
    try:
        yield
    finally:
        server.start()


@contextmanager
def stopped(server: Server) -> Iterator[None]:
    with server.stopped():
        yield


@contextmanager
def full(server: Server) -> Iterator[None]:
    server.client.config_set("maxmemory", 1)
    try:
        yield
    finally:
        server.client.config_set("maxmemory", 0)


@contextmanager
def read_only(server: Server) -> Iterator[None]:
    server.client.replicaof("127.0.0.1", 1)
    try:
        yield
    finally:
        server.client.replicaof("NO", "ONE")


FAULTS = {
    killed: "see whether it is up and can be reached",
    stopped: "no answer|Timeout",
    full: "raise its maxmemory",
    read_only: "it is a replica: name the primary",
    closed_to: "check redis.username and redis.password_file",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__.replace("_", " "))
def test_while_redis_fails_nodes_go_on_by_themselves_and_share_again_when_it_is_back(
    site: Site, fault: Callable[[Server], object]
) -> None:
    items = mixed(keys(20, f"before {fault.__name__}"))
    put_all(site.first, items)
    assert get_all(site.second, items[:10]) == 10
    since = {each: len(each.log) for each in site.pair}
    opened = {each: metrics(each)[OPENED] for each in site.pair}
    meanwhile = mixed(keys(5, f"during {fault.__name__}"))
    with site.first.client() as one, site.second.client() as two:
        paces = Pace(one), Pace(two)
        with fault(site.server):  # type: ignore[attr-defined]
            # What is not here costs no more than the tier's time limit, and after that nothing.
            get_all(site.second, items[10:12], 2 * TIMEOUT_S)
            for each, store in zip(site.pair, (one, two), strict=True):
                for key, nbytes in meanwhile:
                    promptly(lambda k=key, n=nbytes, s=store: s.put(NAMESPACE, k, noise(k, n)), 0.5)
                    assert store.get(NAMESPACE, key) == noise(key, nbytes)
                wait_for(lambda each=each: not healthy(each))
                assert metrics(each)[OPEN] == 1
                promptly(lambda each=each: get_all(each, items[12:]), 1)
            for pace in paces:
                pace.check()
            with pytest.raises(TierError, match="redis"):
                one.remove(NAMESPACE, [items[-1][0]])
        for each in site.pair:
            wait_for(lambda each=each: healthy(each))
    for each in site.pair:
        assert transitions(each, since[each]) == [f"tier redis {FAILS}", f"tier redis {BACK}"], each.log
        assert metrics(each)[OPENED] == opened[each] + 1
        assert re.search(FAULTS[fault], reason(each))
    assert_blocks_pass(site, f"after {fault.__name__}")
    # What was stored meanwhile, or is in memory and lost there, is shared after all; what was removed is not.
    wait_for(lambda: healthy(site.third))
    assert get_all(site.third, [*items[:-1], *meanwhile]) == len(items) - 1 + len(meanwhile)
    assert get_all(site.third, items[-1:]) == 0


def test_flushed_amid_reading_costs_blocks_and_they_are_shared_again(site: Site) -> None:
    items = [(key, 300 * KIB) for key in keys(60, "flushed")]
    put_all(site.first, items)
    found: list[int] = []
    before = remote_counters(site.second).read_blocks
    reading = threading.Thread(target=lambda: found.append(get_all(site.second, items)))
    reading.start()
    wait_for(lambda: remote_counters(site.second).read_blocks > before + 5)
    site.server.client.flushall()
    reading.join(30)
    print(f"{found} of 60 were read")
    # Who has blocks in memory shares them anew, as soon as he has noticed.
    wait_for(lambda: get_all(site.second, items) == 60)
    assert "what it holds is gone, or not the same" in reason(site.first)
    assert_blocks_pass(site, "after a flush")


def test_a_node_starts_without_redis_and_shares_once_it_is_there() -> None:
    with Server() as server:
        server.kill()
        with node(server.url) as early:
            assert transitions(early) == [f"tier redis {FAILS}"]
            put = mixed(keys(10, "early"))
            with early.client() as store:
                for key, nbytes in put:
                    store.put(NAMESPACE, key, noise(key, nbytes))
            server.start()
            wait_for(lambda: healthy(early))
            with early.client() as store:
                wait_for(lambda: written(store) and store.statistics().tiers[-1].blocks == 10)
            assert transitions(early)[1:] == [f"tier redis {BACK}"]
            with node(server.url) as late:
                assert get_all(late, put) == 10


# When the primary is another, under load.


class Load:
    """Writers and readers on both nodes, until it is left; no wrong byte, and no call too late."""

    def __init__(self, nodes: Sequence[Node], tag: str) -> None:
        self._nodes = nodes
        self._tag = tag
        self._over = threading.Event()
        self.stored: dict[bytes, int] = {}
        self.read = 0
        self.wrong: list[str] = []
        self._threads = [
            threading.Thread(target=work, args=(each, number))
            for number, each in enumerate(nodes)
            for work in (self._write, self._read)
        ]

    def _write(self, node: Node, number: int) -> None:
        chance = random.Random(number)
        with node.client() as store:
            count = 0
            while not self._over.wait(0.005):
                count += 1
                key = f"{self._tag} {number} {count}".encode()
                nbytes = chance.choice([5000, 100 * KIB, 2 * MIB + 1])
                try:
                    self._timed(lambda k=key, n=nbytes: store.put(NAMESPACE, k, noise(k, n), timeout_s=3), 3)
                except DeadlineExceeded:
                    continue
                self.stored[key] = nbytes

    def _read(self, node: Node, number: int) -> None:
        chance = random.Random(number)
        with node.client() as store:
            while not self._over.wait(0.002):
                key, nbytes = chance.choice([*list(self.stored.items())[-40:], (b"nobody", 1)])
                data = self._timed(lambda k=key: store.get(NAMESPACE, k, timeout_s=1), 1)
                self.read += data is not None
                if data is not None and data != noise(key, nbytes):
                    self.wrong.append(f"other bytes for {key!r}")

    def _timed(self, call: Callable[[], object], within_s: float) -> object:
        started = time.monotonic()
        try:
            return call()
        finally:
            took_s = time.monotonic() - started
            if took_s > within_s + NOISE_S:
                self.wrong.append(f"{took_s:.2f} s in place of {within_s}")

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(30)
        assert self.wrong == []


def move(cluster: Cluster, name: bytes) -> None:
    """Move the slot of what is called `name` to another server."""
    owner = cluster.master_of(name)
    to = next(each for each in cluster.servers[:3] if each is not owner)
    for _ in cluster.move(key_slot(name), to):
        pass


def share(nodes: Sequence[Node]) -> None:
    """Wait until blocks are written to Redis again."""
    for each in nodes:
        wait_for(lambda each=each: healthy(each))
    before = [remote_counters(each).written_blocks for each in nodes]
    wait_for(
        lambda: all(
            remote_counters(each).written_blocks > n + 10 for each, n in zip(nodes, before, strict=True)
        )
    )


@pytest.mark.parametrize("kind", ["cluster", "sentinel"])
def test_a_failover_and_a_moving_slot_under_load_cost_some_blocks_for_some_seconds(kind: str) -> None:
    with ExitStack() as stack:
        servers = stack.enter_context(Cluster() if kind == "cluster" else Sentinels())
        url = cluster_url(servers) if isinstance(servers, Cluster) else sentinel_url(servers)
        nodes = [stack.enter_context(node(url)) for _ in range(2)]
        with Load(nodes, kind) as load:
            wait_for(lambda: load.read > 50)
            if isinstance(servers, Cluster):
                for key in list(load.stored)[-10:]:
                    move(servers, Names("kvstore").header(NAMESPACE.id, key).encode())
                assert all(map(healthy, nodes))
                servers.fail_over(b"any")
            else:
                servers.fail_over()
            share(nodes)
            late = dict(list(load.stored.items())[-4:])
        for each in nodes:
            with each.client() as store:
                wait_for(lambda store=store: written(store))
            assert "Traceback" not in each.log
            assert len(transitions(each)) in (0, 2), each.log
            each.check()
        with node(url) as third:
            assert get_all(third, list(late.items())) == len(late)
        print(f"{len(load.stored)} stored, {load.read} read")
