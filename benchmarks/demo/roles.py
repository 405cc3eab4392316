"""What each process of the demo does. A role returns its report; only the store connects the processes."""

import time
from collections.abc import Iterator, Sequence
from typing import Final

import torch
from transformers import DynamicCache

from benchmarks.demo.blocks import NAMESPACE, block_keys, digests, fetch, write_block
from benchmarks.demo.geometry import BLOCK_BYTES, BLOCK_TOKENS, NEW_TOKENS, PROMPT_TOKENS
from benchmarks.demo.model import TinyLlama, cache_of, kv_of, random_prompt
from benchmarks.demo.reports import (
    AloneReport,
    Control,
    DecodeReport,
    Generation,
    PrefillReport,
    ReturnReport,
)
from kvstore.client import StoreClient

_ROUNDS: Final = 5
# Of forty random prompts the one whose least gap between the two best logits is widest (0.04).
_PROMPT_SEED: Final = 12
_OTHER_PROMPT_SEED: Final = 2
_WARM_UP_SEED: Final = 3
_PUBLISHED_WITHIN_S: Final = 60.0
_LOADED_WITHIN_S: Final = 10.0


def run_alone() -> AloneReport:
    """Compute the prompt and go on, without a store.

    The prompt goes through the model in steps of one block, as in `run_prefill`: that is also among the
    fastest ways, one pass over all 4,096 tokens takes 1.15 times as long.
    """
    model, prompt = _warm_model(), _prompt()
    ttft_s = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        cache = DynamicCache()
        logits = _compute(model, cache, prompt)
        logits.argmax().item()
        ttft_s.append(time.perf_counter() - start)
    return AloneReport(model.generate(cache, logits, NEW_TOKENS), ttft_s)


def run_prefill(socket: str) -> PrefillReport:
    """Publish the prompt's KV while it is computed; before it one block of another prompt, for a control."""
    model = _warm_model()
    with StoreClient.connect(socket) as store:
        _publish(store, model, _other_prompt())
        return _publish(store, model, _prompt())


def run_decode(socket: str) -> DecodeReport:
    """Fetch the prompt's KV and go on.

    Of the prompt this process computes the last token only, until a control has it recompute half. Times
    come last, when the prefill process has ended and both cores are quiet, as they are in `run_alone`.
    """
    model, prompt = _warm_model(), _prompt()
    with StoreClient.connect(socket) as store:
        kv = _fetch_when_announced(store, block_keys(prompt))
        generation = _decode(model, kv, prompt)
        held_bytes = store.statistics().tiers[0].block_bytes
        controls = list(_controls(store, model, prompt, kv))
        ttft_s = [_time_to_first_token(store, model, prompt, wait_s=0.0)[0] for _ in range(_ROUNDS)]
    return DecodeReport(
        generation=generation,
        digests=digests(kv),
        read_bytes=kv.nbytes,
        held_bytes=held_bytes,
        ttft_s=ttft_s,
        controls=controls,
    )


def run_return(socket: str) -> ReturnReport:
    """Fetch the prompt's KV from a daemon that has it below its arena only, and go on."""
    model, prompt = _warm_model(), _prompt()
    with StoreClient.connect(socket) as store:
        ttft_s, kv = _time_to_first_token(store, model, prompt, wait_s=_LOADED_WITHIN_S)
        loaded_bytes = sum(tier.counters.read_bytes for tier in store.statistics().tiers)
    return ReturnReport(_decode(model, kv, prompt), digests(kv), ttft_s, loaded_bytes)


def _publish(store: StoreClient, model: TinyLlama, prompt: list[int]) -> PrefillReport:
    """Compute `prompt`, and publish each block as soon as it is full.

    Reserving all keys at the start announces them, so that another process can wait for them.
    """
    keys = block_keys(prompt)
    cache = DynamicCache()
    written_bytes = 0
    with store.reserve(NAMESPACE, keys, BLOCK_BYTES) as write:
        if len(write.granted) != len(keys):
            raise SystemExit(f"the store granted {len(write.granted)} of {len(keys)} blocks")
        for index, (key, view) in enumerate(zip(write.granted, write.views, strict=True)):
            model.extend(cache, prompt[index * BLOCK_TOKENS : (index + 1) * BLOCK_TOKENS])
            write_block(kv_of(cache), index, view)
            written_bytes += view.nbytes
            write.commit([key])
    return PrefillReport(digests(_stack(cache)), written_bytes)


def _fetch_when_announced(store: StoreClient, keys: list[bytes]) -> torch.Tensor:
    """Fetch all of `keys`, asking again while the prefill process has not yet reserved them."""
    deadline = time.monotonic() + _PUBLISHED_WITHIN_S
    while time.monotonic() < deadline:
        kv = fetch(store, keys, wait_s=deadline - time.monotonic())
        if kv.shape[3] == len(keys) * BLOCK_TOKENS:
            return kv
        time.sleep(0.01)
    raise SystemExit(f"the prompt's KV was not in the store within {_PUBLISHED_WITHIN_S:.0f} s")


def _controls(store: StoreClient, model: TinyLlama, prompt: list[int], kv: torch.Tensor) -> Iterator[Control]:
    """Decode over wrong KV: zeroed here, or swapped by asking the store for another key.

    Keys carry their positions and attention is a sum over the cache in any order, so where all of the
    prompt is fetched, two of its blocks in each other's place change nothing: that control only shows why
    the demo compares bytes as well. Behind a hit that ends between the two, a block is lost and another
    is seen twice.
    """
    keys = block_keys(prompt)
    half = len(keys) // 2
    one_zeroed = kv.clone()
    one_zeroed[:, :, :, :BLOCK_TOKENS] = 0
    foreign = [*block_keys(_other_prompt()), *keys[1:]]
    swapped = list(keys)
    swapped[0], swapped[half] = keys[half], keys[0]

    def control(name: str, wrong: torch.Tensor, must_change_tokens: bool = True) -> Control:
        tokens = _decode(model, wrong, prompt).tokens
        return Control(name, tokens, digests(wrong), must_change_tokens)

    yield control("all KV zeroed", torch.zeros_like(kv))
    yield control("one block zeroed", one_zeroed)
    yield control("one block swapped with another prompt's", fetch(store, foreign, wait_s=0.0))
    yield control("two blocks swapped, half of them fetched", fetch(store, swapped[:half], wait_s=0.0))
    yield control("two blocks swapped, all fetched", fetch(store, swapped, wait_s=0.0), False)


def _time_to_first_token(
    store: StoreClient, model: TinyLlama, prompt: list[int], *, wait_s: float
) -> tuple[float, torch.Tensor]:
    """Seconds from the prompt's tokens to the first new one (keys, fetch, one step, argmax), and the KV."""
    start = time.perf_counter()
    kv = fetch(store, block_keys(prompt), wait_s=wait_s)
    _, logits = _resume(model, kv, prompt)
    logits.argmax().item()
    return time.perf_counter() - start, kv


def _decode(model: TinyLlama, kv: torch.Tensor, prompt: list[int]) -> Generation:
    return model.generate(*_resume(model, kv, prompt), NEW_TOKENS)


def _resume(model: TinyLlama, kv: torch.Tensor, prompt: list[int]) -> tuple[DynamicCache, torch.Tensor]:
    """Compute what `kv` leaves of the prompt; at least its last token, whose logits begin the output."""
    known = min(kv.shape[3], len(prompt) - 1)
    cache = cache_of(kv[:, :, :, :known])
    return cache, _compute(model, cache, prompt[known:])


def _compute(model: TinyLlama, cache: DynamicCache, tokens: Sequence[int]) -> torch.Tensor:
    """Append `tokens` to `cache` in steps of one block; the last logits: [vocabulary]."""
    for start in range(0, len(tokens), BLOCK_TOKENS):
        logits = model.extend(cache, list(tokens[start : start + BLOCK_TOKENS]))
    return logits


def _stack(cache: DynamicCache) -> torch.Tensor:
    return torch.stack([torch.stack(keys_and_values) for keys_and_values in kv_of(cache)])


def _prompt() -> list[int]:
    return random_prompt(_PROMPT_SEED, PROMPT_TOKENS)


def _other_prompt() -> list[int]:
    return random_prompt(_OTHER_PROMPT_SEED, BLOCK_TOKENS)


def _warm_model() -> TinyLlama:
    """The model after a few steps of an unrelated prompt: the first ones are slow in every process."""
    model = TinyLlama()
    cache = DynamicCache()
    logits = _compute(model, cache, random_prompt(_WARM_UP_SEED, 2 * BLOCK_TOKENS))
    model.generate(cache, logits, 4)
    return model
