"""qk_norm_rope, which prepares queries and keys, and qk_norm_rope_cache, which also stores."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from exafuse import ops, reference
from torch import Tensor

from .case import (
    EPS,
    Call,
    Case,
    Contender,
    Inputs,
    Maker,
    Settings,
    Unsupported,
    compiled,
    unwritten_like,
)
from .shapes import ModelShape

SUITE = "ops"
NAMES = ("qkv", "num_heads", "num_kv_heads", "q_weight", "k_weight", "cos", "sin", "positions")
CACHE_NAMES = ("k_cache", "v_cache", "slot_mapping")


def cases(settings: Settings) -> Iterator[Case]:
    """Every model's heads; models without query and key norms rotate only."""
    for model in settings.sizes.models:
        for tokens in settings.sizes.tokens:
            yield _case(settings, model, tokens, "qk_norm_rope")
            yield _case(settings, model, tokens, "qk_norm_rope_cache")


def rope_tables(rows: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """fp32 cosines and sines ``[rows, head_dim / 2]``, base 1,000,000."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    angles = torch.arange(rows, dtype=torch.float32, device=device)[:, None] / 1e6**exponents
    return angles.cos(), angles.sin()


def _case(settings: Settings, model: ModelShape, tokens: int, op: str) -> Case:
    num_q, num_kv, head_dim = model.num_heads, model.num_kv_heads, model.head_dim
    stores = op == "qk_norm_rope_cache"

    def make(generator: torch.Generator) -> Inputs:
        maker = Maker(generator, settings.dtype)
        cos, sin = rope_tables(tokens, head_dim, maker.device)
        inputs: Inputs = {
            "qkv": maker.normal(tokens, (num_q + 2 * num_kv) * head_dim),
            "num_heads": num_q,
            "num_kv_heads": num_kv,
            "q_weight": maker.weight(head_dim) if model.qk_norm else None,
            "k_weight": maker.weight(head_dim) if model.qk_norm else None,
            "cos": cos,
            "sin": sin,
            "positions": torch.arange(tokens, dtype=torch.int32, device=maker.device),
        }
        if stores:
            inputs["k_cache"] = maker.unwritten(1, tokens, num_kv, head_dim)
            inputs["v_cache"] = maker.unwritten(1, tokens, num_kv, head_dim)
            inputs["slot_mapping"] = torch.arange(tokens, device=maker.device)
        return inputs

    moved_heads = 2 * (num_q + num_kv) + (2 * num_kv if stores else 0)
    return Case(
        suite=SUITE,
        op=op,
        name=f"{tokens} x ({num_q} + {num_kv}) x {head_dim}",
        model=model.name,
        parameters={"tokens": tokens, "num_heads": num_q, "num_kv_heads": num_kv}
        | {"head_dim": head_dim, "qk_norm": model.qk_norm},
        # The tables are fp32, a cosine and a sine for each pair.
        bytes=tokens * head_dim * (moved_heads * settings.element + 4),
        make=make,
        expected=_expected_stored if stores else _expected,
        contenders=_contenders(stores),
    )


def _values(inputs: Inputs) -> tuple[Any, ...]:
    return (*(inputs[name] for name in NAMES), EPS)


def _expected(inputs: Inputs) -> tuple[Tensor, ...]:
    q, k, _ = reference.qk_norm_rope(*_values(inputs))
    return q, k


def _fresh_caches(inputs: Inputs) -> dict[str, Tensor]:
    """Caches of a contender's own, so that none profits from what another has stored."""
    return {
        "k_cache": unwritten_like(inputs["k_cache"]),
        "v_cache": unwritten_like(inputs["v_cache"]),
        "slot_mapping": inputs["slot_mapping"],
    }


def _expected_stored(inputs: Inputs) -> tuple[Tensor, ...]:
    caches = _fresh_caches(inputs)
    q = reference.qk_norm_rope_cache(*_values(inputs), **caches)
    return q, caches["k_cache"], caches["v_cache"]


def _contenders(stores: bool) -> list[Contender]:
    chain = _torch_stored if stores else _torch
    by_compiler = compiled(chain)
    return [
        Contender("exafuse", _exafuse_stored if stores else _exafuse),
        Contender("torch", lambda inputs: _prepared(chain, inputs), "torch"),
        Contender("compile", lambda inputs: _prepared(by_compiler, inputs), "compile"),
        *([] if stores else [Contender("flashinfer", _flashinfer, "flashinfer")]),
    ]


def _split(inputs: Inputs) -> list[Tensor]:
    """q, k and v as views ``[tokens, heads, head_dim]``."""
    heads = [inputs["num_heads"], inputs["num_kv_heads"], inputs["num_kv_heads"]]
    qkv: Tensor = inputs["qkv"]
    return list(qkv.view(qkv.shape[0], sum(heads), -1).split(heads, dim=1))


def _exafuse(inputs: Inputs) -> Call:
    values = _values(inputs)
    q, k, v = _split(inputs)
    out = (unwritten_like(q), unwritten_like(k), v)  # v stays where it is
    return lambda: ops.qk_norm_rope(*values, out=out)[:2]


def _exafuse_stored(inputs: Inputs) -> Call:
    values, caches = _values(inputs), _fresh_caches(inputs)
    out = unwritten_like(_split(inputs)[0])

    def call() -> tuple[Tensor, ...]:
        q = ops.qk_norm_rope_cache(*values, **caches, out=out)
        return q, caches["k_cache"], caches["v_cache"]

    return call


# ---- plain torch, as transformers' models do it --------------------------------------------------


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor]:
    if q_weight is not None:
        q = F.rms_norm(q, q.shape[-1:], q_weight, EPS)
        k = F.rms_norm(k, k.shape[-1:], k_weight, EPS)
    return _rotated(q, cos, sin), _rotated(k, cos, sin)


def _torch_stored(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k = _torch(q, k, v, q_weight, k_weight, cos, sin)
    k_cache[0].index_copy_(0, slot_mapping, k)
    v_cache[0].index_copy_(0, slot_mapping, v)
    return q, k_cache, v_cache


def _prepared(function: Any, inputs: Inputs) -> Call:
    cos, sin = (
        torch.cat((inputs[name], inputs[name]), dim=-1)[:, None].to(inputs["qkv"].dtype)
        for name in ("cos", "sin")
    )
    caches = list(_fresh_caches(inputs).values()) if "k_cache" in inputs else []
    arguments = (*_split(inputs), inputs["q_weight"], inputs["k_weight"], cos, sin, *caches)
    return lambda: function(*arguments)


# ---- libraries -----------------------------------------------------------------------------------


def _flashinfer(inputs: Inputs) -> Call:
    """Its rotation works in place: a copy of q and k, rotated again by every call once normed."""
    flashinfer = importlib.import_module("flashinfer")
    if inputs["q_weight"] is None:
        raise Unsupported("rotates in place only: without norms every call would rotate further")
    q, k, _ = _split(inputs)
    head_dim = q.shape[-1]
    q_out, k_out = unwritten_like(q), unwritten_like(k)
    tables = torch.cat((inputs["cos"], inputs["sin"]), dim=-1)
    rows = [x.contiguous().view(-1, head_dim) for x in (q, k)]

    def call() -> tuple[Tensor, Tensor]:
        for x, name, out in (
            (rows[0], "q_weight", q_out),
            (rows[1], "k_weight", k_out),
        ):
            flashinfer.rmsnorm(x, inputs[name], EPS, out=out.view(-1, head_dim))
        flashinfer.apply_rope_with_cos_sin_cache_inplace(
            inputs["positions"], q_out.flatten(1), k_out.flatten(1), head_dim, tables, is_neox=True
        )
        return q_out, k_out

    return call
