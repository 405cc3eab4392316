"""The keys of one namespace and who has them. Pure: it knows masks and keys, no publishers and no clock.

A lookup wants, for every holder, how many leading keys it has. Where the blocks of a holder are closed under
"what precedes it", which is how engines and daemons evict, the answer is found by bisection: a dozen
dictionary lookups for 8,192 keys. Where they are not, keys are walked. Both answer the same.

So the table knows which bits are closed, from what the events say precedes each key:

    links   what follows a key, once for all holders
    holes   keys that some bits lack though a key that follows has them; healed when those come, or go
    open    bits of blocks of which nobody said what precedes them, until their holder has none left here
"""

from collections.abc import Iterable, Sequence
from itertools import count, groupby, islice, repeat
from operator import is_
from typing import Final, cast

from kvstore.block import Medium
from kvstore.index.links import Key as Key
from kvstore.index.links import Links
from kvstore.index.masks import Mask, Masks, bit_of
from kvstore.index.saved import SavedTable, bits_from_bytes, bits_to_bytes

# How many leading keys who has: (depth, bits), deepest first, none of depth 0.
Depths = list[tuple[int, int]]

# What precedes the first block of a prompt. Publishers are believed: a key that one of them says starts a
# prompt, and that follows another key all the same, as no chained hash does, makes its own depths wrong.
ROOT: Final = b""
# Of more holes the table keeps no account: their bits are walked until their holder begins anew.
_HOLES_MAX: Final = 1024
_HEALED_AT_ONCE: Final = 64


class KeyTable:
    """Keys to masks. `masks` are shared with other tables."""

    def __init__(self, masks: Masks) -> None:
        self.keys: dict[Key, Mask] = {}
        self._masks = masks
        self._links = Links(self.keys)
        self._open = 0
        self._holes: dict[Key, int] = {}
        self._in_holes = 0
        self._unhealed = False
        self._purging: list[Key] | None = None

    def __len__(self) -> int:
        return len(self.keys)

    # What publishers say.

    def store(self, slot: int, medium: Medium, keys: Sequence[Key], parent: Key | None) -> Sequence[Key]:
        """The slot has these keys in a medium. Those that it did not have there before, in their order.

        With `parent` the keys follow each other, and the first follows it; with None nobody knows.
        """
        steps = self._masks.plus(bit_of(slot, medium))
        if self.keys.keys().isdisjoint(keys):
            return self._store_new(keys, cast(Mask, steps[None]), parent)
        olds = list(map(self.keys.get, keys))
        known = set(olds)
        if len(set(keys)) != len(keys):
            keys = list(dict.fromkeys(keys))
            olds = list(map(self.keys.get, keys))
        news = cast(list[Mask], list(map(steps.__getitem__, olds)))
        self.keys.update(zip(keys, news, strict=True))
        if parent is None:
            for old in known:
                self._open |= _gained(old, steps[old])
        else:
            self._follow(keys, parent, _gained(olds[0], news[0]))
        if self._holes:
            self._fill(keys, news)
        if not any(map(is_, olds, news)):
            return keys
        return [key for key, old, new in zip(keys, olds, news, strict=True) if old is not new]

    def _store_new(self, keys: Sequence[Key], mask: Mask, parent: Key | None) -> Sequence[Key]:
        """Keys that nobody has: what most events are about."""
        before = len(self.keys)
        self.keys.update(zip(keys, repeat(mask), strict=False))
        if len(self.keys) - before != len(keys):
            keys = list(dict.fromkeys(keys))
        if parent is None:
            self._open |= mask.hits
        elif self._holes:
            self._follow(keys, parent, mask.hits)
        else:
            self._links.chain(keys)
            self._follow(keys[:1], parent, mask.hits)
        if self._holes:
            self._fill(keys, repeat(mask))
        return keys

    def remove(self, slot: int, medium: Medium, keys: Sequence[Key]) -> Sequence[Key]:
        """The slot has these keys in a medium no longer. Those that it had there, in their order."""
        steps = self._masks.minus(bit_of(slot, medium))
        if len(keys) > 1 and len(set(keys)) != len(keys):
            keys = list(dict.fromkeys(keys))
        olds = list(map(self.keys.get, keys))
        news = list(map(steps.__getitem__, olds))
        if any(map(is_, olds, news)):
            changed = [(k, old, new) for k, old, new in zip(keys, olds, news, strict=True) if old is not new]
            keys = [key for key, _, _ in changed]
            olds = [old for _, old, _ in changed]
            news = [new for _, _, new in changed]
        for key, new in zip(keys, news, strict=True):
            if new is None:
                del self.keys[key]
            else:
                self.keys[key] = new
        self._tear(keys, olds, news)
        return keys

    def settle(self) -> None:
        """Look at holes again once a batch is through: what follows them may have left too."""
        if not self._unhealed:
            return
        self._unhealed = len(self._holes) > _HEALED_AT_ONCE
        for key in list(islice(self._holes, _HEALED_AT_ONCE)):
            self._holes[key] = self._following(key, self._holes.pop(key))  # at the end: others' turn
            if not self._holes[key]:
                self._healed(key)
        self._count_holes()

    def reset(self, bits: int) -> None:
        """Holders have nothing here any more, or are gone, whose bits these are."""
        self._open &= ~bits
        if not self._in_holes & bits:
            return
        for key in list(self._holes):
            self._holes[key] &= ~bits
            if not self._holes[key]:
                self._healed(key)
        self._count_holes()

    def purge(self, count: int) -> bool:
        """Forget some keys that nobody has since masks were cleared, among `count`. Whether there are more.

        Of many the first time only lists them, 6 to 18 ms for a million: to skip those done costs as much.
        """
        if self._purging is None:
            self._purging = list(self.keys)
            if len(self._purging) > count:
                return True
        some = self._purging[-count:]
        del self._purging[-count:]
        for key in some:
            mask = self.keys.get(key)
            if mask is not None and not mask.raw:
                del self.keys[key]
                if key not in self._holes:
                    self._links.drop(key)
        if not self._purging:
            self._purging = None
        return self._purging is not None

    # What lookups ask.

    def depths(self, keys: Sequence[Key], live: int) -> Depths:
        """How many leading keys the bits of `live` have."""
        first = self.keys.get(keys[0]) if keys else None
        if first is None:
            return []
        bits = first.hits & live
        loose = bits & (self._open | self._in_holes)
        if not loose:
            return self._bisected(keys, first, bits) if bits else []
        groups = self._bisected(keys, first, bits ^ loose) if bits != loose else []
        return _merged(groups + self._walked(keys, loose))

    def walk(self, keys: Sequence[Key], live: int) -> list[tuple[int, int]]:
        """What `depths` answers, without trusting that anything is closed."""
        first = self.keys.get(keys[0]) if keys else None
        bits = 0 if first is None else first.hits & live
        return _merged(self._walked(keys, bits)) if bits else []

    def _bisected(self, keys: Sequence[Key], first: Mask, bits: int) -> list[tuple[int, int]]:
        """Each of `bits` has the first key, whose mask is `first`."""
        get = self.keys.get
        last = get(keys[-1])
        all_the_way = 0 if last is None else last.hits & bits
        rest = bits ^ all_the_way
        if not rest:
            return [(len(keys), bits)]
        groups: list[tuple[int, int]] = []
        # Of each entry, the bits have the key at `has` and lack that at `lacks`. Neighbours mostly have the
        # same mask, which to see costs less than to compare bits.
        parts = [(0, len(keys) - 1, rest, first, last)]
        while parts:
            has, lacks, bits, above, below = parts.pop()
            while (middle := has + lacks >> 1) != has:
                mask = get(keys[middle])
                if mask is above:
                    has = middle
                elif mask is below or mask is None:
                    lacks = middle
                elif (there := mask.hits & bits) == bits:
                    has, above = middle, mask
                elif not there:
                    lacks, below = middle, mask
                else:
                    parts.append((middle, lacks, there, mask, below))
                    bits ^= there
                    lacks, below = middle, mask
            groups.append((lacks, bits))
        if all_the_way:
            groups.append((len(keys), all_the_way))
        groups.reverse()
        return groups

    def _walked(self, keys: Sequence[Key], bits: int) -> list[tuple[int, int]]:
        groups = []
        depth = 0
        for mask, some in groupby(map(self.keys.get, keys)):  # neighbours mostly have the same holders
            still = 0 if mask is None else mask.hits & bits
            if still != bits:
                groups.append((depth, bits ^ still))
                bits = still
                if not bits:
                    return groups
            depth += len(list(some))
        return [*groups, (len(keys), bits)]

    # What precedes what.

    def _follow(self, keys: Sequence[Key], parent: Key, gained: int) -> None:
        """The keys follow each other; the first of them, which has gained these bits, follows `parent`."""
        if parent != ROOT:
            mask = self.keys.get(parent)
            self._add_hole(parent, gained & ~(0 if mask is None else mask.hits))
            if mask is not None or parent in self._holes:  # or nobody would ever drop the link
                self._links.add(parent, keys[0])
        self._links.add_chain(keys)

    def _following(self, key: Key, wanted: int) -> int:
        """Those of the wanted bits that something which follows a key has."""
        bits = 0
        for follower in self._links.after(key):
            mask = self.keys.get(follower)
            if mask is not None:
                bits |= mask.hits & wanted
                if bits == wanted:
                    break
        return bits

    def _tear(self, keys: Sequence[Key], olds: Sequence[Mask | None], news: Sequence[Mask | None]) -> None:
        """These keys have lost holders: holes where what follows has not, and links nobody needs."""
        if self._links.any_after(keys):
            for key, old, new in zip(keys, olds, news, strict=True):
                assert old is not None
                lost = old.hits & ~(0 if new is None else new.hits)
                self._add_hole(key, self._following(key, lost))
        for key, new in zip(keys, news, strict=True):
            if new is None and key not in self._holes:
                self._links.drop(key)
        self._unhealed = bool(self._holes)

    def _add_hole(self, key: Key, bits: int) -> None:
        if not bits:
            return
        if len(self._holes) >= _HOLES_MAX and key not in self._holes:
            self._open |= bits
            return
        self._holes[key] = self._holes.get(key, 0) | bits
        self._in_holes |= bits

    def _fill(self, keys: Iterable[Key], masks: Iterable[Mask]) -> None:
        """These keys have gained holders."""
        filled = False
        for key, mask in zip(keys, masks, strict=False):
            bits = self._holes.get(key)
            if bits is not None:
                filled = True
                self._holes[key] = bits & ~mask.hits
                if not self._holes[key]:
                    del self._holes[key]
        if filled:
            self._count_holes()

    def _healed(self, key: Key) -> None:
        del self._holes[key]
        if key not in self.keys:
            self._links.drop(key)

    def _count_holes(self) -> None:
        self._in_holes = 0
        for bits in self._holes.values():
            self._in_holes |= bits

    # Across a restart.

    def save(self, namespace: bytes, bits: int, mask_to_place: dict[Mask, int]) -> SavedTable:
        """What holders with these bits have here; masks that the dictionary lacks are added to it."""
        keys = [key for key, mask in self.keys.items() if mask.raw & bits]
        held = len(keys)
        holes = {key: lacking & bits for key, lacking in self._holes.items() if lacking & bits}
        place = dict(zip(keys, count(), strict=False))
        keys += [key for key in holes if key not in place]
        place.update(zip(keys[held:], count(held), strict=False))
        followed, followers = [], []
        for key in self._links:
            for follower in self._links.after(key):
                if key in place and place.get(follower, held) < held:
                    followed.append(place[key])
                    followers.append(place[follower])
        return SavedTable(
            namespace=namespace,
            keys=keys,
            masks=[mask_to_place.setdefault(self.keys[key], len(mask_to_place)) for key in keys[:held]],
            followed=followed,
            followers=followers,
            open=bits_to_bytes(self._open & bits),
            holes=[(place[key], bits_to_bytes(lacking)) for key, lacking in holes.items()],
        )

    def restore(self, saved: SavedTable, masks: Sequence[Mask]) -> None:
        """Have what was saved; the table is empty.

        Raises:
            IndexError, ValueError: it names a key or a mask that is not there.
        """
        keys = saved.keys
        self.keys = dict(zip(keys, map(masks.__getitem__, saved.masks), strict=False))
        followed = [keys[place] for place in saved.followed]
        followers = [keys[place] for place in saved.followers]
        self._links = Links(self.keys)
        for key, follower in zip(followed, followers, strict=True):
            self._links.add(key, follower)
        self._open = bits_from_bytes(saved.open)
        self._holes = {keys[place]: bits_from_bytes(bits) for place, bits in saved.holes}
        self._count_holes()

    def check(self) -> None:
        """Raise AssertionError unless what is bisected is what would be walked, for every key and link."""
        closed = ~(self._open | self._in_holes | self._masks.dead)
        for key in self._links:
            mask = self.keys.get(key)
            missing = self._following(key, closed & ~(0 if mask is None else mask.hits))
            assert not missing, f"{key!r} is lacked by {missing:#x}, which is no hole"
        assert all(bits for bits in self._holes.values())


def _gained(old: Mask | None, new: Mask | None) -> int:
    return (0 if new is None else new.hits) & ~(0 if old is None else old.hits)


def _merged(groups: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """One group for each depth, deepest first."""
    depth_to_bits: dict[int, int] = {}
    for depth, bits in groups:
        depth_to_bits[depth] = depth_to_bits.get(depth, 0) | bits
    return sorted(depth_to_bits.items(), reverse=True)
