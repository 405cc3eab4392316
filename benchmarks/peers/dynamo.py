"""Dynamo's two indexes: its radix tree in this process, and its indexer as a process of its own.

The tree does its work in a thread of its own, whom every call waits for. This module can be imported without
Dynamo, and says then what is missing.
"""

import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, cast

import msgspec

from benchmarks.batches import BLOCK_TOKENS, MODEL, Prompt
from benchmarks.indexers import Http
from benchmarks.processes import free_ports, listens, start_process, stop_process, wait_for

INSTALL: Final = "pip install ai-dynamo-runtime==1.6.1"
# Of its indexer: of 1, 2 and 4 the one that takes the least CPU for a block, on one core.
_THREADS: Final = 2


def missing() -> str | None:
    """Why there is no Dynamo here and how to get it; None where there is."""
    try:
        import dynamo._core  # noqa: F401
    except ImportError as exc:
        return f"{exc}; {INSTALL}"
    return None


def installed_version() -> str:
    """Which Dynamo this is."""
    return version("ai-dynamo-runtime")


class Tree:
    """`dynamo._core.RadixTree`: who has how many leading blocks. Workers are numbers."""

    def __init__(self) -> None:
        from dynamo._core import RadixTree

        self._tree = RadixTree()

    def apply(self, worker: int, events: Iterable[bytes]) -> None:
        """The worker has the blocks of these events."""
        for event in events:
            self._tree.apply_event(worker, event)

    def look_up(self, keys: list[int]) -> object:
        """Its answer as it comes, which has yet to be read."""
        return self._tree.find_matches(keys)

    def scores(self, keys: list[int]) -> dict[tuple[int, int], int]:
        """Its answer read: how many leading keys each (worker, rank) has of those that have any."""
        scores: Any = self._tree.find_matches(keys).scores  # its annotation knows no ranks
        return cast(dict[tuple[int, int], int], scores)


def stored_events(keys: Sequence[int], event_blocks: int) -> list[bytes]:
    """A prompt, whose keys follow each other, as the tree takes it: so many blocks in each event."""
    return [
        msgspec.json.encode({"event_id": start, "data": {"stored": _stored(keys, start, event_blocks)}})
        for start in range(0, len(keys), event_blocks)
    ]


def _stored(keys: Sequence[int], start: int, event_blocks: int) -> dict[str, object]:
    blocks = [
        {"block_hash": key, "tokens_hash": key, "mm_extra_info": None}
        for key in keys[start : start + event_blocks]
    ]
    return {"parent_hash": keys[start - 1] if start else None, "start_position": None, "blocks": blocks}


class DynamoIndexer:
    """`python -m dynamo.indexer`, of the engines at some endpoints, by number."""

    def __init__(self, directory: Path, endpoints: Sequence[str]) -> None:
        (port,) = free_ports(1)
        log = directory / "dynamo.log"
        command = [sys.executable, "-m", "dynamo.indexer", "--port", str(port), "--threads", str(_THREADS)]
        self._process = start_process(command, log)
        self.pid = self._process.pid
        self.port = port
        self._http = Http(port)
        try:
            wait_for(lambda: listens(port), self._process, log)
            for number, endpoint in enumerate(endpoints):
                engine = {"instance_id": number, "endpoint": endpoint}
                self._http.post("/register", {**engine, "model_name": MODEL, "block_size": BLOCK_TOKENS})
        except BaseException:
            stop_process(self._process)
            raise

    def knows(self, number: int, prompt: Prompt) -> bool:
        from dynamo._core import compute_block_hash_for_seq

        hashes = [_signed(each) for each in compute_block_hash_for_seq(prompt.tokens, BLOCK_TOKENS)]
        answer = self._http.post("/query_by_hash", {"block_hashes": hashes, "model_name": MODEL})
        return bool(answer["scores"].get(str(number), {}).get("0") == len(prompt.tokens))

    def close(self) -> None:
        self._http.close()
        stop_process(self._process)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number
