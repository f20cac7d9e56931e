"""The reference ops against torch's own functions and against hand-made cases."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from exafuse import reference
from exafuse.reference import backward
from exafuse.reference.qk_norm_rope import _redirected, write_cache
from torch import Tensor

NAN = float("nan")


def sdpa(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """torch's attention in fp64 with an explicit mask; rows that see nothing are 0."""
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2).double(),
        k.transpose(1, 2).double(),
        v.transpose(1, 2).double(),
        attn_mask=visible,
        enable_gqa=True,
    ).transpose(1, 2)
    return torch.where(visible.any(1)[:, None, None], out, 0.0)


def mask(seqlen_q: int, seqlen_k: int, causal: bool, window: tuple[int, int]) -> Tensor:
    i = torch.arange(seqlen_k - seqlen_q, seqlen_k)[:, None]
    p = torch.arange(seqlen_k)[None]
    visible = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool)
    right = 0 if causal else window[1]
    if right >= 0:
        visible &= p <= i + right
    if window[0] >= 0:
        visible &= p >= i - window[0]
    return visible


def attention_cases() -> Iterator[tuple[int, int, int, int, bool, tuple[int, int]]]:
    sizes = [(1, 1), (1, 9), (5, 5), (7, 3), (3, 7), (0, 4), (4, 0), (600, 700)]
    windows = [(-1, -1), (0, 0), (2, 0), (3, 2), (-1, 1), (500, 0)]
    for (q, k), window, causal in itertools.product(sizes, windows, (False, True)):
        for heads, kv in ((2, 2), (6, 2)) if q < 100 else ((2, 1),):
            yield q, k, heads, kv, causal, window


@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "heads", "kv", "causal", "window"), list(attention_cases())
)
def test_flash_attn_func_matches_sdpa(
    seqlen_q: int, seqlen_k: int, heads: int, kv: int, causal: bool, window: tuple[int, int]
) -> None:
    q = torch.randn(2, seqlen_q, heads, 8)
    k, v = torch.randn(2, seqlen_k, kv, 8), torch.randn(2, seqlen_k, kv, 8)
    out, lse, _ = reference.flash_attn_func(
        q, k, v, causal=causal, window_size=window, return_attn_probs=True
    )
    visible = mask(seqlen_q, seqlen_k, causal, window)
    torch.testing.assert_close(out, sdpa(q, k, v, visible).float(), rtol=1e-5, atol=1e-6)
    assert lse.shape == (2, heads, seqlen_q)
    assert torch.equal(lse == float("-inf"), (~visible.any(1)).expand_as(lse))
    plain = reference.flash_attn_func(q, k, v, causal=causal, window_size=window)
    assert torch.equal(plain, out)


def test_flash_attn_varlen_func_equals_each_sequence_alone() -> None:
    lengths_q, lengths_k = [3, 0, 5, 1], [3, 2, 9, 0]
    cu_q = torch.tensor([0, *itertools.accumulate(lengths_q)], dtype=torch.int32)
    cu_k = torch.tensor([0, *itertools.accumulate(lengths_k)], dtype=torch.int32)
    q, k, v = torch.randn(9, 4, 16), torch.randn(14, 2, 16), torch.randn(14, 2, 16)
    out, lse, _ = reference.flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, 5, 9, causal=True, window_size=(2, 0), return_attn_probs=True
    )
    for b in range(4):
        rows, cols = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        alone, alone_lse, _ = reference.flash_attn_func(
            q[rows][None],
            k[cols][None],
            v[cols][None],
            causal=True,
            window_size=(2, 0),
            return_attn_probs=True,
        )
        assert torch.equal(out[rows], alone[0])
        assert torch.equal(lse[:, rows], alone_lse[0])


def paged(k: Tensor, page: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The same keys in shuffled pages of a larger pool; everything else is NaN."""
    batch, length = k.shape[:2]
    pages = -(-length // page)
    order = torch.randperm(batch * pages + 3, generator=generator)[: batch * pages]
    pool = torch.full((batch * pages + 3, page, *k.shape[2:]), NAN)
    padded = torch.full((batch, pages * page, *k.shape[2:]), NAN)
    padded[:, :length] = k
    pool[order] = padded.view(batch * pages, page, *k.shape[2:])
    return pool, order.view(batch, pages).to(torch.int32)


@pytest.mark.parametrize("seqlen_q", [1, 4])
@pytest.mark.parametrize("window", [(-1, -1), (0, 0), (5, 0), (127, 0)])
@pytest.mark.parametrize("layout", ["linear", "ring", "paged", "rows", "transposed"])
def test_flash_attn_with_kvcache_reads_every_layout(
    layout: str, window: tuple[int, int], seqlen_q: int
) -> None:
    if layout == "ring" and window[0] < 0:
        window = (100, 0)
    generator = torch.Generator().manual_seed(seqlen_q)
    lengths = torch.tensor([300, 4, 131, 0], dtype=torch.int32)
    batch, longest = 4, 300
    k, v = torch.randn(batch, longest, 2, 8), torch.randn(batch, longest, 2, 8)
    q = torch.randn(batch, seqlen_q, 6, 8)
    extra: dict[str, object] = {}
    if layout == "ring":
        slots = 256
        k_cache, v_cache = (torch.full((batch, slots, 2, 8), NAN) for _ in range(2))
        for b in range(batch):
            for p in range(int(lengths[b])):
                k_cache[b, p % slots], v_cache[b, p % slots] = k[b, p], v[b, p]
        extra["ring"] = True
    elif layout == "paged":
        generator_v = torch.Generator().manual_seed(seqlen_q)
        k_cache, extra["block_table"] = paged(k, 128, generator)
        v_cache, _ = paged(v, 128, generator_v)
    else:
        k_cache, v_cache = (torch.full((batch + 2, 310, 2, 8), NAN) for _ in range(2))
        rows = torch.tensor([5, 0, 3, 1], dtype=torch.int32)
        rows = rows if layout == "rows" else torch.arange(batch, dtype=torch.int32)
        for b in range(batch):
            k_cache[rows[b], : lengths[b]] = k[b, : lengths[b]]
            v_cache[rows[b], : lengths[b]] = v[b, : lengths[b]]
        if layout == "rows":
            extra["cache_batch_idx"] = rows
        else:
            k_cache, v_cache = k_cache[:batch], v_cache[:batch]
        if layout == "transposed":
            k_cache = k_cache.transpose(1, 2).contiguous().transpose(1, 2)
    out, lse = reference.flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        cache_seqlens=lengths,
        causal=True,
        window_size=window,
        return_softmax_lse=True,
        **extra,
    )
    for b in range(batch):
        n = int(lengths[b])
        visible = mask(seqlen_q, n, True, window)
        expected = sdpa(q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n], visible)
        torch.testing.assert_close(out[b], expected[0].float(), rtol=1e-5, atol=1e-6)
        assert torch.equal(lse[b].isinf(), (~visible.any(1)).expand_as(lse[b]))


def test_flash_attn_with_kvcache_packed_queries_equal_rows_alone() -> None:
    k_cache, v_cache = torch.randn(3, 64, 2, 8), torch.randn(3, 64, 2, 8)
    lengths = torch.tensor([10, 33, 64], dtype=torch.int32)
    cu = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    q = torch.randn(9, 4, 8)
    out = reference.flash_attn_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=lengths, causal=True, cu_seqlens_q=cu, max_seqlen_q=5
    )
    for b, rows in ((0, slice(0, 4)), (2, slice(4, 9))):
        row = slice(b, b + 1)
        alone = reference.flash_attn_with_kvcache(
            q[None, rows], k_cache[row], v_cache[row], cache_seqlens=lengths[row], causal=True
        )
        assert torch.equal(out[rows], alone[0])


def test_flash_attn_with_kvcache_appends() -> None:
    k_cache, v_cache = torch.full((2, 16, 1, 8), NAN), torch.full((2, 16, 1, 8), NAN)
    past = torch.tensor([0, 15], dtype=torch.int32)
    k_cache[1, :15], v_cache[1, :15] = torch.randn(15, 1, 8), torch.randn(15, 1, 8)
    k, v, q = torch.randn(2, 1, 1, 8), torch.randn(2, 1, 1, 8), torch.randn(2, 1, 2, 8)
    out = reference.flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=past, causal=True
    )
    assert torch.equal(k_cache[0, 0], k[0, 0])
    assert torch.equal(v_cache[1, 15], v[1, 0])
    assert k_cache[0, 1:].isnan().all()
    torch.testing.assert_close(out[0, 0], v[0, 0].expand(2, 8))
    assert not out.isnan().any()


def test_cache_seqlens_beyond_the_slots_are_clamped() -> None:
    q, cache = torch.randn(1, 1, 1, 8), torch.randn(1, 8, 1, 8)
    many = reference.flash_attn_with_kvcache(q, cache, cache, cache_seqlens=99)
    assert torch.equal(many, reference.flash_attn_with_kvcache(q, cache, cache))


@pytest.mark.parametrize(
    "argument", ["softcap", "dropout_p", "alibi_slopes", "rotary_cos", "block_table"]
)
def test_unimplemented_arguments_raise(argument: str) -> None:
    q, cu = torch.randn(1, 2, 1, 8), torch.tensor([0, 2], dtype=torch.int32)
    call = partial(reference.flash_attn_func, q, q, q)
    value: object = 0.5
    if argument == "rotary_cos":
        call, value = partial(reference.flash_attn_with_kvcache, q, q, q), torch.ones(2, 4)
    elif argument == "block_table":
        call = partial(reference.flash_attn_varlen_func, q[0], q[0], q[0], cu, cu, 2, 2)
        value = cu
    elif argument == "alibi_slopes":
        value = torch.ones(1)
    with pytest.raises(ValueError, match=argument):
        call(**{argument: value})


def test_rms_norm_family() -> None:
    x, r, w = torch.randn(5, 3, 64), torch.randn(5, 3, 64), torch.randn(64)
    expected = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w
    torch.testing.assert_close(reference.rms_norm(x, w, 1e-5), expected.float())
    post = reference.rms_norm_add(x, r, w, 1e-5)
    torch.testing.assert_close(post, (expected + r).float())
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a, b = x.to(dtype), r.to(dtype)
        y, new_residual = reference.add_rms_norm(a, b, w, 1e-5)
        assert torch.equal(new_residual, a + b)
        assert torch.equal(y, reference.rms_norm(a + b, w, 1e-5))


def test_qk_norm_rope_layouts_and_views() -> None:
    qkv = torch.randn(7, (4 + 2 * 2) * 16)
    weights = torch.randn(2, 16)
    cos, sin = torch.randn(9, 8), torch.randn(9, 8)
    positions = torch.randint(0, 9, (7,), dtype=torch.int32)
    arguments = (4, 2, weights[0], weights[1], cos, sin, positions, 1e-6)
    q, k, v = reference.qk_norm_rope(qkv, *arguments)
    triple = tuple(part.clone() for part in qkv.split([64, 32, 32], dim=1))
    for ours, theirs in zip((q, k, v), reference.qk_norm_rope(triple, *arguments), strict=True):
        assert torch.equal(ours, theirs)
    assert v.data_ptr() == qkv[:, 96:].data_ptr()
    heads = qkv[:, :64].view(7, 4, 16).double()
    normed = heads * (heads.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weights[0]
    angle = torch.complex(cos[positions].double(), sin[positions].double())[:, None]
    rotated = torch.complex(normed[..., :8], normed[..., 8:]) * angle
    torch.testing.assert_close(q, torch.cat((rotated.real, rotated.imag), -1).float())


def test_qk_norm_rope_cache_writes_only_valid_slots() -> None:
    qkv = torch.randn(4, 3 * 8)
    k_cache, v_cache = torch.full((2, 5, 1, 8), NAN), torch.full((2, 5, 1, 8), NAN)
    slots = torch.tensor([7, -1, 10, 0])
    q, k, v = reference.qk_norm_rope(qkv, 1, 1, None, None, None, None, None, 0.0)
    again = reference.qk_norm_rope_cache(
        qkv, 1, 1, None, None, None, None, None, 0.0,
        k_cache=k_cache, v_cache=v_cache, slot_mapping=slots,
    )  # fmt: skip
    assert torch.equal(q, again)
    assert torch.equal(k_cache[1, 2], k[0])
    assert torch.equal(v_cache[0, 0], v[3])
    assert int((~k_cache.isnan()).sum()) == 16
    with pytest.raises(ValueError, match="no gradient"):
        reference.qk_norm_rope_cache(
            qkv.requires_grad_(), 1, 1, None, None, None, None, None, 0.0,
            k_cache=k_cache, v_cache=v_cache, slot_mapping=slots,
        )  # fmt: skip


def test_cache_writes_need_no_look_at_the_slots() -> None:
    """What a GPU runs, where the bounds of the slots are not known on the host."""
    generator = torch.Generator().manual_seed(3)
    for case in range(40):
        tokens = case % 5 + 1
        k, v = torch.randn(tokens, 2, 8), torch.randn(tokens, 2, 8)
        slots = torch.randperm(40, generator=generator)[:tokens] - 8  # of 24: some are outside
        plain = [torch.full((3, 8, 2, 8), NAN) for _ in "kv"]
        write_cache(k, v, *plain, slots)
        other = [torch.full((3, 8, 2, 8), NAN) for _ in "kv"]
        valid = (slots >= 0) & (slots < 24)
        k, v, slots = _redirected(k, v, slots, valid, *other)
        assert bool(((slots >= 0) & (slots < 24)).all())
        for cache, new, wanted in zip(other, (k, v), plain, strict=True):
            cache.view(24, 2, 8).index_copy_(0, slots, new)
            assert torch.equal(cache.nan_to_num(9e9), wanted.nan_to_num(9e9))


TF32_SETTINGS = {
    "none": "pass",
    "legacy": 'torch.set_float32_matmul_precision("high")',
    "legacy bf16": 'torch.set_float32_matmul_precision("medium")',
    "legacy flag": "torch.backends.cuda.matmul.allow_tf32 = True",
    "new": 'torch.backends.cuda.matmul.fp32_precision = "tf32"',
    "new for all": 'torch.backends.fp32_precision = "tf32"',
}


@pytest.mark.parametrize("setting", TF32_SETTINGS)
def test_products_in_fp32_are_exact_and_settings_come_back(setting: str) -> None:
    """By either way in which torch lets a process choose; the two must not be mixed."""
    code = f"""
import torch
from exafuse.reference._check import full_fp32
def read():
    cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    values = [cuda.fp32_precision, cpu.fp32_precision]
    for legacy in (torch.get_float32_matmul_precision, lambda: cuda.allow_tf32):
        try:
            values.append(legacy())
        except RuntimeError:
            values.append("refused")
    return values
{TF32_SETTINGS[setting]}
before = read()
try:
    with full_fp32(torch.device("cuda")):
        inside = read()
        raise KeyError
except KeyError:
    pass
assert "tf32" not in inside[:2] and "bf16" not in inside[:2] and inside[3] is False, inside
assert read() == before, (before, read())
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_autocast_changes_no_bit() -> None:
    q, k = torch.randn(1, 20, 4, 16), torch.randn(1, 30, 2, 16)
    x, w, qkv = torch.randn(5, 64), torch.randn(64), torch.randn(6, 4 * 16)
    table = torch.randn(6, 8), torch.randn(6, 8), torch.arange(6, dtype=torch.int32)
    starts = torch.tensor([0, 2, 6], dtype=torch.int32)

    def run() -> list[Tensor]:
        leaf = q.clone().requires_grad_()
        out, lse, _ = reference.flash_attn_func(leaf, k, k, causal=True, return_attn_probs=True)
        grads = backward.attention(q, q, k, k, out.detach(), lse.detach(), 0.25, (-1, 0))
        return [
            *(out.detach(), lse.detach(), *grads),
            reference.flash_attn_func(q, k, k),
            reference.flash_attn_with_kvcache(q, k, k, cache_seqlens=21),
            reference.vision_attn(qkv, 2, 1, *table[:2], starts, 4),
            reference.rms_norm(x, w, 1e-5),
            reference.rms_norm_add(x, x, w, 1e-5),
            reference.silu_and_mul(x),
            *reference.add_rms_norm(x, x, w, 1e-5),
            *reference.qk_norm_rope(qkv, 2, 1, w[:16], w[:16], *table, 1e-5),
        ]

    plain = run()
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            inside = run()
        for number, (ours, theirs) in enumerate(zip(inside, plain, strict=True)):
            assert ours.dtype == theirs.dtype, number
            assert torch.equal(ours, theirs), number


def test_silu_and_mul_forms_agree() -> None:
    gate, up = torch.randn(3, 10), torch.randn(3, 10)
    merged = torch.cat((gate, up), -1)
    assert torch.equal(reference.silu_and_mul(merged), reference.silu_and_mul(gate, up))
    torch.testing.assert_close(reference.silu_and_mul(merged), F.silu(gate) * up)


def test_vision_attn_keeps_segments_apart() -> None:
    qkv = torch.randn(10, 4 * 16)
    cos, sin = torch.randn(10, 8), torch.randn(10, 8)
    cu = torch.tensor([0, 4, 10], dtype=torch.int32)
    out = reference.vision_attn(qkv, 2, 1, cos, sin, cu, 6)
    changed = qkv.clone()
    changed[4:] += 1
    again = reference.vision_attn(changed, 2, 1, cos, sin, cu, 6)
    assert torch.equal(out[:4], again[:4])
    assert not torch.equal(out[4:], again[4:])


def test_every_differentiable_op_passes_gradcheck_in_fp32() -> None:
    """Against finite differences of the same op; fp32 inside, so the step and bound are coarse."""
    x, r = torch.randn(3, 16, requires_grad=True), torch.randn(3, 16, requires_grad=True)
    w = torch.randn(16, requires_grad=True)
    qkv = torch.randn(5, 4 * 8, requires_grad=True)
    cos, sin = torch.randn(5, 4), torch.randn(5, 4)
    positions = torch.arange(5, dtype=torch.int32)
    q = torch.randn(1, 5, 2, 8, requires_grad=True)
    kv = torch.randn(1, 5, 1, 8, requires_grad=True)
    ops = {
        "rms_norm": (lambda a, b: reference.rms_norm(a, b, 1e-5), (x, w)),
        "add_rms_norm": (lambda a, b, c: reference.add_rms_norm(a, b, c, 1e-5)[0], (x, r, w)),
        "rms_norm_add": (lambda a, b, c: reference.rms_norm_add(a, b, c, 1e-5), (x, r, w)),
        "silu_and_mul": (reference.silu_and_mul, (x,)),
        "qk_norm_rope": (
            lambda a: torch.cat(
                reference.qk_norm_rope(a, 2, 1, w[:8], w[8:], cos, sin, positions, 1e-5), 1
            ),
            (qkv,),
        ),
        "flash_attn_func": (
            lambda a, b: reference.flash_attn_func(a, b, b, causal=True, window_size=(2, 0)),
            (q, kv),
        ),
    }
    for name, (op, inputs) in ops.items():
        weight = torch.randn_like(op(*inputs))
        for index, tensor in enumerate(inputs):
            (grad,) = torch.autograd.grad((op(*inputs) * weight).sum(), tensor)
            direction = torch.randn_like(tensor)
            moved = [[t.detach() for t in inputs] for _ in range(2)]
            moved[0][index] = tensor.detach() + 1e-2 * direction
            moved[1][index] = tensor.detach() - 1e-2 * direction
            high, low = ((op(*m).double() * weight).sum() for m in moved)
            numeric = float((high - low).detach() / 2e-2)
            analytic = float((grad * direction).sum().detach())
            assert abs(numeric - analytic) <= 2e-2 * max(1.0, abs(numeric)), name


def test_out_buffers_and_their_errors() -> None:
    x, w = torch.randn(2, 8), torch.randn(8)
    out = torch.empty(2, 8)
    assert reference.rms_norm(x, w, 1e-5, out=out) is out
    assert torch.equal(out, reference.rms_norm(x, w, 1e-5))
    with pytest.raises(ValueError, match="out: expected"):
        reference.rms_norm(x, w, 1e-5, out=torch.empty(3, 8))
    with pytest.raises(ValueError, match="gradient"):
        reference.rms_norm(x.requires_grad_(), w, 1e-5, out=out)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: reference.rms_norm(torch.ones(2, 8), torch.ones(7), 1e-5), r"weight: .*hidden=8"),
        (lambda: reference.rms_norm(torch.ones(2, 8).long(), torch.ones(8), 1e-5), "x: .*dtype"),
        (lambda: reference.silu_and_mul(torch.ones(2, 7)), "gate_up"),
        (
            lambda: reference.flash_attn_func(
                torch.ones(1, 2, 3, 8), torch.ones(1, 2, 2, 8), torch.ones(1, 2, 2, 8)
            ),
            "multiple of num_kv_heads",
        ),
        (
            lambda: reference.flash_attn_func(
                torch.ones(1, 2, 2, 8), torch.ones(1, 2, 2, 8), torch.ones(1, 3, 2, 8)
            ),
            r"v: expected \(batch=1, seqlen_k=2",
        ),
        (
            lambda: reference.flash_attn_with_kvcache(
                torch.ones(1, 1, 1, 8),
                torch.ones(1, 128, 1, 8),
                torch.ones(1, 128, 1, 8),
                ring=True,
            ),
            "ring",
        ),
    ],
)
def test_wrong_arguments_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
