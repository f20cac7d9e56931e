"""vision_attn against the fp64 oracle: windows of at most 64 tokens, every element."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import Any

import attention_oracle
import pytest
import torch
from exafuse.ops import front_door
from kernel_backends import Backend, backend, case_factor, emulated
from poison import Guarded, generator, layouts, poisoned

__all__ = ["backend", "emulated"]  # fixtures

DTYPES = [torch.bfloat16, torch.float16]
HEAD_DIMS = [8, 16, 24, 40, 64, 64, 72, 80, 88, 96, 104, 128]
HEADS = [(1, 1), (2, 1), (3, 3), (4, 2), (5, 1), (4, 1), (7, 1), (6, 2)]
LENGTHS = [0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 56, 63, 64]


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

    def run(self, backend: Backend, guarded: Guarded | None = None) -> torch.Tensor:
        guarded = guarded or self.output()
        given = backend.give(guarded.tensor)
        load = front_door.load_emulated if backend.name == "emulated" else front_door.load_cuda
        kernels: Any = load()
        sizes = (self.num_heads, self.num_kv_heads, self.head_dim, self.max_seqlen)
        needed = kernels.vision_attn_workspace(self.num_tokens, *sizes)
        # What it holds before does not count: NaN, as the kernel finds it.
        workspace = poisoned(needed // 4, dtype=torch.float32) if needed else None
        kernels.vision_attn(
            *(backend.give(self.qkv), self.num_heads, self.num_kv_heads),
            *(backend.give(self.cos), backend.give(self.sin), backend.give(self.cu_seqlens)),
            *(self.max_seqlen, self.scale, backend.give_optional(workspace), given),
        )
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


def random_lengths(choose: random.Random, few: int) -> list[int]:
    return [choose.choice(LENGTHS) for _ in range(choose.randint(1, few))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share", range(4))
def test_random_windows(share: int, dtype: torch.dtype, backend: Backend) -> None:
    """Lengths, heads, head dimensions, layouts of every tensor, scales, longest windows."""
    choose = random.Random(f"windows {dtype} {share}")
    cases = 275 * case_factor()
    align = 16 // dtype.itemsize
    for number in range(cases):
        lengths = random_lengths(choose, 3)
        heads = choose.choice(HEADS)
        case = make_case(dtype, choose.choice(HEAD_DIMS), heads, lengths, share, number)
        case.scale *= choose.choice([0.5, 1.0, 1.0, 2.0])
        case.max_seqlen = choose.choice([64, case.max_seqlen, case.max_seqlen])
        if choose.random() < 0.5:
            case.qkv = choose.choice(list(layouts(case.qkv, align)))[1]
            case.cos = choose.choice(list(layouts(case.cos, 4)))[1]
            case.sin = choose.choice(list(layouts(case.sin, 4)))[1]
        gaps = (choose.choice([0, 0, 1, align]), choose.choice([0, 0, 1, align]))
        try:
            out = case.run(backend, case.output(gaps, choose.choice([0, 0, 1])))
            case.expected().check(out, peer=number % 4 == 0)
        except AssertionError as error:
            raise AssertionError(
                f"case {number}: windows {lengths} of at most {case.max_seqlen}, {heads} heads of "
                f"{case.head_dim}, {error}"
            ) from error
    backend.count(cases)
