"""A small Llama whose weights follow from a seed. It runs forward passes and knows nothing of the store.

The scales of the weights are chosen so that greedy output is varied and depends on the KV. With the usual
small initialisation a random Llama soon repeats one token, and equal tokens would say little of the KV.
"""

from typing import Any, Final

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.demo.geometry import HEAD_DIM, KV_HEADS, LAYERS
from benchmarks.demo.reports import Generation

# Prefill and decode run side by side on as little as two cores; one thread each keeps their times apart.
THREADS: Final = 1

_WEIGHTS_SEED: Final = 1234
_EMBEDDING_SCALE: Final = 1.0
_PROJECTION_SCALE: Final = 0.08
_VOCABULARY: Final = 1024
_FIRST_TOKEN: Final = 3  # below it: padding, begin and end of text


class TinyLlama:
    """The model and nothing of a request: caches and KV are the caller's.

    float32 on `THREADS` threads, so that equal steps give equal numbers in every process.
    """

    def __init__(self) -> None:
        torch.set_num_threads(THREADS)
        self._model = _untrained()
        self._model.load_state_dict(_weights(self._model.state_dict()))
        self._model.eval()

    @torch.inference_mode()
    def extend(self, cache: DynamicCache, tokens: list[int]) -> torch.Tensor:
        """One forward pass over `tokens`, whose KV is appended to `cache`; the last logits: [vocabulary]."""
        output = self._model(torch.tensor([tokens]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits: torch.Tensor = output.logits[0, -1]
        return logits

    def generate(self, cache: DynamicCache, logits: torch.Tensor, count: int) -> Generation:
        """Greedily continue a prompt that `cache` holds and that ended in `logits`; `cache` grows."""
        tokens: list[int] = []
        gaps: list[float] = []
        while True:
            best, second = logits.topk(2).values.tolist()
            gaps.append(best - second)
            tokens.append(int(logits.argmax()))
            if len(tokens) == count:
                return Generation(tokens, min(gaps))
            logits = self.extend(cache, tokens[-1:])


def cache_of(kv: torch.Tensor) -> DynamicCache:
    """A cache that holds `kv`: [layers, 2, kv_heads, tokens, head_dim], which it reads and never writes."""
    return DynamicCache([(layer[0].unsqueeze(0), layer[1].unsqueeze(0)) for layer in kv])


def kv_of(cache: DynamicCache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys (with their positions rotated in) and values of each layer: [kv_heads, tokens, head_dim]."""
    layers: Any = cache.layers
    return [(layer.keys[0], layer.values[0]) for layer in layers]


def random_prompt(seed: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = torch.randint(_FIRST_TOKEN, _VOCABULARY, (length,), generator=generator).tolist()
    return tokens


def _untrained() -> Any:
    config = LlamaConfig(
        hidden_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        intermediate_size=512,
        vocab_size=_VOCABULARY,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        hidden_act="silu",
        tie_word_embeddings=False,
        dtype=torch.float32,
    )
    return LlamaForCausalLM(config)


def _weights(name_to_initial: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(_WEIGHTS_SEED)
    name_to_weight = {}
    for name, initial in name_to_initial.items():
        if name.endswith("norm.weight"):
            name_to_weight[name] = torch.ones_like(initial)
        else:
            scale = _EMBEDDING_SCALE if name == "model.embed_tokens.weight" else _PROJECTION_SCALE
            name_to_weight[name] = scale * torch.randn(initial.shape, generator=generator)
    return name_to_weight
