"""Daemons that register in a real Redis, and an index that finds them there, without a list."""

from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from kvstore.block import Namespace
from tests.locator import Locator
from tests.node import Node, free_ports, wait_for
from tests.redis_servers import Server

NS: Final = Namespace("m", block_tokens=16)
KEYS: Final = [b"0", b"1", b"2"]


def registered(folder: Path, name: str, url: str, more: str = "", *flags: str) -> Node:
    """A daemon of that name, which registers."""
    config = folder / f"{name}.toml"
    config.write_text(f'node = "{name}"\n[events]\nfeed = "127.0.0.1:0"\nregistry = "{url}"\n{more}')
    return Node("64MiB", "--config", str(config), *flags)


def test_an_index_finds_daemons_that_register_and_loses_those_that_end(tmp_path: Path) -> None:
    question = {"model": "m", "keys": [key.hex() for key in KEYS], "namespace": {"block_tokens": 16}}
    with (
        Server() as redis,
        registered(tmp_path, "first", redis.url) as first,
        Locator("--node", redis.url) as index,
    ):
        with registered(tmp_path, "second", redis.url) as second:
            for number, node in enumerate((first, second)):
                with node.client() as store, store.reserve(NS, KEYS[number:], 4096) as write:
                    write.commit()
            wait_for(lambda: set(index.placements(**question)) == {"first", "second"})
            wait_for(lambda: index.finds("dram", 48, "first", **question))
        wait_for(lambda: set(index.placements(**question)) == {"first"}, 30)
        assert index.finds("dram", 48, "first", **question)


def test_daemons_and_an_index_with_a_prefix_of_their_own_find_each_other_and_nobody_else(
    tmp_path: Path,
) -> None:
    """Also where the index runs beside the daemon, and has its settings."""
    with Server() as redis:
        shared = f'[redis]\nurl = "{redis.url}"\nprefix = "prod"\n'
        beside = f'[index]\nhttp = "127.0.0.1:{free_ports(1)[0]}"\ndata = ""\nnodes = ["{redis.url}"]\n'
        alone = tmp_path / "index.toml"
        alone.write_text(f'{shared}[index]\nnodes = ["{redis.url}"]\n')
        with (
            registered(tmp_path, "here", redis.url, shared + beside, "--index"),
            registered(tmp_path, "there", redis.url, shared),
            registered(tmp_path, "plain", redis.url),
            Locator("--config", str(alone)) as index,
            Locator("--node", redis.url) as without,
        ):
            embedded = object.__new__(Locator)
            embedded.http = beside.split('"')[1]
            question = {"model": "m", "tokens": [1]}
            for each in (index, embedded):
                wait_for(lambda each=each: found(each, question) == {"here", "there"})
            wait_for(lambda: found(without, question) == {"plain"})
            assert sorted(redis.client.zrange("prod:nodes", 0, -1)) == [b"here", b"there"]


def found(index: Locator, question: dict[str, Any]) -> set[str]:
    """The engines that it answers for; none while it starts."""
    with suppress(OSError):
        return set(index.placements(**question))
    return set()


def test_a_registry_that_names_nobody_is_told_to_whom_it_may_concern() -> None:
    with Server() as redis, Locator("--node", redis.url) as index:
        line = f"{redis.url} names no daemon"
        assert index.ask("/readyz") == (503, f"{line}\n")
        wait_for(lambda: index.ask("/readyz")[0] == 200)
        assert line in index.ask("/readyz")[1]
        redis.kill()
        wait_for(lambda: f"{redis.url} cannot be asked: " in index.ask("/readyz")[1])
