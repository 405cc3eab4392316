"""A small Llama on disk, with weights from a fixed seed and no tokenizer. It knows nothing of engines.

The scales are chosen so that greedy output is varied and soon differs when the KV does: with the usual small
initialisation a random Llama repeats one token, and equal tokens would say little of the KV.
"""

import json
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file

LAYERS: Final = 4
KV_HEADS: Final = 2
HEAD_DIM: Final = 64
VOCABULARY: Final = 1024
# A float32 key and value of each layer and head.
TOKEN_BYTES: Final = LAYERS * 2 * KV_HEADS * HEAD_DIM * 4

_HIDDEN: Final = 256
_HEADS: Final = 4
_INTERMEDIATE: Final = 512
_SEED: Final = 1234
_EMBEDDING_SCALE: Final = 1.0
_PROJECTION_SCALE: Final = 0.08


def write_checkpoint(folder: Path) -> None:
    """Make the folder, with a `config.json` and a `model.safetensors` that are the same every time."""
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": _HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "intermediate_size": _INTERMEDIATE,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(_weights(), folder / "model.safetensors", metadata={"format": "pt"})


def _weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(_SEED)

    def normal(rows: int, columns: int, scale: float = _PROJECTION_SCALE) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * scale

    weights = {
        "model.embed_tokens.weight": normal(VOCABULARY, _HIDDEN, _EMBEDDING_SCALE),
        "lm_head.weight": normal(VOCABULARY, _HIDDEN),
        "model.norm.weight": torch.ones(_HIDDEN),
    }
    for index in range(LAYERS):
        layer = f"model.layers.{index}"
        weights |= {
            f"{layer}.self_attn.q_proj.weight": normal(_HEADS * HEAD_DIM, _HIDDEN),
            f"{layer}.self_attn.k_proj.weight": normal(KV_HEADS * HEAD_DIM, _HIDDEN),
            f"{layer}.self_attn.v_proj.weight": normal(KV_HEADS * HEAD_DIM, _HIDDEN),
            f"{layer}.self_attn.o_proj.weight": normal(_HIDDEN, _HEADS * HEAD_DIM),
            f"{layer}.mlp.gate_proj.weight": normal(_INTERMEDIATE, _HIDDEN),
            f"{layer}.mlp.up_proj.weight": normal(_INTERMEDIATE, _HIDDEN),
            f"{layer}.mlp.down_proj.weight": normal(_HIDDEN, _INTERMEDIATE),
            f"{layer}.input_layernorm.weight": torch.ones(_HIDDEN),
            f"{layer}.post_attention_layernorm.weight": torch.ones(_HIDDEN),
        }
    return weights
