"""Two vLLM engines share KV through LMCache and a daemon: one prefills and ends, another takes it from there.

vLLM's own count of cached tokens says what it was promised. So tests compare tokens with those of an engine
that knows no store, and ask the daemon what it has served; one shows that wrong bytes give other tokens.
"""

import json
import os
import random
import signal
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, Final

import pytest

from kvstore.hashing import lmcache_chunk_hashes, lmcache_namespace
from kvstore.statistics import NodeStatistics, TierState
from tests import readme
from tests.engines.checkpoint import TOKEN_BYTES, VOCABULARY, write_checkpoint
from tests.engines.engine import NEW_TOKENS, Answer
from tests.engines.processes import Engine
from tests.lmcache_processes import Server
from tests.node import Node, wait_for

MODEL: Final = "tiny-llama"
CHUNKS: Final = 8
CHUNK_TOKENS: Final = 256
# vLLM's build for the CPU crashes (SIGILL) when all of a prompt is loaded: some tokens are left to compute.
TAIL_TOKENS: Final = 100
PROMPT_TOKENS: Final = CHUNKS * CHUNK_TOKENS + TAIL_TOKENS
CHUNK_BYTES: Final = CHUNK_TOKENS * TOKEN_BYTES
PROMPTS: Final = (random.Random(seed).choices(range(3, VOCABULARY), k=PROMPT_TOKENS) for seed in count(12))
PROMPT: Final = next(PROMPTS)
# LMCache's name for the only rank of one.
KV_RANK: Final = 0x01000100
BYTES_ARE: Final[dict[str, Any]] = {"block_tokens": CHUNK_TOKENS, "dtype": "float32", "layout": "LNHC"}
NAMESPACE: Final = lmcache_namespace(MODEL, KV_RANK, **BYTES_ARE)
KEYS: Final = lmcache_chunk_hashes(PROMPT)
TIMEOUT_S: Final = 2.0
# By how much a request may be slower for no reason of ours: two cores for six processes.
NOISE_S: Final = 1.0

pytestmark = pytest.mark.timeout(300)


def adapter(address: str) -> dict[str, Any]:
    """What LMCache's server is told of the daemon."""
    spec = dict(json.loads(readme.command("lmcache server")[-1]))
    spec["adapter_params"] |= {"address": address, **BYTES_ARE, "timeout_s": TIMEOUT_S}
    return spec


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the model, the logs, and the daemon's disk."""
    folder = tmp_path_factory.mktemp("vllm")
    write_checkpoint(folder / MODEL)
    (folder / "nvme").mkdir()
    return folder


@pytest.fixture(scope="module")
def node(folder: Path) -> Iterator[Node]:
    """A daemon with a disk; at the end nothing may be wrong in it."""
    with Node("256MiB", "--nvme", f"{folder / 'nvme'}:2GiB") as node:
        yield node
        if node.process.poll() is None:
            node.check()


@pytest.fixture(scope="module")
def lmcache(folder: Path, node: Node) -> Iterator[Server]:
    """LMCache's server over the daemon."""
    with Server(folder, json.dumps(adapter(node.address)), l1_size_gb=1) as server:
        yield server


@pytest.fixture(scope="module")
def answers(folder: Path, node: Node, lmcache: Server) -> tuple[Answer, Answer]:
    """What an engine without a store says, and one that publishes the prompt's KV; both have ended."""
    with Engine("alone", folder, MODEL) as alone, Engine("prefill", folder, MODEL, lmcache) as prefill:
        prefill.ready()
        alone.ask(PROMPT)  # the first request of an engine takes longer
        baseline = alone.ask(PROMPT)
        alone.end()
        published = prefill.ask(PROMPT)
        wait_for(lambda: statistics(node).counters.sealed_blocks == CHUNKS)
    return baseline, published


@pytest.fixture(scope="module")
def baseline(answers: tuple[Answer, Answer]) -> Answer:
    """What an engine says that knows no store."""
    return answers[0]


@pytest.fixture(scope="module")
def engine(folder: Path, lmcache: Server, answers: tuple[Answer, Answer]) -> Iterator[Engine]:
    """Another engine, started when the prompt's KV is in the store and its prefill engine has ended."""
    with Engine("decode", folder, MODEL, lmcache) as engine:
        yield engine.ready()


def test_an_engine_publishes_the_prompt(answers: tuple[Answer, Answer], node: Node) -> None:
    baseline, published = answers
    assert published.tokens == baseline.tokens
    assert len(baseline.tokens) == NEW_TOKENS
    # A model that repeats itself would not notice wrong KV.
    assert len(set(baseline.tokens)) > NEW_TOKENS // 2
    with node.client() as store:  # keys that a router computes from the tokens alone
        assert store.length_each([(NAMESPACE, key) for key in KEYS]) == [CHUNK_BYTES] * CHUNKS


def test_another_engine_decodes_from_the_store(
    engine: Engine, lmcache: Server, node: Node, baseline: Answer
) -> None:
    forget(engine, lmcache)
    hit_blocks, loaded_bytes = statistics(node).counters.hit_blocks, lmcache.adapter_status()["loaded_bytes"]
    answer = engine.ask(PROMPT)
    assert answer.tokens == baseline.tokens
    assert answer.cached_tokens == CHUNKS * CHUNK_TOKENS
    assert statistics(node).counters.hit_blocks - hit_blocks == CHUNKS
    assert lmcache.adapter_status()["loaded_bytes"] - loaded_bytes == CHUNKS * CHUNK_BYTES


def test_wrong_bytes_in_the_store_change_the_tokens(
    engine: Engine, lmcache: Server, node: Node, baseline: Answer
) -> None:
    with node.client() as store:
        right, wrong = store.get(NAMESPACE, KEYS[0]), store.get(NAMESPACE, KEYS[1])
        store.remove(NAMESPACE, KEYS[:1])
        store.put(NAMESPACE, KEYS[0], wrong)
        forget(engine, lmcache)
        try:
            answer = engine.ask(PROMPT)
        finally:
            store.remove(NAMESPACE, KEYS[:1])
            store.put(NAMESPACE, KEYS[0], right)
    assert answer.tokens != baseline.tokens
    assert answer.cached_tokens == CHUNKS * CHUNK_TOKENS
    ask_until_loaded(engine, lmcache, node, baseline)


def test_an_engine_decodes_from_the_disk_of_a_daemon_that_was_killed(
    engine: Engine, lmcache: Server, node: Node, baseline: Answer
) -> None:
    wait_for(lambda: statistics(node).tiers[0].blocks == nvme(node).blocks and not nvme(node).backlog_blocks)
    before = nvme(node).blocks
    node.kill()
    node.start()
    assert nvme(node).counters.recovered_blocks == before >= CHUNKS
    assert nvme(node).counters.read_bytes == 0
    ask_until_loaded(engine, lmcache, node, baseline)
    assert nvme(node).counters.read_bytes == CHUNKS * CHUNK_BYTES


def test_an_engine_whose_daemon_is_gone_recomputes(
    engine: Engine, lmcache: Server, node: Node, baseline: Answer
) -> None:
    lmcache.clear()
    node.kill()
    try:
        ask_in_vain(engine, lmcache, baseline)
    finally:
        node.start()
    ask_until_loaded(engine, lmcache, node, baseline)


def test_an_engine_whose_daemon_hangs_waits_once(
    engine: Engine, lmcache: Server, node: Node, baseline: Answer
) -> None:
    lmcache.clear()
    os.kill(node.pid, signal.SIGSTOP)
    try:
        ask_in_vain(engine, lmcache, baseline)
    finally:
        os.kill(node.pid, signal.SIGCONT)
    ask_until_loaded(engine, lmcache, node, baseline)


def ask_in_vain(engine: Engine, lmcache: Server, baseline: Answer) -> None:
    """Two requests that the store cannot serve: the same tokens, and one deadline later at most."""
    late_s = 0.0
    for _ in range(2):
        lmcache.clear()
        answer = engine.ask(PROMPT)
        assert answer.tokens == baseline.tokens
        assert answer.cached_tokens == 0
        late_s += answer.seconds - baseline.seconds
    assert late_s < TIMEOUT_S + NOISE_S


def ask_until_loaded(engine: Engine, lmcache: Server, node: Node, baseline: Answer) -> None:
    """Requests until the store serves one, for a connector may have to find its daemon again first."""

    def loaded() -> bool:
        forget(engine, lmcache)
        before = statistics(node).counters.hit_blocks
        assert engine.ask(PROMPT).tokens == baseline.tokens
        return statistics(node).counters.hit_blocks - before == CHUNKS

    wait_for(loaded)


def forget(engine: Engine, lmcache: Server) -> None:
    """Leave nothing of the prompt with LMCache.

    Its memory keeps the bytes of what it drops, and the same places are taken next: an adapter that copied
    nothing would still give the right tokens. So another prompt's KV goes there.
    """
    lmcache.clear()
    engine.ask(next(PROMPTS))
    lmcache.clear()


def statistics(node: Node) -> NodeStatistics:
    """The daemon's, now."""
    with node.client() as store:
        return store.statistics()


def nvme(node: Node) -> TierState:
    """The daemon's disk, now."""
    return statistics(node).tiers[1]
