"""LMCache's server on a daemon: what one server has stored, another loads, and nothing is kept by the dead.

An engine is played by LMCache's own bench, which stores prompts, clears its memory, loads them back, and
prints checksums of what it had and what it got. The bench's prompts are made from their numbers.
"""

import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Final

import pytest

from kvstore.client import StoreClient
from kvstore.hashing import lmcache_chunk_hashes, lmcache_kv_rank, lmcache_namespace
from tests.lmcache_processes import Server, adapter, figures, run, running
from tests.node import Node, wait_for

pytestmark = pytest.mark.skipif(find_spec("lmcache") is None, reason="LMCache is not installed")

PROMPTS: Final = range(4)
PROMPT_TOKENS: Final = 2048
CHUNK_TOKENS: Final = 256
# Of 2 layers, keys and values, 8 heads of 128 numbers of 2 bytes.
CHUNK_BYTES: Final = CHUNK_TOKENS * 2 * 2 * 8 * 128 * 2
BENCH: Final = (
    *("--num-tokens", str(PROMPT_TOKENS), "--kvcache-shape-spec", "(2,256,32,8,128):bfloat16:2"),
    *("--num-blocks", "256", "--block-size", "32", "--interval", "0"),
    *("--start", str(PROMPTS.start), "--end", str(PROMPTS.stop)),
)
NAMESPACE: Final = lmcache_namespace("test-model", lmcache_kv_rank(0, 1), dtype="any", layout="any")
CHECKSUM: Final = re.compile(r"\[seq (\d+)/(cold|warm)\] CHECKSUM: (\w+) \(8 chunks\)")


def keys() -> list[bytes]:
    """Of the bench's prompts: their number, and then always the same token."""
    return [key for prompt in PROMPTS for key in lmcache_chunk_hashes([prompt] + [9906] * PROMPT_TOKENS)]


def blocks(store: StoreClient) -> dict[bytes, bytes | None]:
    """What the daemon has under these keys."""
    return {key: store.get(NAMESPACE, key) for key in keys()}


def checksums(output: str, when: str) -> dict[str, str]:
    """By prompt, what the bench computed `cold`, of what it stored, or `warm`, of what it loaded."""
    return {prompt: checksum for prompt, at, checksum in CHECKSUM.findall(output) if at == when}


@dataclass(frozen=True, slots=True)
class First:
    """What the first server has left: what its bench printed, what the daemon had, what was pinned."""

    printed: str
    blocks: dict[bytes, bytes | None]
    stored_bytes: int
    pinned_blocks: int
    unpinned_after_s: float


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    """A daemon with room for all of it; at the end nothing may be wrong in it."""
    with Node("256MiB") as node:
        yield node
        node.check()


@pytest.fixture(scope="module")
def l2_adapter(node: Node) -> str:
    """The only one of both servers."""
    return adapter(node.address)


@pytest.fixture(scope="module")
def first(node: Node, l2_adapter: str, tmp_path_factory: pytest.TempPathFactory) -> First:
    """A server that stores, and is killed while it loads."""
    with Server(tmp_path_factory.mktemp("first"), l2_adapter) as server, node.client() as store:
        printed = run(server.bench(*BENCH))
        wait_for(lambda: store.statistics().counters.sealed_blocks == len(keys()))
        there, stored_bytes = blocks(store), server.adapter_status()["stored_bytes"]
        server.clear()
        wait_for(lambda: stopped_while_it_pins(server, store), 60.0)
        pinned_blocks = store.statistics().tiers[0].pinned_blocks
        os.kill(server.process.pid, signal.SIGKILL)
        killed = time.monotonic()
        wait_for(lambda: not store.statistics().tiers[0].pinned_blocks)
        unpinned_after_s = time.monotonic() - killed
    return First(printed, there, stored_bytes, pinned_blocks, unpinned_after_s)


@pytest.fixture(scope="module")
def server(l2_adapter: str, first: First, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Another server, when the first is gone."""
    with Server(tmp_path_factory.mktemp("second"), l2_adapter) as server:
        yield server


def stopped_while_it_pins(server: Server, store: StoreClient) -> bool:
    """Let it load, and stop it in the middle; whether it was."""
    with running(server.bench(*BENCH)) as bench:
        while bench.poll() is None:
            if store.statistics().tiers[0].pinned_blocks:
                os.kill(server.process.pid, signal.SIGSTOP)
                if store.statistics().tiers[0].pinned_blocks:
                    return True
                os.kill(server.process.pid, signal.SIGCONT)
    return False


def test_chunks_lie_under_the_keys_of_their_tokens(first: First) -> None:
    assert figures(first.printed)["Results"]["Checksum OK"] == str(len(PROMPTS))
    assert checksums(first.printed, "cold") == checksums(first.printed, "warm")
    lengths = {key: len(block or b"") for key, block in first.blocks.items()}
    assert lengths == dict.fromkeys(keys(), CHUNK_BYTES)
    assert first.stored_bytes == len(keys()) * CHUNK_BYTES


def test_a_killed_server_leaves_no_pins(first: First) -> None:
    assert first.pinned_blocks > 0
    assert first.unpinned_after_s < 1.0


def test_another_server_loads_all_of_it_from_the_daemon(first: First, server: Server, node: Node) -> None:
    with node.client() as store:
        before = store.statistics().counters
        printed = run(server.bench(*BENCH))
        after = store.statistics()
        status = server.adapter_status()
        for prompt in PROMPTS:
            assert f"[seq {prompt}/cold] LOOKUP: 8/8 chunks hit" in printed, printed + server.log
        assert checksums(printed, "warm") == checksums(first.printed, "cold")
        assert len(checksums(printed, "warm")) == len(PROMPTS)

        # Of what is loaded LMCache's memory keeps little, so that most is loaded a second time.
        assert status["loaded"] >= len(keys())
        assert status["loaded_bytes"] == status["loaded"] * CHUNK_BYTES
        assert after.counters.hit_blocks - before.hit_blocks == status["found"] >= status["loaded"]
        assert (status["failed_loads"], status["stored"], status["locks"]) == (0, 0, 0)

        assert blocks(store) == first.blocks
        (use,) = store.namespaces()
        assert (use.namespace, use.blocks) == (NAMESPACE, len(keys()))
        assert use.block_bytes == after.tiers[0].block_bytes == len(keys()) * CHUNK_BYTES


def test_objects_are_listed_and_deleted_over_http(server: Server, node: Node) -> None:
    def listed() -> dict[bytes, int]:
        found, page_token = {}, ""
        while page_token is not None:
            page = server.ask("GET", f"/cache/objects?page_size=5{page_token and '&page_token='}{page_token}")
            for entry in page["entries"]:
                assert entry["key"]["model_name"] == NAMESPACE.model
                found[bytes.fromhex(entry["key"]["chunk_hash_hex"])] = entry["size_bytes"]
            page_token = page["next_page_token"]
        return found

    assert listed() == dict.fromkeys(keys(), CHUNK_BYTES)
    gone = keys()[:5]
    names = [
        {"chunk_hash_hex": key.hex(), "model_name": NAMESPACE.model, "kv_rank": lmcache_kv_rank(0, 1)}
        for key in gone
    ]
    answer = server.ask("DELETE", "/cache/objects", {"keys": names, "tier": "l2"})
    assert answer == {"deleted": 5, "skipped": 0, "ok": True}
    assert listed() == dict.fromkeys(keys()[5:], CHUNK_BYTES)
    with node.client() as store:
        assert store.length_each([(NAMESPACE, key) for key in keys()[:6]]) == [0] * 5 + [CHUNK_BYTES]
        assert store.statistics().counters.removed_blocks == 5


def test_the_status_says_that_the_daemon_is_away_and_back(server: Server, node: Node) -> None:
    assert server.adapter_status()["is_healthy"] is True
    node.kill()
    try:
        wait_for(lambda: server.adapter_status()["is_healthy"] is False)  # though nobody asks it for anything
        assert server.adapter_status()["away"]
        key = {"chunk_hash_hex": keys()[0].hex(), "model_name": NAMESPACE.model, "kv_rank": 0}
        answer = server.ask("DELETE", "/cache/objects", {"keys": [key], "tier": "l2"})
        assert answer["ok"] is False
    finally:
        node.start()
    wait_for(lambda: server.adapter_status()["is_healthy"] is True)
    assert server.adapter_status()["away"] is None
    assert server.ask("GET", "/cache/objects")["entries"] == []
