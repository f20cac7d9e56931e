"""The attention ops before their kernels: defaults, buffers, empty calls, gradients, fp32."""

from __future__ import annotations

import itertools
import logging
from types import ModuleType
from typing import Any

import attention_oracle
import pytest
import torch
from attention_sequences import BF16, normal, offsets
from emulator.control import Emulator
from exafuse import ops, reference
from kernel_backends import Backend, emulated, emulator_library

__all__ = ["emulated"]  # a fixture


def launched(emulated: Backend) -> Emulator:
    emulator = Emulator(emulator_library())
    emulator.clear_launches()
    return emulator


@pytest.mark.parametrize("module", ["emulated", "reference"])
def test_empty_calls_return_empty_results_of_the_right_shape(
    module: str, emulated: Backend
) -> None:
    """No sequence, no query, no key: each of them alone and together; 0 and lse -inf come back."""
    functions: ModuleType = emulated.ops if module == "emulated" else reference
    for batch, seqlen_q, seqlen_k in itertools.product((0, 2), (0, 3, 20), (0, 5)):
        q = torch.ones(batch, seqlen_q, 4, 16, dtype=BF16)
        k = torch.ones(batch, seqlen_k, 2, 16, dtype=BF16)
        out, lse, _ = functions.flash_attn_func(q, k, k, return_attn_probs=True)
        assert out.shape == q.shape
        assert lse.shape == (batch, 4, seqlen_q)
        assert torch.equal(out, torch.full_like(q, float(seqlen_k > 0)))
        assert bool((lse == -torch.inf).all()) or seqlen_k > 0 or lse.numel() == 0
        cached, sums = functions.flash_attn_with_kvcache(q, k, k, return_softmax_lse=True)
        assert torch.equal(cached, out)
        assert torch.equal(sums, lse)
        packed, sums, _ = functions.flash_attn_varlen_func(
            *(q.flatten(0, 1), k.flatten(0, 1), k.flatten(0, 1)),
            *(offsets([seqlen_q] * batch), offsets([seqlen_k] * batch), seqlen_q, seqlen_k),
            return_attn_probs=True,
        )
        assert torch.equal(packed, out.flatten(0, 1))
        assert sums.shape == (4, batch * seqlen_q)
    for tokens, starts in ((0, [0]), (0, [0, 0]), (9, [0, 0, 9])):
        qkv = torch.ones(tokens, 8 * 16, dtype=BF16)
        tables = torch.ones(tokens, 8), torch.zeros(tokens, 8)
        cu_seqlens = torch.tensor(starts, dtype=torch.int32)
        out = functions.vision_attn(qkv, 4, 2, *tables, cu_seqlens, 9)
        assert torch.equal(out, torch.ones(tokens, 4, 16, dtype=BF16))


def test_few_queries_take_the_decode_kernel(emulated: Backend) -> None:
    k, v = normal(1, 40, 2, 64, dtype=BF16, key="k"), normal(1, 40, 2, 64, dtype=BF16, key="v")
    for seqlen_q, kernel in ((1, "decode_kernel"), (16, "decode_kernel"), (17, "prefill_sm80")):
        q = normal(1, seqlen_q, 4, 64, dtype=BF16, key=seqlen_q)
        emulator = launched(emulated)
        out, lse, _ = emulated.ops.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
        assert kernel in emulator.launches()[0].kernel
        attention_oracle.flash_attn_func(q, k, v, causal=True).check(out, lse)


def test_a_number_of_tokens_serves_every_row(emulated: Backend) -> None:
    q, k = normal(3, 1, 4, 64, dtype=BF16, key="q"), normal(3, 40, 2, 64, dtype=BF16, key="k")
    for module in (emulated.ops, reference):
        for count, seen in ((17, 17), (0, 0), (99, 40), (None, 40)):
            lengths = torch.full((3,), seen, dtype=torch.int32)
            expected = module.flash_attn_with_kvcache(q, k, k, cache_seqlens=lengths)
            result = module.flash_attn_with_kvcache(q, k, k, cache_seqlens=count)
            assert torch.equal(result, expected)
    packed = emulated.ops.flash_attn_with_kvcache(
        q[:, 0], k, k, cache_seqlens=17, cu_seqlens_q=offsets([1, 1, 1]), max_seqlen_q=1
    )
    assert torch.equal(
        packed, emulated.ops.flash_attn_with_kvcache(q, k, k, cache_seqlens=17)[:, 0]
    )


def test_negative_lengths_are_inactive_and_rows_out_of_range_the_nearest(
    emulated: Backend,
) -> None:
    q, cache = normal(4, 2, 4, 64, dtype=BF16, key="q"), normal(3, 128, 2, 64, dtype=BF16, key="c")
    tables = {
        "cache_seqlens": torch.tensor([-1, -(2**31), 2**31 - 1, 20], dtype=torch.int32),
        "cache_batch_idx": torch.tensor([0, 9, -5, 99], dtype=torch.int32),
        "cache_leftpad": torch.tensor([0, 0, -3, 2**31 - 1], dtype=torch.int32),
    }
    new = normal(4, 2, 2, 64, dtype=BF16, key="new")
    for module, appended in itertools.product((emulated.ops, reference), (False, True)):
        caches = cache.clone(), cache.clone()
        lengths = tables["cache_seqlens"].clamp(max=2**30)
        more = {"k": new, "v": new} if appended else {}
        arguments = {**tables, "cache_seqlens": lengths, **more}
        expected = attention_oracle.flash_attn_with_kvcache(q, *caches, **arguments)
        out, lse = module.flash_attn_with_kvcache(q, *caches, **arguments, return_softmax_lse=True)
        expected.check(out, lse)
        assert not out[:2].any()
        if appended:
            expected.check_caches(*caches)
    pages = torch.tensor([[-4], [77], [1], [2]], dtype=torch.int32)
    for module in (emulated.ops, reference):
        arguments = {"block_table": pages, "cache_seqlens": torch.full((4,), 50, dtype=torch.int32)}
        expected = attention_oracle.flash_attn_with_kvcache(q, cache, cache, **arguments)
        expected.check(module.flash_attn_with_kvcache(q, cache, cache, **arguments))
        none = cache[:0]
        assert not module.flash_attn_with_kvcache(q, none, none, **arguments).any()


def test_buffers_are_filled_and_returned(emulated: Backend) -> None:
    q, k = normal(2, 20, 4, 64, dtype=BF16, key="q"), normal(2, 40, 2, 64, dtype=BF16, key="k")
    for module, rows in itertools.product((emulated.ops, reference), (20, 1)):
        part = q[:, :rows]  # rows further apart than they are wide
        plain, sums, _ = module.flash_attn_func(part, k, k, return_attn_probs=True)
        out = torch.full((2, 4, rows, 64), torch.nan, dtype=BF16).transpose(1, 2)
        lse = torch.full((2, 4, rows), torch.nan)
        version = out._version
        assert module.flash_attn_func(part, k, k, out=out, lse=lse) is out
        assert torch.equal(out, plain)
        assert torch.equal(lse, sums)
        assert out._version > version
        out.zero_()
        results = module.flash_attn_with_kvcache(
            part, k, k, out=out, lse=lse, return_softmax_lse=True
        )
        assert results[0] is out
        assert results[1] is lse
        assert torch.equal(out, plain)


def test_appending_tells_autograd_that_the_caches_changed(emulated: Backend) -> None:
    cache = [torch.ones(1, 128, 1, 16, dtype=BF16) for _ in "kv"]
    new = torch.zeros(1, 1, 1, 16, dtype=BF16)
    versions = [x._version for x in cache]
    emulated.ops.flash_attn_with_kvcache(new, *cache, new, new, cache_seqlens=5)
    assert all(x._version > before for x, before in zip(cache, versions, strict=True))
    assert not cache[0][0, 5].any()


def gradients(module: Any, name: str, dtype: torch.dtype) -> list[torch.Tensor]:
    def leaf(*shape: int) -> torch.Tensor:
        return normal(*shape, dtype=dtype, key=name).requires_grad_()

    leaves = [leaf(2, 7, 4, 16), leaf(2, 9, 2, 16), leaf(2, 9, 2, 16)]
    if name == "flash_attn_func":
        out = module.flash_attn_func(*leaves, causal=True, window_size=(4, 0))
    elif name == "flash_attn_varlen_func":
        starts = offsets([7, 7]), offsets([9, 9])
        packed = [x.flatten(0, 1) for x in leaves]
        out = module.flash_attn_varlen_func(*packed, *starts, 7, 9, causal=True)
    else:
        leaves = [leaf(12, 8 * 16)]
        angles = normal(12, 8, dtype=torch.float32, key="angles")
        starts = offsets([5, 7])
        out = module.vision_attn(leaves[0], 4, 2, angles.cos(), angles.sin(), starts, 7)
    weights = normal(*out.shape, dtype=torch.float32, key="weights")
    (out.float() * weights).sum().backward()
    return [x.grad for x in leaves]


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["flash_attn_func", "flash_attn_varlen_func", "vision_attn"])
def test_gradients_are_those_of_the_reference(
    name: str, dtype: torch.dtype, emulated: Backend
) -> None:
    exact = gradients(reference, name, torch.float32)
    for ours, theirs in zip(gradients(emulated.ops, name, dtype), exact, strict=True):
        assert ours.dtype == dtype
        limit = 2e-2 if dtype == BF16 else 1e-5
        assert float((ours.float() - theirs).norm()) <= limit * float(theirs.norm())


@pytest.mark.parametrize("which", range(5))
def test_caches_refuse_gradients(which: int, emulated: Backend) -> None:
    shapes = [(1, 1, 2, 16), (1, 128, 1, 16), (1, 128, 1, 16), (1, 1, 1, 16), (1, 1, 1, 16)]
    tensors = [torch.zeros(shape, dtype=BF16) for shape in shapes]
    tensors[which].requires_grad_()
    for module in (emulated.ops, reference, ops):
        with pytest.raises(ValueError, match="flash_attn_with_kvcache has no gradient"):
            module.flash_attn_with_kvcache(*tensors, cache_seqlens=3)
        with torch.no_grad():
            assert not module.flash_attn_with_kvcache(*tensors, cache_seqlens=3).requires_grad


def test_buffers_refuse_gradients(emulated: Backend) -> None:
    q = torch.zeros(1, 20, 2, 16, dtype=BF16, requires_grad=True)
    for module in (emulated.ops, reference):
        with pytest.raises(ValueError, match="out: a preallocated output cannot carry a gradient"):
            module.flash_attn_func(q, q, q, out=torch.empty(1, 20, 2, 16, dtype=BF16))


def test_float32_runs_in_plain_pytorch_and_says_so_once(
    emulated: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    module = ops.Ops("emulated")
    q = normal(1, 20, 2, 16, dtype=torch.float32, key="fp32")
    emulator = launched(emulated)
    with caplog.at_level(logging.WARNING, logger="exafuse"):
        for _ in range(2):
            out = module.flash_attn_func(q, q, q, causal=True)
    assert torch.equal(out, reference.flash_attn_func(q, q, q, causal=True))
    assert emulator.num_launches() == 0
    assert [record.message for record in caplog.records] == [
        "flash_attn_func has no kernel for float32: it runs in plain PyTorch"
    ]


def test_windows_beyond_every_position_are_open(emulated: Backend) -> None:
    q, k = normal(1, 20, 2, 16, dtype=BF16, key="q"), normal(1, 50, 1, 16, dtype=BF16, key="k")
    for module in (emulated.ops, reference):
        expected = module.flash_attn_func(q, k, k)
        for far in (50, 2**30, 2**31, 2**70):
            assert torch.equal(module.flash_attn_func(q, k, k, window_size=(far, far)), expected)


@pytest.mark.parametrize("seqlen_q", [1, 20])
def test_strides_of_single_slots_may_be_anything(seqlen_q: int, emulated: Backend) -> None:
    """They count in no check of alignment, so no address may follow them either."""
    for head_dim in (16, 96, 128):
        q = normal(2, seqlen_q, 4, head_dim, dtype=BF16, key=seqlen_q)
        rows = [normal(1, 1, head_dim, dtype=BF16, key=b) for b in range(2)]
        memory = torch.stack(rows).as_strided((2, 1, 1, head_dim), (head_dim, 13, 7, 1))
        expected = attention_oracle.flash_attn_with_kvcache(q, memory, memory)
        expected.check(emulated.ops.flash_attn_with_kvcache(q, memory, memory))
        expected.check(emulated.ops.flash_attn_func(q, memory, memory))
