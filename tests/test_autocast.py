"""Autocast leaves the ops alone: dtypes and bits of every result are those outside of it."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from api_calls import CALLS, cloned
from exafuse import ops
from kernel_backends import Backend, emulated
from torch import Tensor, nn

__all__ = ["emulated"]  # a fixture

BF16 = torch.bfloat16
DTYPES = [torch.float32, torch.float16, BF16]


@pytest.fixture(params=["auto", "emulated"])
def module(request: pytest.FixtureRequest, emulated: Backend) -> ModuleType:
    return ops if request.param == "auto" else emulated.ops


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_are_those_outside(name: str, dtype: torch.dtype, module: ModuleType) -> None:
    call = CALLS[name]
    arguments = call.arguments(dtype)
    plain = call.run(module, cloned(arguments))
    for autocast in (BF16, torch.float16):
        with torch.autocast("cpu", dtype=autocast):
            inside = call.run(module, cloned(arguments))
        for ours, theirs in zip(inside, plain, strict=True):
            assert ours.dtype == theirs.dtype == dtype
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", [n for n in CALLS if "cache" not in n])
def test_gradients_are_those_outside(name: str, module: ModuleType) -> None:
    call, gradients = CALLS[name], []
    for enabled in (False, True):
        arguments = call.arguments(BF16)
        leaves = [
            x.requires_grad_()
            for n, x in arguments.items()
            if isinstance(x, Tensor) and x.is_floating_point() and n not in ("cos", "sin")
        ]
        with torch.autocast("cpu", dtype=torch.float16, enabled=enabled):
            results = call.run(module, arguments)
        loss = torch.stack([r.float().square().sum() for r in results])
        gradients.append(torch.autograd.grad(loss.sum(), leaves))
    for outside, inside in zip(*gradients, strict=True):
        assert outside.dtype == inside.dtype
        assert torch.equal(outside, inside)


def test_linear_layers_round_and_norm_weights_stay(module: ModuleType) -> None:
    """What a model under autocast does: bf16 from its linear layers beside fp32 weights."""
    x, linear, weight = torch.randn(4, 32), nn.Linear(32, 64), torch.randn(64)
    with torch.autocast("cpu", dtype=BF16):
        hidden = linear(x)
        assert hidden.dtype == BF16
        assert module.rms_norm(hidden, weight, 1e-6).dtype == BF16
        assert module.silu_and_mul(hidden).dtype == BF16
        with pytest.raises(ValueError, match=r"^residual: expected dtype bfloat16, got float32"):
            module.add_rms_norm(hidden, torch.randn(4, 64), weight, 1e-6)
