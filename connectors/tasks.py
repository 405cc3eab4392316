"""Tasks that an engine submits and asks about later: threads, results, and a descriptor that says so."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, Protocol, TypeVar

R = TypeVar("R")


class Notifier(Protocol):
    """An eventfd, or what an engine has in its place."""

    def fileno(self) -> int:
        """The descriptor to poll."""

    def notify(self) -> None:
        """Make it readable."""

    def close(self) -> Any:
        """Close the descriptor."""


class Tasks(Generic[R]):
    """Tasks of one kind, `threads` of which run at once. Each result is handed out once."""

    def __init__(self, name: str, threads: int, notifier: Notifier) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix=f"kvstore-{name}")
        self._notifier = notifier
        self._results: dict[int, R] = {}
        self._last_id = 0
        self._lock = threading.Lock()

    def fileno(self) -> int:
        """What becomes readable when a task has ended."""
        return self._notifier.fileno()

    def submit(self, work: Callable[[], R]) -> int:
        """Run `work`, which raises nothing, soon; the task's id."""
        with self._lock:
            self._last_id = task_id = self._last_id + 1
        self._threads.submit(self._run, task_id, work)
        return task_id

    def take(self, task_id: int) -> R | None:
        """A task's result, once; None while it has none."""
        with self._lock:
            return self._results.pop(task_id, None)

    def take_all(self) -> dict[int, R]:
        """All results that nobody has taken yet, by task."""
        with self._lock:
            results, self._results = self._results, {}
            return results

    def close(self) -> None:
        """Wait for the tasks under way, which use memory of others; then close the descriptor."""
        self._threads.shutdown(wait=True)
        self._notifier.close()

    def _run(self, task_id: int, work: Callable[[], R]) -> None:
        result = work()
        with self._lock:
            self._results[task_id] = result
        self._notifier.notify()
