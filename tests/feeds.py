"""A daemon as its feed shows it, without a daemon: what it has, what it says, and what it answers."""

from collections import deque
from collections.abc import Sequence
from zlib import crc32

from kvstore.block import Medium, Namespace
from kvstore.index import feed
from kvstore.index.locality import Engine, Locality

PART_KEYS = 3
MEDIA = tuple(Medium)


class Daemon:
    """Has blocks, and the frames that tell of them. `kept` frames can be sent again."""

    def __init__(self, node: str = "node-a", epoch: int = 1, kept: int = 8) -> None:
        self.node = node
        self.epoch = epoch
        self.engines = ["10.0.0.1:8000"]
        self.seq = 0
        self.has: dict[tuple[Namespace, Medium], dict[bytes, None]] = {}
        self.kept: deque[feed.Events] = deque(maxlen=kept)

    def restart(self, *, media: Sequence[Medium] = ()) -> None:
        """Begin another life, with what was in these media."""
        self.epoch += 1
        self.seq = 0
        self.kept.clear()
        self.has = {place: keys for place, keys in self.has.items() if place[1] in media}

    def store(
        self, namespace: Namespace, medium: Medium, keys: Sequence[bytes], parent: bytes | None = feed.ROOT
    ) -> bytes:
        """The frame that says so."""
        self.has.setdefault((namespace, medium), {}).update(dict.fromkeys(keys))
        return self._happened(feed.Stored(namespace.canonical, medium, parent, list(keys)))

    def remove(self, namespace: Namespace, medium: Medium, keys: Sequence[bytes]) -> bytes:
        """The frame that says so."""
        for key in keys:
            del self.has[namespace, medium][key]
        return self._happened(feed.Removed(namespace.canonical, medium, list(keys)))

    def _happened(self, event: feed.Stored | feed.Removed) -> bytes:
        self.seq += 1
        self.kept.append(feed.Events(self.seq, 0.0, [event]))
        return feed.encode(self.kept[-1])

    def beat(self) -> bytes:
        """A heartbeat."""
        return feed.encode(feed.Heartbeat(self.epoch, self.seq, 0.0, self.digests))

    @property
    def digests(self) -> dict[Medium, feed.Digest]:
        """Of all it has."""
        digests = {}
        for medium in {medium for _, medium in self.has}:
            keys = [key for (_, other), keys in self.has.items() if other is medium for key in keys]
            digests[medium] = feed.Digest(len(keys), sum(map(crc32, keys)) % (1 << 64))
        return digests

    def answer(self, subscribe: feed.Subscribe) -> list[bytes]:
        """What it sends to who says that."""
        first = self.seq - len(self.kept)
        if subscribe.epoch == self.epoch and subscribe.seq is not None and first <= subscribe.seq <= self.seq:
            missed = [events for events in self.kept if events.seq > subscribe.seq]
            return list(map(feed.encode, [self.hello(subscribe.seq, resumed=True), *missed]))
        return list(map(feed.encode, [self.hello(self.seq), *self.parts(), feed.End(self.seq, self.digests)]))

    def hello(self, seq: int, *, resumed: bool = False) -> feed.Hello:
        """Its greeting."""
        return feed.Hello(feed.VERSION, self.node, self.epoch, seq, resumed, self.engines)

    def parts(self) -> list[feed.Part]:
        """All it has."""
        parts = []
        for (namespace, medium), held in self.has.items():
            keys = list(held)
            for start in range(0, len(keys), PART_KEYS):
                some = keys[start : start + PART_KEYS]
                parts.append(feed.Part([feed.Stored(namespace.canonical, medium, None, some)]))
        return parts

    def fastest(self, namespace: Namespace, key: bytes) -> Medium | None:
        """Where a key is."""
        return next((medium for medium in MEDIA if key in self.has.get((namespace, medium), ())), None)


def found(locality: Locality, node: str, namespace: Namespace, key: int | bytes) -> Medium | None:
    """Where the index says that a node has a key."""
    (placement,) = locality.find({namespace: [key]}, [Engine("an engine", (node,))])
    return next((medium for medium in MEDIA if getattr(placement, medium)), None)
