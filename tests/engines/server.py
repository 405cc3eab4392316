"""vLLM's OpenAI server, several of them: one import, and a process group for each. It judges nothing.

    python server.py MODEL PORT:EVENTS_PORT:REPLAY_PORT ...

A line of JSON on stdout names the processes that lead the groups. All of them end with stdin. An engine takes
processes of its own, each of which would import vLLM for ten seconds anew: here they are forked. It runs in
the engines' environment and imports nothing of this project.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
from typing import Any


def main(model: str, *places: str) -> None:
    """Serve until stdin ends."""
    # vLLM prints to stdout too: from here on that is stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _import_all()
    pids = [_forked(model, *place.split(":")) for place in places]
    print(json.dumps(pids), file=answers, flush=True)
    sys.stdin.read()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    os._exit(0)  # it takes long to take apart what was imported


def _import_all() -> None:
    """What an engine's processes import; none of it may start threads."""
    import vllm.entrypoints.launchers.cli_args
    import vllm.model_executor.models.llama
    import vllm.v1.engine.async_llm
    import vllm.v1.engine.core
    import vllm.v1.executor.multiproc_executor
    import vllm.v1.worker.cpu_worker  # noqa: F401


def _forked(model: str, port: str, events: str, replay: str) -> int:
    """The process that serves there."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.close(0)
        try:
            _serve(model, port, f"tcp://*:{events}", f"tcp://*:{replay}")
        finally:
            os._exit(1)
    return pid


def _serve(model: str, port: str, events: str, replay: str) -> None:
    from vllm.entrypoints.launchers.api_server.entry import main as serve

    publishing = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": events,
        "replay_endpoint": replay,
    }
    sys.argv[1:] = [
        *("--model", model, "--host", "127.0.0.1", "--port", port),
        *("--dtype", "float32", "--seed", "0", "--enforce-eager"),
        *("--block-size", "32", "--num-gpu-blocks-override", "512"),
        *("--max-model-len", "2048", "--max-num-seqs", "4"),
        *("--kv-events-config", json.dumps(publishing)),
        "--enable-prompt-tokens-details",
        "--disable-uvicorn-access-log",
    ]
    get_context = multiprocessing.get_context

    def forking(method: str | None = None) -> Any:
        return get_context("fork" if method == "spawn" else method)

    multiprocessing.get_context = forking  # type: ignore[assignment]
    serve()


if __name__ == "__main__":
    main(*sys.argv[1:])
