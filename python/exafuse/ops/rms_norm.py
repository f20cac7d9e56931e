"""RMSNorm on the kernels of csrc/kernels/rms_norm.cu; semantics in :mod:`exafuse.reference`."""

from __future__ import annotations

import torch
from torch import Tensor

from exafuse import reference
from exafuse.ops.front_door import FrontDoor


class NormOps(FrontDoor):
    """The ops of this file, on one backend."""

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None
    ) -> Tensor:
        """Root-mean-square norm over the last dimension.

        Args:
            x: ``[..., hidden]``, bf16, fp16 or fp32; hidden a multiple of 8 up to 65536 on a GPU.
            weight: ``[hidden]``, the dtype of ``x`` or fp32.
            eps: added to the mean square.
            out: optional result buffer, shape and dtype of ``x``; may be ``x``.

        Returns:
            ``x * rsqrt(mean(x^2) + eps) * weight``, computed in fp32 and rounded once.
        """
        kernels = self.kernels(x, weight, out)
        if kernels is None:
            return reference.rms_norm(x, weight, eps, out=out)
        try:
            y = torch.empty_like(x) if out is None else out
            kernels.rms_norm(x, weight, eps, y)
        except kernels.NotAPlainTensor:
            return reference.rms_norm(x, weight, eps, out=out)
        if out is not None:
            self.written(out)
        return y

    def add_rms_norm(
        self,
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
            ``(y, new_residual)``: ``new_residual = x + residual`` rounded to the dtype, and ``y``
            the norm of that rounded sum.
        """
        y, new_residual = out if out is not None else (None, None)
        kernels = self.kernels(x, residual, weight, y, new_residual)
        if kernels is None:
            return reference.add_rms_norm(x, residual, weight, eps, out=out)
        try:
            y = torch.empty_like(x) if y is None else y
            new_residual = torch.empty_like(x) if new_residual is None else new_residual
            kernels.add_rms_norm(x, residual, weight, eps, y, new_residual)
        except kernels.NotAPlainTensor:
            return reference.add_rms_norm(x, residual, weight, eps, out=out)
        if out is not None:
            self.written(y, new_residual)
        return y, new_residual

    def rms_norm_add(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None
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
        kernels = self.kernels(x, residual, weight, out)
        if kernels is None:
            return reference.rms_norm_add(x, residual, weight, eps, out=out)
        try:
            y = torch.empty_like(x) if out is None else out
            kernels.rms_norm_add(x, residual, weight, eps, y)
        except kernels.NotAPlainTensor:
            return reference.rms_norm_add(x, residual, weight, eps, out=out)
        if out is not None:
            self.written(out)
        return y
