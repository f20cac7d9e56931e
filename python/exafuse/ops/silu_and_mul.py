"""The SwiGLU activation and its gradients on the kernels of csrc/kernels/silu_and_mul.cu and
silu_and_mul_backward.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from exafuse import reference
from exafuse.ops.front_door import FrontDoor, documented_by, with_rows
from exafuse.reference import backward


class ActivationOps(FrontDoor):
    """The op of this file, on one backend."""

    @documented_by(reference.silu_and_mul)
    def silu_and_mul(
        self, gate_up: Tensor, up: Tensor | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        kernels = self.kernels(gate_up, up, out)
        if kernels is None:
            return self.beyond(gate_up, reference.silu_and_mul)(gate_up, up, out=out)
        try:
            y = _new_output(gate_up, up) if out is None else out
            kernels.silu_and_mul(gate_up, up, y)
        except kernels.NotAPlainTensor:
            return self.beyond(gate_up, reference.silu_and_mul)(gate_up, up, out=out)
        if out is not None:
            self.written(out)
        return y

    def silu_and_mul_backward(
        self, grad: Tensor, gate: Tensor, up: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Gradients of ``gate`` and ``up [..., intermediate_size]``; without ``up`` that of the
        packed ``gate [..., 2 * intermediate_size]``, and an empty tensor."""
        kernels = self.kernels(gate, up, grad)
        if kernels is not None:
            try:
                grad_gate = torch.empty_like(gate, memory_format=torch.contiguous_format)
                grad_up = None
                if up is not None:
                    grad_up = torch.empty_like(up, memory_format=torch.contiguous_format)
                kernels.silu_and_mul_backward(with_rows(grad), gate, up, grad_gate, grad_up)
                return grad_gate, grad.new_empty(0) if grad_up is None else grad_up
            except kernels.NotAPlainTensor:
                pass
        if up is not None:
            return backward.silu_and_mul(grad, gate, up)
        halves = backward.silu_and_mul(grad, *gate.chunk(2, -1))
        return torch.cat(halves, -1), grad.new_empty(0)


def _new_output(gate_up: Tensor, up: Tensor | None) -> Tensor:
    if up is not None or gate_up.dim() == 0:
        return gate_up.new_empty(gate_up.shape)
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))
