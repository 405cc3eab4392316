"""Engines that routers register while the index runs, as other indexers have them: instances, ranks, groups.

It keeps which of the index's engines they are, and gathers what lookups say of engines by instance and rank.
It knows no HTTP. What is registered is forgotten with the process, as in those indexers; an index with a
snapshot goes on from what an engine had, if it is registered as before.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from kvstore.errors import InvalidRequest
from kvstore.index.engine_source import EngineKind, EngineSource
from kvstore.index.engine_stream import EngineStream
from kvstore.index.placement import Engine, Placement
from kvstore.index.service import Index
from kvstore.index.settings import Rank

# Of everybody who names none: Dynamo's routing group, and Mooncake's tenant.
GROUP: Final = "default"
_RANK_MAX: Final = (1 << 16) - 1
_BLOCK_TOKENS_MAX: Final = 1 << 20
_PORT_MAX: Final = 65535
_NAME_CHARS_MAX: Final = 255
_ENDPOINT: Final = re.compile(r"tcp://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):(\d{1,5})")


class Taken(InvalidRequest):
    """Somebody else is registered so already."""


@dataclass(frozen=True, slots=True)
class Registration:
    """One publisher of an instance. `lora` and `salt` are of blocks whose events name none.

    `group` is who is answered: queries of another group find nothing of it. Without `replay` what is missed
    is lost.

    Raises:
        InvalidRequest: a value is out of its limits.
    """

    instance: str
    rank: int
    group: str
    model: str
    block_tokens: int
    endpoint: str
    replay: str = ""
    kind: EngineKind = EngineKind.VLLM
    lora: str = ""
    salt: str = ""

    def __post_init__(self) -> None:
        words = {"instance_id": self.instance, "model": self.model, "group": self.group}
        for name, value in words.items():
            if not 0 < len(value) <= _NAME_CHARS_MAX:
                raise InvalidRequest(f"{name} is {value:.40}; give 1 to {_NAME_CHARS_MAX} characters")
        if "#" in self.instance:
            raise InvalidRequest(f"instance_id is {self.instance!r}; give one without #")
        if not 0 <= self.rank <= _RANK_MAX:
            raise InvalidRequest(f"dp_rank is {self.rank}; give 0 to {_RANK_MAX}")
        if not 1 <= self.block_tokens <= _BLOCK_TOKENS_MAX:
            raise InvalidRequest(f"block_size is {self.block_tokens}; give 1 to {_BLOCK_TOKENS_MAX} tokens")
        for endpoint in (self.endpoint, *filter(None, (self.replay,))):
            match = _ENDPOINT.fullmatch(endpoint)
            if match is None or not 0 < int(match[2]) <= _PORT_MAX:
                raise InvalidRequest(f"endpoint is {endpoint!r:.80}; give tcp://HOST:PORT")

    @property
    def name(self) -> str:
        """The engine's, in this index."""
        return f"{self.instance}#{self.rank}"

    @property
    def is_number(self) -> bool:
        """Whether it is an instance in Dynamo's terms."""
        return self.instance.isascii() and self.instance.isdecimal() and int(self.instance) < 1 << 64

    @property
    def host(self) -> str:
        """Where it is."""
        return self.endpoint.removeprefix("tcp://").rpartition(":")[0].strip("[]")

    def engine(self) -> Rank:
        """What the index follows: whatever the engine hashes, keys are made of its tokens."""
        source = EngineSource(
            name=self.name,
            kind=self.kind,
            model=self.model,
            block_tokens=self.block_tokens,
            scheme="tokens",
            endpoint=self.endpoint,
            replay=self.replay,
            topic=None,
            lora=self.lora,
            salt=self.salt,
            traced=True,
        )
        return Rank(source, Engine(self.name, model=self.model))


class Registrations:
    """All of an index. Instances are unique in it; those of one model and group have blocks of one size."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._by_name: dict[str, Registration] = {}
        self._instances: dict[str, list[Registration]] = {}
        # How many there are of a model in a group.
        self._sizes: dict[tuple[str, str], tuple[int, int]] = {}

    def add(self, new: Registration) -> None:
        """Follow it; the same one again changes nothing.

        Raises:
            Taken: its instance is registered otherwise, or blocks of its model have another size.
            InvalidRequest: the index cannot follow it.
        """
        before = self._by_name.get(new.name)
        if before == new:
            return
        if before is not None:
            raise Taken(
                f"instance {new.instance} dp_rank {new.rank} is registered at {before.endpoint} already; "
                "unregister that first"
            )
        size, number = self._sizes.get((new.model, new.group), (new.block_tokens, 0))
        if size != new.block_tokens:
            raise Taken(
                f"block_size mismatch for model={new.model} routing_group={new.group}: existing={size}, "
                f"requested={new.block_tokens}"
            )
        for other in self.of(new.instance):
            if (other.model, other.group) != (new.model, new.group):
                raise Taken(
                    f"instance {new.instance} is already registered for model={other.model} "
                    f"routing_group={other.group}"
                )
        self._index.add_engine(new.engine())
        self._by_name[new.name] = new
        self._instances.setdefault(new.instance, []).append(new)
        self._sizes[new.model, new.group] = size, number + 1

    def remove(self, gone: Registration) -> None:
        """Follow it no longer."""
        del self._by_name[gone.name]
        ranks = self._instances[gone.instance]
        ranks.remove(gone)
        if not ranks:
            del self._instances[gone.instance]
        self._index.remove_engine(gone.name)
        size, number = self._sizes.pop((gone.model, gone.group))
        if number > 1:
            self._sizes[gone.model, gone.group] = size, number - 1

    def of(self, instance: str) -> list[Registration]:
        """The ranks of an instance."""
        return list(self._instances.get(instance, ()))

    def group_of(self, engine: str) -> str:
        """Who is answered about it; engines that nobody has registered are of GROUP."""
        registered = self._by_name.get(engine)
        return registered.group if registered else GROUP

    def __iter__(self) -> Iterator[Registration]:
        return iter(list(self._by_name.values()))

    def stream(self, registration: Registration) -> EngineStream | None:
        """What it says of itself."""
        return self._index.engine_stream(registration.name)

    def knows(self, model: str, group: str) -> bool:
        """Whether a question about the model makes sense in a group."""
        if (model, group) in self._sizes:
            return True
        engines = self._index.locality.engines
        return group == GROUP and (
            model in self._index.locality.models or any(engine.model == model for engine in engines)
        )

    def gather(
        self, placements: Iterable[Placement], group: str, found: dict[str, dict[int, Placement]]
    ) -> None:
        """Add what instances of a group have, by rank. Engines that nobody has registered are of GROUP."""
        for placement in placements:
            registered = self._by_name.get(placement.engine)
            if (registered.group if registered else GROUP) == group:
                instance, rank = _instance_and_rank(placement.engine)
                found.setdefault(instance, {})[rank] = placement


@lru_cache(1 << 14)
def _instance_and_rank(engine: str) -> tuple[str, int]:
    instance, _, rank = engine.partition("#")
    return instance, int(rank) if rank.isdecimal() else 0
