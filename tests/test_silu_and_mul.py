"""silu_and_mul against the fp64 oracle: every 16-bit gate, random shapes and layouts, extremes."""

from __future__ import annotations

import random

import oracles
import pytest
import torch
from emulator.control import Emulator
from kernel_backends import Backend, backend, case_factor, emulated, emulator_library
from numeric import assert_bitwise_equal, assert_close
from poison import Guarded, before_guard_page, every_value, generator, layouts, sparse

__all__ = ["backend", "emulated"]  # fixtures

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SIZES = [1, 2, 3, 7, 8, 9, 16, 24, 31, 64, 100, 127, 128, 136, 255, 256, 264, 513, 1000, 1024]
SIZES += [2048, 2056, 4096, 4100, 4104, 5632]


def run(
    backend: Backend, gate: torch.Tensor, up: torch.Tensor | None, guarded: Guarded
) -> torch.Tensor:
    given = backend.give(guarded.tensor)
    returned = backend.ops.silu_and_mul(backend.give(gate), backend.give_optional(up), out=given)
    assert returned is given
    return backend.take_back(given, guarded, "silu_and_mul")


def check(
    result: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor | None = None,
    correctly_rounded: float | None = 0.999,
) -> None:
    # One gate can be the whole length of a row: then its rounding is the row's error.
    tolerance = torch.finfo(result.dtype).eps / 2 + 1e-6
    assert_close(
        result,
        oracles.silu_and_mul(gate, up),
        row_tolerance=tolerance,
        correctly_rounded=correctly_rounded,
    )


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_every_gate_value(dtype: torch.dtype, backend: Backend) -> None:
    """All 65,536 gates times 64 ups, among them the largest, the smallest and both zeros."""
    info = torch.finfo(dtype)
    gen = generator("ups", dtype)
    special = [0.0, -0.0, 1.0, -1.0, info.max, -info.max, info.tiny, -info.smallest_normal / 4]
    spread = torch.randn(56, generator=gen, dtype=torch.float64).sign() * torch.exp2(
        torch.linspace(-24, 15, 56, dtype=torch.float64)
    )
    ups = torch.cat([torch.tensor(special, dtype=torch.float64), spread]).to(dtype)
    gate = every_value(dtype)
    for up in ups.split(8):
        wide = gate.expand(len(up), -1).contiguous()
        other = up[:, None].expand(-1, gate.numel()).contiguous()
        # The share of correctly rounded results is no measure here: a tiny gate times a round up
        # is twice the result, exactly, and lies on a tie that the last bit of exp decides.
        check(run(backend, wide, other, Guarded(tuple(wide.shape), dtype)), wide, other, None)
    backend.count(len(ups))


def test_gates_beyond_the_range_of_exp(backend: Backend) -> None:
    """bf16 reaches ups so large that gates below -104, where exp is 0 in fp32, still count."""
    gate = torch.linspace(-260, 100, 20001).to(torch.bfloat16)
    for value in (3e38, 1e30, 1e19, 1.0, 1e-30, 1e-39):
        up = torch.full_like(gate, value)
        # The exponent of 260 / ln 2 leaves fp32 fifteen bits behind the point.
        check(run(backend, gate, up, Guarded(tuple(gate.shape), gate.dtype)), gate, up, 0.997)
    wide = gate.float()
    up = torch.full_like(wide, 3e38)
    check(run(backend, wide, up, Guarded(tuple(wide.shape), torch.float32)), wide, up)
    backend.count(7)


def test_special_values(backend: Backend) -> None:
    """IEEE arithmetic on gate * sigmoid(gate) * up."""
    inf, nan = float("inf"), float("nan")
    rows = [  # gate, up, result
        (inf, 2.0, inf),
        (inf, -2.0, -inf),
        (inf, 0.0, nan),
        (-inf, 2.0, nan),
        (nan, 2.0, nan),
        (2.0, nan, nan),
        (0.0, inf, nan),
        (1.0, inf, inf),
        (-1.0, inf, -inf),
        (0.0, 5.0, 0.0),
        (-0.0, 5.0, -0.0),
        (0.0, -5.0, -0.0),
    ]
    for dtype in DTYPES:
        gate, up, expected = (torch.tensor(column).to(dtype) for column in zip(*rows, strict=True))
        result = run(backend, gate, up, Guarded(tuple(gate.shape), dtype))
        assert torch.equal(result.isnan(), expected.isnan())
        numbers = [torch.where(expected.isnan(), 0, t) for t in (result, expected)]
        assert_bitwise_equal(*numbers)  # the sign of zero counts
    backend.count(len(DTYPES) * len(rows))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_shapes_and_layouts(dtype: torch.dtype, backend: Backend) -> None:
    choose = random.Random(f"silu {dtype}")
    cases = 300 * case_factor()
    align = 16 // dtype.itemsize
    for number in range(cases):
        size = choose.choice(SIZES)
        leading = choose.choice([(), (1,), (2,), (3,), (5,), (2, 3), (3, 1, 2), (33,)])
        gen = generator("silu", dtype, number)
        scale = choose.choice([0.1, 1.0, 10.0, 60.0])
        packed = (torch.randn(*leading, 2 * size, generator=gen) * scale).to(dtype)
        gate, up = packed.chunk(2, dim=-1)
        gap = choose.choice([0, 0, 1, align])
        strides = torch.empty(*leading, size + gap, device="meta").stride()
        guarded = Guarded((*leading, size), dtype, strides, choose.choice([0, 0, 1]))
        try:
            if choose.random() < 0.5:
                given = choose.choice(list(layouts(packed, align)))[1]
                result = run(backend, given, None, guarded)
            else:
                views = [choose.choice(list(layouts(t, align)))[1] for t in (gate, up)]
                result = run(backend, views[0], views[1], guarded)
            check(result, gate, up)
        except AssertionError as error:
            raise AssertionError(f"case {number}: {leading} x {size}, {error}") from error
    backend.count(cases)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_layout_or_batch(dtype: torch.dtype, backend: Backend) -> None:
    align = 16 // dtype.itemsize
    ran = 0
    for size in (8, 104, 2056):
        gate, up = torch.randn(2, 3, 4, size, generator=generator(size, dtype)).to(dtype) * 4
        expected = run(backend, gate, up, Guarded((3, 4, size), dtype)).clone()
        for (name, x), (_, y) in zip(layouts(gate, align), layouts(up, align), strict=True):
            result = run(backend, x, y, Guarded((3, 4, size), dtype))
            assert_bitwise_equal(result.contiguous(), expected, name)
            ran += 1
        alone = run(backend, gate[1, 2], up[1, 2], Guarded((size,), dtype))
        assert_bitwise_equal(alone, expected[1, 2].clone())
    backend.count(ran + 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_output_may_be_an_input(dtype: torch.dtype, backend: Backend) -> None:
    for size in (64, 1000):
        packed = torch.randn(5, 2 * size, generator=generator("alias", size)).to(dtype)
        gate, up = packed.chunk(2, dim=-1)
        expected = run(backend, packed, None, Guarded((5, size), dtype)).clone()
        for half in (0, 1):
            guarded = Guarded((5, 2 * size), dtype)
            guarded.tensor.copy_(packed)
            given = backend.give(guarded.tensor)
            backend.ops.silu_and_mul(given, out=given.chunk(2, dim=-1)[half])
            back = backend.take_back(given, guarded, "silu_and_mul").chunk(2, dim=-1)
            assert_bitwise_equal(back[half].contiguous(), expected)
            assert_bitwise_equal(back[1 - half].contiguous(), (up, gate)[half].contiguous())
    backend.count(4)


def test_nothing_to_do(backend: Backend) -> None:
    for shape in ((0, 64), (3, 0, 64), (4, 0)):
        gate = torch.empty(shape, dtype=torch.bfloat16)
        assert run(backend, gate, gate, Guarded(shape, gate.dtype)).shape == shape


def test_allocates_when_no_output_is_given(backend: Backend) -> None:
    packed = torch.randn(2, 3, 48).to(torch.bfloat16)
    result = backend.ops.silu_and_mul(backend.give(packed))
    check(result.cpu(), packed)
    gate, up = packed.chunk(2, dim=-1)
    result = backend.ops.silu_and_mul(backend.give(gate), backend.give(up))
    check(result.cpu(), packed)


def test_bits_do_not_depend_on_the_schedule(emulated: Backend) -> None:
    emulator = Emulator(emulator_library())
    for dtype in DTYPES:
        packed = torch.randn(3, 2 * 1000, generator=generator("schedule")).to(dtype)
        expected = run(emulated, packed, None, Guarded((3, 1000), dtype)).clone()
        for schedule, seed in (("reverse", 1), ("random", 1), ("random", 2)):
            with emulator.schedule(schedule, seed):
                result = run(emulated, packed, None, Guarded((3, 1000), dtype))
            assert_bitwise_equal(result, expected, schedule)
    emulated.count(12)


def test_offsets_beyond_two_to_the_31(emulated: Backend) -> None:
    size, gap = 64, 2**31 + 8
    packed = sparse(2 * gap + 2 * size, torch.bfloat16).as_strided((3, 2 * size), (gap, 1))
    out = sparse(2 * gap + size, torch.bfloat16).as_strided((3, size), (gap, 1))
    packed.copy_(torch.randn(3, 2 * size))
    emulated.ops.silu_and_mul(packed, out=out)
    check(out.clone(), packed.clone())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reads_no_byte_past_the_end(dtype: torch.dtype, emulated: Backend) -> None:
    for size in (5, 8, 1032):
        gate, up = (before_guard_page((3, size), dtype) for _ in range(2))
        gate.copy_(torch.randn(3, size))
        up.copy_(torch.randn(3, size))
        out = before_guard_page((3, size), dtype)
        emulated.ops.silu_and_mul(gate, up, out=out)
        check(out, gate, up)
    emulated.count(3)
