"""The stream of one engine: order, gaps, replays, restarts, and what each event does to the index."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore.block import Namespace
from kvstore.index.engine_source import EngineKind, EngineSource
from kvstore.index.engine_stream import QUIET_S, EngineStream
from kvstore.index.events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    Event,
    encode_batch,
    pack_tokens,
)
from kvstore.index.locality import Engine, Locality
from kvstore.index.standing import DEAD_AFTER_S

SOURCE: Final = EngineSource("10.0.0.1:8000", EngineKind.VLLM, "m", 16, "vllm-sha256:0", "tcp://e", "tcp://r")
ALONE: Final = replace(SOURCE, replay="")
SPACE: Final = Namespace("m", 16, scheme="vllm-sha256:0")
TOKENS: Final = pack_tokens([1])


def stored(*hashes: int, parent: int | None = None, medium: str | None = "GPU") -> BlockStored:
    return BlockStored(list(hashes), parent, TOKENS, 16, None, medium)


def removed(*hashes: int, medium: str | None = "GPU") -> BlockRemoved:
    return BlockRemoved(list(hashes), medium)


class Publisher:
    """A process of the engine: what it has published, and how many batches of that it can replay."""

    clock_s = 1000.0

    def __init__(self, keeps: int = 10_000) -> None:
        self.keeps = keeps
        self.payloads: list[bytes] = []

    def publish(self, *events: Event) -> int:
        Publisher.clock_s += 0.001
        self.payloads.append(encode_batch(events, Publisher.clock_s, arrays=False))
        return len(self.payloads) - 1


class Bench:
    """A stream, the publisher that it hears, and a clock."""

    def __init__(
        self, source: EngineSource = SOURCE, *, blocks_max: int = 10_000, keeps: int = 10_000
    ) -> None:
        self.locality = Locality(blocks_max=blocks_max)
        self.stream = EngineStream(source, self.locality)
        self.publisher = Publisher(keeps)
        self.now_s = 0.0
        self.stream.connected(self.now_s)

    def deliver(self, *seqs: int) -> None:
        for seq in seqs:
            self.stream.batch(seq, b"", self.publisher.payloads[seq], self.now_s)

    def send(self, *events: Event) -> None:
        self.deliver(self.publisher.publish(*events))

    def replay(self, *, first: int = 0) -> bool:
        """Answer what is due, if anything is; without the first batches of the answer."""
        self.now_s += 0.1
        start = self.stream.due(self.now_s)
        if start is None:
            return False
        self.stream.asked(self.now_s)
        payloads = self.publisher.payloads
        for seq in range(max(start, len(payloads) - self.publisher.keeps) + first, len(payloads)):
            self.stream.replayed(seq, b"", payloads[seq], self.now_s)
        self.stream.replay_ended(self.now_s)
        return True

    def settle(self) -> None:
        """Let time pass until nothing is missing any more."""
        for _ in range(20):
            while self.replay():
                pass
            self.now_s += QUIET_S / 2
            self.stream.tick(self.now_s)

    def restart(self, *, noticed: bool = True, keeps: int = 10_000) -> None:
        self.publisher = Publisher(keeps)
        if noticed:
            self.stream.disconnected(self.now_s)
            self.stream.connected(self.now_s)

    def has(self, *keys: int, space: Namespace = SPACE) -> tuple[int, int, int, int]:
        """Leading blocks in gpu, dram, nvme, remote, cumulative."""
        (found,) = self.locality.find({space: keys}, [Engine(SOURCE.name)])
        blocks = [found.gpu, found.dram, found.nvme, found.remote]
        return tuple(tokens // space.block_tokens for tokens in blocks)  # type: ignore[return-value]

    @property
    def statistics(self) -> Any:
        return self.stream.statistics()


GPU: Final = (1, 1, 1, 1)
NONE: Final = (0, 0, 0, 0)


def test_batches_in_order_count_at_once() -> None:
    bench = Bench()
    bench.send(stored(1, 2), stored(3, parent=2))
    bench.send(removed(3))
    assert bench.has(1, 2, 3) == (2, 2, 2, 2)
    assert (bench.statistics.seq, bench.statistics.batches, bench.statistics.events) == (1, 2, 3)
    assert not bench.statistics.incomplete


def test_a_late_joiner_gets_what_was_before_from_a_replay() -> None:
    bench = Bench()
    bench.publisher.publish(stored(1))
    bench.publisher.publish(stored(2, parent=1))
    bench.send(stored(3, parent=2))
    assert bench.has(3) == NONE
    bench.settle()
    assert bench.has(1, 2, 3) == (3, 3, 3, 3)
    assert not bench.statistics.incomplete


def test_a_late_joiner_without_a_replay_begins_with_what_comes() -> None:
    bench = Bench(ALONE)
    bench.publisher.publish(stored(1))
    bench.send(stored(2))
    assert (bench.has(1), bench.has(2)) == (NONE, GPU)
    assert bench.statistics.incomplete


def test_a_late_joiner_whose_replay_does_not_reach_back_is_incomplete() -> None:
    bench = Bench(keeps=2)
    for key in range(5):
        bench.publisher.publish(stored(key))
    bench.settle()
    assert [bench.has(key) for key in range(5)] == [NONE] * 3 + [GPU] * 2
    assert bench.statistics.incomplete
    assert bench.statistics.lost == 3


def test_a_gap_is_filled_by_a_replay_and_nothing_after_it_counts_before() -> None:
    bench = Bench()
    bench.send(stored(1))
    bench.publisher.publish(removed(1))
    bench.send(stored(1))
    assert bench.statistics.seq == 0
    bench.settle()
    assert (bench.has(1), bench.statistics.seq, bench.statistics.gaps) == (GPU, 2, 1)
    assert not bench.statistics.incomplete


def test_batches_that_come_in_another_order_are_put_in_theirs() -> None:
    for source in (SOURCE, ALONE):
        bench = Bench(source)
        bench.send(stored(1))
        for event in (removed(1), stored(1), removed(1)):
            bench.publisher.publish(event)
        bench.deliver(3, 2, 1)
        assert (bench.has(1), bench.statistics.seq) == (NONE, 3)


def test_a_gap_that_nobody_can_fill_is_left_after_a_while() -> None:
    bench = Bench(ALONE)
    bench.send(stored(1))
    bench.publisher.publish(removed(1))
    bench.send(stored(2))
    assert bench.has(2) == NONE
    bench.now_s += 1.0
    bench.stream.tick(bench.now_s)
    assert bench.has(2) == GPU
    assert (bench.statistics.incomplete, bench.statistics.lost) == (True, 1)


def test_a_gap_that_the_replay_does_not_reach_leaves_the_rest_as_it_was() -> None:
    bench = Bench(keeps=1)
    bench.send(stored(1))
    bench.publisher.publish(stored(2))
    bench.send(stored(3))
    bench.settle()
    assert (bench.has(1), bench.has(2), bench.has(3)) == (GPU, NONE, GPU)
    assert bench.statistics.incomplete
    bench.send(AllBlocksCleared())
    assert not bench.statistics.incomplete


def test_a_replay_with_a_hole_is_asked_for_again() -> None:
    bench = Bench()
    for key in range(40):
        bench.publisher.publish(stored(key))
    assert bench.stream.due(0.0) == 0
    bench.stream.asked(bench.now_s)
    for seq in (*range(20), *range(30, 40)):
        bench.stream.replayed(seq, b"", bench.publisher.payloads[seq], 0.0)
    bench.stream.replay_ended(0.0)
    assert bench.stream.due(1.0) == 12
    bench.settle()
    assert (bench.statistics.seq, bench.statistics.incomplete) == (39, False)


def test_a_number_that_the_publisher_left_out_is_passed_over() -> None:
    bench = Bench()
    for key in range(4):
        bench.publisher.publish(stored(key))
    for _ in range(2):
        bench.now_s += 0.1
        assert bench.stream.due(bench.now_s) is not None
        bench.stream.asked(bench.now_s)
        for seq in (0, 1, 3):
            bench.stream.replayed(seq, b"", bench.publisher.payloads[seq], bench.now_s)
        bench.stream.replay_ended(bench.now_s)
    assert (bench.statistics.incomplete, bench.statistics.lost) == (True, 1)
    bench.settle()
    assert (bench.has(2), bench.has(3)) == (NONE, GPU)


def test_a_replay_that_breaks_off_goes_on_where_it_ended() -> None:
    bench = Bench()
    for key in range(40):
        bench.publisher.publish(stored(key))
    bench.stream.asked(bench.now_s)
    for seq in range(20):
        bench.stream.replayed(seq, b"", bench.publisher.payloads[seq], 0.0)
    bench.stream.replay_failed(0.0)
    assert bench.stream.due(1.0) == 12


def test_a_replay_that_nobody_answers_is_given_up_for_a_while() -> None:
    bench = Bench()
    bench.publisher.publish(stored(1))
    bench.send(stored(2))
    for _ in range(3):
        bench.now_s += 2.0
        assert bench.stream.due(bench.now_s) is not None
        bench.stream.asked(bench.now_s)
        bench.stream.replay_failed(bench.now_s)
    assert bench.stream.due(bench.now_s + 2.0) is None
    assert (bench.has(2), bench.statistics.incomplete) == (GPU, True)


def test_who_could_not_prove_anything_is_asked_again_after_a_while() -> None:
    bench = Bench()
    bench.send(stored(1))
    bench.stream.disconnected(bench.now_s)
    bench.stream.connected(bench.now_s)
    for _ in range(3):
        bench.now_s += 2.0
        bench.stream.asked(bench.now_s)
        bench.stream.replay_failed(bench.now_s)
    assert bench.stream.due(bench.now_s + 2.0) is None
    bench.now_s += 60.0
    bench.stream.tick(bench.now_s)
    assert bench.statistics.muted
    bench.replay()
    assert (bench.has(1), bench.statistics.muted) == (GPU, False)


def test_duplicates_are_dropped() -> None:
    bench = Bench()
    bench.send(stored(1))
    bench.send(removed(1))
    bench.deliver(0)
    assert (bench.has(1), bench.statistics.duplicates, bench.statistics.restarts) == (NONE, 1, 0)


def test_the_last_batches_are_missed_by_nobody_for_long() -> None:
    bench = Bench()
    bench.send(stored(1))
    bench.settle()
    bench.send(stored(3))
    bench.publisher.publish(stored(2))
    assert not bench.replay()
    bench.now_s += QUIET_S
    assert bench.replay()
    assert bench.has(2) == GPU
    bench.settle()
    resyncs = bench.statistics.resyncs
    bench.settle()
    assert bench.statistics.resyncs == resyncs  # an idle engine is left in peace


def test_a_restart_leaves_nothing_of_the_process_before() -> None:
    for noticed in (True, False):
        bench = Bench()
        for key in range(20):
            bench.send(stored(key))
        bench.restart(noticed=noticed)
        bench.publisher.publish(stored(100))
        bench.send(stored(101, parent=100))
        bench.settle()
        assert [bench.has(key) for key in range(20)] == [NONE] * 20
        assert (bench.has(100, 101), bench.statistics.restarts) == ((2, 2, 2, 2), 1)
        assert not bench.statistics.incomplete


def test_a_restarted_process_that_is_ahead_already_is_found_out() -> None:
    bench = Bench()
    bench.send(stored(1))
    bench.restart(noticed=False)
    for key in range(100, 110):
        bench.publisher.publish(stored(key))
    bench.deliver(9)
    bench.settle()
    assert (bench.has(1), bench.has(*range(100, 110))[0]) == (NONE, 10)


def test_a_restarted_process_that_has_nothing_has_nothing() -> None:
    bench = Bench()
    bench.send(stored(1))
    bench.restart()
    bench.settle()
    assert (bench.has(1), bench.statistics.restarts, bench.statistics.incomplete) == (NONE, 1, False)


def test_a_restart_without_a_replay_leaves_nothing_either() -> None:
    for noticed in (True, False):
        bench = Bench(ALONE)
        for key in range(3):
            bench.send(stored(key))
        bench.restart(noticed=noticed)
        bench.send(stored(100))
        assert (bench.has(0), bench.has(100)) == (NONE, GPU)


def test_a_restart_leaves_nothing_of_what_was_held_either() -> None:
    bench = Bench(ALONE)
    bench.send(stored(0))
    for key in range(1, 4):
        bench.publisher.publish(stored(key))
    bench.deliver(3)
    bench.restart()
    for key in range(100, 103):
        bench.publisher.publish(stored(key))
    bench.deliver(2)
    bench.now_s += 1.0
    bench.stream.tick(bench.now_s)
    assert (bench.has(3), bench.has(102), bench.statistics.seq) == (NONE, GPU, 2)


def test_the_same_process_is_known_again_after_a_cut() -> None:
    bench = Bench()
    bench.send(stored(1))
    bench.stream.disconnected(bench.now_s)
    bench.publisher.publish(stored(2))
    bench.stream.connected(bench.now_s)
    bench.send(stored(3))
    assert bench.has(3) == NONE
    bench.settle()
    assert [bench.has(key) for key in (1, 2, 3)] == [GPU] * 3
    assert (bench.statistics.restarts, bench.statistics.incomplete) == (0, False)


def test_after_a_cut_that_the_replay_does_not_reach_all_is_forgotten() -> None:
    bench = Bench(keeps=2)
    bench.send(stored(1))
    bench.stream.disconnected(bench.now_s)
    for key in range(2, 6):
        bench.publisher.publish(stored(key))
    bench.stream.connected(bench.now_s)
    bench.settle()
    assert [bench.has(key) for key in range(1, 6)] == [NONE] * 3 + [GPU] * 2
    assert bench.statistics.incomplete


def test_after_a_cut_without_a_replay_all_is_forgotten_whatever_the_next_number_is() -> None:
    for noticed in (True, False):
        for missed in range(3):
            bench = Bench(ALONE)
            bench.send(stored(1))
            if noticed:
                bench.stream.disconnected(bench.now_s)
                assert bench.has(1) == NONE
            bench.publisher = Publisher()
            for _ in range(missed):
                bench.publisher.publish(stored(7))
            bench.stream.connected(bench.now_s)
            bench.send(stored(2))
            assert (bench.has(1), bench.has(2), bench.statistics.incomplete) == (NONE, GPU, missed > 0)


def test_what_came_before_the_new_connection_was_noticed_counts() -> None:
    bench = Bench(ALONE)
    bench.send(stored(1))
    bench.restart(noticed=False)
    bench.stream.disconnected(bench.now_s)
    bench.send(stored(2))
    bench.stream.connected(bench.now_s)
    bench.send(stored(3))
    assert [bench.has(key) for key in (1, 2, 3)] == [NONE, GPU, GPU]


def test_an_engine_that_may_be_another_is_left_out_at_once_until_it_has_proved_to_be_the_same() -> None:
    for missed in (0, 1):  # a new connection, or a gap
        bench = Bench()
        bench.send(stored(1))
        bench.settle()
        if missed:
            bench.publisher.publish(stored(2))
            bench.send(stored(3))
        else:
            bench.stream.disconnected(bench.now_s)
            bench.stream.connected(bench.now_s)
        assert (bench.has(1), bench.statistics.muted) == (NONE, True)
        bench.replay()
        assert (bench.has(1), bench.statistics.muted, bench.statistics.restarts) == (GPU, False, 0)


def test_a_restarted_engine_whose_replay_never_answers_leaves_nothing_of_the_process_before() -> None:
    bench = Bench()
    for key in range(5):
        bench.send(stored(key))
    bench.restart()
    assert (bench.has(0), bench.statistics.muted) == (NONE, True)
    for key in range(100, 106):
        bench.publisher.publish(stored(key))
    bench.deliver(5)  # the number that the process before would have had next
    for _ in range(3):
        assert [bench.has(key) for key in (0, 105)] == [NONE, NONE]
        assert bench.stream.age_s(bench.now_s) == bench.now_s
        bench.now_s += 2.0
        bench.stream.asked(bench.now_s)
        bench.stream.replay_failed(bench.now_s)
    assert [bench.has(key) for key in (0, 105)] == [NONE, GPU]
    assert (bench.statistics.muted, bench.stream.age_s(bench.now_s)) == (False, 0.0)


def test_the_age_is_that_of_the_last_moment_at_which_nothing_was_missing_or_in_doubt() -> None:
    bench = Bench()
    assert bench.stream.age_s(0.0) == math.inf
    bench.stream.asked(0.0)
    assert bench.stream.age_s(1.0) == math.inf
    bench.stream.replay_ended(1.0)
    assert bench.stream.age_s(1.0) == bench.stream.age_s(100.0) == 0.0
    bench.now_s = 101.0
    bench.send(stored(1))
    bench.publisher.publish(stored(2))
    bench.send(stored(3))  # what is between is missing
    bench.now_s = 104.0
    assert bench.stream.age_s(104.0) == 3.0
    bench.replay()
    assert bench.stream.age_s(105.0) == 0.0
    bench.stream.asked(106.0)  # whether something got lost is being looked for
    assert bench.stream.age_s(107.0) == 1.0
    bench.stream.replay_failed(107.0)
    assert bench.stream.age_s(108.0) == 2.0
    bench.now_s = 108.0
    bench.replay()
    assert bench.stream.age_s(109.0) == 0.0
    bench.stream.disconnected(110.0)
    assert bench.stream.age_s(111.0) == 1.0
    bench.stream.connected(112.0)
    assert bench.stream.age_s(113.0) == 3.0
    bench.now_s = 113.0
    bench.replay()
    assert bench.stream.age_s(114.0) == 0.0


def test_the_age_without_a_replay_is_known_from_the_first_batch_on() -> None:
    bench = Bench(ALONE)
    assert bench.stream.age_s(5.0) == math.inf
    bench.send(stored(1))
    assert bench.stream.age_s(5.0) == 0.0
    bench.now_s = 5.0
    big = stored(*range(1 << 59, (1 << 59) + 200_000))
    bench.publisher.publish(stored(2))
    bench.send(big)
    assert bench.stream.age_s(6.0) == 0.0  # nothing more can be held: it has gone on
    bench.stream.disconnected(7.0)
    bench.stream.connected(8.0)
    assert bench.stream.age_s(9.0) == 2.0
    bench.send(stored(4))
    assert bench.stream.age_s(9.0) == 0.0


def test_a_foreign_topic_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(replace(SOURCE, topic="kv@a"))
    for seq in range(3):
        bench.stream.batch(seq, b"kv@ab", encode_batch([stored(1)], 1.0, arrays=False), 0.0)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "b'kv@ab'" in record.message
    assert "b'kv@a'," in record.message


def test_who_is_away_is_left_out_until_it_has_proved_that_it_is_the_same() -> None:
    bench = Bench()
    bench.send(stored(1))
    bench.stream.disconnected(bench.now_s)
    bench.stream.tick(bench.now_s + DEAD_AFTER_S / 2)
    assert bench.has(1) == GPU
    bench.now_s += DEAD_AFTER_S
    bench.stream.tick(bench.now_s)
    assert (bench.has(1), bench.statistics.muted, bench.statistics.connected) == (NONE, True, False)
    bench.stream.connected(bench.now_s)
    assert bench.has(1) == NONE
    bench.replay()
    assert (bench.has(1), bench.statistics.muted) == (GPU, False)


def test_other_topics_and_garbage_are_counted_and_harm_nothing() -> None:
    bench = Bench(replace(SOURCE, topic="kv@a"))
    good = encode_batch([stored(1)], 1.0, arrays=False)
    bench.stream.batch(0, b"kv@a", good, 0.0)
    bench.stream.batch(1, b"kv@ab", good, 0.0)
    bench.stream.batch(1, b"kv@a", b"garbage", 0.0)
    bench.stream.batch(2, b"kv@a", encode_batch([stored(2)], 2.0, arrays=True), 0.0)
    assert (bench.has(1), bench.has(2)) == (GPU, GPU)
    statistics = bench.statistics
    assert (statistics.undecodable, statistics.incomplete, statistics.ignored) == (1, True, {"topic": 1})


def test_a_number_out_of_nowhere_is_survived() -> None:
    for source in (SOURCE, ALONE):
        bench = Bench(source)
        bench.send(stored(1))
        for seq in ((1 << 64) - 1, (1 << 62) - 1):
            bench.stream.batch(seq, b"", encode_batch([], 0.0, arrays=False), 0.0)
        bench.settle()
        bench.send(stored(2))
        bench.send(stored(3))
        bench.settle()
        assert bench.has(3) == GPU


def test_a_flood_ends_at_the_limit() -> None:
    bench = Bench(blocks_max=100)
    bench.send(*[stored(key) for key in range(200)])
    assert (bench.statistics.blocks, bench.statistics.over) == (100, True)
    assert bench.statistics.ignored["limit"] == 100


def test_hashes_are_the_same_in_every_form() -> None:
    bench = Bench()
    number = 0xFEDC_BA98_7654_3210
    bench.send(stored(number))
    bench.send(stored(7, parent=number - (1 << 64)), BlockRemoved([number - (1 << 64)], "gpu"))
    key = number & (1 << 60) - 1
    assert bench.has(key) == NONE
    bench.send(BlockStored([bytes(24) + number.to_bytes(8, "big")], None, TOKENS, 16, None, "GPU"))
    assert bench.has(key, 7) == (2, 2, 2, 2)


@pytest.mark.parametrize(
    ("medium", "locality", "expected"),
    [
        ("GPU", None, (1, 1, 1, 1)),
        (None, None, (1, 1, 1, 1)),
        ("CPU", "LOCAL", (0, 1, 1, 1)),
        ("cpu", None, (0, 1, 1, 1)),
        ("CPU_PINNED", None, (0, 1, 1, 1)),
        ("STORAGE", None, (0, 0, 1, 1)),
        ("DISK", None, (0, 0, 1, 1)),
        ("STORAGE", "REMOTE", (0, 0, 0, 1)),
        ("EXTERNAL", None, (0, 0, 0, 1)),
        ("TAPE", None, NONE),
    ],
)
def test_media_have_their_tiers(medium: str | None, locality: str | None, expected: tuple[int, ...]) -> None:
    bench = Bench()
    bench.send(BlockStored([1], None, TOKENS, 16, None, medium, locality=locality))
    assert bench.has(1) == expected
    assert bench.statistics.ignored == ({"medium": 1} if expected == NONE else {})
    bench.send(BlockRemoved([1], medium, locality=locality))
    assert bench.has(1) == NONE


def test_groups_and_block_sizes_have_their_namespaces() -> None:
    bench = Bench()
    double = BlockStored([2], None, TOKENS, 32, None, "GPU", group_idx=1, kv_cache_spec_kind="mla_attention")
    half = BlockStored([3], None, TOKENS, 8, None, "GPU")
    bench.send(stored(1), double, half)
    space = replace(SPACE, block_tokens=32, group="1", scheme=f"{SPACE.scheme}/2")
    assert (bench.has(1), bench.has(2, space=space)) == (GPU, GPU)
    assert (bench.statistics.blocks, bench.statistics.ignored) == (2, {"block_size": 1})
    bench.send(BlockRemoved([2], "GPU", 1))
    assert bench.has(2, space=space) == NONE


def test_groups_that_need_no_whole_prefix_are_left_out_whatever_their_later_events_say() -> None:
    bench = Bench()
    window = BlockStored([1], None, TOKENS, 16, None, "GPU", group_idx=1, kv_cache_spec_kind="sliding_window")
    bench.send(window, BlockStored([1], None, pack_tokens([]), 0, None, "CPU", group_idx=1))
    assert (bench.statistics.blocks, bench.statistics.ignored) == (0, {"kind": 2})


def test_placeholders_of_offloading_have_the_block_size_of_the_source() -> None:
    bench = Bench()
    bench.send(stored(1, 2), BlockStored([2], None, pack_tokens([]), 0, None, "CPU", group_idx=0))
    bench.send(removed(2))
    assert bench.has(2) == (0, 1, 1, 1)
    assert bench.has(1, 2) == (1, 2, 2, 2)


def test_a_clear_takes_everything_everywhere() -> None:
    bench = Bench()
    bench.send(stored(1), stored(1, medium="CPU"), AllBlocksCleared(), stored(2))
    assert (bench.has(1), bench.has(2)) == (NONE, GPU)
    assert bench.statistics.blocks == 1


# Random histories against a naive model.

MEDIA: Final = ("GPU", "CPU")
EVENT: Final = st.one_of(
    st.tuples(st.just("stored"), st.integers(0, 7), st.sampled_from(MEDIA)),
    st.tuples(st.just("removed"), st.integers(0, 7), st.sampled_from(MEDIA)),
    st.just(("cleared",)),
)
STEP: Final = st.one_of(
    st.tuples(st.just("batch"), st.lists(EVENT, max_size=4), st.integers(0, 9)),
    st.tuples(st.just("batch"), st.lists(EVENT, max_size=4), st.just(9)),
    st.just(("late",)),
    st.just(("again",)),
    st.just(("time",)),
    st.just(("replay",)),
    st.just(("half a replay",)),
    st.just(("no replay",)),
    st.tuples(st.just("cut"), st.lists(st.lists(EVENT, max_size=2), max_size=3)),
    st.tuples(st.just("restart"), st.booleans()),
)


class History:
    """Random steps, and what the engine has in truth. Keys of each process are its own."""

    def __init__(self, source: EngineSource) -> None:
        self.bench = Bench(source)
        self.process = 0
        self.late: list[int] = []
        self.truth: set[tuple[int, str]] = set()
        self.every_key: set[int] = set()

    def publish(self, events: Sequence[tuple[Any, ...]]) -> int:
        found: list[Event] = []
        for kind, *rest in events:
            if kind == "cleared":
                found.append(AllBlocksCleared())
                self.truth.clear()
                continue
            key, medium = self.process * 100 + rest[0], rest[1]
            self.every_key.add(key)
            found.append((stored if kind == "stored" else removed)(key, medium=medium))
            (self.truth.add if kind == "stored" else self.truth.discard)((key, medium))
        return self.bench.publisher.publish(*found)

    def step(self, what: str, *rest: Any) -> None:
        bench = self.bench
        match what:
            case "batch":
                seq = self.publish(rest[0])
                if rest[1] == 0:
                    return  # lost
                if rest[1] == 1:
                    self.late.append(seq)
                else:
                    bench.deliver(seq)
            case "late" if self.late:
                bench.deliver(self.late.pop())
            case "again" if bench.publisher.payloads:
                bench.deliver(
                    random.Random(len(bench.publisher.payloads)).randrange(len(bench.publisher.payloads))
                )
            case "time":
                bench.now_s += 1.0
                bench.stream.tick(bench.now_s)
            case "replay":
                bench.replay()
            case "half a replay" if bench.stream.due(bench.now_s) is not None:
                start = bench.stream.due(bench.now_s)
                bench.stream.asked(bench.now_s)
                for seq in range(start or 0, len(bench.publisher.payloads), 2):
                    bench.stream.replayed(seq, b"", bench.publisher.payloads[seq], bench.now_s)
                    start = seq
                bench.stream.replay_failed(bench.now_s)
                bench.replay()  # more in vain, and it goes on without
            case "no replay" if bench.stream.due(bench.now_s) is not None:
                bench.stream.asked(bench.now_s)
                bench.stream.replay_failed(bench.now_s)
                bench.replay()
            case "cut":
                bench.stream.disconnected(bench.now_s)
                for events in rest[0]:
                    self.publish(events)
                bench.stream.connected(bench.now_s)
            case "restart":
                self.process += 1
                self.late.clear()
                self.truth.clear()
                bench.restart(noticed=rest[0])
                if not rest[0]:  # else nobody could know
                    bench.deliver(self.publish([("stored", 0, "GPU")]))

    def known(self) -> set[tuple[int, str]]:
        found = set()
        for key in self.every_key:
            gpu, dram, _, _ = self.bench.has(key)
            found |= {(key, "GPU")} if gpu else set()
            found |= {(key, "CPU")} if dram and not gpu else set()
        return found

    def visible_truth(self) -> set[tuple[int, str]]:
        """Cumulative media hide what is below."""
        return {
            (key, medium) for key, medium in self.truth if medium == "GPU" or (key, "GPU") not in self.truth
        }


FEW: Final = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@FEW
@given(st.lists(STEP, max_size=40))
def test_with_a_replay_the_index_knows_in_the_end_what_the_engine_has(steps: list[tuple[Any, ...]]) -> None:
    history = History(SOURCE)
    for step in steps:
        history.step(*step)
    history.bench.now_s += 60.0
    history.bench.stream.tick(history.bench.now_s)
    history.bench.settle()
    history.publish([])
    history.bench.deliver(len(history.bench.publisher.payloads) - 1)
    history.bench.settle()
    assert history.known() == history.visible_truth()
    history.bench.locality.check()


@FEW
@given(st.lists(STEP, max_size=40), st.integers(0, 12))
def test_without_a_replay_nothing_of_an_older_process_stays(steps: list[tuple[Any, ...]], lost: int) -> None:
    history = History(ALONE)
    for step in steps:
        history.step(*step)
    history.step("restart", True)
    for _ in range(lost):
        history.publish([("stored", 1, "GPU")])
    history.bench.deliver(history.publish([("stored", 0, "GPU")]))
    assert history.known() == {(history.process * 100, "GPU")}


@FEW
@given(st.lists(st.tuples(st.integers(0, 30), st.binary(max_size=40)), max_size=30), st.booleans())
def test_whatever_is_sent_raises_nothing(messages: list[tuple[int, bytes]], tokens: bool) -> None:
    bench = Bench(replace(SOURCE, scheme="tokens") if tokens else SOURCE)
    event = {"type": "BlockStored", "block_hashes": [1], "parent_block_hash": None, "block_size": 16}
    good = msgspec.msgpack.encode([1.0, [event | {"token_ids": list(range(16)), "lora_name": "a"}]])
    for seq, piece in messages:
        at = seq * 4
        bench.stream.batch(seq, b"", good[:at] + piece + good[at + len(piece) :], bench.now_s)
        if bench.stream.due(bench.now_s) is not None:
            bench.stream.asked(bench.now_s)
            bench.stream.replayed(seq, b"", piece, bench.now_s)
            bench.stream.replay_ended(bench.now_s)
    bench.locality.check()
