"""Fixtures shared by all tests."""

from collections.abc import Iterator

import pytest

from kvstore.block import Namespace
from kvstore.client import StoreClient
from tests.node import Node


@pytest.fixture
def node() -> Iterator[Node]:
    """A daemon with an arena of 64 MiB; at the end nothing may be wrong in it."""
    with Node() as node:
        yield node
        if node.process.poll() is None:
            node.check()


@pytest.fixture
def store(node: Node) -> Iterator[StoreClient]:
    """A client of it."""
    with node.client() as store:
        yield store


@pytest.fixture
def namespace() -> Namespace:
    """Some namespace."""
    return Namespace(model="llama-test")
