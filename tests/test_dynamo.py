"""Dynamo's own indexer follows a daemon's announcements, and agrees with our index whatever happens."""

import contextlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from kvstore.block import Namespace
from kvstore.client import StoreClient
from kvstore.engine_hashes import vllm_block_hashes
from kvstore.engine_keys import vllm_scheme
from tests.dynamo_indexer import DynamoIndexer
from tests.locator import Locator
from tests.node import Node, free_ports, wait_for

MODEL: Final = "m"
BLOCK_TOKENS: Final = 16
BLOCK_BYTES: Final = 64 << 10
ENGINE: Final = "10.0.0.5:8000"
STEPS: Final = 40


def worker(publish: str, replay: str) -> dict[str, Any]:
    """What Dynamo is told of the daemon: it publishes as an engine does."""
    return {
        "instance_id": 7,
        "endpoint": f"tcp://{publish}",
        "replay_endpoint": f"tcp://{replay}",
        "model_name": MODEL,
        "block_size": BLOCK_TOKENS,
    }


def tokens_of(indexer: DynamoIndexer | Locator, prompt: list[int], salt: str) -> tuple[int, int]:
    """Leading tokens of the daemon in host memory, and on disk or nearer."""
    question: dict[str, Any] = {"token_ids": prompt, "model_name": MODEL}
    if salt:
        question["cache_salt"] = salt
    status, text = indexer.ask("/query", question)
    if status == 404:  # nothing of the model was heard
        return 0, 0
    instance = "7" if isinstance(indexer, DynamoIndexer) else ENGINE
    found = json.loads(text)["instances"].get(instance, {"cpu": 0, "disk": 0})
    return found["cpu"], found["disk"]


class Story:
    """What happens to a daemon: prompts that share prefixes are stored, removed, and pushed out."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        stems = [self._tokens(4) for _ in range(3)]
        self.prompts = [stem + self._tokens(blocks) for stem in stems for blocks in (1, 3, 6)] + stems

    def _tokens(self, blocks: int) -> list[int]:
        return [self.random.randrange(1, 50_000) for _ in range(BLOCK_TOKENS * blocks)]

    def namespace(self, salt: str) -> Namespace:
        """Where prompts with that salt are stored."""
        return Namespace(MODEL, block_tokens=BLOCK_TOKENS, scheme=vllm_scheme(), salt=salt)

    def step(self, store: StoreClient) -> None:
        """One more thing."""
        prompt, salt = self.random.choice(self.prompts), self.random.choice(["", "", "tenant"])
        namespace = self.namespace(salt)
        keys = vllm_block_hashes(prompt, BLOCK_TOKENS, salt=salt)
        if self.random.random() < 0.3:
            store.remove(namespace, self.random.sample(keys, self.random.randint(1, 2)))
            return
        begin = self.random.choice([0, 0, 4])
        parent, tokens = (keys[begin - 1] if begin else b""), prompt[begin * BLOCK_TOKENS :]
        if begin < len(keys):
            with store.reserve(
                namespace, keys[begin:], BLOCK_BYTES, parent=parent, tokens=tokens, wait_s=5
            ) as write:
                for view in write.views:
                    view[:8] = self.random.randbytes(8)
                write.commit()


def agree(story: Story, store: StoreClient, dynamo: DynamoIndexer, index: Locator) -> bool:
    """Whether both know of every prompt what the daemon has, ours by both of its questions."""
    for prompt in story.prompts:
        for salt in ("", "tenant"):
            keys = vllm_block_hashes(prompt, BLOCK_TOKENS, salt=salt)
            has = store.hit_length(story.namespace(salt), keys)
            one = index.placements(model=MODEL, tokens=prompt, salt=salt).get(ENGINE, {"dram": 0, "nvme": 0})
            ours = one["dram"], one["nvme"]
            asked = [tokens_of(indexer, prompt, salt) for indexer in (dynamo, index)]
            if {ours, *asked} != {(BLOCK_TOKENS * has.dram, BLOCK_TOKENS * has.nvme)}:
                return False
    return True


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The daemon's, with addresses that a restart keeps."""
    path = tmp_path / "node.toml"
    path.write_text(
        f"""
        [events]
        feed = "127.0.0.1:{free_ports(1)[0]}"
        publish = "127.0.0.1:{free_ports(1)[0]}"
        replay = "127.0.0.1:{free_ports(1)[0]}"
        engines = ["{ENGINE}"]
        tokens = true
        """
    )
    return path


@contextlib.contextmanager
def both(node: Node, folder: Path) -> Iterator[tuple[DynamoIndexer, Locator]]:
    """Dynamo's indexer and ours, which follow the daemon."""
    question = worker(node.endpoint("publish"), node.endpoint("replay"))
    with (
        DynamoIndexer(folder / "dynamo.log") as dynamo,
        Locator("--node", node.endpoint("feed")) as index,
    ):
        index.ready()
        assert dynamo.ask("/register", question)[0] == 201
        yield dynamo, index


def test_dynamo_agrees_while_blocks_move_down_to_a_disk(tmp_path: Path, config: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    story = Story(1)
    flags = ["--config", str(config), "--nvme", f"{disk}:64MiB"]
    with Node("2MiB", *flags) as node, both(node, tmp_path) as (dynamo, index), node.client() as store:
        for _ in range(STEPS):
            story.step(store)
            if story.random.random() < 0.2:
                wait_for(lambda: agree(story, store, dynamo, index))
        wait_for(lambda: agree(story, store, dynamo, index))
        known = [tokens_of(dynamo, prompt, "") for prompt in story.prompts]
        assert any(disk > memory for memory, disk in known)


def test_dynamo_agrees_after_a_daemon_was_killed_and_started_again(tmp_path: Path, config: Path) -> None:
    story = Story(2)
    with Node("64MiB", "--config", str(config)) as node, both(node, tmp_path) as (dynamo, index):
        for life in range(3):
            with node.client() as store:
                for _ in range(10):
                    story.step(store)
                wait_for(lambda: agree(story, store, dynamo, index))
            assert any(tokens_of(dynamo, prompt, "")[0] for prompt in story.prompts)
            if life < 2:
                node.kill()
                node.start()


def test_an_index_that_was_killed_catches_up_once_a_router_registers_again(config: Path) -> None:
    prompt = list(range(1, 1 + 3 * BLOCK_TOKENS))
    namespace = Namespace(MODEL, block_tokens=BLOCK_TOKENS, scheme=vllm_scheme())
    with Node("64MiB", "--config", str(config)) as node, node.client() as store, Locator() as index:
        keys = vllm_block_hashes(prompt, BLOCK_TOKENS)
        with store.reserve(namespace, keys, BLOCK_BYTES, parent=b"", tokens=prompt, wait_s=5) as write:
            write.commit()
        question = worker(node.endpoint("publish"), node.endpoint("replay"))
        asked = {"token_ids": prompt, "model_name": MODEL}
        for life in range(2):
            assert index.ask("/register", question)[0] == 201
            wait_for(lambda: '"cpu":48' in index.ask("/query", asked)[1])
            if not life:
                index.kill()
                index.start()
