"""Pools of threads that run before there is work for them. It knows of no engine and no daemon.

Python's own start each thread when it is first needed, with its work queued already: where no more threads
can be had, as in a container with a limit, the caller is told that it failed, and the work is done all the
same, later, in memory that has been given to somebody else by then.
"""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

from kvstore.errors import InvalidRequest

P = TypeVar("P")


def start(name: str, count: int) -> ThreadPoolExecutor:
    """A pool of `count` threads, all of which run.

    Raises:
        InvalidRequest: so many cannot be had. Those that had been started have ended.
    """
    pool = ThreadPoolExecutor(count, thread_name_prefix=f"kvstore-{name}")
    together = threading.Barrier(count)  # none is idle before the last one runs
    for started in range(count):
        try:
            pool.submit(together.wait)
        except RuntimeError as exc:
            together.abort()
            pool.shutdown(wait=True)
            raise InvalidRequest(
                f"{count} threads kvstore-{name} wanted, {started} started ({exc}); give fewer `threads`, or "
                "let this container or user have more (its limit of pids, ulimit -u)"
            ) from exc
    return pool


def share(
    pool: ThreadPoolExecutor, work: Callable[[P], None], parts: Iterable[P], mine: Callable[[], object]
) -> None:
    """Let `pool` do the work with each part, and do `mine` here; raises what any of it has raised.

    Whatever happens, nothing of it is under way any more when this returns or raises.
    """
    under_way: list[Future[None]] = []
    try:
        for part in parts:
            under_way.append(pool.submit(work, part))  # noqa: PERF401  the next one may raise
        mine()
    finally:
        wait(under_way)
    for each in under_way:
        each.result()
