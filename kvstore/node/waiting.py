"""Waiting on the event loop for something to change: a block to be settled, or room to appear.

It wakes; it promises nothing. Whoever wakes up looks again and decides anew.
"""

import asyncio
from collections.abc import Hashable


class Waiting:
    """Waiters by what they wait for."""

    def __init__(self) -> None:
        self._waiters: dict[Hashable, list[asyncio.Future[None]]] = {}

    async def wait(self, subject: Hashable, timeout_s: float) -> None:
        """Return when `subject` is woken or the time is over, whichever comes first."""
        future = asyncio.get_running_loop().create_future()
        waiters = self._waiters.setdefault(subject, [])
        waiters.append(future)
        try:
            async with asyncio.timeout(timeout_s):
                await future
        except TimeoutError:
            pass
        finally:
            if not future.done() or future.cancelled():
                waiters.remove(future)
                if not waiters and self._waiters.get(subject) is waiters:
                    del self._waiters[subject]

    def wake(self, subject: Hashable) -> None:
        """Wake all who wait for `subject`, in the order in which they came."""
        if self._waiters:
            for future in self._waiters.pop(subject, ()):
                if not future.done():
                    future.set_result(None)
