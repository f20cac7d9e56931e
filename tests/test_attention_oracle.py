"""The attention oracle against the definition row by row and against the reference in every layout,
and its judge against outputs that are wrong."""

from __future__ import annotations

import random
from typing import Any

import attention_caches
import attention_oracle
import numpy as np
import oracles
import pytest
import torch
from exafuse import reference
from numeric import assert_largest_error, assert_lse_close, largest_errors
from poison import generator, poisoned

DTYPES = [torch.bfloat16, torch.float16]
WINDOWS = [(-1, -1), (0, 0), (5, 0), (3, 2), (-1, 1), (200, 0)]


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, key: object = 0) -> torch.Tensor:
    return torch.randn(shape, generator=generator("oracle", shape, key)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_oracle_is_the_definition_and_admits_the_reference(dtype: torch.dtype) -> None:
    choose = random.Random(str(dtype))
    for case in range(300):
        batch, seqlen_q, seqlen_k = (choose.choice(n) for n in ([1, 2], [0, 1, 17], [0, 1, 9, 130]))
        kv_heads, group, head_dim = choose.choice([1, 2]), choose.choice([1, 3]), 8 * (case % 3 + 1)
        window, causal = choose.choice(WINDOWS), choose.random() < 0.5
        q = normal(batch, seqlen_q, kv_heads * group, head_dim, dtype=dtype, key=case)
        k, v = (normal(batch, seqlen_k, kv_heads, head_dim, dtype=dtype, key=n) for n in "kv")
        expected = attention_oracle.flash_attn_func(q, k, v, causal=causal, window_size=window)
        mask = oracles.attention_mask(seqlen_q, seqlen_k, causal, window)
        for b in range(batch):
            out, lse, norm = oracles.attention(q[b], k[b], v[b], mask)
            np.testing.assert_allclose(expected.out[b], out, atol=1e-14)
            np.testing.assert_allclose(expected.norm[b], norm, atol=1e-14)
            np.testing.assert_allclose(expected.lse[b], lse, atol=1e-13)
        ours, our_lse, _ = reference.flash_attn_func(
            q, k, v, causal=causal, window_size=window, return_attn_probs=True
        )
        expected.check(ours, our_lse)


@pytest.mark.parametrize("kind", attention_caches.KINDS)
def test_every_cache_is_read_alike(kind: str) -> None:
    """Random lengths, appends, left padding and packed queries; also against the reference."""
    choose = random.Random(kind)
    for case in range(60):
        batch, seqlen_q, appended = choose.choice([1, 3]), choose.choice([1, 2, 20]), case % 3
        window = (choose.choice([0, 7, 100]), 0) if kind == "ring" else choose.choice(WINDOWS)
        slots = 256 if kind in ("ring", "paged") else 150
        most = 700 if kind == "ring" else slots
        lengths = [choose.randrange(0, most + 1) for _ in range(batch)]
        keys, values = ([normal(n, 2, 16, key=(x, case)) for n in lengths] for x in "kv")
        cache = attention_caches.store(kind, keys, values, slots, case)
        arguments: dict[str, Any] = {"window_size": window, "causal": choose.random() < 0.5}
        arguments["cache_seqlens"] = torch.tensor(lengths, dtype=torch.int32)
        if kind != "ring" and choose.random() < 0.3:
            arguments["cache_leftpad"] = torch.tensor([n // 3 for n in lengths], dtype=torch.int32)
        q = normal(batch, seqlen_q, 6, 16, key=case)
        if appended:
            arguments["k"], arguments["v"] = (
                normal(batch, appended, 2, 16, key=(x, "new", case)) for x in "kv"
            )
        elif choose.random() < 0.5:
            rows = [choose.randrange(0, seqlen_q + 1) for _ in range(batch)]
            offsets = torch.tensor([0, *np.cumsum(rows)], dtype=torch.int32)
            arguments["cu_seqlens_q"], arguments["max_seqlen_q"] = offsets, seqlen_q
            q = q.flatten(0, 1)[: int(offsets[-1])]
        arguments |= cache.arguments
        expected = attention_oracle.flash_attn_with_kvcache(q, cache.k, cache.v, **arguments)
        if not appended:  # the plain definition, from the keys as they were before any cache
            for b in range(batch):
                index = expected.parts[b].rows
                part = q[index]
                mask = oracles.attention_mask(
                    part.shape[0], lengths[b], arguments["causal"], window
                )
                if "cache_leftpad" in arguments:
                    mask[:, : lengths[b] // 3] = False
                out, _, _ = oracles.attention(part, keys[b], values[b], mask)
                np.testing.assert_allclose(expected.out[index], out, atol=1e-13)
        out, lse = reference.flash_attn_with_kvcache(
            q, cache.k, cache.v, return_softmax_lse=True, **arguments
        )
        expected.check(out, lse, label=f"{kind} {case}")
        if appended:
            expected.check_caches(cache.k, cache.v)


def test_vision_attn_is_rotation_and_attention_inside_segments() -> None:
    cos, sin = (normal(50, 8, key=name).float() for name in ("cos", "sin"))
    offsets = torch.tensor([0, 16, 16, 50], dtype=torch.int32)
    for dtype in DTYPES:
        qkv = normal(50, 10 * 16, dtype=dtype)
        expected = attention_oracle.vision_attn(qkv, 6, 2, cos, sin, offsets)
        expected.check(reference.vision_attn(qkv, 6, 2, cos, sin, offsets, 34))


def test_numbers_out_of_range_are_clamped() -> None:
    q, cache = normal(4, 1, 2, 8), normal(3, 20, 1, 8)
    lengths = torch.tensor([-5, 0, 99, 20], dtype=torch.int32)
    rows = torch.tensor([0, 0, -7, 99], dtype=torch.int32)
    ours = attention_oracle.flash_attn_with_kvcache(
        q, cache, cache, cache_seqlens=lengths, cache_batch_idx=rows
    )
    plain = attention_oracle.flash_attn_func(q[2:], cache[[0, 2]], cache[[0, 2]])
    assert not ours.out[:2].any()
    assert np.isneginf(ours.lse[:2]).all()
    np.testing.assert_array_equal(ours.out[2:], plain.out)
    packed = attention_oracle.flash_attn_varlen_func(
        q[:, 0], cache[0], cache[0], [0, 2, 7], [-3, 5, 99]
    )
    assert packed.written.all()
    np.testing.assert_array_equal(packed.parts[1].k, oracles.to_float64(cache[0, 5:]))


def test_the_judge_refuses_what_is_wrong() -> None:
    q, k, v = normal(1, 9, 2, 64), normal(1, 9, 1, 64, key="k"), normal(1, 9, 1, 64, key="v")
    expected = attention_oracle.flash_attn_func(q, k, v, causal=True)
    out, lse, _ = reference.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    expected.check(out, lse)
    full = reference.flash_attn_func(q, k, v)
    with pytest.raises(AssertionError, match="rows exceed"):
        expected.check(full)
    wrong = out.clone()
    wrong[0, 3, 1, 5] = torch.nan
    with pytest.raises(AssertionError, match="NaN at the wrong places"):
        expected.check(wrong)
    with pytest.raises(AssertionError, match="lse of output: 1 of 18 are off"):
        expected.check(out, lse + torch.nn.functional.one_hot(torch.tensor(4), 9) * 1e-3 * (
            torch.arange(2)[:, None] == 0
        ))  # fmt: skip
    with pytest.raises(AssertionError, match="largest error"):
        assert_largest_error(out[0] + 0.05, expected.out[0], expected.peer_error())
    with pytest.raises(AssertionError, match="shape"):
        expected.check(out[:, :8])
    with pytest.raises(AssertionError, match="dtype float16"):
        expected.check(out.half())
    assert largest_errors()["bfloat16"] > 0


def test_the_judge_wants_zero_where_nothing_is_seen_and_poison_where_nothing_belongs() -> None:
    q, k = normal(5, 1, 8), normal(2, 1, 8)
    offsets_q, offsets_k = [0, 3], [0, 2]
    expected = attention_oracle.flash_attn_varlen_func(q, k, k, offsets_q, offsets_k, causal=True)
    out = poisoned(5, 1, 8, dtype=torch.bfloat16)
    out[:3] = torch.from_numpy(expected.out[:3])
    expected.check(out)
    with pytest.raises(AssertionError, match="sees nothing must give 0"):
        expected.check(out.index_fill(0, torch.tensor([0]), 1e-30))
    with pytest.raises(AssertionError, match="a row of no sequence was written"):
        expected.check(out.index_fill(0, torch.tensor([4]), 0))
    with pytest.raises(AssertionError, match="-inf at the wrong places"):
        assert_lse_close([0.0, 1.0], [-np.inf, 1.0])


def test_one_key_more_or_less_is_never_within_tolerance() -> None:
    """A window of up to 512 that is off by one key, on plain random data."""
    for dtype in DTYPES:
        for left in (1, 30, 128, 512):
            q = normal(1, 3, 2, 64, dtype=dtype, key=left)
            k, v = (normal(1, 700, 1, 64, dtype=dtype, key=n) for n in "kv")
            expected = attention_oracle.flash_attn_func(q, k, v, window_size=(left, 0))
            for wrong in (left - 1, left + 1):
                out = reference.flash_attn_func(q, k, v, window_size=(wrong, 0))
                with pytest.raises(AssertionError):
                    expected.check(out)
