"""An engine's own event publisher as a process, without an engine: events in, published by its classes.

    python publisher.py vllm|sglang ENDPOINT REPLAY_ENDPOINT TOPIC

Each line of stdin is a JSON list of events, each of them {"type": CLASS, FIELD: VALUE, ...} with values as
the engine's classes take them; {"digest": HEX} is a hash that vLLM makes external. An empty line on stdout
says that it is ready or has published. It runs in the engines' environment and imports nothing of this
project.
"""

import importlib.util
import json
import os
import sys
import time
import types
from pathlib import Path
from typing import Any


def main(kind: str, endpoint: str, replay: str, topic: str) -> None:
    """Publish until stdin ends."""
    # The engines print to stdout too: from here on that is stderr.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    events, external = _vllm() if kind == "vllm" else _sglang()
    publisher = events.ZmqEventPublisher(0, endpoint=endpoint, replay_endpoint=replay, topic=topic)

    def value_of(value: Any) -> Any:
        if isinstance(value, dict):
            return external(bytes.fromhex(value["digest"]))
        return [value_of(one) for one in value] if isinstance(value, list) else value

    print(file=answers)
    for line in sys.stdin:
        batch = [
            getattr(events, fields.pop("type"))(**{name: value_of(value) for name, value in fields.items()})
            for fields in json.loads(line)
        ]
        publisher.publish(events.KVEventBatch(time.time(), batch))
        print(file=answers)
    publisher.shutdown()


def _vllm() -> tuple[Any, Any]:
    from vllm.distributed import kv_events
    from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

    return kv_events, maybe_convert_block_hash


def _sglang() -> tuple[Any, Any]:
    """Without what its packages import beside: the engine, and all of its requirements."""
    spec = importlib.util.find_spec("sglang")
    assert spec is not None
    assert spec.origin is not None
    for name in ("sglang", "sglang.srt", "sglang.srt.disaggregation", "sglang.srt.utils"):
        package = types.ModuleType(name)
        package.__path__ = [str(Path(spec.origin).parent.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    from sglang.srt.disaggregation import kv_events

    return kv_events, None


if __name__ == "__main__":
    main(*sys.argv[1:])
