"""The command line: one function a command. It parses, calls and prints; it decides nothing."""

import sys
from collections.abc import Callable
from functools import wraps
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from signal import SIG_IGN, SIGHUP, signal
from typing import Annotated, Any

import typer

from kvstore import locate, operate, screen
from kvstore.block import Namespace
from kvstore.config import Config, as_toml, load
from kvstore.options import HERE, Address, ConfigFile, Model, Salt, client, errors, key_of

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(operate.app)
app.add_typer(screen.app)
app.add_typer(locate.app)

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
Events = Annotated[bool | None, typer.Option("--events", help="tell indexes and routers what comes and goes")]
EmbeddedIndex = Annotated[
    bool | None, typer.Option("--index", help="run a locality index beside the daemon; it implies --events")
]
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
    events: Events = None,
    index: EmbeddedIndex = None,
    config: ConfigFile = None,
) -> Read:
    """What reads the file, with the flags that were given on top."""
    flags = {"socket": socket and str(socket), "http": http, "data": data, "take_over": take_over}
    sections = {"dram": ("capacity", dram), "nvme": ("directories", nvme), "redis": ("url", redis)}
    given: dict[str, Any] = {name: value for name, value in flags.items() if value is not None}
    given |= {name: {knob: value} for name, (knob, value) in sections.items() if value not in (None, [])}
    if events:
        given["events"] = {}
    if index:
        given["index"] = {"embedded": True}
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


@app.command("key")
def print_key() -> None:
    """Print a fresh key for the feeds of events, to be put into a file of every daemon and index."""
    from kvstore.index.wire import new_key

    print(new_key())


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
        store.put(Namespace(model=model, salt=salt), key_of(key), data)
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
        data = store.get(Namespace(model=model, salt=salt), key_of(key))
        if data is not None and output is not None:
            output.write_bytes(data)
    if data is None:
        sys.exit(f"kvstore: no block {key} of {model}")
    if output is None:
        sys.stdout.buffer.write(data)
