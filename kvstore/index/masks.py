"""Who has a block, as bits. A mask is shared by all blocks that the same holders have in the same media.

Pure: it knows slots and media, no keys and no publishers. A slot is four bits, one for each medium, fastest
first. What was announced is `raw`; `hits` is cumulative, since a block in GPU memory is as good as one on
disk: with a slot's bit for one medium all slower ones are set.

Masks are interned, and change only by `Masks.clear`, which takes a slot away from all of them at once: the
death of a holder costs a pass over the masks (thousands), not over the blocks (millions).
"""

from typing import Final
from weakref import WeakSet

from kvstore.block import Medium

MEDIA: Final = (Medium.GPU, Medium.DRAM, Medium.NVME, Medium.REMOTE)
SLOT_BITS: Final = len(MEDIA)
_PLACE: Final = {medium: place for place, medium in enumerate(MEDIA)}
_ALL_MEDIA: Final = (1 << SLOT_BITS) - 1
# Masks kept to be shared, and steps between them; beyond that a new one is made, which costs memory alone.
_KNOWN_MAX: Final = 1 << 16
_STEPS_MAX: Final = 1 << 18


def bit_of(slot: int, medium: Medium) -> int:
    """The bit of a slot's medium."""
    return 1 << SLOT_BITS * slot + _PLACE[medium]


def bits_of(slot: int) -> int:
    """All bits of a slot."""
    return _ALL_MEDIA << SLOT_BITS * slot


class Mask:
    """Who has a block. Compared by identity; two masks may be equal by chance."""

    __slots__ = ("__weakref__", "hits", "raw")

    def __init__(self, raw: int, hits: int) -> None:
        self.raw = raw
        self.hits = hits


class Steps(dict[Mask | None, Mask | None]):
    """From the mask of a block to its mask once something has happened; None is a block nobody has."""

    def __init__(self, masks: "Masks", gained: int, lost: int) -> None:
        super().__init__()
        self._masks = masks
        self._gained = gained
        self._lost = lost

    def __missing__(self, old: Mask | None) -> Mask | None:
        raw = 0 if old is None else old.raw
        new = raw & ~self._lost | self._gained
        after = old if new == raw else self._masks.of(new)
        self._masks.count_step()
        self[old] = after
        return after


class Masks:
    """All masks there are. `dead` are bits that mean nothing until all masks are clear of them."""

    def __init__(self) -> None:
        self._raw_to_mask: dict[int, Mask] = {}
        self._all: WeakSet[Mask] = WeakSet()
        self._plus: dict[int, Steps] = {}
        self._minus: dict[int, Steps] = {}
        self._steps = 0
        self._slots = 0
        self._not_first = self._not_first_two = 0
        self.dead = 0
        self._unclear: list[Mask] = []

    def __len__(self) -> int:
        return len(self._all)

    def of(self, raw: int) -> Mask | None:
        """The mask of these bits; None for none."""
        raw &= ~self.dead
        if not raw:
            return None
        mask = self._raw_to_mask.get(raw)
        if mask is None:
            if len(self._raw_to_mask) >= _KNOWN_MAX:
                self._forget()
            mask = self._raw_to_mask[raw] = Mask(raw, self._hits(raw))
            self._all.add(mask)
        return mask

    def plus(self, bit: int) -> Steps:
        """What a mask becomes when its block is stored there; the mask itself if it was there."""
        steps = self._plus.get(bit)
        if steps is None:
            steps = self._plus[bit] = Steps(self, bit, 0)
        return steps

    def minus(self, bit: int) -> Steps:
        """What a mask becomes when its block is removed there; the mask itself if it was not there."""
        steps = self._minus.get(bit)
        if steps is None:
            steps = self._minus[bit] = Steps(self, 0, bit)
        return steps

    def count_step(self) -> None:
        """One more step is remembered."""
        self._steps += 1
        if self._steps >= _STEPS_MAX:
            self._forget()

    def clear(self, bits: int) -> None:
        """Begin to take these bits out of all masks, which `clear_some` does. Until then nobody sets them."""
        self.dead |= bits
        self._unclear = list(self._all)

    def clear_some(self, count: int) -> bool:
        """Go on with so many masks. Whether all are clear now."""
        dead = self.dead
        for mask in self._unclear[-count:]:
            if mask.raw & dead:
                mask.raw &= ~dead
                mask.hits = self._hits(mask.raw)
        del self._unclear[-count:]
        if self._unclear:
            return False
        self.dead = 0
        self._forget()
        return True

    def _forget(self) -> None:
        """Share from here on anew; masks in use stay as they are."""
        self._raw_to_mask.clear()
        self._plus.clear()
        self._minus.clear()
        self._steps = 0

    def _hits(self, raw: int) -> int:
        while raw >> SLOT_BITS * self._slots:
            self._widen()
        once = raw | raw << 1 & self._not_first
        return once | once << 2 & self._not_first_two

    def _widen(self) -> None:
        self._slots = max(64, 2 * self._slots)
        firsts = sum(1 << SLOT_BITS * slot for slot in range(self._slots))
        self._not_first = 0b1110 * firsts
        self._not_first_two = 0b1100 * firsts
