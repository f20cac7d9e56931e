"""Calls every kernel on the emulator and notes its dynamic shared memory.

The host functions choose it, so the compiled kernels do not tell; it is part of the table that
tests/compiled_kernels.py writes.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from compiled_kernels import cleaned
from emulator.control import Emulator
from exafuse.ops import front_door
from kernel_backends import emulator_library
from prefill_calls import TILES_SM90

HALVES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 96, 128)  # one for each tile


def _norms(kernels: Any, dtype: torch.dtype) -> None:
    # Rows of odd and even places, of every number of vectors a thread, and of any length.
    for hidden, odd in itertools.product((64, 1024, 2048, 4096, 8192, 16384, 65536), (0, 1)):
        x = torch.ones(hidden + odd, dtype=dtype)[odd:][None]
        weight, out = torch.ones(hidden, dtype=dtype), torch.empty(1, hidden, dtype=dtype)
        kernels.rms_norm(x, weight, 1e-5, out)
        kernels.rms_norm_add(x, x, weight, 1e-5, out)
        kernels.add_rms_norm(x, x, weight, 1e-5, out, torch.empty(1, hidden, dtype=dtype))
        kernels.rms_norm_backward(x, x, weight, 1e-5, out, None, None)
        workspace = torch.empty(kernels.rms_norm_backward_workspace(1, hidden, dtype.itemsize) // 4)
        grad_weight = torch.empty_like(weight)
        kernels.rms_norm_backward(x, x, weight, 1e-5, out, grad_weight, workspace)
        if dtype != torch.float32:
            grad_weight = grad_weight.float()
            kernels.rms_norm_backward(x, x, weight.float(), 1e-5, out, grad_weight, workspace)


def _elementwise(kernels: Any, dtype: torch.dtype) -> None:
    for odd in (0, 1):
        x = torch.ones(3 * 64 + odd, dtype=dtype)[odd:].view(1, 192)
        gate, up = x[:, :64], x[:, 64:128]
        kernels.silu_and_mul(gate, up, torch.empty(1, 64, dtype=dtype))
        kernels.silu_and_mul_backward(gate, gate, up, *(torch.empty_like(up) for _ in range(2)))
        for head_dim in (8, 16, 64):
            x = torch.ones(4 * head_dim + odd, dtype=dtype)[odd:].view(1, -1)
            outputs = [torch.empty(1, n, head_dim, dtype=dtype) for n in (2, 1, 1)]
            kernels.qk_norm_rope(x, None, None, 2, 1, None, None, None, None, None, 1e-5, *outputs)
            heads = x.view(1, 4, head_dim)
            q, k = heads[:, :2], heads[:, 2:3]
            d_q, d_k, _ = outputs
            size = kernels.qk_norm_rope_backward_workspace(1, head_dim, dtype.itemsize)
            weight, workspace = torch.ones(head_dim, dtype=dtype), torch.empty(size // 4)
            for weights in ((None, None), (weight, weight)):
                kernels.qk_norm_rope_backward(
                    *(q, k, None, q, k, *weights, None, None, None, 1e-5, workspace, d_q, d_k),
                    *(None, *(None if w is None else torch.empty_like(w) for w in weights)),
                )


def _attention(kernels: Any, dtype: torch.dtype, head_dim: int) -> None:
    # Columns for one, two and three tiles of decode, and more queries than it takes.
    for seqlen_q, heads in ((1, 1), (9, 1), (8, 3), (20, 1)):
        q = torch.ones(1, seqlen_q, heads, head_dim, dtype=dtype)
        cache = torch.ones(1, 768, 1, head_dim, dtype=dtype)
        size = kernels.flash_attn_with_kvcache_workspace(
            seqlen_q, seqlen_q, heads, head_dim, 768, -1
        )
        workspace = torch.empty(size // 4) if size else None
        lengths = torch.tensor([700], dtype=torch.int32)
        for new in (None, cache[:, :1].clone(), torch.ones(head_dim + 1, dtype=dtype)[1:]):
            new = new if new is None else new.view(1, 1, 1, head_dim)
            kernels.flash_attn_with_kvcache(
                *(q, cache, cache.clone(), new, new, lengths, None, None, None, 1.0, -1, 0),
                *(None, seqlen_q, False, workspace, torch.empty_like(q), None),
            )


def _vision(kernels: Any, dtype: torch.dtype, head_dim: int) -> None:
    for tokens, odd in itertools.product((8, 70), (0, 1)):
        qkv = torch.ones(tokens * 3 * head_dim + odd, dtype=dtype)[odd:].view(tokens, -1)
        angles = torch.ones(tokens, head_dim // 2)
        size = kernels.vision_attn_workspace(tokens, 1, 1, head_dim, tokens)
        kernels.vision_attn(
            *(qkv, 1, 1, angles, angles, torch.tensor([0, tokens], dtype=torch.int32), tokens, 1.0),
            *(torch.empty(size // 4) if size else None, torch.empty(tokens, 1, head_dim).to(dtype)),
        )


def _prefill_sm90(kernels: Any, dtype: torch.dtype, tile: tuple[int, int, int]) -> None:
    head_dim, queries, keys = tile
    q = torch.ones(1, 20, 1, head_dim, dtype=dtype)
    with mock.patch.dict(os.environ, EXAFUSE_ATTENTION=f"sm90:{queries}x{keys}"):
        kernels.flash_attn_func(q, q.clone(), q.clone(), 1.0, -1, 0, torch.empty_like(q), None)


def dynamic_shared_bytes() -> dict[str, int]:
    """The most that a launch of each kernel asks for, by "kernel<arguments>"."""
    kernels: Any = front_door.load_emulated()
    emulator = Emulator(emulator_library())
    most: dict[str, int] = {}

    def note(call: Callable[..., None], *arguments: Any) -> None:
        emulator.clear_launches()
        call(kernels, *arguments)
        for launch in emulator.launches():
            name = cleaned(launch.kernel)
            most[name] = max(most.get(name, 0), launch.smem_bytes)

    for dtype in (*HALVES, torch.float32):
        note(_norms, dtype)
        note(_elementwise, dtype)
    for dtype, head_dim in itertools.product(HALVES, HEAD_DIMS):
        note(_attention, dtype, head_dim)
        note(_vision, dtype, head_dim)
    emulator.set("gpu", "sm_90")
    try:
        for dtype, tile in itertools.product(HALVES, TILES_SM90):
            note(_prefill_sm90, dtype, tile)
    finally:
        emulator.set("gpu", "sm_80")
    return dict(sorted(most.items()))
