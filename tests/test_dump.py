"""What a dump tells of an engine's blocks: in an order that another indexer can follow, whatever was said."""

import json
import random
from dataclasses import dataclass
from typing import Any, cast

from kvstore.block import Medium, Namespace
from kvstore.index.dump import dump
from kvstore.index.lineage import Lineage
from kvstore.index.registrations import Registration, Registrations
from kvstore.index.translation import Translation

SPACE = Namespace("m", 16, scheme="tokens")
MEMBER = Registration("7", 1, "default", "m", 16, "tcp://h:1")


@dataclass
class Stream:
    """What a dump asks of an engine's stream: it is its own blocks and its own statistics."""

    all: list[tuple[Namespace, Translation]]
    muted: bool = False

    @property
    def blocks(self) -> "Stream":
        return self

    def translations(self) -> list[tuple[Namespace, Translation]]:
        return self.all

    def statistics(self) -> "Stream":
        return self


class Few(list[Registration]):
    """Registrations of which all have one stream."""

    def __init__(self, stream: Stream, *members: Registration) -> None:
        super().__init__(members)
        self._stream = stream

    def stream(self, _: Registration) -> Stream:
        return self._stream


def dumped(translation: Translation, *members: Registration, muted: bool = False) -> Any:
    few = Few(Stream([(SPACE, translation)], muted), *(members or (MEMBER,)))
    return json.loads(b"".join(dump(cast(Registrations, few))))


def store(
    translation: Translation, hashes: list[int], parent: int | None = None, medium: Medium = Medium.GPU
) -> None:
    translation.stored(hashes, [number + 1000 for number in hashes], medium)
    assert translation.lineage is not None
    translation.lineage.stored(hashes, hashes, [number + 2000 for number in hashes], parent)


def test_an_event_has_what_dynamo_reads() -> None:
    translation = Translation(traced=True)
    store(translation, [6, 5])
    store(translation, [7], 5, Medium.NVME)
    answer = dumped(translation, MEMBER, Registration("node-a", 0, "default", "m", 16, "tcp://h:1"))
    assert list(answer) == ["m:default"]
    assert answer["m:default"]["block_size"] == 16
    device, disk = answer["m:default"]["events"]
    assert device == {
        "worker_id": 7,
        "storage_tier": "device",
        "residency_domain": "worker",
        "event": {
            "event_id": 0,
            "data": {
                "stored": {
                    "parent_hash": None,
                    "start_position": None,
                    "blocks": [
                        {"block_hash": 6, "tokens_hash": 2006, "mm_extra_info": None},
                        {"block_hash": 5, "tokens_hash": 2005, "mm_extra_info": None},
                    ],
                }
            },
            "dp_rank": 1,
        },
    }
    assert (disk["storage_tier"], disk["event"]["data"]["stored"]["parent_hash"]) == ("disk", 5)
    assert dumped(translation, muted=True) == {"m:default": {"block_size": 16, "events": []}}
    assert json.loads(b"".join(dump(cast(Registrations, Few(Stream([])))))) == {}


def test_each_block_is_told_once_after_what_it_follows() -> None:
    choose = random.Random(1)
    translation = Translation(traced=True)
    parents: dict[int, int | None] = {}
    for number in choose.sample(range(1 << 60), 3000):
        parent = choose.choice([None, *list(parents)[-50:]])
        parents[number] = parent
        store(translation, [number], parent, choose.choice(list(Medium)))
    gone = choose.sample(list(parents), 300)
    for number in gone:
        for medium in Medium:
            translation.removed([number], medium)
    told: dict[int, int | None] = {}
    for event in dumped(translation)["m:default"]["events"]:
        stored = event["event"]["data"]["stored"]
        before = stored["parent_hash"]
        for block in stored["blocks"]:
            assert before is None or before in told or before in gone
            assert block["block_hash"] not in told
            told[block["block_hash"]] = before = block["block_hash"]
    assert told.keys() == parents.keys() - set(gone)


def test_blocks_that_follow_themselves_are_told_all_the_same() -> None:
    translation = Translation(traced=True)
    store(translation, [1, 2, 3], 3)
    events = dumped(translation)["m:default"]["events"]
    assert sorted(b["block_hash"] for e in events for b in e["event"]["data"]["stored"]["blocks"]) == [
        1,
        2,
        3,
    ]


def test_a_translation_is_the_same_after_a_restart() -> None:
    translation = Translation(traced=True)
    translation.stored([1, 2], [(1 << 64) - 1, 12], Medium.GPU, "salt")
    translation.stored([2, 3], [12, 13], Medium.NVME)
    assert isinstance(translation.lineage, Lineage)
    translation.lineage.stored([1, 2], [1 << 63, 2], [21, 22], None)
    translation.removed([3], Medium.NVME)
    again = Translation(traced=True)
    again.restore(translation.save(16, False))
    for key in (1, 2, 3, 4):
        assert again.sequence(key) == translation.sequence(key)
        assert again.salt(key) == translation.salt(key)
        assert again.media(key) == translation.media(key)
        assert again.lineage is not None
        assert again.lineage.origin(key) == translation.lineage.origin(key)
