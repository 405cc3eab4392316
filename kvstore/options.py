"""What commands share: their common options, a connection to a daemon, and how errors end them."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from kvstore.client import StoreClient
from kvstore.config import default_socket
from kvstore.errors import KVStoreError

Address = Annotated[str, typer.Option("--address", "-a", help="unix:/path or tcp://host:port of the daemon")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
HERE = f"unix:{default_socket()}"


@contextmanager
def errors() -> Iterator[None]:
    """End the command with the error as its only line."""
    try:
        yield
    except (KVStoreError, OSError, UnicodeError) as error:
        sys.exit(f"kvstore: {error}")


@contextmanager
def client(address: str) -> Iterator[StoreClient]:
    """A connection to the daemon there."""
    with errors(), StoreClient.connect(address, token=os.environ.get("KVSTORE_TOKEN")) as store:
        yield store
