"""An index inside another asyncio program, as a Python router: no process, no port, no HTTP.

It joins the settings, the index and routing, and that is all that `kvstore index` adds its ports to.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from kvstore.index.chooser import Chooser
from kvstore.index.membership import source_of
from kvstore.index.routing import Routing
from kvstore.index.service import Index
from kvstore.index.settings import paces_of, ranks_of
from kvstore.index.traits import Paces
from kvstore.index.wire import load_key
from kvstore.knobs import IndexConfig, RedisConfig


def index_of(
    settings: IndexConfig, *, prefix: str = RedisConfig().prefix, key_file: str = ""
) -> tuple[Index, Routing]:
    """Who says who has what, and who says which engine is best, on the loop that runs. It follows nobody yet.

    `prefix` is what names in a registry begin with; `key_file` is used where the settings name none.

    Raises:
        ConfigError: a setting is out of range, or a file cannot be read.
    """
    key_file = settings.key_file or key_file
    index = Index(
        ranks_of(settings),
        [source_of(place, prefix=prefix) for place in settings.nodes],
        blocks_max=settings.blocks_max,
        secret=load_key(key_file) if key_file else None,
        snapshot=Path(settings.snapshot) if settings.snapshot else None,
    )
    engines, others = paces_of(settings)
    return index, Routing(index, Paces(index.speeds, engines, others), Chooser(price=settings.price))


@asynccontextmanager
async def following(
    settings: IndexConfig, *, prefix: str = RedisConfig().prefix
) -> AsyncIterator[tuple[Index, Routing]]:
    """Follow the daemons and engines of the settings for as long as the block runs.

    What it answers before all were heard is less than what is there: `index.missing()` names them. The
    settings of ports, tokens and rates mean nothing here; a snapshot is read and not written.

    Raises:
        ConfigError: a setting is out of range, or a file cannot be read.
    """
    index, routing = index_of(settings, prefix=prefix)
    try:
        index.start()
        yield index, routing
    finally:
        await index.close()
