"""Whether an engine's hashes hold the salt that its event names, so that no other tenant finds them. Pure.

It is enough to look at a prompt's first block: each hash holds the one before.
"""

from collections.abc import Sequence
from typing import cast

from kvstore.block import Namespace
from kvstore.content_keys import event_extras
from kvstore.engine_hashes import MediaItem
from kvstore.engine_keys import keys_for
from kvstore.index.events import BlockStored


def is_salted(event: BlockStored) -> bool:
    """Whether it is about a prompt's first blocks, with tokens and a salt.

    A text among the extra keys of a block without an adapter is a salt.
    """
    if event.parent_block_hash is not None or not event.has_tokens:
        return False
    first = event.extra_keys[0] if event.extra_keys else None
    return bool(event.cache_salt) or any(isinstance(each, str) for each in first or ())


def holds_salt(event: BlockStored, space: Namespace, keys: Sequence[int]) -> bool:
    """Whether the first of `keys`, which the engine made, is what the scheme has for tokens and salt.

    True where the scheme's keys cannot be made here: nobody asks for these blocks by tokens then.

    Raises:
        InvalidRequest, ProtocolError: the event's extra keys or tokens are none.
    """
    extras = event_extras(None, event.cache_salt, event.extra_keys[0] if event.extra_keys else None, True)
    salt, media = "", []
    for extra in extras or ():
        if extra[0] == "cache_salt":
            salt = cast(str, extra[1])
        elif extra[0] == "mm":
            media.append(MediaItem(cast(str, extra[1]), cast(int, extra[2]), 1))
    made = keys_for(space, _first_tokens(event, space.block_tokens), salt=salt, media=media)
    return made is None or made[:1] == list(keys[:1])


def _first_tokens(event: BlockStored, block_tokens: int) -> Sequence[int]:
    """Those of the first block; of pairs, with the token after it."""
    tokens = event.tokens()[:block_tokens]
    if tokens and isinstance(tokens[0], tuple):
        pairs = cast(Sequence[tuple[int, int]], tokens)
        return [*[token for token, _ in pairs], pairs[-1][1]]
    return cast(Sequence[int], tokens)
