"""Attention in double precision from its definition, and the judge of every attention kernel.

Each function has the name and the arguments of its op and returns `Expected`. For every query the
set of keys that it sees is written down explicitly; nothing here knows tiles, splits or the
reference. Keys and slots that no query sees never enter, whatever they hold. What the device alone
knows (offsets, lengths, rows, pages) is brought into range as the contracts say.

    expected = attention_oracle.flash_attn_func(q, k, v, causal=True)
    expected.check(out, lse)  # lse may be left out
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import oracles
from numeric import (
    assert_attention_close,
    assert_largest_error,
    assert_lse_close,
    assert_same_special_values,
)
from oracles import Array, dtype_name, round_to, to_float64

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Part:
    """One sequence: queries `[seqlen_q, num_heads, head_dim]`, keys and values `[seqlen_k,
    num_kv_heads, head_dim]`, who sees whom `[seqlen_q, seqlen_k]`, and where its rows stand in the
    result (an index of all dimensions before the heads)."""

    q: Array
    k: Array
    v: Array
    mask: Mask
    rows: tuple[Any, ...]

    def finite(self) -> bool:
        return all(bool(np.isfinite(x).all()) for x in (self.q, self.k, self.v))

    def attend(self, scale: float) -> tuple[Array, Array, Array]:
        """`(out, lse, norm)` as `oracles.attention`, which does the same row by row."""
        if not self.finite():
            return oracles.attention(self.q, self.k, self.v, self.mask, scale)
        (seqlen_q, heads, dim), (seqlen_k, kv_heads, _) = self.q.shape, self.k.shape
        if seqlen_k == 0 or seqlen_q == 0:
            lse = np.full((heads, seqlen_q), -np.inf)
            return np.zeros(self.q.shape), lse, np.zeros(self.q.shape)
        by_head = self.q.transpose(1, 0, 2).reshape(kv_heads, -1, dim)
        scores = (by_head @ self.k.transpose(1, 2, 0)).reshape(heads, seqlen_q, seqlen_k) * scale
        scores[:, ~self.mask] = -np.inf
        top = scores.max(-1, keepdims=True)
        p = np.exp(scores - np.where(top == -np.inf, 0.0, top))
        total = p.sum(-1, keepdims=True)
        p = (p / np.where(total == 0, 1.0, total)).reshape(kv_heads, -1, seqlen_k)
        values = self.v.transpose(1, 0, 2)
        out = p @ values
        norm = np.sqrt((p * p) @ (values * values) + out * out)
        shape = (heads, seqlen_q, dim)
        with np.errstate(divide="ignore"):
            lse = (top + np.log(total))[..., 0]
        return out.reshape(shape).swapaxes(0, 1), lse, norm.reshape(shape).swapaxes(0, 1)

    def sdpa(self, dtype: str, scale: float) -> Array:
        """The same by torch's own attention with an explicit mask, in `dtype`."""
        import torch

        group = self.q.shape[1] // self.k.shape[1]
        q, k, v = (
            torch.from_numpy(np.ascontiguousarray(x))
            .to(getattr(torch, dtype))
            .transpose(0, 1)[None]
            for x in (self.q, self.k, self.v)
        )
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        mask = torch.from_numpy(self.mask)
        attend = torch.nn.functional.scaled_dot_product_attention
        return to_float64(attend(q, k, v, attn_mask=mask, scale=scale)[0].transpose(0, 1))


@dataclass(frozen=True)
class Expected:
    """What an op must return, in float64, and how exact that has to be."""

    out: Array  # as the op's output
    lse: Array  # [batch, num_heads, seqlen_q] or [num_heads, total_q]
    norm: Array  # the yardstick of each element of out
    written: Mask  # out without heads and head_dim: rows that belong to a sequence
    dtype: str
    scale: float
    parts: list[Part]
    caches: tuple[Array, ...] = field(default=())  # k_cache and v_cache after an append

    def check(
        self, out: object, lse: object | None = None, label: str = "output", peer: bool = True
    ) -> None:
        """Raise AssertionError unless `out` (and `lse`) are right in every element.

        Rows that belong to no sequence must be as poisoned outputs start: NaN. `peer` False leaves
        out the comparison of the largest error with torch's, which takes most of the time.
        """
        values = to_float64(out)
        assert dtype_name(out) == self.dtype, f"{label}: dtype {dtype_name(out)}"
        assert values.shape == self.out.shape, f"{label}: shape {values.shape}"
        assert np.isnan(values[~self.written]).all(), f"{label}: a row of no sequence was written"
        rows, heads_first = self.written, np.moveaxis(self.lse, -2, -1)
        nothing = np.isneginf(heads_first[rows])
        zeros = np.where(np.isnan(self.out), 0.0, values)[rows][nothing]  # 0 * inf is NaN
        assert not zeros.any(), f"{label}: a query that sees nothing must give 0"
        assert_attention_close(
            values[rows], self.out[rows], self.norm[rows], dtype=self.dtype, label=label
        )
        if lse is not None:
            given = np.moveaxis(to_float64(lse), -2, -1)
            assert dtype_name(lse) == "float32", f"{label}: lse of dtype {dtype_name(lse)}"
            assert np.isnan(given[~rows]).all(), f"{label}: the lse of no sequence was written"
            assert_lse_close(given[rows], heads_first[rows], label=f"lse of {label}")
        if peer and all(part.finite() for part in self.parts):
            assert_largest_error(
                values[rows], self.out[rows], self.peer_error(), dtype=self.dtype, label=label
            )

    def peer_error(self) -> float:
        """The largest error of torch's attention on these inputs, in the same dtype."""
        worst = 0.0
        for part in self.parts:
            seeing = part.mask.any(1)
            if seeing.any():
                error = np.abs(part.sdpa(self.dtype, self.scale) - self.out[part.rows])
                worst = max(worst, float(error[seeing].max()))
        return worst

    def check_caches(self, k_cache: object, v_cache: object, label: str = "cache") -> None:
        """The caches after an append: every slot, NaN where NaN was, exactly."""
        for name, cache, wanted in zip("kv", (k_cache, v_cache), self.caches, strict=True):
            assert_same_special_values(cache, wanted, f"{name}_{label}")
            wrong = np.nan_to_num(to_float64(cache)) != np.nan_to_num(wanted)
            assert not wrong.any(), f"{name}_{label}: {int(wrong.sum())} elements differ"


def visible(
    seqlen_q: int, first: int, end: int, low: int, high: int, window: Sequence[int]
) -> Mask:
    """`[seqlen_q, high - low]`: which of the positions from `low` to before `high` each query sees.

    Keys exist from `first` to before `end`; query j stands at end - seqlen_q + j and sees from
    window[0] positions before itself to window[1] behind, -1 = open.
    """
    left, right = window
    mask = np.zeros((seqlen_q, high - low), dtype=bool)
    for j in range(seqlen_q):
        at = end - seqlen_q + j
        start = first if left < 0 else max(first, at - left)
        stop = end if right < 0 else min(end, at + right + 1)
        if start < stop:
            mask[j, max(start - low, 0) : max(stop - low, 0)] = True
    return mask


def _fold(window_size: Sequence[int], causal: bool) -> tuple[int, int]:
    return (window_size[0], 0 if causal else window_size[1])


def _reach(seqlen_q: int, first: int, end: int, window: Sequence[int]) -> tuple[int, int]:
    """The positions that any query sees, so that a window over a long cache stays cheap."""
    low = first if window[0] < 0 else min(max(first, end - seqlen_q - window[0]), end)
    return low, max(low, end)


def _collect(
    shape: tuple[int, ...],
    dtype: str,
    parts: list[Part],
    scale: float,
    caches: tuple[Array, ...] = (),
) -> Expected:
    out, norm = np.zeros(shape), np.zeros(shape)
    lse_rows = np.full(shape[:-1], -np.inf)  # heads last
    written = np.zeros(shape[:-2], dtype=bool)
    for part in parts:
        part_out, part_lse, part_norm = part.attend(scale)
        out[part.rows], norm[part.rows] = part_out, part_norm
        lse_rows[part.rows] = part_lse.T
        written[part.rows] = True
    lse = np.moveaxis(lse_rows, -1, -2)
    return Expected(out, lse, norm, written, dtype, scale, parts, caches)


def _scale(softmax_scale: float | None, head_dim: int) -> float:
    return head_dim**-0.5 if softmax_scale is None else softmax_scale


def _offsets(cu_seqlens: Any, total: int) -> list[tuple[int, int]]:
    """Where each packed sequence starts and ends, brought into range."""
    ranges = []
    for low, high in itertools.pairwise(np.asarray(cu_seqlens).tolist()):
        start = min(max(low, 0), total)
        ranges.append((start, min(max(high, start), total)))
    return ranges


def _part(
    q: Any, k: Any, v: Any, first: int, end: int, window: Sequence[int], rows: tuple[Any, ...]
) -> Part:
    """`k` and `v` are functions from positions to keys and values."""
    seqlen_q = q.shape[0]
    low, high = _reach(seqlen_q, first, end, window)
    mask = visible(seqlen_q, first, end, low, high, window)
    seen = mask.any(0)[:, None, None]
    positions = np.arange(low, high)
    keys, values = (np.where(seen, to_float64(get(positions)), 0.0) for get in (k, v))
    return Part(to_float64(q), keys, values, mask, rows)


def flash_attn_func(
    q: Any,
    k: Any,
    v: Any,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
) -> Expected:
    window = _fold(window_size, causal)
    parts = [
        _part(q[b], lambda p, b=b: k[b][p], lambda p, b=b: v[b][p], 0, k.shape[1], window, (b,))
        for b in range(q.shape[0])
    ]
    return _collect(tuple(q.shape), dtype_name(q), parts, _scale(softmax_scale, q.shape[-1]))


def flash_attn_varlen_func(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
) -> Expected:
    window = _fold(window_size, causal)
    parts = []
    for (start, stop), (first, end) in zip(
        _offsets(cu_seqlens_q, q.shape[0]), _offsets(cu_seqlens_k, k.shape[0]), strict=True
    ):
        rows = slice(start, stop if max_seqlen_q is None else min(stop, start + max_seqlen_q))
        parts.append(
            _part(
                q[rows],
                lambda p, first=first: k[first + p],
                lambda p, first=first: v[first + p],
                0,
                end - first,
                window,
                (rows,),
            )
        )
    return _collect(tuple(q.shape), dtype_name(q), parts, _scale(softmax_scale, q.shape[-1]))


def flash_attn_with_kvcache(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    k: Any = None,
    v: Any = None,
    cache_seqlens: Any = None,
    cache_batch_idx: Any = None,
    cache_leftpad: Any = None,
    block_table: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    cu_seqlens_q: Any = None,
    max_seqlen_q: int | None = None,
    ring: bool = False,
) -> Expected:
    """The caches are not changed: those after an append are in the result. A negative length is an
    inactive sequence: nothing is appended, nothing is seen."""
    window = _fold(window_size, causal)
    rows, slots = k_cache.shape[:2]
    table = None if block_table is None else np.asarray(block_table)
    if cu_seqlens_q is None:
        queries: list[tuple[Any, ...]] = [(b,) for b in range(q.shape[0])]
    else:
        limit = q.shape[0] if max_seqlen_q is None else max_seqlen_q
        ranges = _offsets(cu_seqlens_q, q.shape[0])
        queries = [(slice(start, min(stop, start + limit)),) for start, stop in ranges]
    capacity = slots * (1 if table is None else table.shape[1])

    def place(b: int, position: Any) -> tuple[Any, Any]:
        """Row (or page) and slot of absolute positions of sequence b."""
        if table is not None:
            return np.clip(table[b][position // slots], 0, rows - 1), position % slots
        row = b if cache_batch_idx is None else min(max(int(cache_batch_idx[b]), 0), rows - 1)
        return np.full_like(position, row), position % slots

    caches = [k_cache, v_cache]
    appended = 0 if k is None else k.shape[1]
    lengths = [capacity] * len(queries)
    if cache_seqlens is not None:
        lengths = np.broadcast_to(np.asarray(cache_seqlens), len(queries)).tolist()
    if appended:
        caches = [cache.clone() if hasattr(cache, "clone") else cache.copy() for cache in caches]
        for b, length in enumerate(lengths):
            new = np.arange(length, length + appended) if length >= 0 else np.arange(0)
            inside = np.arange(len(new)) if ring else np.flatnonzero(new < capacity)
            for cache, tokens in zip(caches, (k, v), strict=True):
                cache[place(b, new[inside])] = tokens[b][inside]
    parts = []
    for b, index in enumerate(queries):
        end = lengths[b] + appended if lengths[b] >= 0 and rows > 0 else 0
        end = end if ring else min(end, capacity)
        first = 0 if cache_leftpad is None else min(max(int(cache_leftpad[b]), 0), end)

        def read(cache: Any, b: int = b) -> Any:
            return lambda positions: cache[place(b, positions)]

        parts.append(_part(q[index], read(caches[0]), read(caches[1]), first, end, window, index))
    after = tuple(to_float64(cache) for cache in caches) if appended else ()
    scale = _scale(softmax_scale, q.shape[-1])
    return _collect(tuple(q.shape), dtype_name(q), parts, scale, after)


def vision_attn(
    qkv: Any,
    num_heads: int,
    num_kv_heads: int,
    cos: Any,
    sin: Any,
    cu_seqlens: Any,
    max_seqlen: int | None = None,
    softmax_scale: float | None = None,
) -> Expected:
    """The rotated q and k are rounded to the dtype of qkv before the scores."""
    q, k, v = oracles.split_qkv(qkv, num_heads, num_kv_heads)
    rows, name = np.arange(q.shape[0]), dtype_name(qkv)
    q, k = (round_to(oracles.rotate(x, cos, sin, rows), name) for x in (q, k))
    ranges = _offsets(cu_seqlens, q.shape[0])
    limit = q.shape[0] if max_seqlen is None else max_seqlen
    parts = []
    for start, stop in ranges:
        index = slice(start, min(stop, start + limit))
        mask = np.ones((index.stop - start, stop - start), dtype=bool)
        parts.append(Part(q[index], k[start:stop], v[start:stop], mask, (index,)))
    return _collect(q.shape, name, parts, _scale(softmax_scale, q.shape[-1]))
