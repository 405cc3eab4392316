"""The simulation as a picture: what the estimate said against what came, and times to first token by load."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from benchmarks.simulation.policies import OURS


def draw(
    path: Path,
    curves: Mapping[int, Mapping[str, Sequence[tuple[int, float]]]],
    points: Sequence[tuple[float, float]],
) -> None:
    """Write a picture: `curves` are (load in percent, mean in ms) by engines and policy, `points` predicted
    and actual seconds."""
    pyplot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "routing", "font.size": 8})
    figure, axes = pyplot.subplots(1, 1 + len(curves), figsize=(5 * (1 + len(curves)), 4))
    _predictions(axes[0], points)
    for axis, (engines, policies) in zip(axes[1:], curves.items(), strict=True):
        _loads(axis, engines, policies)
    figure.tight_layout()
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def _predictions(axis: Axes, points: Sequence[tuple[float, float]]) -> None:
    ends = [min(min(pair) for pair in points), max(max(pair) for pair in points)]
    axis.loglog([came for _, came in points], [said for said, _ in points], ".", markersize=2)
    axis.loglog(ends, ends, "k-", linewidth=0.5)
    axis.set(title="time to first token", xlabel="actual, s", ylabel="predicted when routed, s")


def _loads(axis: Axes, engines: int, policies: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    for policy, found in policies.items():
        width = 2.0 if policy == OURS else 0.8
        axis.semilogy(
            [load for load, _ in found], [ms for _, ms in found], ".-", linewidth=width, label=policy
        )
    axis.set(title=f"{engines} engines", xlabel="load, %", ylabel="mean time to first token, ms")
    axis.legend()
