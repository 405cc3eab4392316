"""Long work of the event loop in turns, so that nobody waits for all of it. It does no work itself."""

import asyncio
from collections.abc import Generator, Iterator, Sequence
from typing import Final, TypeVar

# What is done for so many engines in one turn takes 1 ms or less.
_MANY: Final = 256

T = TypeVar("T")


def parts(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """The items, some at a time; to `pause` after each."""
    if len(items) <= _MANY:
        yield items
        return
    for start in range(0, len(items), _MANY):
        yield items[start : start + _MANY]


async def pause(items: int) -> None:
    """Others have a turn, where so many items are more than one part."""
    if items > _MANY:
        await asyncio.sleep(0)


async def finished(steps: Generator[None, None, T]) -> T:
    """What the generator returns; others have a turn after each of its steps."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            found: T = end.value
            return found
        await asyncio.sleep(0)
