"""Which namespaces a connector's blocks lie in, and what others have that will never be shared with it."""

import logging
from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Final

from connectors.daemon import Daemon
from kvstore.block import Namespace
from kvstore.client import NamespaceUse, StoreClient
from kvstore.errors import KVStoreError
from kvstore.hashing import same_but_for_fingerprint

logger = logging.getLogger(__name__)

# Salts make namespaces; a daemon opens as many for one connection.
_CACHED_MAX: Final = 1 << 16


class Namespaces:
    """`make` turns what an engine's key has beside its hash into a namespace; `ours` knows what it makes."""

    def __init__(
        self, daemon: Daemon, make: Callable[..., Namespace], ours: Callable[[Namespace], bool]
    ) -> None:
        self._daemon = daemon
        self._make = lru_cache(_CACHED_MAX)(make)
        self._ours = ours
        self._compared: set[str] = set()  # models

    def of(self, *fields: Hashable) -> Namespace:
        """The namespace of these fields of a key."""
        namespace = self._make(*fields)
        if namespace.model not in self._compared:
            self._compare(namespace)
        return namespace

    def used(self, store: StoreClient) -> Iterator[NamespaceUse]:
        """Ours that have blocks, in the order of their ids."""
        return (use for use in store.namespaces() if self._ours(use.namespace))

    def _compare(self, ours: Namespace) -> None:
        """Say so, once for each model, if others store its blocks under keys that ours never equal."""
        try:
            with self._daemon.asking() as store:
                there = [use.namespace for use in store.namespaces()]
        except KVStoreError:
            return  # and the next time again
        self._compared.add(ours.model)
        for each in there:
            other = replace(each, shard=ours.shard, group=ours.group, salt=ours.salt)
            if other != ours and same_but_for_fingerprint(other, ours):
                logger.warning(
                    "%s has blocks whose keys are made by %s, and this process makes them by %s: they share "
                    "nothing; give all processes the same PYTHONHASHSEED, or a hash that needs none",
                    *(ours.model, other.scheme, ours.scheme),
                )
                return
