"""The threads of one storage tier: blocking work for an event loop, which a hang stops and not the loop.

What was begun goes on to its end, also when nobody waits any more; what it holds is given back after that.
"""

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from kvstore.errors import TierError

T = TypeVar("T")


class Jobs:
    """Runs work of a tier, called `name` in errors, that lies at `place`.

    `translate` makes a TierError of what `work` raised during an action, or None of what is a mistake.
    `give_back` is called once, after `close` and after the last piece of work, in some thread. The threads
    are less important than others by `niceness`.
    """

    def __init__(
        self,
        name: str,
        place: str,
        threads: int,
        *,
        translate: Callable[[str, Exception], TierError | None],
        give_back: Callable[[], None],
        niceness: int = 0,
    ) -> None:
        self._name = name
        self._place = place
        self._translate = translate
        self._give_back = give_back
        self._executor = ThreadPoolExecutor(
            threads, thread_name_prefix=name, initializer=_begin, initargs=(niceness,)
        )
        # Over how many jobs run, and who gives back after the last; never held over I/O.
        self._guard = threading.Lock()
        self.running = 0
        self._closed = False

    def start(self, action: str, work: Callable[[], T]) -> "asyncio.Future[T]":
        """Begin; who cancels the future still leaves the thread running: await it shielded.

        Raises:
            TierError: the tier is closed; also from the future, as `translate` says.
        """
        with self._guard:
            if self._closed:
                raise TierError(f"{self._name} tier: {self._place} is closed; open another tier")
            job = asyncio.get_running_loop().run_in_executor(self._executor, self._run, action, work)
            self.running += 1
        return job

    def close(self) -> None:
        """Begin nothing more, and give back now or after the last thread; does not wait for it."""
        with self._guard:
            self._closed = True
            idle = not self.running
        self._executor.shutdown(wait=False)
        if idle:
            self._give_back()

    def _run(self, action: str, work: Callable[[], T]) -> T:
        try:
            if self._closed:
                raise TierError(f"{self._name} tier: {self._place} was closed before {action}")
            return work()
        except TierError:
            raise
        except Exception as exc:
            error = self._translate(action, exc)
            if error is None:
                raise
            raise error from exc
        finally:
            with self._guard:
                self.running -= 1
                last = self._closed and not self.running
            if last:
                self._give_back()


def _begin(niceness: int) -> None:
    """On Linux a priority is a thread's own."""
    if niceness:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)
