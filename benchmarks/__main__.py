"""`python -m benchmarks [NAME ...] [--json FILE]`: run benchmarks, print tables, write rows."""

import argparse
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Final, Protocol, cast

from rich.console import Console

from benchmarks.harness import ROUNDS_MIN, Report, Settings
from benchmarks.processes import Cores, cores_of_this_process
from benchmarks.report import describe_machine, print_machine, print_report, write_json

_OF_NODES: Final = ("node", "scale", "allocator", "trace", "nvme", "tiers", "redis", "lmcache")
NAMES: Final = (*_OF_NODES, "lookup", "ingest", "routing", "http")
QUICK_ROUNDS: Final = 2


class Benchmark(Protocol):
    """A module of this package that measures something."""

    def run(self, settings: Settings) -> Report:
        """Measure, and leave nothing running."""
        ...


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the named benchmarks, or all. Whether targets are met is printed, and is no exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(NAMES):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS_MIN)
    cores = options.cores or cores_of_this_process()
    settings = Settings(rounds=rounds, quick=options.quick, cores=cores, plot=options.plot)
    # Wide enough for every column where the output is no terminal, as in a file.
    console = Console(width=None if Console().is_terminal else 160)
    machine = describe_machine()
    print_machine(machine, console)
    reports = []
    for name in options.names or NAMES:
        benchmark = cast(Benchmark, import_module(f"benchmarks.{name}"))
        report = benchmark.run(settings)
        reports.append(report)
        print_report(report, settings, console)
    if options.json:
        write_json(options.json, reports, settings, machine)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; default: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows, machine, versions and date")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw what routing finds, as SVG")
    parser.add_argument("--rounds", type=int, help=f"default {ROUNDS_MIN}; {QUICK_ROUNDS} with --quick")
    parser.add_argument("--quick", action="store_true", help="show that it works; the figures mean nothing")
    parser.add_argument("--cores", type=_cores, metavar="CLIENT,SERVER", help="default: the first two")
    return parser


def _cores(text: str) -> Cores:
    client, server = (int(word) for word in text.split(","))
    return Cores(client, server, cores_of_this_process().all)


if __name__ == "__main__":
    main()
