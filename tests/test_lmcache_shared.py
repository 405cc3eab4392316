"""LMCache on two nodes that share a Redis: what one has stored, the other finds, loads and deletes."""

from collections.abc import Iterator

import pytest

from tests.lmcache_objects import IGNORED, KIB, Controllers, content, contents, keys
from tests.node import Node, wait_for, written
from tests.redis_servers import Server

pytestmark = pytest.mark.filterwarnings(IGNORED)


@pytest.fixture(scope="module")
def redis() -> Iterator[Server]:
    with Server() as redis:
        yield redis


@pytest.fixture(scope="module")
def nodes(redis: Server) -> Iterator[tuple[Node, Node]]:
    with Node("32MiB", "--redis", redis.unix_url) as first, Node("32MiB", "--redis", redis.url) as second:
        yield first, second
        for node in (first, second):
            node.check()


def test_objects_of_one_node_are_found_and_loaded_on_another_and_deleted_for_both(
    redis: Server, nodes: tuple[Node, Node]
) -> None:
    first, second = nodes
    names = keys(24)
    with Controllers(first.address) as writer, Controllers(second.address) as reader:
        assert writer.store(names, 300 * KIB).is_successful()
        with first.client() as store:
            wait_for(lambda: written(store))
        absent = keys(2, 500)
        assert reader.fetch([*names, *absent], 300 * KIB) == [*contents(names, 300 * KIB), None, None]
        reader.adapter.delete(names[:12])
        assert reader.lookup(names) == [False] * 12 + [True] * 12
        reader.unlock(names[12:])
    # A third one has only what is still shared.
    with Node("32MiB", "--redis", redis.url) as third, Controllers(third.address) as late:
        expected = [None] * 12 + [content(name, 300 * KIB) for name in names[12:]]
        assert late.fetch(names, 300 * KIB) == expected


def test_lookups_go_on_in_time_while_redis_hangs(redis: Server, nodes: tuple[Node, Node]) -> None:
    first, _ = nodes
    names = keys(8, 100)
    with Controllers(first.address, patience_s=2.5) as engine:
        assert engine.store(names, 100 * KIB).is_successful()
        with redis.stopped():
            assert engine.lookup([*names, *keys(4, 700)]) == [True] * 8 + [False] * 4
        engine.unlock(names)
