"""vLLM engines as processes of the engines' environment. Each ends, or is killed, with its test."""

import json
import os
import select
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from tests.engines.engine import Answer
from tests.lmcache_processes import ENVIRON, Server, end_group

_ROOT: Final = Path(__file__).parents[2]
ENGINES: Final = _ROOT / ".venv-engines"
# On two cores an engine is ready after 12 to 30 s.
_READY_WITHIN_S: Final = 150.0
_ANSWER_WITHIN_S: Final = 60.0
_END_WITHIN_S: Final = 30.0
ENGINE_ENVIRON: Final = {
    **ENVIRON,
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    # In one process vLLM 0.32 for the CPU does not start with LMCache: it stumbles over a module of ctypes.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


class Engine:
    """A vLLM process with the model that lies at `folder / model`. It starts in the background.

    It has a process group of its own, so that its children end with it.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        model: str,
        lmcache: Server | None = None,
        events: dict[str, object] | None = None,
    ) -> None:
        python = ENGINES / "bin" / "python"
        assert python.exists(), f"no {ENGINES.name} here; run these tests with `make test-engines`"
        command = [str(python), str(Path(__file__).with_name("engine.py")), model]
        command.append("" if lmcache is None else json.dumps(lmcache.transfer))
        command.append("" if events is None else json.dumps(events))
        self._log = folder / f"{name}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=folder,
                # VLLM_RPC_BASE_PATH is where it leaves sockets behind.
                env={**os.environ, **ENGINE_ENVIRON, "VLLM_RPC_BASE_PATH": str(folder)},
                start_new_session=True,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._questions, self._answers = self._process.stdin, self._process.stdout
        self._is_ready = False

    def ready(self) -> Self:
        """Wait until it takes prompts."""
        if not self._is_ready:
            self._line(_READY_WITHIN_S)
            self._is_ready = True
        return self

    def ask(self, prompt: Sequence[int]) -> Answer:
        """What it generates."""
        self.ready()
        self._questions.write(json.dumps(prompt).encode() + b"\n")
        self._questions.flush()
        return Answer(**json.loads(self._line(_ANSWER_WITHIN_S)))

    def end(self) -> None:
        """Let it end while others go on."""
        self._questions.close()

    def stop(self) -> None:
        """End it, if need be with SIGKILL; no process of it is left when this returns."""
        self.end()
        end_group(self._process, _END_WITHIN_S)
        self._answers.close()

    def _line(self, within_s: float) -> bytes:
        deadline, line = time.monotonic() + within_s, b""
        while not line.endswith(b"\n"):
            readable, _, _ = select.select([self._answers], [], [], max(0.0, deadline - time.monotonic()))
            assert readable, self._why(f"no line within {within_s} s")
            piece = os.read(self._answers.fileno(), 1 << 16)
            assert piece, self._why("the engine has ended")
            line += piece
        return line

    def _why(self, what: str) -> str:
        """A message for a failure: what failed, and the end of the log."""
        return f"{what}; the end of {self._log.name}:\n{self._log.read_text(errors='replace')[-6000:]}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
