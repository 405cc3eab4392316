"""Health, metrics, and the daemon's start and end as an operator sees them."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from kvstore import protocol
from kvstore.block import Namespace
from kvstore.client import StoreClient
from kvstore.config import load
from kvstore.errors import ProtocolError, Unavailable
from kvstore.serve import Daemon
from kvstore.statistics import NodeStatistics, StoreCounters, TierCounters, TierState
from tests.node import Node, RawConnection, wait_for


def get(node: Node, path: str) -> tuple[int, str]:
    """Status and body."""
    try:
        with urllib.request.urlopen(f"http://{node.endpoint('http')}{path}", timeout=10) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def metrics(node: Node) -> dict[str, float]:
    """Samples of /metrics by name and labels."""
    status, text = get(node, "/metrics")
    assert status == 200
    return {
        name: float(value) for name, value in re.findall(r"^(kvstore_\S+) (\S+)$", text, flags=re.MULTILINE)
    }


def serve(node: Node, **changed: str) -> subprocess.CompletedProcess[str]:
    """A second daemon that is to fail, with some flags of its own."""
    flags = {"dram": "4MiB", "socket": str(node.folder / "second.sock"), "http": "127.0.0.1:0", **changed}
    command = [sys.executable, "-m", "kvstore", "serve"]
    for flag, value in flags.items():
        command += [f"--{flag}", value]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert "Traceback" not in done.stderr, done.stderr
    assert "kvstore ready" not in done.stdout
    return done


def test_health_says_that_it_lives_and_is_ready(node: Node) -> None:
    assert get(node, "/healthz") == (200, "ok\n")
    assert get(node, "/readyz") == (200, "ready\n")


def test_a_node_that_starts_or_stops_is_not_ready_and_says_why(tmp_path: Path, namespace: Namespace) -> None:
    faults = tmp_path / "faults"
    environ = {"KVSTORE_FAULTS": str(faults)}
    flags = ("--nvme", f"{tmp_path}/nvme:16MiB")
    with Node("4MiB", *flags, environ=environ, module="tests.faulty_daemon") as node:
        url = f"http://{node.endpoint('http')}"
        with node.client() as store:
            faults.write_text(" hang\n")
            store.put(namespace, b"k", b"bytes")  # and is not written
        node.process.send_signal(signal.SIGTERM)
        wait_for(lambda: get(node, "/readyz") == (503, "stopping\n"))
        faults.unlink()
        assert node.stop() == 0
    faults.write_text("opening hang\n")
    config = {"socket": str(tmp_path / "node.sock"), "http": url.removeprefix("http://")}
    command = [sys.executable, "-m", "tests.faulty_daemon", "serve", "--dram", "4MiB", *flags]
    command += [word for name, value in config.items() for word in (f"--{name}", value)]
    with subprocess.Popen(command, env={**os.environ, **environ}, stdout=subprocess.PIPE) as process:
        wait_for(lambda: readiness(url) == (503, "not listening\ntier nvme is being recovered\n"))
        faults.unlink()
        wait_for(lambda: readiness(url) == (200, "ready\n"))
        process.terminate()


def readiness(url: str) -> tuple[int, str]:
    """As `get` of /readyz, of a daemon that may not answer yet."""
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=10) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
    except urllib.error.URLError:
        return 0, ""


def test_a_node_without_enough_memory_yet_is_not_ready(tmp_path: Path) -> None:
    config = load(None, {"dram": {"capacity": "4MiB"}, "socket": str(tmp_path / "node.sock")})
    daemon = Daemon(config, lambda: config)
    assert daemon.readiness().missing == [
        "not listening",
        "the arena is being populated: 0 of 4194304 bytes",
    ]


def test_nothing_else_is_served(node: Node) -> None:
    for path in ("/", "/docs", "/metrics/../etc/passwd", "/statistics"):
        assert get(node, path)[0] == 404


def test_every_statistic_is_a_metric(node: Node, store: StoreClient, namespace: Namespace) -> None:
    store.put(namespace, b"one", bytes(5000))
    store.put(namespace, b"two", bytes(5000))
    assert store.get(namespace, b"one") == bytes(5000)
    store.remove(namespace, [b"two"])
    with store.acquire(namespace, [b"one"]):
        samples = metrics(node)
        now = store.statistics()
    for counter in fields(StoreCounters):
        name = f"kvstore_{counter.name}_total"
        assert samples[name] == getattr(now.counters, counter.name), name
    labels = '{medium="dram",tier="dram"}'
    for gauge in fields(TierState):
        if gauge.name not in ("name", "medium", "failing", "counters", "reads", "writes", "eviction_age_s"):
            name = f"kvstore_tier_{gauge.name}{labels}"
            assert samples[name] == getattr(now.tiers[0], gauge.name), name
    assert f"kvstore_tier_eviction_age_seconds{labels}" in samples
    for counter in fields(TierCounters):
        name = f"kvstore_tier_{counter.name}_total{labels}"
        assert samples[name] == getattr(now.tiers[0].counters, counter.name), name
    for calls in ("reads", "writes"):
        assert f"kvstore_tier_{calls}_seconds_count{labels}" in samples
    for field in fields(NodeStatistics):
        if field.name not in ("node", "epoch", "tiers", "counters", "salts", "events"):
            name = field.name.removesuffix("_s") + ("_seconds" if field.name.endswith("_s") else "")
            assert {f"kvstore_{name}", f"kvstore_{name}_total"} & samples.keys(), name
    assert samples["kvstore_sealed_blocks_total"] == 2
    assert samples["kvstore_removed_blocks_total"] == 1
    assert samples['kvstore_tier_pinned_blocks{medium="dram",tier="dram"}'] == 1
    assert samples['kvstore_tier_capacity_bytes{medium="dram",tier="dram"}'] == 64 << 20


def test_metrics_say_what_they_mean(node: Node) -> None:
    text = get(node, "/metrics")[1]
    assert "# HELP kvstore_tier_backlog_blocks Blocks that wait to be written to a tier\n" in text
    assert "# HELP kvstore_tier_lost_blocks_total Blocks that were gone from a shared tier\n" in text


def test_salts_are_metrics_by_the_digest_of_their_name(node: Node, store: StoreClient) -> None:
    tenant = Namespace(model="llama-test", salt="tenant-a")
    store.put(tenant, b"one", bytes(5000))
    store.put(Namespace(model="llama-test"), b"one", bytes(3000))
    assert store.get(tenant, b"one") == bytes(5000)
    assert store.get(tenant, b"two") is None
    samples = metrics(node)
    digest = "4fb21e27e826"  # printf tenant-a | b2sum -l 48
    for name, value in (("blocks", 1), ("bytes", 5000)):
        assert samples[f'kvstore_salt_{name}{{medium="dram",salt="{digest}"}}'] == value
    assert samples['kvstore_salt_bytes{medium="dram",salt="none"}'] == 3000
    assert samples[f'kvstore_salt_hit_blocks_total{{salt="{digest}"}}'] == 1
    assert samples[f'kvstore_salt_missed_blocks_total{{salt="{digest}"}}'] == 1
    assert not any("quota" in name or "tenant" in name for name in samples)
    assert [salt.salt for salt in store.statistics().salts] == ["tenant-a", ""]


def test_a_refused_frame_is_counted(node: Node) -> None:
    before = metrics(node)["kvstore_refused_frames_total"]
    with RawConnection(node.socket) as raw:
        raw.send(b"\xff" * 16)
        raw.failure()
    wait_for(lambda: metrics(node)["kvstore_refused_frames_total"] == before + 1)


def test_garbage_on_the_http_port_harms_nobody(node: Node) -> None:
    host, port = node.endpoint("http").rsplit(":", 1)
    for data in (b"\xff" * 5000, b"GET / HTTP/9.9\r\n\r\n", b"GET /" + b"a" * 200_000):
        with socket.create_connection((host, int(port)), timeout=10) as sock:
            sock.sendall(data)
    assert get(node, "/healthz") == (200, "ok\n")
    assert "Traceback" not in node.log


TOKEN = "token-of-the-http-side"


@pytest.fixture(scope="module")
def guarded() -> Iterator[Node]:
    """A daemon that wants a token."""
    with Node("16MiB", environ={"KVSTORE_TOKEN": TOKEN}) as node:
        yield node
        node.check()
        assert "Traceback" not in node.log, node.log


def post(node: Node, path: str, body: object, token: str | None = TOKEN) -> tuple[int, str]:
    """Status and body; what is no bytes is sent as JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(f"http://{node.endpoint('http')}{path}", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_a_prefix_is_held_and_let_go_over_http(guarded: Node, namespace: Namespace) -> None:
    prefix = {
        "model": namespace.model,
        "salt": "tenant",
        "namespace": {"block_tokens": 16, "scheme": "tokens"},
        "keys": [b"a".hex(), b"b".hex(), b"c".hex()],
    }
    tenant = Namespace(model=namespace.model, salt="tenant", block_tokens=16, scheme="tokens")
    with guarded.client() as store:
        store.put(tenant, b"a", bytes(5000))
        store.put(tenant, b"b", bytes(5000))
        status, text = post(guarded, "/v1/pin", {**prefix, "ttl_s": 60})
        held = json.loads(text)
        assert (status, held) == (200, {"id": held["id"], "pinned": 2, "loading": 0, "missing": 1})
        assert store.statistics().held_bytes == 10_000
        assert post(guarded, "/v1/unpin", {"id": held["id"]}) == (
            200,
            json.dumps({"id": held["id"]}, separators=(",", ":")),
        )
        assert store.statistics().holds == 0
        assert post(guarded, "/v1/unpin", {"id": held["id"]}) == (410, f"hold {held['id']} is over\n")
        status, text = post(guarded, "/v1/prefetch", prefix)
        assert (status, json.loads(text)) == (200, {"id": None, "pinned": 2, "loading": 0, "missing": 1})


def test_blocks_are_cleared_over_http(guarded: Node) -> None:
    spaces = [Namespace(model="clear", salt=salt, group=group) for salt in "st" for group in "01"]
    with guarded.client() as store:
        for space in spaces:
            store.put(space, b"k", b"bytes")
        exactly = {"model": "clear", "salt": "s", "namespace": {"group": "1"}}
        assert post(guarded, "/v1/clear", exactly) == (200, '{"blocks":1}')
        assert post(guarded, "/v1/clear", {"model": "clear", "salt": "t"}) == (200, '{"blocks":2}')
        assert [use.namespace for use in store.namespaces() if use.namespace.model == "clear"] == spaces[:1]
        assert post(guarded, "/v1/clear", {"salt": "s"}) == (200, '{"blocks":1}')


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("pin", b"{", 400, "no JSON"),
        ("unpin", b'{"id": "\xff"}', 400, "no JSON"),
        ("pin", {"model": "m", "keys": ["00"]}, 422, "`ttl_s`"),
        ("pin", {"model": "m", "keys": ["00"], "ttl_s": -1}, 422, "ttl_s is -1.0; give 0 to 3600 seconds"),
        ("pin", {"model": "m", "keys": ["00"], "ttl_s": 1e9}, 422, "give 0 to 3600 seconds"),
        ("pin", {"model": "m", "keys": ["00"], "ttl_s": "1"}, 422, "`ttl_s`|`$.ttl_s`"),
        ("pin", {"model": "m", "keys": ["0"], "ttl_s": 1}, 422, "key '0' is no hex; give 2 to 128 digits"),
        ("pin", {"model": "m", "keys": ["", "00"], "ttl_s": 1}, 422, "key of 0 bytes; give 1 to 64 bytes"),
        ("pin", {"model": "m", "keys": ["00" * 65], "ttl_s": 1}, 422, "key of 65 bytes"),
        ("pin", {"model": "m", "keys": ["00", "00"], "ttl_s": 1}, 422, "key 00 occurs twice in 2 keys"),
        ("prefetch", {"model": "m", "keys": []}, 422, "0 keys to hold; give 1 to 4096"),
        ("prefetch", {"model": "m", "keys": [f"{n:04x}" for n in range(4097)]}, 422, "4097 keys to hold"),
        ("prefetch", {"model": "", "keys": ["00"]}, 422, "namespace model is empty"),
        ("prefetch", {"model": "m", "keys": ["00"], "ttl_s": 1}, 422, "unknown field `ttl_s`"),
        ("prefetch", {"model": "m", "keys": ["00"], "namespace": {"salt": "s"}}, 422, "unknown field `salt`"),
        ("prefetch", b" " * (1 << 20) + b"{}", 413, "the limit is 1048576 bytes"),
        ("unpin", {"id": "1"}, 410, "hold 1 is over"),
        ("unpin", {"id": str(1 << 62)}, 404, "there never was a hold 4611686018427387904"),
        ("unpin", {"id": "x"}, 422, "id 'x' is none"),
        ("unpin", {"id": 7}, 422, "Expected `str`"),
        ("clear", {}, 422, "nothing to clear; give a namespace, or a model, a salt or both"),
        ("clear", {"namespace": {}}, 422, "namespace model is empty"),
    ],
)
def test_a_bad_request_is_one_sentence(
    guarded: Node, path: str, body: object, status: int, message: str
) -> None:
    with guarded.client() as store:  # or no hold has been there yet
        store.put(Namespace(model="bad"), b"k", b"bytes")
        store.unpin(store.pin(Namespace(model="bad"), [b"k"], 1.0).id)
    answered, text = post(guarded, f"/v1/{path}", body)
    assert answered == status, text
    assert any(words in text for words in message.split("|")), text
    assert text.endswith("\n")
    assert text.count("\n") == 1


def test_without_the_token_nothing_is_done(guarded: Node) -> None:
    for path in ("pin", "unpin", "prefetch", "clear", "reload"):
        for token in (None, "wrong", TOKEN[:-1]):
            status, text = post(guarded, f"/v1/{path}", {"salt": ""}, token)
            assert (status, text) == (401, "give the token as Authorization: Bearer\n"), path
    assert get(guarded, "/openapi.json")[0] == 401


def test_the_document_describes_what_wants_the_token(guarded: Node) -> None:
    url = f"http://{guarded.endpoint('http')}/openapi.json"
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {TOKEN}"})
    with urllib.request.urlopen(request, timeout=10) as response:
        document = json.load(response)
    for path in ("/v1/prefetch", "/v1/pin", "/v1/unpin", "/v1/clear", "/v1/reload"):
        assert document["paths"][path]["post"]["security"] == [{"token": []}], path
    assert {"404", "410", "422"} <= document["paths"]["/v1/unpin"]["post"]["responses"].keys()
    assert "security" not in document["paths"]["/healthz"]["get"]


def wait_in_vain(store: StoreClient, namespace: Namespace) -> None:
    with pytest.raises(Unavailable):
        store.get(namespace, b"k", timeout_s=60)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_daemon_cleanly(number: signal.Signals, namespace: Namespace) -> None:
    with Node() as node:
        with node.client() as store, RawConnection(node.socket) as raw:
            # Somebody holds leases, somebody waits, somebody is in the middle of a frame.
            lease = store.reserve(namespace, [b"k"], 64)
            waiting = threading.Thread(target=wait_in_vain, args=(store, namespace))
            waiting.start()
            raw.send(protocol.HEADER.pack(1000, 1, 0))
            node.process.send_signal(number)
            assert node.stop() == 0
            waiting.join(10)
            assert not waiting.is_alive()
            assert raw.closed()
            assert not lease.valid
        assert not node.socket.exists()
        assert "Traceback" not in node.log, node.log
        assert "never retrieved" not in node.log, node.log
        assert sorted(path.name for path in node.folder.iterdir()) == ["log", "node.epoch"]


def test_a_second_daemon_on_the_same_socket_is_refused_and_the_first_goes_on(
    node: Node, store: StoreClient, namespace: Namespace
) -> None:
    store.put(namespace, b"k", b"here")
    done = serve(node, socket=str(node.socket))
    assert done.returncode == 1
    assert f"kvstore: another daemon listens on {node.socket}; stop it, or give another path" in done.stderr
    assert node.socket.exists()
    assert store.get(namespace, b"k") == b"here"
    with node.client() as another:
        assert another.get(namespace, b"k") == b"here"


def test_a_stale_socket_is_replaced_and_the_epoch_grows(namespace: Namespace) -> None:
    with Node() as node:
        with RawConnection(node.socket, greet=False) as raw:
            first = raw.ask(protocol.Hello(protocol.MAJOR, 0, b""))
        node.kill()
        assert node.socket.exists()
        node.start()
        with RawConnection(node.socket, greet=False) as raw:
            second = raw.ask(protocol.Hello(protocol.MAJOR, 0, b""))
        assert isinstance(first, protocol.Welcome)
        assert isinstance(second, protocol.Welcome)
        assert second.epoch > first.epoch
        assert node.stop() == 0
        # A clock that was set back does not repeat an epoch.
        epoch = node.folder / "node.epoch"
        epoch.write_text(f"{second.epoch + (1 << 60)}\n")
        node.start()
        with RawConnection(node.socket, greet=False) as raw:
            third = raw.ask(protocol.Hello(protocol.MAJOR, 0, b""))
        assert isinstance(third, protocol.Welcome)
        assert third.epoch == second.epoch + (1 << 60) + 1


def test_a_file_that_is_no_socket_is_not_replaced(node: Node) -> None:
    path = node.folder / "precious"
    path.write_text("precious")
    done = serve(node, socket=str(path))
    assert done.returncode == 1
    assert f"socket {path} is taken by a file that is no socket; give another path" in done.stderr
    assert path.read_text() == "precious"


def test_addresses_that_are_taken_are_clear_errors(node: Node) -> None:
    done = serve(node, http=node.endpoint("http"))
    assert done.returncode == 1
    assert f"kvstore: http address {node.endpoint('http')}: Address already in use" in done.stderr
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = serve(node, data=address)
        assert done.returncode == 1
        assert re.search(f"kvstore: data address {address}: .*ddress already in use", done.stderr)
    assert get(node, "/readyz") == (200, "ready\n")


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("socket", "/", "/"),
        ("socket", "", "socket"),
        ("socket", "/proc/nowhere/node.sock", "socket directory /proc/nowhere: No such file or directory"),
        ("socket", "/dev/null/node.sock", "socket directory /dev/null: "),
        ("socket", f"/tmp/{'a' * 120}", f"socket /tmp/{'a' * 120}: a path has at most 107 bytes"),
        ("socket", f"/tmp/{'a' * 300}", "at most 107 bytes"),
        ("http", "192.0.2.1:0", "http address 192.0.2.1:0: Cannot assign requested address"),
        ("http", "no-such-host.invalid:0", "http address no-such-host.invalid:0: "),
        ("http", f"{'a' * 70}:0", f"http address {'a' * 70}:0: "),
        ("data", f"{'a' * 70}:0", f"data address {'a' * 70}:0: "),
        ("dram", "4GB", "dram.capacity is '4GB'; give bytes as \"4GiB\""),
        ("dram", "4 giB", "dram.capacity is '4 giB'; give bytes as \"4GiB\""),
        ("dram", "-1", "dram.capacity is '-1'; give bytes as \"4GiB\""),
        ("dram", "1KiB", "dram capacity is 1024 bytes; the least is 2097152"),
        ("dram", "1000TiB", "dram capacity is 1099511627776000 bytes, "),
        ("config", "/nowhere.toml", "/nowhere.toml: "),
    ],
    ids=lambda value: value[:24] or "empty",
)
def test_a_flag_that_cannot_be_obeyed_is_a_clear_error(
    tmp_path: Path, flag: str, value: str, message: str
) -> None:
    flags = {"dram": "4MiB", "socket": str(tmp_path / "node.sock"), "http": "127.0.0.1:0", flag: value}
    command = [sys.executable, "-m", "kvstore", "serve"]
    for name, text in flags.items():
        command += [f"--{name}", text]
    # With a token, an address beyond loopback is tried and not refused.
    environ = {**os.environ, "KVSTORE_TOKEN": "token"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, env=environ)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("kvstore: ")
    assert message in last
    assert not (tmp_path / "node.sock").exists()


def test_more_clients_than_allowed_are_refused_and_the_others_go_on(
    tmp_path: Path, namespace: Namespace
) -> None:
    config = tmp_path / "node.toml"
    config.write_text("socket_mode = '0600'\n[limits]\nclients = 3\n")
    with Node("64MiB", "--config", str(config)) as node:
        assert node.socket.stat().st_mode & 0o777 == 0o600
        with node.client() as one:
            with node.client(), node.client():
                for _ in range(3):
                    with pytest.raises(ProtocolError, match="4 clients; the limit is 3"):
                        node.client()
                one.put(namespace, b"k", b"fine")
            wait_for(lambda: one.statistics().connections == 1)
            with node.client() as again:
                assert again.get(namespace, b"k") == b"fine"
        node.check()
