"""The command line: one function a command. It parses, calls and prints; it decides nothing."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import wraps
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from signal import SIG_IGN, SIGHUP, signal
from typing import Annotated, Any

import typer

from kvstore import operate, screen
from kvstore.block import Namespace
from kvstore.config import Config, as_toml, load
from kvstore.options import HERE, Address, AsJson, client, errors

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(operate.app)
app.add_typer(screen.app)

Dram = Annotated[str | None, typer.Option(help="capacity of the arena, as 4GiB")]
Nvme = Annotated[
    list[str] | None, typer.Option(help="PATH:CAPACITY of a disk's directory; once for each disk")
]
Redis = Annotated[str | None, typer.Option(help="URL of a Redis that all nodes share, as redis://host:6379")]
Socket = Annotated[Path | None, typer.Option(help="unix socket for this node's clients")]
Http = Annotated[str | None, typer.Option(help="HOST:PORT of health and metrics, port 0 for any")]
Data = Annotated[str | None, typer.Option(help="HOST:PORT of TCP for clients off the node")]
TakeOver = Annotated[
    bool | None, typer.Option("--take-over", help="end the daemon on the socket, and go on with its arena")
]
ConfigFile = Annotated[Path | None, typer.Option(help="TOML file; flags go before it")]
Model = Annotated[str, typer.Option(help="the namespace's model")]
Salt = Annotated[str, typer.Option(help="the namespace's salt")]
Key = Annotated[str, typer.Argument(help="the block's key: text, or hex after 0x")]
Read = Callable[[], Config]


def _version(wanted: bool) -> None:
    if wanted:
        print("kvstore", version("kvstore-service"))
        raise typer.Exit


@app.callback()
def kvstore(
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="say which")] = False,
) -> None:
    """Keep the KV-cache blocks of LLM engines: in memory, on local disks, and in a Redis that nodes share."""


def _loader(
    dram: Dram = None,
    nvme: Nvme = None,
    redis: Redis = None,
    socket: Socket = None,
    http: Http = None,
    data: Data = None,
    take_over: TakeOver = None,
    config: ConfigFile = None,
) -> Read:
    """What reads the file, with the flags that were given on top."""
    flags = {"socket": socket and str(socket), "http": http, "data": data, "take_over": take_over}
    sections = {"dram": ("capacity", dram), "nvme": ("directories", nvme), "redis": ("url", redis)}
    given: dict[str, Any] = {name: value for name, value in flags.items() if value is not None}
    given |= {name: {knob: value} for name, (knob, value) in sections.items() if value not in (None, [])}
    return lambda: load(config, given)


def _configured(command: Callable[[Read], None]) -> Callable[..., None]:
    """A command with the flags of `_loader`, which is given what that makes of them."""

    @wraps(command)
    def run(**flags: Any) -> None:
        with errors():
            command(_loader(**flags))

    # What typer asks for the flags.
    run.__signature__ = signature(_loader)  # type: ignore[attr-defined]
    run.__annotations__ = _loader.__annotations__
    return run


@app.command()
@_configured
def serve(read: Read) -> None:
    """Run a node's daemon until SIGTERM. KVSTORE_TOKEN holds the token, where one is wanted."""
    signal(SIGHUP, SIG_IGN)  # until the daemon can read its file again
    from kvstore.serve import serve as run

    run(read(), reload=read)


@app.command("config")
@_configured
def show_config(read: Read) -> None:
    """Print the configuration that `serve` would have with the same flags: TOML, each knob documented."""
    print(as_toml(read()), end="")


@app.command()
def put(
    key: Key,
    file: Annotated[Path, typer.Argument(help="the bytes; - for standard input")],
    model: Model,
    salt: Salt = "",
    address: Address = HERE,
) -> None:
    """Store a file as one block."""
    with client(address) as store:
        data = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
        store.put(Namespace(model=model, salt=salt), _key(key), data)
    print(f"{len(data)} bytes")


@app.command()
def get(
    key: Key,
    model: Model,
    salt: Salt = "",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="file; else standard output")] = None,
    address: Address = HERE,
) -> None:
    """Fetch one block. Exits with 1 when it is not there."""
    with client(address) as store:
        data = store.get(Namespace(model=model, salt=salt), _key(key))
        if data is not None and output is not None:
            output.write_bytes(data)
    if data is None:
        sys.exit(f"kvstore: no block {key} of {model}")
    if output is None:
        sys.stdout.buffer.write(data)


@app.command()
def lookup(
    keys: Annotated[list[str], typer.Argument(help="a prefix: keys, head first")],
    model: Model,
    salt: Salt = "",
    wait_s: Annotated[float, typer.Option("--wait", help="seconds for shared tiers; 0: ask none")] = 1.0,
    address: Address = HERE,
    as_json: AsJson = False,
) -> None:
    """Say how many leading keys are there, per medium."""
    with client(address) as store:
        names = [_key(key) for key in keys]
        hits = asdict(store.hit_length(Namespace(model=model, salt=salt), names, wait_s=wait_s))
    print(json.dumps(hits) if as_json else "  ".join(f"{medium} {count}" for medium, count in hits.items()))


def _key(text: str) -> bytes:
    if not text.startswith("0x"):
        return os.fsencode(text)
    try:
        return bytes.fromhex(text[2:])
    except ValueError:
        sys.exit(f"kvstore: key {text!r} is no hex after 0x")
