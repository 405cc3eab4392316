"""What messages are made of: their base, and how lists of keys and slots travel. None is a message itself."""

from typing import Final

import msgspec

# Keys of one request; a prompt of 1M tokens is 4,096 blocks of 256. Reserving so many takes some 15 ms, for
# which the event loop does nothing else.
KEYS_MAX: Final = 4096


class Message(msgspec.Struct, array_like=True):
    """Base of all messages; they travel as arrays, the tag first."""


class Keys(Message):
    """Keys joined end to end. `widths` is the length of each: one number where all are equal."""

    joined: bytes
    widths: int | list[int]


class Slots(Message):
    """Where blocks lie: arena, offset and length, each one number where all are equal."""

    arenas: int | list[int]
    offsets: list[int]
    lengths: int | list[int]
