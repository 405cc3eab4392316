"""Prompts go where they are answered soonest and disturb others least, and routing forgets what is over."""

import time
from math import inf, nan

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvstore.block import Medium
from kvstore.index import chooser as module
from kvstore.index import correction
from kvstore.index.chooser import Candidate, Chain, Choice, Chooser, Load, Traits
from kvstore.index.demand import FLEETS_MAX, Demand
from kvstore.index.estimate import Prefill, Speed
from kvstore.index.explain import explain
from kvstore.index.placement import Placement
from kvstore.index.recent import Recent

BLOCK = 16
SPEEDS = {Medium.DRAM: Speed(0.001, 25e9), Medium.NVME: Speed(0.003, 5e9), Medium.REMOTE: Speed(0.01, 2e9)}
TRAITS = Traits(327_680.0, SPEEDS, Prefill(0.01, 4e-5, 7e-10))
TOKENS = 8192
CHAIN = Chain(list(range(TOKENS // BLOCK)), BLOCK)


def engines(*gpu: int, load: Load | None = None) -> list[Candidate]:
    """An engine for each number of tokens that it has."""
    return [
        Candidate(Placement(f"engine {number}", had, had, had, had), TRAITS, load)
        for number, had in enumerate(gpu)
    ]


def rank(
    chooser: Chooser, candidates: list[Candidate], now_s: float = 0.0, chain: Chain | None = None
) -> list[Choice]:
    return chooser.rank(TOKENS, chain, candidates, now_s)


def names(choices: list[Choice]) -> list[str]:
    return [choice.placement.engine for choice in choices]


def test_the_engine_that_has_most_is_first() -> None:
    assert names(rank(Chooser(), engines(0, 4096, 1024))) == ["engine 1", "engine 2", "engine 0"]


def test_equals_are_in_the_order_of_what_runs_and_then_of_their_names() -> None:
    same = Placement("b"), Placement("a"), Placement("c")
    running = (2, 2, 1)
    candidates = [
        Candidate(placement, TRAITS, Load(running=count))
        for placement, count in zip(same, running, strict=True)
    ]
    assert names(rank(Chooser(), candidates)) == ["c", "a", "b"]


def test_a_prompt_that_was_taken_is_waited_for_and_its_blocks_are_expected() -> None:
    chooser = Chooser()
    first = rank(chooser, engines(0, 0), chain=CHAIN)[0]
    chooser.take("a", TOKENS, CHAIN, first, 0.0)
    again = {choice.placement.engine: choice for choice in rank(chooser, engines(0, 0), 0.1, CHAIN)}
    taken, other = again["engine 0"], again["engine 1"]
    assert taken.estimate.wait_s == pytest.approx(first.estimate.ttft_s - 0.1)
    assert (taken.expected, taken.ahead, other.expected, other.ahead) == (TOKENS, 1, 0, 0)
    assert taken.estimate.recompute_s == pytest.approx(0.01)
    chooser.outcome("a", 0.4)
    assert rank(chooser, engines(0), 0.4, CHAIN)[0].estimate.wait_s == 0


def test_a_hot_prefix_is_replicated_once_waiting_takes_longer_than_computing_it() -> None:
    chooser = Chooser()
    goes = []
    for number in range(40):
        best = rank(chooser, engines(4096, 0, 0), chain=CHAIN)[0]
        chooser.take(str(number), TOKENS, None, best, 0.0)
        goes.append(best.placement.engine)
    assert goes[0] == "engine 0"
    assert set(goes) == {"engine 0", "engine 1", "engine 2"}
    assert goes.count("engine 0") > goes.count("engine 1")


def test_work_costs_more_the_more_prompts_come() -> None:
    def goes(gap_s: float) -> str:
        """Where one goes that would wait a little longer for less work, while others come."""
        chooser = Chooser(price=1.0)
        for number in range(300):
            rank(chooser, engines(0, 0), gap_s * number)
        candidates = [*engines(7000, load=Load(wait_s=0.35)), Candidate(Placement("free"), TRAITS)]
        return names(chooser.rank(TOKENS, None, candidates, gap_s * 300))[0]

    assert goes(10.0) == "free"
    assert goes(0.2) == "engine 0"


def test_without_a_price_the_soonest_is_first() -> None:
    chooser = Chooser(price=0.0)
    for number in range(100):
        choices = rank(chooser, engines(0, 512, 4096, load=Load(wait_s=number / 100)), 0.01 * number)
        assert all(choice.estimate.score_s == choice.estimate.ttft_s for choice in choices)


@pytest.mark.parametrize(
    ("load", "wait_s"),
    [
        (Load(), 0.0),
        (Load(wait_s=2.0), 2.0),
        (Load(waiting_tokens=0), 0.0),
        (Load(waiting_tokens=1000), TRAITS.prefill.seconds(1000, 0)),
        (Load(waiting_tokens=1000, wait_s=0.0), 0.0),
    ],
)
def test_what_the_router_says_of_an_engine_counts(load: Load, wait_s: float) -> None:
    assert rank(Chooser(), engines(0, load=load))[0].estimate.wait_s == pytest.approx(wait_s)


def served(chooser: Chooser, number: int, slowness: float, now_s: float, **said: object) -> float:
    """One prompt through an idle engine that is so slow; when it is over."""
    choice = rank(chooser, engines(0), now_s)[0]
    chooser.take(str(number), TOKENS, None, choice, now_s)
    took_s = slowness * TRAITS.prefill.seconds(TOKENS, 0)
    outcome = chooser.outcome(str(number), now_s + took_s, **{"ttft_s": took_s, **said})  # type: ignore[arg-type]
    assert outcome is not None
    assert outcome.error_s == pytest.approx(took_s - outcome.predicted_s, abs=1e-6)
    return now_s + took_s


@pytest.mark.parametrize("slowness", [0.5, 0.8, 1.25, 3.0])
def test_an_engines_pace_is_learned_from_outcomes(slowness: float) -> None:
    chooser, now_s = Chooser(), 0.0
    for number in range(60):
        now_s = served(chooser, number, slowness, now_s)
    statistics = chooser.statistics()
    assert statistics.engine_slowness["engine 0"] == pytest.approx(slowness, rel=0.1)
    assert rank(chooser, engines(0), now_s)[0].slowness == pytest.approx(slowness, rel=0.1)
    assert statistics.errors.count == statistics.outcomes == 60


def test_an_engine_that_serves_several_at_once_is_as_fast_as_it_is() -> None:
    chooser, now_s = Chooser(), 0.0
    for batch in range(40):
        ids = [f"{batch} {number}" for number in range(4)]
        for id in ids:
            chooser.take(id, TOKENS, None, rank(chooser, engines(0), now_s)[0], now_s)
        now_s += 4 * TRAITS.prefill.seconds(TOKENS, 0)
        for id in ids:
            chooser.outcome(id, now_s)
    assert chooser.statistics().engine_slowness["engine 0"] == pytest.approx(1.0, rel=0.25)


@pytest.mark.parametrize("said", [0.0, 1e9, -1.0, nan, inf])
@pytest.mark.parametrize("cached", [None, -(1 << 60), 1 << 60])
def test_a_lie_harms_little_and_not_for_long(said: float, cached: int | None) -> None:
    chooser, now_s = Chooser(), 0.0
    for number in range(30):
        now_s = served(chooser, number, 1.0, now_s)
    choice = rank(chooser, engines(0), now_s)[0]
    chooser.take("lie", TOKENS, None, choice, now_s)
    chooser.outcome("lie", now_s + 1e6, ttft_s=said, cached_tokens=cached)
    now_s += 1e6
    assert rank(chooser, engines(0), now_s)[0].slowness == pytest.approx(1.0, abs=0.3)
    for number in range(100, 200):
        now_s = served(chooser, number, 1.0, now_s)
    assert rank(chooser, engines(0), now_s)[0].slowness == pytest.approx(1.0, abs=0.02)


def test_an_engine_that_is_said_to_take_no_time_stays_within_bounds() -> None:
    chooser = Chooser()
    for number in range(2000):
        chooser.take(str(number), TOKENS, None, rank(chooser, engines(0))[0], 0.0)
        chooser.outcome(str(number), 0.0)
    assert rank(chooser, engines(0))[0].slowness >= 1 / 8


def test_a_new_engine_is_taken_to_be_like_the_others() -> None:
    chooser, now_s = Chooser(), 0.0
    for number in range(60):
        now_s = served(chooser, number, 2.0, now_s)
    other = Candidate(Placement("new"), TRAITS)
    assert chooser.rank(TOKENS, None, [other], now_s)[0].slowness == pytest.approx(2.0, rel=0.15)


def test_who_makes_up_engines_displaces_only_those_without_outcomes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correction, "ENGINES_MAX", 2)
    chooser = Chooser()
    now_s = 0.0
    for number in range(20):
        name = f"made up {number}"
        choice = chooser.rank(TOKENS, None, [Candidate(Placement(name), TRAITS)], now_s)[0]
        chooser.take(name, TOKENS, None, choice, now_s)
        chooser.outcome(name, now_s, ttft_s=1.0)
        now_s = served(chooser, number, 2.0, now_s)
    paces = chooser.statistics().engine_slowness
    assert set(paces) == {"engine 0", "made up 19"}
    assert paces["engine 0"] == pytest.approx(2.0, rel=0.2)


def test_a_failed_prompt_leaves_nothing_to_wait_for_or_to_expect() -> None:
    for said in ({"failed": True}, {"engine": "engine 1"}):
        chooser = Chooser()
        chooser.take("a", TOKENS, CHAIN, rank(chooser, engines(0), chain=CHAIN)[0], 0.0)
        outcome = chooser.outcome("a", 0.1, **said)  # type: ignore[arg-type]
        assert outcome is not None
        assert outcome.error_s is None
        choice = rank(chooser, engines(0), 0.1, CHAIN)[0]
        assert (choice.expected, choice.estimate.wait_s, choice.slowness) == (0, 0, 1)
        assert chooser.statistics().errors.count == 0


@pytest.mark.parametrize(("now_s", "left_s"), [(0.1, 1.0), (2.0, 0.0)])
def test_a_prompt_that_ended_unseen_leaves_its_blocks_and_teaches_nothing(
    now_s: float, left_s: float
) -> None:
    chooser = Chooser()
    for id in ("a", "b"):
        chooser.take(id, TOKENS, CHAIN, rank(chooser, engines(0))[0], 0.0)
    outcome = chooser.outcome("a", now_s, ended=True, cached_tokens=0)
    assert outcome is not None
    assert outcome.error_s is None
    assert chooser.outcome("a", now_s) is None
    choice = rank(chooser, engines(0), now_s, CHAIN)[0]
    alone_s = TRAITS.prefill.seconds(TOKENS, 0)
    assert (choice.ahead, choice.slowness, choice.expected) == (1, 1, TOKENS)
    assert choice.estimate.wait_s == pytest.approx(left_s * alone_s, abs=0.01)
    statistics = chooser.statistics()
    assert (statistics.outcomes, statistics.failed, statistics.errors.count) == (1, 0, 0)


def test_blocks_are_expected_for_the_same_model_adapter_and_salt_alone() -> None:
    chooser = Chooser()
    spaces = [Chain(CHAIN.keys, BLOCK, space) for space in ("one", "two", "")]
    chooser.take("a", TOKENS, spaces[0], rank(chooser, engines(0))[0], 0.0)
    expected = [rank(chooser, engines(0), 0.0, chain)[0].expected for chain in spaces]
    assert expected == [TOKENS, 0, 0]
    chooser.take("b", TOKENS, spaces[1], rank(chooser, engines(0))[0], 0.0)
    chooser.outcome("a", 0.0, failed=True)
    expected = [rank(chooser, engines(0), 0.0, chain)[0].expected for chain in spaces]
    assert expected == [0, TOKENS, 0]


def test_without_candidates_there_is_no_choice() -> None:
    chooser = Chooser()
    for number in range(3):
        rank(chooser, engines(0), number)
    assert rank(chooser, []) == []


def test_an_unknown_prompt_and_one_that_is_over_are_nothing() -> None:
    chooser = Chooser()
    assert chooser.outcome("a", 0.0) is None
    chooser.take("a", TOKENS, CHAIN, rank(chooser, engines(0))[0], 0.0)
    assert chooser.outcome("a", 0.1) is not None
    assert chooser.outcome("a", 0.2) is None


def test_what_nobody_reports_is_over_some_time_later() -> None:
    chooser = Chooser()
    lie = engines(0, load=Load(wait_s=1e9))
    chooser.take("late", TOKENS, CHAIN, rank(chooser, lie)[0], 0.0)
    chooser.take("a", TOKENS, CHAIN, rank(chooser, engines(0))[0], 0.0)
    rank(chooser, engines(0), 20.0)
    assert (chooser.statistics().under_way, chooser.statistics().expired) == (1, 1)
    rank(chooser, engines(0), 1000.0)
    statistics = chooser.statistics()
    assert (statistics.under_way, statistics.expired, statistics.expected_keys) == (0, 2, 0)


def test_where_nobody_reports_prompts_end_as_they_were_estimated() -> None:
    chooser, now_s = Chooser(), 0.0
    waits_s = []
    for number in range(400):
        now_s += 0.5  # each takes 0.36 s
        best = rank(chooser, engines(0), now_s)[0]
        chooser.take(str(number), TOKENS, None, best, now_s)
        waits_s.append(best.estimate.wait_s)
    assert max(waits_s[:50]) > 1
    assert max(waits_s[-100:]) < 0.01
    for number in range(1000, 1100):  # and once somebody does, it is waited for
        now_s = served(chooser, number, 1.0, now_s)
    chooser.take("a", TOKENS, None, rank(chooser, engines(0), now_s)[0], now_s)
    chooser.take("b", TOKENS, None, rank(chooser, engines(0), now_s)[0], now_s)
    assert rank(chooser, engines(0), now_s + 3)[0].estimate.wait_s > 0.3


def test_prompts_under_way_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WORKS_MAX", 100)
    monkeypatch.setattr(module, "_WORK_KEYS_MAX", 1000)
    chooser = Chooser()
    choice = rank(chooser, engines(0))[0]
    for number in range(1000):
        chooser.take(str(number), TOKENS, Chain(range(100), BLOCK), choice, 0.0)
        if number % 3:
            chooser.outcome(str(number), 0.0)
    assert chooser.statistics().under_way <= 100
    assert len(chooser._ends) <= 201
    assert chooser._work_keys <= 1000


def test_expected_keys_are_bounded_and_tails_go_first() -> None:
    recent = Recent(place_keys_max=10, keys_max=15, places_max=2)
    recent.expect("a", "1", range(20), 1.0)
    assert recent.depth("a", range(20), 0.0) == 10
    recent.expect("a", "2", [0, 1, 100], 1.0)
    assert recent.depth("a", range(20), 0.0) == 9
    assert recent.depth("a", [0, 1, 100], 0.0) == 3
    recent.expect("b", "3", range(10), 1.0)
    assert len(recent) == 15
    recent.expect("c", "4", [0], 1.0)
    assert [recent.depth(place, range(20), 0.0) for place in "abc"] == [0, 10, 1]
    recent.expire(5.0)
    assert len(recent) == 0


def test_fleets_are_bounded() -> None:
    demand = Demand()
    for number in range(FLEETS_MAX + 10):
        demand.of(str(number), 0.0).arrive(1.0, 0.0)
    assert len(demand._fleets) == FLEETS_MAX


class AgainstLists(RuleBasedStateMachine):
    """Keys of a tree of prompts are expected, forgotten and over, against a list of what was said."""

    PATHS = st.lists(st.integers(1, 2), min_size=1, max_size=6)
    ENGINES = st.sampled_from(("a", "b"))

    def __init__(self) -> None:
        super().__init__()
        self.recent = Recent()
        self.now_s = 0.0
        self.said: list[tuple[str, list[int], float, str]] = []

    @staticmethod
    def keys(path: list[int]) -> list[int]:
        return [int("".join(map(str, path[:end]))) for end in range(1, len(path) + 1)]

    @rule(engine=ENGINES, path=PATHS, lasts_s=st.integers(1, 9))
    def expect(self, engine: str, path: list[int], lasts_s: int) -> None:
        id = str(len(self.said))
        self.recent.expect(engine, id, self.keys(path), self.now_s + lasts_s)
        self.said.append((engine, self.keys(path), self.now_s + lasts_s, id))

    @rule(seconds=st.integers(1, 5))
    def wait(self, seconds: int) -> None:
        self.now_s += seconds
        self.recent.expire(self.now_s)

    @rule(engine=ENGINES, path=PATHS)
    def look(self, engine: str, path: list[int]) -> None:
        keys = self.keys(path)
        live = {
            key
            for name, said, until_s, _ in self.said
            if name == engine and until_s > self.now_s
            for key in said
        }
        depth = next((at for at, key in enumerate(keys) if key not in live), len(keys))
        assert self.recent.depth(engine, keys, self.now_s) == depth

    @invariant()
    def the_count_is_right(self) -> None:
        assert len(self.recent) == sum(map(len, self.recent._places.values()))
        assert all(self.recent._places.values())


class AnyOrder(RuleBasedStateMachine):
    """Prompts are taken, answered, lost and forgotten in any order; nothing is negative, nothing remains."""

    IDS = st.integers(0, 9).map(str)

    def __init__(self) -> None:
        super().__init__()
        self.chooser = Chooser()
        self.now_s = 0.0

    @rule(id=IDS, at=st.integers(0, 2), size=st.integers(0, 40), tokens=st.integers(0, 700))
    def take(self, id: str, at: int, size: int, tokens: int) -> None:
        chain = Chain(range(size), BLOCK)
        choices = self.chooser.rank(tokens, chain, engines(0, 160, 320), self.now_s)
        for choice in choices:
            found = choice.estimate
            assert min(found.wait_s, found.load_s, found.recompute_s, choice.expected, choice.ahead) >= 0
        self.chooser.take(id, tokens, chain, choices[at], self.now_s)

    @rule(
        id=IDS,
        ttft_s=st.none() | st.floats(),
        cached=st.none() | st.integers(-10, 10**6),
        how=st.sampled_from((None, "failed", "ended")),
        engine=st.sampled_from((None, "engine 0", "elsewhere")),
    )
    def outcome(
        self, id: str, ttft_s: float | None, cached: int | None, how: str | None, engine: str | None
    ) -> None:
        flags = {} if how is None else {how: True}
        self.chooser.outcome(id, self.now_s, engine=engine, ttft_s=ttft_s, cached_tokens=cached, **flags)

    @rule(seconds=st.floats(0, 3))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @invariant()
    def paces_are_within_bounds(self) -> None:
        assert all(1 / 8 <= pace <= 8 for pace in self.chooser.statistics().engine_slowness.values())

    def teardown(self) -> None:
        self.now_s += 1e6
        for choice in rank(self.chooser, engines(0, 0, 0), self.now_s, CHAIN):
            assert (choice.estimate.wait_s, choice.expected, choice.ahead) == (0, 0, 0)
        statistics = self.chooser.statistics()
        assert (statistics.under_way, statistics.expected_keys) == (0, 0)
        assert not self.chooser._backlogs
        assert self.chooser._work_keys == 0


TestAgainstLists = AgainstLists.TestCase
TestAnyOrder = AnyOrder.TestCase
TestAgainstLists.settings = TestAnyOrder.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None
)


def test_reasons_name_what_the_time_goes_to() -> None:
    chooser = Chooser()
    candidates = [
        *engines(4096),
        Candidate(Placement("far", 0, 0, 4096, 4096), Traits(1000.0, SPEEDS, TRAITS.prefill)),
        Candidate(Placement("slow", 0, 0, 0, 4096), TRAITS, Load(wait_s=2.0)),
    ]
    best, *others = rank(chooser, candidates)
    assert explain(best, best) == ["has 4,096 tokens in its own cache", "computes 4,096 tokens in 191 ms"]
    far, slow = (explain(choice, best) for choice in others)
    assert far[0] == "loads 4,096 tokens from nvme in 3.8 ms"
    assert far[-1].endswith("% later than engine 0")
    assert slow[0] == "waits 2,000 ms"
    assert "computes 4,096 of them sooner than it could load them" in slow
    chooser.take("a", TOKENS, CHAIN, best, 0.0)
    chooser.take("b", TOKENS, CHAIN, best, 0.0)
    waiting = explain(rank(chooser, engines(0), 0.0, CHAIN)[0])
    assert waiting[0].endswith("for 2 prompts")
    assert waiting[1] == "has 8,192 tokens in its own cache or will soon"


def test_a_slow_engine_is_told_to_be() -> None:
    chooser, now_s = Chooser(), 0.0
    for number in range(100):
        now_s = served(chooser, number, 2.0, now_s)
    assert any("slower than configured" in line for line in explain(rank(chooser, engines(0), now_s)[0]))


def test_ranking_many_engines_is_quick() -> None:
    chooser = Chooser()
    candidates = engines(*range(0, 64 * BLOCK, BLOCK))
    for number in range(200):
        choice = rank(chooser, candidates, 0.0, CHAIN)[number % 64]
        chooser.take(str(number), TOKENS, CHAIN, choice, 0.0)
    began_s = time.process_time()
    for _ in range(20):
        rank(chooser, candidates, 0.0, CHAIN)
    assert (time.process_time() - began_s) / 20 < 0.003  # 0.4 ms where nothing else runs
