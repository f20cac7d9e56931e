"""Random calls of the attention ops on numpy arrays, small enough for ThreadSanitizer."""

from __future__ import annotations

from collections.abc import Callable

import _C_emulated as C
import attention_oracle
import numpy as np
import oracles
from attention_oracle import Expected
from numeric import assert_attention_close, assert_bitwise_equal, assert_lse_close

from emulator.race_arrays import Cases, empty, read, store

DTYPES = ("bfloat16", "float16")
HEAD_DIMS = (8, 40, 64, 80, 96, 128)
PAGE = 128


class Call:
    """What every attention call has: dtype, heads, mask, and outputs that start as NaN."""

    def __init__(self, cases: Cases) -> None:
        self.cases = cases
        self.dtype = str(cases.pick(*DTYPES))
        self.head_dim = int(cases.pick(*HEAD_DIMS))
        self.kv_heads = cases.number(1, 2)
        self.heads = self.kv_heads * int(cases.pick(1, 2, 3, 5))
        self.scale = self.head_dim**-0.5
        left = int(cases.pick(-1, -1, 0, 3, 40, 130))
        self.window = (left, int(cases.pick(-1, 0, 0, 2)))

    def values(self, *shape: int) -> np.ndarray:
        return self.cases.values(self.dtype, *shape)

    def given(self, values: np.ndarray) -> np.ndarray:
        return self.cases.gapped(store(values, self.dtype))

    def outputs(self, expected: Expected) -> tuple[np.ndarray, np.ndarray]:
        return empty(expected.out, self.dtype), np.full(expected.lse.shape, np.nan, np.float32)

    def check(
        self, expected: Expected, out: np.ndarray, lse: np.ndarray | None, label: str
    ) -> None:
        rows = expected.written
        label = f"{label} {self.dtype}, {self.heads}/{self.kv_heads} heads of {self.head_dim}"
        got = read(out, self.dtype)
        assert np.isnan(got[~rows]).all(), f"{label}: a row of no sequence was written"
        assert_attention_close(
            got[rows], expected.out[rows], expected.norm[rows], dtype=self.dtype, label=label
        )
        if lse is not None:
            heads_last = np.moveaxis(lse, -2, -1)[rows]
            assert_lse_close(heads_last, np.moveaxis(expected.lse, -2, -1)[rows], label)


def offsets(lengths: list[int]) -> np.ndarray:
    return np.cumsum([0, *lengths]).astype(np.int32)


def flash_attn_func(cases: Cases) -> None:
    call = Call(cases)
    batch, seqlen_q, seqlen_k = cases.number(1, 2), cases.number(1, 70), cases.number(0, 150)
    q = call.values(batch, seqlen_q, call.heads, call.head_dim)
    k, v = (call.values(batch, seqlen_k, call.kv_heads, call.head_dim) for _ in range(2))
    expected = attention_oracle.flash_attn_func(q, k, v, call.scale, False, call.window)
    out, lse = call.outputs(expected)
    given = (call.given(q), call.given(k), call.given(v))
    C.flash_attn_func(*given, call.scale, *call.window, out, lse)
    call.check(expected, out, lse, f"{batch} x {seqlen_q} queries, {seqlen_k} keys")


def flash_attn_varlen_func(cases: Cases) -> None:
    call = Call(cases)
    lengths_q = [int(cases.pick(0, 1, 7, 33, 65)) for _ in range(cases.number(1, 3))]
    lengths_k = [int(cases.pick(0, 1, 64, 100)) for _ in lengths_q]
    q = call.values(sum(lengths_q), call.heads, call.head_dim)
    k, v = (call.values(sum(lengths_k), call.kv_heads, call.head_dim) for _ in range(2))
    cu_q, cu_k = offsets(lengths_q), offsets(lengths_k)
    longest = max(lengths_q)
    expected = attention_oracle.flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, longest, call.scale, False, call.window
    )
    out, lse = call.outputs(expected)
    given = (call.given(q), call.given(k), call.given(v))
    C.flash_attn_varlen_func(*given, cu_q, cu_k, longest, call.scale, *call.window, out, lse)
    call.check(expected, out, lse, f"{lengths_q} queries, {lengths_k} keys")


def flash_attn_with_kvcache(cases: Cases) -> None:
    call = Call(cases)
    batch = cases.number(1, 2)
    seqlen_q = int(cases.pick(1, 1, 2, 5, 16, 40))
    slots = int(cases.pick(128, 256, 640))
    kind = str(cases.pick("contiguous", "rows", "ring", "paged"))
    rows = batch
    if kind == "ring":
        slots = 256
        call.window = (int(cases.pick(0, 3, 100)), 0)
        lengths = cases.random.integers(seqlen_q, 700, batch)
    else:
        lengths = cases.random.integers(0, slots + 1, batch)
    table = batch_idx = None
    if kind == "paged":
        pages = slots // PAGE
        table = cases.random.permutation(batch * pages + 1)[:-1].reshape(batch, pages)
        table = table.astype(np.int32)
        rows, slots = batch * pages + 1, PAGE
    elif kind == "rows":
        rows = batch + 1
        batch_idx = cases.random.permutation(rows)[:batch].astype(np.int32)
    shape = (rows, slots, call.kv_heads, call.head_dim)
    k_cache, v_cache = call.values(*shape), call.values(*shape)
    q = call.values(batch, seqlen_q, call.heads, call.head_dim)
    k = v = None
    if cases.pick(True, False):
        k, v = (call.values(batch, seqlen_q, call.kv_heads, call.head_dim) for _ in range(2))
        lengths = np.maximum(lengths - seqlen_q, 0)
    seqlens = lengths.astype(np.int32)
    leftpad = None
    if kind != "ring" and cases.pick(True, False):
        leftpad = cases.random.integers(0, lengths + 1).astype(np.int32)
    expected = attention_oracle.flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        seqlens,
        batch_idx,
        leftpad,
        table,
        call.scale,
        False,
        call.window,
        ring=kind == "ring",
    )
    out, lse = call.outputs(expected)
    capacity = slots if table is None else slots * table.shape[1]
    size = C.flash_attn_with_kvcache_workspace(
        batch * seqlen_q, seqlen_q, call.heads, call.head_dim, capacity, call.window[0]
    )
    workspace = np.full(size // 4, np.nan, np.float32) if size else None
    caches = [store(cache, call.dtype) for cache in (k_cache, v_cache)]
    new = [None if x is None else call.given(x) for x in (k, v)]
    C.flash_attn_with_kvcache(
        call.given(q),
        *caches,
        *new,
        seqlens,
        batch_idx,
        leftpad,
        table,
        call.scale,
        *call.window,
        None,
        seqlen_q,
        kind == "ring",
        workspace,
        out,
        lse,
    )
    label = f"{kind} cache of {slots} slots, {lengths} tokens, {seqlen_q} queries"
    call.check(expected, out, lse, label)
    if k is not None:
        for got, wanted in zip(caches, expected.caches, strict=True):
            assert_bitwise_equal(got, store(wanted, call.dtype), f"appended, {label}")


def vision_attn(cases: Cases) -> None:
    call = Call(cases)
    head_dim = int(cases.pick(16, 64, 80, 96, 128))
    # Windows, or whole frames.
    choices = cases.pick((0, 1, 8, 33, 64), (1, 30, 130))
    lengths = [int(cases.pick(*choices)) for _ in range(cases.number(1, 3))]
    tokens, longest = sum(lengths), max(lengths)
    heads, kv_heads = call.heads, call.kv_heads
    qkv = call.values(tokens, (heads + 2 * kv_heads) * head_dim)
    angles = cases.random.uniform(0, 6.3, (tokens, head_dim // 2))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    # As attention_oracle.vision_attn, which cannot know that these arrays hold 16-bit values.
    q, k, v = oracles.split_qkv(qkv, heads, kv_heads)
    rows = np.arange(tokens)
    q, k = (oracles.round_to(oracles.rotate(x, cos, sin, rows), call.dtype) for x in (q, k))
    cu_seqlens = offsets(lengths)
    scale = head_dim**-0.5
    expected = attention_oracle.flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, longest, scale
    )
    out, _ = call.outputs(expected)
    size = C.vision_attn_workspace(tokens, heads, kv_heads, head_dim, longest)
    workspace = np.full(size // 4, np.nan, np.float32) if size else None
    given = call.given(qkv)
    C.vision_attn(given, heads, kv_heads, cos, sin, cu_seqlens, longest, scale, workspace, out)
    call.check(expected, out, None, f"segments of {lengths} tokens, head_dim {head_dim}")


_ALL: dict[str, Callable[[Cases], None]] = {
    "flash_attn_func": flash_attn_func,
    "flash_attn_varlen_func": flash_attn_varlen_func,
    "flash_attn_with_kvcache": flash_attn_with_kvcache,
    "vision_attn": vision_attn,
}
OPS = {name: run for name, run in _ALL.items() if hasattr(C, name)}
