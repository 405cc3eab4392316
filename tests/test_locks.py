"""The locks of a connector beside a model that does the obvious, with leases that count their ends."""

import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from connectors.locks import Locks, LockStatistics

AGE_MAX_S = 10.05
KEYS = "abcd"

names = st.lists(st.sampled_from(KEYS), max_size=6)
sets = st.sets(st.sampled_from(KEYS))


class FakeLease:
    """What `Locks` needs of a read lease."""

    def __init__(self) -> None:
        self.valid = True
        self.ends = 0

    def end_quietly(self) -> None:
        self.ends += 1


class Lookup:
    """The model's: one lookup, which of its keys are locked still, and which of them can be read."""

    def __init__(self, pinned: Collection[str], below: Collection[str], since: float) -> None:
        self.lease = FakeLease()
        self.views = {key: memoryview(key.encode()) for key in pinned}
        self.readable = set(pinned)
        self.pins = frozenset(pinned)
        self.locked = {*pinned, *below}
        self.since = since
        self.readers = 0

    @property
    def over(self) -> bool:
        return not (self.locked & self.pins or self.readers)


class Reading:
    """Somebody who reads: what was seen at the beginning, and what it keeps."""

    def __init__(self, locks: "Locks[str]", keys: list[str]) -> None:
        self.held: list[Lookup] = []
        self._block = locks.reading(keys)
        self.views = self._block.__enter__()

    def leave(self) -> None:
        for lookup in self.held:
            lookup.readers -= 1
        self._block.__exit__(None, None, None)


class LocksAndModel(RuleBasedStateMachine):
    """Each rule does the same to both; the invariants compare."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.locks: Locks[str] = Locks(AGE_MAX_S, lambda: self.now)
        self.lookups: list[Lookup] = []  # oldest first
        self.readings: list[Reading] = []
        self.expired = 0

    def of(self, key: str) -> list[Lookup]:
        """The lookups that have locked a key, oldest first."""
        return [lookup for lookup in self.lookups if key in lookup.locked]

    @rule(pinned=sets, below=sets)
    def look_up(self, pinned: set[str], below: set[str]) -> None:
        lookup = Lookup(pinned, below - pinned, self.now)
        self.lookups.append(lookup)
        self.locks.add(lookup.lease, dict(lookup.views), below - pinned)  # type: ignore[arg-type]
        self.forget_old()

    @rule()
    def expire(self) -> None:
        self.locks.expire()
        self.forget_old()

    def forget_old(self) -> None:
        for lookup in self.lookups:
            if lookup.locked and self.now - lookup.since > AGE_MAX_S:
                self.expired += bool(lookup.locked & lookup.pins)
                lookup.locked = set()

    @rule(keys=names)
    def unlock(self, keys: list[str]) -> None:
        for key in keys:
            locked = self.of(key)
            unreadable = [lookup for lookup in locked if key not in lookup.readable]
            for lookup in (unreadable or locked)[:1]:
                lookup.locked.discard(key)
        self.locks.unlock(keys)

    @rule(keys=names)
    def hide(self, keys: list[str]) -> None:
        for key in keys:
            for lookup in self.of(key):
                lookup.readable.discard(key)
        self.locks.hide(keys)

    @rule(keys=names)
    def begin_to_read(self, keys: list[str]) -> None:
        usable = {
            key: [each for each in self.of(key) if key in each.readable and each.lease.valid] for key in keys
        }
        reading = Reading(self.locks, keys)
        assert set(reading.views) == {key for key in keys if usable[key]}
        for key, view in reading.views.items():
            newest = usable[key][-1]
            assert view is newest.views[key]
            if newest not in reading.held:
                newest.readers += 1
                reading.held.append(newest)
        self.readings.append(reading)

    @precondition(lambda self: self.readings)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        reading = self.readings.pop(data.draw(st.integers(0, len(self.readings) - 1)))
        assert [bytes(view).decode() for view in reading.views.values()] == list(reading.views)
        reading.leave()

    @rule(seconds=st.sampled_from([0.1, 4.0, 11.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: any(not lookup.over for lookup in self.lookups))
    @rule(data=st.data())
    def lose_the_connection_of_one(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from([each for each in self.lookups if not each.over])).lease.valid = False

    @precondition(lambda self: not self.readings)
    @rule()
    def clear(self) -> None:
        self.locks.clear()
        for lookup in self.lookups:
            lookup.locked = set()

    @invariant()
    def a_lease_is_ended_once_and_only_when_nobody_needs_it(self) -> None:
        assert [lookup.lease.ends for lookup in self.lookups] == [int(each.over) for each in self.lookups]

    @invariant()
    def the_statistics_are_those_of_the_model(self) -> None:
        assert self.locks.check() == []
        held = [lookup for lookup in self.lookups if not lookup.over]
        assert self.locks.statistics() == LockStatistics(
            locks=sum(len(lookup.locked) for lookup in self.lookups),
            leases=len(held),
            expired_leases=self.expired,
            pinned_bytes=sum(len(lookup.views) for lookup in held),
        )

    def teardown(self) -> None:
        while self.readings:
            self.readings.pop().leave()
        self.locks.unlock([*KEYS] * len(self.lookups))
        assert all(lookup.lease.ends == 1 for lookup in self.lookups)
        assert self.locks.statistics() == LockStatistics(0, 0, self.expired, 0)
        assert self.locks.check() == []


LocksAndModel.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestLocksAndModel = LocksAndModel.TestCase


class Clock:
    """Time that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def locked(locks: "Locks[str]", keys: str, below: str = "") -> FakeLease:
    """Lock some keys as a lookup does."""
    lease = FakeLease()
    locks.add(lease, {key: memoryview(key.encode()) for key in keys}, list(below))  # type: ignore[arg-type]
    return lease


def test_a_lease_that_pins_nothing_ends_at_once() -> None:
    locks: Locks[str] = Locks(AGE_MAX_S)
    assert locked(locks, "").ends == 1
    assert locked(locks, "", below="ab").ends == 1
    assert locks.statistics() == LockStatistics(2, 0, 0, 0)
    locks.unlock(["a", "b", "a"])
    assert locks.statistics() == LockStatistics(0, 0, 0, 0)


def test_an_unlock_ends_the_oldest_lock_first() -> None:
    locks: Locks[str] = Locks(AGE_MAX_S)
    first, second = locked(locks, "ab"), locked(locks, "ab")
    locks.unlock(["a", "b"])
    assert (first.ends, second.ends) == (1, 0)
    locks.unlock(["b", "a"])
    assert (first.ends, second.ends) == (1, 1)


def test_a_lock_that_pins_nothing_is_undone_before_one_that_does() -> None:
    locks: Locks[str] = Locks(AGE_MAX_S)
    lease = locked(locks, "a")
    locked(locks, "", below="a")
    locks.unlock(["a"])
    assert lease.ends == 0
    locks.unlock(["a"])
    assert lease.ends == 1


def test_what_is_read_is_kept_though_it_is_unlocked() -> None:
    locks: Locks[str] = Locks(AGE_MAX_S)
    lease = locked(locks, "ab")
    with locks.reading(["a", "x"]) as views:
        locks.unlock(["a", "b"])
        assert bytes(views["a"]) == b"a"
        assert list(views) == ["a"]
        assert lease.ends == 0
        with locks.reading(["a"]) as later:
            assert not later
    assert lease.ends == 1


def test_a_reader_that_fails_lets_go() -> None:
    locks: Locks[str] = Locks(AGE_MAX_S)
    lease = locked(locks, "a")
    try:
        with locks.reading(["a"]):
            locks.unlock(["a"])
            raise OSError
    except OSError:
        pass
    assert lease.ends == 1


def test_of_two_leases_the_one_whose_connection_stands_is_read() -> None:
    locks: Locks[str] = Locks(AGE_MAX_S)
    lost, good = FakeLease(), FakeLease()
    lost.valid = False
    locks.add(lost, {"a": memoryview(b"lost")}, [])  # type: ignore[arg-type]
    with locks.reading(["a"]) as views:
        assert not views
    locks.add(good, {"a": memoryview(b"good")}, [])  # type: ignore[arg-type]
    with locks.reading(["a"]) as views:
        assert bytes(views["a"]) == b"good"
    locks.unlock(["a", "a"])
    assert (lost.ends, good.ends) == (1, 1)


def test_what_is_too_old_is_forgotten_but_not_while_it_is_read() -> None:
    clock = Clock()
    locks: Locks[str] = Locks(AGE_MAX_S, clock)
    read, idle = locked(locks, "ab"), locked(locks, "b")
    with locks.reading(["a"]) as views:
        clock.now = AGE_MAX_S + 1
        young = locked(locks, "b")
        assert (read.ends, idle.ends, young.ends) == (0, 1, 0)
        assert locks.statistics().locks == 1
        assert bytes(views["a"]) == b"a"
    assert read.ends == 1
    locks.unlock(["b"])
    assert young.ends == 1


def test_an_expired_lease_is_counted_once_however_long_it_is_read() -> None:
    clock = Clock()
    locks: Locks[str] = Locks(AGE_MAX_S, clock)
    lease = locked(locks, "a")
    with locks.reading(["a"]):
        clock.now = AGE_MAX_S + 1
        for _ in range(5):
            locked(locks, "")
        assert lease.ends == 0
    assert locks.statistics() == LockStatistics(0, 0, 1, 0)


def test_locks_that_pin_nothing_are_forgotten_too() -> None:
    clock = Clock()
    locks: Locks[str] = Locks(AGE_MAX_S, clock)
    for _ in range(100):
        clock.now += AGE_MAX_S / 10
        locked(locks, "", below="ab")
    assert locks.statistics().locks <= 2 * 12


def test_clear_ends_everything_once() -> None:
    locks: Locks[str] = Locks(AGE_MAX_S)
    leases = [locked(locks, "ab", below="c") for _ in range(3)]
    locks.clear()
    locks.clear()
    locks.unlock(["a", "b", "c"])
    assert [lease.ends for lease in leases] == [1, 1, 1]
    assert locks.statistics() == LockStatistics(0, 0, 0, 0)


def test_threads_end_each_lease_once_and_never_under_a_reader() -> None:
    locks: Locks[str] = Locks(AGE_MAX_S)
    leases: list[FakeLease] = []
    wrong: list[str] = []

    @contextmanager
    def checked(keys: str) -> Iterator[None]:
        lease = locked(locks, keys)
        leases.append(lease)
        with locks.reading(keys) as views:
            if set(views) != set(keys) or any(bytes(view).decode() != key for key, view in views.items()):
                wrong.append(f"{keys}: {list(views)}")
            yield
        locks.unlock(list(keys))

    def work(seed: int) -> None:
        for turn in range(400):
            keys = KEYS[(seed + turn) % 4 :]
            with checked(keys):
                locks.unlock([])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert {lease.ends for lease in leases} == {1}
    assert locks.statistics() == LockStatistics(0, 0, 0, 0)
