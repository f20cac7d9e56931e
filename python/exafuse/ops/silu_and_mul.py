"""The SwiGLU activation on the kernel of csrc/kernels/silu_and_mul.cu."""

from __future__ import annotations

from torch import Tensor

from exafuse import reference
from exafuse.ops.front_door import FrontDoor, documented_by


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


def _new_output(gate_up: Tensor, up: Tensor | None) -> Tensor:
    if up is not None or gate_up.dim() == 0:
        return gate_up.new_empty(gate_up.shape)
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))
