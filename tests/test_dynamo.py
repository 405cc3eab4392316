"""Dynamo's own indexer follows a daemon's announcements, and agrees with our index whatever happens."""

import contextlib
import json
import random
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from kvstore.block import Namespace
from kvstore.client import StoreClient
from kvstore.engine_hashes import vllm_block_hashes
from kvstore.engine_keys import vllm_scheme
from tests.locator import Locator
from tests.node import Node, free_ports, wait_for

MODEL: Final = "m"
BLOCK_TOKENS: Final = 16
BLOCK_BYTES: Final = 64 << 10
ENGINE: Final = "10.0.0.5:8000"
STEPS: Final = 40


class Dynamo:
    """`python -m dynamo.indexer`, told of one worker."""

    def __init__(self, log: Path, publish: str, replay: str) -> None:
        self._url = f"http://127.0.0.1:{free_ports(1)[0]}"
        port = self._url.rpartition(":")[2]
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "dynamo.indexer", "--port", port, "--threads", "1"],
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        worker = {
            "instance_id": 7,
            "endpoint": f"tcp://{publish}",
            "replay_endpoint": f"tcp://{replay}",
            "model_name": MODEL,
            "block_size": BLOCK_TOKENS,
        }
        wait_for(lambda: self._is_up() and self._post("/register", worker)["status"] == "ok")

    def tokens(self, prompt: list[int], salt: str) -> tuple[int, int]:
        """Leading tokens in host memory, and on disk or nearer."""
        question: dict[str, Any] = {"token_ids": prompt, "model_name": MODEL}
        if salt:
            question["cache_salt"] = salt
        found = self._post("/query", question)["instances"].get("7", {"cpu": 0, "disk": 0})
        return found["cpu"], found["disk"]

    def _is_up(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self._url}/health", timeout=5):
            return True
        return False

    def _post(self, path: str, body: Any) -> Any:
        request = urllib.request.Request(
            self._url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.load(answer)

    def stop(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(20)


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


def agree(story: Story, store: StoreClient, dynamo: Dynamo, index: Locator) -> bool:
    """Whether both know of every prompt what the daemon has."""
    for prompt in story.prompts:
        for salt in ("", "tenant"):
            keys = vllm_block_hashes(prompt, BLOCK_TOKENS, salt=salt)
            has = store.hit_length(story.namespace(salt), keys)
            one = index.placements(model=MODEL, tokens=prompt, salt=salt).get(ENGINE, {"dram": 0, "nvme": 0})
            ours = one["dram"], one["nvme"]
            if not ours == dynamo.tokens(prompt, salt) == (BLOCK_TOKENS * has.dram, BLOCK_TOKENS * has.nvme):
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
def both(node: Node, folder: Path) -> Iterator[tuple[Dynamo, Locator]]:
    """Dynamo's indexer and ours, which follow the daemon."""
    dynamo = Dynamo(folder / "dynamo.log", node.endpoint("publish"), node.endpoint("replay"))
    try:
        with Locator("--node", node.endpoint("feed")) as index:
            index.ready()
            yield dynamo, index
    finally:
        dynamo.stop()


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
        assert any(dynamo.tokens(prompt, "")[1] > dynamo.tokens(prompt, "")[0] for prompt in story.prompts)


def test_dynamo_agrees_after_a_daemon_was_killed_and_started_again(tmp_path: Path, config: Path) -> None:
    story = Story(2)
    with Node("64MiB", "--config", str(config)) as node, both(node, tmp_path) as (dynamo, index):
        for life in range(3):
            with node.client() as store:
                for _ in range(10):
                    story.step(store)
                wait_for(lambda: agree(story, store, dynamo, index))
            assert any(dynamo.tokens(prompt, "")[0] for prompt in story.prompts)
            if life < 2:
                node.kill()
                node.start()
