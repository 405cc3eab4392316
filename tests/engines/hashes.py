"""vLLM's own hashes of prompts: a line of JSON in, a line of JSON out. It judges nothing.

Each line of stdin is what `hashes_of` takes, each line of stdout what it returns; an empty line before them
says that it is ready. It ends with stdin. It runs in the engines' environment and imports nothing of this
project.
"""

import json
import os
import sys
from typing import Any


def main() -> None:
    """Answer until stdin ends."""
    # vLLM prints to stdout too: from here on that is stderr, and only answers go where stdout went.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import vllm.v1.core.kv_cache_utils  # noqa: F401

    print(file=answers)
    for line in sys.stdin:
        print(json.dumps(hashes_of(**json.loads(line))), file=answers)


def hashes_of(
    tokens: list[int],
    block_tokens: int,
    algorithm: str,
    seed: str | None,
    lora: list[str] | None,
    salt: str,
    media: list[tuple[str, int, int]],
) -> dict[str, list[Any]]:
    """The hash of each complete block of a prompt, and what vLLM's event says of it under `extra_keys`."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.request import Request

    os.environ.pop("PYTHONHASHSEED", None)
    if seed is not None:
        os.environ["PYTHONHASHSEED"] = seed
    function = get_hash_fn_by_name(algorithm)
    kv_cache_utils.init_none_hash(function)
    request = Request(
        request_id="1",
        prompt_token_ids=tokens,
        sampling_params=SamplingParams(max_tokens=1),
        pooling_params=None,
        mm_features=[
            MultiModalFeatureSpec(None, "image", identifier, PlaceholderRange(offset, length))
            for identifier, offset, length in media
        ],
        lora_request=LoRARequest(lora[0], 1, lora[1]) if lora else None,
        cache_salt=salt or None,
        block_hasher=kv_cache_utils.get_request_block_hasher(block_tokens, function),
    )
    extras, position = [], 0
    for start in range(0, len(request.block_hashes) * block_tokens, block_tokens):
        extra, position = kv_cache_utils.generate_block_hash_extra_keys(
            request, start, start + block_tokens, position
        )
        extras.append(extra)
    return {
        "hashes": [block_hash.hex() for block_hash in request.block_hashes],
        "extra_keys": kv_cache_utils.to_event_extra_keys(extras) or [],
    }


if __name__ == "__main__":
    main()
