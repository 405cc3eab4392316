"""The commands of whoever operates a node. They ask a daemon, and print; they decide nothing."""

import asyncio
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from kvstore.block import Medium, Namespace
from kvstore.client import Hold, StoreClient
from kvstore.messages import Drained
from kvstore.options import HERE, Address, AsJson, Model, Salt, client, errors, key_of
from kvstore.screen import salts_table
from kvstore.statistics import Latencies, TierState

app = typer.Typer()

Keys = Annotated[list[str], typer.Argument(help="a prefix: keys, head first")]
# How often a drain says how far it is.
_TELL_S = 2.0
_SPACE = {"capacity_bytes", "ready_bytes", "used_bytes", "largest_free_bytes", "limit_bytes"}


@app.command()
def stats(address: Address = HERE, as_json: AsJson = False) -> None:
    """Show what a daemon has and has done."""
    with client(address) as store:
        now = store.statistics()
    statistics = asdict(now)
    if as_json:
        print(json.dumps(statistics))
        return
    console = Console()
    tiers, counters, _ = statistics.pop("tiers"), statistics.pop("counters"), statistics.pop("salts")
    console.print(_table("node", statistics))
    for tier in tiers:
        console.print(_table(f"tier {tier['name']}", _tier_rows(tier)))
    console.print(salts_table(now.salts))
    console.print(_table("since start", counters))


def _tier_rows(tier: dict[str, Any]) -> dict[str, Any]:
    """What a tier has and has done, one row each; of latencies the mean and the 99th percentile's bucket.

    How full a remote tier is, no node knows.
    """
    unsaid = {"counters", "reads", "writes"} | (_SPACE if tier["medium"] == Medium.REMOTE else set())
    rows = {name: value for name, value in tier.items() if name not in unsaid}
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
def drain(
    timeout_s: Annotated[float, typer.Option("--timeout", help="seconds to wait; 0 to begin only")] = 60.0,
    cancel: Annotated[bool, typer.Option("--cancel", help="take new blocks again")] = False,
    address: Address = HERE,
) -> None:
    """Before a daemon stops: take nothing new, and write what only its arena has to the tiers below.

    Readers go on. Exits with 1 when something remains; the daemon then drains on, until it is cancelled.
    """
    deadline = time.monotonic() + timeout_s
    with client(address) as store:
        if cancel:
            store.drain(cancel=True)
            print("takes new blocks again")
            return
        told = ""
        while True:
            wait_s = min(max(0.0, deadline - time.monotonic()), _TELL_S)
            now = store.drain(wait_s)
            done = now.draining and not (now.blocks or now.leases or now.owed_blocks)
            over = done or now.over or not now.draining or not now.tiers or time.monotonic() >= deadline
            if told != (told := _remains(now)) or over:
                print("; ".join([told, *now.away]), flush=True)
            if over:
                sys.exit(not done)


def _remains(now: Drained) -> str:
    blocks = f"{now.blocks:,} blocks ({now.block_bytes >> 20:,} MiB)"
    if not now.draining:
        return f"somebody has cancelled it; {blocks} are in the arena only"
    if not now.tiers:
        return f"draining; there is no tier below, so {blocks} will be lost with the daemon"
    if not (now.blocks or now.leases or now.owed_blocks):
        return "drained: everything is below"
    owed = f"{now.owed_blocks:,} are owed to tiers that work"
    return f"draining; {blocks} are in no tier below, {owed}, {now.leases} writers are not done"


@app.command()
def prefetch(
    keys: Keys, model: Model, salt: Salt = "", address: Address = HERE, as_json: AsJson = False
) -> None:
    """Load a prefix into a daemon's arena, from wherever it is below. Exits with 1 when nothing is there."""
    with client(address) as store:
        hold = store.prefetch(Namespace(model=model, salt=salt), list(map(key_of, keys)))
    _print_hold(hold, as_json=as_json)


@app.command()
def pin(
    keys: Keys,
    model: Model,
    for_s: Annotated[float, typer.Option("--for", help="seconds, up to 3600")],
    salt: Salt = "",
    address: Address = HERE,
    as_json: AsJson = False,
) -> None:
    """Load a prefix and hold it in a daemon's arena for a time. Exits with 1 when nothing is there."""
    with client(address) as store:
        hold = store.pin(Namespace(model=model, salt=salt), list(map(key_of, keys)), for_s)
    _print_hold(hold, as_json=as_json)


def _print_hold(hold: Hold, *, as_json: bool) -> None:
    values = hold._asdict()
    if as_json:
        print(json.dumps(values))
    else:
        print("  ".join(f"{name} {value}" for name, value in values.items()))
    if not (hold.pinned or hold.loading):
        sys.exit(1)


@app.command()
def unpin(
    hold: Annotated[int, typer.Argument(help="the id that pin has printed")], address: Address = HERE
) -> None:
    """End what pin has begun, before its time."""
    with client(address) as store:
        store.unpin(hold)


@app.command()
def clear(
    model: Annotated[str | None, typer.Option(help="of this model")] = None,
    salt: Annotated[str | None, typer.Option(help='of this salt; "" for blocks without one')] = None,
    timeout_s: Annotated[float, typer.Option("--timeout", help="seconds it may take")] = 60.0,
    address: Address = HERE,
) -> None:
    """Remove all blocks of a model, of a salt, or of both, for good, in all tiers of a daemon.

    Of a tier that nodes share goes what this daemon knows of there. It asks nothing.
    """
    if model is None and salt is None:
        raise typer.BadParameter("give --model, --salt or both")
    with client(address) as store:
        print(f"{store.clear(model=model, salt=salt, timeout_s=timeout_s):,} blocks")


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
        with errors(), _progress() as progress:
            for path in nvme:
                wrong += asyncio.run(_check_stopped(path, progress))
    else:
        with client(address) as store, _progress() as progress:
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
