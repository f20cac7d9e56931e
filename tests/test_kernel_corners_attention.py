"""Few calls of the attention kernels, each with much in it that may go wrong.

Small enough for sanitizers and for every mutant: one call or two for each way through a kernel,
every element held against the oracle. The ops' own test files vary far more.
"""

from __future__ import annotations

from typing import Any

import attention_caches
import attention_oracle
import numpy as np
import pytest
import torch
from exafuse.ops import front_door
from kernel_backends import Backend, backend, emulated
from poison import Guarded, generator, poisoned, sparse

__all__ = ["backend", "emulated"]  # fixtures

BF16, FP16 = torch.bfloat16, torch.float16
Lengths = list[int]


def normal(*shape: int, dtype: torch.dtype = BF16, key: object = 0) -> torch.Tensor:
    return torch.randn(shape, generator=generator("attention", shape, key)).to(dtype)


def kernels_of(backend: Backend) -> Any:
    load = front_door.load_emulated if backend.name == "emulated" else front_door.load_cuda
    return load()


def spread(x: torch.Tensor, gap: int, offset: int = 0) -> torch.Tensor:
    """The same values with `gap` NaN behind each row of heads, `offset` elements into a buffer."""
    width = x[..., :, :].shape[-1] * x.shape[-2] + gap
    strides = (width * x.shape[1], width, x.shape[-1], 1)[-x.ndim :]
    if x.ndim == 3:
        strides = (width, x.shape[-1], 1)
    return Guarded(tuple(x.shape), x.dtype, strides, offset).tensor.copy_(x)


def ints(values: list[int] | None) -> torch.Tensor | None:
    return None if values is None else torch.tensor(values, dtype=torch.int32)


def offsets(lengths: Lengths) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def label_of(case: tuple[Any, ...]) -> str:
    return str(case).replace(" ", "")


class Outputs:
    """`out` and `lse`, guarded; `gap` elements behind each row of `out`."""

    def __init__(self, backend: Backend, q: torch.Tensor, gap: int = 0) -> None:
        self.backend = backend
        heads = q.shape[-2]
        width = heads * q.shape[-1] + gap
        strides = (width, q.shape[-1], 1)
        if q.ndim == 4:
            strides = (width * q.shape[1], *strides)
            lse_shape: tuple[int, ...] = (q.shape[0], heads, q.shape[1])
        else:
            lse_shape = (heads, q.shape[0])
        self.out = Guarded(tuple(q.shape), q.dtype, strides)
        self.lse = Guarded(lse_shape, torch.float32)
        self.given = backend.give(self.out.tensor), backend.give(self.lse.tensor)

    def check(self, expected: attention_oracle.Expected, label: str) -> None:
        out = self.backend.take_back(self.given[0], self.out, f"out of {label}")
        lse = self.backend.take_back(self.given[1], self.lse, f"lse of {label}")
        expected.check(out, lse, label, peer=False)
        self.backend.count(1)


# ---- flash_attn_func and flash_attn_varlen_func --------------------------------------------------

# batch, seqlen_q, seqlen_k, heads, kv heads, head_dim, window, gap behind rows, offset
DENSE = [
    (1, 130, 130, 2, 1, 64, (-1, 0), 0, 0),  # causal, two tiles of queries, groups
    (2, 70, 200, 4, 2, 128, (-1, -1), 8, 0),  # all of the keys, more than there are queries
    (1, 200, 200, 3, 1, 96, (60, 0), 0, 0),  # a window that leaves tiles out on both sides
    (1, 40, 330, 2, 2, 40, (100, 3), 0, 0),  # padded columns, a window to both sides
    (1, 150, 20, 2, 1, 64, (-1, 0), 0, 0),  # most queries stand before the first key
    (1, 33, 65, 2, 1, 24, (0, 0), 1, 1),  # only its own key; nothing aligned
    (2, 17, 64, 1, 1, 80, (5, -1), 3, 0),  # the right side open
    (1, 64, 0, 2, 1, 64, (-1, -1), 0, 0),  # no key at all
]


@pytest.mark.parametrize("case", DENSE, ids=label_of)
def test_rows_of_keys(case: tuple[Any, ...], backend: Backend) -> None:
    batch, seqlen_q, seqlen_k, heads, kv_heads, dim, window, gap, offset = case
    for dtype in (BF16, FP16):
        q = normal(batch, seqlen_q, heads, dim, dtype=dtype)
        k = normal(batch, seqlen_k, kv_heads, dim, dtype=dtype, key="k")
        v = normal(batch, seqlen_k, kv_heads, dim, dtype=dtype, key="v")
        expected = attention_oracle.flash_attn_func(q, k, v, None, False, window)
        given = [backend.give(spread(x, gap, offset)) for x in (q, k, v)]
        outputs = Outputs(backend, q, gap)
        kernels_of(backend).flash_attn_func(*given, dim**-0.5, *window, *outputs.given)
        outputs.check(expected, f"{case} {dtype}")


def test_packed_sequences_of_all_lengths(backend: Backend) -> None:
    lengths_q, lengths_k = [0, 1, 129, 40, 64, 5], [7, 190, 100, 0, 64, 300]
    for dim, dtype in ((64, BF16), (104, FP16)):
        q = normal(sum(lengths_q) + 3, 4, dim, dtype=dtype)  # three rows belong to nobody
        k = normal(sum(lengths_k), 2, dim, dtype=dtype, key="k")
        v = normal(sum(lengths_k), 2, dim, dtype=dtype, key="v")
        for window, longest in (((-1, 0), 129), ((70, 0), 100)):
            tables = offsets(lengths_q), offsets(lengths_k)
            expected = attention_oracle.flash_attn_varlen_func(
                q, k, v, *tables, longest, 0.125, False, window
            )
            outputs = Outputs(backend, q)
            kernels_of(backend).flash_attn_varlen_func(
                *(backend.give(x) for x in (q, k, v, *tables)),
                *(longest, 0.125, *window, *outputs.given),
            )
            outputs.check(expected, f"packed, {dim} {dtype} {window}")


def test_offsets_of_sequences_out_of_range(backend: Backend) -> None:
    q, k, v = normal(90, 2, 64), normal(80, 1, 64, key="k"), normal(80, 1, 64, key="v")
    tables = ints([-5, 30, 20, 400]), ints([-9, 40, 70, 1000])
    expected = attention_oracle.flash_attn_varlen_func(q, k, v, *tables, 90, 0.125, False, (-1, 0))
    outputs = Outputs(backend, q)
    kernels_of(backend).flash_attn_varlen_func(
        *(backend.give(x) for x in (q, k, v, *tables)), 90, 0.125, -1, 0, *outputs.given
    )
    outputs.check(expected, "offsets out of range")


@pytest.mark.parametrize("seqlen_q", [70, 3])
def test_values_that_are_no_numbers(seqlen_q: int, backend: Backend) -> None:
    """NaN and infinities reach the rows that see their keys, and no other."""
    for dtype in (BF16, FP16):
        q = normal(1, seqlen_q, 4, 64, dtype=dtype)
        k, v = (normal(1, 256, 2, 64, dtype=dtype, key=name) for name in "kv")
        for at, column, value in ((10, 3, torch.nan), (200, 5, torch.inf), (240, 60, -torch.inf)):
            v[0, at, 0, column] = value
        k[0, 30, 1, 7] = torch.nan
        for window in ((-1, 0), (40, 0)):
            expected = attention_oracle.flash_attn_with_kvcache(
                q, k, v, cache_seqlens=ints([250]), softmax_scale=0.125, window_size=window
            )
            outputs = Outputs(backend, q)
            run_cache(backend, outputs, q, k, v, ints([250]), window=window)
            with np.errstate(invalid="ignore"):
                outputs.check(expected, f"{seqlen_q} queries, {dtype}, {window}")


# ---- flash_attn_with_kvcache ---------------------------------------------------------------------


def run_cache(
    backend: Backend,
    outputs: Outputs,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor | None,
    *,
    scale: float = 0.125,
    window: tuple[int, int] = (-1, 0),
    new: tuple[torch.Tensor, torch.Tensor] | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    **arguments: Any,
) -> list[torch.Tensor]:
    """One call of the extension; the caches as they are on the device afterwards."""
    kernels = kernels_of(backend)
    table = arguments.get("block_table")
    capacity = k_cache.shape[1] * (1 if table is None else table.shape[1])
    longest = q.shape[1] if max_seqlen_q is None else max_seqlen_q
    total = q.shape[0] if cu_seqlens_q is not None else q.shape[0] * q.shape[1]
    needed = kernels.flash_attn_with_kvcache_workspace(
        total, longest, q.shape[-2], q.shape[-1], capacity, window[0]
    )
    workspace = poisoned(needed // 4, dtype=torch.float32) if needed else None
    caches = [backend.give(cache) for cache in (k_cache, v_cache)]
    optional = [backend.give_optional(x) for x in (*(new or (None, None)), cache_seqlens)]
    places = ("cache_batch_idx", "cache_leftpad", "block_table")
    kernels.flash_attn_with_kvcache(
        *(backend.give(q), *caches, *optional),
        *(backend.give_optional(arguments.get(name)) for name in places),
        *(scale, *window, backend.give_optional(cu_seqlens_q), longest),
        *(arguments.get("ring", False), backend.give_optional(workspace), *outputs.given),
    )
    return caches


# kind, lengths seen, slots, seqlen_q, heads, kv heads, head_dim, window, leftpad
CACHES = [
    ("contiguous", [700, 1, 0], 768, 1, 4, 1, 64, (-1, 0), None),  # several splits, one, none
    ("contiguous", [515, 255], 640, 3, 2, 2, 128, (-1, 0), [260, 9]),
    ("rows", [300, 128], 384, 5, 5, 1, 96, (-1, -1), None),
    ("paged", [640, 130], 640, 2, 6, 2, 64, (-1, 0), None),
    ("paged", [257, 2], 384, 16, 4, 2, 80, (100, 0), [1, 1]),
    ("ring", [900, 256], 384, 2, 7, 1, 64, (127, 0), None),
    ("ring", [2000, 40], 512, 16, 2, 1, 128, (300, 0), None),
    ("heads first", [600], 640, 1, 8, 1, 40, (290, 0), None),
    ("odd strides", [270, 33], 320, 4, 3, 1, 64, (-1, 0), None),
    ("contiguous", [900], 896, 7, 4, 1, 64, (0, 0), None),  # more than there are slots
    ("contiguous", [-3, 20], 128, 2, 2, 1, 64, (-1, 0), None),  # inactive
    ("contiguous", [4, 300], 320, 9, 2, 1, 64, (-1, 0), None),  # queries before the first key
    # more queries than the decode kernel takes
    ("contiguous", [500, 40], 512, 40, 2, 1, 64, (-1, 0), [7, 0]),
    ("ring", [700, 130], 384, 100, 2, 1, 64, (200, 0), None),
    ("paged", [350, 64], 384, 33, 4, 2, 128, (50, 0), None),
    ("rows", [200, 64], 256, 20, 2, 2, 96, (-1, -1), None),
]


@pytest.mark.parametrize("case", CACHES, ids=label_of)
def test_caches(case: tuple[Any, ...], backend: Backend) -> None:
    kind, seen, slots, seqlen_q, heads, kv_heads, dim, window, leftpad = case
    for dtype in (BF16, FP16):
        tokens = [min(max(n, 0), 10**9 if kind == "ring" else slots) for n in seen]
        keys = [normal(n, kv_heads, dim, dtype=dtype, key=("k", b)) for b, n in enumerate(tokens)]
        values = [normal(n, kv_heads, dim, dtype=dtype, key=("v", b)) for b, n in enumerate(tokens)]
        cache = attention_caches.store(kind, keys, values, slots)
        q = normal(len(seen), seqlen_q, heads, dim, dtype=dtype)
        arguments = {**cache.arguments, "cache_leftpad": ints(leftpad)}
        expected = attention_oracle.flash_attn_with_kvcache(
            *(q, cache.k, cache.v),
            cache_seqlens=ints(seen),
            softmax_scale=0.125,
            window_size=window,
            **arguments,
        )
        outputs = Outputs(backend, q, 3 if kind == "odd strides" else 0)
        run_cache(backend, outputs, q, cache.k, cache.v, ints(seen), window=window, **arguments)
        outputs.check(expected, f"{case} {dtype}")


@pytest.mark.parametrize("kind", ["contiguous", "rows", "ring", "paged", "odd strides"])
@pytest.mark.parametrize("seqlen_q", [2, 20])
def test_new_tokens_are_appended(seqlen_q: int, kind: str, backend: Backend) -> None:
    seen, slots, window = [120, 250, -1], 256, (100, 0) if kind == "ring" else (-1, 0)
    keys = [normal(max(n, 0), 2, 64, key=("k", b)) for b, n in enumerate(seen)]
    values = [normal(max(n, 0), 2, 64, key=("v", b)) for b, n in enumerate(seen)]
    cache = attention_caches.store(kind, keys, values, slots)
    q = normal(3, seqlen_q, 4, 64)
    new = tuple(normal(3, seqlen_q, 2, 64, key=name) for name in ("new k", "new v"))
    expected = attention_oracle.flash_attn_with_kvcache(
        *(q, cache.k, cache.v, *new),
        cache_seqlens=ints(seen),
        softmax_scale=0.125,
        window_size=window,
        **cache.arguments,
    )
    outputs = Outputs(backend, q)
    caches = run_cache(
        *(backend, outputs, q, cache.k, cache.v, ints(seen)),
        window=window,
        new=new,
        **cache.arguments,
    )
    expected.check_caches(*(x.cpu() for x in caches), label=f"cache, {kind}")
    outputs.check(expected, f"appended to {kind}")


def test_packed_queries_and_places_out_of_range(backend: Backend) -> None:
    lengths_q = [3, 0, 16, 1]
    seen = ints([300, 20, 290, 5])
    q = normal(sum(lengths_q) + 2, 4, 64)
    k, v = normal(3, 384, 2, 64, key="k"), normal(3, 384, 2, 64, key="v")
    for longest in (16, 2):
        arguments: dict[str, Any] = {"cache_batch_idx": ints([2, 0, 99, -7])}
        expected = attention_oracle.flash_attn_with_kvcache(
            *(q, k, v),
            cache_seqlens=seen,
            softmax_scale=0.125,
            window_size=(-1, 0),
            cu_seqlens_q=offsets(lengths_q),
            max_seqlen_q=longest,
            **arguments,
        )
        outputs = Outputs(backend, q)
        packed = {"cu_seqlens_q": offsets(lengths_q), "max_seqlen_q": longest}
        run_cache(backend, outputs, q, k, v, seen, **packed, **arguments)
        outputs.check(expected, f"packed queries, at most {longest}")


def test_pages_out_of_range(backend: Backend) -> None:
    q, k, v = normal(2, 2, 2, 64), normal(3, 128, 1, 64, key="k"), normal(3, 128, 1, 64, key="v")
    table = torch.tensor([[0, 99], [-4, 1]], dtype=torch.int32)
    expected = attention_oracle.flash_attn_with_kvcache(
        *(q, k, v),
        cache_seqlens=ints([250, 140]),
        block_table=table,
        softmax_scale=0.125,
        window_size=(-1, 0),
    )
    outputs = Outputs(backend, q)
    run_cache(backend, outputs, q, k, v, ints([250, 140]), block_table=table)
    outputs.check(expected, "pages out of range")


@pytest.mark.parametrize("seqlen_q", [1, 40])
def test_rows_far_apart(seqlen_q: int, emulated: Backend) -> None:
    """Slots, rows and outputs whose offsets go beyond 2^31 elements."""
    gap, slots = 2**26, 128
    far = [sparse(gap * slots + 64, BF16) for _ in range(2)]
    k, v = (x.as_strided((1, slots, 1, 64), (0, gap, 64, 1)) for x in far)
    k.copy_(normal(1, slots, 1, 64, key="k"))
    v.copy_(normal(1, slots, 1, 64, key="v"))
    rows = [sparse(2**31 + 64 * 64, BF16) for _ in range(2)]
    q, out = (x.as_strided((2, seqlen_q, 1, 64), (2**31, 64, 64, 1)) for x in rows)
    q.copy_(normal(2, seqlen_q, 1, 64))
    lse = torch.empty(2, 1, seqlen_q)
    index = ints([0, 0])
    outputs = Outputs(emulated, q.clone())
    outputs.given = (out, lse)
    run_cache(emulated, outputs, q, k, v, ints([128, 100]), cache_batch_idx=index)
    expected = attention_oracle.flash_attn_with_kvcache(
        *(q.clone(), k.clone(), v.clone()),
        cache_seqlens=ints([128, 100]),
        cache_batch_idx=index,
        softmax_scale=0.125,
        window_size=(-1, 0),
    )
    expected.check(out.clone(), lse, "rows far apart", peer=False)


def test_scores_of_every_size(backend: Backend) -> None:
    """Maxima that rise by far from tile to tile, scores far below zero, rows of equal scores."""
    for seqlen_q in (70, 2):
        q = torch.ones(1, seqlen_q, 2, 64, dtype=BF16)
        v = normal(1, 512, 1, 64, key="v")
        rising = torch.arange(512.0)[None, :, None, None] / 40
        for scores in (rising, -rising, rising * 0 - 100, rising * 8):
            k = (scores.expand(1, 512, 1, 64)).to(BF16).contiguous()
            expected = attention_oracle.flash_attn_with_kvcache(
                q, k, v, cache_seqlens=ints([512]), softmax_scale=0.125, window_size=(-1, 0)
            )
            outputs = Outputs(backend, q)
            run_cache(backend, outputs, q, k, v, ints([512]))
            outputs.check(expected, f"{seqlen_q} queries, scores {float(scores[0, -1]):.3g}")
