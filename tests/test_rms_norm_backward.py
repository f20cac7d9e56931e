"""The kernels behind the gradients of rms_norm, add_rms_norm and rms_norm_add, against gradients
in float64: all elements of every case."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import backward_oracles
import pytest
import torch
from backward_backends import backward_extension
from emulator.control import Emulator
from kernel_backends import Backend, backend, case_factor, emulated, emulator_library
from numeric import assert_bitwise_equal, assert_close
from poison import Guarded, before_guard_page, extreme_rows, generator, layouts, sparse
from torch import Tensor

__all__ = ["backend", "emulated"]  # fixtures

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
OPS = ["rms_norm_backward", "add_rms_norm_backward"]
# One size of every geometry, and its neighbours: rows of 1 to 32 lanes, with 2 and 4 vectors a
# lane, rows of a block; the hidden sizes of the released models.
HIDDEN = [8, 16, 24, 64, 72, 120, 128, 136, 256, 264, 504, 512, 520, 896, 1016, 1024, 1032, 2048]
HIDDEN += [2056, 3584, 4096, 5120, 8192]
LONG_HIDDEN = [8200, 16384, 16392, 32776, 65536]
BF16 = torch.bfloat16


@dataclass
class Case:
    """One call: inputs in whatever layout, guarded outputs."""

    op: str
    grad: Tensor
    grad_residual: Tensor
    x: Tensor
    weight: Tensor
    eps: float
    weight_grad: bool = True

    def outputs(
        self, strides: tuple[int, ...] | None = None, offset: int = 0
    ) -> tuple[Guarded, Guarded]:
        """Of x and of weight."""
        of_x = Guarded(tuple(self.x.shape), self.x.dtype, strides, offset)
        return of_x, Guarded(tuple(self.weight.shape), self.weight.dtype, offset=offset)

    def run(
        self, backend: Backend, outputs: tuple[Guarded, Guarded] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The gradients of x (or the sum) and weight, after the check that nothing around them and
        around the workspace was touched."""
        extension = backward_extension(backend)
        of_x, of_weight = outputs or self.outputs()
        hidden = self.x.shape[-1]
        sizes = (self.x.numel() // hidden, hidden, self.x.element_size())
        workspace = Guarded((extension.rms_norm_backward_workspace(*sizes) // 4,), torch.float32)
        given = [backend.give(out.tensor) for out in (of_x, of_weight, workspace)]
        grads = (self.grad,) if self.op == "rms_norm_backward" else (self.grad, self.grad_residual)
        inputs = [backend.give(x) for x in (*grads, self.x, self.weight)]
        results = given if self.weight_grad else [given[0], None, None]
        getattr(extension, self.op)(*inputs, self.eps, *results)
        backend.take_back(given[2], workspace, "workspace")
        first = backend.take_back(given[0], of_x, "grad_x")
        return first, backend.take_back(given[1], of_weight, "grad_weight")

    def check(
        self,
        results: tuple[Tensor, Tensor],
        row_tolerance: float | None = None,
        correctly_rounded: float | None = 0.99,
    ) -> None:
        past = self.grad_residual if self.op == "add_rms_norm_backward" else None
        wanted = backward_oracles.rms_norm(self.grad, self.x, self.weight, self.eps, past)
        names = ("grad_x", "grad_weight")[: 1 + self.weight_grad]
        for name, result, want in zip(names, results, wanted, strict=False):
            # A gradient of weight in fp32 beside 16-bit rows has the arithmetic of those.
            wider = result.dtype != self.x.dtype
            assert_close(
                result,
                want.value,
                magnitude=want.magnitude * (2.0**23 if wider else 1.0),
                row_tolerance=row_tolerance,
                correctly_rounded=None if wider else correctly_rounded,
                label=f"{self.op}: {name}",
            )


def make_case(op: str, dtype: torch.dtype, shape: tuple[int, ...], *key: object) -> Case:
    gen = generator(op, dtype, shape, *key)
    choose = random.Random(repr((op, str(dtype), shape, key)))

    def draw(*size: int) -> Tensor:
        scale = choose.choice([1e-3, 1.0, 1.0, 30.0, 1e3 if dtype != torch.float16 else 1.0])
        return (torch.randn(size, generator=gen) * scale).to(dtype)

    weight = torch.randn(shape[-1], generator=gen) + 1
    grad = draw(*shape)
    # Against an x of 1e-3 a gradient grows a thousandfold, beyond what fp16 holds.
    x = draw(*shape) if dtype != torch.float16 else torch.randn(shape, generator=gen).to(dtype)
    return Case(
        op=op,
        grad=grad,
        grad_residual=draw(*shape),
        x=x,
        weight=weight if choose.random() < 0.3 else weight.to(dtype),
        eps=choose.choice([1e-5, 1e-6, 1e-12, 1.0]),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_random_shapes_and_layouts(op: str, dtype: torch.dtype, backend: Backend) -> None:
    choose = random.Random(f"{op} {dtype}")
    cases = 170 * case_factor()
    align = 16 // dtype.itemsize
    for number in range(cases):
        hidden = choose.choice(HIDDEN)
        leading = choose.choice([(), (1,), (2,), (3,), (9,), (2, 3), (3, 1, 2), (17,), (21,)])
        if hidden <= 136 and choose.random() < 0.4:
            leading = (choose.choice([15, 16, 17, 129, 300]),)
        case = make_case(op, dtype, (*leading, hidden), number)
        for name in ("grad", "grad_residual", "x", "weight"):
            given = getattr(case, name)
            if choose.random() < 0.5:
                setattr(case, name, choose.choice(list(layouts(given, align)))[1])
        case.weight_grad = choose.random() < 0.8
        gap = choose.choice([0, 0, 1, align])
        strides = torch.empty(*leading, hidden + gap, device="meta").stride()
        outputs = case.outputs(strides, choose.choice([0, 0, 1, align - 1]))
        try:
            case.check(case.run(backend, outputs))
        except AssertionError as error:
            raise AssertionError(f"case {number}: {tuple(case.x.shape)}, {error}") from error
    backend.count(cases)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_long_rows(op: str, dtype: torch.dtype, backend: Backend) -> None:
    for hidden in LONG_HIDDEN:
        case = make_case(op, dtype, (10, hidden))  # ten rows: two blocks
        case.check(case.run(backend))
    backend.count(len(LONG_HIDDEN))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_parts(dtype: torch.dtype, backend: Backend) -> None:
    """More partial sums than the warps that add them up."""
    for rows, hidden in ((2500, 8), (1500, 64), (150, 1032)):
        case = make_case("rms_norm_backward", dtype, (rows, hidden))
        case.check(case.run(backend))
    backend.count(3)


@pytest.mark.parametrize("hidden", [8, 512, 2056])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_extreme_rows(op: str, dtype: torch.dtype, hidden: int, backend: Backend) -> None:
    """All rows in one batch: a row with NaN or infinity must not touch its neighbours."""
    rows = extreme_rows(hidden, dtype)
    gen = generator("extreme gradients", hidden)
    if dtype == BF16:
        rows["squares beyond fp32"] = (torch.randn(hidden, generator=gen) * 1e30).to(dtype)
        rows["squares barely beyond fp32"] = (torch.randn(hidden, generator=gen) * 2.0**64).to(
            dtype
        )
    rows |= {f"usual, {i}": torch.randn(hidden, generator=gen).to(dtype) for i in range(5)}
    names = list(rows)
    x = torch.stack(list(rows.values()))
    grad = torch.randn(x.shape, generator=gen).to(dtype)
    grad[-1], grad[-2, 0], grad[-3, -1] = 0.0, torch.nan, torch.inf
    weight = (torch.rand(hidden, generator=gen) + 0.5).to(dtype)
    case = Case(op, grad, torch.randn(x.shape, generator=gen).to(dtype), x, weight, 1e-6)
    case.weight_grad = False
    half_ulp = torch.finfo(dtype).eps / 2 + 1e-6
    case.check(case.run(backend), row_tolerance=half_ulp, correctly_rounded=0.95)
    # The gradient of weight: NaN from the rows with NaN, and a number without them.
    case.weight_grad = True
    assert case.run(backend)[1].isnan().any()
    keep = [i for i, name in enumerate(names) if not name.startswith("one ")][:-3]
    keep += [len(names) - 1]
    chosen = {n: getattr(case, n)[keep] for n in ("grad", "grad_residual", "x")}
    finite = replace(case, **chosen)
    finite.check(finite.run(backend), row_tolerance=half_ulp, correctly_rounded=0.95)
    backend.count(len(rows))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_bits_do_not_depend_on_layout(op: str, dtype: torch.dtype, backend: Backend) -> None:
    ran = 0
    for hidden in (8, 120, 512, 2056, 16392):
        case = make_case(op, dtype, (3, 4, hidden))
        expected = [t.clone() for t in case.run(backend)]
        align = 16 // dtype.itemsize
        for (name, x), (_, grad) in zip(
            layouts(case.x, align), reversed(list(layouts(case.grad, align))), strict=True
        ):
            for result, want in zip(
                replace(case, x=x, grad=grad).run(backend), expected, strict=True
            ):
                assert_bitwise_equal(result, want, f"{op} of {hidden}, {name}")
            ran += 1
    backend.count(ran)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_bits_of_a_row_do_not_depend_on_the_batch(
    op: str, dtype: torch.dtype, backend: Backend
) -> None:
    """Nor on whether weight wants a gradient."""
    for hidden in (8, 64, 512, 2056):
        case = make_case(op, dtype, (33, hidden))
        if dtype == BF16:
            case.x[7] = 1e30  # a row that is summed twice, beside rows that are not
        batch = case.run(backend)[0]
        assert_bitwise_equal(replace(case, weight_grad=False).run(backend)[0], batch)
        for row in (0, 6, 7, 8, 32):
            chosen = {n: getattr(case, n)[row] for n in ("grad", "grad_residual", "x")}
            alone = replace(case, **chosen).run(backend)[0]
            assert_bitwise_equal(alone, batch[row].clone(), f"{op}: row {row} of {hidden}")
    backend.count(4 * 7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_bits_do_not_depend_on_the_schedule(op: str, dtype: torch.dtype, emulated: Backend) -> None:
    emulator = Emulator(emulator_library())
    for hidden in (64, 2056, 4096):
        case = make_case(op, dtype, (20, hidden))
        expected = [t.clone() for t in case.run(emulated)]
        for schedule, seed in (("forward", 0), ("reverse", 1), ("random", 1), ("random", 2)):
            with emulator.schedule(schedule, seed):
                results = case.run(emulated)
            for result, want in zip(results, expected, strict=True):
                assert_bitwise_equal(result, want, f"{op} of {hidden}, {schedule}")
    emulated.count(15)


@pytest.mark.parametrize("odd", ["grad", "grad_residual", "x", "weight", "grad_x"])
def test_one_misaligned_tensor_among_aligned_ones(odd: str, backend: Backend) -> None:
    case = make_case("add_rms_norm_backward", BF16, (3, 520))
    case.weight = case.weight.to(BF16)
    if odd != "grad_x":
        given = getattr(case, odd)
        setattr(case, odd, Guarded(tuple(given.shape), BF16, offset=1).tensor.copy_(given))
    of_x, of_weight = case.outputs()
    if odd == "grad_x":
        of_x = case.outputs(offset=1)[0]
    case.check(case.run(backend, (of_x, of_weight)))


@pytest.mark.parametrize("op", OPS)
def test_no_rows_give_a_weight_gradient_of_zero(op: str, backend: Backend) -> None:
    for shape in ((0, 64), (3, 0, 64)):
        case = make_case(op, BF16, shape)
        grad_x, grad_weight = case.run(backend)
        assert tuple(grad_x.shape) == shape
        assert grad_weight.eq(0).all()
        assert replace(case, weight_grad=False).run(backend)[1].isnan().all()


def test_the_workspace_follows_from_the_shapes(emulated: Backend) -> None:
    size = backward_extension(emulated).rms_norm_backward_workspace
    assert [size(n, 4096, 2) // (4096 * 4) for n in (0, 1, 8, 9, 4096, 10**9)] == [
        *(0, 1, 1, 2, 512, 512)
    ]
    assert size(8, 64, 2) == size(32, 64, 2) == size(33, 64, 2) // 2 == 64 * 4
    assert size(8, 64, 4) == 64 * 8  # fp32 is summed in fp64
    assert size(10**9, 65536, 2) == 128 * 65536 * 4
    for wrong, words in (
        ((8, 65, 2), "hidden: expected a multiple of 8"),
        ((8, 64, 8), "element_size: expected 2 or 4, got 8"),
    ):
        with pytest.raises(ValueError, match=words):
            size(*wrong)


def test_offsets_beyond_two_to_the_31(emulated: Backend) -> None:
    """Rows 2^31 + 8 elements apart: 16 GiB of address space, three pages of memory."""
    hidden, gap = 64, 2**31 + 8
    case = make_case("rms_norm_backward", BF16, (3, hidden))
    far = [sparse(2 * gap + hidden, BF16).as_strided((3, hidden), (gap, 1)) for _ in range(3)]
    far[0].copy_(case.grad)
    far[1].copy_(case.x)
    extension = backward_extension(emulated)
    extension.rms_norm_backward(*far[:2], case.weight, case.eps, far[2], None, None)
    case.weight_grad = False
    case.check((far[2].clone(), case.weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reads_no_byte_past_the_end(dtype: torch.dtype, emulated: Backend) -> None:
    extension = backward_extension(emulated)
    for hidden in (8, 24, 520, 2056):
        case = make_case("add_rms_norm_backward", dtype, (3, hidden))
        given = {}
        for name in ("grad", "grad_residual", "x", "weight"):
            tensor = getattr(case, name)
            given[name] = before_guard_page(tuple(tensor.shape), tensor.dtype).copy_(tensor)
        num_bytes = extension.rms_norm_backward_workspace(3, hidden, dtype.itemsize)
        results = (
            before_guard_page((3, hidden), dtype),
            before_guard_page((hidden,), case.weight.dtype),
            before_guard_page((num_bytes // 4,), torch.float32),
        )
        extension.add_rms_norm_backward(*given.values(), case.eps, *results)
        case.check(results[:2])
    emulated.count(4)
