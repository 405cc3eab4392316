"""The command line: one function a command. It parses, calls and prints; it decides nothing."""

import asyncio
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from kvstore.block import Namespace
from kvstore.client import StoreClient
from kvstore.config import default_socket, load
from kvstore.errors import KVStoreError
from kvstore.statistics import Latencies, TierState

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

Address = Annotated[str, typer.Option("--address", "-a", help="unix:/path or tcp://host:port of the daemon")]
Model = Annotated[str, typer.Option(help="the namespace's model")]
Salt = Annotated[str, typer.Option(help="the namespace's salt")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
Key = Annotated[str, typer.Argument(help="the block's key: text, or hex after 0x")]
HERE = f"unix:{default_socket()}"


@app.command()
def serve(
    dram: Annotated[str | None, typer.Option(help="capacity of the arena, as 4GiB")] = None,
    nvme: Annotated[
        list[str] | None, typer.Option(help="PATH:CAPACITY of a disk's directory; once for each disk")
    ] = None,
    socket: Annotated[Path | None, typer.Option(help="unix socket for this node's clients")] = None,
    http: Annotated[str | None, typer.Option(help="HOST:PORT of health and metrics, port 0 for any")] = None,
    data: Annotated[str | None, typer.Option(help="HOST:PORT of TCP for clients off the node")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file; flags go before it")] = None,
) -> None:
    """Run a node's daemon until SIGTERM. KVSTORE_TOKEN holds the token, where one is wanted."""
    from kvstore.serve import serve as run

    flags: dict[str, Any] = {"socket": socket and str(socket), "http": http, "data": data}
    overrides = {key: value for key, value in flags.items() if value is not None}
    if dram is not None:
        overrides["dram"] = {"capacity": dram}
    if nvme:
        overrides["nvme"] = {"directories": nvme}
    with _errors():
        run(load(config, overrides))


@app.command()
def stats(address: Address = HERE, as_json: AsJson = False) -> None:
    """Show what a daemon has and has done."""
    with _client(address) as store:
        statistics = asdict(store.statistics())
    if as_json:
        print(json.dumps(statistics))
        return
    console = Console()
    tiers, counters = statistics.pop("tiers"), statistics.pop("counters")
    console.print(_table("node", statistics))
    for tier in tiers:
        console.print(_table(f"tier {tier['name']}", _tier_rows(tier)))
    console.print(_table("since start", counters))


def _tier_rows(tier: dict[str, Any]) -> dict[str, Any]:
    """What a tier has and has done, one row each; of latencies the mean and the 99th percentile's bucket."""
    rows = {name: value for name, value in tier.items() if name not in ("counters", "reads", "writes")}
    rows |= tier["counters"]
    for name in ("reads", "writes"):
        latencies = Latencies(**tier[name])
        if latencies.count:
            rows[f"{name}_mean_s"] = round(latencies.sum_s / latencies.count, 6)
            rows[f"{name}_p99_s"] = f"<= {latencies.at_most_s(0.99):g}"
    return rows


def _table(title: str, values: dict[str, Any]) -> Table:
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in values.items():
        number = isinstance(value, int) and not isinstance(value, bool) and name != "epoch"
        table.add_row(name, f"{value:,}" if number else str(value))
    return table


@app.command()
def put(
    key: Key,
    file: Annotated[Path, typer.Argument(help="the bytes; - for standard input")],
    model: Model,
    salt: Salt = "",
    address: Address = HERE,
) -> None:
    """Store a file as one block."""
    with _client(address) as store:
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
    with _client(address) as store:
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
    with _client(address) as store:
        hits = asdict(store.hit_length(Namespace(model=model, salt=salt), [_key(key) for key in keys]))
    print(json.dumps(hits) if as_json else "  ".join(f"{medium} {count}" for medium, count in hits.items()))


@app.command()
def check(
    nvme: Annotated[
        list[Path] | None, typer.Option(help="directory of a tier that no daemon uses, instead of a daemon's")
    ] = None,
    address: Address = HERE,
) -> None:
    """Let a daemon recount all it has, and verify every checksum. Exits with 1 when something is wrong."""
    wrong: list[str] = []
    if nvme:
        with _errors(), _progress() as progress:
            for path in nvme:
                wrong += asyncio.run(_check_stopped(path, progress))
    else:
        with _client(address) as store, _progress() as progress:
            wrong += store.check()
            for number, tier in enumerate(store.statistics().tiers[1:], start=1):
                wrong += _check_live(store, number, tier, progress)
    for line in wrong:
        print(line)
    if wrong:
        sys.exit(1)
    print("all is well")


def _check_live(store: StoreClient, number: int, tier: TierState, progress: Progress) -> Iterator[str]:
    task = progress.add_task(tier.name, total=tier.blocks)
    after = None
    while after != 0:
        verified = store.verify(number, after or 0)
        progress.advance(task, verified.blocks)
        yield from (f"{tier.name}: {name} is damaged; it was dropped" for name in verified.damaged)
        after = verified.after


async def _check_stopped(path: Path, progress: Progress) -> list[str]:
    from kvstore.node.verification import verify_stopped
    from kvstore.serve import stored_tier

    tier = stored_tier(path)
    wrong: list[str] = []
    try:
        task = progress.add_task(str(path), total=None)
        async for done, total, damaged in verify_stopped(tier):
            progress.update(task, completed=done, total=total)
            wrong += [f"{path}: {name} is damaged; a daemon will drop it when it is read" for name in damaged]
        if tier.found.damaged_records:
            wrong.append(f"{path}: {tier.found.damaged_records} records were damaged, and are cleared now")
        return wrong + tier.check()
    finally:
        tier.close()


def _progress() -> Progress:
    """A bar for each tier, on standard error; nothing where that is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _key(text: str) -> bytes:
    if not text.startswith("0x"):
        return os.fsencode(text)
    try:
        return bytes.fromhex(text[2:])
    except ValueError:
        sys.exit(f"kvstore: key {text!r} is no hex after 0x")


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except (KVStoreError, OSError, UnicodeError) as error:
        sys.exit(f"kvstore: {error}")


@contextmanager
def _client(address: str) -> Iterator[StoreClient]:
    with _errors(), StoreClient.connect(address, token=os.environ.get("KVSTORE_TOKEN")) as store:
        yield store
