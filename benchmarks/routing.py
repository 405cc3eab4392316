"""How soon prompts get their first token when they are routed by ours or by others, in a simulated cluster.

The trace comes at 50 to 95 % of what the cluster can do, to 8 and to 64 engines. Everything is simulated but
what is compared: our index is told what engines store and forget, and the chooser is the service's own. What
is counted is the same on every machine.
"""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from statistics import NormalDist, mean
from typing import Final

from benchmarks.harness import Limit, Report, Row, Settings, Target, judge
from benchmarks.simulation.cluster import COMPUTING_LUCK, Cluster
from benchmarks.simulation.models import DEEPSEEK, LLAMA_8B, LLAMA_70B
from benchmarks.simulation.policies import GREEDY, OURS, POLICIES
from benchmarks.simulation.replay import Played, quantile, replay
from benchmarks.simulation.workload import Prompt, copies, faster, least_seconds, trace

BENCH: Final = "routing"
BEST: Final = "best of them"
ALONE: Final = "no wait, nothing forgotten"
LUCK: Final = "luck alone"
LOADS: Final = (50, 60, 70, 80, 90, 95)  # percent
MODELS: Final = {"70B": LLAMA_70B, "8B": LLAMA_8B, "V3": DEEPSEEK}
QUICK_PROMPTS: Final = 400
# The first ones meet empty caches.
_COUNTED_FROM: Final = 0.1
_POINTS: Final = 600


@dataclass(frozen=True, slots=True)
class Setting:
    """A cluster and how much of the trace comes to it."""

    model: str
    engines: int
    copies: int
    load: int  # percent
    prompts: int | None = None

    @property
    def name(self) -> str:
        """In the rows."""
        model = "" if self.model == "70B" else f", {self.model}"
        return f"{self.engines} engines{model}, {self.load} %"


SMALL: Final = tuple(Setting("70B", 8, 1, load) for load in LOADS)
LARGE: Final = tuple(Setting("70B", 64, 2, load) for load in LOADS)
OTHER: Final = tuple(Setting(model, 8, 1, 80) for model in ("8B", "V3"))
QUICK: Final = (Setting("70B", 8, 1, 80, QUICK_PROMPTS),)
TARGETS: Final = (
    Target(
        tuple(
            f"{figure} TTFT, {setting.name}"
            for setting in (*SMALL, *LARGE, *OTHER)
            if setting.load <= 90
            for figure in ("mean", "p99")
        ),
        BEST,
        1.0,
    ),
)


@dataclass(frozen=True, slots=True)
class Result:
    """Of one policy: times to first token, relative errors of predictions, and some of their pairs."""

    mean_s: float
    p99_s: float
    busy: float
    errors: Sequence[float]
    points: Sequence[tuple[float, float]]


def run(settings: Settings) -> Report:
    """Every policy at every load, beside each other on all cores: nothing is timed."""
    chosen = QUICK if settings.quick else (*LARGE, *SMALL, *OTHER)
    tasks = [(setting, policy) for setting in chosen for policy in POLICIES]
    if settings.quick:
        results = [_play(task) for task in tasks]
    else:
        with ProcessPoolExecutor(len(settings.cores.all), get_context("spawn")) as pool:
            results = list(pool.map(_play, tasks))
    found = dict(zip(tasks, results, strict=True))
    shown = chosen if settings.quick else (*SMALL, *LARGE, *OTHER)
    rows = [row for setting in shown for row in _rows(setting, found)]
    if settings.plot is not None:
        from benchmarks.simulation.plot import draw  # matplotlib takes a second to import

        draw(
            settings.plot,
            _curves(shown, found),
            found[shown[len(SMALL) // 2 if len(shown) > 1 else 0], OURS].points,
        )
    return Report(BENCH, rows, judge(rows, TARGETS), _caption())


def _rows(setting: Setting, found: Mapping[tuple[Setting, str], Result]) -> Iterable[Row]:
    results = {policy: found[setting, policy] for policy in POLICIES}
    alone = least_seconds(_prompts(setting), MODELS[setting.model])
    alone = alone[int(_COUNTED_FROM * len(alone)) :]
    means = {policy: 1e3 * result.mean_s for policy, result in results.items()}
    p99s = {policy: 1e3 * result.p99_s for policy, result in results.items()}
    yield _row(f"mean TTFT, {setting.name}", means, 1e3 * mean(alone))
    yield _row(f"p99 TTFT, {setting.name}", p99s, 1e3 * quantile(alone, 0.99))
    errors = results[OURS].errors
    for name, fraction in {"median": 0.5, "p90": 0.9}.items():
        error = 100 * quantile(errors, fraction)
        luck = 100 * COMPUTING_LUCK * NormalDist().inv_cdf((1 + fraction) / 2)
        case = f"error, {name}, {setting.name}"
        yield Row(BENCH, case, "%", "lower", error, Limit(LUCK, luck), {})


def _row(case: str, figures: Mapping[str, float], limit: float) -> Row:
    peers = {name: value for name, value in figures.items() if name != OURS}
    peers[BEST] = min(value for name, value in peers.items() if name != GREEDY)
    return Row(BENCH, case, "ms", "lower", figures[OURS], Limit(ALONE, limit), peers)


def _curves(
    settings: Sequence[Setting], found: Mapping[tuple[Setting, str], Result]
) -> dict[int, dict[str, list[tuple[int, float]]]]:
    """Engines to policy to (load, mean in ms)."""
    curves: dict[int, dict[str, list[tuple[int, float]]]] = {}
    for setting in settings:
        if setting.model == "70B":
            for policy in POLICIES:
                point = setting.load, 1e3 * found[setting, policy].mean_s
                curves.setdefault(setting.engines, {}).setdefault(policy, []).append(point)
    return curves


def _play(task: tuple[Setting, str]) -> Result:
    setting, policy = task
    served = MODELS[setting.model]
    cluster = Cluster(served, setting.engines)
    played = replay(_arrivals(setting), cluster, POLICIES[policy](setting.engines, served))
    return _result(played)


def _result(played: Played) -> Result:
    begin = int(_COUNTED_FROM * len(played.ttft_s))
    actual, predicted = played.ttft_s[begin:], played.predicted_s[begin:]
    pairs = [(said, came) for said, came in zip(predicted, actual, strict=True) if said is not None]
    return Result(
        mean(actual),
        quantile(actual, 0.99),
        played.busy,
        [abs(said - came) / came for said, came in pairs],
        pairs[:: max(1, len(pairs) // _POINTS)],
    )


def _prompts(setting: Setting) -> Sequence[Prompt]:
    return copies(trace()[: setting.prompts], setting.copies)


def _arrivals(setting: Setting) -> list[Prompt]:
    """The prompts, so fast that the load is what it should be.

    At 100 % engines of nominal speed would be busy all the time with the least work that there can be.
    """
    prompts = _prompts(setting)
    least_s = sum(least_seconds(prompts, MODELS[setting.model]))
    offered = least_s / (prompts[-1].at_s * setting.engines)
    return faster(prompts, setting.load / 100 / offered)


def _caption() -> str:
    return (
        f"Simulated, the same on every machine: {LLAMA_70B.name}, unless a row says otherwise. An engine"
        " serves one prompt after another, loading keeps it busy too, and decoding is elsewhere. Engines"
        " compute up to 20 % slower or faster than all policies are told, and each prompt 5 % more or less."
        " The trace's 3 s of arrivals are spread over them; 64 engines get two copies of it with blocks of"
        " their own, one shifted by a half. At 100 % all engines would be busy all the time if they forgot"
        " nothing and loaded in no time: no cluster reaches it. The first tenth is not counted. The limit is"
        f" each prompt alone on an engine that has all that was ever computed. {BEST!r} leaves greedy TTFT"
        " out, which is our estimate without the price of work; errors are those of predicted times."
    )
