"""Attention of other libraries over equally long sequences, for the files that measure it.

Inputs hold ``q [batch, seqlen_q, num_heads, head_dim]`` and ``k, v [batch, seqlen_k, num_kv_heads,
head_dim]``; every peer gets them in that layout, as views, and masks are made beforehand.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .case import Call, Contender, Inputs, Unsupported, compiled

# Bytes of a dense mask, and of scores held as a whole, beyond which nobody would allocate them.
LARGEST_MASK, LARGEST_SCORES = 1 << 31, 1 << 33
SDPA = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}
Window = tuple[int, int]


def contenders(window: Window) -> list[Contender]:
    """Every peer for attention with this window, in the meaning of ``flash_attn_func``."""
    found = [
        Contender(name, lambda inputs, name=name: sdpa(name, inputs, window), name) for name in SDPA
    ]
    by_compiler = compiled(_flex_attention)
    return [
        *found,
        Contender("varlen", lambda inputs: varlen(inputs, window), "varlen"),
        Contender("flex", lambda inputs: flex(by_compiler, inputs, window), "flex"),
        Contender("flashinfer", lambda inputs: flashinfer(inputs, window), "flashinfer"),
        Contender("flash-attn-4", lambda inputs: flash_attn_4(inputs, window), "flash-attn-4"),
    ]


def heads_first(inputs: Inputs) -> list[Tensor]:
    """q, k and v as ``[batch, heads, seqlen, head_dim]``."""
    return [inputs[name].transpose(1, 2) for name in "qkv"]


def dense_mask(seqlen_q: int, seqlen_k: int, window: Window, device: torch.device) -> Tensor:
    """Bool ``[seqlen_q, seqlen_k]``: what SDPA needs for anything that is not plain causal."""
    if seqlen_q * seqlen_k > LARGEST_MASK:
        raise Unsupported(f"needs a dense mask of {seqlen_q} x {seqlen_k}")
    left, right = window
    i = torch.arange(seqlen_k - seqlen_q, seqlen_k, device=device)[:, None]
    p = torch.arange(seqlen_k, device=device)[None]
    mask = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=device)
    if left >= 0:
        mask &= p >= i - left
    if right >= 0:
        mask &= p <= i + right
    return mask


def sdpa(name: str, inputs: Inputs, window: Window) -> Call:
    """torch's scaled_dot_product_attention by one of its kernels."""
    q, k, v = heads_first(inputs)
    seqlen_q, seqlen_k = q.shape[2], k.shape[2]
    score_bytes = q.shape[0] * q.shape[1] * seqlen_q * seqlen_k * q.itemsize
    if name == "sdpa-math" and score_bytes > LARGEST_SCORES:
        raise Unsupported(f"would hold scores of {score_bytes >> 30} GiB")
    # Its causal mask is aligned top-left, which is ours for equal lengths only.
    causal = window == (-1, 0) and seqlen_q == seqlen_k
    mask = None
    one_of_all = seqlen_q == 1 and window[0] < 0
    if not causal and window != (-1, -1) and not one_of_all:
        if name == "sdpa-flash":
            raise Unsupported("has no window, and its causal mask is aligned top-left")
        mask = dense_mask(seqlen_q, seqlen_k, window, q.device)
    shares_heads = q.shape[1] != k.shape[1]

    def call() -> tuple[Tensor]:
        with sdpa_kernel(SDPA[name]):
            try:
                out = F.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=shares_heads
                )
            except RuntimeError as error:
                if not str(error).startswith(("No available kernel", "No viable backend")):
                    raise
                masked = "" if mask is None else ", masked"
                raise Unsupported(
                    f"torch finds no such kernel for {q.shape[1]}/{k.shape[1]} heads of "
                    f"{q.shape[3]}{masked}"
                ) from None
        return (out.transpose(1, 2),)

    return call


def offsets(lengths: Sequence[int], device: torch.device) -> Tensor:
    """int32 ``[batch + 1]``: where each packed sequence starts."""
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return ends.to(device)


def varlen(inputs: Inputs, window: Window) -> Call:
    """torch.nn.attention.varlen; a packed layout, so equally long sequences are flattened."""
    q, k, v = (inputs[name] for name in "qkv")
    packed = varlen_packed(
        *(x.flatten(0, 1) for x in (q, k, v)),
        [q.shape[1]] * q.shape[0],
        [k.shape[1]] * k.shape[0],
        window,
    )
    shape = q.shape
    return lambda: (packed()[0].view(shape),)


def varlen_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths_q: Sequence[int],
    lengths_k: Sequence[int],
    window: Window,
) -> Call:
    """The same for ``[total, heads, head_dim]`` and lengths of the sequences."""
    attend = varlen_function(q.shape[1] != k.shape[1], window)
    starts = (offsets(lengths_q, q.device), offsets(lengths_k, k.device))
    longest = (max(lengths_q), max(lengths_k))
    return lambda: (attend(q, k, v, *starts, *longest),)


def varlen_function(shares_heads: bool, window: Window) -> Callable[..., Tensor]:
    """varlen_attn with what this torch's has for the window and for shared heads."""
    attend = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    accepted = inspect.signature(attend).parameters
    options: dict[str, Any] = {}
    if "window_size" in accepted:
        options["window_size"] = window
    elif window == (-1, 0):
        options["is_causal"] = True
    elif window != (-1, -1):
        raise Unsupported("this torch's varlen_attn has no window")
    if shares_heads and "enable_gqa" in accepted:
        options["enable_gqa"] = True
    return functools.partial(attend, **options)


def _flex_attention(*arguments: Any, **options: Any) -> Tensor:
    module = importlib.import_module("torch.nn.attention.flex_attention")
    return module.flex_attention(*arguments, **options)


def flex(by_compiler: Callable[..., Tensor], inputs: Inputs, window: Window) -> Call:
    """FlexAttention with a block mask that is made once."""
    module = importlib.import_module("torch.nn.attention.flex_attention")
    q, k, v = heads_first(inputs)
    seqlen_q, seqlen_k = q.shape[2], k.shape[2]
    first, (left, right) = seqlen_k - seqlen_q, window
    mask = None
    if window != (-1, -1):

        def visible(batch: Tensor, head: Tensor, i: Tensor, p: Tensor) -> Tensor:
            seen = p >= 0
            if left >= 0:
                seen = seen & (p >= i + first - left)
            if right >= 0:
                seen = seen & (p <= i + first + right)
            return seen

        mask = module.create_block_mask(visible, None, None, seqlen_q, seqlen_k, device=q.device)
    shares_heads = q.shape[1] != k.shape[1]
    return lambda: (by_compiler(q, k, v, block_mask=mask, enable_gqa=shares_heads).transpose(1, 2),)


def flashinfer(inputs: Inputs, window: Window) -> Call:
    """FlashInfer's kernel for one sequence: prefill, or decode for a single query."""
    module = importlib.import_module("flashinfer")
    q, k, v = (inputs[name] for name in "qkv")
    if q.shape[0] != 1:
        raise Unsupported("its one-call kernels take a single sequence")
    left, right = window
    if right > 0:
        raise Unsupported("has no right window")
    q, k, v = q[0], k[0], v[0]
    if q.shape[0] == 1:
        decode = module.single_decode_with_kv_cache
        return lambda: (decode(q[0], k, v, window_left=left)[None, None],)
    prefill = module.single_prefill_with_kv_cache
    return lambda: (prefill(q, k, v, causal=right == 0, window_left=left)[None],)


def flash_attn_4(inputs: Inputs, window: Window) -> Call:
    """FlashAttention 4's CuTe kernels; an open bound is None there."""
    attend = importlib.import_module("flash_attn.cute").flash_attn_func
    q, k, v = (inputs[name] for name in "qkv")
    left, right = window
    options = {"causal": window == (-1, 0)}
    if left >= 0:
        options["window_size"] = (left, None if right < 0 else right)

    def call() -> tuple[Tensor]:
        out = attend(q, k, v, **options)
        return (out[0] if isinstance(out, tuple) else out,)

    return call
