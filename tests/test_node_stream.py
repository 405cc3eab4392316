"""What a daemon's feed makes of the index: whatever is lost, doubled, mixed up or false, it ends up right."""

import math
import random
from collections import deque
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvstore.block import Medium, Namespace
from kvstore.engine_keys import engine_key
from kvstore.errors import ProtocolError
from kvstore.index import feed
from kvstore.index.locality import Locality
from kvstore.index.node_stream import SILENT_S, Names, NodeStream
from tests.feeds import MEDIA, Daemon, found

SPACE = Namespace(model="llama-test")
OTHER = Namespace(model="llama-test", salt="tenant")
ENGINES = Namespace(model="llama-test", block_tokens=16, scheme="vllm-sha256:deadbeef")
A, B, C, D = b"a", b"b", b"c", b"d"
HEALED_S = 5.0


class Line:
    """A daemon, a stream and a clock; frames go by `say`, what is due by `ask`, both at once by `wait`."""

    def __init__(
        self,
        daemon: Daemon,
        locality: Locality | None = None,
        names: Names | None = None,
        address: str = "10.0.0.1:7404",
        expected: str | None = None,
    ) -> None:
        self.daemon = daemon
        self.locality = locality or Locality()
        self.now_s = 1000.0
        self.stream = NodeStream(
            self.locality, Names() if names is None else names, address, self.now_s, expected
        )
        self.asked: list[feed.Subscribe] = []

    def say(self, *frames: bytes) -> None:
        """Frames arrive."""
        for frame in frames:
            self.stream.received(frame, self.now_s, self.now_s)

    def due(self) -> feed.Subscribe | None:
        """What the stream asks now; it counts as sent."""
        subscribe = self.stream.due(self.now_s)
        if subscribe is not None:
            self.stream.asked(self.now_s)
            self.asked.append(subscribe)
        return subscribe

    def ask(self) -> None:
        """Let the daemon answer what is due."""
        subscribe = self.due()
        if subscribe is not None:
            self.say(*self.daemon.answer(subscribe))

    def wait(self, seconds: float, *, heartbeats: bool = True) -> None:
        """Time goes by, as usual or in silence."""
        for step in range(round(seconds / 0.25)):
            self.now_s += 0.25
            self.stream.tick(self.now_s)
            if heartbeats:
                self.ask()
                if step % 2:
                    self.say(self.daemon.beat())
                    self.ask()

    def found(self, key: int | bytes, namespace: Namespace = SPACE) -> Medium | None:
        """Where the index says the daemon has a key."""
        return found(self.locality, self.daemon.node, namespace, key)

    @property
    def counters(self) -> object:
        """What the stream has counted."""
        return self.stream.statistics(self.now_s).counters

    def check(self) -> None:
        """The index has what the daemon has."""
        for (namespace, _), keys in self.daemon.has.items():
            for key in keys:
                wanted = engine_key(key) if namespace is ENGINES else key
                assert self.found(wanted, namespace) == self.daemon.fastest(namespace, key)
        assert self.stream.statistics(self.now_s).blocks == sum(map(len, self.daemon.has.values()))
        self.locality.check()


@pytest.fixture
def line() -> Line:
    """To a daemon that has some blocks, all of them known."""
    line = Line(Daemon())
    line.daemon.store(SPACE, Medium.DRAM, [A, B])
    line.daemon.store(SPACE, Medium.NVME, [A, B, C])
    line.ask()
    return line


def test_a_new_index_asks_for_all_there_is_and_shows_it(line: Line) -> None:
    assert line.asked == [feed.Subscribe(feed.VERSION, None, None)]
    assert (line.found(B), line.found(C), line.found(D)) == (Medium.DRAM, Medium.NVME, None)
    now = line.stream.statistics(line.now_s)
    assert (now.name, now.epoch, now.seq, now.engines) == ("node-a", 1, 2, ("10.0.0.1:8000",))
    assert (now.blocks, now.age_s, now.filling) == (5, 0.0, False)
    line.check()


def test_events_are_applied_as_they_come(line: Line) -> None:
    line.say(line.daemon.store(SPACE, Medium.GPU, [D], C), line.daemon.remove(SPACE, Medium.DRAM, [B]))
    assert (line.found(D), line.found(B)) == (Medium.GPU, Medium.NVME)
    line.check()


def test_what_was_applied_before_is_dropped(line: Line) -> None:
    stored = line.daemon.store(SPACE, Medium.GPU, [D])
    line.say(stored, line.daemon.remove(SPACE, Medium.GPU, [D]), stored, stored)
    assert line.found(D) is None
    assert line.counters.duplicates == 2
    line.check()


def test_after_a_gap_it_asks_for_what_followed(line: Line) -> None:
    line.daemon.store(SPACE, Medium.GPU, [D])
    line.say(line.daemon.store(OTHER, Medium.GPU, [D]))
    assert line.found(D, OTHER) is None  # not before what came before it
    line.now_s += 1.0
    line.ask()
    assert line.asked[1:] == [feed.Subscribe(feed.VERSION, 1, 2)]
    assert line.counters.gaps == 1
    line.check()


def test_a_heartbeat_shows_that_the_last_events_are_missing(line: Line) -> None:
    line.daemon.store(SPACE, Medium.GPU, [D])
    line.say(line.daemon.beat())
    line.wait(1.0)
    line.check()
    assert line.counters.gaps == 1


def test_what_was_missed_too_long_ago_comes_with_a_snapshot_and_the_old_one_answers_meanwhile(
    line: Line,
) -> None:
    for number in range(20):
        line.daemon.store(SPACE, Medium.GPU, [b"key%d" % number])
    line.now_s += 1.0
    line.say(line.daemon.beat())
    subscribe = line.due()
    assert subscribe is not None
    hello, *parts, end = line.daemon.answer(subscribe)
    line.say(hello, *parts)
    assert line.stream.statistics(line.now_s).filling
    assert (line.found(B), line.found(b"key3")) == (Medium.DRAM, None)
    line.say(end)
    assert line.found(b"key3") == Medium.GPU
    assert line.counters.resyncs == 1
    line.check()


def test_a_gap_in_the_same_place_again_is_filled_by_a_snapshot(line: Line) -> None:
    line.daemon.store(SPACE, Medium.GPU, [D])
    for _ in range(2):  # the same frame gets lost again and again
        line.now_s += 3.0
        line.say(line.daemon.store(OTHER, Medium.GPU, [b"key%d" % line.daemon.seq]))
        subscribe = line.due()
        assert subscribe is not None
        answer = line.daemon.answer(subscribe)
        line.say(*[frame for frame in answer if b"\x03" not in frame[:9]])
    assert [subscribe.seq for subscribe in line.asked] == [None, 2, None]
    line.wait(1.0)
    line.check()


def test_nothing_of_an_earlier_life_answers_once_the_next_has_said_hello(line: Line) -> None:
    line.daemon.restart(media=[Medium.NVME])
    line.stream.lost(line.now_s)
    subscribe = line.due()
    assert subscribe == feed.Subscribe(feed.VERSION, 1, 2)
    hello, *rest = line.daemon.answer(subscribe)
    line.say(hello)
    assert (line.found(A), line.found(C)) == (None, None)
    line.say(*rest)
    assert (line.found(A), line.found(C)) == (Medium.NVME, Medium.NVME)
    assert line.counters.restarts == 1
    assert line.counters.resyncs == 0
    line.check()


def test_a_hello_that_resumes_what_was_never_there_is_not_believed(line: Line) -> None:
    line.daemon.restart()
    line.say(feed.encode(line.daemon.hello(0, resumed=True)))
    assert line.stream.statistics(line.now_s).epoch is None
    line.wait(2.0)
    assert line.asked[-1].seq is None
    line.check()


@pytest.mark.parametrize(
    "event",
    [
        feed.Stored(SPACE.canonical, Medium.DRAM, None, [D]),
        feed.Stored(SPACE.canonical, Medium.GPU, None, [A]),
        feed.Removed(SPACE.canonical, Medium.NVME, [A]),
        feed.Removed(SPACE.canonical, Medium.GPU, [A]),
    ],
    ids=["a key too many", "another medium", "a key too few", "nothing"],
)
def test_what_is_false_is_found_by_its_digest_and_healed(
    line: Line, event: feed.Stored | feed.Removed
) -> None:
    line.daemon.store(SPACE, Medium.DRAM, [C])
    line.say(feed.encode(feed.Events(line.daemon.seq, 0.0, [event])))
    line.wait(HEALED_S)
    assert line.counters.divergences == 1
    assert line.counters.resyncs == 1
    line.check()


def test_a_snapshot_that_lacks_a_part_is_not_shown(line: Line) -> None:
    line.daemon.store(SPACE, Medium.GPU, [b"key%d" % number for number in range(9)])
    line.daemon.restart(media=MEDIA)
    line.stream.lost(line.now_s)
    subscribe = line.due()
    assert subscribe is not None
    hello, _lost, *rest = line.daemon.answer(subscribe)
    line.say(hello, *rest)
    assert line.found(A) is None
    assert line.counters.divergences == 1
    line.wait(HEALED_S)
    line.check()


def test_half_a_snapshot_is_asked_for_again(line: Line) -> None:
    line.daemon.restart(media=MEDIA)
    line.stream.lost(line.now_s)
    subscribe = line.due()
    assert subscribe is not None
    line.say(*line.daemon.answer(subscribe)[:2])
    line.wait(HEALED_S)
    line.check()


def test_what_is_not_answered_is_asked_again_and_less_often() -> None:
    line = Line(Daemon())
    times = []
    while line.now_s < 1020.0:
        if line.due() is not None:
            times.append(line.now_s - 1000.0)
        line.now_s += 0.25
    assert times[:5] == [0.0, 0.5, 1.5, 3.5, 5.5]


def test_a_silent_node_is_muted_and_counts_again_when_heard_as_it_was(line: Line) -> None:
    line.wait(SILENT_S, heartbeats=False)
    assert line.found(A) == Medium.DRAM
    line.wait(0.25, heartbeats=False)
    assert line.found(A) is None
    assert line.stream.silent
    assert line.stream.age_s(line.now_s) == SILENT_S + 0.25
    assert line.due() == feed.Subscribe(feed.VERSION, 1, 2)
    line.say(line.daemon.beat())
    assert line.found(A) == Medium.DRAM
    assert line.stream.age_s(line.now_s) == 0.0
    assert line.due() is None


def test_a_node_that_did_things_in_silence_counts_again_once_they_are_known(line: Line) -> None:
    line.daemon.remove(SPACE, Medium.DRAM, [A])
    line.wait(3.0, heartbeats=False)
    line.say(line.daemon.beat())
    assert line.found(A) is None
    line.wait(3.0)
    assert line.found(A) == Medium.NVME
    line.check()


def test_the_age_is_that_of_what_is_known_not_of_what_was_heard(line: Line) -> None:
    line.daemon.store(SPACE, Medium.GPU, [D])
    for _ in range(4):
        line.now_s += 0.5
        line.say(line.daemon.beat())  # of events that never came, and nothing is answered
        line.stream.tick(line.now_s)
    assert not line.stream.silent
    assert line.stream.age_s(line.now_s) == 2.0
    assert math.isinf(Line(Daemon()).stream.age_s(line.now_s))


def test_the_lag_of_events_is_told(line: Line) -> None:
    for at_s in (line.now_s - 0.2, math.nan, math.inf, -math.inf, line.now_s - 0.002):
        line.daemon.store(SPACE, Medium.GPU, [b"key%d" % line.daemon.seq])
        line.say(feed.encode(feed.Events(line.daemon.seq, at_s, line.daemon.kept[-1].events)))
    now = line.stream.statistics(line.now_s)
    assert now.lag_s == pytest.approx(0.002)
    assert now.lags.count == 5
    assert now.lags.at_most_s(0.8) == 0.25


def test_a_heartbeat_tells_the_lag_where_nothing_happens(line: Line) -> None:
    daemon = line.daemon
    line.say(feed.encode(feed.Heartbeat(daemon.epoch, daemon.seq, line.now_s - 0.3, daemon.digests)))
    now = line.stream.statistics(line.now_s)
    assert now.lag_s == pytest.approx(0.3)
    assert now.lags.count == 0


def bad_frames() -> list[tuple[str, bytes]]:
    """Frames that are none, or hold what cannot be."""
    keys = [b"key%d" % number for number in range(feed.KEYS_MAX + 1)]

    def events(*happened: feed.Stored | feed.Removed) -> bytes:
        return feed.encode(feed.Events(3, 0.0, list(happened)))

    def stored(keys: list[bytes], parent: bytes | None = None, namespace: Namespace = SPACE) -> feed.Stored:
        return feed.Stored(namespace.canonical, Medium.GPU, parent, keys)

    return [
        ("nothing", b""),
        ("garbage", bytes(range(256))),
        ("another kind", feed.encode(feed.Alive())),
        (
            "a text that is none",
            feed.encode(feed.Hello(1, "x", 1, 1, False, [])).replace(b"\xa1x", b"\xa1\xff"),
        ),
        ("deep", b"\x93\xa4part\x90" + b"\x91" * 100_000 + b"\xc0"),
        ("a count that is none", b"\x92\xa4part\xdd\xff\xff\xff\xff"),
        ("too long", b"\x00" * (feed.FRAME_BYTES_MAX + 1)),
        ("another version", feed.encode(feed.Hello(2, "node-a", 1, 2, True, []))),
        ("no name", feed.encode(feed.Hello(1, "", 1, 2, True, []))),
        ("a long name", feed.encode(feed.Hello(1, "n" * 300, 1, 2, True, []))),
        ("many engines", feed.encode(feed.Hello(1, "node-a", 1, 2, True, ["e"] * 5000))),
        ("too many keys", events(stored(keys))),
        ("too many keys in all", events(stored(keys[:4000]), stored(keys[:97]))),
        ("no keys", events(stored([]))),
        ("an empty key", events(stored([D, b""]))),
        ("a long key", events(stored([D, b"k" * 65]))),
        ("a long parent", events(stored([D], b"k" * 65))),
        ("a short digest", events(stored([b"k" * 7], None, ENGINES))),
        ("a short digest before", events(stored([b"k" * 32], b"k" * 7, ENGINES))),
        ("nothing removed", events(feed.Removed(SPACE.canonical, Medium.GPU, []))),
        ("a bad one after a good one", events(stored([D]), stored([b""]))),
    ]


@pytest.mark.parametrize("frame", [pytest.param(frame, id=name) for name, frame in bad_frames()])
def test_what_is_no_message_is_counted_and_changes_nothing(line: Line, frame: bytes) -> None:
    line.say(frame)
    assert line.counters.malformed == 1
    assert line.found(D) is None
    line.check()
    line.wait(HEALED_S)
    assert line.counters.resyncs == 1
    line.check()


def test_blocks_of_a_namespace_that_is_none_are_left_out_and_the_others_known(line: Line) -> None:
    later = SPACE.canonical.replace(b"}", b',"field":1}')
    line.daemon.store(SPACE, Medium.GPU, [D])
    events = [
        feed.Stored(name, Medium.GPU, None, [C]) for name in (b"{}", b"\xff", later, b"x" * 100_000, later)
    ]
    line.say(feed.encode(feed.Events(3, 0.0, [*events, *line.daemon.kept[-1].events])))
    assert line.found(D) == Medium.GPU
    assert line.counters.skipped == 5
    beat = feed.Heartbeat(1, 3, 0.0, {Medium.GPU: feed.Digest(6, 1)})
    line.say(feed.encode(beat))
    assert line.counters.divergences == 0
    line.check()


def test_more_blocks_than_a_publisher_may_have_are_left_out_and_not_asked_for_again() -> None:
    line = Line(Daemon(), Locality(blocks_max=4))
    for number in range(9):
        line.daemon.store(SPACE, Medium.DRAM, [b"key%d" % number])
    line.wait(HEALED_S)
    now = line.stream.statistics(line.now_s)
    assert (now.blocks, now.over) == (4, True)
    assert len(line.asked) == 1
    assert now.counters.divergences == 0


def test_digests_of_engines_are_known_by_the_numbers_that_engines_publish(line: Line) -> None:
    digests = [random.Random(number).randbytes(32) for number in range(6)]
    line.say(line.daemon.store(ENGINES, Medium.DRAM, digests[:4]))
    line.say(line.daemon.store(ENGINES, Medium.DRAM, digests, digests[3]))  # some of them again
    line.daemon.store(ENGINES, Medium.NVME, digests)
    line.daemon.remove(ENGINES, Medium.DRAM, digests[1:2])
    line.wait(1.0)
    number = int.from_bytes(digests[0][-8:], "big") % (1 << 60)
    assert line.found(number, ENGINES) == Medium.DRAM
    assert line.counters.divergences == 0
    line.check()


def test_a_prompt_told_in_pieces_is_found_whole(line: Line) -> None:
    keys = [b"key%d" % number for number in range(64)]
    for start in range(0, 64, 16):
        parent = keys[start - 1] if start else feed.ROOT
        line.say(line.daemon.store(SPACE, Medium.GPU, keys[start : start + 16], parent))
    assert [depth for depth, _ in line.locality.depths(SPACE, keys)] == [64]
    line.say(line.daemon.remove(SPACE, Medium.GPU, keys[40:]))
    assert [depth for depth, _ in line.locality.depths(SPACE, keys)] == [40]


def two_lines() -> tuple[Line, Line]:
    """To two daemons of one name."""
    locality, names = Locality(), Names()
    one = Line(Daemon(), locality, names, "10.0.0.1:7404")
    two = Line(Daemon(epoch=9), locality, names, "10.0.0.2:7404")
    one.daemon.store(SPACE, Medium.DRAM, [A])
    two.daemon.store(SPACE, Medium.DRAM, [B])
    one.ask()
    two.ask()
    return one, two


def test_of_two_daemons_with_one_name_the_first_keeps_it() -> None:
    one, two = two_lines()
    one.wait(10.0)
    two.wait(10.0)
    assert (one.found(A), one.found(B)) == (Medium.DRAM, None)
    assert two.stream.statistics(two.now_s).refused == "10.0.0.1:7404 is 'node-a' too"
    # Nor is it sent all there is again and again.
    assert {subscribe.seq for subscribe in two.asked[1:]} == {1}
    assert not two.stream.silent
    one.check()


def test_no_daemon_may_have_an_engine_s_name() -> None:
    line = Line(Daemon("10.0.0.5:8000"), names=Names(["10.0.0.5:8000"]))
    line.daemon.store(SPACE, Medium.DRAM, [A])
    line.wait(3.0)
    assert line.stream.statistics(line.now_s).refused == "an engine is '10.0.0.5:8000' too"
    assert line.locality.statistics().keys == 0


def test_a_node_that_has_moved_has_its_name_again_once_the_old_place_is_silent() -> None:
    one, two = two_lines()
    one.wait(3.0, heartbeats=False)
    two.wait(HEALED_S)
    assert (two.found(A), two.found(B)) == (None, Medium.DRAM)
    two.check()
    one.wait(HEALED_S)  # it comes back
    assert one.stream.statistics(one.now_s).refused
    two.check()


def test_a_name_is_free_when_its_stream_is_closed() -> None:
    one, two = two_lines()
    one.stream.close()
    assert one.found(A) is None
    two.wait(HEALED_S)
    two.check()


def test_a_daemon_that_is_another_than_expected_is_refused() -> None:
    line = Line(Daemon(), expected="node-b")
    line.daemon.store(SPACE, Medium.DRAM, [A])
    line.wait(HEALED_S)
    assert line.found(A) is None
    assert "'node-b' was expected" in line.stream.statistics(line.now_s).refused
    line.daemon.node = "node-b"
    line.wait(HEALED_S)
    line.check()


def test_another_daemon_at_the_same_address_takes_the_place_of_the_one_before(line: Line) -> None:
    before, line.daemon = line.daemon, Daemon("node-b", epoch=5)
    line.daemon.store(SPACE, Medium.DRAM, [D])
    line.stream.lost(line.now_s)
    line.ask()
    assert found(line.locality, before.node, SPACE, A) is None
    line.check()


def test_a_closed_stream_leaves_nothing(line: Line) -> None:
    line.wait(3.0, heartbeats=False)
    line.stream.close()
    while line.locality.tend():
        pass
    assert line.locality.statistics().keys == 0
    assert line.locality.statistics().holdings == 0
    line.locality.check()


SPACES = [SPACE, OTHER, ENGINES]


def key_of(namespace: Namespace, epoch: int, number: int) -> bytes:
    """A key that another life does not use."""
    return b"%d:%d" % (epoch, number) if namespace is not ENGINES else b"%031d%d" % (epoch, number % 10)


def decoded(frame: bytes) -> feed.ToIndex | None:
    """The message of a frame, if it is one."""
    try:
        return feed.decode_to_index(frame)
    except ProtocolError:
        return None


class Histories(RuleBasedStateMachine):
    """Whatever a daemon does and a network does to its frames, the index ends up with what the daemon has.

    Never does a life answer that is over by what was heard.
    """

    def __init__(self) -> None:
        super().__init__()
        self.line = Line(Daemon(kept=4))
        self.coming: deque[bytes] = deque()
        self.greeted = 0

    @rule(
        space=st.sampled_from(SPACES),
        medium=st.sampled_from(MEDIA),
        first=st.integers(0, 9),
        count=st.integers(1, 5),
        known=st.booleans(),
    )
    def store(self, space: Namespace, medium: Medium, first: int, count: int, known: bool) -> None:
        """Of a prompt of 10 blocks, some of those that are not there; whether the parent is `known`."""
        daemon = self.line.daemon
        keys = [key_of(space, daemon.epoch, number) for number in range(first, min(first + count, 10))]
        held = daemon.has.get((space, medium), {})
        new = [key for key in keys if key not in held]
        parent = key_of(space, daemon.epoch, first - 1) if first else feed.ROOT
        if new:
            self.coming.append(daemon.store(space, medium, new, parent if known and new == keys else None))

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        places = [place for place, keys in self.line.daemon.has.items() if keys]
        if places:
            space, medium = data.draw(st.sampled_from(places))
            keys = data.draw(st.sets(st.sampled_from(list(self.line.daemon.has[space, medium])), min_size=1))
            self.coming.append(self.line.daemon.remove(space, medium, sorted(keys)))

    @rule(media=st.sampled_from([(), (Medium.NVME,), MEDIA]), cut=st.booleans())
    def restart(self, media: Sequence[Medium], cut: bool) -> None:
        self.line.daemon.restart(media=media)
        if cut:
            self.cut()

    @rule()
    def cut(self) -> None:
        self.coming.clear()
        self.line.stream.lost(self.line.now_s)

    @rule(lost=st.booleans())
    def ask(self, lost: bool) -> None:
        subscribe = self.line.due()
        if subscribe is not None and not lost:
            self.coming.extend(self.line.daemon.answer(subscribe))

    @rule()
    def beat(self) -> None:
        self.coming.append(self.line.daemon.beat())

    @rule(count=st.integers(1, 20))
    def arrive(self, count: int) -> None:
        for _ in range(min(count, len(self.coming))):
            frame = self.coming.popleft()
            if isinstance(message := decoded(frame), feed.Hello):
                self.greeted = message.epoch
            self.line.say(frame)

    @precondition(lambda self: self.coming)
    @rule(data=st.data(), fault=st.sampled_from(["lost", "twice", "late", "bad", "false"]))
    def spoil(self, data: st.DataObject, fault: str) -> None:
        place = data.draw(st.integers(0, len(self.coming) - 1))
        frame = self.coming[place]
        del self.coming[place]
        if fault == "twice":
            self.coming.insert(place, frame)
            self.coming.insert(data.draw(st.integers(place, len(self.coming))), frame)
        elif fault == "late":
            self.coming.insert(data.draw(st.integers(place, len(self.coming))), frame)
        elif fault == "bad":
            self.coming.insert(place, frame[:-1] + b"\xc1")
        elif fault == "false" and isinstance(message := decoded(frame), feed.Events):
            event = feed.Stored(OTHER.canonical, Medium.GPU, None, [b"nobody has this"])
            self.coming.insert(place, feed.encode(feed.Events(message.seq, 0.0, [event])))

    @rule(seconds=st.sampled_from([0.25, 1.0, 3.0]))
    def wait(self, seconds: float) -> None:
        self.line.now_s += seconds
        self.line.stream.tick(self.line.now_s)

    @invariant()
    def nothing_answers_that_is_over(self) -> None:
        epoch = self.line.stream.epoch
        assert epoch in (None, self.greeted)
        if epoch is None:
            held = self.line.daemon.has.items()
            assert not any(self.line.found(key, space) for (space, _), keys in held for key in keys)

    def teardown(self) -> None:
        self.line.say(*self.coming)
        self.line.wait(HEALED_S)
        self.line.check()
        now = self.line.stream.statistics(self.line.now_s)
        assert (now.epoch, now.seq) == (self.line.daemon.epoch, self.line.daemon.seq)
        assert now.age_s <= 0.5
        assert self.line.found(b"nobody has this", OTHER) is None


Histories.TestCase.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
test_random_histories_end_up_right = Histories.TestCase


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_bytes_raise(data: st.DataObject) -> None:
    line = Line(Daemon())
    line.daemon.store(SPACE, Medium.DRAM, [A, B, C, D])
    frames = [*line.daemon.answer(feed.Subscribe(1)), *map(feed.encode, line.daemon.kept), line.daemon.beat()]
    line.say(*frames)
    for frame in data.draw(st.lists(st.sampled_from(frames), max_size=4)):
        start, end = sorted([data.draw(st.integers(0, len(frame))), data.draw(st.integers(0, len(frame)))])
        line.say(frame[:start] + data.draw(st.binary(max_size=9)) + frame[end:])
    line.wait(HEALED_S)
    line.check()


def test_what_a_daemon_has_measured_is_told_under_the_name_it_answers_for() -> None:
    names, told = Names(), []
    line = Line(Daemon(), names=names)
    line.stream.on_measured = lambda *measured: told.append(measured)
    line.ask()
    assert told == [("node-a", "", None, line.now_s)]
    assert not line.stream.takes_holds
    measures = feed.Measures({"nvme": (0.001, 1e9), "tape": (9.0, 1.0)}, [])
    beat = feed.Heartbeat(1, 0, 0.0, {}, measures)
    line.say(feed.encode(beat))
    assert told[1:] == [("node-a", "", measures, line.now_s)]
    hello = feed.Hello(feed.VERSION, "node-a", 1, 0, True, [], "eu/r7", True)
    line.say(feed.encode(hello), feed.encode(beat))
    assert told[3:] == [("node-a", "eu/r7", measures, line.now_s)]
    assert line.stream.takes_holds
    other = Line(Daemon(), line.locality, names, "10.0.0.2:7404")
    other.stream.on_measured = line.stream.on_measured
    other.ask()
    other.say(feed.encode(beat))
    assert len(told) == 4


def test_an_answer_to_a_hold_is_handed_on_and_changes_nothing(line: Line) -> None:
    held: list[tuple[str, feed.Held]] = []
    line.stream.on_held = lambda *answer: held.append(answer)
    answer = feed.Held(7, 1, 2, 3, "a reason")
    line.say(feed.encode(answer))
    assert held == [("node-a", answer)]
    line.check()


def test_a_place_of_too_many_characters_is_no_greeting(line: Line) -> None:
    hello = feed.Hello(feed.VERSION, "node-a", 1, 0, True, [], "z" * 257)
    line.say(feed.encode(hello))
    assert line.stream.statistics(line.now_s).counters.malformed == 1
    assert line.stream.topology == ""


def test_a_namespace_is_called_what_the_daemon_calls_it(line: Line) -> None:
    local = Namespace("sharded", 16, shard="1/4:1/2")
    plain = Namespace("sharded", 16, shard="1/4")
    assert line.stream.canonicals(plain) == [plain.canonical]
    line.say(line.daemon.store(local, Medium.DRAM, [A]))
    assert line.stream.canonicals(plain) == [local.canonical]
