"""The written-out gradients that the backward kernels are judged by, against autograd in fp64."""

from __future__ import annotations

import backward_oracles
import numpy as np
import pytest
import torch
from poison import generator
from torch import Tensor

CASES = 40


def assert_same(mine: backward_oracles.Gradient | None, theirs: Tensor) -> None:
    assert mine is not None
    wanted = theirs.numpy()
    assert mine.value.shape == wanted.shape
    assert np.abs(mine.value - wanted).max(initial=0.0) <= 1e-12 * np.abs(wanted).max(initial=1.0)
    assert (mine.magnitude >= np.abs(mine.value) * (1 - 1e-12)).all()


def test_silu_and_mul() -> None:
    for seed in range(CASES):
        gen = generator("silu oracle", seed)
        gate, up, grad = (torch.randn(3, 17, generator=gen).double() * 5 for _ in range(3))
        inputs = gate.requires_grad_(), up.requires_grad_()
        theirs = torch.autograd.grad(torch.nn.functional.silu(gate) * up, inputs, grad)
        mine = backward_oracles.silu_and_mul(grad, gate.detach(), up.detach())
        for a, b in zip(mine, theirs, strict=True):
            assert_same(a, b)


@pytest.mark.parametrize("has_norm", [True, False])
@pytest.mark.parametrize("has_rope", [True, False])
def test_norm_rope(has_norm: bool, has_rope: bool) -> None:
    tokens, heads, dim, rows, eps = 4, 3, 16, 7, 1e-3
    for seed in range(CASES):
        gen = generator("rope oracle", seed)
        x, grad = (torch.randn(tokens, heads, dim, generator=gen).double() for _ in range(2))
        weight = torch.randn(dim, generator=gen).double().requires_grad_()
        angles = torch.rand(rows, dim // 2, generator=gen).double() * 9
        cos, sin = angles.cos(), angles.sin()
        positions = torch.randint(0, rows, (tokens,), generator=gen)
        x.requires_grad_()
        y = x
        if has_norm:
            y = y / (y.square().mean(-1, keepdim=True) + eps).sqrt() * weight
        if has_rope:
            turn = torch.complex(cos, sin)[positions][:, None]
            pairs = torch.complex(y[..., : dim // 2], y[..., dim // 2 :]) * turn
            y = torch.cat([pairs.real, pairs.imag], -1)
        wanted = torch.autograd.grad(y + 0, (x, weight), grad, allow_unused=True)
        table = (cos, sin, positions) if has_rope else (None, None, None)
        mine = backward_oracles.norm_rope(
            grad, x.detach(), weight.detach() if has_norm else None, *table, eps
        )
        assert_same(mine[0], wanted[0])
        if has_norm:
            assert_same(mine[1], wanted[1])
        else:
            assert mine[1] is None
            assert wanted[1] is None
