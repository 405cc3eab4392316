"""The benchmarks run, say what they ran beside, and judge as they promise. Their figures are not tested."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from benchmarks.harness import Limit, Row, Target, interleaved, judge
from benchmarks.peers import PEER_TO_INSTALL
from benchmarks.peers.base import WorkingSet, filled_buffer
from benchmarks.trace import KNOWN, QUICK_SIZES, Way, prompts, replay_one, replay_two
from kvstore.node.policy import POLICIES

ROOT = Path(__file__).parent.parent


def row(case: str, ours: float, limit: float, *, better: Any = "higher", **peers: float) -> Row:
    return Row("node", case, "GB/s", better, ours, Limit("memcpy", limit), peers)


FIELDS = {"bench", "case", "unit", "better", "ours", "limit", "peers"}


def run_quick(names: list[str], output: Path, **environ: str) -> tuple[dict[str, Any], str]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *names, "--quick", "--json", str(output)],
        cwd=ROOT,
        env={**os.environ, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    return json.loads(output.read_text()), done.stdout


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """What `node --quick` writes and prints where no peer is installed."""
    directory = tmp_path_factory.mktemp("benchmarks")
    for package in ("redis", "mooncake"):
        (directory / f"{package}.py").write_text(f"raise ImportError('no {package} here')")
    return run_quick(["node"], directory / "rows.json", PYTHONPATH=str(directory))


def test_rows_have_figures_limits_and_units(quick_run: tuple[dict[str, Any], str]) -> None:
    contents, _ = quick_run
    cases = {row["case"]: row for row in contents["rows"]}
    assert {f"{verb} 2MiB" for verb in ("put batch", "get batch", "put single", "get single")} <= set(cases)
    for found in cases.values():
        assert set(found) == FIELDS
        assert found["bench"] == "node"
        assert found["better"] in ("higher", "lower")
        assert found["ours"] > 0
        assert set(found["limit"]) == {"name", "value"}
        assert found["limit"]["value"] > 0
        assert found["peers"] == {}


def test_a_file_says_where_and_when_it_was_measured(quick_run: tuple[dict[str, Any], str]) -> None:
    contents, _ = quick_run
    assert contents["quick"] is True
    assert contents["date"]
    assert contents["machine"]["cpu"]
    assert "core" in contents["captions"]["node"]
    assert "python" in contents["versions"]


def test_missing_peers_are_named_with_a_remedy(quick_run: tuple[dict[str, Any], str]) -> None:
    contents, printed = quick_run
    assert set(contents["missing"]) == set(PEER_TO_INSTALL)
    for name in PEER_TO_INSTALL:
        assert f"{name} is missing" in printed
    assert "pip install" in printed


def test_a_missing_peer_leaves_its_targets_unmeasured(quick_run: tuple[dict[str, Any], str]) -> None:
    contents, _ = quick_run
    targets = contents["targets"]["node"]
    beside = [target for target in targets if "mooncake" in target["wanted"] or "redis" in target["wanted"]]
    assert beside
    assert all(target["met"] is None for target in beside)
    assert all(target["met"] is not None for target in targets if target not in beside)


def test_an_unknown_benchmark_is_refused() -> None:
    command = [sys.executable, "-m", "benchmarks", "nothing"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "no benchmark nothing" in done.stderr


def test_rounds_are_interleaved_and_the_first_is_not_counted() -> None:
    calls: list[str] = []

    def sampler(name: str) -> int:
        calls.append(name)
        return len(calls)

    taken = interleaved({"a": lambda: sampler("a"), "b": lambda: sampler("b")}, rounds=2)
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert taken == {"a": [4, 5], "b": [3, 6]}


def test_a_ratio_above_one_is_better_whichever_way_the_unit_points() -> None:
    assert row("x", 12.0, 10.0).times(10.0) == pytest.approx(1.2)
    assert row("x", 10.0, 12.0, better="lower").times(12.0) == pytest.approx(1.2)


def test_targets_are_judged_per_row_and_as_a_mean() -> None:
    rows = [row("fast", 9.0, 10.0, peer=8.0), row("slow", 8.0, 10.0, peer=9.0)]
    verdicts = judge(
        rows,
        [
            Target(("fast", "slow", "not measured"), "limit", 0.9),
            Target(("fast", "slow"), "peer", 1.0, mean=True),
            Target(("fast", "slow"), "absent", 1.0, mean=True),
            Target(("fast",), None, 9.5),
        ],
    )
    assert [verdict.met for verdict in verdicts] == [True, False, True, None, False]


def test_blocks_use_a_small_buffer_again() -> None:
    source = filled_buffer(4096)
    work = WorkingSet.of("x", 6, 1024, source, source[:0])
    assert [work.offset(number) for number in range(6)] == [0, 1024, 2048, 3072, 0, 1024]
    assert len(set(work.keys)) == 6
    assert work.slices(source)[4].tobytes() == source[:1024].tobytes()


def test_batches_cover_every_block_once_and_stay_small() -> None:
    source = filled_buffer(4096)
    work = WorkingSet.of("x", 200, 4096, source, source[:0])
    assert [number for batch in work.batches() for number in batch] == list(range(200))
    big = WorkingSet(work.keys, 32 << 20, source, source)
    assert max(map(len, big.batches())) == 4


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder with a name so short that a socket far below it has a path that the system takes."""
    with TemporaryDirectory(prefix="kvstore-") as folder:
        yield Path(folder)


def test_the_nvme_tier_is_measured_where_it_is_told_to_be(place: Path) -> None:
    contents, _ = run_quick(["nvme", "--rounds", "1"], place / "rows.json", KVSTORE_BENCH_DIR=str(place))
    cases = {row["case"]: row for row in contents["rows"]}
    assert {"store 2MiB, 1 under way", "load 2MiB, 4 under way", "recover 64KiB"} <= set(cases)
    assert all(set(found) == FIELDS and found["ours"] > 0 for found in cases.values())
    assert set(cases["load 2MiB, 2 under way"]["peers"]) == {
        "file per block",
        "no checksum",
        "raw file + xxh3",
    }
    assert "O_DIRECT" in contents["captions"]["nvme"]
    assert contents["targets"]["nvme"]
    assert [path.name for path in place.iterdir()] == ["rows.json"]


def test_a_node_with_nvme_loses_nothing_while_it_is_measured(place: Path) -> None:
    contents, _ = run_quick(["tiers", "--rounds", "1"], place / "rows.json", KVSTORE_BENCH_DIR=str(place))
    cases = {row["case"]: row for row in contents["rows"]}
    assert all(set(found) == FIELDS for found in cases.values())
    assert cases["wrong blocks, 2MiB"]["ours"] == 0
    assert cases["hits in DRAM or NVMe, 2MiB"]["ours"] == 100
    assert cases["back after SIGKILL"]["ours"] == 100
    assert cases["loaded, NVMe saturated, 2MiB"]["ours"] > 0
    assert cases["ready with 64KiB blocks"]["ours"] > 0
    assert [path.name for path in place.iterdir()] == ["rows.json"]


def test_redis_is_measured_alone_and_below_a_node(tmp_path: Path) -> None:
    contents, _ = run_quick(["redis", "--rounds", "1"], tmp_path / "rows.json")
    cases = {row["case"]: row for row in contents["rows"]}
    assert all(set(found) == FIELDS for found in cases.values())
    assert set(cases["store 2MiB, unix, one client"]["peers"]) == {"redis-py", "checksum known"}
    assert set(cases["load 2MiB, TCP, four clients"]["peers"]) == {"redis-py"}
    assert cases["loaded by a node, 2MiB"]["ours"] > 0
    assert cases["DRAM hit p50, Redis hangs, 2MiB"]["ours"] > 0
    assert cases["wrong blocks"]["ours"] == 0
    assert "redis-server" in contents["versions"]


def test_the_trace_is_replayed_and_judged(tmp_path: Path) -> None:
    contents, _ = run_quick(["trace"], tmp_path / "rows.json")
    assert all(set(found) == FIELDS for found in contents["rows"])
    assert [target["met"] for target in contents["targets"]["trace"]] == [True]


def test_the_trace_is_whole() -> None:
    keys = [key for prompt in prompts() for key in prompt]
    assert (len(prompts()), len(keys), len(set(keys))) == (12_031, 288_500, 182_790)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("size", QUICK_SIZES)
def test_hit_rates_agree_with_those_known_of_the_trace(name: str, size: int) -> None:
    assert replay_one(POLICIES[name], size) == pytest.approx(KNOWN[size][name], abs=0.01)


def test_a_tier_below_adds_hits_and_a_block_that_stays_there_is_written_once() -> None:
    demoted, exclusive = (replay_two(way, 1_000, 10_000) for way in (Way.DEMOTE, Way.EXCLUSIVE))
    assert demoted.dram == exclusive.dram == pytest.approx(KNOWN[1_000]["lru"], abs=0.01)
    assert KNOWN[10_000]["lru"] <= demoted.nvme <= exclusive.nvme
    assert demoted.written < exclusive.written
