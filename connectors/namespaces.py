"""Which namespaces a connector's blocks lie in, and what others have that will never be shared with it."""

import logging
import threading
from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Final

from connectors.daemon import Daemon
from kvstore.block import Namespace
from kvstore.client import NamespaceUse, StoreClient
from kvstore.errors import KVStoreError
from kvstore.hashing import same_but_for_keys

logger = logging.getLogger(__name__)

# Salts make namespaces; a daemon keeps as many open for one connection.
_CACHED_MAX: Final = 1 << 16
# Between two looks at what others have. Mistakes are made when processes start, so the first is soon.
_LOOK_FIRST_S: Final = 1.0
_LOOK_MAX_S: Final = 600.0


class Namespaces:
    """`make` turns what an engine's key has beside its hash into a namespace; `ours` knows what it makes."""

    def __init__(
        self, daemon: Daemon, make: Callable[..., Namespace], ours: Callable[[Namespace], bool]
    ) -> None:
        self._daemon = daemon
        self._make = lru_cache(_CACHED_MAX)(make)
        self._ours = lru_cache(_CACHED_MAX)(ours)
        self._models: dict[str, Namespace] = {}  # one namespace of each model
        self._told: set[str] = set()
        self._closed = False
        self._changed = threading.Event()
        threading.Thread(target=self._watch, name="kvstore-compare", daemon=True).start()

    def of(self, *fields: Hashable) -> Namespace:
        """The namespace of these fields of a key."""
        namespace = self._make(*fields)
        if namespace.model not in self._models:
            self._models[namespace.model] = namespace
            self._changed.set()
        return namespace

    def used(self, store: StoreClient, first: bytes = b"") -> Iterator[NamespaceUse]:
        """Ours that have blocks, in the order of their ids, from the id `first` on."""
        number = int.from_bytes(first)
        before = (number - 1).to_bytes(len(first)) if number else b""
        return (use for use in store.namespaces(before) if self._ours(use.namespace))

    def close(self) -> None:
        """Look at what others have no more."""
        self._closed = True
        self._changed.set()

    def _watch(self) -> None:
        pause_s = _LOOK_FIRST_S
        while not self._closed:
            if self._changed.wait(pause_s):
                self._changed.clear()
                pause_s = _LOOK_FIRST_S
                continue
            pause_s = min(2 * pause_s, _LOOK_MAX_S)
            try:
                self._compare()
            except KVStoreError:
                continue  # and the next time again
            except Exception:
                logger.exception("comparing namespaces failed by a mistake")

    def _compare(self) -> None:
        """Say so, once for each model, if others store its blocks under keys that ours never equal."""
        left = {model: ours for model, ours in list(self._models.items()) if model not in self._told}
        if not left:
            return
        with self._daemon.asking() as store:
            for use in store.namespaces():
                ours = left.get(use.namespace.model)
                if ours is None:
                    continue
                other = replace(use.namespace, shard=ours.shard, group=ours.group, salt=ours.salt)
                if other != ours and same_but_for_keys(other, ours):
                    self._told.add(ours.model)
                    del left[ours.model]
                    logger.warning(
                        "%s has blocks whose keys are made by %s from chunks of %d tokens, and this process "
                        "makes them by %s from chunks of %d: they share nothing; give all processes the same "
                        "chunk size, hash algorithm and PYTHONHASHSEED, or a hash that needs no seed",
                        *(ours.model, other.scheme, other.block_tokens, ours.scheme, ours.block_tokens),
                    )
