"""What `kvstore top` and `kvstore stats` show of a node, as tables; and the live view in a terminal."""

import os
import select
import termios
import time
import tty
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from math import isinf
from typing import Annotated, Final

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kvstore.errors import Unavailable
from kvstore.options import HERE, Address, client
from kvstore.statistics import SaltState
from kvstore.top import Calls, Frame, SaltRow, TierRow, frame

app = typer.Typer()

# Where the output is no terminal, which would say how wide it is.
_COLUMNS: Final = 100
_SALT_CHARS_MAX: Final = 24


@app.command()
def top(
    interval: Annotated[float, typer.Option(help="seconds between two looks", min=0.05, max=3600)] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="one look, over one interval")] = False,
    address: Address = HERE,
) -> None:
    """Show what a daemon has and does, again each second until q; once where the output is no terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_COLUMNS)
    with client(address) as store, suppress(KeyboardInterrupt):
        before = store.statistics()
        if once or not console.is_terminal:
            time.sleep(interval)
            console.print(rendered(frame(before, store.statistics())))
            return
        live = Live(rendered(frame(before, before)), console=console, screen=True, auto_refresh=False)
        with _keys() as ended, live:
            while not ended(interval):
                try:
                    now = store.statistics()
                except Unavailable as error:
                    live.update(Text(str(error)), refresh=True)
                    continue
                live.update(rendered(frame(before, now)), refresh=True)
                before = now


def rendered(now: Frame) -> RenderableType:
    """A frame for the terminal, in 80 columns."""
    return Group(_head(now), _tiers(now.tiers), _calls(now.tiers), _salts(now.salts))


def salts_table(salts: Sequence[SaltState]) -> Table:
    """What salts have and have found since they came into use."""
    table = _table("salts", "salt", "", *_media(salts), "hits", "misses")
    for salt in salts:
        counts = [f"{salt.hit_blocks:,}", f"{salt.missed_blocks:,}"]
        _add(table, salt.label, _plain(salt.salt), *_bytes_in(_media(salts), salt), *counts)
    return table


def _head(now: Frame) -> Text:
    up = timedelta(seconds=int(now.uptime_s))
    late = f"{_seconds(now.loop_late_max_s)} late at most, {_seconds(now.loop_stall_max_s)} busy"
    return Text(
        f"node {_plain(now.node)}  epoch {now.epoch}  up {up}  {now.connections} connections\n"
        f"hit {_percent(now.hit_rate)}  {now.hits_per_s:,.0f} hits/s  {now.missed_per_s:,.0f} misses/s  "
        f"loop {late}"
    )


def _tiers(tiers: Sequence[TierRow]) -> Table:
    table = _table("tiers", "tier", "medium", "used", "of", "", "blocks", "hits/s", "misses/s", "state")
    for tier in tiers:
        _add(
            table,
            tier.name,
            tier.medium,
            *_fill(tier.used_bytes, tier.capacity_bytes),
            f"{tier.blocks:,}",
            f"{tier.hits_per_s:,.0f}",
            f"{tier.missed_per_s:,.0f}",
            f"left alone: {tier.failing}" if tier.failing else "ok",
        )
    return table


def _calls(tiers: Sequence[TierRow]) -> Table:
    table = _table("calls", "tier", "read MB/s", "p50", "p99", "write MB/s", "p50", "p99", "backlog")
    for tier in tiers[1:]:  # clients read and write the arena by themselves
        _add(
            table,
            tier.name,
            f"{tier.read_bytes_per_s / 1e6:,.1f}",
            *_percentiles(tier.reads),
            f"{tier.written_bytes_per_s / 1e6:,.1f}",
            *_percentiles(tier.writes),
            f"{tier.backlog_blocks:,}, {_bytes(tier.backlog_bytes)}",
        )
    return table


def _salts(salts: Sequence[SaltRow]) -> Table:
    table = _table("salts with most", "salt", "", *_media(salts), "hits/s", "misses/s", "hit")
    for salt in salts:
        rates = [f"{salt.hits_per_s:,.0f}", f"{salt.missed_per_s:,.0f}", _percent(salt.hit_rate)]
        _add(table, salt.label, _plain(salt.salt), *_bytes_in(_media(salts), salt), *rates)
    return table


def _media(salts: Sequence[SaltState] | Sequence[SaltRow]) -> list[str]:
    return list(dict.fromkeys(medium for salt in salts for medium in salt.medium_to_bytes))


def _bytes_in(media: Sequence[str], salt: SaltState | SaltRow) -> list[str]:
    return [_bytes(salt.medium_to_bytes.get(medium, 0)) for medium in media]


def _fill(used_bytes: int | None, capacity_bytes: int | None) -> tuple[str, str, str]:
    if used_bytes is None or not capacity_bytes:
        return "-", "-", "-"
    return _bytes(used_bytes), _bytes(capacity_bytes), _percent(used_bytes / capacity_bytes)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        words = column in ("tier", "medium", "salt", "", "state")
        table.add_column(column, justify="left" if words else "right", no_wrap=column != "state")
    return table


def _add(table: Table, *cells: str) -> None:
    """A row of plain text: what others have named is no markup."""
    table.add_row(*map(Text, cells))


def _plain(text: str | None) -> str:
    """A name without what a terminal would obey, and not too long."""
    shown = "" if text is None else text.encode("unicode_escape").decode()
    return shown if len(shown) <= _SALT_CHARS_MAX else f"{shown[: _SALT_CHARS_MAX - 3]}..."


def _percentiles(calls: Calls | None) -> tuple[str, str]:
    return ("-", "-") if calls is None else (_at_most(calls.p50_s), _at_most(calls.p99_s))


def _at_most(seconds: float) -> str:
    return "longer" if isinf(seconds) else f"<={_seconds(seconds)}"


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _bytes(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.3g} {unit}" if unit != "B" else f"{nbytes:.0f} B"
        nbytes /= 1024
    return f"{nbytes:,.3g} TiB"


@contextmanager
def _keys() -> Iterator[Callable[[float], bool]]:
    """A function that waits so many seconds, less when a key is pressed; whether that was q, or the end."""
    keyboards = [0] if os.isatty(0) else []

    def ended(wait_s: float) -> bool:
        if not select.select(keyboards, [], [], wait_s)[0]:
            return False
        keys = os.read(0, 64)
        return not keys or b"q" in keys

    before = [(keyboard, termios.tcgetattr(keyboard)) for keyboard in keyboards]
    for keyboard in keyboards:
        tty.setcbreak(keyboard)
    try:
        yield ended
    finally:
        for keyboard, attributes in before:
            termios.tcsetattr(keyboard, termios.TCSADRAIN, attributes)
