"""rms_norm, add_rms_norm and rms_norm_add as registered ops."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from exafuse.ops.registered.library import (
    differentiate,
    differentiate_once,
    direct,
    like,
    like_if,
    register,
    registered,
)
from exafuse.reference._check import check_buffers, deliver

register(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    lambda x, weight, eps: direct.rms_norm(x, weight, eps),
    lambda x, weight, eps: like(x),
)
register(
    "rms_norm_add(Tensor x, Tensor residual, Tensor weight, float eps) -> Tensor",
    lambda x, residual, weight, eps: direct.rms_norm_add(x, residual, weight, eps),
    lambda x, residual, weight, eps: like(x),
)
register(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    lambda x, residual, weight, eps: direct.add_rms_norm(x, residual, weight, eps),
    lambda x, residual, weight, eps: (like(x), like(x)),
)
register(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, float eps, bool weight_grad)"
    " -> (Tensor, Tensor)",
    lambda *arguments: direct.rms_norm_backward(*arguments),
    lambda grad, x, weight, eps, weight_grad: (like(x), like_if(weight_grad, weight)),
)
register(
    "add_rms_norm_backward(Tensor grad, Tensor grad_residual, Tensor new_residual, Tensor weight,"
    " float eps, bool weight_grad) -> (Tensor, Tensor)",
    lambda *arguments: direct.add_rms_norm_backward(*arguments),
    lambda grad, grad_residual, new_residual, weight, eps, weight_grad: (
        like(new_residual),
        like_if(weight_grad, weight),
    ),
)


def _save_normed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(tensors[0], tensors[-1])


def _save_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, weight, ctx.eps = inputs
    ctx.save_for_backward(output[1], weight)


def _norm_gradients(ctx: Any, grad: Tensor, weight_index: int) -> tuple[Tensor, Tensor | None]:
    """Of x, and of weight if it wants one."""
    wanted = ctx.needs_input_grad[weight_index]
    grads = registered.rms_norm_backward(grad, *ctx.saved_tensors, ctx.eps, wanted)
    return grads[0], grads[1] if wanted else None


def _rms_norm_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return (*_norm_gradients(ctx, grad, 1), None)


def _rms_norm_add_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grad_x, grad_weight = _norm_gradients(ctx, grad, 2)
    return grad_x, grad, grad_weight, None


def _add_rms_norm_gradient(ctx: Any, grad: Tensor, grad_residual: Tensor) -> tuple[Any, ...]:
    wanted = ctx.needs_input_grad[2]
    arguments = (grad, grad_residual, *ctx.saved_tensors, ctx.eps, wanted)
    grad_sum, grad_weight = registered.add_rms_norm_backward(*arguments)
    return grad_sum, grad_sum, grad_weight if wanted else None, None


differentiate("rms_norm", _save_normed, _rms_norm_gradient)
differentiate("rms_norm_add", _save_normed, _rms_norm_add_gradient)
differentiate("add_rms_norm", _save_sum, _add_rms_norm_gradient)
differentiate_once("rms_norm_backward")
differentiate_once("add_rms_norm_backward")


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None) -> Tensor:
    """As :func:`exafuse.reference.rms_norm`."""
    return deliver(registered.rms_norm(x, weight, eps), out)


def rms_norm_add(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None
) -> Tensor:
    """As :func:`exafuse.reference.rms_norm_add`."""
    return deliver(registered.rms_norm_add(x, residual, weight, eps), out)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """As :func:`exafuse.reference.add_rms_norm`."""
    y, new_residual = registered.add_rms_norm(x, residual, weight, eps)
    y_out, residual_out = check_buffers(out, 2)
    return deliver(y, y_out), deliver(new_residual, residual_out, "out[1]")
