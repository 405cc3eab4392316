"""Batches that wait for others before them. Pure.

What is held is applied in one turn of the loop, so it is not much: what is beyond is asked for again.
"""

from typing import Final

_BATCHES_MAX: Final = 256
# Reached by the batch that is beyond it: one of any size can be held.
_BYTES_MAX: Final = 1 << 20


class Held:
    """Payloads by their numbers. `since_s` is when the first of them came."""

    def __init__(self) -> None:
        self.since_s = 0.0
        self._seq_to_payload: dict[int, bytes] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._seq_to_payload)

    @property
    def full(self) -> bool:
        """Whether no more can be held."""
        return len(self._seq_to_payload) >= _BATCHES_MAX or self._bytes >= _BYTES_MAX

    def add(self, seq: int, payload: bytes, now_s: float) -> bool:
        """Hold this batch; False where it is full."""
        if not self._seq_to_payload:
            self.since_s = now_s
        if self.full:
            return False
        if seq not in self._seq_to_payload:
            self._seq_to_payload[seq] = payload
            self._bytes += len(payload)
        return True

    def pop(self, seq: int) -> bytes | None:
        """Take this one out, if it is there."""
        payload = self._seq_to_payload.pop(seq, None)
        if payload is not None:
            self._bytes -= len(payload)
        return payload

    @property
    def first(self) -> int | None:
        """The lowest number."""
        return min(self._seq_to_payload, default=None)
