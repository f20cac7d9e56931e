"""RMSNorm on the kernels of csrc/kernels/rms_norm.cu; semantics in :mod:`exafuse.reference`."""

from __future__ import annotations

import torch
from torch import Tensor

from exafuse import reference
from exafuse.ops.front_door import FrontDoor, documented_by
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
