"""The kernel behind the gradients of qk_norm_rope and apply_rope against gradients in float64."""

from __future__ import annotations

import random
from dataclasses import dataclass
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
from poison import Guarded, before_guard_page, extreme_rows, generator, layouts, poisoned, sparse
from test_qk_norm_rope import DTYPES, HEAD_DIMS, HEADS, Case, make_case, tables
from torch import Tensor
from torch.library import opcheck

__all__ = ["backend", "emulated", "extension"]  # fixtures

BF16 = torch.bfloat16


@dataclass
class Grads:
    """What the kernel returns, on the CPU; None where it was not asked for."""

    q: Tensor
    k: Tensor
    v: Tensor | None
    q_weight: Tensor | None
    k_weight: Tensor | None

    def tensors(self) -> dict[str, Tensor]:
        return {name: x for name, x in vars(self).items() if x is not None}


def heads_of(case: Case) -> list[Tensor]:
    """The inputs as views [num_tokens, heads, head_dim]."""
    if isinstance(case.qkv, Tensor):
        total = case.num_heads + 2 * case.num_kv_heads
        counts = [case.num_heads, case.num_kv_heads, case.num_kv_heads]
        return list(case.qkv.unflatten(1, (total, case.head_dim)).split(counts, 1))
    return [
        x.unflatten(1, (heads, case.head_dim))
        for x, heads in zip(
            case.qkv, (case.num_heads, case.num_kv_heads, case.num_kv_heads), strict=True
        )
    ]


def gradients_of(case: Case, *key: object) -> list[Tensor]:
    """Random gradients of the three results, contiguous."""
    gen = generator("grads", case.dtype, case.num_tokens, case.head_dim, *key)
    shapes = [(case.num_tokens, case.heads(part), case.head_dim) for part in range(3)]
    return [torch.randn(shape, generator=gen).to(case.dtype) for shape in shapes]


def run(
    backend: Backend,
    case: Case,
    grads: list[Tensor],
    *,
    with_v: bool = True,
    weights: tuple[bool, bool] = (True, True),
    gaps: tuple[int, int] = (0, 0),
    offset: int = 0,
) -> Grads:
    """One call. ``weights``: whose gradients are wanted, where there are weights at all."""
    kernels = backward_extension(backend)
    give = backend.give_optional
    q, k, _ = heads_of(case)
    given_weights = (case.q_weight, case.k_weight)
    parts = 3 if with_v else 2
    outputs = [case.output(part, gaps, offset) for part in range(parts)]
    weight_outputs = [
        Guarded((case.head_dim,), weight.dtype) if weight is not None and wanted else None
        for weight, wanted in zip(given_weights, weights, strict=True)
    ]
    workspace = None
    if any(weight_outputs):
        size = kernels.qk_norm_rope_backward_workspace(
            case.num_tokens, case.head_dim, case.dtype.itemsize
        )
        workspace = poisoned(size // 4, dtype=torch.float32).to(backend.device) if size else None
    given = [backend.give(out.tensor) for out in outputs]
    d_weights = [give(out.tensor if out else None) for out in weight_outputs]
    kernels.qk_norm_rope_backward(
        *(give(x if with_v or i < 2 else None) for i, x in enumerate(grads)),
        give(q) if case.q_weight is not None else None,
        give(k) if case.k_weight is not None else None,
        *map(give, (*given_weights, case.cos, case.sin, case.positions)),
        *(case.eps, workspace, *given, *([] if with_v else [None]), *d_weights),
    )
    results = [backend.take_back(*pair, "d") for pair in zip(given, outputs, strict=True)]
    of_weights = [
        None if x is None or out is None else backend.take_back(x, out, "d_weight")
        for x, out in zip(d_weights, weight_outputs, strict=True)
    ]
    return Grads(results[0], results[1], results[2] if with_v else None, *of_weights)


def check(case: Case, grads: list[Tensor], results: Grads) -> None:
    table = (case.cos, case.sin, case.positions)
    for name, grad, x, weight in zip(
        "qk", grads, heads_of(case), (case.q_weight, case.k_weight), strict=False
    ):
        d_x, d_weight = backward_oracles.norm_rope(grad, x, weight, *table, case.eps)
        # Heads of 8 to 128 elements: too short for the relative error of a row.
        result = getattr(results, name)
        assert_close(
            result, d_x.value, magnitude=d_x.magnitude, correctly_rounded=0.99, label=f"d_{name}"
        )
        of_weight = getattr(results, f"{name}_weight")
        if of_weight is not None:
            assert d_weight is not None
            check_weight(of_weight, d_weight, case.dtype, f"d_{name}_weight")
    if results.v is not None:
        assert_bitwise_equal(results.v.contiguous(), grads[2].contiguous(), "d_v")


def check_weight(
    result: Tensor, wanted: backward_oracles.Gradient, computed_in: torch.dtype, label: str
) -> None:
    """A weight in fp32 beside 16-bit heads gets a gradient summed in fp32."""
    error = 2.0**-21 if computed_in != torch.float32 else 2.0**-44
    magnitude = wanted.magnitude
    if result.dtype == torch.float32:  # the judge allows what fp64 costs
        magnitude = magnitude * (error / 2.0**-44)
    assert_close(result, wanted.value, magnitude=magnitude, correctly_rounded=None, label=label)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_calls(dtype: torch.dtype, backend: Backend) -> None:
    choose = random.Random(f"qk backward {dtype}")
    cases = 200 * case_factor()
    align = 16 // dtype.itemsize
    for number in range(cases):
        case = make_case(
            dtype,
            choose.choice(HEAD_DIMS),
            choose.choice(HEADS),
            choose.choice([1, 2, 3, 5, 9, 17, 40]),
            "backward",
            number,
            norm=choose.random() < 0.7,
            rope=choose.random() < 0.7,
            mixed=True,
        )
        if choose.random() < 0.1:  # one norm without the other
            case.q_weight = None
        elif choose.random() < 0.1:
            case.k_weight = None
        dense = gradients_of(case, number)
        grads = [choose.choice(list(layouts(x, align)))[1] for x in dense]
        try:
            results = run(
                backend,
                case,
                grads,
                with_v=choose.random() < 0.6,
                weights=(choose.random() < 0.8, choose.random() < 0.8),
                gaps=(choose.choice([0, 0, 1, align]), choose.choice([0, 0, 1, align])),
                offset=choose.choice([0, 0, 1]),
            )
            check(case, dense, results)
        except AssertionError as error:
            raise AssertionError(
                f"case {number}: {case.num_tokens} tokens, {case.num_heads}/{case.num_kv_heads} "
                f"heads of {case.head_dim}, {error}"
            ) from error
    backend.count(cases)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_weights_over_many_tokens(dtype: torch.dtype, backend: Backend) -> None:
    """More tokens than parts, so that a block takes several steps; the last part is not full."""
    for dim, heads, tokens in ((8, (1, 1), 70_001), (64, (1, 1), 4_099), (16, (40, 8), 1_030)):
        case = make_case(dtype, dim, heads, tokens, "many")
        grads = gradients_of(case, "many")
        check(case, grads, run(backend, case, grads))
    backend.count(3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_heads(dtype: torch.dtype, backend: Backend) -> None:
    """NaN, infinity, zero and huge heads side by side: no head touches its neighbour."""
    ran = 0
    for dim in (8, 64, 72, 128):
        rows = extreme_rows(dim, dtype)
        if dtype == BF16:
            rows["squares beyond fp32"] = rows["ones"] * 1e30
        heads = torch.stack(list(rows.values()))
        qkv = heads.flip(0).repeat(3, 1).reshape(1, -1).repeat(2, 1)
        weight = (torch.rand(dim, generator=generator("w", dim)) + 0.5).to(dtype)
        case = Case(qkv, len(rows), len(rows), dim, weight, weight)
        grads = gradients_of(case, "extreme")
        check(case, grads, run(backend, case, grads))
        ran += 2 * len(rows)
    backend.count(ran)


def test_extreme_gradients(backend: Backend) -> None:
    """The gradients may be infinite, NaN or tiny where the heads are not."""
    for dtype in DTYPES:
        rows = extreme_rows(64, dtype)
        case = make_case(dtype, 64, (len(rows), 1), 2, "extreme gradients")
        grads = gradients_of(case, "extreme")
        grads[0] = torch.stack(list(rows.values())).repeat(2, 1, 1)
        results = run(backend, case, grads, weights=(False, False))
        check(case, grads, results)
    backend.count(len(DTYPES))


def test_positions_beyond_the_table_read_its_ends(backend: Backend) -> None:
    case = make_case(torch.float32, 16, (2, 1), 4, "clamp")
    case.cos, case.sin = tables(3, 8)
    case.positions = torch.tensor([-5, 3, 2**31 - 1, -(2**31)], dtype=torch.int32)
    grads = gradients_of(case)
    results = run(backend, case, grads)
    case.positions = torch.tensor([0, 2, 2, 0], dtype=torch.int32)
    check(case, grads, results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_without_norm_and_rotation_keep_their_bits(
    dtype: torch.dtype, backend: Backend
) -> None:
    case = make_case(dtype, 80, (5, 1), 3, norm=False, rope=False)
    grads = gradients_of(case)
    for name, result in run(backend, case, grads).tensors().items():
        assert_bitwise_equal(result, grads["qkv".index(name)], name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_input_without_a_norm_is_not_read(dtype: torch.dtype, backend: Backend) -> None:
    """The rotation alone needs no saved input; one without a weight may hold anything."""
    case = make_case(dtype, 40, (4, 2), 3, norm=False)
    case.k_weight = (torch.rand(40, generator=generator("one")) + 0.5).to(dtype)
    assert isinstance(case.qkv, Tensor)
    case.qkv[:, : 4 * 40] = torch.nan
    grads = gradients_of(case)
    check(case, grads, run(backend, case, grads))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_depend_on_the_token_alone(dtype: torch.dtype, backend: Backend) -> None:
    """A token alone, in a batch, packed or as three projections, aligned or not: the same bits; and
    the gradients of the weights too for the same tokens in any layout."""
    ran = 0
    for dim in (8, 72, 128):
        for heads in ((3, 1), (40, 8)):
            case = make_case(dtype, dim, heads, 9, "bits")
            assert isinstance(case.qkv, Tensor)
            assert case.positions is not None
            if dtype == BF16:
                case.qkv[4, :dim] = 1e30  # a head that is summed twice, beside others that are not
            grads = gradients_of(case)
            expected = run(backend, case, grads).tensors()
            cuts = [heads[0] * dim, heads[1] * dim, heads[1] * dim]
            views = [*(view for _, view in layouts(case.qkv)), case.qkv.split(cuts, dim=1)]
            for view in views:
                other = Case(view, *heads, dim, case.q_weight, case.k_weight, case.cos, case.sin)
                other.positions, other.eps = case.positions, case.eps
                for name, result in run(backend, other, grads).tensors().items():
                    assert_bitwise_equal(result, expected[name], name)
            for token in (0, 4, 8):
                one = slice(token, token + 1)
                alone = Case(case.qkv[one], *heads, dim, case.q_weight, case.k_weight, case.cos)
                alone.sin, alone.eps, alone.positions = case.sin, case.eps, case.positions[one]
                results = run(backend, alone, [x[one] for x in grads])
                for name in "qkv":
                    assert_bitwise_equal(getattr(results, name), expected[name][one], name)
            ran += len(views) + 4
    backend.count(ran)


@pytest.mark.parametrize(
    "odd", ["q", "k", "q_weight", "k_weight", "cos", "sin", "grad_q", "grad_k", "grad_v"]
)
def test_one_misaligned_tensor_among_aligned_ones(odd: str, backend: Backend) -> None:
    case = make_case(BF16, 128, (4, 2), 3, "odd")
    q, k, v = (x.flatten(1) for x in heads_of(case))
    grads = gradients_of(case)

    def moved(x: Tensor) -> Tensor:
        return Guarded(tuple(x.shape), x.dtype, offset=1).tensor.copy_(x)

    apart = {"q": q, "k": k, "v": v}
    if odd in apart:
        apart[odd] = moved(apart[odd])
    elif odd.startswith("grad_"):
        grads["qkv".index(odd[-1])] = moved(grads["qkv".index(odd[-1])])
    else:
        setattr(case, odd, moved(getattr(case, odd)))
    case.qkv = tuple(apart.values())
    check(case, grads, run(backend, case, grads))
    backend.count(1)


def test_nothing_to_do(backend: Backend) -> None:
    """Without tokens the gradients of the weights are zeros."""
    case = make_case(BF16, 64, (4, 2), 0)
    results = run(backend, case, gradients_of(case)).tensors()
    assert results["q"].shape == (0, 4, 64)
    for name in ("q_weight", "k_weight"):
        assert_bitwise_equal(results[name], torch.zeros(64, dtype=BF16), name)


def test_bits_do_not_depend_on_the_schedule(emulated: Backend) -> None:
    emulator = Emulator(emulator_library())
    for dtype in DTYPES:
        for dim, heads in ((8, (3, 1)), (72, (2, 2)), (128, (40, 8))):
            case = make_case(dtype, dim, heads, 5, "schedule")
            grads = gradients_of(case)
            expected = run(emulated, case, grads).tensors()
            for schedule, seed in (("reverse", 1), ("random", 1), ("random", 2)):
                with emulator.schedule(schedule, seed):
                    results = run(emulated, case, grads).tensors()
                for name, want in expected.items():
                    assert_bitwise_equal(results[name], want, f"{name}, {schedule}")
    emulated.count(36)


def test_offsets_beyond_two_to_the_31(emulated: Backend) -> None:
    """Token strides of 2^31 + 8 elements of gradients, inputs and outputs."""
    dim, heads, gap = 64, (2, 1), 2**31 + 8
    case = make_case(BF16, dim, heads, 3, "far")
    assert isinstance(case.qkv, Tensor)
    grads = gradients_of(case)

    def far(x: Tensor) -> Tensor:
        view = sparse(2 * gap + x[0].numel(), BF16).as_strided(x.shape, (gap, dim, 1))
        return view.copy_(x)

    q, k, _ = (far(x) for x in heads_of(case))
    outs = [far(torch.zeros_like(x)) for x in grads]
    backward_extension(emulated).qk_norm_rope_backward(
        *(*map(far, grads), q, k, case.q_weight, case.k_weight, case.cos, case.sin),
        *(case.positions, case.eps, None, *outs, None, None),
    )
    check(case, grads, Grads(*(x.clone() for x in outs), None, None))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reads_no_byte_past_the_end(dtype: torch.dtype, emulated: Backend) -> None:
    for dim, heads in ((8, (1, 1)), (72, (3, 1)), (128, (2, 2))):
        case = make_case(dtype, dim, heads, 3, "end")

        def at_end(x: Tensor) -> Tensor:
            return before_guard_page(tuple(x.shape), x.dtype).copy_(x)

        grads = [at_end(x) for x in gradients_of(case)]
        case.qkv = tuple(at_end(x.flatten(1)) for x in heads_of(case))
        for name in ("q_weight", "k_weight", "cos", "sin", "positions"):
            setattr(case, name, at_end(getattr(case, name)))
        check(case, grads, run(emulated, case, grads))
    emulated.count(3)


def test_the_workspace_depends_on_shapes_alone(emulated: Backend) -> None:
    """And holds no more than a part for each token, 1024 parts at most, of either dtype's sums."""
    size = backward_extension(emulated).qk_norm_rope_backward_workspace
    assert [size(tokens, 64, 2) for tokens in (0, 1, 7)] == [0, 2 * 64 * 4, 7 * 2 * 64 * 4]
    assert size(7, 64, 4) == 2 * size(7, 64, 2)
    assert size(10**9, 128, 2) == size(1024, 128, 2) == 1024 * 2 * 128 * 4
    for arguments in ((5, 12, 2), (5, 136, 2), (5, 64, 8)):
        with pytest.raises(ValueError, match="expected"):
            size(*arguments)


def arguments(**changes: Any) -> dict[str, Any]:
    """A correct call on CPU tensors, with some arguments changed: two query heads over one kv head
    of 16, four tokens."""
    shapes = {"q": (4, 2, 16), "k": (4, 1, 16), "v": (4, 1, 16)}
    given: dict[str, Any] = {
        "q_weight": torch.ones(16, dtype=BF16),
        "k_weight": torch.ones(16),
        "cos": torch.ones(8, 8),
        "sin": torch.ones(8, 8),
        "positions": torch.zeros(4, dtype=torch.int32),
        "eps": 1e-6,
        "workspace": torch.empty(4 * 2 * 16),
        "d_q_weight": torch.empty(16, dtype=BF16),
        "d_k_weight": torch.empty(16),
    }
    for name, shape in shapes.items():
        given |= {f"grad_{name}": torch.zeros(shape, dtype=BF16)}
        given |= {f"d_{name}": torch.zeros(shape, dtype=BF16)}
        if name != "v":
            given[name] = torch.zeros(shape, dtype=BF16)
    return given | changes


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"grad_q": torch.zeros(4, 32)}, r"grad_q: expected \(num_tokens, num_heads, head_dim\), got"),
    ({"grad_q": torch.zeros(4, 2, 12)}, "head_dim: expected a multiple of 8 from 8 to 128, got 12"),
    ({"grad_q": torch.zeros(4, 2, 136)}, "head_dim: .* got 136"),
    ({"grad_k": torch.zeros(3, 1, 16)}, r"grad_k: expected \(num_tokens=4, num_kv_heads=1, head_"),
    ({"grad_v": torch.zeros(4, 2, 16)}, r"grad_v: expected \(num_tokens=4, num_kv_heads=1, head_"),
    ({"q": torch.zeros(4, 1, 16)}, r"q: expected \(num_tokens=4, num_heads=2, head_dim=16\)"),
    ({"d_k": torch.zeros(4, 2, 16)}, r"d_k: expected \(num_tokens=4, num_kv_heads=1, head_dim=16"),
    ({"q": None}, "q: expected what the op was given when there is a q_weight, got None"),
    ({"q_weight": None}, "d_q_weight: expected None without q_weight, got a tensor"),
    ({"k_weight": torch.ones(8)}, r"k_weight: expected \(head_dim=16\), got \(8,\)"),
    ({"d_k_weight": torch.ones(8)}, r"d_k_weight: expected \(head_dim=16\), got \(8,\)"),
    ({"grad_v": None}, "grad_v, d_v: expected both or neither"),
    ({"d_v": None}, "grad_v, d_v: expected both or neither"),
    ({"sin": None}, "cos, sin: expected both tables or neither"),
    ({"positions": None}, r"positions: expected int32 \(num_tokens,\) when cos"),
    (
        {"positions": torch.zeros(3, dtype=torch.int32)},
        r"positions: expected \(num_tokens=4\), got",
    ),
    ({"sin": torch.ones(7, 8)}, r"sin: expected \(rows=8, 8\), got \(7, 8\)"),
    ({"cos": torch.ones(8, 16)}, r"cos: expected \(rows=8, 8\), got \(8, 16\)"),
    (
        {"cos": torch.ones(0, 8), "sin": torch.ones(0, 8)},
        "cos: expected at least one row, got none",
    ),
    ({"eps": float("nan")}, "eps: expected a finite number >= 0, got nan"),
    ({"workspace": None}, "workspace: expected 128 or more elements of float32, got None"),
    ({"workspace": torch.empty(127)}, r"workspace: expected 128 or more .*, got \(127,\)"),
    ({"workspace": torch.empty(16, 8)}, r"workspace: expected 128 or more .*, got \(16, 8\)"),
    ({"workspace": torch.empty(128).double()}, "workspace: expected dtype float32, got"),
    ({"workspace": torch.empty(129)[1:]}, "workspace: expected data aligned to 16 bytes"),
    ({"grad_q": torch.zeros(4, 2, 16).double()}, "grad_q: expected dtype bfloat16 or float16 or"),
    ({"grad_v": torch.zeros(4, 1, 16)}, "grad_v: expected dtype bfloat16, got float32"),
    ({"k": torch.zeros(4, 1, 16)}, "k: expected dtype bfloat16, got float32"),
    ({"d_q": torch.zeros(4, 2, 16)}, "d_q: expected dtype bfloat16, got float32"),
    ({"q_weight": torch.ones(16).half()}, "q_weight: expected dtype bfloat16 or float32, got floa"),
    ({"d_q_weight": torch.ones(16)}, "d_q_weight: expected dtype bfloat16, got float32"),
    ({"cos": torch.ones(8, 8).half()}, "cos: expected dtype bfloat16 or float32, got float16"),
    ({"sin": torch.ones(8, 8, dtype=BF16)}, "sin: expected dtype float32, got bfloat16"),
    (
        {"positions": torch.zeros(4, dtype=torch.int64)},
        "positions: expected dtype int32, got int64",
    ),
    (
        {"grad_k": torch.zeros(4, 1, 32, dtype=BF16)[..., ::2]},
        "grad_k: expected stride 1 in the last dimension",
    ),
    (
        {"q": torch.frombuffer(bytearray(257), dtype=BF16, offset=1).view(4, 2, 16)},
        "q: expected data aligned to its elements of 2 bytes",
    ),
    (
        {"d_q": torch.zeros(1, 2, 16, dtype=BF16).expand(4, 2, 16)},
        "d_q: expected an output whose elements do not share memory",
    ),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=range(len(WRONG)))
def test_wrong_arguments_are_named(
    extension: ModuleType, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        extension.qk_norm_rope_backward(**arguments(**changes))


def test_outputs_share_no_memory(extension: ModuleType) -> None:
    alike = [("d_q", "grad_q"), ("d_q", "q"), ("d_k", "k"), ("d_k", "grad_v"), ("d_v", "grad_v")]
    alike += [("d_q_weight", "q_weight"), ("d_k_weight", "k_weight")]
    for output, other in alike:
        given = arguments()
        given[output] = given[other]
        with pytest.raises(ValueError, match=f"{output}: expected memory apart from {other}"):
            extension.qk_norm_rope_backward(**given)
    for output, other in (("d_k", "d_v"), ("workspace", "d_k_weight")):
        given = arguments()
        given["workspace"] = given["workspace"] if output == "d_k" else torch.empty(128)
        given[other] = given[output] if output == "d_k" else given["workspace"][:16]
        with pytest.raises(ValueError, match="expected memory apart from"):
            extension.qk_norm_rope_backward(**given)


def test_a_list_is_no_tensor(extension: ModuleType) -> None:
    for name in arguments():
        expected = "a number" if name == "eps" else "a torch.Tensor"
        with pytest.raises(TypeError, match=f"{name}: expected {expected}, got list"):
            extension.qk_norm_rope_backward(**arguments(**{name: [1.0]}))


@pytest.mark.parametrize("is_packed", [True, False])
@pytest.mark.parametrize("norm", [True, False])
def test_autograd_takes_the_kernel(
    is_packed: bool, norm: bool, emulated: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Directly and in a compiled graph, with equal bits; also for gradients without strides."""
    monkeypatch.setattr(direct, "ops", emulated.ops)
    emulator = Emulator(emulator_library())
    case = make_case(BF16, 16, (4, 2), 5, "autograd", norm=norm)
    assert isinstance(case.qkv, Tensor)
    if not is_packed:
        case.qkv = tuple(x.flatten(1).clone() for x in heads_of(case))
    inputs = (case.qkv,) if isinstance(case.qkv, Tensor) else case.qkv
    weights = [x for x in (case.q_weight, case.k_weight) if x is not None]
    wanted = [x.requires_grad_() for x in (*inputs, *weights)]
    weighting = gradients_of(case, "autograd")

    def loss(*inputs: Tensor) -> Tensor:
        qkv = inputs[0] if is_packed else inputs[:3]
        weights = inputs[-2:] if norm else (None, None)
        table = (case.cos, case.sin, case.positions, case.eps)
        q, k, v = emulated.ops.qk_norm_rope(qkv, 4, 2, *weights, *table)
        return (q * weighting[0]).sum() + k.sum() + v.sum()

    emulator.clear_launches()
    grads = torch.autograd.grad(loss(*wanted), wanted)
    assert any("heads_backward_kernel" in x.kernel for x in emulator.launches())
    with torch.no_grad():
        of_results = [weighting[0], *(torch.ones_like(x) for x in weighting[1:])]
        case.qkv = grads[0] if is_packed else grads[:3]
        parts = heads_of(case)
        case.qkv = inputs[0].detach() if is_packed else tuple(x.detach() for x in inputs)
        case.q_weight, case.k_weight = (x.detach() for x in weights) if norm else (None, None)
        check(case, of_results, Grads(*parts, *(grads[-2:] if norm else (None, None))))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(*wanted), wanted), grads, strict=True):
        assert_bitwise_equal(a, b)
    q, k, v = (inputs[0], None, None) if is_packed else inputs
    given_weights = weights if norm else (None, None)
    opcheck(
        torch.ops.exafuse.qk_norm_rope,
        (q, k, v, 4, 2, *given_weights, case.cos, case.sin, case.positions, case.eps),
    )


def test_frozen_weights_cost_no_second_launch(
    emulated: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "ops", emulated.ops)
    emulator = Emulator(emulator_library())
    case = make_case(BF16, 64, (4, 2), 3, "frozen")
    case.qkv.requires_grad_()
    q, k, v = emulated.ops.qk_norm_rope(*case.arguments(emulated))
    emulator.clear_launches()
    torch.autograd.grad(q.sum() + k.sum() + v.sum(), case.qkv)
    assert [x.kernel.count("heads_backward_kernel") for x in emulator.launches()] == [1]


def test_nothing_is_kept_for_a_rotation_alone(
    emulated: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is saved for the gradients is the tables and, with norms, the normed input."""
    monkeypatch.setattr(direct, "ops", emulated.ops)
    for norm, kept in ((False, 0), (True, 1)):
        case = make_case(BF16, 64, (4, 2), 3, "kept", norm=norm)
        case.qkv.requires_grad_()
        shapes: list[torch.Size] = []

        def note(x: Tensor, shapes: list[torch.Size] = shapes) -> Tensor:
            shapes.append(x.shape)
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            emulated.ops.qk_norm_rope(*case.arguments(emulated))
        assert shapes.count(case.qkv.shape) == kept
