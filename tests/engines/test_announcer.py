"""What a daemon announces is what vLLM's own classes decode, and is asked for again as vLLM's own is."""

import json
import subprocess
import time
from pathlib import Path
from typing import Any, Final

import pytest

from kvstore.block import Namespace
from tests.node import wait_for
from tests.test_announcer import ENGINE, MODEL, ONE, Router, announcing, keys, put

_ROOT: Final = Path(__file__).parents[2]
_PYTHON: Final = _ROOT / ".venv-engines" / "bin" / "python"
SALTED: Final = Namespace(model=MODEL, block_tokens=4, salt="tenant", group="x")

pytestmark = pytest.mark.timeout(300)


def decoded(payloads: list[bytes]) -> list[dict[str, Any]]:
    """By vLLM."""
    script = Path(__file__).with_name("decode_events.py")
    lines = "".join(f"{payload.hex()}\n" for payload in payloads)
    done = subprocess.run([_PYTHON, script], input=lines, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_vllm_decodes_all_that_is_announced(tmp_path: Path) -> None:
    with announcing(tmp_path, ONE + "tokens = true") as (node, store):
        put(store, ENGINE, keys(3), list(range(12)))
        put(store, SALTED, keys(2), list(range(8)))
        put(store, ENGINE, keys(1, "placeholder"))
        store.remove(ENGINE, keys(3))
        with Router(node.endpoint("publish"), node.endpoint("replay")) as router:

            def blocks() -> int:
                state = store.statistics().events
                assert state is not None
                return state.stored_blocks + state.removed_blocks

            wait_for(lambda: blocks() == 9 and router.replay(0))
            batches = decoded([payload for _, _, payload in router.replay(0)])
    events = [event for batch in batches for event in batch["events"]]

    assert all(abs(batch["ts"] - time.time()) < 300 and batch["rank"] == 0 for batch in batches)
    engine, salted, placeholder, removed = events
    hashes = [int.from_bytes(key[-8:], "big") for key in keys(3)]
    assert engine["type"] == "BlockStored"
    assert (engine["block_hashes"], engine["token_ids"], engine["block_size"]) == (hashes, list(range(12)), 4)
    assert (engine["medium"], engine["group_idx"], engine["parent_block_hash"]) == ("CPU", 0, None)
    assert (salted["extra_keys"], salted["group_idx"]) == ([["tenant"], None], None)
    assert not set(salted["block_hashes"]) & set(hashes)
    assert (placeholder["token_ids"], placeholder["block_size"]) == ([], 0)
    assert removed["type"] == "BlockRemoved"
    assert (removed["block_hashes"], removed["medium"], removed["group_idx"]) == (hashes, "CPU", 0)
