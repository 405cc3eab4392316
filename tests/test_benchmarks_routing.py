"""The simulation routes by every policy, the same way each time, and draws what it found."""

from pathlib import Path

from benchmarks.routing import BEST, SMALL, TARGETS
from benchmarks.simulation.cluster import Cluster
from benchmarks.simulation.models import LLAMA_70B
from benchmarks.simulation.policies import GREEDY, OURS, POLICIES, Ours
from benchmarks.simulation.replay import replay
from benchmarks.simulation.workload import copies, faster, trace
from tests.test_benchmarks import FIELDS, run_quick


def test_every_policy_is_beside_ours(tmp_path: Path) -> None:
    picture = tmp_path / "routing.svg"
    contents, _ = run_quick(["routing", "--plot", str(picture)], tmp_path / "rows.json")
    cases = {found["case"]: found for found in contents["rows"]}
    for figure in ("mean", "p99"):
        found = cases[f"{figure} TTFT, 8 engines, 80 %"]
        assert set(found) == FIELDS
        assert set(found["peers"]) == {*POLICIES, BEST} - {OURS}
        others = [value for name, value in found["peers"].items() if name not in (GREEDY, BEST)]
        assert found["peers"][BEST] == min(others)
        assert found["limit"]["value"] < found["ours"]
    assert cases["error, median, 8 engines, 80 %"]["unit"] == "%"
    assert len(contents["targets"]["routing"]) == 2
    assert "<svg" in picture.read_text()


def test_a_replay_is_the_same_each_time() -> None:
    prompts = faster(trace()[:150], 5)
    first, second = (replay(prompts, Cluster(LLAMA_70B, 4), Ours(4, LLAMA_70B)) for _ in range(2))
    assert first == second
    assert all(ttft_s > 0 for ttft_s in first.ttft_s)


def test_copies_share_no_block_and_come_in_order() -> None:
    prompts = trace()[:100]
    doubled = copies(prompts, 2)
    assert len(doubled) == 200
    assert [prompt.at_s for prompt in doubled] == sorted(prompt.at_s for prompt in doubled)
    assert len({key for prompt in doubled for key in prompt.keys}) == 2 * len(
        {key for prompt in prompts for key in prompt.keys}
    )


def test_targets_are_those_of_every_load_up_to_90_percent() -> None:
    (target,) = TARGETS
    assert f"p99 TTFT, {SMALL[4].name}" in target.cases
    assert f"p99 TTFT, {SMALL[5].name}" not in target.cases
