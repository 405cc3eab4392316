"""What a node has done between two looks, and how a terminal shows it."""

import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from dataclasses import replace
from math import inf

import pytest
from rich.console import Console

from kvstore.block import Namespace
from kvstore.screen import rendered, salts_table
from kvstore.statistics import (
    LATENCY_BOUNDS_S,
    Latencies,
    NodeStatistics,
    SaltState,
    SaltUse,
    StoreCounters,
    TierCounters,
    TierState,
)
from kvstore.top import Calls, frame
from tests.node import Node, wait_for

ARENA = TierState("dram", "dram", 100, 100, 60, 40, 6, 55, 0, 0, 0, 0)
BEFORE = NodeStatistics("n", 7, 100.0, 3, 2, 0, 0, 0.004, 0.002, 0, 0, [ARENA])


def latencies(*seconds: float) -> Latencies:
    """Of calls that took so long."""
    observed = Latencies()
    for each in seconds:
        observed.observe(each)
    return observed


def disk(hits: int, written_bytes: int, reads: Latencies, **state: object) -> TierState:
    """A tier below the arena."""
    counters = TierCounters(hit_blocks=hits, written_bytes=written_bytes)
    tier = TierState("nvme", "nvme", 1000, 1000, 10, 990, 1, 10, 0, 0, 0, 0, counters=counters, reads=reads)
    return replace(tier, **state)  # type: ignore[arg-type]


def salt(name: str | None, hits: int, missed: int) -> SaltState:
    """A salt."""
    return SaltState(name, hits, missed, [SaltUse("dram", 1, 20), SaltUse("nvme", 2, 40)])


# Arithmetic.


def test_rates_are_those_of_the_interval_by_the_clock_of_the_daemon() -> None:
    before = replace(
        BEFORE,
        tiers=[ARENA, disk(10, 1000, latencies(0.2))],
        counters=StoreCounters(hit_blocks=100, missed_blocks=10),
        salts=[salt("a", 40, 4)],
    )
    now = replace(
        before,
        uptime_s=102.0,
        tiers=[ARENA, disk(30, 9000, latencies(0.2, 0.001, 0.001, 0.04))],
        counters=StoreCounters(hit_blocks=190, missed_blocks=20),
        salts=[salt("a", 70, 14), salt("b", 3, 1), salt(None, 0, 0)],
    )
    seen = frame(before, now)
    assert (seen.hits_per_s, seen.missed_per_s, seen.hit_rate) == (45, 5, 0.9)
    arena, nvme = seen.tiers
    assert (arena.reads, arena.writes, arena.failing) == (None, None, "")
    assert (nvme.hits_per_s, nvme.written_bytes_per_s) == (10, 4000)
    assert nvme.reads == Calls(3, 0.001, 0.05)
    a, b, others = seen.salts
    assert (a.medium_to_bytes, a.hits_per_s, a.missed_per_s) == ({"dram": 20, "nvme": 40}, 15, 5)
    assert (b.hits_per_s, b.hit_rate) == (1.5, 0.75)
    assert (others.label, others.hit_rate) == ("other", None)


def test_a_daemon_that_has_started_anew_is_measured_from_its_start() -> None:
    before = replace(BEFORE, counters=StoreCounters(hit_blocks=1000), tiers=[disk(500, 0, latencies(2.0))])
    now = replace(
        BEFORE,
        epoch=8,
        uptime_s=4.0,
        counters=StoreCounters(hit_blocks=20),
        tiers=[disk(8, 0, latencies(9.0))],
    )
    seen = frame(before, now)
    assert seen.hits_per_s == 5
    assert seen.tiers[0].hits_per_s == 2
    assert seen.tiers[0].reads == Calls(1, inf, inf)


def test_nothing_in_no_time_is_nothing() -> None:
    seen = frame(BEFORE, BEFORE)
    assert (seen.hits_per_s, seen.hit_rate, seen.tiers[0].hits_per_s) == (0, None, 0)


def test_a_salt_that_was_forgotten_meanwhile_has_no_rate_below_zero() -> None:
    before = replace(BEFORE, salts=[salt("a", 900, 90)])
    seen = frame(before, replace(BEFORE, uptime_s=101.0, salts=[salt("a", 3, 0)]))
    assert (seen.salts[0].hits_per_s, seen.salts[0].missed_per_s, seen.salts[0].hit_rate) == (0, 0, None)


def test_a_tier_that_is_left_alone_says_why() -> None:
    failing = disk(0, 0, Latencies(), breaker_open=True, failing="no answer within 2.0 s")
    assert frame(BEFORE, replace(BEFORE, tiers=[failing])).tiers[0].failing == "no answer within 2.0 s"
    unexplained = disk(0, 0, Latencies(), breaker_open=True)
    assert frame(BEFORE, replace(BEFORE, tiers=[unexplained])).tiers[0].failing == "it fails"


def test_how_full_a_remote_tier_is_is_not_said() -> None:
    remote = disk(0, 0, Latencies(), name="redis", medium="remote")
    (row,) = frame(BEFORE, replace(BEFORE, tiers=[remote])).tiers
    assert (row.used_bytes, row.capacity_bytes, row.blocks) == (None, None, 1)
    assert shown(replace(BEFORE, tiers=[remote]))[4].split() == [
        "redis",
        "remote",
        "-",
        "-",
        "-",
        "1",
        "0",
        "0",
        "ok",
    ]


def test_a_salt_has_bytes_in_each_medium() -> None:
    lines = shown(
        replace(BEFORE, salts=[salt("a", 1, 0), SaltState("b", 0, 0, [SaltUse("remote", 1, 5 << 20)])])
    )
    assert lines[-3].split() == ["salt", "dram", "nvme", "remote", "hits/s", "misses/s", "hit"]
    assert lines[-1].split()[1:8] == ["b", "0", "B", "0", "B", "5", "MiB"]


def shown(now: NodeStatistics) -> list[str]:
    """A frame in 80 columns."""
    console = Console(width=80)
    with console.capture() as capture:
        console.print(rendered(frame(BEFORE, now)))
    return capture.get().splitlines()


def test_all_buckets_have_their_place() -> None:
    calls = frame(BEFORE, replace(BEFORE, tiers=[disk(0, 0, latencies(*LATENCY_BOUNDS_S))])).tiers[0].reads
    assert calls == Calls(len(LATENCY_BOUNDS_S), 0.01, 2.5)


# The terminal.


@pytest.fixture(scope="module")
def shared() -> Iterator[Node]:
    """A daemon."""
    with Node() as node:
        with node.client() as store:
            store.put(Namespace(model="top", salt="tenant\x1b[31m[red]"), b"k", bytes(5000))
        yield node


def command(node: Node, *flags: str) -> list[str]:
    """To be run."""
    return [sys.executable, "-m", "kvstore", "top", "--address", node.address, *flags]


def test_one_frame_is_printed_where_there_is_no_terminal(shared: Node) -> None:
    for flags in (["--interval", "0.1"], ["--interval", "0.1", "--once"]):
        done = subprocess.run(command(shared, *flags), capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        assert f"epoch {frame_epoch(shared)}" in done.stdout
        assert "dram" in done.stdout
        assert (
            "tenant\\x1b[31m[red]" in done.stdout
        )  # a salt is shown, and neither obeyed nor taken for markup
        assert "\x1b" not in done.stdout


def frame_epoch(node: Node) -> int:
    """The daemon's."""
    with node.client() as store:
        return store.statistics().epoch


def test_a_daemon_that_is_not_there_is_a_clear_error(shared: Node) -> None:
    done = subprocess.run(
        [*command(shared, "--once")[:-3], "--address", "unix:/nowhere/node.sock"],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "/nowhere/node.sock" in done.stderr


@pytest.mark.parametrize("end", ["q", "interrupt"])
def test_the_view_goes_on_until_it_is_ended_and_leaves_the_terminal_as_it_was(shared: Node, end: str) -> None:
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    environ = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
    process = subprocess.Popen(
        command(shared, "--interval", "0.05"),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environ,
        # Whoever runs the tests in the background may ignore it, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    shown = b""

    def frames() -> int:
        nonlocal shown
        while select.select([ours], [], [], 0)[0]:
            shown += os.read(ours, 65536)
        return shown.count(b"salts with most")

    try:
        wait_for(lambda: frames() >= 4)
        if end == "q":
            os.write(ours, b"xq")
        else:
            process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + 20
        while process.poll() is None:
            frames()
            assert time.monotonic() < deadline
        assert process.returncode == 0, shown[-2000:]
        assert b"Traceback" not in shown
        assert termios.tcgetattr(theirs) == before
    finally:
        process.kill()
        process.wait()
        os.close(ours)
        os.close(theirs)


def test_salts_are_told_of_with_what_they_have() -> None:
    table = salts_table([salt("a", 1, 2), salt(None, 0, 0)])
    assert [column.header for column in table.columns] == ["salt", "", "dram", "nvme", "hits", "misses"]
    assert [str(cell) for cell in table.columns[2].cells] == ["20 B", "20 B"]
