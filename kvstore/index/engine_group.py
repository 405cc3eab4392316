"""A KV-cache group of an engine: the namespaces of its blocks. Pure."""

from collections.abc import Iterator
from typing import Final

from kvstore.block import Namespace
from kvstore.index.engine_source import EngineSource
from kvstore.index.saved import SavedGroup
from kvstore.index.translation import Translation

# The scheme of keys of our own.
OWN_SCHEME: Final = "tokens"
# An engine has of each group one size.
_SIZES_MAX: Final = 4


class EngineGroup:
    """Its namespaces: by block size those of the engine's own hashes, and those with keys of our own.

    `no_prefix` says that its hits need no whole prefix, so that it has no place in the index.
    """

    def __init__(self, source: EngineSource, number: int) -> None:
        self.no_prefix = False
        self.translations: dict[Namespace, Translation] = {}
        self._source = source
        self._number = number
        self._size_to_space: dict[int, Namespace] = {}
        self._own_spaces: dict[tuple[int, bool], Namespace] = {}

    @property
    def spaces(self) -> Iterator[Namespace]:
        """Those of the engine's own hashes that there are."""
        return iter(self._size_to_space.values())

    @property
    def is_used(self) -> bool:
        """Whether it has any namespace."""
        return bool(self._size_to_space or self._own_spaces)

    def space(self, size: int) -> Namespace | None:
        """The namespace of the engine's own hashes of blocks of this size; None where it makes no sense."""
        space = self._size_to_space.get(size)
        if space is not None:
            return space
        times, rest = divmod(size, self._source.block_tokens)
        if rest or times < 1 or len(self._size_to_space) >= _SIZES_MAX:
            return None
        space = self._space(size, self._source.scheme + (f"/{times}" if times > 1 else ""))
        self._size_to_space[size] = space
        return space

    def own_space(self, size: int, in_pairs: bool) -> Namespace | None:
        """The namespace of our own keys of blocks of this size; None where it makes no sense."""
        space = self._own_spaces.get((size, in_pairs))
        if space is not None:
            return space
        if size <= 0 or size % self._source.block_tokens or len(self._own_spaces) >= _SIZES_MAX:
            return None
        space = self._space(size, OWN_SCHEME + ("-eagle" if in_pairs else ""))
        self._own_spaces[size, in_pairs] = space
        return space

    def translation(self, space: Namespace) -> Translation:
        """What the engine's hashes stand for in one of `own_space`, made if need be."""
        translation = self.translations.get(space)
        if translation is None:
            translation = self.translations[space] = Translation(traced=self._source.traced)
        return translation

    def save(self) -> SavedGroup:
        """What to make it of again."""
        ways = [(way, space) for way, space in self._own_spaces.items() if space in self.translations]
        translations = [self.translations[space].save(*way) for way, space in ways]
        return SavedGroup(self._number, self.no_prefix, list(self._size_to_space), translations)

    def restore(self, saved: SavedGroup) -> None:
        """Be as it was."""
        self.no_prefix = saved.no_prefix
        for block_tokens in saved.block_tokens:
            self.space(block_tokens)
        for each in saved.translations:
            space = self.own_space(each.block_tokens, each.in_pairs)
            if space is not None:
                self.translation(space).restore(each)

    def _space(self, size: int, scheme: str) -> Namespace:
        return Namespace(self._source.model, size, group=str(self._number), scheme=scheme)
