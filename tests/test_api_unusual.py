"""Tensors that are right but out of the ordinary, in place of every argument of every op.

Layouts, expanded and negated views, parameters, subclasses, tensors without memory, empty ones and
those that carry gradients: each call gives what the same call on plain tensors gives, or says which
argument it cannot take.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from api_calls import CALLS, ROWS, Arguments, Call, cloned, named_in
from exafuse import ops, reference
from kernel_backends import Backend, emulated
from poison import layouts
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from wrong_arguments import columns, misaligned

__all__ = ["emulated"]  # a fixture

BF16 = torch.bfloat16
PATHS = ("kernels", "reference", "auto")


class Wrapped(torch.Tensor):
    """A subclass without a dispatch of its own."""


def module_of(path: str, emulated: Backend) -> ModuleType:
    return {"kernels": emulated.ops, "reference": reference, "auto": ops}[path]


def close(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for ours, theirs in zip(results, expected, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        # The weights of values are rounded by kernels.
        ours, theirs = ours.as_subclass(Tensor).float(), theirs.as_subclass(Tensor).float()
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=1e-2)


def unusual(name: str, value: Tensor) -> Iterator[tuple[str, Tensor, Tensor, bool]]:
    """`(what, view, the same values as a plain tensor, whether a kernel may refuse)`."""
    for layout, view in layouts(value):
        yield layout, view, value, False
    yield "a parameter", torch.nn.Parameter(value, requires_grad=False), value, False
    yield "a subclass", value.as_subclass(Wrapped), value, False
    if value.is_floating_point():
        yield "a negated view", torch._neg_view(value), -value, name.endswith("_cache")
    if value.dim() > 1:
        row = value[:1].expand(value.shape)
        yield "one row expanded", row, row.contiguous(), True
    if value.is_floating_point() and not name.endswith("_cache"):
        column = value[..., :1].expand(value.shape)
        yield "one column expanded", column, column.contiguous(), True
    yield "stride 2", columns(value).copy_(value), value, True
    yield "an odd address", misaligned(value).copy_(value), value, True


def refusal(
    call: Call, module: ModuleType, arguments: Arguments, expected: tuple[Tensor, ...]
) -> Exception | None:
    """The error of a call; without one, its results are checked."""
    try:
        results = call.run(module, arguments)
    except Exception as error:
        return error
    close(results, expected)
    return None


@pytest.mark.emulated
@pytest.mark.parametrize("name", CALLS)
def test_unusual_tensors_give_the_usual_results(name: str, emulated: Backend) -> None:
    call, count = CALLS[name], 0
    arguments = call.arguments(BF16)
    for argument, value in arguments.items():
        if not isinstance(value, Tensor):
            continue
        for what, view, plain, refusable in unusual(argument, value):
            if argument in call.mutated and "expanded" in what:
                continue  # an output on itself
            expected = call.run(reference, {**cloned(arguments), argument: plain.clone()})
            for path in PATHS:
                module = module_of(path, emulated)
                given = cloned(arguments) | {argument: view}
                if argument in call.mutated:
                    given[argument] = view = view.detach()
                    before = view.clone()
                error = refusal(call, module, given, expected)
                label = f"{path}: {argument}: {what}: {error!r}"
                if error is not None:
                    odd = "attn" in call.op and "odd" in what
                    assert isinstance(error, ValueError), label
                    assert path == "kernels", label
                    assert refusable or odd or "16" in str(error), label
                    assert named_in(error) & {argument, "gate", "q"}, label
                if argument in call.mutated:
                    with torch.no_grad():
                        view.copy_(before)
                count += path == "kernels"
    emulated.count(count)


@pytest.mark.parametrize("path", ["kernels", "auto"])
@pytest.mark.parametrize("name", CALLS)
def test_tensors_without_memory_give_shapes(name: str, path: str, emulated: Backend) -> None:
    call, module = CALLS[name], module_of(path, emulated)
    arguments = call.arguments(BF16)
    expected = call.run(reference, cloned(arguments))
    meta = {n: x.to("meta") if isinstance(x, Tensor) else x for n, x in arguments.items()}
    with FakeTensorMode() as mode:
        fake = {
            n: mode.from_tensor(x) if isinstance(x, Tensor) else x for n, x in arguments.items()
        }
        faked = call.run(module, fake)
    for results, device in ((call.run(module, meta), "meta"), (faked, "cpu")):
        for ours, theirs in zip(results, expected, strict=True):
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
            assert ours.device.type == device
            assert ours.is_meta or type(ours).__name__ == "FakeTensor"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ROWS)
def test_without_rows_there_is_an_empty_result(name: str, path: str, emulated: Backend) -> None:
    call = CALLS[name]
    for dtype in (BF16, torch.float16, torch.float32):
        for with_buffers in (False, True):
            arguments = call.arguments(dtype)
            arguments |= {row: arguments[row][:0] for row in ROWS[name]}
            if with_buffers:
                arguments |= {n: x[:0] for n, x in call.outputs(dtype).items()}
            results = call.run(module_of(path, emulated), arguments)
            for result, shape in zip(results, call.buffers.values(), strict=False):
                assert result.shape == (0, *shape[1:])
                assert result.dtype == dtype
            for name_, result in zip(call.mutated, results[len(call.buffers) :], strict=True):
                assert torch.equal(result, call.arguments(dtype)[name_])


def differentiable(arguments: Arguments) -> list[str]:
    tables = ("cos", "sin", "k_cache", "v_cache")
    return [
        n
        for n, x in arguments.items()
        if isinstance(x, Tensor) and x.is_floating_point() and n not in tables
    ]


def gradient(call: Call, module: ModuleType, arguments: Arguments, leaf: str) -> Tensor:
    given = cloned(arguments)
    x = given[leaf].requires_grad_()
    weights = torch.Generator().manual_seed(1)
    loss = torch.zeros(())
    for result in call.run(module, given):
        if result.requires_grad:
            loss = loss + (result * torch.randn(result.shape, generator=weights)).sum()
        else:
            torch.randn(result.shape, generator=weights)
    return torch.autograd.grad(loss, x)[0]


@pytest.mark.parametrize("path", ["kernels", "auto"])
@pytest.mark.parametrize("name", CALLS)
def test_inputs_that_carry_gradients(name: str, path: str, emulated: Backend) -> None:
    """A gradient that is the reference's, or a refusal; with a result buffer always a refusal."""
    call, module = CALLS[name], module_of(path, emulated)
    arguments = call.arguments(torch.float32)
    inference_only = call.op in ("qk_norm_rope_cache", "flash_attn_with_kvcache")
    for leaf in differentiable(arguments):
        given = cloned(arguments)
        given[leaf].requires_grad_()
        if inference_only:
            with pytest.raises(ValueError, match=r"gradient.*torch.no_grad\(\)"):
                call.run(module, given)
        else:
            mine = gradient(call, module, arguments, leaf)
            theirs = gradient(call, reference, arguments, leaf)
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
            message = r"^out(\[\d\])?: a preallocated output cannot carry a gradient"
            with pytest.raises(ValueError, match=message):
                call.run(module, {**given, **call.outputs(torch.float32)})
        with torch.no_grad():
            results = call.run(module, {**given, **call.outputs(torch.float32)})
        assert not any(x.requires_grad for x in results[: len(call.buffers)])
    for buffer in call.buffers:
        outputs = call.outputs(torch.float32)
        outputs[buffer].requires_grad_()
        with pytest.raises(ValueError, match=r"^out(\[\d\])?: a preallocated output cannot"):
            call.run(module, {**cloned(arguments), **outputs})
    for cache in call.mutated:
        given = cloned(arguments)
        given[cache].requires_grad_()
        with pytest.raises(ValueError, match=r"gradient.*torch.no_grad\(\)"):
            call.run(module, given)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", [n for n in CALLS if "rope" in n or "vision" in n])
def test_tables_have_no_gradient_and_say_so(name: str, path: str, emulated: Backend) -> None:
    call = CALLS[name]
    for table in ("cos", "sin"):
        arguments = call.arguments(torch.float32)
        arguments[table].requires_grad_()
        with pytest.raises(ValueError, match=r"^cos, sin: .*gradient.*detach"):
            call.run(module_of(path, emulated), arguments)
        with torch.no_grad():
            call.run(module_of(path, emulated), arguments)
