"""The index on the command line: `kvstore index`, `kvstore lookup` of one, and one beside a daemon."""

import json
import os
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from kvstore.block import Namespace
from kvstore.config import load
from kvstore.engine_hashes import vllm_block_hashes
from kvstore.engine_keys import vllm_scheme
from kvstore.errors import ConfigError
from kvstore.index.settings import ranks_of
from tests.locator import Locator
from tests.node import Node, wait_for
from tests.test_cli import Command

TOKENS = [number % 1009 for number in range(100)]
SPACE = Namespace("m", 16, scheme=vllm_scheme())


class Beside:
    """Asks the index that runs beside a daemon."""

    finds = Locator.finds
    placements = Locator.placements
    ask = Locator.ask

    def __init__(self, http: str) -> None:
        self.http = http


@pytest.fixture(scope="module")
def http() -> str:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return f"127.0.0.1:{sock.getsockname()[1]}"


@pytest.fixture(scope="module")
def node(http: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A daemon with an index beside it, and some blocks."""
    path = tmp_path_factory.mktemp("node") / "node.toml"
    path.write_text(f'node = "a = b"\n[events]\nfeed = "127.0.0.1:0"\n[index]\nhttp = "{http}"\ndata = ""\n')
    with Node("16MiB", "--config", str(path), "--index") as node:
        with node.client() as store, store.reserve(SPACE, vllm_block_hashes(TOKENS, 16), 64) as write:
            write.commit()
        yield node


@pytest.fixture(scope="module")
def beside(http: str, node: Node) -> Beside:
    beside = Beside(http)
    wait_for(lambda: found(beside), 60)
    return beside


def found(index: Beside) -> bool:
    with suppress(OSError):
        return index.finds("dram", 96, "a = b", model="m", tokens=TOKENS)
    return False


def child_of(node: Node) -> int | None:
    """The index's process."""
    path = Path(f"/proc/{node.pid}/task/{node.pid}/children")
    for pid in map(int, path.read_text().split()):
        with suppress(OSError):
            if b"--child-of" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
    return None


def gone(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


def test_a_lookup_of_an_index_prints_who_has_how_many_tokens(beside: Beside, tmp_path: Path) -> None:
    url = ["--index", f"http://{beside.http}"]
    (tmp_path / "tokens").write_text(json.dumps(TOKENS))
    table = Command("lookup", "--tokens", str(tmp_path / "tokens"), "--model", "m", *url).text
    assert re.search(r"a = b +│ +0 +│ +96 +│ +96 +│ +96 +│ +0\.\d s", table)
    assert re.search(r"0\.\d s │ +\d+ ms", table)
    words = ["--tokens", str(tmp_path / "tokens"), "--model", "m", "--explain", "--top", "1"]
    explained = Command("lookup", *words, *url).text
    assert "a = b: computes 100 tokens in " in explained or "a = b: loads 96 tokens from dram" in explained
    spaced = " ".join(map(str, TOKENS)).encode()
    answer = Command("lookup", "--tokens", "-", "--model", "m", "--json", *url, stdin=spaced).text
    (one,) = json.loads(answer)
    assert (one["engine"], one["dram"]) == ("a = b", 96)
    (one,) = json.loads(Command("lookup", "0x6b", "k", "--model", "m", "--json", *url).text)
    assert one["dram"] == 0


def test_keys_are_looked_up_in_the_namespaces_that_options_tell(beside: Beside) -> None:
    keys = [f"0x{key.hex()}" for key in vllm_block_hashes(TOKENS, 16)]
    words = ["lookup", *keys, "--model", "m", "--json", "--index", f"http://{beside.http}"]
    for options, hit in (
        ([], 0),
        (["--scheme", vllm_scheme()], 96),
        (["--scheme", vllm_scheme(), "--block-tokens", "16", "--group", "0"], 96),
        (["--scheme", vllm_scheme(), "--block-tokens", "32"], 0),
        (["--scheme", vllm_scheme(), "--group", "1"], 0),
    ):
        (one,) = json.loads(Command(*words, *options).text)
        assert one["dram"] == hit, options


@pytest.mark.parametrize(
    "words",
    [["k", "--block-tokens", "16"], ["--tokens", "-", "--index", "http://127.0.0.1:9", "--group", "0"]],
)
def test_a_namespace_is_for_keys_that_an_index_is_asked_for(words: list[str]) -> None:
    command = Command("lookup", *words, "--model", "m")
    assert command.status == 2
    assert "a namespace is for keys with --index" in command.error


@pytest.mark.parametrize(
    ("words", "stdin", "message"),
    [
        (["--tokens", "-"], b"1 two", "- holds no token ids: invalid literal for int()"),
        (["--tokens", "-"], b"[1, null]", "- holds no token ids: "),
        (["--tokens", "/nowhere/tokens"], b"", "No such file or directory"),
        (["--tokens", "-", "--salt", "s" * 513], b"1", "give at most 512 characters"),
    ],
)
def test_a_lookup_that_cannot_be_is_one_line(
    beside: Beside, words: list[str], stdin: bytes, message: str
) -> None:
    url = ["--index", f"http://{beside.http}", "--model", "m"]
    assert message in Command("lookup", *words, *url, stdin=stdin).failure


def test_a_lookup_of_an_index_that_is_away_is_one_line() -> None:
    for url in ("http://127.0.0.1:9", "http://no host:1"):
        failure = Command("lookup", "k", "--model", "m", "--index", url).failure
        assert failure.startswith(f"kvstore: the index at {url}: ")


def test_keys_and_tokens_are_not_both_looked_up() -> None:
    command = Command("lookup", "k", "--tokens", "-", "--model", "m")
    assert command.status == 2
    assert "give keys, or --tokens FILE" in command.error


def test_an_index_that_dies_is_started_again_beside_its_daemon(beside: Beside, node: Node) -> None:
    first = child_of(node)
    assert first is not None
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: child_of(node) not in (None, first))
    wait_for(lambda: found(beside), 60)
    assert "the index has ended with status -9" in node.log
    assert (
        os.getpriority(os.PRIO_PROCESS, child_of(node) or 0) == os.getpriority(os.PRIO_PROCESS, node.pid) + 5
    )
    with node.client() as store:
        assert store.hit_length(SPACE, vllm_block_hashes(TOKENS, 16)).dram == 6


def test_the_index_goes_with_its_daemon_however_that_ends(beside: Beside, node: Node) -> None:
    pid = child_of(node)
    assert pid is not None
    node.kill()
    wait_for(lambda: gone(pid))
    node.start()
    wait_for(lambda: child_of(node))
    pid = child_of(node)
    assert pid is not None
    assert node.stop() == 0
    assert gone(pid)
    assert "has ended with status 0" not in node.log


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--node", "localhost:7404"], "'localhost:7404' has no IP address; give one, or dns://localhost"),
        (["--http", "192.0.2.1:0"], "index.http is 192.0.2.1:0, which is beyond loopback, and no token"),
    ],
)
def test_an_index_that_cannot_be_is_one_line(flags: list[str], message: str) -> None:
    assert message in Command("index", *flags).failure


def engine(**changed: Any) -> dict[str, Any]:
    given = {"name": "e", "events": "tcp://10.0.0.1:5557", "model": "m"}
    return {"index": {"engines": [{**given, **changed}]}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            engine(nam="e"),
            "unknown configuration key index.engines.nam; the nearest known one is",
        ),
        (engine(name=""), "name is '', events 'tcp://10.0.0.1:5557' and model 'm'; give all three"),
        (engine(ranks=0), "index.engines e: ranks is 0; give 1 to 1024"),
        (engine(ranks=1.5), "index.engines.ranks is 1.5; give a int, as 1"),
        (engine(block_tokens=0), "index.engines e: block_tokens is 0; give 1 to 1048576"),
        (engine(kind="tgi"), "index.engines e: kind is 'tgi'; give vllm or sglang"),
        (engine(hash="md5"), "hash is 'md5'; give one of sha256, sha256_cbor, xxhash, xxhash_cbor, or none"),
        (engine(kind="sglang", hash="xxhash"), "hash is 'xxhash'; give one of sha256, or none"),
        (engine(hash="xxhash"), "hash is xxhash without a seed, which is then a secret of each process"),
        (engine(events="10.0.0.1:5557"), "endpoint '10.0.0.1:5557' for rank 0; give tcp://HOST:PORT"),
        (
            engine(events="tcp://h:65535", ranks=2),
            "endpoint 'tcp://h:65535' for rank 1; give tcp://HOST:PORT",
        ),
        ({"index": {"engines": 2 * engine()["index"]["engines"]}}, "index.engines: e is there 2 times"),
        ({"index": {"engines": {"e": 1}}}, "it is an array of tables: write [[index.engines]]"),
        ({"index": {"snapshot_s": 0}}, "index.snapshot_s is 0.0; give 1 to 86400 seconds"),
        ({"index": {"blocks_max": 0}}, "index.blocks_max is 0; give 1 to"),
        ({"index": {"nodes": ["x"]}}, "x"),
    ],
)
def test_a_setting_of_the_index_that_cannot_be_names_the_value_and_the_limit(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, settings)
    assert message in str(caught.value)


def test_engines_have_a_publisher_for_each_rank_and_a_scheme_for_their_hash() -> None:
    def sources(**changed: Any) -> list[tuple[str, str, str, str]]:
        ranks = ranks_of(load(None, engine(replay="tcp://h:6557", **changed)).index)
        return [(one.source.name, one.source.endpoint, one.source.replay, one.source.scheme) for one in ranks]

    assert sources() == [("e", "tcp://10.0.0.1:5557", "tcp://h:6557", "tokens")]
    assert sources(ranks=2, hash="sha256") == [
        ("e#0", "tcp://10.0.0.1:5557", "tcp://h:6557", vllm_scheme()),
        ("e#1", "tcp://10.0.0.1:5558", "tcp://h:6558", vllm_scheme()),
    ]
    assert sources(hash="xxhash", seed="7")[0][3] == vllm_scheme("xxhash", "7")
    assert sources(kind="sglang", hash="sha256", eagle=True)[0][3] == "sglang-eagle"
    assert sources(kind="sglang")[0][3] == "tokens"


def test_an_embedded_index_implies_that_the_daemon_tells_of_events() -> None:
    assert load(None, {"index": {"embedded": True}}).events is not None
    assert load(None, {}).events is None
