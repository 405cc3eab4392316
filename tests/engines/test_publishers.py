"""vLLM's and SGLang's own publishers feed the index, with every type of event and every field they have."""

import asyncio
import hashlib
import json
import os
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import pytest
import zmq

from kvstore.block import Namespace
from kvstore.content_keys import content_keys
from kvstore.engine_hashes import MediaItem
from kvstore.index.engine_source import EngineKind, EngineSource
from kvstore.index.engine_subscriber import EngineSubscriber
from kvstore.index.locality import Engine, Locality
from kvstore.index.resolver import Resolver
from tests.lmcache_processes import end_group

PYTHON: Final = Path(__file__).parents[2] / ".venv-engines" / "bin" / "python"
NAME: Final = "10.0.0.1:8000"
SIZE: Final = 4
PROMPT: Final = list(range(5, 5 + 4 * SIZE))
WITHIN_S: Final = 30.0
SPACE: Final = Namespace("m", SIZE, scheme="engine")
OWN: Final = Namespace("m", SIZE, scheme="tokens")

pytestmark = pytest.mark.timeout(120)


class Publisher:
    """The process of `publisher.py`, at two sockets in a folder. It binds them as soon as it is ready."""

    def __init__(self, kind: EngineKind, folder: Path, environ: dict[str, str]) -> None:
        assert PYTHON.exists(), "no .venv-engines here; run these tests with `make test-engines`"
        self.kind = kind
        self.endpoint, self.replay = f"ipc://{folder}/events", f"ipc://{folder}/replay"
        script = Path(__file__).with_name("publisher.py")
        self._log = folder / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [PYTHON, script, kind, self.endpoint, self.replay, "kv"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **environ},
                start_new_session=True,
            )

    def ready(self) -> None:
        """Wait until it has done what it was told."""
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "\n", self._log.read_text()[-4000:]

    def publish(self, *events: dict[str, Any]) -> None:
        """One batch of these events."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(events) + "\n")
        self._process.stdin.flush()
        self.ready()

    def stop(self) -> None:
        end_group(self._process, 1.0)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


@contextmanager
def publishing(kind: EngineKind, folder: Path, **environ: str) -> Iterator[Publisher]:
    publisher = Publisher(kind, folder, environ)
    try:
        publisher.ready()
        yield publisher
    finally:
        publisher.stop()


class Listener:
    """A subscriber to a publisher, and what the index says of its engine."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", publisher: Publisher) -> None:
        self.locality = Locality()
        source = EngineSource(
            NAME, publisher.kind, "m", SIZE, SPACE.scheme, publisher.endpoint, publisher.replay, "kv"
        )
        self.subscriber = EngineSubscriber(context, source, self.locality, Resolver())

    def has(self, *keys: int, space: Namespace = SPACE) -> tuple[int, ...]:
        """Leading blocks in gpu, dram, nvme, remote, cumulative."""
        (found,) = self.locality.find({space: keys}, [Engine(NAME)])
        return tuple(n // space.block_tokens for n in (found.gpu, found.dram, found.nvme, found.remote))

    async def until(self, condition: Callable[[], bool]) -> None:
        deadline = asyncio.get_running_loop().time() + WITHIN_S
        while not condition():
            assert asyncio.get_running_loop().time() < deadline, self.subscriber.statistics()
            await asyncio.sleep(0.01)

    async def batches(self, number: int) -> None:
        await self.until(lambda: self.subscriber.statistics().batches == number)


@asynccontextmanager
async def listening(publisher: Publisher) -> AsyncIterator[Listener]:
    with zmq.Context() as context:
        listener = Listener(context, publisher)
        try:
            yield listener
        finally:
            listener.subscriber.close()


def digest(number: int) -> bytes:
    return hashlib.sha256(bytes([number])).digest()


def key(number: int) -> int:
    return int.from_bytes(digest(number)[-8:], "big") & (1 << 60) - 1


def hashes(*numbers: int) -> list[dict[str, str]]:
    return [{"digest": digest(number).hex()} for number in numbers]


def vllm_stored(numbers: list[int], parent: int | None = None, **rest: Any) -> dict[str, Any]:
    """Blocks of PROMPT, whose first is 0."""
    return {
        "type": "BlockStored",
        "block_hashes": hashes(*numbers),
        "parent_block_hash": None if parent is None else hashes(parent)[0],
        "token_ids": PROMPT[: len(numbers) * SIZE],
        "block_size": SIZE,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        **rest,
    }


PLACEHOLDER: Final = {"token_ids": [], "block_size": 0}


@pytest.mark.parametrize("as_numbers", ["0", "1"])
def test_every_event_of_vllm_is_understood(as_numbers: str, tmp_path: Path) -> None:
    async def follow(vllm: Publisher) -> None:
        full = {"group_idx": 0, "kv_cache_spec_kind": "full_attention", "extra_keys": [None]}
        vllm.publish(vllm_stored([0], **full), vllm_stored([1], 0, **full, session_id="s"))
        async with listening(vllm) as index:
            await index.batches(1)  # the replay has it
            assert index.has(key(0), key(1)) == (2, 2, 2, 2)
            vllm.publish(
                vllm_stored([0], medium="CPU", locality="LOCAL"),
                vllm_stored([1], medium="CPU", group_idx=0, ownership="tier", **PLACEHOLDER),
                vllm_stored([0], medium="STORAGE", locality="REMOTE"),
                vllm_stored(
                    [2], group_idx=1, kv_cache_spec_kind="sliding_window", kv_cache_spec_sliding_window=8
                ),
                vllm_stored([3, 4], block_size=2 * SIZE, token_ids=PROMPT, group_idx=2),
                {"type": "BlockRemoved", "block_hashes": hashes(1, 0), "medium": "GPU", "group_idx": 0},
            )
            await index.batches(2)
            assert index.has(key(0), key(1)) == (0, 2, 2, 2)
            double = replace(SPACE, block_tokens=2 * SIZE, group="2", scheme="engine/2")
            assert index.has(key(3), key(4), space=double) == (2, 2, 2, 2)
            vllm.publish(
                {"type": "BlockRemoved", "block_hashes": hashes(0), "medium": "CPU", "locality": "LOCAL"}
            )
            await index.batches(3)
            assert index.has(key(0)) == (0, 0, 0, 1)
            statistics = index.subscriber.statistics()
            assert (statistics.ignored, statistics.undecodable, statistics.incomplete) == (
                {"kind": 1},
                0,
                False,
            )
            vllm.publish({"type": "AllBlocksCleared"})
            await index.batches(4)
            assert index.subscriber.statistics().blocks == 0

    with publishing(EngineKind.VLLM, tmp_path, VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES=as_numbers) as vllm:
        asyncio.run(follow(vllm))


def test_lora_salt_and_media_of_vllm_meet_the_prompt(tmp_path: Path) -> None:
    async def follow(vllm: Publisher) -> None:
        image = MediaItem("image", 1, SIZE)
        lora = {"lora_id": 1, "lora_name": "a"}
        vllm.publish(
            vllm_stored([0, 1], **lora, extra_keys=[["a", "salt"], ["a"]]),
            vllm_stored([2, 3], **lora, extra_keys=[["a", ["image", 1]], ["a", ["image", -3]]]),
            vllm_stored([0], medium="CPU", **PLACEHOLDER),
        )
        async with listening(vllm) as index:
            await index.batches(1)
            salted = content_keys(PROMPT[: 2 * SIZE], SIZE, lora="a", salt="salt")
            pictured = content_keys(PROMPT[: 2 * SIZE], SIZE, lora="a", media=[image])
            assert index.has(*salted, space=OWN) == (2, 2, 2, 2)
            assert index.has(*pictured, space=OWN) == (2, 2, 2, 2)
            vllm.publish({"type": "BlockRemoved", "block_hashes": hashes(0, 1), "medium": "GPU"})
            await index.batches(2)
            assert index.has(*salted, space=OWN) == (0, 1, 1, 1)
            assert index.subscriber.statistics().ignored == {}

    with publishing(EngineKind.VLLM, tmp_path) as vllm:
        asyncio.run(follow(vllm))


def sglang_stored(numbers: list[int], parent: int | None = None, **rest: Any) -> dict[str, Any]:
    """Pages as SGLang publishes them, whose hashes are signed."""
    return {
        "type": "BlockStored",
        "block_hashes": numbers,
        "parent_block_hash": parent,
        "token_ids": PROMPT[: len(numbers) * SIZE],
        "block_size": SIZE,
        "lora_id": None,
        **rest,
    }


def test_every_event_of_sglang_is_understood(tmp_path: Path) -> None:
    async def follow(sglang: Publisher) -> None:
        low = (1 << 60) - 1
        pairs = list(pairwise(PROMPT[: SIZE + 1]))
        sglang.publish(sglang_stored([-7, 8], medium="GPU"), sglang_stored([9], 8, medium="GPU"))
        async with listening(sglang) as index:
            await index.batches(1)
            assert index.has(-7 & low, 8, 9) == (3, 3, 3, 3)
            sglang.publish(
                sglang_stored([-7], medium="CPU_PINNED", session_id="s"),
                sglang_stored([8], -7, medium="DISK"),
                sglang_stored([9], 8, medium="EXTERNAL"),
                sglang_stored([20], cache_salt="salt", medium="GPU"),
                sglang_stored([21], lora_name="a", cache_salt="salt", medium="GPU"),
                sglang_stored([22], lora_name="b", medium="GPU", token_ids=pairs),
                {"type": "BlockRemoved", "block_hashes": [-7, 8, 9], "medium": "GPU"},
            )
            await index.batches(2)
            assert index.has(-7 & low, 8, 9) == (0, 1, 2, 3)
            assert index.has(20) == (1, 1, 1, 1)
            salted = content_keys(PROMPT[:SIZE], SIZE, lora="a", salt="salt")
            assert index.has(*salted, space=OWN) == (1, 1, 1, 1)
            eagle = content_keys(PROMPT[: SIZE + 1], SIZE, lora="b", eagle=True)
            assert index.has(*eagle, space=replace(OWN, scheme="tokens-eagle")) == (1, 1, 1, 1)
            sglang.publish(
                {"type": "BlockRemoved", "block_hashes": [20, 21, 22]}, {"type": "AllBlocksCleared"}
            )
            await index.batches(3)
            statistics = index.subscriber.statistics()
            assert (statistics.blocks, statistics.ignored, statistics.undecodable) == (0, {}, 0)

    with publishing(EngineKind.SGLANG, tmp_path) as sglang:
        asyncio.run(follow(sglang))
