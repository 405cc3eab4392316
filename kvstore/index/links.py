"""What follows what, of the keys of one table. Pure: it knows no masks; the table says who is there."""

from collections.abc import Container, Iterable, Iterator, Sequence
from itertools import islice

# A 64-bit hash as engines publish it, cut to 60 bits (8 bytes of memory less), or the bytes of any other key.
Key = int | bytes


class Links:
    """Followers by key. Most keys have one; after a system prompt there are thousands.

    Followers that are not `there` any more are dropped now and then; a key's own entry is dropped by `drop`.
    """

    def __init__(self, there: Container[Key]) -> None:
        self._there = there
        self._next: dict[Key, Key | dict[Key, None]] = {}

    def __len__(self) -> int:
        return len(self._next)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._next)

    def chain(self, keys: Sequence[Key]) -> None:
        """The keys follow each other, and nothing else follows any of them yet but the last."""
        self._next.update(zip(keys, islice(keys, 1, None), strict=False))

    def add_chain(self, keys: Sequence[Key]) -> None:
        """The keys follow each other."""
        followers = keys[1:]
        if list(map(self._next.get, keys[:-1])) != followers:
            for key, follower in zip(keys, followers, strict=False):
                self.add(key, follower)

    def add(self, key: Key, follower: Key) -> None:
        """One more follower of a key."""
        have = self._next.get(key)
        if have is None:
            self._next[key] = follower
        elif isinstance(have, dict):
            if follower not in have:
                if not len(have) & (len(have) - 1):  # each time there are twice as many
                    have = self._next[key] = {one: None for one in have if one in self._there}
                have[follower] = None
        elif have != follower:
            self._next[key] = {have: None, follower: None} if have in self._there else follower

    def after(self, key: Key) -> Iterable[Key]:
        """What follows a key."""
        have = self._next.get(key)
        if have is None:
            return ()
        return have if isinstance(have, dict) else (have,)

    def any_after(self, keys: Sequence[Key]) -> bool:
        """Whether something that is there follows one of the keys."""
        for have in map(self._next.get, keys):
            if isinstance(have, dict):
                if any(map(self._there.__contains__, have)):
                    return True
            elif have is not None and have in self._there:
                return True
        return False

    def drop(self, key: Key) -> None:
        """Forget what follows a key."""
        self._next.pop(key, None)
