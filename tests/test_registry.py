"""Daemons that register in a real Redis, and an index that finds them there, without a list."""

from pathlib import Path
from typing import Final

from kvstore.block import Namespace
from tests.locator import Locator
from tests.node import Node, wait_for
from tests.redis_servers import Server

NS: Final = Namespace("m", block_tokens=16)
KEYS: Final = [b"0", b"1", b"2"]


def registered(folder: Path, name: str, url: str) -> Node:
    """A daemon of that name, which registers."""
    config = folder / f"{name}.toml"
    config.write_text(f'node = "{name}"\n[events]\nfeed = "127.0.0.1:0"\nregistry = "{url}"\n')
    return Node("64MiB", "--config", str(config))


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
