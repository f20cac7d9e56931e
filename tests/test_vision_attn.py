"""vision_attn against the fp64 oracle, every element: windows of at most 64 tokens, which one
launch handles, and whole frames, whose q and k are rotated into a workspace first."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import attention_oracle
import numpy as np
import pytest
import torch
from emulator.control import Emulator
from exafuse.ops import front_door
from kernel_backends import Backend, backend, case_factor, emulated, emulator_library, extension
from numeric import assert_bitwise_equal
from poison import Guarded, before_guard_page, generator, layouts, sparse

__all__ = ["backend", "emulated", "extension"]  # fixtures

DTYPES = [torch.bfloat16, torch.float16]
HEAD_DIMS = [8, 16, 24, 40, 64, 64, 72, 80, 88, 96, 104, 128]
HEADS = [(1, 1), (1, 1), (2, 1), (2, 2), (3, 1), (4, 2), (5, 1), (7, 1)]
LENGTHS = [0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 56, 63, 64]
FRAMES = [0, 1, 16, 63, 64, 65, 80, 127, 128, 129, 130]
LONG = 65  # of at least this many tokens, a longest segment makes segments frames


@dataclass
class Case:
    """The arguments of one call, on the CPU, in whatever layout."""

    qkv: torch.Tensor
    num_heads: int
    num_kv_heads: int
    head_dim: int
    cos: torch.Tensor
    sin: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    scale: float

    @property
    def num_tokens(self) -> int:
        return self.qkv.shape[0]

    def output(self, gaps: tuple[int, int] = (0, 0), offset: int = 0) -> Guarded:
        """A buffer with `gaps` behind each head and each token."""
        head_stride = self.head_dim + gaps[0]
        strides = (self.num_heads * head_stride + gaps[1], head_stride, 1)
        shape = (self.num_tokens, self.num_heads, self.head_dim)
        return Guarded(shape, self.qkv.dtype, strides, offset)

    def run(
        self, backend: Backend, guarded: Guarded | None = None, workspace_offset: int = 0
    ) -> torch.Tensor:
        """The output. The workspace is full of NaN, as many elements off its start as asked for."""
        guarded = guarded or self.output()
        given = backend.give(guarded.tensor)
        load = front_door.load_emulated if backend.name == "emulated" else front_door.load_cuda
        kernels: Any = load()
        sizes = (self.num_heads, self.num_kv_heads, self.head_dim, self.max_seqlen)
        needed = kernels.vision_attn_workspace(self.num_tokens, *sizes)
        buffer = Guarded((needed // 4,), torch.float32, offset=workspace_offset)
        workspace = backend.give(buffer.tensor) if needed else None
        kernels.vision_attn(
            *(backend.give(self.qkv), self.num_heads, self.num_kv_heads),
            *(backend.give(self.cos), backend.give(self.sin), backend.give(self.cu_seqlens)),
            *(self.max_seqlen, self.scale, workspace, given),
        )
        if workspace is not None:
            backend.take_back(workspace, buffer, "workspace")
        return backend.take_back(given, guarded, "out")

    def expected(self) -> attention_oracle.Expected:
        return attention_oracle.vision_attn(
            *(self.qkv, self.num_heads, self.num_kv_heads, self.cos, self.sin),
            *(self.cu_seqlens, self.max_seqlen, self.scale),
        )

    def part(self, name: str) -> torch.Tensor:
        """q, k or v of the projection, `[num_tokens, heads, head_dim]`, as a view."""
        counts = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        heads = self.qkv.unflatten(1, (sum(counts), self.head_dim))
        return heads.split(counts, dim=1)["qkv".index(name)]


def offsets(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def make_case(
    dtype: torch.dtype, head_dim: int, heads: tuple[int, int], lengths: list[int], *key: object
) -> Case:
    gen = generator(dtype, head_dim, heads, lengths, *key)
    tokens = sum(lengths)
    qkv = torch.randn(tokens, (heads[0] + 2 * heads[1]) * head_dim, generator=gen).to(dtype)
    angles = torch.rand(tokens, head_dim // 2, generator=gen, dtype=torch.float64) * 9
    tables = angles.cos().float(), angles.sin().float()
    longest = max(lengths, default=0)
    case = Case(qkv, *heads, head_dim, *tables, offsets(lengths), longest, head_dim**-0.5)
    for part in (case.part("q"), case.part("k")):
        without_ties(part, *tables)
    return case


def without_ties(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Zero the pairs of `x` whose rotation lies so close to the middle of two numbers of the dtype
    that fp32 and fp64 may round it apart: either is right, and one ulp of q moves scores by more
    than the tolerance of the output."""
    a, b = x.double().chunk(2, dim=-1)
    c, s = (table.double()[:, None] for table in (cos, sin))
    unsure = torch.zeros(a.shape, dtype=torch.bool)
    for rotated, size in (
        (a * c - b * s, (a * c).abs() + (b * s).abs()),
        (b * c + a * s, (b * c).abs() + (a * s).abs()),
    ):
        low, high = (rotated + sign * 2.0**-23 * size for sign in (-1, 1))
        unsure |= low.to(x.dtype) != high.to(x.dtype)
    x.masked_fill_(torch.cat([unsure, unsure], dim=-1), 0)


def random_call(
    choose: random.Random, dtype: torch.dtype, lengths: list[int], *key: object
) -> Case:
    """Heads, head dimension, scale and the layout of every input."""
    case = make_case(dtype, choose.choice(HEAD_DIMS), choose.choice(HEADS), lengths, *key)
    case.scale *= choose.choice([0.5, 1.0, 1.0, 2.0])
    if choose.random() < 0.5:
        case.qkv = choose.choice(list(layouts(case.qkv, 16 // dtype.itemsize)))[1]
        case.cos, case.sin = (choose.choice(list(layouts(t, 4)))[1] for t in (case.cos, case.sin))
    return case


def check(case: Case, choose: random.Random, backend: Backend, number: int) -> None:
    """Run into an output of any layout, and judge it."""
    gaps = (choose.choice([0, 0, 1, 8]), choose.choice([0, 0, 1, 8]))
    try:
        out = case.run(backend, case.output(gaps, choose.choice([0, 0, 1])))
        case.expected().check(out, peer=number % 4 == 0)
    except AssertionError as error:
        raise AssertionError(
            f"case {number}: segments {case.cu_seqlens.tolist()} of at most {case.max_seqlen}, "
            f"{case.num_heads}/{case.num_kv_heads} heads of {case.head_dim}, {error}"
        ) from error


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "share",
    [
        pytest.param(0, marks=pytest.mark.sanitized),
        *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3)),
    ],
)
def test_random_windows(share: int, dtype: torch.dtype, backend: Backend) -> None:
    choose = random.Random(f"windows {dtype} {share}")
    cases = (100 if share == 0 else 300) * case_factor()
    for number in range(cases):
        lengths = [choose.choice(LENGTHS) for _ in range(choose.choice([1, 1, 2, 3]))]
        case = random_call(choose, dtype, lengths, "windows", share, number)
        case.max_seqlen = choose.choice([64, case.max_seqlen])
        check(case, choose, backend, number)
    backend.count(cases)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_frames(dtype: torch.dtype, backend: Backend) -> None:
    choose = random.Random(f"frames {dtype}")
    cases = 60 * case_factor()
    for number in range(cases):
        lengths = [choose.choice(FRAMES) for _ in range(choose.choice([1, 1, 2, 3]))]
        case = random_call(choose, dtype, lengths, "frames", number)
        case.max_seqlen = max(LONG, choose.choice([case.max_seqlen, case.num_tokens, 10**6]))
        check(case, choose, backend, number)
    backend.count(cases)


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kernel(dtype: torch.dtype, backend: Backend) -> None:
    """Each tile of head dimensions, full and in part, by wide and by narrow access."""
    ran = 0
    for head_dim in (8, 40, 64, 72, 96, 104, 128):
        for offset in (0, 1):
            for longest in (64, LONG):
                case = make_case(dtype, head_dim, (2, 1), [17, 64, 0, 1], "kernel", offset)
                shifted = Guarded(tuple(case.qkv.shape), dtype, offset=offset).tensor
                case.qkv = shifted.copy_(case.qkv)
                case.max_seqlen = longest
                out = case.run(backend, case.output(offset=offset), workspace_offset=offset)
                case.expected().check(out, label=f"{head_dim}, offset {offset}, {longest}")
                ran += 1
        case.qkv = case.qkv.clone()
        out = case.run(backend, workspace_offset=1)
        case.expected().check(out, label=f"{head_dim}, workspace at an odd place")
        ran += 1
    backend.count(ran)


@pytest.mark.sanitized
def test_more_heads_than_a_block_has_threads_for(backend: Backend) -> None:
    for head_dim, heads in ((128, (12, 4)), (64, (32, 8))):
        case = make_case(torch.bfloat16, head_dim, heads, [3, 1], "many heads")
        case.max_seqlen = LONG
        case.expected().check(case.run(backend))
    backend.count(2)


@pytest.mark.sanitized
def test_every_window_sees_exactly_its_keys(backend: Backend) -> None:
    """Keys of zero weigh alike, and values are rows of the identity: the output says who was seen,
    for every length."""
    for head_dim, lengths in ((64, list(range(65))), (128, [1, 9, 40, 64, 63, 17])):
        case = make_case(torch.bfloat16, head_dim, (3, 1), lengths, "seen")
        case.part("k").zero_()
        case.part("v").zero_()
        for start, stop in itertools.pairwise(case.cu_seqlens.tolist()):
            case.part("v")[start:stop, 0, : stop - start] = torch.eye(stop - start)
        out = case.run(backend)
        for start, stop in itertools.pairwise(case.cu_seqlens.tolist()):
            n = stop - start
            expected = torch.zeros(n, 3, head_dim, dtype=torch.bfloat16)
            expected[:, :, :n] = 1 / max(n, 1)
            assert_bitwise_equal(out[start:stop].contiguous(), expected, f"window of {n}")
    backend.count(71)


@pytest.mark.parametrize("longest", [64, LONG])
def test_each_query_head_reads_its_own_kv_head(longest: int, backend: Backend) -> None:
    for heads in ((1, 1), (6, 2), (4, 4), (9, 3), (8, 1)):
        case = make_case(torch.float16, 16, heads, [20, 3], "gqa")
        case.part("v").copy_(torch.arange(heads[1])[None, :, None].expand(23, -1, 16) + 1)
        case.max_seqlen = longest
        wanted = (torch.arange(heads[0]) // (heads[0] // heads[1]) + 1).to(torch.float16)
        expected = wanted[None, :, None].expand(23, -1, 16).contiguous()
        torch.testing.assert_close(case.run(backend), expected, rtol=2e-3, atol=0)
    backend.count(5)


@pytest.mark.sanitized
@pytest.mark.parametrize("longest", [64, LONG])
def test_segments_do_not_touch_each_other(longest: int, backend: Backend) -> None:
    """The bits of a segment are the same alone, among others, and among others full of NaN."""
    ran = 0
    for dtype, head_dim in itertools.product(DTYPES, (64, 96)):
        lengths = [13, 64, 1, 33]
        case = make_case(dtype, head_dim, (2, 1), lengths, "apart")
        case.max_seqlen = longest
        together = case.run(backend)
        for start, stop in itertools.pairwise(case.cu_seqlens.tolist()):
            rows = slice(start, stop)
            alone = replace(
                case,
                qkv=case.qkv[rows],
                cos=case.cos[rows],
                sin=case.sin[rows],
                cu_seqlens=offsets([stop - start]),
            )
            assert_bitwise_equal(alone.run(backend), together[rows].contiguous(), "alone")
            others = replace(case, qkv=torch.full_like(case.qkv, torch.nan))
            others.qkv[rows] = case.qkv[rows]
            result = others.run(backend)
            assert_bitwise_equal(result[rows].contiguous(), together[rows].contiguous(), "others")
            assert result[:start].isnan().all()
            assert result[stop:].isnan().all()
            ran += 2
    backend.count(ran)


@pytest.mark.parametrize("longest", [64, LONG])
def test_bits_do_not_depend_on_the_layout(longest: int, backend: Backend) -> None:
    ran = 0
    for dtype, head_dim in itertools.product(DTYPES, (40, 64, 128)):
        case = make_case(dtype, head_dim, (2, 1), [33, 7], "layouts")
        case.max_seqlen = longest
        expected = case.run(backend)
        for name, view in layouts(case.qkv):
            result = replace(case, qkv=view).run(backend, case.output((1, 3), 1))
            assert_bitwise_equal(result.contiguous(), expected.contiguous(), name)
            ran += 1
        for name, view in layouts(case.cos, 4):
            result = replace(case, cos=view).run(backend)
            assert_bitwise_equal(result, expected.contiguous(), f"cos: {name}")
            ran += 1
    backend.count(ran)


@pytest.mark.sanitized
@pytest.mark.parametrize("longest", [64, LONG])
def test_values_that_are_not_finite(longest: int, backend: Backend) -> None:
    """In v they reach every row of their segment, in q their own row, in k every row."""
    ran = 0
    for part, value in itertools.product("qkv", (torch.nan, torch.inf, -torch.inf)):
        case = make_case(torch.bfloat16, 40, (4, 2), [20, 17, 30], "not finite", part)
        case.part(part)[25, 1, 5] = value
        case.max_seqlen = longest
        with np.errstate(invalid="ignore"):  # inf - inf, on the way to the judgement
            case.expected().check(case.run(backend), label=f"{value} in {part}")
        ran += 1
    backend.count(ran)


@pytest.mark.parametrize("longest", [64, LONG])
def test_large_scores(longest: int, backend: Backend) -> None:
    """Scores far beyond what exp holds, all alike, or one far above all others."""
    ran = 0
    for dtype in DTYPES:
        for size in (0.0, 1e-3, 30.0, -30.0):
            case = make_case(dtype, 64, (2, 1), [64, 29], "large")
            case.part("q").fill_(abs(size))
            case.part("k").fill_(size)
            case.cos.fill_(1)
            case.sin.fill_(0)
            case.max_seqlen = longest
            case.expected().check(case.run(backend), label=f"all {size}")
            case.part("k")[10] *= 2
            case.expected().check(case.run(backend), label=f"one of {2 * size}")
            ran += 2
    backend.count(ran)


@pytest.mark.sanitized
@pytest.mark.parametrize("longest", [64, LONG])
def test_offsets_and_lengths_out_of_range(longest: int, backend: Backend) -> None:
    """Nothing outside the tensors is touched; rows of no segment and rows beyond the longest one
    stay as they are."""
    far = 2**31 - 1
    tables = [[-5, 20, 33], [0, 40, 90], [10, 30, 20], [-far, far], [far, far, -1], [7, 7], [50]]
    for number, table in enumerate(tables):
        case = make_case(torch.bfloat16, 64, (2, 1), [33], "range", number)
        case.cu_seqlens = torch.tensor(table, dtype=torch.int32)
        case.max_seqlen = longest
        case.expected().check(case.run(backend), label=str(table))
    case = make_case(torch.bfloat16, 64, (2, 1), [20, 33], "short")
    for case.max_seqlen in (0, 1, 16, 32):
        case.expected().check(case.run(backend), label=f"rows up to {case.max_seqlen}")
    backend.count(len(tables) + 4)


@pytest.mark.sanitized
def test_rows_beyond_the_longest_frame_are_not_written(backend: Backend) -> None:
    case = make_case(torch.bfloat16, 16, (1, 1), [150, 20], "short frames")
    case.max_seqlen = 70
    case.expected().check(case.run(backend))


@pytest.mark.sanitized
@pytest.mark.parametrize("longest", [64, LONG])
def test_empty_calls_write_nothing(longest: int, backend: Backend) -> None:
    for lengths in ([], [0], [0, 0]):
        case = make_case(torch.float16, 64, (2, 1), lengths, "empty")
        case.max_seqlen = longest
        assert case.run(backend).shape == (0, 2, 64)
    no_segments = replace(make_case(torch.float16, 64, (2, 1), [9]), cu_seqlens=offsets([]))
    no_segments.max_seqlen = longest
    assert no_segments.run(backend).isnan().all()
    backend.count(4)


@pytest.mark.parametrize("longest", [64, LONG])
def test_bits_do_not_depend_on_the_schedule(longest: int, emulated: Backend) -> None:
    emulator = Emulator(emulator_library())
    ran = 0
    for dtype, head_dim in itertools.product(DTYPES, (24, 64, 96, 128)):
        case = make_case(dtype, head_dim, (3, 1), [64, 5, 40], "schedule")
        case.max_seqlen = longest
        expected = case.run(emulated)
        for schedule, seed in (("reverse", 1), ("random", 1), ("random", 2)):
            with emulator.schedule(schedule, seed):
                assert_bitwise_equal(case.run(emulated), expected, schedule)
            ran += 1
    emulated.count(ran)


@pytest.mark.sanitized
@pytest.mark.parametrize("longest", [64, LONG])
def test_offsets_beyond_two_to_the_31(longest: int, emulated: Backend) -> None:
    case = make_case(torch.bfloat16, 16, (2, 1), [3], "far")
    columns, gap = case.qkv.shape[1], 2**30 + 8
    far = sparse(2 * gap + columns, torch.bfloat16).as_strided((3, columns), (gap, 1))
    case.qkv = far.copy_(case.qkv)
    case.max_seqlen = longest
    out = sparse(2 * gap + 32, torch.bfloat16).as_strided((3, 2, 16), (gap, 16, 1))
    result = replace(case, qkv=case.qkv.contiguous()).run(emulated)
    sizes = (case.num_heads, case.num_kv_heads, case.head_dim, longest)
    kernels = front_door.load_emulated()
    needed = kernels.vision_attn_workspace(3, *sizes)
    workspace = torch.empty(needed // 4) if needed else None
    kernels.vision_attn(
        *(case.qkv, 2, 1, case.cos, case.sin, case.cu_seqlens, longest, case.scale),
        *(workspace, out),
    )
    assert_bitwise_equal(out.contiguous(), result.contiguous())


@pytest.mark.sanitized
@pytest.mark.parametrize("longest", [64, LONG])
def test_reads_no_byte_past_the_end(longest: int, emulated: Backend) -> None:
    for dtype, head_dim in itertools.product(DTYPES, (8, 72, 128)):
        case = make_case(dtype, head_dim, (2, 1), [5, 17], "guard")
        case.max_seqlen = longest
        for name in ("qkv", "cos", "sin", "cu_seqlens"):
            tensor = getattr(case, name)
            copy = before_guard_page(tuple(tensor.shape), tensor.dtype).copy_(tensor)
            setattr(case, name, copy)
        case.expected().check(case.run(emulated))
    emulated.count(6)


@pytest.mark.sanitized
def test_the_op_brings_its_own_output_and_workspace(backend: Backend) -> None:
    for longest in (64, LONG, 200):
        case = make_case(torch.bfloat16, 64, (4, 2), [64, 20], "op")
        given = (backend.give(t) for t in (case.cos, case.sin, case.cu_seqlens))
        out = backend.ops.vision_attn(backend.give(case.qkv), 4, 2, *given, longest)
        case.expected().check(out.cpu())
    backend.count(3)


# ---- arguments -----------------------------------------------------------------------------------


def arguments(longest: int = 64) -> dict[str, Any]:
    case = make_case(torch.bfloat16, 16, (2, 1), [5, 4], "arguments")
    workspace = torch.empty(9 * 3 * 16 // 2) if longest > 64 else None
    return {
        "qkv": case.qkv,
        "num_heads": 2,
        "num_kv_heads": 1,
        "cos": case.cos,
        "sin": case.sin,
        "cu_seqlens": case.cu_seqlens,
        "max_seqlen": longest,
        "softmax_scale": 0.25,
        "workspace": workspace,
        "out": torch.zeros(9, 2, 16, dtype=torch.bfloat16),
    }


BF16 = torch.bfloat16
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"qkv": torch.zeros(9, 63, dtype=BF16)}, r"qkv: expected \(num_tokens, 4 heads \* head_dim\)"),
    ({"qkv": torch.zeros(9, 4, 16, dtype=BF16)}, r"qkv: expected \(num_tokens, 4 heads"),
    ({"qkv": torch.zeros(9, 48, dtype=BF16)}, r"head_dim: expected a multiple of 8 .* got 12"),
    ({"qkv": torch.zeros(9, 544, dtype=BF16)}, r"head_dim: .* 8 to 128, got 136"),
    ({"num_heads": 3, "num_kv_heads": 2}, r"num_heads: expected a positive multiple"),
    ({"num_kv_heads": 0}, r"num_heads: expected a positive multiple of num_kv_heads"),
    ({"cos": torch.ones(9, 16)}, r"cos: expected \(num_tokens=9, 8\), got \(9, 16\)"),
    ({"sin": torch.ones(8, 8)}, r"sin: expected \(num_tokens=9, 8\), got \(8, 8\)"),
    ({"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, r"cu_seqlens: expected \(segments \+ 1,\)"),
    ({"cu_seqlens": torch.zeros(2, 1, dtype=torch.int32)}, r"cu_seqlens: expected \(segments"),
    ({"max_seqlen": -1}, r"max_seqlen: expected at least 0, got -1"),
    ({"softmax_scale": 0.0}, r"softmax_scale: expected a finite number > 0"),
    ({"softmax_scale": float("nan")}, r"softmax_scale: expected a finite number > 0"),
    ({"out": torch.zeros(9, 32, dtype=BF16)}, r"out: expected \(num_tokens=9, num_heads=2"),
    ({"max_seqlen": 65}, r"workspace: expected fp32 \(216,\), got None"),
    (
        {"max_seqlen": 65, "workspace": torch.empty(215)},
        r"workspace: expected at least 216 elements, got 215",
    ),
    ({"workspace": torch.empty(2, 200)}, r"workspace: expected \(bytes / 4\), got \(2, 200\)"),
    ({"qkv": torch.zeros(9, 64)}, r"qkv: expected dtype bfloat16 or float16, got float32"),
    ({"cos": torch.ones(9, 8, dtype=BF16)}, r"cos: expected dtype float32, got bfloat16"),
    ({"cu_seqlens": torch.tensor([0, 9])}, r"cu_seqlens: expected dtype int32, got int64"),
    ({"out": torch.zeros(9, 2, 16, dtype=torch.float16)}, r"out: expected dtype bfloat16"),
    (
        {"max_seqlen": 65, "workspace": torch.zeros(216, dtype=torch.int32)},
        r"workspace: expected dtype float32",
    ),
    ({"qkv": torch.zeros(9, 128, dtype=BF16)[:, ::2]}, r"qkv: expected stride 1 in the last"),
    ({"sin": torch.ones(9, 16)[:, ::2]}, r"sin: expected stride 1 in the last dimension"),
    (
        {"out": torch.zeros(1, 2, 16, dtype=BF16).expand(9, 2, 16)},
        r"out: expected an output whose elements do not share memory",
    ),
]


@pytest.mark.sanitized
@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_wrong_arguments_are_named(
    changes: dict[str, Any], message: str, extension: ModuleType
) -> None:
    with pytest.raises(ValueError, match=message):
        extension.vision_attn(**{**arguments(), **changes})


@pytest.mark.sanitized
def test_outputs_may_not_overlap_inputs(extension: ModuleType) -> None:
    given = arguments(longest=65)
    given["out"] = given["qkv"].unflatten(1, (4, 16))[:, :2]
    with pytest.raises(ValueError, match="out: expected memory apart from qkv, got an overlap"):
        extension.vision_attn(**given)
    given = arguments(longest=65)
    given["workspace"] = torch.zeros(500)
    given["cos"] = given["workspace"][:72].view(9, 8)
    with pytest.raises(ValueError, match="workspace: expected memory apart from cos"):
        extension.vision_attn(**given)


@pytest.mark.sanitized
def test_what_is_no_tensor_is_a_type_error(extension: ModuleType) -> None:
    for name in ("qkv", "cos", "sin", "cu_seqlens", "out"):
        with pytest.raises(TypeError, match=f"{name}: expected a torch.Tensor, got str"):
            extension.vision_attn(**{**arguments(), name: "text"})
    for name in ("num_heads", "max_seqlen"):
        with pytest.raises(TypeError, match=f"{name}: expected an int, got str"):
            extension.vision_attn(**{**arguments(), name: "text"})
    with pytest.raises(TypeError, match="softmax_scale: expected a number"):
        extension.vision_attn(**{**arguments(), "softmax_scale": "text"})


@pytest.mark.sanitized
def test_the_workspace_holds_rotated_q_and_k(extension: ModuleType) -> None:
    assert extension.vision_attn_workspace(100, 32, 8, 64, 64) == 0
    assert extension.vision_attn_workspace(100, 32, 8, 64, 65) == 100 * 40 * 64 * 2
    assert extension.vision_attn_workspace(2**20, 32, 8, 128, 2**20) == 2**20 * 40 * 128 * 2
