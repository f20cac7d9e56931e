"""silu_and_mul as a registered op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from exafuse.ops.registered.library import differentiate, direct, like, register, registered
from exafuse.reference import backward
from exafuse.reference._check import deliver


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """gate and up, from the packed tensor or the pair."""
    if up is not None:
        return gate, up
    size = gate.shape[-1] // 2
    return gate[..., :size], gate[..., size:]


def _backward(grad: Tensor, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    grads = backward.silu_and_mul(grad, *_halves(gate, up))
    return grads if up is not None else (torch.cat(grads, -1), grad.new_empty(0))


register(
    "silu_and_mul(Tensor gate, Tensor? up) -> Tensor",
    lambda gate, up: direct.silu_and_mul(gate, up),
    lambda gate, up: like(_halves(gate, up)[0]),
)
register(
    "silu_and_mul_backward(Tensor grad, Tensor gate, Tensor? up) -> (Tensor, Tensor)",
    _backward,
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


def silu_and_mul(gate_up: Tensor, up: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """As :func:`exafuse.reference.silu_and_mul`."""
    return deliver(registered.silu_and_mul(gate_up, up), out)
