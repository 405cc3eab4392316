"""All blocks of registered engines as Dynamo's `/dump` has them: events that another indexer can begin with.

Each engine's blocks are told in runs, those that precede first, since an indexer passes over a block whose
predecessor it does not know. Blocks come and go meanwhile; who begins with a dump follows the engines too.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec

from kvstore.block import Medium
from kvstore.content_keys import KEY_MASK
from kvstore.index.lineage import Lineage, Origin
from kvstore.index.registrations import Registration, Registrations
from kvstore.index.translation import Translation

_TIERS: Final = {
    Medium.GPU: "device",
    Medium.DRAM: "host_pinned",
    Medium.NVME: "disk",
    Medium.REMOTE: "external",
}
# Blocks of one event, and steps that are taken until others may have their turn.
_RUN_MAX: Final = 64
_STEPS: Final = 64
_SHARDS: Final = 256
_encoder: Final = msgspec.json.Encoder()


def dump(registrations: Registrations) -> Iterator[bytes]:
    """The JSON in pieces, some of them empty: between two, others may have their turn, within 0.5 ms."""
    partitions: dict[tuple[str, str, int], list[Registration]] = {}
    for each in registrations:
        partitions.setdefault((each.model, each.group, each.block_tokens), []).append(each)
    yield b"{"
    for number, ((model, group, size), members) in enumerate(partitions.items()):
        head = _encoder.encode(f"{model}:{group}")
        yield (b"," if number else b"") + head + b':{"block_size":%d,"events":[' % size
        comma = b""
        for event in _events(registrations, members):
            yield comma + event if event else b""
            comma = b"," if event else comma
        yield b"]}"
    yield b"}"


def _events(registrations: Registrations, members: Sequence[Registration]) -> Iterator[bytes]:
    """The events of those whose instance is a number, as Dynamo has them alone; b"" for time that passes."""
    number = 0
    for member in members:
        stream = registrations.stream(member)
        if stream is None or not member.is_number or stream.statistics().muted:
            continue
        for space, translation in list(stream.blocks.translations()):
            if space.block_tokens != member.block_tokens or translation.lineage is None:
                continue
            for media, run in _runs(translation, translation.lineage):
                for medium in media:
                    yield _encoder.encode(_event(member, _TIERS[medium], run, number))
                    number += 1
                yield b""


def _event(member: Registration, tier: str, run: Sequence[Origin], number: int) -> dict[str, Any]:
    """Blocks that follow each other are in a tier."""
    blocks = [
        {"block_hash": each.engine_hash, "tokens_hash": each.local, "mm_extra_info": None} for each in run
    ]
    parent = run[0].parent if run[0].follows else None
    stored = {"parent_hash": parent, "start_position": None, "blocks": blocks}
    return {
        "worker_id": int(member.instance),
        "storage_tier": tier,
        "residency_domain": "worker",
        "event": {"event_id": number, "data": {"stored": stored}, "dp_rank": member.rank},
    }


def _runs(translation: Translation, lineage: Lineage) -> Iterator[tuple[Sequence[Medium], list[Origin]]]:
    """All blocks with their media, in runs of the same; without media, where others may have their turn."""
    told: list[set[int]] = [set() for _ in range(_SHARDS)]
    for step, key in enumerate(lineage.keys()):
        if step % _STEPS == 0:
            yield (), []
        chain: list[Origin] = []
        for _ in _climb(lineage, key, told, chain):
            yield (), []
        run: list[Origin] = []
        media: Sequence[Medium] = ()
        for origin in reversed(chain):
            now = translation.media(origin.engine_hash & KEY_MASK)
            if run and (now != media or len(run) >= _RUN_MAX):
                yield media, run
                run = []
            media = now
            run.append(origin)
        if run:
            yield media, run
    for _ in range(_SHARDS):  # all at once would take 50 ms of a million
        told.pop()
        yield (), []


def _climb(lineage: Lineage, key: int, told: list[set[int]], chain: list[Origin]) -> Iterator[None]:
    """Add the block, and what precedes it and was not told yet, to the chain. Gives others their turn."""
    while key not in told[key % _SHARDS]:
        origin = lineage.origin(key)
        if origin is None:
            return
        told[key % _SHARDS].add(key)
        chain.append(origin)
        if not origin.follows:
            return
        if len(chain) % _STEPS == 0:
            yield
        key = origin.parent & KEY_MASK
