"""rms_norm, add_rms_norm and rms_norm_add against the fp64 oracle: all elements of every case."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import oracles
import pytest
import torch
from emulator.control import Emulator
from kernel_backends import Backend, backend, case_factor, emulated, emulator_library
from numeric import assert_bitwise_equal, assert_close, assert_same_special_values
from poison import Guarded, before_guard_page, extreme_rows, generator, layouts, sparse

__all__ = ["backend", "emulated"]  # fixtures

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
OPS = ["rms_norm", "add_rms_norm", "rms_norm_add"]
# One size of every geometry, and its neighbours: rows of 1 to 32 lanes, with 2, 4 and 8 vectors a
# lane, rows of a block, rows that are read twice; the hidden sizes of the released models.
HIDDEN = [8, 16, 24, 64, 72, 120, 128, 136, 256, 264, 504, 512, 520, 896, 1016, 1024, 1032, 2040]
HIDDEN += [2048, 2056, 3584, 4096, 5120, 8192]
LONG_HIDDEN = [16384, 16392, 32760, 32768, 32776, 65528, 65536]
FEW = 24


@dataclass
class Case:
    """One call: inputs in whatever layout, guarded outputs."""

    op: str
    x: torch.Tensor
    residual: torch.Tensor
    weight: torch.Tensor
    eps: float

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        return (self.x,) if self.op == "rms_norm" else (self.x, self.residual)

    def expected(self) -> list[oracles.Array]:
        if self.op == "add_rms_norm":
            return list(oracles.add_rms_norm(self.x, self.residual, self.weight, self.eps))
        oracle: Callable[..., oracles.Array] = getattr(oracles, self.op)
        return [oracle(*self.inputs, self.weight, self.eps)]

    def run(self, backend: Backend, outputs: list[Guarded]) -> list[torch.Tensor]:
        """The results, after the check that nothing around the outputs was touched."""
        given = [backend.give(guarded.tensor) for guarded in outputs]
        function = getattr(backend.ops, self.op)
        inputs = [backend.give(tensor) for tensor in self.inputs]
        out = tuple(given) if self.op == "add_rms_norm" else given[0]
        returned = function(*inputs, backend.give(self.weight), self.eps, out=out)
        assert returned is out or all(a is b for a, b in zip(returned, given, strict=True))
        return [backend.take_back(t, g, self.op) for t, g in zip(given, outputs, strict=True)]

    def outputs(self, strides: tuple[int, ...] | None = None, offset: int = 0) -> list[Guarded]:
        count = 2 if self.op == "add_rms_norm" else 1
        shape = tuple(self.x.shape)
        return [Guarded(shape, self.x.dtype, strides, offset) for _ in range(count)]

    def check(self, results: list[torch.Tensor], row_tolerance: float | None = None) -> None:
        expected = self.expected()
        magnitude = None
        if self.op == "rms_norm_add":
            normed = oracles.rms_norm(self.x, self.weight, self.eps)
            magnitude = abs(oracles.to_float64(self.residual)) + abs(normed)
        assert_close(
            results[0],
            expected[0],
            magnitude=magnitude,
            row_tolerance=row_tolerance,
            label=self.op,
        )
        if len(results) == 2:
            total = self.x + self.residual
            assert_same_special_values(results[1], total, "new_residual")
            # A NaN is a NaN, whatever its payload.
            numbers = [torch.where(total.isnan(), 0, t) for t in (results[1], total)]
            assert_bitwise_equal(*numbers, "new_residual")


def make_case(op: str, dtype: torch.dtype, shape: tuple[int, ...], *key: object) -> Case:
    gen = generator(op, dtype, shape, *key)
    choose = random.Random(repr((op, str(dtype), shape, key)))

    def draw(*size: int) -> torch.Tensor:
        scale = choose.choice([1e-3, 1.0, 1.0, 30.0, 1e3])
        return (torch.randn(size, generator=gen) * scale).to(dtype)

    weight = torch.randn(shape[-1], generator=gen) + 1
    return Case(
        op=op,
        x=draw(*shape),
        residual=draw(*shape),
        weight=weight if choose.random() < 0.3 else weight.to(dtype),
        eps=choose.choice([1e-5, 1e-6, 1e-12, 1.0]),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_random_shapes_and_layouts(op: str, dtype: torch.dtype, backend: Backend) -> None:
    choose = random.Random(f"{op} {dtype}")
    cases = 160 * case_factor()
    for number in range(cases):
        hidden = choose.choice(HIDDEN)
        leading = choose.choice([(), (1,), (2,), (3,), (5,), (7,), (2, 3), (3, 1, 2), (17,)])
        if hidden <= 128 and choose.random() < 0.3:
            leading = (choose.choice([15, 16, 17, 129]),)
        case = make_case(op, dtype, (*leading, hidden), number)
        align = 16 // dtype.itemsize
        case.x = choose.choice(list(layouts(case.x, align)))[1]
        case.residual = choose.choice(list(layouts(case.residual, align)))[1]
        case.weight = choose.choice(list(layouts(case.weight, align)))[1]
        gap = choose.choice([0, 0, 1, align])
        strides = torch.empty(*leading, hidden + gap, device="meta").stride()
        outputs = case.outputs(strides, choose.choice([0, 0, 1, align - 1]))
        try:
            case.check(case.run(backend, outputs))
        except AssertionError as error:
            raise AssertionError(f"case {number}: {case.x.shape}, {error}") from error
    backend.count(cases)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_long_rows(op: str, dtype: torch.dtype, backend: Backend) -> None:
    for hidden in LONG_HIDDEN:
        case = make_case(op, dtype, (2, hidden))
        case.check(case.run(backend, case.outputs()))
    backend.count(len(LONG_HIDDEN))


@pytest.mark.parametrize("hidden", [8, 512, 2056])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_extreme_rows(op: str, dtype: torch.dtype, hidden: int, backend: Backend) -> None:
    """All rows in one batch: a row with NaN or infinity must not touch its neighbours."""
    rows = extreme_rows(hidden, dtype)
    gen = generator("extreme", hidden)
    top = torch.finfo(dtype).max
    rows["greatest"] = torch.full((hidden,), top).to(dtype)
    rows["one greatest"] = rows["ones"].clone()
    rows["one greatest"][hidden // 3] = -top
    if dtype == torch.bfloat16:
        rows["squares beyond fp32"] = (torch.randn(hidden, generator=gen) * 1e30).to(dtype)
    x = torch.stack(list(rows.values()))
    residual = torch.zeros_like(x)
    residual[::2] = torch.randn(residual[::2].shape, generator=gen).to(dtype)
    weight = (torch.rand(hidden, generator=gen) + 0.5).to(dtype)
    for eps in (1e-6, 0.0):
        case = Case(op, x, residual, weight, eps)
        results = case.run(backend, case.outputs())
        # fp32's sum of squares of rows near 1e-20 keeps a few bits only: they are judged with eps.
        if eps == 0.0:
            keep = [i for i, name in enumerate(rows) if name not in ("tiny", "subnormal")]
            case.x, case.residual = x[keep], residual[keep]
            results = [result[keep] for result in results]
        # One element can be the whole length of a row: then its rounding is the row's error.
        case.check(results, row_tolerance=torch.finfo(dtype).eps / 2 + 1e-6)
    backend.count(2 * len(rows))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_is_an_addition_then_the_norm_bitwise(dtype: torch.dtype, backend: Backend) -> None:
    for number in range(FEW):
        hidden = HIDDEN[number % len(HIDDEN)]
        case = make_case("add_rms_norm", dtype, (3, hidden), number)
        y, total = case.run(backend, case.outputs())
        norm = Case("rms_norm", total.clone(), total, case.weight, case.eps)
        assert_bitwise_equal(y, norm.run(backend, norm.outputs())[0])
    backend.count(2 * FEW)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_bits_do_not_depend_on_layout(op: str, dtype: torch.dtype, backend: Backend) -> None:
    ran = 0
    for hidden in (8, 120, 512, 2048, 2056, 4096, 16392):
        case = make_case(op, dtype, (2, 3, hidden))
        expected = [t.clone() for t in case.run(backend, case.outputs())]
        align = 16 // dtype.itemsize
        for (name, x), (_, residual) in zip(
            layouts(case.x, align), reversed(list(layouts(case.residual, align))), strict=True
        ):
            other = Case(op, x, residual, case.weight, case.eps)
            for result, want in zip(other.run(backend, other.outputs()), expected, strict=True):
                assert_bitwise_equal(result.contiguous(), want, f"{op} of {hidden}, {name}")
            ran += 1
    backend.count(ran)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_bits_do_not_depend_on_the_batch(op: str, dtype: torch.dtype, backend: Backend) -> None:
    for hidden in (8, 64, 512, 2048, 2056):
        case = make_case(op, dtype, (33, hidden))
        if dtype == torch.bfloat16:
            case.x[7] = 1e30  # a row that is summed twice, beside rows that are not
        batch = case.run(backend, case.outputs())
        for row in (0, 6, 7, 8, 32):
            alone = Case(op, case.x[row], case.residual[row], case.weight, case.eps)
            for one, many in zip(alone.run(backend, alone.outputs()), batch, strict=True):
                assert_bitwise_equal(one, many[row].clone(), f"{op}: row {row} of {hidden}")
    backend.count(5 * 6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_may_be_the_inputs(dtype: torch.dtype, backend: Backend) -> None:
    ran = 0
    for hidden in (64, 2048, 4096, 16392):
        for op in OPS:
            case = make_case(op, dtype, (3, hidden))
            expected = [t.clone() for t in case.run(backend, case.outputs())]
            for offset in (0, 1):  # kept in registers, and read twice
                for swap in (False, True):
                    guarded = case.outputs(offset=offset)
                    sources = list(case.inputs)[: len(guarded)]
                    if len(case.inputs) == 2 and swap:
                        sources = list(reversed(case.inputs))[: len(guarded)]
                    for target, source in zip(guarded, sources, strict=True):
                        target.tensor.copy_(source)
                    given = [backend.give(g.tensor) for g in guarded]
                    by_source = dict(zip(map(id, sources), given, strict=True))
                    inputs = [by_source.get(id(t), backend.give(t)) for t in case.inputs]
                    out = tuple(given) if len(given) == 2 else given[0]
                    weight = backend.give(case.weight)
                    getattr(backend.ops, op)(*inputs, weight, case.eps, out=out)
                    for tensor, guard, want in zip(given, guarded, expected, strict=True):
                        result = backend.take_back(tensor, guard, op)
                        assert_bitwise_equal(result, want, f"{op} of {hidden} in place")
                    ran += 1
    backend.count(ran)


@pytest.mark.parametrize("op", OPS)
def test_nothing_to_do(op: str, backend: Backend) -> None:
    for shape in ((0, 64), (3, 0, 64)):
        case = make_case(op, torch.bfloat16, shape)
        results = case.run(backend, case.outputs())
        assert all(tuple(result.shape) == shape for result in results)


def test_allocates_when_no_output_is_given(backend: Backend) -> None:
    case = make_case("rms_norm", torch.bfloat16, (5, 64))
    x, weight = backend.give(case.x), backend.give(case.weight)
    y = backend.ops.rms_norm(x, weight, case.eps)
    case.check([y.cpu()])
    y, total = backend.ops.add_rms_norm(x, x, weight, case.eps)
    assert torch.equal(total, x + x)
    assert y.shape == backend.ops.rms_norm_add(x, x, weight, case.eps).shape == x.shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_bits_do_not_depend_on_the_schedule(op: str, dtype: torch.dtype, emulated: Backend) -> None:
    emulator = Emulator(emulator_library())
    for hidden in (64, 512, 2056, 4096):
        case = make_case(op, dtype, (3, hidden))
        expected = [t.clone() for t in case.run(emulated, case.outputs())]
        for schedule, seed in (("reverse", 1), ("random", 1), ("random", 2)):
            with emulator.schedule(schedule, seed):
                results = case.run(emulated, case.outputs())
            for result, want in zip(results, expected, strict=True):
                assert_bitwise_equal(result, want, f"{op} of {hidden}, {schedule}")
    emulated.count(16)


def test_offsets_beyond_two_to_the_31(emulated: Backend) -> None:
    """Rows 2^31 + 8 elements apart: 16 GiB of address space, three pages of memory."""
    hidden, gap = 64, 2**31 + 8
    x = sparse(2 * gap + hidden, torch.bfloat16).as_strided((3, hidden), (gap, 1))
    out = sparse(2 * gap + hidden, torch.bfloat16).as_strided((3, hidden), (gap, 1))
    case = make_case("rms_norm", torch.bfloat16, (3, hidden))
    x.copy_(case.x)
    emulated.ops.rms_norm(x, case.weight, case.eps, out=out)
    case.check([out.clone()])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reads_no_byte_past_the_end(dtype: torch.dtype, emulated: Backend) -> None:
    for hidden in (8, 24, 520, 2056):
        case = make_case("rms_norm_add", dtype, (3, hidden))
        guarded = {}
        for name in ("x", "residual", "weight"):
            tensor = getattr(case, name)
            guarded[name] = before_guard_page(tuple(tensor.shape), tensor.dtype).copy_(tensor)
        out = before_guard_page((3, hidden), dtype)
        emulated.ops.rms_norm_add(*guarded.values(), case.eps, out=out)
        case.check([out])
    emulated.count(4)
