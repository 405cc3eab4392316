"""What an index remembers from before it was restarted, until publishers claim theirs."""

import logging
from dataclasses import dataclass, field
from pathlib import Path

from kvstore.errors import KVStoreError
from kvstore.index import snapshot
from kvstore.index.engine_stream import EngineStream
from kvstore.index.holding import Holding
from kvstore.index.locality import Locality
from kvstore.index.node_stream import Names, NodeStream
from kvstore.index.saved import SavedEngine, SavedIndex, SavedNode, SavedTable

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Remembrance:
    """Holdings that nobody has claimed yet: none of them answers."""

    locality: Locality
    nodes: dict[str, tuple[SavedNode, Holding]] = field(default_factory=dict)
    engines: dict[str, tuple[SavedEngine, Holding]] = field(default_factory=dict)

    def claim_node(self, stream: NodeStream, names: Names, expected: str | None) -> None:
        """Let the feed of a daemon go on from where it was, if it may be the same."""
        saved, holding = self.nodes.pop(stream.address, (None, None))
        if saved is None or holding is None:
            return
        if saved.name in names or expected not in (None, saved.name):
            self.locality.close(holding)
        else:
            stream.restore(saved, holding)

    def claim_engine(self, stream: EngineStream) -> None:
        """Let an engine's stream go on from where it was, if it is configured as it was."""
        saved, holding = self.engines.pop(stream.source.name, (None, None))
        if saved is None or holding is None:
            return
        if saved.source != stream.source.canonical:
            self.locality.close(holding)
        else:
            stream.restore(saved, holding)

    def forget(self) -> None:
        """Nobody else will come."""
        for _, holding in (*self.nodes.values(), *self.engines.values()):
            self.locality.close(holding)
        self.nodes, self.engines = {}, {}


def remembered(path: Path | None, blocks_max: int) -> Remembrance:
    """What the file holds, in a fresh locality; nothing where it cannot be used, and the log says why."""
    try:
        found = None if path is None else snapshot.read(path)
        if found is not None:
            return _restored(*found, blocks_max)
    except (KVStoreError, LookupError, ValueError) as error:
        logger.warning("begins with nothing: %s", error)
    return Remembrance(Locality(blocks_max=blocks_max))


def _restored(saved: SavedIndex, tables: list[SavedTable], blocks_max: int) -> Remembrance:
    locality = Locality(blocks_max=blocks_max)
    holdings = locality.restore(saved.locality, tables)
    nodes = {node.address: (node, holdings.pop(node.name)) for node in saved.nodes}
    engines = {engine.name: (engine, holdings.pop(engine.name)) for engine in saved.engines}
    keys = locality.statistics().keys
    logger.info("remembers %d daemons and %d engines with %d blocks", len(nodes), len(engines), keys)
    return Remembrance(locality, nodes, engines)
