"""The command line as a user types it: output, exit status, and errors that are one line."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import pytest

from kvstore.block import Namespace
from kvstore.client import StoreClient
from tests.node import Node

TOKEN = "token-of-the-command-line"


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    """A daemon for all of this module, also on TCP and with a token there."""
    with Node("16MiB", "--data", "127.0.0.1:0", environ={"KVSTORE_TOKEN": TOKEN}) as node:
        yield node
        node.check()
        assert "Traceback" not in node.log, node.log


class Command:
    """One run of `kvstore`, over by now. A traceback is never the answer."""

    def __init__(
        self, *words: str | bytes, stdin: bytes = b"", environ: dict[str, str] | None = None
    ) -> None:
        variables = {key: value for key, value in os.environ.items() if key != "KVSTORE_TOKEN"}
        variables |= {"XDG_RUNTIME_DIR": "/nowhere", **(environ or {})}
        command: Sequence[str | bytes] = [sys.executable, "-m", "kvstore", *words]
        done = subprocess.run(command, input=stdin, capture_output=True, env=variables, timeout=60)
        self.status = done.returncode
        self.output = done.stdout
        self.error = done.stderr.decode(errors="replace")
        assert "Traceback" not in self.error, self.error

    @property
    def text(self) -> str:
        """What it printed."""
        assert self.status == 0, self.error
        return self.output.decode()

    @property
    def failure(self) -> str:
        """Its one line of error; the status must be 1."""
        assert self.status == 1, (self.status, self.output, self.error)
        assert self.error.startswith("kvstore: "), self.error
        assert self.error.count("\n") == 1, self.error
        return self.error.strip()


def on(node: Node) -> list[str]:
    return ["--address", node.address]


def test_a_block_is_put_looked_up_and_got(node: Node, tmp_path: Path) -> None:
    data = os.urandom(100_000)
    (tmp_path / "block").write_bytes(data)
    here = ["--model", "m", *on(node)]
    assert Command("put", "first", str(tmp_path / "block"), *here).text == "100000 bytes\n"
    assert Command("put", "0x00ff", "-", *here, stdin=b"from standard input").text == "19 bytes\n"
    assert Command("get", "first", *here).output == data
    assert Command("get", "0x00FF", *here).output == b"from standard input"
    assert Command("get", "first", *here, "-o", str(tmp_path / "copy")).text == ""
    assert (tmp_path / "copy").read_bytes() == data
    assert Command("lookup", "first", "0x00ff", "third", *here).text == "gpu 0  dram 2  nvme 2  remote 2\n"
    hits = json.loads(Command("lookup", "third", "first", *here, "--json").text)
    assert hits == {"gpu": 0, "dram": 0, "nvme": 0, "remote": 0}
    assert Command("lookup", "first", *here, "--wait", "0").text.startswith("gpu 0  dram 1")
    # Another model, or another salt, is another namespace.
    missing = Command("get", "first", "--model", "other", *on(node))
    assert missing.failure == "kvstore: no block first of other"
    assert Command("get", "first", *here, "--salt", "s").failure == "kvstore: no block first of m"
    with node.client() as store:
        assert store.check() == []


def test_a_prefix_is_prefetched_held_and_let_go(node: Node) -> None:
    here = ["--model", "held", *on(node)]
    with node.client() as store:
        store.put(Namespace(model="held"), b"a", b"bytes")
    assert Command("prefetch", "a", "b", *here).text == "id 0  pinned 1  loading 0  missing 1\n"
    held = json.loads(Command("pin", "a", "b", "--for", "60", *here, "--json").text)
    assert {**held, "id": 0} == {"id": 0, "pinned": 1, "loading": 0, "missing": 1}
    with node.client() as store:
        assert store.statistics().holds == 1
        assert Command("unpin", str(held["id"]), *on(node)).text == ""
        assert store.statistics().holds == 0
    assert f"hold {held['id']} is over" in Command("unpin", str(held["id"]), *on(node)).failure
    nothing = Command("prefetch", "b", *here)
    assert (nothing.status, nothing.output) == (1, b"id 0  pinned 0  loading 0  missing 1\n")
    assert "ttl_s is 7200.0; give 0 to 3600 seconds" in Command("pin", "a", "--for", "7200", *here).failure


def test_a_model_or_a_salt_is_cleared_also_over_tcp(node: Node) -> None:
    there = {"KVSTORE_TOKEN": TOKEN}
    over_tcp = ["--address", f"tcp://{node.endpoint('data')}"]
    with node.client() as store:
        for salt in ("", "s", "t"):
            store.put(Namespace(model="cleared", salt=salt), b"k", b"bytes")
    assert Command("clear", "--model", "cleared", "--salt", "", *on(node)).text == "1 blocks\n"
    assert Command("clear", "--salt", "s", *over_tcp, environ=there).text == "1 blocks\n"
    assert Command("clear", "--model", "cleared", *on(node)).text == "1 blocks\n"
    assert "Usage:" in Command("clear", *on(node)).error


def test_stats_are_for_people_or_for_programs(node: Node) -> None:
    text = Command("stats", *on(node)).text
    for word in ("node", "tier dram", "capacity_bytes", "16,777,216", "since start", "sealed_blocks"):
        assert word in text
    statistics = json.loads(Command("stats", *on(node), "--json").text)
    assert statistics["tiers"][0]["capacity_bytes"] == 16 << 20
    assert statistics["connections"] == 1
    assert Command("check", *on(node)).text == "all is well\n"


def test_over_tcp_the_token_comes_from_the_environment(node: Node) -> None:
    address = ["--address", f"tcp://{node.endpoint('data')}"]
    assert "token" in Command("stats", *address).failure
    assert "token" in Command("stats", *address, environ={"KVSTORE_TOKEN": "wrong"}).failure
    assert "uptime_s" in Command("stats", *address, environ={"KVSTORE_TOKEN": TOKEN}).text


def test_without_a_daemon_every_command_says_so(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/none.sock"
    here = ["--address", address]
    for words in (
        ["stats"],
        ["check"],
        ["get", "k", "--model", "m"],
        ["lookup", "k", "--model", "m"],
        ["put", "k", "-", "--model", "m"],
    ):
        failure = Command(*words, *here).failure
        assert f"no daemon at {address}: " in failure
        assert "is `kvstore serve` running?" in failure


@pytest.mark.parametrize(
    "address", ["nonsense", "", "tcp://", "tcp://127.0.0.1:port", "tcp://127.0.0.1:99999", "tcp://[::1"]
)
def test_an_address_that_is_none_is_shown(address: str) -> None:
    failure = Command("stats", "--address", address).failure
    assert f"address {address!r}; give unix:/path/to/node.sock or tcp://host:7401" in failure


def test_bad_keys_and_files_are_one_line_each(node: Node, tmp_path: Path) -> None:
    here = ["--model", "m", *on(node)]
    missing = tmp_path / "missing"
    for command, message in (
        (Command("put", "k", str(missing), *here), str(missing)),
        (Command("put", "k", str(tmp_path), *here), str(tmp_path)),
        (Command("put", "k", "-", *here), "nbytes is 0; give 1 to 16777216 bytes"),
        (
            Command("put", "k", "-", *here, stdin=bytes((16 << 20) + 1)),
            "nbytes is 16777217; give 1 to 16777216",
        ),
        (Command("put", "k" * 65, "-", *here, stdin=b"x"), "key of 65 bytes; give 1 to 64 bytes"),
        (Command("put", "", "-", *here, stdin=b"x"), "key of 0 bytes; give 1 to 64 bytes"),
        (Command("get", "0x", *here), "key of 0 bytes; give 1 to 64 bytes"),
        (Command("get", "0xabc", *here), "key '0xabc' is no hex after 0x"),
        (Command("get", "k", "--model", "", *on(node)), "namespace model is empty; give the model's name"),
        (Command("get", "k", "--model", "m" * 513, *on(node)), "at most 512 characters"),
        (Command("lookup", "k", "0xzz", *here), "key '0xzz' is no hex after 0x"),
    ):
        assert message in command.failure


def test_a_block_that_cannot_be_written_to_its_file_is_one_line(node: Node, tmp_path: Path) -> None:
    here = ["--model", "m", *on(node)]
    assert Command("put", "out", "-", *here, stdin=b"x").status == 0
    for output in (tmp_path, tmp_path / "none" / "file"):
        assert str(output) in Command("get", "out", *here, "-o", str(output)).failure


def test_keys_and_models_that_are_no_text_are_one_line(node: Node) -> None:
    environ = {"LC_ALL": "C.UTF-8"}
    for words in ((b"\xff", b"--model", b"m"), (b"k", b"--model", b"\xff")):
        command = Command("get", *words, "--address", node.address, environ=environ)
        assert command.failure.startswith("kvstore: ")


def test_a_reader_that_stops_reading_causes_no_traceback(node: Node) -> None:
    here = ["--model", "m", *on(node)]
    assert Command("put", "large", "-", *here, stdin=bytes(1 << 20)).status == 0
    command = [sys.executable, "-m", "kvstore", "get", "large", *here]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1) == b"\0"
        process.stdout.close()
        error = process.stderr.read().decode()
    assert "Traceback" not in error, error


def test_usage_is_explained() -> None:
    everything = Command("--help").text
    assert "Keep the KV-cache blocks of LLM engines" in everything
    assert Command("--version").text == f"kvstore {version('kvstore-service')}\n"
    for name in ("serve", "stats", "put", "get", "lookup", "check"):
        assert re.search(rf"\b{name}\b", everything)
    assert "--dram" in Command("serve", "--help").text
    for words in (
        ["nonsense"],
        ["stats", "--nonsense"],
        ["get", "k"],
        ["put", "k"],
        ["lookup", "--model", "m"],
    ):
        command = Command(*words)
        assert command.status == 2
        assert "Usage:" in command.error
    assert "Usage:" in (nothing := Command()).output.decode() + nothing.error


def test_serve_says_where_it_listens_and_ends_on_sigint(tmp_path: Path) -> None:
    path = tmp_path / "run" / "node.sock"
    command = [sys.executable, "-m", "kvstore", "serve", "--dram", "4MiB"]
    command += ["--socket", str(path), "--http", "127.0.0.1:0", "--data", "127.0.0.1:0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        where = rf"kvstore ready: socket={path} http=127\.0\.0\.1:[1-9]\d* data=127\.0\.0\.1:[1-9]\d*\n"
        assert re.fullmatch(where, line)
        assert Command("check", "--address", f"unix:{path}").text == "all is well\n"
        process.send_signal(signal.SIGINT)
        output, error = process.communicate(timeout=20)
    assert (process.returncode, output) == (0, "")
    assert "Traceback" not in error, error
    assert not path.exists()


def test_a_daemon_is_named_by_its_environment_and_a_hangup_while_it_starts_does_not_end_it(
    tmp_path: Path,
) -> None:
    path, config = tmp_path / "node.sock", tmp_path / "node.toml"
    os.mkfifo(config)
    command = [sys.executable, "-m", "kvstore", "serve", "--config", str(config), "--dram", "4MiB"]
    command += ["--socket", str(path), "--http", "127.0.0.1:0"]
    environ = {**os.environ, "KVSTORE_NODE": "named"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environ, text=True) as process:
        with config.open("w"):  # which it now waits for
            process.send_signal(signal.SIGHUP)
        assert process.stdout is not None
        assert process.stdout.readline().startswith("kvstore ready: ")
        with StoreClient.connect(f"unix:{path}") as store:
            assert store.statistics().node == "named"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0


def test_serve_without_a_tier_or_with_an_unknown_key_is_one_line(tmp_path: Path) -> None:
    config = tmp_path / "node.toml"
    config.write_text('[dram]\ncapacity = "4MiB"\npolciy = "lru"\n')
    assert Command("serve").failure == (
        "kvstore: no tier is configured; give --dram 4GiB, or [dram] capacity in the file"
    )
    assert Command("serve", "--config", str(config)).failure == (
        "kvstore: unknown configuration key dram.polciy; the nearest known one is dram.policy"
    )


def test_config_prints_what_serve_would_have(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text('node = "from-file"\n')
    flags = ["--config", str(file), "--dram", "4MiB", "--nvme", f"{tmp_path}:1GiB", "--http", "127.0.0.1:1"]
    printed = Command("config", *flags, environ={"KVSTORE_TOKEN": TOKEN}).text
    assert 'node = "from-file"\n' in printed
    assert f'directories = ["{tmp_path}:1GiB"]\n' in printed
    assert TOKEN not in printed
    file.write_text(printed)
    assert Command("config", "--config", str(file)).text == printed
    assert "\n#[dram]\n" in Command("config").text
    assert "\n#[events]\n" in Command("config").text
    assert "\n[events]\n" in Command("config", "--events").text
