"""What commands share: their common options, a connection to a daemon, and how errors end them."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from kvstore.client import StoreClient
from kvstore.config import default_socket
from kvstore.errors import KVStoreError

Address = Annotated[str, typer.Option("--address", "-a", help="unix:/path or tcp://host:port of the daemon")]
ConfigFile = Annotated[Path | None, typer.Option(help="TOML file; flags go before it")]
Model = Annotated[str, typer.Option(help="the namespace's model")]
Salt = Annotated[str, typer.Option(help="the namespace's salt")]
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


def key_of(text: str) -> bytes:
    """A block's key as it is typed: text, or hex after 0x."""
    if not text.startswith("0x"):
        return os.fsencode(text)
    try:
        return bytes.fromhex(text[2:])
    except ValueError:
        sys.exit(f"kvstore: key {text!r} is no hex after 0x")
