"""The benchmarks of the index run, and say what they ran beside. Their figures are not tested."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from benchmarks.batches import (
    BLOCK_TOKENS,
    PROMPT_BLOCKS,
    feed_frames,
    prompts,
    removed_batch,
    stored_batches,
)
from benchmarks.index_events import LMCACHE, VLLM, Engine, Node
from benchmarks.lookup import SHAPES, TREE, WITH_SCORES
from benchmarks.peers import dynamo
from benchmarks.routers import WAYS
from kvstore.index.events import BlockStored, decode_batch
from tests.test_benchmarks import FIELDS, run_quick

needs_dynamo = pytest.mark.skipif(find_spec("dynamo") is None, reason="Dynamo is not installed")


def cases_of(contents: dict[str, Any]) -> dict[str, Any]:
    """The rows by their case, each of which must be whole."""
    assert all(set(found) == FIELDS and found["limit"]["value"] > 0 for found in contents["rows"])
    return {found["case"]: found for found in contents["rows"]}


@needs_dynamo
def test_lookups_are_measured_beside_dynamos_tree(tmp_path: Path) -> None:
    contents, _ = run_quick(["lookup", "--rounds", "1"], tmp_path / "rows.json")
    cases = cases_of(contents)
    for shape in ("equal", "4 depths", "all different", "equal, walked"):
        lookup, find = (cases[f"{verb} 8192 keys 64 engines {shape}"] for verb in ("lookup", "find"))
        assert lookup["unit"] == find["unit"] == "us"
        assert lookup["better"] == find["better"] == "lower"
        assert set(lookup["peers"]) == {TREE, WITH_SCORES}
        assert set(find["peers"]) == {WITH_SCORES}
    assert all(found["ours"] > 0 for found in cases.values())
    assert contents["versions"]["dynamo"] == "1.6.1"
    judged = {(target["case"], target["wanted"]) for target in contents["targets"]["lookup"]}
    assert {("lookup 8192 keys 64 engines 4 depths", f"≥ 1.00 of {TREE}")} <= judged
    assert {("lookup 8192 keys 64 engines 4 depths", "≤ 5 us")} <= judged


def test_without_dynamo_ours_is_measured_alone(tmp_path: Path) -> None:
    (tmp_path / "dynamo.py").write_text("raise ImportError('no dynamo here')")
    contents, printed = run_quick(
        ["lookup", "--rounds", "1"], tmp_path / "rows.json", PYTHONPATH=str(tmp_path)
    )
    assert all(found["peers"] == {} for found in cases_of(contents).values())
    assert contents["missing"] == {"dynamo": f"no dynamo here; {dynamo.INSTALL}"}
    assert "dynamo is missing" in printed
    beside = [target for target in contents["targets"]["lookup"] if "dynamo" in target["wanted"]]
    assert beside
    assert all(target["met"] is None for target in beside)


@needs_dynamo
def test_ingest_is_measured_from_bytes_to_answers(tmp_path: Path) -> None:
    contents, _ = run_quick(["ingest", "--rounds", "1"], tmp_path / "rows.json")
    cases = cases_of(contents)
    assert cases["ingest 64-block events"]["unit"] == "blocks/s"
    assert set(cases["ingest 64-block events"]["peers"]) == {"dynamo RadixTree"}
    assert cases["ingest 64-block events, CPU"]["unit"] == "us/block"
    assert set(cases["ingest 64-block events, CPU"]["peers"]) == {"dynamo.indexer"}
    assert cases["memory, 1M blocks on 64 engines"]["unit"] == "bytes/block"
    assert cases["from commit to a lookup that finds it, p99"]["ours"] > 0
    assert cases["dead node with 1M blocks, longest stall while swept"]["ours"] > 0
    assert len(contents["targets"]["ingest"]) == 5


@needs_dynamo
def test_routers_lookups_are_measured_beside_dynamos_indexer(tmp_path: Path) -> None:
    contents, _ = run_quick(["http", "--rounds", "1"], tmp_path / "rows.json")
    cases = cases_of(contents)
    for way in WAYS:
        for figure, unit in (("lookups", "1/s"), ("CPU", "us"), ("p50", "us")):
            found = cases[f"{way.name}, 8 engines, half: {figure}"]
            assert found["unit"] == unit
            assert set(found["peers"]) == {"dynamo.indexer"}
            assert found["ours"] > 0
    assert cases["acquire of 64 blocks beside 1,000 lookups/s, p50"]["limit"]["name"] == "no lookups"
    assert len(contents["targets"]["http"]) == 6


def test_engines_have_as_much_of_a_prompt_as_a_shape_says() -> None:
    depths = {shape.name: {shape.depth(8192, engine, 64) for engine in range(64)} for shape in SHAPES}
    assert {name: len(found) for name, found in depths.items()} == {
        "equal": 1,
        "equal in part": 1,
        "4 depths": 4,
        "4 depths in part": 4,
        "all different": 64,
    }
    assert max(depths["equal"]) == max(depths["all different"]) == 8192
    assert max(depths["equal in part"]) == max(depths["4 depths in part"]) == 7168


@pytest.mark.parametrize("arrays", [False, True])
def test_a_prompts_batches_hold_its_blocks_in_a_chain(arrays: bool) -> None:
    (prompt,) = prompts(PROMPT_BLOCKS)
    parent = None
    for number, payload in enumerate(stored_batches(prompt, 16, arrays=arrays)):
        (event,) = decode_batch(payload).events
        assert isinstance(event, BlockStored)
        assert event.parent_block_hash == parent
        assert event.block_hashes == prompt.hashes[16 * number : 16 * (number + 1)]
        assert list(event.tokens()) == prompt.tokens[256 * number : 256 * (number + 1)]
        assert event.block_size == BLOCK_TOKENS
        parent = event.block_hashes[-1]


def test_what_is_measured_reaches_the_index() -> None:
    (prompt,) = prompts(PROMPT_BLOCKS)
    engine = Engine()
    engine.take(list(stored_batches(prompt, 1)))
    assert engine.blocks() == PROMPT_BLOCKS
    engine.take([removed_batch(prompt)])
    assert engine.blocks() == 0
    for scheme in (VLLM, LMCACHE):
        node = Node()
        for frames in feed_frames(list(prompts(2 * PROMPT_BLOCKS, digests=True)), scheme):
            node.take(frames)
        assert node.blocks() == 2 * PROMPT_BLOCKS
