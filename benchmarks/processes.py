"""Child processes and what the kernel knows of them: cores, memory, ports. It measures no speed."""

import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

START_S_MAX: Final = 60.0
STOP_S_MAX: Final = 20.0
_POLL_S: Final = 0.002


class ChildFailed(Exception):
    """A child process did not come up; the text ends with the end of its log."""


@dataclass(frozen=True, slots=True)
class Cores:
    """Where processes run: the client and the servers on one core each, or all on any."""

    client: int
    server: int
    all: frozenset[int]

    def __str__(self) -> str:
        return f"client on core {self.client}, servers on core {self.server}, of {len(self.all)} cores"


def cores_of_this_process() -> Cores:
    """The first two cores that this process may use; the same one twice where there is no second."""
    mine = sorted(os.sched_getaffinity(0))
    return Cores(mine[0], mine[1 % len(mine)], frozenset(mine))


def pin(pid: int, cores: Iterable[int]) -> None:
    """Move every thread of a process to `cores`; threads that it starts later inherit them."""
    wanted = set(cores)
    for task in os.listdir(f"/proc/{pid}/task"):
        with suppress(ProcessLookupError):  # the thread has ended since it was listed
            os.sched_setaffinity(int(task), wanted)


def start_process(command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a child whose output goes to `log`."""
    with log.open("wb") as output:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    """Return once `condition` holds.

    Raises:
        ChildFailed: the process ended, or START_S_MAX passed.
    """
    deadline = time.monotonic() + START_S_MAX
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            state = "took too long" if process.poll() is None else f"ended with {process.returncode}"
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise ChildFailed(f"{process.args!r} {state}:\n{tail}")
        time.sleep(_POLL_S)


def stop_process(process: subprocess.Popen[bytes]) -> None:
    """Ask a child to end, and insist after STOP_S_MAX."""
    process.terminate()
    try:
        process.wait(STOP_S_MAX)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def private_bytes(pid: int) -> int:
    """A process's resident memory that is not shared memory, which is where arenas are."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    resident, shared = (int(fields[name].split()[0]) for name in ("VmRSS", "RssShmem"))
    return (resident - shared) << 10


def free_ports(count: int) -> list[int]:
    """TCP ports on loopback that nobody listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in sockets]
    for listener in sockets:
        listener.close()
    return ports


def listens(port: int) -> bool:
    """Whether someone accepts connections on this port of loopback."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
