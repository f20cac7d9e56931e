"""A small call of every op with each of its arguments by name, for tests that change one of them.

The arguments are those of the functions of `exafuse.ops`, tuples taken apart: the parts of `qkv`
are `q`, `k`, `v` and the result buffers have names of their own, so that every tensor can be
replaced alone. `Call.run` puts them together again.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

Arguments = dict[str, Any]
INT32 = torch.int32


@dataclass(frozen=True)
class Call:
    """One way to call an op.

    Attributes:
        op: its name.
        make: random arguments in a dtype, without the result buffers.
        buffers: shapes of the result buffers by name, in the order of the results.
        mutated: arguments that the op writes into.
    """

    op: str
    make: Callable[[torch.Generator, torch.dtype], Arguments]
    buffers: dict[str, tuple[int, ...]]
    mutated: tuple[str, ...] = ()

    def arguments(self, dtype: torch.dtype, seed: int = 0) -> Arguments:
        return self.make(torch.Generator().manual_seed(seed), dtype)

    def outputs(self, dtype: torch.dtype) -> Arguments:
        """Result buffers, to be merged into the arguments."""
        return {name: torch.zeros(shape, dtype=dtype) for name, shape in self.buffers.items()}

    def run(self, module: ModuleType, arguments: Arguments) -> tuple[Tensor, ...]:
        """The results, and behind them what the op has written into."""
        keywords = {n: x for n, x in arguments.items() if n not in self.buffers}
        if self.op.startswith("qk_norm_rope") and "q" in keywords:
            keywords["qkv"] = tuple(keywords.pop(name) for name in "qkv")
        if self.op == "silu_and_mul" and "gate" in keywords:
            keywords["gate_up"] = keywords.pop("gate")
        given = [arguments[name] for name in self.buffers if name in arguments]
        if given:
            keywords["out"] = given[0] if len(self.buffers) == 1 else tuple(given)
        result = getattr(module, self.op)(**keywords)
        results = (result,) if isinstance(result, Tensor) else result
        return (*results, *(arguments[name] for name in self.mutated))


def cloned(arguments: Arguments) -> Arguments:
    return {n: x.clone() if isinstance(x, Tensor) else x for n, x in arguments.items()}


def named_in(error: Exception) -> set[str]:
    """The arguments that a message begins with, `out[1]` as `out`."""
    names = re.match(r"((?:\w+(?:\[\d\])?(?:, )?)+): ", str(error))
    return set(re.findall(r"\w+", names[1])) if names else set()


def _draw(generator: torch.Generator, dtype: torch.dtype) -> Callable[..., Tensor]:
    return lambda *shape: torch.randn(shape, generator=generator).to(dtype)


def _norm(generator: torch.Generator, dtype: torch.dtype) -> Arguments:
    draw = _draw(generator, dtype)
    return {"x": draw(6, 64), "weight": draw(64).float(), "eps": 1e-6}


def _residual(generator: torch.Generator, dtype: torch.dtype) -> Arguments:
    draw = _draw(generator, dtype)
    return {"x": draw(6, 64), "residual": draw(6, 64), "weight": draw(64), "eps": 1e-6}


def _rotation(generator: torch.Generator) -> Arguments:
    tables = (torch.randn(9, 8, generator=generator) for _ in range(2))
    positions = torch.tensor([0, 8, 3, 3], dtype=INT32)
    return dict(zip(("cos", "sin", "positions"), (*tables, positions), strict=True))


def _packed(generator: torch.Generator, dtype: torch.dtype) -> Arguments:
    draw = _draw(generator, dtype)
    return {
        "qkv": draw(4, 4 * 16),
        "num_heads": 2,
        "num_kv_heads": 1,
        "q_weight": draw(16),
        "k_weight": draw(16).float(),
        **_rotation(generator),
        "eps": 1e-6,
    }


def _apart(generator: torch.Generator, dtype: torch.dtype) -> Arguments:
    arguments = _packed(generator, dtype)
    q, k, v = arguments.pop("qkv").split((32, 16, 16), 1)
    return {"q": q, "k": k, "v": v, **arguments}


def _cached(make: Callable[..., Arguments]) -> Callable[..., Arguments]:
    def with_caches(generator: torch.Generator, dtype: torch.dtype) -> Arguments:
        arguments = make(generator, dtype)
        draw = _draw(generator, dtype)
        arguments |= {"k_cache": draw(2, 8, 1, 16), "v_cache": draw(2, 8, 1, 16)}
        return {**arguments, "slot_mapping": torch.tensor([3, -1, 15, 0])}

    return with_caches


def _rotated(generator: torch.Generator, dtype: torch.dtype) -> Arguments:
    draw = _draw(generator, dtype)
    return {"q": draw(4, 2, 16), "k": draw(4, 1, 16), **_rotation(generator)}


def _attention(seqlen_q: int) -> Callable[..., Arguments]:
    def make(generator: torch.Generator, dtype: torch.dtype) -> Arguments:
        draw = _draw(generator, dtype)
        return {
            "q": draw(2, seqlen_q, 4, 16),
            "k": draw(2, 30, 2, 16),
            "v": draw(2, 30, 2, 16),
            "causal": True,
            "window_size": (9, -1),
        }

    return make


def _varlen(generator: torch.Generator, dtype: torch.dtype) -> Arguments:
    draw = _draw(generator, dtype)
    return {
        "q": draw(25, 4, 16),
        "k": draw(40, 2, 16),
        "v": draw(40, 2, 16),
        "cu_seqlens_q": torch.tensor([0, 5, 25], dtype=INT32),
        "cu_seqlens_k": torch.tensor([0, 10, 40], dtype=INT32),
        "max_seqlen_q": 20,
        "max_seqlen_k": 30,
        "causal": True,
    }


def _cache(generator: torch.Generator, dtype: torch.dtype) -> Arguments:
    draw = _draw(generator, dtype)
    return {
        "q": draw(2, 3, 4, 16),
        "k_cache": draw(2, 128, 2, 16),
        "v_cache": draw(2, 128, 2, 16),
        "cache_seqlens": torch.tensor([7, 90], dtype=INT32),
        "causal": True,
    }


def _append(generator: torch.Generator, dtype: torch.dtype) -> Arguments:
    draw = _draw(generator, dtype)
    new = {"k": draw(2, 2, 2, 16), "v": draw(2, 2, 2, 16)}
    return {**_cache(generator, dtype), **new}


def _vision(generator: torch.Generator, dtype: torch.dtype) -> Arguments:
    tables = (torch.randn(25, 8, generator=generator) for _ in range(2))
    return {
        "qkv": _draw(generator, dtype)(25, 8 * 16),
        "num_heads": 4,
        "num_kv_heads": 2,
        **dict(zip(("cos", "sin"), tables, strict=True)),
        "cu_seqlens": torch.tensor([0, 5, 25], dtype=INT32),
        "max_seqlen": 20,
    }


_HEADS = {"q_out": (4, 2, 16), "k_out": (4, 1, 16), "v_out": (4, 1, 16)}
_CACHES = ("k_cache", "v_cache")
CALLS: dict[str, Call] = {
    "rms_norm": Call("rms_norm", _norm, {"out": (6, 64)}),
    "add_rms_norm": Call("add_rms_norm", _residual, {"out": (6, 64), "residual_out": (6, 64)}),
    "rms_norm_add": Call("rms_norm_add", _residual, {"out": (6, 64)}),
    "qk_norm_rope": Call("qk_norm_rope", _packed, _HEADS),
    "qk_norm_rope, apart": Call("qk_norm_rope", _apart, _HEADS),
    "qk_norm_rope_cache": Call(
        "qk_norm_rope_cache", _cached(_packed), {"q_out": (4, 2, 16)}, _CACHES
    ),
    "qk_norm_rope_cache, apart": Call(
        "qk_norm_rope_cache", _cached(_apart), {"q_out": (4, 2, 16)}, _CACHES
    ),
    "apply_rope": Call("apply_rope", _rotated, {n: _HEADS[n] for n in ("q_out", "k_out")}),
    "silu_and_mul": Call(
        "silu_and_mul",
        lambda generator, dtype: {"gate_up": _draw(generator, dtype)(6, 64)},
        {"out": (6, 32)},
    ),
    "silu_and_mul, apart": Call(
        "silu_and_mul",
        lambda generator, dtype: {n: _draw(generator, dtype)(6, 64) for n in ("gate", "up")},
        {"out": (6, 64)},
    ),
    "flash_attn_func": Call("flash_attn_func", _attention(20), {"out": (2, 20, 4, 16)}),
    "flash_attn_func, few queries": Call("flash_attn_func", _attention(3), {"out": (2, 3, 4, 16)}),
    "flash_attn_varlen_func": Call("flash_attn_varlen_func", _varlen, {"out": (25, 4, 16)}),
    "flash_attn_with_kvcache": Call("flash_attn_with_kvcache", _cache, {"out": (2, 3, 4, 16)}),
    "flash_attn_with_kvcache, append": Call(
        "flash_attn_with_kvcache", _append, {"out": (2, 3, 4, 16)}, _CACHES
    ),
    "vision_attn": Call("vision_attn", _vision, {"out": (25, 4, 16)}),
}
# Those whose arguments test_bad_attention.py does not go through.
ROWWISE = [name for name in CALLS if "attn" not in name]
# Arguments with a row a token or a sequence; without any of them there is nothing to do.
ROWS = {
    "rms_norm": ("x",),
    "add_rms_norm": ("x", "residual"),
    "rms_norm_add": ("x", "residual"),
    "qk_norm_rope": ("qkv", "positions"),
    "qk_norm_rope, apart": ("q", "k", "v", "positions"),
    "qk_norm_rope_cache": ("qkv", "positions", "slot_mapping"),
    "qk_norm_rope_cache, apart": ("q", "k", "v", "positions", "slot_mapping"),
    "apply_rope": ("q", "k", "positions"),
    "silu_and_mul": ("gate_up",),
    "silu_and_mul, apart": ("gate", "up"),
    "flash_attn_func": ("q", "k", "v"),
    "flash_attn_func, few queries": ("q", "k", "v"),
}
