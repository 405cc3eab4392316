"""Who has the keys of a prompt, in steps: what nothing is known to precede is walked, 0.2 us a key. Pure.

Depths in pieces add up: who has all of a piece, and some of the next one, has both.
"""

from collections.abc import Generator, Mapping, Sequence
from typing import Final

from kvstore.block import Namespace
from kvstore.index.keytable import Depths, Key
from kvstore.index.locality import Locality

# A step's: 1 ms where they are walked.
KEYS_AT_ONCE: Final = 4096
_TRIES_MAX: Final = 3


def search(
    locality: Locality,
    namespace_to_keys: Mapping[Namespace, Sequence[Key]],
    at_once: int = KEYS_AT_ONCE,
) -> Generator[None, None, dict[Namespace, Depths]]:
    """`Locality.depths` in each namespace, of so many keys at once. Others may change the locality between.

    What a bit means may change with them: then it begins anew, and at last takes what it finds for a hint.
    """
    for _ in range(_TRIES_MAX):
        began_at = locality.holder_changes
        found = yield from _search(locality, namespace_to_keys, at_once)
        if locality.holder_changes == began_at:
            break
    return found


def _search(
    locality: Locality, namespace_to_keys: Mapping[Namespace, Sequence[Key]], at_once: int
) -> Generator[None, None, dict[Namespace, Depths]]:
    found: dict[Namespace, Depths] = {}
    searched = 0
    for space, keys in namespace_to_keys.items():
        searched += len(keys)
        if searched > at_once and found:
            yield
            searched = len(keys)
        if len(keys) <= at_once:
            found[space] = locality.depths(space, keys)
        else:
            found[space] = yield from _in_pieces(locality, space, keys, at_once)
    return found


def _in_pieces(
    locality: Locality, space: Namespace, keys: Sequence[Key], at_once: int
) -> Generator[None, None, Depths]:
    piece = keys[:at_once]
    at, depths = len(piece), locality.depths(space, piece)
    while at < len(keys) and depths and depths[0][0] == at:
        yield
        _, bits = depths[0]
        piece = keys[at : at + at_once]
        further = locality.depths(space, piece, bits)
        for _, some in further:
            bits &= ~some
        ended = [(at, bits)] if bits else []
        depths = [*[(at + depth, some) for depth, some in further], *ended, *depths[1:]]
        at += len(piece)
    return depths
