"""Few calls of vision_attn, each with much in it that may go wrong.

Small enough for sanitizers and for every mutant; tests/test_vision_attn.py varies far more.
"""

from __future__ import annotations

import pytest
import torch
from kernel_backends import Backend, backend, emulated
from poison import Guarded, layouts, sparse
from test_vision_attn import Case, make_case

__all__ = ["backend", "emulated"]  # fixtures

BF16, FP16 = torch.bfloat16, torch.float16


def run_and_check(case: Case, backend: Backend, guarded: Guarded | None = None) -> None:
    out = case.run(backend, guarded)
    case.expected().check(out, peer=False)
    backend.count(1)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize(
    ("head_dim", "heads", "lengths"),
    [
        (64, (2, 1), [64, 1, 17]),
        (80, (4, 2), [33, 0, 64, 8]),
        (128, (3, 3), [48, 49]),
        (96, (5, 1), [16, 63]),
        (24, (7, 1), [9, 2, 31]),
    ],
)
def test_windows(
    head_dim: int, heads: tuple[int, int], lengths: list[int], dtype: torch.dtype, backend: Backend
) -> None:
    case = make_case(dtype, head_dim, heads, lengths)
    run_and_check(case, backend)
    case.max_seqlen = 21  # rows beyond it stay as they are
    run_and_check(case, backend)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "heads", "lengths"),
    [
        (BF16, 80, (4, 2), [70, 0, 150]),
        (FP16, 64, (3, 3), [65, 1]),
        (FP16, 128, (20, 4), [90]),  # more heads than a block rotates at a time
    ],
)
def test_frames(
    dtype: torch.dtype,
    head_dim: int,
    heads: tuple[int, int],
    lengths: list[int],
    backend: Backend,
) -> None:
    case = make_case(dtype, head_dim, heads, lengths)
    run_and_check(case, backend)
    case.max_seqlen = 66
    run_and_check(case, backend, case.output((0, 3), 1))


@pytest.mark.parametrize("odd", ["qkv", "cos", "sin", "out"])
def test_one_misaligned_tensor(odd: str, backend: Backend) -> None:
    case = make_case(BF16, 64, (2, 1), [40, 7])
    if odd != "out":
        given = getattr(case, odd)
        setattr(case, odd, dict(layouts(given))["rows of odd stride"])
    run_and_check(case, backend, case.output((0, 1), 1) if odd == "out" else None)


@pytest.mark.parametrize("table", [[-7, 30, 20, 500], [0, 64, 64, 90]])
def test_segments_out_of_range(table: list[int], backend: Backend) -> None:
    case = make_case(BF16, 64, (2, 1), [30, 40])
    case.cu_seqlens = torch.tensor(table, dtype=torch.int32)
    case.max_seqlen = 64
    run_and_check(case, backend)


def test_nothing_to_do(backend: Backend) -> None:
    for lengths in ([], [0, 0]):
        case = make_case(BF16, 64, (2, 1), lengths)
        assert case.run(backend).numel() == 0


def test_values_that_are_no_numbers(backend: Backend) -> None:
    """NaN reaches its own window and head, no other."""
    case = make_case(BF16, 64, (4, 2), [20, 30, 5])
    case.part("v")[25, 1, 3] = torch.nan
    case.part("k")[52, 0, 7] = torch.nan
    run_and_check(case, backend)


def test_large_scores(backend: Backend) -> None:
    case = make_case(BF16, 64, (2, 1), [64, 33])
    case.scale = 1.0
    case.part("q")[:] *= 4
    run_and_check(case, backend)


def test_tokens_far_apart(emulated: Backend) -> None:
    case = make_case(BF16, 64, (2, 1), [3])
    far = sparse(2**31 + 4096, BF16).as_strided(tuple(case.qkv.shape), (2**30, 1))
    far.copy_(case.qkv)
    case.qkv = far
    run_and_check(case, emulated)
