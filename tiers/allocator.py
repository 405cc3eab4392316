"""Where in an arena the slots lie: best fit over segregated bins, neighbours merged when freed.

Pure: it hands out offsets and touches no memory. Whom to evict is not its business either; for that the
slots are linked by address, so that a planner can look at what lies beside a free span.

Idea: TLSF (Masmano et al., 2004): a bitmap over size bins finds a fit without a search; here each power of
two has 8 bins, and within a bin the best of the first few is taken.
"""

from collections.abc import Sequence
from itertools import islice
from typing import Final

from tiers.base import Slot

# Slots start and end on pages: O_DIRECT and page-wise populating want it, and it bounds the number of spans.
ALIGNMENT_BYTES: Final = 4096
# Slots looked at in one bin for the best fit; a bin's spans differ by an eighth at most.
_LOOKS: Final = 16


class Allocator:
    """Slots over `capacity` bytes that `grow` has made available so far, front to back."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.ready_bytes = 0
        self.free_bytes = 0
        self._bins: dict[int, dict[Slot, None]] = {}
        self._occupied = 0  # bit b is set when bin b has a span
        self._last: Slot | None = None

    def grow(self, ready_bytes: int) -> None:
        """Make memory up to `ready_bytes` from the front available."""
        span = Slot(self.ready_bytes, ready_bytes - self.ready_bytes)
        self._append(span)
        self.free(span)

    def claim(self, pieces: Sequence[tuple[int, int, object]], ready_bytes: int | None = None) -> list[Slot]:
        """Begin with these pieces (offset, length, owner) taken, which ascend and lie apart; their slots.

        For an allocator that has nothing available yet. After, it is all available, or up to `ready_bytes`,
        and free but for the pieces.
        """
        slots = []
        for offset, length, owner in pieces:
            if offset > self.ready_bytes:
                self.grow(offset)
            slot = Slot(offset, length)
            slot.owner = owner
            self._append(slot)
            slots.append(slot)
        ready_bytes = self.capacity_bytes if ready_bytes is None else ready_bytes
        if ready_bytes > self.ready_bytes:
            self.grow(ready_bytes)
        return slots

    def take(self, length: int, owner: object, within: Slot | None = None) -> Slot | None:
        """Take `length` bytes (a multiple of the alignment) for `owner`, or None when no free span fits."""
        span = self._find(length) if within is None else within
        if span is None:
            return None
        if span.length == length:
            self._leave_bin(span)
            span.owner = owner
            return span
        if span.length < length:
            raise ValueError(f"{length} bytes wanted within {span}")
        # Cut the front off, so that a large free span stays where it is: in its place and mostly in its bin.
        taken = Slot(span.offset, length)
        taken.owner = owner
        taken.before, taken.after = span.before, span
        if span.before is not None:
            span.before.after = taken
        span.before = taken
        rest = span.length - length
        if _bin(rest) == _bin(span.length):
            self.free_bytes -= length
            span.offset, span.length = span.offset + length, rest
        else:
            self._leave_bin(span)
            span.offset, span.length = span.offset + length, rest
            self._enter_bin(span)
        return taken

    def free(self, span: Slot) -> Slot:
        """Free a taken span, merge it with free neighbours, and answer what it has become."""
        span.owner = None
        after, before = span.after, span.before
        if after is not None and after.owner is None:
            self._leave_bin(after)
            span.length += after.length
            span.after = after.after
            self._link_after(span)
        if before is not None and before.owner is None:
            self._leave_bin(before)
            before.length += span.length
            before.after = span.after
            self._link_after(before)
            span = before
        self._enter_bin(span)
        return span

    def largest(self, count: int) -> list[Slot]:
        """Up to `count` free spans from the topmost bins, the largest first within an eighth."""
        found: list[Slot] = []
        occupied = self._occupied
        while occupied and len(found) < count:
            top = occupied.bit_length() - 1
            occupied ^= 1 << top
            found.extend(islice(self._bins[top], count - len(found)))
        return found

    def check(self) -> list[str]:
        """Walk all spans by address; each line says what is wrong."""
        free = total = 0
        expected_offset = self.ready_bytes
        span, wrong = self._last, []
        while span is not None:
            total += span.length
            expected_offset -= span.length
            if span.offset != expected_offset:
                wrong.append(f"{span} should start at {expected_offset:#x}")
            if span.owner is None:
                free += span.length
                if span not in self._bins.get(_bin(span.length), {}):
                    wrong.append(f"{span} is free and in no bin")
                if span.before is not None and span.before.owner is None:
                    wrong.append(f"{span} and its free neighbour are not merged")
            span = span.before
        if total != self.ready_bytes or free != self.free_bytes:
            wrong.append(
                f"spans hold {total} of {self.ready_bytes} bytes, {free} free, {self.free_bytes} counted"
            )
        return wrong

    def _find(self, length: int) -> Slot | None:
        own = _bin(length)
        fitting = [s for s in islice(self._bins.get(own, ()), _LOOKS) if s.length >= length]
        if not fitting:
            larger = self._occupied >> (own + 1)
            if not larger:
                return next((s for s in self._bins.get(own, ()) if s.length >= length), None)
            nearest = own + (larger & -larger).bit_length()
            fitting = list(islice(self._bins[nearest], _LOOKS))
        return min(fitting, key=_length) if len(fitting) > 1 else fitting[0]

    def _append(self, span: Slot) -> None:
        span.before = self._last
        if self._last is not None:
            self._last.after = span
        self._last = span
        self.ready_bytes = span.offset + span.length

    def _link_after(self, span: Slot) -> None:
        if span.after is None:
            self._last = span
        else:
            span.after.before = span

    def _enter_bin(self, span: Slot) -> None:
        index = _bin(span.length)
        self._bins.setdefault(index, {})[span] = None
        self._occupied |= 1 << index
        self.free_bytes += span.length

    def _leave_bin(self, span: Slot) -> None:
        index = _bin(span.length)
        spans = self._bins[index]
        del spans[span]
        if not spans:
            # A new dict next time: deleting at a dict's front again and again is quadratic.
            del self._bins[index]
            self._occupied ^= 1 << index
        self.free_bytes -= span.length


def _length(span: Slot) -> int:
    return span.length


def _bin(length: int) -> int:
    pages = length // ALIGNMENT_BYTES
    power = pages.bit_length() - 1
    if power < 3:
        return pages
    return (power - 2) * 8 + (pages >> (power - 3) & 7)
