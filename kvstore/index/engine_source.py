"""Which engine publishes events, where, and how it makes keys: configuration, one for each rank."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import msgspec


class EngineKind(StrEnum):
    """Whose events these are."""

    VLLM = "vllm"
    SGLANG = "sglang"


@dataclass(frozen=True, slots=True)
class EngineSource:
    """One publisher.

    `name` is the engine's address as routers know it, with "#RANK" where ranks have caches of their own.
    `block_tokens` are those of one hash, `scheme` is how the engine hashes (see `kvstore.engine_keys`), or
    "tokens" to hash anew whatever it publishes. Without `replay` what is missed is lost. Batches count
    whose topic is `topic`, not only begins with it; None is the first that it `may_use`. `lora` and `salt`
    are of blocks whose events name none. Of a `traced` one it is kept what each block follows: `Lineage`.
    """

    name: str
    kind: EngineKind
    model: str
    block_tokens: int
    scheme: str
    endpoint: str
    replay: str = ""
    topic: str | None = ""
    lora: str = ""
    salt: str = ""
    traced: bool = False

    def may_use(self, topic: bytes) -> bool:
        """Whether it may be this source's topic: kv@ENGINE@MODEL says whose it is."""
        if self.topic is not None:
            return topic == self.topic.encode()
        return not topic.startswith(b"kv@") or topic.endswith(b"@" + self.model.encode())

    @property
    def canonical(self) -> bytes:
        """The same bytes if and only if it is the same source."""
        return msgspec.json.encode(self)


@dataclass(slots=True)
class StreamCounts:
    """Totals of one engine's stream: see `SourceStatistics`."""

    batches: int = 0
    events: int = 0
    duplicates: int = 0
    gaps: int = 0
    lost: int = 0
    resyncs: int = 0
    restarts: int = 0
    undecodable: int = 0


@dataclass(frozen=True, slots=True)
class SourceStatistics:
    """One engine's stream now.

    `seq` is that of its last batch, `incomplete` says that events are missing for good, `muted` that it is
    left out of answers. `resyncs` are replays asked for, `lost` batches that nobody had any more, `orphans`
    blocks that cannot be placed, `ignored` events and batches by why. `last_batch_s` is when the last batch
    came, by the owner's clock, `published_s` when it was sent, by the publisher's; None before the first.
    """

    name: str
    kind: EngineKind
    connected: bool
    muted: bool
    incomplete: bool
    seq: int | None
    last_batch_s: float | None
    published_s: float | None
    blocks: int
    over: bool
    batches: int
    events: int
    duplicates: int
    gaps: int
    lost: int
    resyncs: int
    restarts: int
    undecodable: int
    orphans: int
    ignored: Mapping[str, int]
