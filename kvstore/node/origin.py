"""What the writer of blocks said of them: which follows which, and what tokens they are. It checks none."""

from collections.abc import Mapping, Sequence
from functools import cached_property


class Origin:
    """The keys of one reserve, each of which follows the one before it.

    `parent` is what the first of them follows: b"" where it starts a prompt, None where that is not known.
    `tokens` are the token ids of all the keys, u32 little endian, or None. `keys` stays as it is.
    """

    def __init__(self, keys: Sequence[bytes], parent: bytes | None, tokens: bytes | None) -> None:
        self.keys = keys
        self.parent = parent
        self.tokens = tokens

    @cached_property
    def key_to_position(self) -> Mapping[bytes, int]:
        """Where each key stands in the reserve. Made when it is asked for first: nobody may listen."""
        return {key: position for position, key in enumerate(self.keys)}

    def predecessors(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """What each of these keys of the reserve follows."""
        if len(keys) == len(self.keys):
            return [self.parent, *self.keys[:-1]]
        places = [self.key_to_position[key] for key in keys]
        return [self.keys[place - 1] if place else self.parent for place in places]

    def tokens_of(self, key: bytes, block_tokens: int) -> bytes | None:
        """The token ids of one key of the reserve, where it came with as many as its keys need."""
        width = 4 * block_tokens
        if self.tokens is None or len(self.tokens) != width * len(self.keys):
            return None
        start = width * self.key_to_position[key]
        return self.tokens[start : start + width]
