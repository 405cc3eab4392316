"""Run in the engines' environment: batches, a line of hex each, decoded by vLLM's own classes, as JSON."""

import json
import sys
from typing import Any

import msgspec
from vllm.distributed.kv_events import KVEventBatch


def _said(event: Any) -> dict[str, Any]:
    return {"type": type(event).__name__, **msgspec.structs.asdict(event)}


decode = msgspec.msgpack.Decoder(KVEventBatch).decode
for line in sys.stdin:
    batch = decode(bytes.fromhex(line))
    events = [_said(event) for event in batch.events]
    print(json.dumps({"ts": batch.ts, "rank": batch.data_parallel_rank, "events": events}))
