"""Looking after a tier below the arena: noticing that it fails, or is back, and what it then holds."""

import asyncio
import logging
import random
from collections.abc import Coroutine
from itertools import islice
from typing import Any, Final, TypeVar

from kvstore.errors import ConfigError, TierError
from kvstore.node.aside import as_transfer, read_aside
from kvstore.node.lower import Lower

logger = logging.getLogger(__name__)

T = TypeVar("T")

# The shortest of so many blocks is read to see whether a tier can read.
_PROBED_OF: Final = 64


async def look_after(lower: Lower) -> None:
    """Look after the tier, for as long as it is there: open the breaker, and close it."""
    await lower.started()
    while True:
        await asyncio.sleep(lower.breaker.pause_s(random.random()))
        if not lower.enabled:
            continue
        before = lower.breaker.open
        # Late calls must be over before it is trusted again.
        well = False if before and lower.calls else await _looked_after(lower)
        if before and lower.enabled:
            lower.probed(well=well)


async def _looked_after(lower: Lower) -> bool:
    try:
        if lower.recovered:
            same = await _in_time(lower, lower.tier.same())
            if same and lower.breaker.open:
                await _in_time(lower, _probe(lower))
            if not same:
                lower.recovered = False
                lower.trip("what it holds is gone, or not the same")
        if not lower.recovered:
            if lower.calls:
                return False
            await lower.recover()
        if lower.graves:
            buried = set(lower.graves)
            await _in_time(lower, lower.tier.flush(list(buried)))
            lower.graves -= buried
    except TimeoutError:
        lower.trip(f"no answer within {lower.rules.timeout_s} s")
        return False
    except (TierError, ConfigError) as error:
        lower.trip(str(error))
        return False
    except Exception:  # whatever it was, somebody must go on looking after the tier
        logger.exception("tier %s: looking after it failed by a mistake", lower.name)
        lower.trip("a mistake; the log says which")
        return False
    return True


async def _probe(lower: Lower) -> None:
    """Write a little and read a block, if there is one: a disk may do the one and not the other."""
    await lower.tier.probe()
    shelves = lower.directory.shelves()
    some = islice((block for shelf in shelves for block in shelf.sealed.values()), _PROBED_OF)
    stored = min(some, key=lambda block: block.length, default=None)
    if stored is not None:
        lower.directory.pin([stored])
        try:
            await read_aside(lower.tier, [as_transfer(stored)])
        finally:
            lower.unpin([stored])


async def _in_time(lower: Lower, operation: Coroutine[Any, Any, T]) -> T:
    """Await a call of the tier for as long as it may take.

    Raises:
        TimeoutError: it takes longer, and goes on by itself.
    """

    def over(task: "asyncio.Future[T]") -> None:
        lower.calls -= 1
        if not task.cancelled():
            task.exception()  # whoever waited has it; if nobody did, the breaker is open already

    lower.calls += 1
    task = asyncio.ensure_future(operation)
    task.add_done_callback(over)
    done, _ = await asyncio.wait({task}, timeout=lower.rules.timeout_s)
    if not done:
        lower.tier.interrupt()
        raise TimeoutError
    return task.result()
