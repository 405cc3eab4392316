"""A daemon's process, forked from one that has imported all it needs: a start takes milliseconds of a core.

What runs is `python -m MODULE ARGUMENTS` from its first line to its exit status, on streams and with an
environment of its own. That it also runs in a fresh interpreter is for the tests of the command line to say.
"""

import os
import runpy
import signal
import sys
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

FORKS: Final = get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "kvstore.cli",
        "kvstore.serve",
        "kvstore.index.main",
        "uvloop",
        "connectors.proxy.serving",
        "tests.forked",
        "tests.stress_client",
    ]
)


class Forked:
    """As much of `subprocess.Popen` as tests use. Ends with the process that has started it."""

    def __init__(self, words: Sequence[str], log: Path, environ: dict[str, str]) -> None:
        ours, theirs = FORKS.Pipe(duplex=False)
        arguments = (words, theirs, str(log), environ)
        self._process = FORKS.Process(target=_run, args=arguments, daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid
        theirs.close()
        self.stdout = os.fdopen(os.dup(ours.fileno()))
        ours.close()

    def poll(self) -> int | None:
        """Its exit status, as soon as it has one."""
        return self._process.exitcode

    def wait(self, timeout_s: float | None = None) -> int:
        """Its exit status; fails when it does not end within the time."""
        self._process.join(timeout_s)
        status = self.poll()
        assert status is not None, f"process {self.pid} does not end"
        return status

    def send_signal(self, number: signal.Signals) -> None:
        """Unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


def _run(words: Sequence[str], stdout: Connection, log: str, environ: dict[str, str]) -> None:
    os.dup2(stdout.fileno(), 1)
    stdout.close()
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(file, 2)
    os.close(file)
    os.environ.clear()
    os.environ.update(environ)
    module, *sys.argv[1:] = words
    runpy.run_module(module, run_name="__main__", alter_sys=True)
