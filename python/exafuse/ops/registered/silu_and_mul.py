"""silu_and_mul as a registered op."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from exafuse.ops.registered.library import (
    differentiate,
    differentiate_once,
    direct,
    like,
    register,
    registered,
)
from exafuse.reference._check import deliver


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """gate and up, from the packed tensor or the pair."""
    if up is not None:
        return gate, up
    size = gate.shape[-1] // 2
    return gate[..., :size], gate[..., size:]


register(
    "silu_and_mul(Tensor gate, Tensor? up) -> Tensor",
    lambda gate, up: direct.silu_and_mul(gate, up),
    lambda gate, up: like(_halves(gate, up)[0]),
)
register(
    "silu_and_mul_backward(Tensor grad, Tensor gate, Tensor? up) -> (Tensor, Tensor)",
    lambda grad, gate, up: direct.silu_and_mul_backward(grad, gate, up),
    lambda grad, gate, up: (
        like(gate),
        grad.new_empty(0) if up is None else like(up),
    ),
)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor | None], output: Tensor) -> None:
    ctx.packed = inputs[1] is None
    ctx.save_for_backward(*(x for x in inputs if x is not None))


def _gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    gate, up = (*ctx.saved_tensors, None) if ctx.packed else ctx.saved_tensors
    grad_gate, grad_up = registered.silu_and_mul_backward(grad, gate, up)
    return grad_gate, None if ctx.packed else grad_up


differentiate("silu_and_mul", _save, _gradient)
differentiate_once("silu_and_mul_backward")


def silu_and_mul(gate_up: Tensor, up: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """As :func:`exafuse.reference.silu_and_mul`."""
    return deliver(registered.silu_and_mul(gate_up, up), out)
