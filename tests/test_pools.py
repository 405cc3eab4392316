"""Pools of threads: all run from the start, and none works on for a caller who was told of an error."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from connectors import pools
from connectors.batches import Batches
from connectors.copying import Copier
from connectors.daemon import Daemon
from connectors.tasks import Tasks
from kvstore.errors import InvalidRequest
from tests.node import own_threads, wait_for


class Bell:
    """A notifier that counts."""

    def __init__(self) -> None:
        self.rung = 0
        self.closed = False

    def fileno(self) -> int:
        return -1

    def notify(self) -> None:
        self.rung += 1

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No thread of ours."""
    yield
    wait_for(lambda: not own_threads(), 5)


def refuse_threads(monkeypatch: pytest.MonkeyPatch, refused: Callable[[str], bool]) -> None:
    """Let no thread of such a name start, as in a container whose limit is reached."""
    start = threading.Thread.start

    def start_or_not(thread: threading.Thread) -> None:
        if refused(thread.name):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_or_not)


def refuse_work(monkeypatch: pytest.MonkeyPatch, name: str, number: int) -> None:
    """Let a pool refuse the piece of work of this number."""
    submit = ThreadPoolExecutor.submit
    left = [number]

    def submit_or_not(pool: Any, *work: Any) -> Any:
        if pool._thread_name_prefix == f"kvstore-{name}":
            left[0] -= 1
            if left[0] == -1:
                raise RuntimeError("no more")
        return submit(pool, *work)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", submit_or_not)


def test_all_threads_run_before_there_is_work(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pools.start("test", 7)
    assert len(own_threads()) == 7
    refuse_threads(monkeypatch, lambda _: True)
    at_once = threading.Barrier(7)
    assert len({each.result(5) for each in [pool.submit(at_once.wait) for _ in range(7)]}) == 7
    pool.shutdown()


@pytest.mark.parametrize("started", [0, 1, 3])
def test_a_pool_that_cannot_have_all_its_threads_has_none(
    started: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_threads(monkeypatch, lambda name: name == f"kvstore-test_{started}")
    with pytest.raises(InvalidRequest, match=rf"4 threads kvstore-test wanted, {started} started.*`threads`"):
        pools.start("test", 4)
    assert not own_threads()


def test_those_who_need_threads_leave_none_when_they_cannot_have_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_threads(monkeypatch, lambda name: name in ("kvstore-copy_2", "kvstore-wait_1", "kvstore-test_1"))
    with pytest.raises(InvalidRequest, match="3 threads kvstore-copy"):
        Copier(4)
    bell = Bell()
    with pytest.raises(InvalidRequest, match="2 threads kvstore-test"):
        Tasks("test", 2, bell)
    assert bell.closed
    assert not own_threads()
    daemon = Daemon(f"unix:{tmp_path}/nobody.sock", timeout_s=1.0)
    before = own_threads()
    with pytest.raises(InvalidRequest, match="2 threads kvstore-wait"):
        Batches(daemon, 2)
    assert own_threads() == before
    daemon.close()


@pytest.mark.parametrize("refused", [0, 1, 2])
def test_work_that_is_shared_is_over_when_its_giver_is_told_of_an_error(
    refused: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = pools.start("test", 1)
    done: list[int] = []
    refuse_work(monkeypatch, "test", refused)
    mine: list[None] = []
    with pytest.raises(RuntimeError, match="no more"):
        pools.share(pool, done.append, range(3), lambda: mine.append(None))
    over = list(done)
    pool.shutdown()
    assert done == over == list(range(refused))
    assert mine == []


def test_what_any_share_has_raised_is_raised_when_all_are_over() -> None:
    pool = pools.start("test", 2)
    done: list[int] = []

    def work(number: int) -> None:
        if number == 1:
            raise ValueError("the second one")
        done.append(number)

    with pytest.raises(ValueError, match="the second one"):
        pools.share(pool, work, range(4), lambda: done.append(9))
    assert sorted(done) == [0, 2, 3, 9]
    with pytest.raises(ZeroDivisionError):
        pools.share(pool, work, [5, 6], lambda: 1 // 0)
    assert sorted(done) == [0, 2, 3, 5, 6, 9]
    pool.shutdown()


def test_a_task_that_raises_has_its_result_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    bell = Bell()
    tasks: Tasks[str] = Tasks("test", 1, bell)

    def mistaken() -> str:
        raise TypeError("a mistake")

    wrong = tasks.submit(mistaken, "failed")
    wait_for(lambda: bell.rung == 1, 5)
    assert tasks.take(wrong) == "failed"
    assert "a mistake" in caplog.text
    right = tasks.submit(lambda: "done", "failed")
    wait_for(lambda: bell.rung == 2, 5)
    assert tasks.take_all() == {right: "done"}
    tasks.close()
