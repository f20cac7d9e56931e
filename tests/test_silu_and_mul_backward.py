"""The kernel behind the gradients of silu_and_mul against gradients in float64: random shapes and
layouts, every 16-bit gate, extremes."""

from __future__ import annotations

import random
from types import ModuleType
from typing import Any

import backward_oracles
import pytest
import torch
from backward_backends import backward_extension
from emulator.control import Emulator
from exafuse.ops.registered.library import direct
from kernel_backends import (
    Backend,
    backend,
    case_factor,
    emulated,
    emulator_library,
    extension,
)
from numeric import assert_bitwise_equal, assert_close
from poison import Guarded, before_guard_page, every_value, generator, layouts, sparse
from torch import Tensor
from torch.library import opcheck

__all__ = ["backend", "emulated", "extension"]  # fixtures

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SIZES = [1, 2, 3, 7, 8, 9, 16, 24, 31, 64, 100, 127, 128, 136, 255, 256, 264, 513, 1000, 1024]
SIZES += [2048, 2056, 4096, 4100, 4104, 5632]


def run(
    backend: Backend,
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    outputs: tuple[Guarded, Guarded | None],
) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up on the CPU; ``gate`` and the first output are packed without
    ``up``."""
    given = [backend.give_optional(out.tensor if out else None) for out in outputs]
    backward_extension(backend).silu_and_mul_backward(
        backend.give(grad), backend.give(gate), backend.give_optional(up), *given
    )
    first = given[0]
    assert first is not None
    result = backend.take_back(first, outputs[0], "grad_gate")
    if given[1] is None or outputs[1] is None:
        size = grad.shape[-1]
        return result[..., :size], result[..., size:]
    return result, backend.take_back(given[1], outputs[1], "grad_up")


def apart(grad: Tensor) -> tuple[Guarded, Guarded]:
    shape = tuple(grad.shape)
    return Guarded(shape, grad.dtype), Guarded(shape, grad.dtype)


def check(
    results: tuple[Tensor, Tensor],
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    correctly_rounded: float | None = 0.995,
) -> None:
    # One gate can be the whole length of a row: then its rounding is the row's error.
    tolerance = torch.finfo(grad.dtype).eps / 2 + 1e-6
    wanted = backward_oracles.silu_and_mul(grad, gate, up)
    for name, result, want in zip(("grad_gate", "grad_up"), results, wanted, strict=True):
        assert_close(
            result,
            want.value,
            magnitude=want.magnitude,
            row_tolerance=tolerance,
            correctly_rounded=correctly_rounded,
            label=name,
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_shapes_and_layouts(dtype: torch.dtype, backend: Backend) -> None:
    choose = random.Random(f"silu backward {dtype}")
    cases = 200 * case_factor()
    align = 16 // dtype.itemsize
    for number in range(cases):
        size = choose.choice(SIZES)
        leading = choose.choice([(), (1,), (2,), (3,), (5,), (2, 3), (3, 1, 2), (33,)])
        gen = generator("silu backward", dtype, number)
        scale = choose.choice([0.1, 1.0, 10.0, 60.0])
        packed = (torch.randn(*leading, 2 * size, generator=gen) * scale).to(dtype)
        grad = torch.randn(*leading, size, generator=gen).to(dtype)
        gate, up = packed.chunk(2, dim=-1)
        given_grad = choose.choice(list(layouts(grad, align)))[1]
        gap, offset = choose.choice([0, 0, 1, align]), choose.choice([0, 0, 1])
        is_packed = choose.random() < 0.5
        width = 2 * size if is_packed else size
        strides = torch.empty(*leading, width + gap, device="meta").stride()
        outputs = [Guarded((*leading, width), dtype, strides, offset) for _ in range(2)]
        try:
            if is_packed:
                given = choose.choice(list(layouts(packed, align)))[1]
                results = run(backend, given_grad, given, None, (outputs[0], None))
            else:
                views = [choose.choice(list(layouts(t, align)))[1] for t in (gate, up)]
                results = run(backend, given_grad, *views, (outputs[0], outputs[1]))
            check(results, grad, gate, up)
        except AssertionError as error:
            raise AssertionError(f"case {number}: {leading} x {size}, {error}") from error
    backend.count(cases)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_every_gate_value(dtype: torch.dtype, backend: Backend) -> None:
    """All 65,536 gates, infinities and NaN among them, with gradients and ups of many sizes."""
    gate = every_value(dtype)
    top = torch.finfo(dtype).max
    for grad_value, up_value in ((1.0, 1.0), (-3.0, 0.37), (0.0, 2.0), (top / 4, 0.5), (1e-3, -3)):
        grad = torch.full_like(gate, grad_value)
        up = torch.full_like(gate, up_value)
        # The share of correctly rounded results is no measure here: products with a tiny gate are
        # exact but for the last bit of the sigmoid, which decides the ties.
        check(run(backend, grad, gate, up, apart(grad)), grad, gate, up, None)
    backend.count(5)


def test_gates_beyond_the_range_of_exp(backend: Backend) -> None:
    """bf16 reaches gradients and ups so large that gates below -104, where exp is 0 in fp32, still
    count, and products of the two that only such a gate brings back into range."""
    gate = torch.linspace(-260, 100, 20001).to(torch.bfloat16)
    ran = 0
    for grad_value in (3e38, 1e19, 1.0, 1e-19, 1e-38):
        for up_value in (3e38, 1e19, 1.0, 1e-30, 1e-39):
            grad, up = torch.full_like(gate, grad_value), torch.full_like(gate, up_value)
            # The exponent of 260 / ln 2 leaves fp32 fifteen bits behind the point.
            check(run(backend, grad, gate, up, apart(grad)), grad, gate, up, 0.99)
            ran += 1
    wide = gate.float()
    grad = up = torch.full_like(wide, 3e38)
    check(run(backend, grad, wide, up, apart(grad)), grad, wide, up)
    backend.count(ran + 1)


def test_special_values(backend: Backend) -> None:
    """IEEE arithmetic: no NaN where every factor is a number."""
    top = 3e4
    rows = [  # grad, gate, up
        (1.0, top, 1.0),
        (1.0, -top, 1.0),
        (0.0, top, 1.0),
        (1.0, 0.0, 0.0),
        (1.0, -0.0, 5.0),
        (float("nan"), 1.0, 1.0),
        (1.0, float("nan"), 1.0),
        (1.0, 1.0, float("nan")),
        (float("inf"), 1.0, 1.0),
        (1.0, 1.0, -float("inf")),
        (0.0, 1.0, float("inf")),
    ]
    for dtype in DTYPES:
        grad, gate, up = (torch.tensor(column).to(dtype) for column in zip(*rows, strict=True))
        check(run(backend, grad, gate, up, apart(grad)), grad, gate, up)
    backend.count(len(DTYPES) * len(rows))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_layout_or_batch(dtype: torch.dtype, backend: Backend) -> None:
    align = 16 // dtype.itemsize
    ran = 0
    for size in (8, 104, 2056):
        draws = torch.randn(3, 3, 4, size, generator=generator("bits", size, dtype)).to(dtype)
        grad, gate, up = draws[0], draws[1] * 4, draws[2]
        expected = [x.clone() for x in run(backend, grad, gate, up, apart(grad))]
        for views in zip(*(layouts(x, align) for x in (grad, gate, up)), strict=True):
            results = run(backend, *(view for _, view in views), apart(grad))
            for result, want in zip(results, expected, strict=True):
                assert_bitwise_equal(result.contiguous(), want, views[0][0])
            ran += 1
        packed = torch.cat([gate, up], -1)
        for x, name in ((packed, "packed"), (packed[1:2, 2:3], "alone")):
            part = grad if name == "packed" else grad[1:2, 2:3]
            output = Guarded((*part.shape[:-1], 2 * size), dtype)
            results = run(backend, part, x, None, (output, None))
            for result, want in zip(results, expected, strict=True):
                of_part = want if name == "packed" else want[1:2, 2:3]
                assert_bitwise_equal(result.contiguous(), of_part.contiguous(), name)
            ran += 1
    backend.count(ran)


@pytest.mark.parametrize("odd", ["grad", "gate", "up", "grad_gate", "grad_up"])
def test_one_misaligned_tensor_among_aligned_ones(odd: str, backend: Backend) -> None:
    size = 520
    names = ("grad", "gate", "up")
    draws = torch.randn(3, 3, size, generator=generator("odd", odd)).to(torch.bfloat16)
    given = dict(zip(names, draws, strict=True))
    if odd in given:
        guarded = Guarded((3, size), torch.bfloat16, offset=1)
        given[odd] = guarded.tensor.copy_(given[odd])
    outputs = [
        Guarded((3, size), torch.bfloat16, offset=int(name == odd))
        for name in ("grad_gate", "grad_up")
    ]
    check(run(backend, *given.values(), (outputs[0], outputs[1])), *draws)
    backend.count(1)


def test_nothing_to_do(backend: Backend) -> None:
    for shape in ((0, 64), (3, 0, 64), (4, 0)):
        grad = torch.empty(shape, dtype=torch.bfloat16)
        results = run(backend, grad, grad.clone(), grad.clone(), apart(grad))
        assert [x.shape for x in results] == [shape, shape]


def test_bits_do_not_depend_on_the_schedule(emulated: Backend) -> None:
    emulator = Emulator(emulator_library())
    for dtype in DTYPES:
        draws = torch.randn(3, 3, 1000, generator=generator("schedule", dtype)).to(dtype)
        expected = [x.clone() for x in run(emulated, *draws, apart(draws[0]))]
        for schedule, seed in (("reverse", 1), ("random", 1), ("random", 2)):
            with emulator.schedule(schedule, seed):
                results = run(emulated, *draws, apart(draws[0]))
            for result, want in zip(results, expected, strict=True):
                assert_bitwise_equal(result, want, schedule)
    emulated.count(12)


def test_offsets_beyond_two_to_the_31(emulated: Backend) -> None:
    size, gap = 64, 2**31 + 8
    bf16 = torch.bfloat16
    packed, out = (
        sparse(2 * gap + 2 * size, bf16).as_strided((3, 2 * size), (gap, 1)) for _ in range(2)
    )
    packed.copy_(torch.randn(3, 2 * size, generator=generator("far")))
    grad = torch.randn(3, size, generator=generator("far grad")).to(bf16)
    backward_extension(emulated).silu_and_mul_backward(grad, packed, None, out, None)
    check(out.clone().chunk(2, -1), grad, *packed.clone().chunk(2, -1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reads_no_byte_past_the_end(dtype: torch.dtype, emulated: Backend) -> None:
    for size in (5, 8, 1032):
        grad, gate, up = (before_guard_page((3, size), dtype) for _ in range(3))
        for x, seed in ((grad, 0), (gate, 1), (up, 2)):
            x.copy_(torch.randn(3, size, generator=generator("end", size, seed)))
        outs = [before_guard_page((3, size), dtype) for _ in range(2)]
        backward_extension(emulated).silu_and_mul_backward(grad, gate, up, *outs)
        check((outs[0], outs[1]), grad, gate, up)
    emulated.count(3)


def arguments(**changes: Any) -> dict[str, Any]:
    """A correct packed call on CPU tensors, with some arguments changed."""
    grad = torch.zeros(3, 32, dtype=torch.bfloat16)
    gate = torch.zeros(3, 64, dtype=torch.bfloat16)
    given = {"grad": grad, "gate": gate, "up": None, "grad_gate": gate.clone(), "grad_up": None}
    return given | changes


def pair(**changes: Any) -> dict[str, Any]:
    """The same with gate and up apart."""
    names = ("grad", "gate", "up", "grad_gate", "grad_up")
    return {name: torch.zeros(3, 32, dtype=torch.bfloat16) for name in names} | changes


WRONG: list[tuple[dict[str, Any], str]] = [
    (arguments(grad=torch.zeros(())), r"grad: expected \(\.\.\., intermediate_size\), got \(\)"),
    (arguments(gate=torch.zeros(3, 32)), r"gate_up: expected \(3, 64\), got \(3, 32\)"),
    (arguments(grad_gate=torch.zeros(2, 64)), r"grad_gate_up: expected \(3, 64\), got \(2, 64\)"),
    (arguments(up=torch.zeros(3, 32)), "up, grad_up: expected both or neither"),
    (arguments(grad_up=torch.zeros(3, 32)), "up, grad_up: expected both or neither"),
    (pair(gate=torch.zeros(3, 16)), r"gate: expected \(3, 32\), got \(3, 16\)"),
    (pair(up=torch.zeros(3, 16)), r"up: expected \(3, 32\), got \(3, 16\)"),
    (pair(grad_gate=torch.zeros(3, 16)), r"grad_gate: expected \(3, 32\), got \(3, 16\)"),
    (pair(grad_up=torch.zeros(32)), r"grad_up: expected \(3, 32\), got \(32,\)"),
    (arguments(grad=torch.zeros(3, 32).double()), "grad: expected dtype bfloat16 or float16 or fl"),
    (pair(up=torch.zeros(3, 32)), "up: expected dtype bfloat16, got float32"),
    (arguments(gate=torch.zeros(3, 64)), "gate_up: expected dtype bfloat16, got float32"),
    (
        pair(grad_up=torch.zeros(32, 3, dtype=torch.bfloat16).t()),
        "grad_up: expected stride 1 in the last dimension",
    ),
    (
        pair(grad=torch.frombuffer(bytearray(193), dtype=torch.bfloat16, offset=1).view(3, 32)),
        "grad: expected data aligned to its elements of 2 bytes",
    ),
    (
        pair(grad_gate=torch.zeros(32, dtype=torch.bfloat16).expand(3, 32)),
        "grad_gate: expected an output whose elements do not share memory",
    ),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=range(len(WRONG)))
def test_wrong_arguments_are_named(
    extension: ModuleType, wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        extension.silu_and_mul_backward(**wrong)


@pytest.mark.parametrize("other", ["grad", "gate", "up"])
@pytest.mark.parametrize("output", ["grad_gate", "grad_up"])
def test_outputs_share_no_memory(extension: ModuleType, output: str, other: str) -> None:
    given = pair()
    given[output] = given[other]
    with pytest.raises(ValueError, match=f"{output}: expected memory apart from {other}"):
        extension.silu_and_mul_backward(**given)
    given = pair()
    given["grad_up"] = given["grad_gate"]
    with pytest.raises(ValueError, match="grad_up: expected memory apart from grad_gate"):
        extension.silu_and_mul_backward(**given)


def test_a_list_is_no_tensor(extension: ModuleType) -> None:
    for name in ("grad", "gate", "up", "grad_gate", "grad_up"):
        with pytest.raises(TypeError, match=f"{name}: expected a torch.Tensor, got list"):
            extension.silu_and_mul_backward(**pair(**{name: [1.0]}))


@pytest.mark.parametrize("is_packed", [True, False])
def test_autograd_takes_the_kernel(
    is_packed: bool, emulated: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Directly and in a compiled graph, with equal bits; also for a gradient without strides."""
    monkeypatch.setattr(direct, "ops", emulated.ops)
    emulator = Emulator(emulator_library())
    draws = torch.randn(2, 5, 48, generator=generator("autograd")).to(torch.bfloat16)
    inputs = (torch.cat(list(draws), -1),) if is_packed else tuple(draws)
    inputs = tuple(x.requires_grad_() for x in inputs)

    def loss(*inputs: Tensor) -> Tensor:
        return emulated.ops.silu_and_mul(*inputs).sum()

    emulator.clear_launches()
    grads = torch.autograd.grad(loss(*inputs), inputs)
    assert any("silu_and_mul_backward_kernel" in x.kernel for x in emulator.launches())
    parts = grads[0].chunk(2, -1) if is_packed else grads
    check((parts[0], parts[1]), torch.ones_like(draws[0]), *draws)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(*inputs), inputs), grads, strict=True):
        assert_bitwise_equal(a, b)
    opcheck(torch.ops.exafuse.silu_and_mul, (*inputs, None)[:2])
