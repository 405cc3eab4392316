"""What a connector has stored, as pages of LMCache's keys."""

from typing import Final

from lmcache.v1.distributed.api import KeyEntry, KeyListPage, ObjectKey

from connectors.namespaces import Namespaces
from kvstore.block import NAMESPACE_ID_BYTES
from kvstore.client import KEYS_MAX, StoreClient
from kvstore.hashing import lmcache_object_fields

_PLACE_END: Final = 1 << 63


def key_page(
    store: StoreClient, namespaces: Namespaces, model: str | None, size: int, cursor: str | None
) -> KeyListPage:
    """At most `size` keys, of one model or of all; begin with no cursor.

    Raises:
        ValueError: the cursor is none that a page has had.
    """
    first, after = _parsed(cursor)
    entries: list[KeyEntry] = []
    for use in namespaces.used(store, first):
        namespace = use.namespace
        if model not in (None, namespace.model):
            continue
        fields = lmcache_object_fields(namespace)
        place: int | None = after if namespace.id == first else 0
        while place is not None:
            if len(entries) == size:
                return KeyListPage(tuple(entries), f"{namespace.id.hex()}:{place}")
            page = store.list(namespace, place, limit=min(size - len(entries), KEYS_MAX))
            place = page.cursor
            for key, length in zip(page.keys, page.lengths, strict=True):
                entries.append(KeyEntry(ObjectKey(key, *fields).to_encoded_object_key(), length))
    return KeyListPage(tuple(entries), None)


def _parsed(cursor: str | None) -> tuple[bytes, int]:
    """The namespace to go on with, by its id, and the place in it."""
    if cursor is None:
        return b"", 0
    try:
        name, text = cursor.split(":")
        namespace_id, place = bytes.fromhex(name), int(text)
    except ValueError:
        namespace_id, place = b"", -1
    if len(namespace_id) != NAMESPACE_ID_BYTES or not 0 <= place < _PLACE_END:
        raise ValueError(f"cursor {cursor!r} is none that list_l2_keys has returned")
    return namespace_id, place
