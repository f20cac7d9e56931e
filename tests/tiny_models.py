"""Small random models of every family, built by transformers: the other side of the parity
tests."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

FAMILIES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "exaone4": (transformers.Exaone4Config, transformers.Exaone4ForCausalLM),
}
BASE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def build(family: str, seed: int = 0, **overrides: Any) -> transformers.PreTrainedModel:
    """An fp32 eager model whose norms, biases and logits are far from their trivial start
    values."""
    config_class, model_class = FAMILIES[family]
    config = config_class(**{**BASE, **overrides})
    config._attn_implementation = "eager"
    return randomise(model_class(config).eval(), seed)


def randomise(model: transformers.PreTrainedModel, seed: int) -> transformers.PreTrainedModel:
    """New weights in place: matrices, biases and norms all matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name or "ln_q" in name:
            value = 1 + 0.3 * noise
        elif name.endswith("bias"):
            value = 0.1 * noise
        elif "embed_tokens" in name or "lm_head" in name:
            value = 0.5 * noise
        else:
            value = 0.12 * noise
        parameter.data = value
    model.tie_weights()
    return model


def save(model: transformers.PreTrainedModel, folder: Path, **kwargs: Any) -> Path:
    """config.json and model.safetensors in ``folder``, exactly as a user's checkpoint would be."""
    model.save_pretrained(folder, **kwargs)
    return folder


@dataclass(frozen=True)
class Case:
    """One random configuration and the shape of the calls made on it."""

    seed: int
    family: str
    overrides: dict[str, Any]
    window: int | None

    def __str__(self) -> str:
        o = self.overrides
        rope = o.get("rope_parameters", {}).get("rope_type", "default")
        heads = f"{o['num_attention_heads']}x{o['num_key_value_heads']}x{o['head_dim']}"
        return f"{self.seed}-{self.family}-{heads}-{rope}-W{self.window}"


def random_case(seed: int) -> Case:
    """A legal configuration: GQA groups 1-8, windows, biases, tied heads, six RoPE types."""
    rng = random.Random(seed)
    family = list(FAMILIES)[seed % 3]
    group, kv = rng.randint(1, 8), rng.choice([1, 2, 3])
    head_dim = rng.choice([8, 16, 24, 32])
    layers = rng.choice([2, 3, 4])
    overrides: dict[str, Any] = {
        "num_key_value_heads": kv,
        "num_attention_heads": group * kv,
        "head_dim": head_dim,
        "hidden_size": rng.choice([1, 2]) * 8 * group * kv,
        "intermediate_size": rng.choice([40, 96, 136]),
        "num_hidden_layers": layers,
        "vocab_size": rng.choice([61, 97, 128]),
        "tie_word_embeddings": rng.random() < 0.4,
        "rms_norm_eps": rng.choice([1e-5, 1e-6]),
    }
    window = None
    if family == "llama":
        overrides |= {"attention_bias": rng.random() < 0.5, "mlp_bias": rng.random() < 0.5}
    elif family == "qwen2" and rng.random() < 0.6:
        window = rng.randint(2, 9)
        overrides |= {
            "use_sliding_window": True,
            "sliding_window": window,
            "max_window_layers": rng.randint(0, layers - 1),
        }
    elif family == "exaone4":
        window = rng.choice([None, rng.randint(2, 9), rng.randint(2, 9)])
        kinds = ["full_attention"] * layers
        if window is not None and rng.random() < 0.9:
            kinds = [rng.choice(["full_attention", "sliding_attention"]) for _ in range(layers)]
        overrides |= {"sliding_window": window, "layer_types": kinds}
    overrides |= _random_rope(rng, head_dim)
    return Case(seed, family, overrides, window)


def _random_rope(rng: random.Random, head_dim: int) -> dict[str, Any]:
    kind = rng.choice(["default", "linear", "dynamic", "llama3", "yarn", "longrope"])
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": rng.choice([1e4, 5e5])}
    overrides: dict[str, Any] = {"rope_parameters": rope}
    if kind in ("linear", "dynamic", "yarn", "llama3"):
        rope["factor"] = rng.choice([2.0, 4.0, 8.0])
    if kind == "dynamic":
        overrides["max_position_embeddings"] = 16
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind in ("llama3", "yarn"):
        rope["original_max_position_embeddings"] = 64
    if kind == "yarn" and rng.random() < 0.5:
        rope |= {"mscale": 0.7, "mscale_all_dim": 0.9}
    if kind == "longrope":
        half = head_dim // 2
        rope |= {
            "short_factor": [1.0 + 0.05 * i for i in range(half)],
            "long_factor": [1.5 + 0.3 * i for i in range(half)],
            "original_max_position_embeddings": 12,
            "factor": 4.0,
        }
    return overrides


def reset_rope(model: transformers.PreTrainedModel) -> None:
    """Forget the length a dynamic RoPE has grown to; transformers keeps it in the model."""
    rotary = getattr(model.model, "language_model", model.model).rotary_emb
    if hasattr(rotary, "original_inv_freq"):
        rotary.register_buffer("inv_freq", rotary.original_inv_freq.clone(), persistent=False)
        rotary.max_seq_len_cached = rotary.original_max_seq_len
