"""One vLLM engine as a process: a prompt's token ids in, a line of JSON out. It judges nothing.

    python engine.py MODEL [KV_TRANSFER_CONFIG [KV_EVENTS_CONFIG]]

The configurations are JSON, as `vllm serve --kv-transfer-config` and `--kv-events-config` take them, or empty
for none. With events vLLM keeps a prefix cache of its own; without, what comes from the store is seen. Each
line of stdin is a JSON list of token ids, each line of stdout an `Answer`; an empty line before them says
that it is ready. It ends with stdin. It runs in the engines' environment and imports nothing of this project.
"""

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any, Final

NEW_TOKENS: Final = 32


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one prompt. `cached_tokens` is what vLLM was promised, whatever was loaded."""

    tokens: list[int]
    cached_tokens: int
    seconds: float


def main(model: str, transfer: str = "", events: str = "") -> None:
    """Answer until stdin ends."""
    # vLLM prints to stdout too: from here on that is stderr, and only answers go where stdout went.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    generate = _generator(model, transfer, events)
    print(file=answers)
    for line in sys.stdin:
        print(json.dumps(asdict(generate(json.loads(line)))), file=answers)


def _generator(model: str, transfer: str, events: str) -> Any:
    """vLLM behind a function: token ids -> Answer."""
    from vllm import LLM, SamplingParams
    from vllm.config import KVEventsConfig, KVTransferConfig

    engine = LLM(
        model=model,
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        block_size=32,  # 16 is not possible on the CPU
        max_model_len=4096,
        max_num_batched_tokens=4096,
        max_num_seqs=4,
        enable_prefix_caching=bool(events),  # what vLLM keeps itself would hide what comes from the store
        kv_transfer_config=KVTransferConfig(**json.loads(transfer)) if transfer else None,
        kv_events_config=KVEventsConfig(**json.loads(events)) if events else None,
        num_gpu_blocks_override=512 if events else None,  # few, so that some are evicted
        seed=0,
    )
    greedy = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True, detokenize=False)

    def generate(prompt: list[int]) -> Answer:
        start = time.perf_counter()
        output: Any = engine.generate([{"prompt_token_ids": prompt}], greedy, use_tqdm=False)[0]
        seconds = time.perf_counter() - start
        return Answer(list(output.outputs[0].token_ids), output.num_cached_tokens, seconds)

    return generate


if __name__ == "__main__":
    main(*sys.argv[1:])
