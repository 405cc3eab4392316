"""What prompts that were just routed will leave in engines' caches, before anybody has announced it. Pure.

A prompt's blocks are expected in the engine that it went to until its time is up; by then the engine has
said so itself, or it has no events. A place is an engine, for prompts that have blocks in common where they
have keys in common: of one model, adapter and salt. Keys are chained, so what is expected of a prompt is
found by bisection: a key is never remembered longer than those before it.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from math import inf
from typing import Final

# Keys of one place: four prompts of a million tokens in blocks of 64. Of all places: some 150 MB.
PLACE_KEYS_MAX: Final = 1 << 16
KEYS_MAX: Final = 1 << 20
# To ask so many whether something is over takes 2 ms.
PLACES_MAX: Final = 1 << 14

_SWEEP_S: Final = 1.0

Key = int | bytes
Place = Hashable


class Recent:
    """Keys that are expected in places, each until a time."""

    def __init__(
        self, *, place_keys_max: int = PLACE_KEYS_MAX, keys_max: int = KEYS_MAX, places_max: int = PLACES_MAX
    ) -> None:
        self._place_keys_max = place_keys_max
        self._keys_max = keys_max
        self._places_max = places_max
        # Key -> until when, and for which prompt. Of a prompt the tail is before its head, and goes first.
        self._places: OrderedDict[Place, OrderedDict[Key, tuple[float, str]]] = OrderedDict()
        self._keys = 0
        self._swept_s = -inf

    def __len__(self) -> int:
        return self._keys

    def expect(self, place: Place, id: str, keys: Sequence[Key], until_s: float) -> None:
        """These leading keys of the prompt `id` will be there; more than fit are cut at the tail."""
        keys = keys[: self._place_keys_max]
        expected = self._places.setdefault(place, OrderedDict())
        self._places.move_to_end(place)
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
        self._trim(place, len(expected) - self._place_keys_max)
        while self._keys > self._keys_max:
            self._trim(next(iter(self._places)), self._keys - self._keys_max)
        while len(self._places) > self._places_max:
            self._trim(next(iter(self._places)), self._keys)

    def depth(self, place: Place, keys: Sequence[Key], now_s: float) -> int:
        """How many leading keys are expected there."""
        expected = self._places.get(place)
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

    def forget(self, place: Place, id: str, keys: Sequence[Key]) -> None:
        """The prompt never got there: what no later one needs is not expected any more."""
        expected = self._places.get(place)
        if expected is None:
            return
        for key in keys:
            known = expected.get(key)
            if known is not None and known[1] == id:
                del expected[key]
                self._keys -= 1
        self._drop_if_empty(place)

    def expire(self, now_s: float) -> None:
        """Forget what is over at the old end of each place; what hides behind others goes after them.

        It does so once a second, for it asks every place.
        """
        if now_s < self._swept_s + _SWEEP_S:
            return
        self._swept_s = now_s
        for place in list(self._places):
            expected = self._places[place]
            while expected and next(iter(expected.values()))[0] <= now_s:
                expected.popitem(last=False)
                self._keys -= 1
            self._drop_if_empty(place)

    def _trim(self, place: Place, excess: int) -> None:
        expected = self._places[place]
        for _ in range(min(excess, len(expected))):
            expected.popitem(last=False)
            self._keys -= 1
        self._drop_if_empty(place)

    def _drop_if_empty(self, place: Place) -> None:
        if not self._places[place]:
            del self._places[place]
