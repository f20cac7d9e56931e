"""RMSNorm (Zhang & Sennrich 2019) alone and fused with a residual addition, before or after the
norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from exafuse.reference._check import (
    Shapes,
    check_buffers,
    check_device,
    check_eps,
    check_float,
    deliver,
)


def norm_fp32(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """fp32 ``x * rsqrt(mean(x^2) + eps) * weight`` over the last dimension, not rounded
    further."""
    return F.rms_norm(x.float(), x.shape[-1:], None if weight is None else weight.float(), eps)


def _check(x: Tensor, weight: Tensor, eps: float) -> None:
    check_float("x", x)
    if x.dim() == 0:
        raise ValueError("x: expected (..., hidden), got ()")
    check_float("weight", weight, x.dtype, torch.float32)
    if weight.shape != x.shape[-1:]:
        Shapes(hidden=x.shape[-1]).match("weight", weight, "hidden")
    check_eps(eps)
    check_device(x.device, weight=weight)


def _check_residual(x: Tensor, residual: Tensor) -> None:
    check_float("residual", residual, x.dtype)
    if residual.shape != x.shape:
        Shapes().match("residual", residual, *x.shape)
    check_device(x.device, residual=residual)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None) -> Tensor:
    """Root-mean-square norm over the last dimension.

    Args:
        x: ``[..., hidden]``, bf16, fp16 or fp32; hidden a multiple of 8 up to 65536 on a GPU.
        weight: ``[hidden]``, the dtype of ``x`` or fp32.
        eps: added to the mean square.
        out: optional result buffer, shape and dtype of ``x``; may be ``x``.

    Returns:
        ``x * rsqrt(mean(x^2) + eps) * weight``, computed in fp32 and rounded once to ``x.dtype``.
    """
    _check(x, weight, eps)
    return deliver(norm_fp32(x, weight, eps).to(x.dtype), out)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Residual addition, then RMSNorm: the step between sublayers of pre-norm models.

    Args:
        x, residual: ``[..., hidden]``, same shape and dtype.
        weight: ``[hidden]``.
        eps: added to the mean square.
        out: optional ``(y, new_residual)`` buffers; each may be ``x`` or ``residual``.

    Returns:
        ``(y, new_residual)``: ``new_residual = x + residual`` rounded to the dtype, and ``y`` the
        norm of that rounded sum, so the pair equals an addition followed by ``rms_norm`` bitwise.
    """
    _check(x, weight, eps)
    _check_residual(x, residual)
    y_out, residual_out = check_buffers(out, 2)
    new_residual = x + residual
    y = norm_fp32(new_residual, weight, eps).to(x.dtype)
    return deliver(y, y_out), deliver(new_residual, residual_out, "out[1]")


def rms_norm_add(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None
) -> Tensor:
    """RMSNorm of a sublayer's output, then residual addition: EXAONE 4's post-norm.

    Args:
        x: sublayer output ``[..., hidden]``.
        residual: ``[..., hidden]``, shape and dtype of ``x``.
        weight: ``[hidden]``.
        eps: added to the mean square.
        out: optional result buffer; may be ``x`` or ``residual``.

    Returns:
        ``residual + rms_norm(x)``, computed in fp32 and rounded once after the addition.
    """
    _check(x, weight, eps)
    _check_residual(x, residual)
    return deliver((residual.float() + norm_fp32(x, weight, eps)).to(x.dtype), out)
