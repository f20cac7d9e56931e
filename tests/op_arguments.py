"""Correct arguments, by name, for each function of the extension: tests change one of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from exafuse.ops import front_door

BF16 = torch.bfloat16


def norm_arguments() -> dict[str, Any]:
    x = torch.zeros(3, 64, dtype=BF16)
    return {"x": x, "weight": torch.ones(64), "eps": 1e-6, "out": torch.empty_like(x)}


def add_norm_arguments() -> dict[str, Any]:
    arguments = norm_arguments()
    x = arguments["x"]
    return arguments | {"residual": x.clone(), "residual_out": torch.empty_like(x)}


def rope_arguments() -> dict[str, Any]:
    """Two query heads over one kv head of 16, four tokens."""
    return {
        "q": torch.zeros(4, 64, dtype=BF16),
        "k": None,
        "v": None,
        "num_heads": 2,
        "num_kv_heads": 1,
        "q_weight": torch.ones(16, dtype=BF16),
        "k_weight": torch.ones(16),
        "cos": torch.ones(8, 8),
        "sin": torch.ones(8, 8),
        "positions": torch.zeros(4, dtype=torch.int32),
        "eps": 1e-6,
        "q_out": torch.empty(4, 2, 16, dtype=BF16),
        "k_out": torch.empty(4, 1, 16, dtype=BF16),
        "v_out": torch.empty(4, 1, 16, dtype=BF16),
    }


def cache_arguments() -> dict[str, Any]:
    arguments = rope_arguments()
    del arguments["k_out"], arguments["v_out"]
    return arguments | {
        "k_cache": torch.zeros(2, 8, 1, 16, dtype=BF16),
        "v_cache": torch.zeros(2, 8, 1, 16, dtype=BF16),
        "slot_mapping": torch.arange(4),
    }


def alone_arguments() -> dict[str, Any]:
    arguments = rope_arguments()
    names = ("cos", "sin", "positions", "q_out", "k_out")
    return {name: arguments[name] for name in names} | {
        "q": torch.zeros(4, 2, 16, dtype=BF16),
        "k": torch.zeros(4, 1, 16, dtype=BF16),
    }


def silu_arguments() -> dict[str, Any]:
    gate = torch.zeros(3, 64, dtype=BF16)
    return {"gate": gate, "up": None, "out": torch.empty(3, 32, dtype=BF16)}


def attention_arguments() -> dict[str, Any]:
    """Two sequences of 20 queries over 30 keys: two query heads over one kv head of 16."""
    q, k, v = (torch.zeros(2, n, heads, 16, dtype=BF16) for n, heads in ((20, 2), (30, 1), (30, 1)))
    return {
        "q": q,
        "k": k,
        "v": v,
        "softmax_scale": 0.25,
        "window_left": 5,
        "window_right": 0,
        "out": torch.empty_like(q),
        "lse": torch.empty(2, 2, 20),
    }


def varlen_arguments() -> dict[str, Any]:
    arguments = attention_arguments()
    for name in ("q", "k", "v", "out"):
        arguments[name] = arguments[name].flatten(0, 1)
    return arguments | {
        "cu_seqlens_q": torch.tensor([0, 5, 40], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 40, 60], dtype=torch.int32),
        "max_seqlen_q": 35,
        "lse": torch.empty(2, 40),
    }


def kvcache_arguments() -> dict[str, Any]:
    """Two sequences of 3 queries over pages of 128 slots, two tokens appended."""
    arguments = attention_arguments()
    del arguments["k"], arguments["v"]
    q = torch.zeros(2, 3, 2, 16, dtype=BF16)
    return arguments | {
        "q": q,
        "k_cache": torch.zeros(4, 128, 1, 16, dtype=BF16),
        "v_cache": torch.zeros(4, 128, 1, 16, dtype=BF16),
        "k": torch.zeros(2, 2, 1, 16, dtype=BF16),
        "v": torch.zeros(2, 2, 1, 16, dtype=BF16),
        "cache_seqlens": torch.tensor([40, 100], dtype=torch.int32),
        "cache_batch_idx": None,
        "cache_leftpad": torch.zeros(2, dtype=torch.int32),
        "block_table": torch.tensor([[0, 3], [2, 1]], dtype=torch.int32),
        "cu_seqlens_q": None,
        "max_seqlen_q": 0,
        "ring": False,
        "workspace": torch.empty(1 << 16),
        "out": torch.empty_like(q),
        "lse": torch.empty(2, 2, 3),
    }


def vision_arguments() -> dict[str, Any]:
    """Two segments of 100 and 20 tokens: two query heads over one kv head of 16."""
    return {
        "qkv": torch.zeros(120, 64, dtype=BF16),
        "num_heads": 2,
        "num_kv_heads": 1,
        "cos": torch.ones(120, 8),
        "sin": torch.ones(120, 8),
        "cu_seqlens": torch.tensor([0, 100, 120], dtype=torch.int32),
        "max_seqlen": 100,
        "softmax_scale": 0.25,
        "workspace": torch.empty(1 << 16),
        "out": torch.empty(120, 2, 16, dtype=BF16),
    }


ARGUMENTS: dict[str, Callable[[], dict[str, Any]]] = {
    "rms_norm": norm_arguments,
    "add_rms_norm": add_norm_arguments,
    "rms_norm_add": lambda: {k: v for k, v in add_norm_arguments().items() if k != "residual_out"},
    "qk_norm_rope": rope_arguments,
    "qk_norm_rope_cache": cache_arguments,
    "apply_rope": alone_arguments,
    "silu_and_mul": silu_arguments,
    "flash_attn_func": attention_arguments,
    "flash_attn_varlen_func": varlen_arguments,
    "flash_attn_with_kvcache": kvcache_arguments,
    "vision_attn": vision_arguments,
}
assert set(ARGUMENTS) == set(front_door.KERNELS)
