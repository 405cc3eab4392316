"""The store's daemon as a child process. It starts and stops; what it says is not looked at."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_READY_WITHIN_S: Final = 30.0
_STOPPED_WITHIN_S: Final = 10.0


@contextmanager
def running_daemon(
    socket: Path, dram: str, *, nvme: str = "", redis: str = ""
) -> Iterator[subprocess.Popen[bytes]]:
    """A daemon that listens on `socket`, until the block ends; then SIGTERM, as an operator would.

    Below its arena it has what is given: `nvme`, a directory and its size, and `redis`, a URL.

    Raises:
        SystemExit: it did not come up, or did not end well, unless it was killed within the block.
    """
    command = [sys.executable, "-m", "kvstore", "serve", "--dram", dram]
    for flag, value in (("--nvme", nvme), ("--redis", redis)):
        command += [flag, value] if value else []
    command += ["--socket", str(socket), "--http", "127.0.0.1:0"]
    socket.unlink(missing_ok=True)
    daemon = subprocess.Popen(command)
    try:
        _wait_until_ready(daemon, socket)
        yield daemon
        if daemon.poll() == -signal.SIGKILL:
            return
        daemon.send_signal(signal.SIGTERM)
        if (status := daemon.wait(_STOPPED_WITHIN_S)) != 0:
            raise SystemExit(f"the daemon ended with status {status}")
    except subprocess.TimeoutExpired as exc:
        raise SystemExit(f"the daemon did not end within {_STOPPED_WITHIN_S:.0f} s of SIGTERM") from exc
    finally:
        daemon.kill()
        daemon.wait()


def _wait_until_ready(daemon: subprocess.Popen[bytes], socket: Path) -> None:
    deadline = time.monotonic() + _READY_WITHIN_S
    while not socket.exists():
        if daemon.poll() is not None:
            raise SystemExit(f"the daemon ended with status {daemon.returncode} before it listened")
        if time.monotonic() > deadline:
            raise SystemExit(f"the daemon does not listen on {socket} after {_READY_WITHIN_S:.0f} s")
        time.sleep(0.02)
