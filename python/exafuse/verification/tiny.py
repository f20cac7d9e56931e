"""Tiny random models of every family, for ``verify --tiny``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from exafuse.config import load_config

_BASE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
_S, _F = "sliding_attention", "full_attention"
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_HYBRID = _BASE | {
    "model_type": "exaone4",
    "num_hidden_layers": 4,
    "sliding_window": 5,
    "sliding_window_pattern": "LLLG",
    "layer_types": [_S, _S, _S, _F],
    "rope_scaling": _LLAMA3,
}
# One model per thing that can be wrong in a family; prompt and ring are longer than every window.
TINY_CONFIGS: dict[str, dict[str, Any]] = {
    "llama, llama3 RoPE scaling, biases": _BASE
    | {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "head_dim": 16,
        "hidden_size": 96,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_scaling": _LLAMA3,
    },
    "qwen2, windows, tied embeddings": _BASE
    | {
        "model_type": "qwen2",
        "num_hidden_layers": 3,
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "exaone4, windows with RoPE and global layers without": _HYBRID,
    "exaone4, global, tied embeddings": _BASE
    | {
        "model_type": "exaone4",
        "num_hidden_layers": 3,
        "sliding_window": None,
        "layer_types": [_F, _F, _F],
        "tie_word_embeddings": True,
    },
    "exaone4_5, images, video, MTP": {
        "model_type": "exaone4_5",
        "image_token_id": 7,
        "video_token_id": 8,
        "text_config": _HYBRID | {"layer_types": [_S, _S, _S, _F, _S]},
        "vision_config": {
            "depth": 4,
            "hidden_size": 64,
            "intermediate_size": 80,
            "num_heads": 4,
            "num_key_value_heads": 2,
            "window_size": 56,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1, 3],
        },
    },
}
TINY_PROMPT_TOKENS = 150
TINY_CHUNK = 16  # several prefill chunks, and a ring of 128 slots that wraps


def make_tiny(
    values: dict[str, Any], folder: Path, dtype: str | torch.dtype | None = None, seed: int = 0
) -> None:
    """Write a random checkpoint for the config ``values``; nothing in it is 0 or 1.

    Norms and biases are random too, since at their initial values they hide mistakes, and the head
    is scaled so that logits spread as in a trained model (standard deviation about 3).
    """
    from exafuse.models import from_config

    config = load_config(values)
    kind = "float32" if dtype in (None, "auto") else dtype
    model = from_config(config, dtype=kind, device="cpu", backend="reference", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    head = 3 / math.sqrt(config.hidden_size)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name or "ln_q" in name:
                noise = 1 + 0.3 * noise
            elif name.endswith("bias"):
                noise = 0.1 * noise
            elif "embed_tokens" in name or "lm_head" in name:
                noise = head * noise
            elif "patch_embed" in name:  # sums over a thousand pixels
                noise = 0.03 * noise
            else:
                noise = 0.08 * noise
            parameter.copy_(noise)
    model.save_pretrained(folder)
