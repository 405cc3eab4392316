"""Reports as a table for people and as JSON for machines. It judges nothing."""

import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import msgspec
from rich.console import Console
from rich.table import Table

from benchmarks.harness import Report, Row, Settings, Verdict

_MET: Final = {True: "[green]met[/]", False: "[red]missed[/]", None: "[yellow]not measured[/]"}
# Processes that ran or wanted to in the last minute, on average.
IDLE_LOAD_MAX: Final = 0.3
# Peers in one table, beyond which there is no room for ratios.
_RATIOS_MAX: Final = 5
_HUGE_PAGES: Final = Path("/sys/kernel/mm/transparent_hugepage")


def print_machine(machine: Mapping[str, Any], console: Console) -> None:
    """One line, and a warning when others use the machine too."""
    console.print(", ".join(f"{name} {value}" for name, value in machine.items()), markup=False)
    if machine["load"] > IDLE_LOAD_MAX:
        console.print("[yellow]Others are using this machine: expect noise, most of all beside limits.[/]")


def print_report(report: Report, settings: Settings, console: Console) -> None:
    """The rows, then every target's row, then the peers that are missing."""
    console.print(_row_table(report, settings))
    if report.verdicts:
        console.print(_verdict_table(report.verdicts))
    for name, remedy in report.missing.items():
        console.print(f"[yellow]{name} is missing:[/] ", end="")
        console.print(remedy, markup=False)


def write_json(path: Path, reports: Sequence[Report], settings: Settings, machine: Mapping[str, Any]) -> None:
    """All reports in one file: rows with what is needed to judge and to repeat them."""
    versions = {name: text for report in reports for name, text in report.versions.items()}
    contents: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine,
        "versions": {"python": platform.python_version(), "numpy": version("numpy"), **versions},
        "rounds": settings.rounds,
        "quick": settings.quick,
        "captions": {report.bench: report.caption for report in reports},
        "missing": {name: text for report in reports for name, text in report.missing.items()},
        "targets": {report.bench: report.verdicts for report in reports},
        "rows": [row for report in reports for row in report.rows],
    }
    path.write_bytes(msgspec.json.format(msgspec.json.encode(contents), indent=2) + b"\n")


def describe_machine() -> dict[str, Any]:
    """What the figures depend on and nobody chose for this run; `load` is the others' when it begins."""
    return {
        "cpu": _first("/proc/cpuinfo", "model name"),
        "cores": len(os.sched_getaffinity(0)),
        "memory": _first("/proc/meminfo", "MemTotal"),
        "kernel": platform.release(),
        "huge_pages": _chosen("enabled"),
        "huge_pages_shared": _chosen("shmem_enabled"),
        "load": round(os.getloadavg()[0], 2),
    }


def _row_table(report: Report, settings: Settings) -> Table:
    rounds = f"medians of {settings.rounds} interleaved rounds"
    title = f"{report.bench}: {'QUICK, figures mean nothing; ' if settings.quick else ''}{rounds}"
    table = Table(title=title, caption=report.caption, caption_justify="left", title_justify="left")
    names = sorted({name for row in report.rows for name in row.peers})
    table.add_column("case")
    table.add_column("unit")
    beside = [
        word for name in names for word in ((name, "ours/it") if len(names) <= _RATIOS_MAX else (name,))
    ]
    for heading in ("ours", "limit", "of limit", *beside):
        table.add_column(heading, justify="right")
    table.add_column("limit is")
    for row in report.rows:
        table.add_row(*_cells(row, names))
    return table


def _cells(row: Row, names: Sequence[str]) -> list[str]:
    of_limit = f"{row.times(row.limit.value):.2f}"
    cells = [row.case, row.unit, figure(row.ours), figure(row.limit.value), of_limit]
    for name in names:
        value = row.peers.get(name)
        both = ["", ""] if value is None else [figure(value), f"{row.times(value):.2f}"]
        cells += both if len(names) <= _RATIOS_MAX else both[:1]
    return [*cells, row.limit.name]


def _verdict_table(verdicts: Sequence[Verdict]) -> Table:
    table = Table(title="targets", title_justify="left")
    table.add_column("case")
    table.add_column("target")
    table.add_column("got", justify="right")
    table.add_column("")
    for verdict in verdicts:
        got = "" if verdict.got is None else figure(verdict.got)
        table.add_row(verdict.case, verdict.wanted, got, _MET[verdict.met])
    return table


def figure(value: float) -> str:
    """Three significant digits, without an exponent."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"


def _first(path: str, name: str) -> str:
    lines = (line.partition(":") for line in Path(path).read_text().splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == name), "unknown")


def _chosen(name: str) -> str:
    """The bracketed one of the kernel's choices."""
    path = _HUGE_PAGES / name
    return path.read_text().partition("[")[2].partition("]")[0] if path.exists() else "unknown"
