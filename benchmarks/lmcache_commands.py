"""LMCache's command line in a process that has imported it: each command in a fork of it, and not after
seconds of importing. It knows no benchmark.

As a program (`python -m benchmarks.lmcache_commands`) it is that process: for every line that comes in, a
JSON list of the log's path and the command's words, a line with the exit status goes out.
"""

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Final, NoReturn

from benchmarks.harness import BenchmarkError

COMMAND_S_MAX: Final = 180.0
_ROOT: Final = Path(__file__).parent.parent
# Unless told not to, LMCache reports its use to its makers.
_ENVIRONMENT: Final = {
    "LMCACHE_TRACK_USAGE": "false",
    "LMCACHE_DISABLE_BANNER": "1",
    "LMCACHE_LOG_LEVEL": "WARNING",
}
_CLI: Final = "lmcache.cli.main"
# What the bench of adapters imports when it begins.
_BENCH: Final = "lmcache.cli.commands.bench.l2_adapter_bench.runner"
_FACTORY: Final = "lmcache.v1.distributed.l2_adapters.factory"


class Commands:
    """Runs commands of LMCache, one at a time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            # What LMCache imports warns of much.
            [sys.executable, "-W", "ignore", "-m", "benchmarks.lmcache_commands"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=_ROOT,
            env={**os.environ, **_ENVIRONMENT},
            start_new_session=True,
        )

    def run(self, words: Sequence[str], log: Path) -> int:
        """Run one command, whose output goes to `log`; its exit status.

        Raises:
            BenchmarkError: it has not ended after COMMAND_S_MAX, or the process has.
        """
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None
        assert answers is not None
        requests.write(json.dumps([str(log), *words]).encode() + b"\n")
        requests.flush()
        ready, _, _ = select.select([answers], [], [], COMMAND_S_MAX)
        if not ready:
            raise BenchmarkError(f"lmcache {' '.join(words)} has not ended after {COMMAND_S_MAX} s")
        if not (answer := answers.readline()):
            raise BenchmarkError("the process that runs LMCache's commands has ended; it has said why above")
        return int(answer)

    def close(self) -> None:
        """Kill the process, and what it runs."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()


def serve() -> None:
    """Answer until there are no more lines."""
    cli = import_module(_CLI)
    import_module(_BENCH)
    # Looking for an adapter's module imports all before it, in the order of their names.
    import_module(_FACTORY).ensure_adapter_loaded("resp")
    for line in sys.stdin:
        log, *words = json.loads(line)
        pid = os.fork()
        if not pid:
            _run(cli, words, log)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _run(cli: Any, words: list[str], log: str) -> NoReturn:
    status = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(output, 1)
        os.dup2(output, 2)
        cli.main(words)  # it exits with 1 after printing what was raised
        status = 0
    except SystemExit as exc:
        status = exc.code if isinstance(exc.code, int) else 1
    finally:
        sys.stdout.flush()
        os._exit(status)  # what LMCache leaves behind can hang an exit


if __name__ == "__main__":
    serve()
