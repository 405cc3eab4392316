"""Tasks that an engine submits and asks about later: threads, results, and a descriptor that says so."""

import logging
import threading
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from connectors import pools
from kvstore.errors import InvalidRequest

logger = logging.getLogger(__name__)

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
    """Tasks of one kind, `threads` of which run at once. Each result is handed out once.

    Raises:
        InvalidRequest: so many threads cannot be had; the descriptor is closed.
    """

    def __init__(self, name: str, threads: int, notifier: Notifier) -> None:
        try:
            self._threads = pools.start(name, threads)
        except InvalidRequest:
            notifier.close()
            raise
        self._notifier = notifier
        self._results: dict[int, R] = {}
        self._last_id = 0
        self._lock = threading.Lock()

    def fileno(self) -> int:
        """What becomes readable when a task has ended."""
        return self._notifier.fileno()

    def submit(self, work: Callable[[], R], failed: R) -> int:
        """Run `work` soon; the task's id. Its result is `failed` if it raises, which it is not meant to."""
        with self._lock:
            self._last_id = task_id = self._last_id + 1
        self._threads.submit(self._run, task_id, work, failed)
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

    def _run(self, task_id: int, work: Callable[[], R], failed: R) -> None:
        result = failed
        try:
            result = work()
        except Exception:  # whatever it was, somebody waits for the result
            logger.exception("a task failed by a mistake")
        finally:
            with self._lock:
                self._results[task_id] = result
            self._notifier.notify()
