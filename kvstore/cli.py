"""The command line: one function a command. It parses, calls and prints; it decides nothing."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from kvstore import operate, screen
from kvstore.block import Namespace
from kvstore.config import as_toml, load
from kvstore.options import HERE, Address, AsJson, client, errors

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
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


@app.command()
def serve(
    dram: Dram = None,
    nvme: Nvme = None,
    redis: Redis = None,
    socket: Socket = None,
    http: Http = None,
    data: Data = None,
    take_over: TakeOver = None,
    config: ConfigFile = None,
) -> None:
    """Run a node's daemon until SIGTERM. KVSTORE_TOKEN holds the token, where one is wanted."""
    from kvstore.serve import serve as run

    flags = _flags(dram, nvme, redis, socket, http, data, take_over)
    with errors():
        run(load(config, flags), reload=lambda: load(config, flags))


@app.command("config")
def show_config(
    dram: Dram = None,
    nvme: Nvme = None,
    redis: Redis = None,
    socket: Socket = None,
    http: Http = None,
    data: Data = None,
    take_over: TakeOver = None,
    config: ConfigFile = None,
) -> None:
    """Print the configuration that `serve` would have with the same flags: TOML, each knob documented."""
    with errors():
        print(as_toml(load(config, _flags(dram, nvme, redis, socket, http, data, take_over))), end="")


def _flags(
    dram: str | None,
    nvme: list[str] | None,
    redis: str | None,
    socket: Path | None,
    http: str | None,
    data: str | None,
    take_over: bool | None,
) -> dict[str, Any]:
    """The flags that were given, nested as the file is."""
    flags: dict[str, Any] = {"socket": socket and str(socket), "http": http, "data": data}
    flags["take_over"] = take_over
    flags |= {"dram": None if dram is None else {"capacity": dram}, "nvme": nvme and {"directories": nvme}}
    flags |= {"redis": redis and {"url": redis}}
    return {key: value for key, value in flags.items() if value is not None and value != []}


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
    address: Address = HERE,
    as_json: AsJson = False,
) -> None:
    """Say how many leading keys are there, per medium."""
    with client(address) as store:
        hits = asdict(store.hit_length(Namespace(model=model, salt=salt), [_key(key) for key in keys]))
    print(json.dumps(hits) if as_json else "  ".join(f"{medium} {count}" for medium, count in hits.items()))


def _key(text: str) -> bytes:
    if not text.startswith("0x"):
        return os.fsencode(text)
    try:
        return bytes.fromhex(text[2:])
    except ValueError:
        sys.exit(f"kvstore: key {text!r} is no hex after 0x")
