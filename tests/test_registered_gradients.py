"""Gradients of the registered ops where their kernels run: computed by those, in eager mode and
compiled, and only where they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import backward_oracles
import pytest
import torch
from exafuse import reference
from exafuse.ops import front_door, registered
from exafuse.ops.registered import library
from kernel_backends import Backend, emulated
from numeric import assert_bitwise_equal, assert_close
from poison import generator
from test_registered_ops import INPUTS, Draw, tensors
from torch import Tensor
from torch.library import opcheck

__all__ = ["emulated"]  # a fixture

EPS = 1e-5
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
OPS = ["rms_norm", "add_rms_norm", "rms_norm_add"]


class Counted:
    """The emulated extension, with a list of the functions that were called."""

    def __init__(self, extension: Any) -> None:
        self.extension, self.calls = extension, []  # type: ignore[var-annotated]

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.extension, name)
        if name in front_door.GRADIENTS:
            self.calls.append(name)
        return found


@pytest.fixture
def kernels(emulated: Backend, monkeypatch: pytest.MonkeyPatch) -> Counted:
    """Registered ops run on the emulator, as they do on a GPU."""
    from exafuse import ops

    door = ops.Ops("emulated")
    counted = Counted(front_door.load_emulated())
    door._extension = counted
    monkeypatch.setattr(library.direct, "ops", door)
    return counted


def inputs_of(op: str, dtype: torch.dtype, *shape: int) -> list[Tensor]:
    gen = generator(op, dtype, shape)
    given = [torch.randn(shape, generator=gen).to(dtype) for _ in range(1 + ("add" in op))]
    return [*given, torch.randn(shape[-1], generator=gen).to(dtype) + 1]


def of_loss(
    op: Callable[..., Any], given: list[Tensor], weights: list[Tensor]
) -> tuple[Tensor, ...]:
    """Gradients of a sum over the results, for the tensors that ask."""
    results = op(*given, EPS)
    results = results if isinstance(results, tuple) else (results,)
    loss = sum((y * w).sum() for y, w in zip(results, weights, strict=False))
    assert isinstance(loss, Tensor)
    return torch.autograd.grad(loss, [x for x in given if x.requires_grad])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_gradients_come_from_the_kernels(op: str, dtype: torch.dtype, kernels: Counted) -> None:
    for shape in ((64,), (7, 136), (2, 9, 64), (3, 2056)):
        given = [x.requires_grad_() for x in inputs_of(op, dtype, *shape)]
        gen = generator("weights", op, shape)
        weights = [torch.randn(shape, generator=gen).to(dtype) for _ in range(2)]
        grads = of_loss(getattr(registered, op), given, weights)
        x = given[0] + given[1] if op == "add_rms_norm" else given[0]
        past = weights[1] if op == "add_rms_norm" else None
        wanted = backward_oracles.rms_norm(weights[0], x, given[-1], EPS, past)
        for grad, want in ((grads[0], wanted[0]), (grads[-1], wanted[1])):
            assert_close(
                grad, want.value, magnitude=want.magnitude, correctly_rounded=None, label=op
            )
        if op == "rms_norm_add":
            assert_bitwise_equal(grads[1], weights[0])
        if op == "add_rms_norm":
            assert_bitwise_equal(grads[1], grads[0])
    name = "add_rms_norm_backward" if op == "add_rms_norm" else "rms_norm_backward"
    assert kernels.calls == [name] * 4


@pytest.mark.parametrize("op", OPS)
def test_a_frozen_weight_costs_no_gradient(op: str, kernels: Counted) -> None:
    given = inputs_of(op, torch.float32, 5, 64)
    ones = [torch.ones(5, 64)] * 2
    both = of_loss(getattr(registered, op), [x.requires_grad_() for x in given], ones)
    frozen = [*given[:-1], given[-1].detach()]
    kernels.extension = NoWorkspace(kernels.extension)
    alone = of_loss(getattr(registered, op), frozen, ones)
    for a, b in zip(alone, both, strict=False):
        assert_bitwise_equal(a, b)


class NoWorkspace:
    """An extension that nobody may ask for room to sum in."""

    def __init__(self, extension: Any) -> None:
        self.extension = extension

    def __getattr__(self, name: str) -> Any:
        assert "workspace" not in name
        return getattr(self.extension, name)


@pytest.mark.parametrize("op", OPS)
def test_any_gradient_that_autograd_hands_over(op: str, kernels: Counted) -> None:
    """One expanded number, a slice, a transposed tensor: where the last stride is not 1 it is
    copied."""
    given = [x.requires_grad_() for x in inputs_of(op, torch.float32, 4, 6, 64)]
    theirs = [x.detach().requires_grad_() for x in given]
    for use in (
        lambda y: y.sum(),
        lambda y: y.transpose(0, 2).square().sum(),
        lambda y: y[::2, 1:].square().sum(),
        lambda y: y.flatten(0, 1)[:, 8:16].square().sum(),
        lambda y: y[None, :, None, None, :].square().sum(),
    ):

        def loss(op: Callable[..., Any], x: list[Tensor], use: Any = use) -> Tensor:
            results = op(*x, EPS)
            total: Tensor = sum(map(use, results if isinstance(results, tuple) else (results,)))
            return total

        mine = torch.autograd.grad(loss(getattr(registered, op), given), given)
        other = torch.autograd.grad(loss(getattr(reference, op), theirs), theirs)
        for a, b in zip(mine, other, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    assert len(kernels.calls) == 5


@pytest.mark.parametrize("op", INPUTS)
def test_a_second_derivative_is_refused(op: str) -> None:
    """torch alone would warn, and give the wrong numbers."""
    inputs = INPUTS[op](Draw(1))
    y = tensors(getattr(registered, op)(*inputs))[0]
    asked = [x for x in tensors(inputs) if x.requires_grad]
    grads = torch.autograd.grad(y.square().sum(), asked, create_graph=True, allow_unused=True)
    with pytest.raises(NotImplementedError, match=r"exafuse\.reference\.\w+ has them all"):
        sum(x.sum() for x in grads if x is not None).backward()


@pytest.mark.parametrize("op", ["rms_norm_backward", "add_rms_norm_backward"])
@pytest.mark.parametrize("weight_grad", [True, False])
def test_opcheck_of_the_gradients(op: str, weight_grad: bool, kernels: Counted) -> None:
    x = torch.randn(5, 64, generator=generator(op))
    grads = (x.flip(0),) if op == "rms_norm_backward" else (x.flip(0), x.flip(1))
    opcheck(getattr(torch.ops.exafuse, op), (*grads, x, torch.ones(64), EPS, weight_grad))


@pytest.mark.slow
def test_compiled_gradients_are_those_of_eager_mode(kernels: Counted) -> None:
    def block(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        y, x = registered.add_rms_norm(x, residual, weight, EPS)
        y = registered.rms_norm_add(y * 2, x, weight, EPS)
        return registered.rms_norm(y, weight, EPS) + x

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 9, 40):
        given = [x.requires_grad_() for x in inputs_of("add", torch.float32, rows, 64)]
        weights = torch.randn(rows, 64, generator=generator("compiled", rows))
        mine, theirs = (
            torch.autograd.grad((f(*given) * weights).sum(), given) for f in (compiled, block)
        )
        for a, b in zip(mine, theirs, strict=True):
            assert float((a - b).norm()) <= 2e-6 * float(b.norm())
    assert len(kernels.calls) == 3 * 2 * 3


@pytest.mark.parametrize("op", OPS)
def test_no_rows_have_gradients_too(op: str, kernels: Counted) -> None:
    """What a sum hands back for them is expanded, and contiguous whatever its strides."""
    rows = [torch.empty(0, 64, requires_grad=True) for _ in range(1 + (op != "rms_norm"))]
    weight = torch.ones(64, requires_grad=True)
    results = getattr(registered, op)(*rows, weight, EPS)
    results = (results,) if isinstance(results, Tensor) else results
    sum(x.sum() for x in results).backward()
    assert weight.grad is not None
    assert weight.grad.eq(0).all()
    assert all(x.grad is not None and x.grad.shape == (0, 64) for x in rows)
    assert kernels.calls
