"""Our daemon, NVMe or Redis below its arena, to be killed and started again. It measures only its start."""

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from benchmarks.harness import BenchmarkError
from benchmarks.processes import start_process, stop_process, wait_for
from kvstore.block import Medium
from kvstore.client import StoreClient
from kvstore.statistics import NodeStatistics, TierState

WAIT_S_MAX: Final = 120.0
_POLL_S: Final = 0.01


@dataclass(frozen=True, slots=True)
class Place:
    """A directory for a tier, and its size."""

    folder: Path
    capacity_bytes: int


class Daemon:
    """`kvstore serve` with its socket in a directory; `ready_s` is how long its last start took."""

    def __init__(self, directory: Path, dram_bytes: int, nvme: Place | None, redis: str = "") -> None:
        self._directory = directory
        socket = directory / "node.sock"
        self.address = f"unix:{socket}"
        self._command = [sys.executable, "-m", "kvstore", "serve", "--dram", str(dram_bytes)]
        self._command += ["--socket", str(socket), "--http", "127.0.0.1:0"]
        if nvme is not None:
            self._command += ["--nvme", f"{nvme.folder}:{nvme.capacity_bytes}"]
        if redis:
            # What is not written must not leave the arena: readers want all of it back.
            config = directory / "node.toml"
            config.write_text(f'[redis]\nurl = "{redis}"\nwrite = "owed"\n')
            self._command += ["--config", str(config)]
        self._process: subprocess.Popen[bytes] | None = None
        self.ready_s = 0.0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._process is not None:
            stop_process(self._process)

    def start(self) -> None:
        """Return once it says that it is ready."""
        log = self._directory / "node.log"
        begin = time.monotonic()
        self._process = start_process(self._command, log)
        wait_for(lambda: b"kvstore ready" in log.read_bytes(), self._process, log)
        self.ready_s = time.monotonic() - begin

    def kill(self) -> None:
        """SIGKILL."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def client(self) -> StoreClient:
        """A new client, which the caller closes."""
        return StoreClient.connect(self.address, timeout_s=30.0)


def settle(client: StoreClient) -> None:
    """Return once the arena has its memory and everything is written that is to be written."""
    wait_until(client, lambda tier: tier.ready_bytes == tier.capacity_bytes and not tier.backlog_blocks)


def wait_until(client: StoreClient, holds: Callable[[TierState], bool]) -> None:
    """Return once all tiers are as they should be."""
    deadline = time.monotonic() + WAIT_S_MAX
    while not all(map(holds, client.statistics().tiers)):
        if time.monotonic() > deadline:
            raise BenchmarkError(f"the tiers do not settle: {client.statistics().tiers}")
        time.sleep(_POLL_S)


def tier_of(statistics: NodeStatistics, medium: Medium) -> TierState:
    """The node's tier of a medium that it has once."""
    (tier,) = (tier for tier in statistics.tiers if tier.medium == medium)
    return tier
