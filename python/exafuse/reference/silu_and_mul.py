"""The activation of SwiGLU feed-forward layers (Shazeer 2020)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from exafuse.reference._check import Shapes, check_device, check_float, deliver


def silu_and_mul(gate_up: Tensor, up: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """``silu(gate) * up``, computed in fp32 and rounded once.

    Args:
        gate_up: ``[..., 2 * intermediate_size]``, gate in the first half, up in the second; or
            the gate alone, ``[..., intermediate_size]``, when ``up`` is given.
        up: ``[..., intermediate_size]`` or None.
        out: optional result buffer ``[..., intermediate_size]``; may be gate or up.

    Returns:
        ``[..., intermediate_size]`` in the dtype of the input.
    """
    check_float("gate_up" if up is None else "gate", gate_up)
    if gate_up.dim() == 0:
        raise ValueError("gate_up: expected (..., 2 * intermediate_size), got ()")
    if up is None:
        if gate_up.shape[-1] % 2:
            raise ValueError(
                f"gate_up: expected (..., 2 * intermediate_size), got {tuple(gate_up.shape)}"
            )
        gate, up = gate_up.chunk(2, dim=-1)
    else:
        check_float("up", up, gate_up.dtype)
        Shapes().match("up", up, *gate_up.shape)
        check_device(gate_up.device, up=up)
        gate = gate_up
    return deliver((F.silu(gate.float()) * up.float()).to(gate.dtype), out)
