"""Shapes, dtypes, strides and numbers that the extension refuses, and in which words: every message
names the argument, what was expected and what came.

Runs on the CUDA extension where it is installed (no GPU is needed: the device is checked last) and
on the emulated one.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from kernel_backends import emulated, extension
from op_arguments import ARGUMENTS, BF16

__all__ = ["emulated", "extension"]  # fixtures


def columns(rows: int, width: int, taken: int) -> torch.Tensor:
    """A view `[rows, taken]` of every second column."""
    return torch.zeros(rows, 2 * width, dtype=BF16)[:, ::2][:, :taken]


def misaligned(*shape: int) -> torch.Tensor:
    """A bf16 tensor at an odd address."""
    size = torch.Size(shape).numel() * 2
    return torch.frombuffer(bytearray(size + 1), dtype=BF16, offset=1).view(shape)


WRONG: list[tuple[str, dict[str, Any], str]] = [
    # shape and rank
    ("rms_norm", {"weight": torch.ones(32)}, r"weight: expected \(hidden=64\), got \(32,\)"),
    ("rms_norm", {"weight": torch.ones(64, 1)}, r"weight: expected \(hidden=64\), got \(64, 1\)"),
    ("rms_norm", {"x": torch.zeros((), dtype=BF16)}, r"x: expected \(\.\.\., hidden\), got \(\)"),
    (
        "rms_norm",
        {"x": torch.zeros(3, 60, dtype=BF16)},
        r"hidden: expected a multiple of 8 .* got 60",
    ),
    ("rms_norm", {"x": torch.zeros(1, 65544, dtype=BF16)}, r"hidden: .* to 65536, got 65544"),
    (
        "rms_norm",
        {"x": torch.zeros(3, 0, dtype=BF16)},
        r"hidden: expected a multiple of 8 .* got 0",
    ),
    ("rms_norm", {"x": torch.zeros([1] * 9, dtype=BF16)}, r"x: expected at most 8 dimensions, got"),
    (
        "rms_norm",
        {"out": torch.zeros(2, 64, dtype=BF16)},
        r"out: expected \(3, 64\), got \(2, 64\)",
    ),
    (
        "add_rms_norm",
        {"residual": torch.zeros(64, dtype=BF16)},
        r"residual: expected \(3, 64\), got",
    ),
    (
        "add_rms_norm",
        {"residual_out": torch.zeros(4, 64, dtype=BF16)},
        r"residual_out: expected \(3",
    ),
    ("rms_norm_add", {"residual": torch.zeros(3, 8, dtype=BF16)}, r"residual: expected \(3, 64\)"),
    ("qk_norm_rope", {"q": torch.zeros(4, 62, dtype=BF16)}, r"qkv: expected \(num_tokens, 4 heads"),
    (
        "qk_norm_rope",
        {"q": torch.zeros(4, 4, 16, dtype=BF16)},
        r"qkv: expected \(num_tokens, 4 hea",
    ),
    ("qk_norm_rope", {"q": torch.zeros(4, 48, dtype=BF16)}, r"head_dim: .*multiple of 8.*got 12"),
    ("qk_norm_rope", {"q": torch.zeros(4, 544, dtype=BF16)}, r"head_dim: .* 8 to 128, got 136"),
    ("qk_norm_rope", {"k": torch.zeros(4, 16, dtype=BF16)}, r"k, v: expected both or neither"),
    (
        "qk_norm_rope",
        {"num_heads": 3, "num_kv_heads": 2},
        r"num_heads: expected a positive multiple",
    ),
    ("qk_norm_rope", {"num_heads": 0}, r"num_heads: expected a positive multiple of num_kv_heads"),
    ("qk_norm_rope", {"num_kv_heads": -1}, r"num_heads: expected a positive multiple"),
    (
        "qk_norm_rope",
        {"q_weight": torch.ones(8)},
        r"q_weight: expected \(head_dim=16\), got \(8,\)",
    ),
    ("qk_norm_rope", {"sin": None}, r"cos, sin: expected both tables or neither"),
    ("qk_norm_rope", {"positions": None}, r"positions: expected int32 \(num_tokens,\) when cos"),
    (
        "qk_norm_rope",
        {"cos": torch.ones(8, 16)},
        r"cos: expected \(rows, 8\), got \(8, 16\)|cos: exp",
    ),
    ("qk_norm_rope", {"sin": torch.ones(7, 8)}, r"sin: expected \(rows=8, 8\), got \(7, 8\)"),
    (
        "qk_norm_rope",
        {"cos": torch.ones(0, 8), "sin": torch.ones(0, 8)},
        r"cos: expected at least one",
    ),
    (
        "qk_norm_rope",
        {"positions": torch.zeros(3, dtype=torch.int32)},
        r"positions: expected \(num_tokens=4\), got \(3,\)",
    ),
    (
        "qk_norm_rope",
        {"k_out": torch.zeros(4, 2, 16, dtype=BF16)},
        r"k_out: expected \(num_tokens=4, num_kv_heads=1, head_dim=16\), got \(4, 2, 16\)",
    ),
    ("qk_norm_rope", {"v_out": torch.zeros(4, 16, dtype=BF16)}, r"v_out: expected \(num_tokens=4,"),
    (
        "qk_norm_rope_cache",
        {"k_cache": torch.zeros(2, 8, 2, 16, dtype=BF16)},
        r"k_cache: expected \(rows=2, slots=8, num_kv_heads=1, head_dim=16\), got \(2, 8, 2, 16\)",
    ),
    (
        "qk_norm_rope_cache",
        {"v_cache": torch.zeros(2, 9, 1, 16, dtype=BF16)},
        r"v_cache: .*slots=8",
    ),
    ("qk_norm_rope_cache", {"slot_mapping": torch.arange(5)}, r"slot_mapping: expected \(num_tok"),
    ("apply_rope", {"k": torch.zeros(5, 1, 16, dtype=BF16)}, r"k: expected \(num_tokens=4, num_kv"),
    (
        "apply_rope",
        {"q": torch.zeros(4, 32, dtype=BF16)},
        r"q: expected \(num_tokens, num_heads, h",
    ),
    (
        "silu_and_mul",
        {"gate": torch.zeros(3, 63, dtype=BF16)},
        r"gate_up: expected \(\.\.\., 2 \* in",
    ),
    (
        "silu_and_mul",
        {"gate": torch.zeros((), dtype=BF16)},
        r"gate_up: expected \(\.\.\., 2 \* inter",
    ),
    (
        "silu_and_mul",
        {"up": torch.zeros(3, 32, dtype=BF16)},
        r"up: expected \(3, 64\), got \(3, 32\)",
    ),
    (
        "silu_and_mul",
        {"out": torch.zeros(3, 64, dtype=BF16)},
        r"out: expected \(3, 32\), got \(3, 64",
    ),
    # numbers
    ("rms_norm", {"eps": float("nan")}, r"eps: expected a finite number >= 0, got nan"),
    ("rms_norm", {"eps": -1e-6}, r"eps: expected a finite number >= 0, got -0\.000001"),
    ("qk_norm_rope", {"eps": float("inf")}, r"eps: expected a finite number >= 0, got inf"),
    # dtype
    (
        "rms_norm",
        {"x": torch.zeros(3, 64).double()},
        r"x: expected dtype bfloat16 or float16 or fl",
    ),
    ("rms_norm", {"x": torch.zeros(3, 64, dtype=torch.int32)}, r"x: expected dtype .*, got int32"),
    (
        "rms_norm",
        {"weight": torch.ones(64).half()},
        r"weight: expected dtype bfloat16 or float32, g",
    ),
    ("rms_norm", {"out": torch.zeros(3, 64)}, r"out: expected dtype bfloat16, got float32"),
    (
        "add_rms_norm",
        {"residual": torch.zeros(3, 64)},
        r"residual: expected dtype bfloat16, got fl",
    ),
    (
        "qk_norm_rope",
        {"q_weight": torch.ones(16).half()},
        r"q_weight: expected dtype bfloat16 or f",
    ),
    ("qk_norm_rope", {"sin": torch.ones(8, 8, dtype=BF16)}, r"sin: expected dtype float32, got bf"),
    (
        "qk_norm_rope",
        {"positions": torch.zeros(4, dtype=torch.int64)},
        r"positions: expected dtype int32, got int64",
    ),
    (
        "qk_norm_rope_cache",
        {"slot_mapping": torch.arange(4, dtype=torch.int32)},
        r"slot_mapping: expected dtype int64, got int32",
    ),
    (
        "qk_norm_rope_cache",
        {"v_cache": torch.zeros(2, 8, 1, 16)},
        r"v_cache: expected dtype bfloat",
    ),
    ("apply_rope", {"k": torch.zeros(4, 1, 16)}, r"k: expected dtype bfloat16, got float32"),
    (
        "silu_and_mul",
        {"gate": torch.zeros(3, 32, dtype=BF16), "up": torch.zeros(3, 32)},
        r"up: expected dtype bfloat16, got float32",
    ),
    # stride
    (
        "rms_norm",
        {"x": columns(3, 64, 64)},
        r"x: expected stride 1 in the last dimension, got strid",
    ),
    (
        "rms_norm",
        {"out": torch.zeros(64, 3, dtype=BF16).t()},
        r"out: expected stride 1 in the last",
    ),
    (
        "qk_norm_rope",
        {"q": columns(4, 64, 64)},
        r"q: expected stride 1 in the last dimension, got st",
    ),
    (
        "qk_norm_rope",
        {"cos": torch.ones(8, 8).t()},
        r"cos: expected stride 1 in the last dimension",
    ),
    ("silu_and_mul", {"gate": columns(3, 64, 64)}, r"gate_up: expected stride 1 in the last dimen"),
    # alignment
    ("rms_norm", {"x": misaligned(3, 64)}, r"x: expected data aligned to its elements of 2 bytes"),
    ("silu_and_mul", {"gate": misaligned(3, 64)}, r"gate_up: expected data aligned to its element"),
    # outputs that share memory with themselves
    (
        "rms_norm",
        {"out": torch.zeros(64, dtype=BF16).expand(3, 64)},
        r"out: expected an output whose",
    ),
    (
        "rms_norm",
        {"out": torch.zeros(200, dtype=BF16).as_strided((3, 64), (63, 1))},
        r"out: expected an output whose elements do not share memory, got shape \(3, 64\) with",
    ),
    (
        "qk_norm_rope_cache",
        {"k_cache": torch.zeros(1, 8, 1, 16, dtype=BF16).expand(2, 8, 1, 16)},
        r"k_cache: expected an output whose elements do not share memory",
    ),
]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    WRONG,
    ids=[f"{name}-{'-'.join(changes)}-{i}" for i, (name, changes, _) in enumerate(WRONG)],
)
def test_wrong_arguments_are_named(
    extension: ModuleType, name: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        getattr(extension, name)(**{**ARGUMENTS[name](), **changes})
    assert type(caught.value) is ValueError
