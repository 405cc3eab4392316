"""What prompts that were just routed will leave in engines' caches, before anybody has announced it. Pure.

A prompt's blocks are expected in the engine that it went to until its time is up; by then the engine has
said so itself, or it has no events. Keys are chained, so what an engine is expected to have of a prompt is
found by bisection: a key is never remembered longer than those before it.
"""

from collections import OrderedDict
from collections.abc import Sequence
from math import inf
from typing import Final

# Keys of one engine: four prompts of a million tokens in blocks of 64. Of all engines: some 150 MB.
ENGINE_KEYS_MAX: Final = 1 << 16
KEYS_MAX: Final = 1 << 20

_SWEEP_S: Final = 1.0

Key = int | bytes


class Recent:
    """Keys that are expected in engines, each until a time."""

    def __init__(self, *, engine_keys_max: int = ENGINE_KEYS_MAX, keys_max: int = KEYS_MAX) -> None:
        self._engine_keys_max = engine_keys_max
        self._keys_max = keys_max
        # Key -> until when, and for which prompt. Of a prompt the tail is before its head, and goes first.
        self._engines: dict[str, OrderedDict[Key, tuple[float, str]]] = {}
        self._keys = 0
        self._swept_s = -inf

    def __len__(self) -> int:
        return self._keys

    def expect(self, engine: str, id: str, keys: Sequence[Key], until_s: float) -> None:
        """The engine will have these leading keys of the prompt `id`; more than fit are cut at the tail."""
        keys = keys[: self._engine_keys_max]
        expected = self._engines.setdefault(engine, OrderedDict())
        before = len(expected)
        fresh = until_s, id
        for key in reversed(keys):
            known = expected.get(key)
            if known is None:
                expected[key] = fresh
            else:
                expected[key] = fresh if known[0] <= until_s else (known[0], id)
                expected.move_to_end(key)
        self._keys += len(expected) - before
        self._trim(engine, len(expected) - self._engine_keys_max)
        while self._keys > self._keys_max:
            oldest = next(iter(self._engines))
            self._trim(oldest, self._keys - self._keys_max)

    def depth(self, engine: str, keys: Sequence[Key], now_s: float) -> int:
        """How many leading keys the engine is expected to have."""
        expected = self._engines.get(engine)
        if not expected:
            return 0
        there, end, at = 0, len(keys), 0  # the first key first: most prompts have nothing in common
        while there < end:
            known = expected.get(keys[at])
            if known is not None and known[0] > now_s:
                there = at + 1
            else:
                end = at
            at = (there + end) // 2
        return there

    def forget(self, engine: str, id: str, keys: Sequence[Key]) -> None:
        """The prompt never got there: what no later one needs is not expected any more."""
        expected = self._engines.get(engine)
        if expected is None:
            return
        for key in keys:
            known = expected.get(key)
            if known is not None and known[1] == id:
                del expected[key]
                self._keys -= 1
        self._drop_if_empty(engine)

    def expire(self, now_s: float) -> None:
        """Forget what is over at the old end of each engine; what hides behind others goes after them.

        It does so once a second, for it asks every engine.
        """
        if now_s < self._swept_s + _SWEEP_S:
            return
        self._swept_s = now_s
        for engine in list(self._engines):
            expected = self._engines[engine]
            while expected and next(iter(expected.values()))[0] <= now_s:
                expected.popitem(last=False)
                self._keys -= 1
            self._drop_if_empty(engine)

    def _trim(self, engine: str, excess: int) -> None:
        expected = self._engines[engine]
        for _ in range(min(excess, len(expected))):
            expected.popitem(last=False)
            self._keys -= 1
        self._drop_if_empty(engine)

    def _drop_if_empty(self, engine: str) -> None:
        if not self._engines[engine]:
            del self._engines[engine]
