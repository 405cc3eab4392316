"""Mooncake Conductor's and LMCache's controller's endpoints, in the shapes that their documents have."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from kvstore.client import StoreClient
from kvstore.hashing import lmcache_chunk_hashes, lmcache_namespace
from tests.dynamo_indexer import Publisher
from tests.locator import Locator
from tests.node import Node, wait_for
from tests.test_dialects import CHAINS, MODEL, SIZE, Chain

TOKEN: Final = "secret"
PROMPT: Final = CHAINS[0].tokens
PLAIN, SALTED, ADAPTED = Chain(PROMPT), Chain(PROMPT, salt="w8a8"), Chain(PROMPT, lora="sql")


def registered(instance: str, endpoint: str, rank: int = 0, **more: Any) -> dict[str, Any]:
    """What a router tells the Conductor."""
    return {
        "endpoint": endpoint,
        "type": "vLLM",
        "modelname": MODEL,
        "instance_id": instance,
        "block_size": SIZE,
        "dp_rank": rank,
        **more,
    }


def asked(**more: Any) -> dict[str, Any]:
    """What it asks."""
    return {"model": MODEL, "token_ids": PROMPT, "block_size": SIZE, **more}


@pytest.fixture(scope="module")
def index() -> Iterator[Locator]:
    with Locator() as index:
        yield index


def found(index: Locator, path: str, question: Any) -> Any:
    """The answer."""
    status, text = index.ask(path, question)
    assert status == 200, text
    return json.loads(text)


def test_the_conductors_shapes(index: Locator) -> None:
    with Publisher() as zero, Publisher(1) as one:
        for rank, publisher in enumerate((zero, one)):
            body = registered("node1", publisher.endpoint, rank)
            status, text = index.ask("/register", body)
            assert (status, json.loads(text)) == (
                201,
                {"status": "registered successfully", "instance_id": "node1"},
            )
            publisher.await_subscribers(1)
        zero.publish([PLAIN.stored(0, 2), PLAIN.stored(0, 3, "cpu")])
        one.publish([PLAIN.stored(0, 1), PLAIN.stored(1, 4, "DISK")])
        node1 = {
            "longest_matched": 4 * SIZE,
            "GPU": 2 * SIZE,
            "CPU": 3 * SIZE,
            "DISK": 4 * SIZE,
            "DP": {"0": 3 * SIZE, "1": 4 * SIZE},
        }
        wait_for(lambda: found(index, "/query", asked()) == {"default": {"node1": node1}})
        by_hash = {"model": MODEL, "block_size": SIZE}
        for name in ("seq_hashes", "block_hash"):
            answer = found(index, "/query_by_hash", {**by_hash, name: PLAIN.sequences})
            assert answer == {"default": {"node1": node1}}
        assert found(index, "/query", asked(instance_id="node2")) == {"default": {}}
        assert found(index, "/query", asked(block_size=32)) == {"default": {}}
        assert found(index, "/query", asked(tenant_id="t")) == {"t": {}}
        assert index.ask("/workers") == (200, "[]")  # Dynamo's, whose ids are numbers

        gone = {"type": "vLLM", "modelname": MODEL, "instance_id": "node1", "block_size": SIZE}
        for rank in (0, 1):
            assert found(index, "/unregister", {**gone, "dp_rank": rank}) == {
                "status": "unregistered successfully",
                "removed_instances": [f"node1|default|{rank}"],
            }
        assert index.ask("/unregister", {**gone, "dp_rank": 0})[0] == 404


def test_tenants_salts_and_adapters_of_a_registration_are_kept_apart(index: Locator) -> None:
    with Publisher() as salted, Publisher() as adapted, Publisher() as other:
        bodies = [
            registered("salted", salted.endpoint, additionalsalt="w8a8"),
            registered("adapted", adapted.endpoint, lora_name="sql"),
            registered("other", other.endpoint, tenant_id="t"),
            registered("elsewhere", "tcp://127.0.0.9:9", tenant_id="t", modelname="theirs"),
        ]
        for body in bodies:
            assert index.ask("/register", body)[0] == 201
        for publisher in (salted, adapted, other):
            publisher.await_subscribers(1)
            publisher.publish([PLAIN.stored(0, 2)])

        def hits(path: str = "/query", **more: Any) -> dict[str, int]:
            (instances,) = found(index, path, more).values()
            return {name: one["GPU"] for name, one in instances.items() if one["GPU"]}

        wait_for(lambda: hits(**asked(cache_salt="w8a8")) == {"salted": 2 * SIZE})
        wait_for(lambda: hits(**asked(lora_name="sql")) == {"adapted": 2 * SIZE})
        wait_for(lambda: hits(**asked(tenant_id="t")) == {"other": 2 * SIZE})
        assert hits(**asked()) == {}
        # LMCache has no tenants: it is told of the default one.
        assert found(index, "/lookup", {"tokens": PROMPT})["layout_info"] == {}
        assert index.ask("/query_instance", {"event_id": "1", "ip": "127.0.0.9"})[0] == 404
        for chain, name in ((SALTED, "salted"), (ADAPTED, "adapted"), (PLAIN, "")):
            answer = hits("/query_by_hash", model=MODEL, seq_hashes=chain.sequences)
            assert answer == ({name: 2 * SIZE} if name else {})


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/query", asked(lora_id=3), 422),
        ("/query", {"token_ids": [1], "block_size": 16}, 422),
        ("/query", {**asked(), "model_name": MODEL}, 422),
        ("/query_by_hash", {"model": MODEL, "seq_hashes": [-1]}, 422),
        ("/query_by_hash", {"model": MODEL, "seq_hashes": [1 << 64]}, 422),
        ("/query_by_hash", {"model": MODEL, "seq_hashes": [1], "cache_salt": "s"}, 422),
        ("/query_by_hash", {"model": MODEL, "seq_hashes": [1], "lora_name": "a"}, 422),
        ("/query_by_hash", {"model": MODEL, "seq_hashes": [1] * 70_000}, 422),
        ("/query_by_hash", {"model": MODEL, "block_hashes": [1]}, 422),
        ("/register", registered("a#1", "tcp://127.0.0.1:9"), 422),
        ("/unregister", {"modelname": MODEL, "instance_id": "nobody", "dp_rank": 0}, 404),
    ],
)
def test_bad_questions_have_a_status_and_a_sentence(
    index: Locator, path: str, body: Any, status: int
) -> None:
    answer = index.ask(path, body)
    assert answer[0] == status
    assert json.loads(answer[1])["error"]


# LMCache's controller.


def test_lmcaches_lookup_finds_the_chunks_of_a_daemon(tmp_path: Path) -> None:
    config = tmp_path / "node.toml"
    config.write_text('node = "node-a"\n[events]\nfeed = "127.0.0.1:0"\nengines = ["10.0.0.5:8000"]\n')
    tokens = list(range(1, 1 + 3 * 256))
    question = {"tokens": [*tokens, 1, 2, 3]}
    token = tmp_path / "token"
    token.write_text(TOKEN)
    secured = tmp_path / "index.toml"
    secured.write_text(f'token_file = "{token}"\n')
    with (
        Node("64MiB", "--config", str(config)) as node,
        Locator("--node", node.endpoint("feed"), "--config", str(secured)) as index,
        node.client() as store,
    ):
        assert index.ask("/lookup", question)[0] == 401
        status, text = index.ask("/lookup", question, TOKEN)
        assert (status, json.loads(text)["layout_info"]) == (200, {})
        put(store, "m", tokens)
        layout = {"10.0.0.5:8000": ["LocalCPUBackend", 3 * 256]}

        def layout_now() -> Any:
            return json.loads(index.ask("/lookup", question, TOKEN)[1]).get("layout_info")

        wait_for(lambda: layout_now() == layout)
        assert json.loads(index.ask("/lookup", question, TOKEN)[1])["event_id"].startswith("Lookup")
        at = {"event_id": "1", "ip": "10.0.0.5"}
        assert json.loads(index.ask("/query_instance", at, TOKEN)[1])["res"] == "10.0.0.5:8000"
        assert index.ask("/query_instance", {**at, "ip": "10.0.0.6"}, TOKEN)[0] == 404

        put(store, "n", tokens[:256])
        wait_for(lambda: index.ask("/lookup", question, TOKEN)[0] == 422)
        status, text = index.ask("/lookup", question, TOKEN)
        assert "2 models are known here, m, n; give one of them as model" in text
        status, text = index.ask("/lookup", {**question, "model": "n"}, TOKEN)
        assert json.loads(text)["layout_info"] == {"10.0.0.5:8000": ["LocalCPUBackend", 256]}


def put(store: StoreClient, model: str, tokens: list[int]) -> None:
    """Store a prompt's chunks as LMCache does."""
    namespace = lmcache_namespace(model, 0x01000100)
    with store.reserve(namespace, lmcache_chunk_hashes(tokens), 4096, wait_s=5) as write:
        write.commit()
