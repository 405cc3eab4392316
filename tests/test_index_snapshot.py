"""What an index knows outlives it, whole or not at all; it answers for whom its publisher has confirmed."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.block import Medium, Namespace
from kvstore.engine_keys import vllm_scheme
from kvstore.index import snapshot
from kvstore.index.keytable import ROOT, Key
from kvstore.index.locality import Locality
from kvstore.index.placement import Engine
from kvstore.index.saved import SavedIndex, SavedTable
from kvstore.index.snapshot import SnapshotError
from tests.event_publisher import EventPublisher
from tests.locator import Locator
from tests.node import Node, wait_for

NAMES = ("a", "b", "c")
SPACES = (Namespace("m", 16), Namespace("m", 16, shard="0/2"), Namespace("m", 16, shard="1/2"))
CHAINS: list[list[Key]] = [[n * 100 + i for i in range(8)] for n in range(4)] + [[b"x", b"y"], [b"z"]]
ENGINES = [Engine(name, (name,)) for name in NAMES]


def saved(locality: Locality) -> tuple[SavedIndex, list[SavedTable]]:
    tables: list[SavedTable] = []
    return SavedIndex(locality.save(NAMES, tables.append), [], []), tables


def through_a_file(locality: Locality, path: Path) -> Locality:
    """Another one that has the same, by way of a file."""

    def save(write: Any) -> SavedIndex:
        return SavedIndex(locality.save(NAMES, write), [], [])

    assert snapshot.write(path, save) == path.stat().st_size
    found = snapshot.read(path)
    assert found is not None
    other = Locality()
    for holding in other.restore(found[0].locality, found[1]).values():
        other.show(holding)
    return other


def answers(locality: Locality) -> list[Any]:
    return [
        sorted(map(str, locality.find({space: chain[start:]}, ENGINES)))
        for space in SPACES[:2]
        for chain in CHAINS
        for start in range(len(chain))
    ]


def happen(locality: Locality, choice: random.Random) -> None:
    """Something, to one of the publishers."""
    name, space, chain = choice.choice(NAMES), choice.choice(SPACES), choice.choice(CHAINS)
    holding = locality.holding(name)
    if holding is None or choice.random() < 0.03:
        locality.show(locality.open(name))
        return
    start, medium = choice.randrange(len(chain)), choice.choice(list(Medium))
    some = chain[start : start + choice.randint(1, 8)]
    if choice.random() < 0.6:
        parent = choice.choice([chain[start - 1] if start else ROOT, None])
        holding.stored(space, medium, some, parent)
    else:
        holding.removed(space, medium, some)
    holding.settle()
    if choice.random() < 0.3:
        locality.tend()


@settings(deadline=None)
@given(st.randoms(use_true_random=False), st.integers(0, 80), st.integers(0, 30))
def test_after_a_restart_it_answers_the_same_and_goes_on_the_same(
    tmp_path_factory: pytest.TempPathFactory, choice: random.Random, before: int, after: int
) -> None:
    locality = Locality()
    for _ in range(before):
        happen(locality, choice)
    other = through_a_file(locality, tmp_path_factory.getbasetemp() / "history")
    other.check()
    assert answers(other) == answers(locality)
    again = random.Random(choice.random())
    for one in (locality, other):
        for name in set(NAMES) - {holding.name for holding in filter(None, map(one.holding, NAMES))}:
            one.show(one.open(name))
    state = again.getstate()
    for one in (locality, other):
        again.setstate(state)
        for _ in range(after):
            happen(one, again)
        while one.tend():
            pass
        one.check()
    assert answers(other) == answers(locality)


def test_blocks_of_who_is_left_out_are_not_saved() -> None:
    locality = Locality()
    for name in (*NAMES, "left out"):
        holding = locality.open(name)
        holding.stored(SPACES[0], Medium.DRAM, CHAINS[0] if name == "a" else [name.encode()], ROOT)
        locality.show(holding)
    rest, (table,) = saved(locality)
    assert set(table.keys) == {*CHAINS[0], b"b", b"c"}
    assert [holding.name for holding in rest.locality.holdings] == list(NAMES)


def some_snapshot(path: Path) -> bytes:
    locality = Locality()
    holding = locality.open("a")
    holding.stored(SPACES[0], Medium.DRAM, CHAINS[0], ROOT)
    locality.show(holding)
    through_a_file(locality, path)
    return path.read_bytes()


def test_a_damaged_file_is_refused_wherever_the_damage_is(tmp_path: Path) -> None:
    data = some_snapshot(path := tmp_path / "file")
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :])
        with pytest.raises(SnapshotError, match=str(path)):
            snapshot.read(path)
        path.write_bytes(data[:place])
        with pytest.raises(SnapshotError, match=str(path)):
            snapshot.read(path)


def test_what_contradicts_itself_is_refused() -> None:
    locality = Locality()
    holding = locality.open("a")
    holding.stored(SPACES[0], Medium.DRAM, CHAINS[0], ROOT)
    locality.show(holding)
    for change in (
        lambda rest, table: rest.locality.masks.clear(),
        lambda rest, table: rest.locality.masks.append(b""),
        lambda rest, table: rest.locality.holdings[0].slots.clear(),
        lambda rest, table: rest.locality.holdings.append(rest.locality.holdings[0]),
        lambda rest, table: table.followed.append(99),
        lambda rest, table: table.followers.append(1),
        lambda rest, table: setattr(table, "namespace", b"{}"),
    ):
        rest, tables = saved(locality)
        change(rest, tables[0])
        with pytest.raises((ValueError, LookupError)):
            Locality().restore(rest.locality, tables)


# Processes.

CONFIG = """
node = "node-a"
[events]
feed = "127.0.0.1:{port}"
"""
QUESTION = {"model": "m", "keys": [b"first".hex(), b"second".hex()]}


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    path = tmp_path_factory.mktemp("node") / "node.toml"
    path.write_text(CONFIG.format(port=0))
    with Node("16MiB", "--config", str(path)) as node:
        path.write_text(CONFIG.format(port=node.endpoint("feed").rpartition(":")[2]))
        yield node


def put(node: Node, keys: Sequence[bytes]) -> None:
    with node.client() as store, store.reserve(Namespace("m", 16), keys, 64) as write:
        write.commit()


def configured(path: Path, **settings: Any) -> list[str]:
    """Flags of an index with these settings."""
    lines = [f"{name} = {value!r}" for name, value in settings.items()]
    path.write_text("\n".join(["[index]", *lines]).replace("'", '"'))
    return ["--config", str(path)]


def test_a_killed_index_goes_on_from_its_file_without_fetching_all_again(node: Node, tmp_path: Path) -> None:
    flags = configured(tmp_path / "index.toml", snapshot=str(tmp_path / "file"), snapshot_s=1)
    with Locator(*flags, "--node", node.endpoint("feed")) as index:
        put(node, [b"first"])
        wait_for(lambda: index.finds("dram", 16, **QUESTION))
        wait_for(lambda: index.metric("kvstore_index_snapshots_total") >= 2)
        assert index.metric("kvstore_index_snapshot_fork_seconds") < 1
        index.kill()
        put(node, [b"second"])
        index.start()
        wait_for(lambda: index.finds("dram", 32, **QUESTION))
        assert "remembers 1 daemons and 0 engines with 1 blocks" in index.log
        assert index.log.count("node-a has ") == 1  # which is said of what was fetched
        assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600


def test_nothing_of_a_daemon_that_was_restarted_meanwhile_answers(node: Node, tmp_path: Path) -> None:
    flags = ["--snapshot", str(tmp_path / "file"), "--node", node.endpoint("feed")]
    with Locator(*flags) as index:
        put(node, [b"first", b"second"])
        wait_for(lambda: index.finds("dram", 32, **QUESTION))
        assert index.stop() == 0
        with node.stopped():
            index.start()
            assert index.placements(**QUESTION) == {}
            index.stop()
        node.kill()
        node.start()
        put(node, [b"first"])
        index.start()
        wait_for(lambda: index.finds("dram", 16, **QUESTION))
        assert index.stop() == 0


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"kvstore index 1\n", b"kvstore index 2\n"])
def test_a_foreign_file_is_ignored_with_a_line_of_the_log_and_replaced(
    tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with Locator("--snapshot", str(path)) as index:
        assert f"begins with nothing: {path}" in index.log
        assert index.stop() == 0
    assert snapshot.read(path) is not None


def test_a_file_that_cannot_be_written_harms_nobody(tmp_path: Path) -> None:
    flags = configured(tmp_path / "index.toml", snapshot="/proc/none/file", snapshot_s=1)
    with Locator(*flags) as index:
        wait_for(lambda: "/proc/none/file could not be written: No such file" in index.log)
        assert index.ask("/healthz")[0] == 200
        assert index.stop() == 0


def test_an_engine_is_resumed_by_a_replay_and_another_process_begins_anew(tmp_path: Path) -> None:
    with EventPublisher() as publisher:
        engine = {
            "name": "10.0.0.1:8000",
            "events": publisher.endpoint,
            "replay": publisher.replay,
            "model": "m",
            "hash": "sha256",
        }
        lines = [f"{name} = {value!r}".replace("'", '"') for name, value in engine.items()]
        path = tmp_path / "index.toml"
        path.write_text("\n".join(["[[index.engines]]", *lines]))
        scheme = {"scheme": vllm_scheme()}
        question: dict[str, Any] = {"model": "m", "keys": [11, 12, 13], "namespace": scheme}
        with Locator("--config", str(path), "--snapshot", str(tmp_path / "file")) as index:
            index.ready()
            publisher.publish([[11, None]], [[12, 11]])
            wait_for(lambda: index.finds("gpu", 32, **question))
            index.stop()
            publisher.publish([[13, 12]])
            index.start()
            wait_for(lambda: index.finds("gpu", 48, **question))
            assert "remembers 0 daemons and 1 engines with 2 blocks" in index.log
            assert index.metric('kvstore_index_restarts_total{kind="engine"}') == 0
            index.stop()
            publisher.kill()
            index.start()
            assert index.finds("gpu", 0, "10.0.0.1:8000", **question)
            publisher.start()
            publisher.publish([[11, None]])
            wait_for(lambda: index.finds("gpu", 16, **question))
            assert index.metric('kvstore_index_restarts_total{kind="engine"}') == 1
            index.stop()
