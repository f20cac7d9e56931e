"""RMSNorm and its gradients on the kernels of csrc/kernels/rms_norm.cu and rms_norm_backward.cu;
semantics in :mod:`exafuse.reference`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from exafuse import reference
from exafuse.ops.front_door import FrontDoor, documented_by, with_rows
from exafuse.reference import backward
from exafuse.reference._check import check_buffers


class NormOps(FrontDoor):
    """The ops of this file, on one backend."""

    @documented_by(reference.rms_norm)
    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None
    ) -> Tensor:
        kernels = self.kernels(x, weight, out)
        if kernels is None:
            return self.beyond(x, reference.rms_norm)(x, weight, eps, out=out)
        try:
            y = torch.empty_like(x) if out is None else out
            kernels.rms_norm(x, weight, eps, y)
        except kernels.NotAPlainTensor:
            return self.beyond(x, reference.rms_norm)(x, weight, eps, out=out)
        if out is not None:
            self.written(out)
        return y

    @documented_by(reference.add_rms_norm)
    def add_rms_norm(
        self,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        *,
        out: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        y, new_residual = check_buffers(out, 2)
        kernels = self.kernels(x, residual, weight, y, new_residual)
        if kernels is None:
            return self.beyond(x, reference.add_rms_norm)(x, residual, weight, eps, out=out)
        try:
            y = torch.empty_like(x) if y is None else y
            new_residual = torch.empty_like(x) if new_residual is None else new_residual
            kernels.add_rms_norm(x, residual, weight, eps, y, new_residual)
        except kernels.NotAPlainTensor:
            return self.beyond(x, reference.add_rms_norm)(x, residual, weight, eps, out=out)
        if out is not None:
            self.written(y, new_residual)
        return y, new_residual

    @documented_by(reference.rms_norm_add)
    def rms_norm_add(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None
    ) -> Tensor:
        kernels = self.kernels(x, residual, weight, out)
        if kernels is None:
            return self.beyond(x, reference.rms_norm_add)(x, residual, weight, eps, out=out)
        try:
            y = torch.empty_like(x) if out is None else out
            kernels.rms_norm_add(x, residual, weight, eps, y)
        except kernels.NotAPlainTensor:
            return self.beyond(x, reference.rms_norm_add)(x, residual, weight, eps, out=out)
        if out is not None:
            self.written(out)
        return y

    def rms_norm_backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, eps: float, weight_grad: bool
    ) -> tuple[Tensor, Tensor]:
        """Gradients of ``x [..., hidden]`` and ``weight [hidden]`` for ``rms_norm``.

        Without ``weight_grad`` that of weight is an empty tensor.
        """
        kernels = self.kernels(x, weight, grad)
        if kernels is not None:
            try:
                grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
                grad_weight, workspace = _for_weight(kernels, x, weight, weight_grad)
                arguments = (with_rows(grad), x, weight, eps, grad_x, grad_weight, workspace)
                kernels.rms_norm_backward(*arguments)
                return grad_x, weight.new_empty(0) if grad_weight is None else grad_weight
            except kernels.NotAPlainTensor:
                pass
        grad_x, d_weight = backward.rms_norm(grad, x, weight, eps)
        return grad_x, d_weight if weight_grad else weight.new_empty(0)

    def add_rms_norm_backward(
        self,
        grad: Tensor,
        grad_residual: Tensor,
        new_residual: Tensor,
        weight: Tensor,
        eps: float,
        weight_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the sum and of ``weight [hidden]`` for ``add_rms_norm``.

        Without ``weight_grad`` that of weight is an empty tensor.
        """
        kernels = self.kernels(new_residual, weight, grad, grad_residual)
        if kernels is not None:
            try:
                grad_sum = torch.empty_like(new_residual, memory_format=torch.contiguous_format)
                grad_weight, workspace = _for_weight(kernels, new_residual, weight, weight_grad)
                grads = with_rows(grad), with_rows(grad_residual)
                results = (grad_sum, grad_weight, workspace)
                kernels.add_rms_norm_backward(*grads, new_residual, weight, eps, *results)
                return grad_sum, weight.new_empty(0) if grad_weight is None else grad_weight
            except kernels.NotAPlainTensor:
                pass
        arguments = (grad, grad_residual, new_residual, weight, eps)
        grad_sum, d_weight = backward.add_rms_norm(*arguments)
        return grad_sum, d_weight if weight_grad else weight.new_empty(0)


def _for_weight(
    kernels: Any, x: Tensor, weight: Tensor, wanted: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Where the gradient of weight goes, and the workspace that it is summed in."""
    if not wanted:
        return None, None
    hidden = x.shape[-1]
    sizes = (x.numel() // max(hidden, 1), hidden, x.element_size())
    num_bytes = kernels.rms_norm_backward_workspace(*sizes)
    workspace = torch.empty(num_bytes // 4, dtype=torch.float32, device=x.device)
    return torch.empty_like(weight, memory_format=torch.contiguous_format), workspace
