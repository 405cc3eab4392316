"""The demo as a user runs it: its own processes, a real daemon, its exit status and what it prints."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.demo.reports import (
    AloneReport,
    Control,
    DecodeReport,
    Generation,
    PrefillReport,
    ReturnReport,
)
from benchmarks.demo.verdict import Verdict, judge, table

ROOT = Path(__file__).parents[1]

# A float32 key and value of 64 dimensions for each of 2 heads of each of 4 layers.
TOKEN_BYTES = 4 * 2 * 2 * 64 * 4
PROMPT_BYTES = 4096 * TOKEN_BYTES
BLOCK_BYTES = 256 * TOKEN_BYTES
TOKENS = [1, 2, 3]
DECODES = ("decode from the store", "decode after the daemon was killed", "decode on another node")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """One run: what it printed and what it wrote."""
    json_path = tmp_path_factory.mktemp("demo") / "demo.json"
    command = [sys.executable, "-m", "benchmarks.demo", "--json", str(json_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout, json.loads(json_path.read_text())


def test_decode_from_the_store_gives_the_tokens_of_a_run_without_it(demo: tuple[str, dict[str, Any]]) -> None:
    printed, verdict = demo
    for index, name in enumerate(DECODES):
        assert verdict["comparisons"][index] == {
            "name": name,
            "first_difference": None,
            "bytes_equal": True,
            "as_expected": True,
        }
    assert len(verdict["tokens"]) == 32
    assert len(set(verdict["tokens"])) > 16  # a model that repeats itself would not notice wrong KV
    assert verdict["passed"]
    assert printed.rstrip().endswith("passed")


def test_zeroed_and_swapped_blocks_change_the_tokens(demo: tuple[str, dict[str, Any]]) -> None:
    _, verdict = demo
    name_to_control = {control["name"]: control for control in verdict["comparisons"][len(DECODES) :]}
    for name in (
        "all KV zeroed",
        "one block zeroed",
        "one block swapped with another prompt's",
        "two blocks swapped, half of them fetched",
    ):
        assert name_to_control[name]["first_difference"] is not None, name
    assert not any(control["bytes_equal"] for control in name_to_control.values())


def test_the_bytes_moved_are_those_of_the_prompts_kv(demo: tuple[str, dict[str, Any]]) -> None:
    printed, verdict = demo
    assert verdict["published_bytes"] == PROMPT_BYTES
    assert verdict["fetched_bytes"] == PROMPT_BYTES
    assert verdict["held_bytes"] == PROMPT_BYTES + BLOCK_BYTES
    assert verdict["loaded_bytes"] == verdict["elsewhere_bytes"] == PROMPT_BYTES
    assert f"{PROMPT_BYTES:,}" in printed


def test_the_store_brings_the_first_token_sooner(demo: tuple[str, dict[str, Any]]) -> None:
    printed, verdict = demo
    assert 0 < verdict["ttft_with_store_s"] < verdict["ttft_without_store_s"]
    assert "TTFT without the store" in printed
    assert "TTFT with the store" in printed
    assert 0 < verdict["ttft_after_kill_s"] < verdict["ttft_without_store_s"]
    assert 0 < verdict["ttft_elsewhere_s"] < verdict["ttft_without_store_s"]
    assert "TTFT on another node, through Redis" in printed


def test_other_tokens_from_the_store_fail_the_demo() -> None:
    assert _verdict().passed
    assert not _verdict(decoded=[1, 2, 4]).passed
    assert not _verdict(returned=[1, 2, 4]).passed
    assert not _verdict(elsewhere=[1, 2, 4]).passed
    assert "differ from #3" in table(_verdict(decoded=[1, 2, 4]))


def test_without_a_redis_server_one_node_is_shown_and_that_is_said() -> None:
    verdict = _verdict(elsewhere=None)
    assert verdict.passed
    assert "no TTFT on another node" in table(verdict)


def test_a_control_that_changes_nothing_fails_the_demo() -> None:
    assert not _verdict(controlled=[1, 2, 3]).passed
    assert not _verdict(control_digests=DIGESTS).passed


def test_other_bytes_than_the_prompts_fail_the_demo() -> None:
    assert not _verdict(read_bytes=PROMPT_BYTES - BLOCK_BYTES).passed
    assert not _verdict(decoded_digests=[*DIGESTS[1:], DIGESTS[0]]).passed
    assert not _verdict(loaded_bytes=0).passed


DIGESTS = [f"digest {index}" for index in range(16)]


def _verdict(
    decoded: list[int] | None = None,
    decoded_digests: list[str] | None = None,
    controlled: list[int] | None = None,
    control_digests: list[str] | None = None,
    read_bytes: int = PROMPT_BYTES,
    returned: list[int] | None = None,
    elsewhere: list[int] | None = TOKENS,
    loaded_bytes: int = PROMPT_BYTES,
) -> Verdict:
    """The verdict on reports of a run that went well, but for what is given."""
    control = Control("zeroed", controlled or [1, 2, 9], control_digests or ["wrong"] * 16, True)
    return judge(
        AloneReport(Generation([1, 2, 3], 0.1), [1.0]),
        PrefillReport(DIGESTS, PROMPT_BYTES),
        DecodeReport(
            generation=Generation(decoded or [1, 2, 3], 0.1),
            digests=decoded_digests or DIGESTS,
            read_bytes=read_bytes,
            held_bytes=PROMPT_BYTES + BLOCK_BYTES,
            ttft_s=[0.1],
            controls=[control],
        ),
        ReturnReport(Generation(returned or [1, 2, 3], 0.1), DIGESTS, 0.2, loaded_bytes),
        None
        if elsewhere is None
        else ReturnReport(Generation(list(elsewhere), 0.1), DIGESTS, 0.3, PROMPT_BYTES),
    )
