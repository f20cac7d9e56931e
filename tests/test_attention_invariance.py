"""What must not change a bit of attention: company in the batch, the kind of cache, chunks of a
prefill, the order in which threads run. And decoding, step by step, against full recomputation."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import attention_caches
import attention_oracle
import pytest
import torch
from attention_sequences import BF16, FP16, normal, offsets
from emulator.control import SCHEDULES, Emulator
from kernel_backends import Backend, backend, case_factor, emulated, emulator_library
from numeric import assert_bitwise_equal

__all__ = ["backend", "emulated"]  # fixtures

Result = tuple[torch.Tensor, torch.Tensor]  # out and lse, on the CPU
Tensors = list[torch.Tensor]


@dataclass(frozen=True)
class Calls:
    """Sequences with their own queries, keys and values, attended to in any company."""

    q: Tensors  # [seqlen_q, num_heads, head_dim] each
    k: Tensors  # [tokens seen, num_kv_heads, head_dim] each
    v: Tensors
    window: tuple[int, int]

    @property
    def longest(self) -> int:
        return max(q.shape[0] for q in self.q)

    def packed(self, backend: Backend, chosen: list[int]) -> list[Result]:
        """By flash_attn_varlen_func, the chosen ones in one call."""
        q, k, v = ([x[i] for i in chosen] for x in (self.q, self.k, self.v))
        lengths = [len(x) for x in q]
        out, lse, _ = backend.ops.flash_attn_varlen_func(
            *(backend.give(torch.cat(x)) for x in (q, k, v)),
            *(backend.give(offsets([len(x) for x in y])) for y in (q, k)),
            *(self.longest, max(len(x) for x in k)),
            window_size=self.window,
            return_attn_probs=True,
        )
        return list(zip(out.cpu().split(lengths), lse.cpu().split(lengths, 1), strict=True))

    def cached(self, backend: Backend, chosen: list[int], kind: str, slots: int) -> list[Result]:
        """By flash_attn_with_kvcache with packed queries, the chosen ones in one call."""
        q, k, v = ([x[i] for i in chosen] for x in (self.q, self.k, self.v))
        cache = attention_caches.store(kind, k, v, slots, chosen)
        lengths = [len(x) for x in q]
        out, lse = backend.ops.flash_attn_with_kvcache(
            *(backend.give(x) for x in (torch.cat(q), cache.k, cache.v)),
            cache_seqlens=backend.give(torch.tensor([len(x) for x in k], dtype=torch.int32)),
            **given(backend, cache.arguments),
            window_size=self.window,
            cu_seqlens_q=backend.give(offsets(lengths)),
            max_seqlen_q=self.longest,
            return_softmax_lse=True,
        )
        return list(zip(out.cpu().split(lengths), lse.cpu().split(lengths, 1), strict=True))


def given(backend: Backend, arguments: dict[str, Any]) -> dict[str, Any]:
    return {n: backend.give(x) if n != "ring" else x for n, x in arguments.items()}


def draw(
    choose: random.Random, number: int, most_q: int, most_k: int, window: tuple[int, int], key: str
) -> Calls:
    dtype, head_dim = choose.choice([BF16, FP16]), choose.choice([16, 64, 64, 96, 128])
    kv_heads, group = choose.choice([(1, 1), (1, 2), (1, 4), (2, 1), (1, 7), (2, 3)])
    lengths = [(choose.randint(1, most_q), choose.randint(0, most_k)) for _ in range(number)]
    q, k, v = (
        [
            normal(n[x != "q"], heads, head_dim, dtype=dtype, key=(key, x, i))
            for i, n in enumerate(lengths)
        ]
        for x, heads in (("q", kv_heads * group), ("k", kv_heads), ("v", kv_heads))
    )
    return Calls(q, k, v, window)


def assert_same(ours: Result, theirs: Result, label: str) -> None:
    for name, a, b in zip(("out", "lse"), ours, theirs, strict=True):
        assert_bitwise_equal(a.contiguous(), b.contiguous(), f"{name} of {label}")


# --------------------------------------------------------------------------------------------------
# Company
# --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("share", range(3))
def test_decoding_does_not_depend_on_the_batch(share: int, backend: Backend) -> None:
    choose = random.Random(f"decode in company {share}")
    cases = 0
    for number in range(16 * case_factor()):
        kind = choose.choice(["contiguous", "ring", "paged"])
        window = (choose.choice([0, 20, 100, 200]), 0) if kind == "ring" else (-1, 0)
        calls = draw(choose, 30, choose.choice([1, 1, 4, 16]), 256, window, f"{share} {number}")
        together = calls.cached(backend, list(range(30)), kind, 256)
        for i in range(30):
            alone = calls.cached(backend, [i], kind, 256)[0]
            assert_same(together[i], alone, f"{kind} {number}, sequence {i}")
        cases += 30
    backend.count(cases)


@pytest.mark.slow
def test_prefill_does_not_depend_on_the_batch(backend: Backend) -> None:
    choose = random.Random("prefill in company")
    cases = 0
    for number in range(25 * case_factor()):
        window = choose.choice([(-1, -1), (-1, 0), (20, 0), (70, 3)])
        calls = draw(choose, 16, choose.choice([40, 70]), choose.choice([70, 140]), window, "p")
        everyone = list(range(16))
        together = calls.packed(backend, everyone)
        choose.shuffle(everyone)
        halves = [everyone[:3], everyone[3:4], everyone[4:]]
        for part in halves:
            for i, result in zip(part, calls.packed(backend, part), strict=True):
                assert_same(together[i], result, f"call {number}, sequence {i}")
        cases += 16
    backend.count(cases)


@pytest.mark.slow
def test_vision_segments_do_not_depend_on_each_other(backend: Backend) -> None:
    choose = random.Random("vision in company")
    cases = 0
    for number in range(10 * case_factor()):
        longest = choose.choice([16, 64, 64, 100])
        lengths = [choose.randint(1, longest) for _ in range(16)]
        tokens, dtype = sum(lengths), choose.choice([BF16, FP16])
        qkv = normal(tokens, 4 * 80, dtype=dtype, key=number)
        angles = normal(tokens, 40, dtype=torch.float32, key=number)
        tables = angles.cos(), angles.sin()
        inputs = [backend.give(x) for x in (qkv, *tables)]
        together = backend.ops.vision_attn(
            inputs[0], 2, 1, *inputs[1:], backend.give(offsets(lengths)), longest
        ).cpu()
        starts = offsets(lengths).tolist()
        for i, length in enumerate(lengths):
            rows = slice(starts[i], starts[i + 1])
            part = [backend.give(x[rows].clone()) for x in (qkv, *tables)]
            alone = backend.ops.vision_attn(
                part[0], 2, 1, *part[1:], backend.give(offsets([length])), longest
            ).cpu()
            assert_bitwise_equal(together[rows], alone, f"call {number}, segment {i}")
        cases += len(lengths)
    backend.count(cases)


# --------------------------------------------------------------------------------------------------
# Caches and chunks
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "longest", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 16, 40))]
)
def test_every_kind_of_cache_gives_the_same_bits(longest: int, backend: Backend) -> None:
    choose = random.Random(f"kinds {longest}")
    for number in range(5 * case_factor()):
        window = (choose.choice([0, 9, 100, 200]), 0)
        calls = draw(choose, 8, longest, 700, window, f"kinds {number}")
        everyone = list(range(8))
        plain = calls.cached(backend, everyone, "contiguous", 768)
        for kind in attention_caches.KINDS:
            if kind == "odd strides" and longest > 16 and backend.aligned_prefill_apart:
                continue
            slots = 256 if kind == "ring" else 768
            for i, result in enumerate(calls.cached(backend, everyone, kind, slots)):
                assert_same(plain[i], result, f"{kind}, window {window}, sequence {i}")
    backend.count(5 * case_factor() * 8 * len(attention_caches.KINDS))


@pytest.mark.parametrize(
    "kind", ["contiguous", *(pytest.param(k, marks=pytest.mark.slow) for k in ("ring", "paged"))]
)
def test_chunks_of_a_prefill_give_the_same_bits(kind: str, backend: Backend) -> None:
    """Chunks of more than 16 tokens, on the cache as it stands after each of them was written."""
    choose = random.Random(f"chunks {kind}")
    cases = 0
    for number in range(6 * case_factor()):
        left = choose.choice([0, 30, 100]) if kind == "ring" else choose.choice([-1, 30, 100])
        calls = draw(choose, 1, 1, 0, (left, 0), "unused")
        head_dim, dtype = calls.q[0].shape[2], calls.q[0].dtype
        total = choose.choice([150, 260, 300])
        q, k, v = (normal(total, n, head_dim, dtype=dtype, key=number) for n in (2, 1, 1))
        whole = Calls([q], [k], [v], (left, 0)).cached(backend, [0], "contiguous", 384)[0]
        start = 0
        while start < total:
            end = start + choose.choice([17, 30, 64, 100])
            end = total if total - end < 17 else end
            chunk = Calls([q[start:end]], [k[:end]], [v[:end]], (left, 0))
            part = chunk.cached(backend, [0], kind, 256 if kind == "ring" else 384)[0]
            expected = whole[0][start:end], whole[1][:, start:end]
            assert_same(expected, part, f"{kind}, window {left}, tokens {start} to {end}")
            start, cases = end, cases + 1
    backend.count(cases)


@pytest.mark.parametrize(
    "window", [5, *(pytest.param(n, marks=pytest.mark.slow) for n in (33, 100))]
)
def test_decoding_around_a_ring_equals_full_recomputation(window: int, backend: Backend) -> None:
    """Appends across W - 1, W, W + 1, 2W, 3W + 7 and 2 rings, with rollbacks between them."""
    choose = random.Random(f"ring {window}")
    slots, kv_heads, head_dim = 128, 1, 64
    history = {x: torch.zeros(0, kv_heads, head_dim, dtype=BF16) for x in "kv"}
    cache = attention_caches.empty("ring", 1, slots, kv_heads, head_dim, BF16)
    k_cache, v_cache = backend.give(cache.k), backend.give(cache.v)
    marks = [window - 1, window, window + 1, 2 * window, 3 * window + 7, 2 * slots + 3]
    high_water = step = 0
    for mark in sorted({m for m in marks if m > 0}):
        for rollback in (False, True):
            length = len(history["k"])
            if rollback:  # as far as the ring still holds what the window needs
                length = choose.randint(max(0, high_water - slots + window - 1), length)
                history = {x: old[:length] for x, old in history.items()}
            while length < mark:
                step += 1
                tokens = min(mark - length, choose.choice([1, 1, 2, 5]) if length else mark)
                tokens = min(tokens, slots - window + 1)
                new = {
                    x: normal(1, tokens, kv_heads, head_dim, dtype=BF16, key=(x, step))
                    for x in "kv"
                }
                q = normal(1, tokens, 4, head_dim, dtype=BF16, key=step)
                out, lse = backend.ops.flash_attn_with_kvcache(
                    *(backend.give(q), k_cache, v_cache, backend.give(new["k"])),
                    backend.give(new["v"]),
                    cache_seqlens=backend.give(torch.tensor([length], dtype=torch.int32)),
                    window_size=(window - 1, 0),
                    ring=True,
                    return_softmax_lse=True,
                )
                history = {x: torch.cat([old, new[x][0]]) for x, old in history.items()}
                length += tokens
                high_water = max(high_water, length)
                label = f"window {window}, {tokens} tokens up to {length}"
                k, v = history["k"], history["v"]
                attention_oracle.flash_attn_func(
                    q, k[None], v[None], causal=True, window_size=(window - 1, 0)
                ).check(out.cpu(), lse.cpu(), label)
                again = Calls([q[0]], [k], [v], (window - 1, 0))
                full = again.cached(backend, [0], "contiguous", 384)[0]
                assert_same((out.cpu()[0], lse.cpu()[0]), full, label)
    assert high_water > 2 * slots
    backend.count(step)


@pytest.mark.slow
def test_long_caches_in_many_splits(backend: Backend) -> None:
    """Alone, in company and in pages: lengths at the borders of splits."""
    choose = random.Random("long")
    lengths = [255, 256, 257, 511, 513, 1023, 1025, 1100]
    q = [normal(choose.choice([1, 2]), 4, 64, dtype=BF16, key=("q", n)) for n in lengths]
    k, v = ([normal(n, 1, 64, dtype=BF16, key=(x, n)) for n in lengths] for x in "kv")
    for window in ((-1, 0), (600, 0)):
        calls = Calls(q, k, v, window)
        everyone = list(range(len(lengths)))
        together = calls.cached(backend, everyone, "contiguous", 1152)
        paged = calls.cached(backend, everyone[::-1], "paged", 1152)[::-1]
        for i in everyone:
            alone = calls.cached(backend, [i], "contiguous", 1152)[0]
            assert_same(together[i], alone, f"{lengths[i]} keys alone")
            assert_same(together[i], paged[i], f"{lengths[i]} keys in pages")
            expected = attention_oracle.flash_attn_func(
                *(x[i][None] for x in (q, k, v)), window_size=window
            )
            expected.check(alone[0][None], alone[1][None], f"{lengths[i]} keys")
    backend.count(2 * 3 * len(lengths))


# --------------------------------------------------------------------------------------------------
# Schedules
# --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_schedule_gives_the_same_bits(emulated: Backend) -> None:
    emulator = Emulator(emulator_library())
    choose = random.Random("schedules")
    few = draw(choose, 5, 4, 600, (-1, 0), "few")
    many = draw(choose, 5, 60, 150, (50, 0), "many")
    qkv = normal(100, 4 * 80, dtype=BF16, key="vision")
    angles = normal(100, 40, dtype=torch.float32, key="vision")

    def run() -> Tensors:
        results = few.cached(emulated, [0, 1, 2, 3, 4], "paged", 640)
        results += many.packed(emulated, [0, 1, 2, 3, 4])
        for lengths in ([40, 60], [100]):
            vision = emulated.ops.vision_attn(
                qkv, 2, 1, angles.cos(), angles.sin(), offsets(lengths), max(lengths)
            )
            results.append((vision, vision))
        cache = attention_caches.empty("ring", 2, 128, 1, 64, BF16)
        q, k, v = (normal(2, 3, n, 64, dtype=BF16, key="append") for n in (2, 1, 1))
        out, lse = emulated.ops.flash_attn_with_kvcache(
            *(q, cache.k, cache.v, k, v),
            cache_seqlens=torch.tensor([0, 300], dtype=torch.int32),
            window_size=(2, 0),
            ring=True,
            return_softmax_lse=True,
        )
        return [x for pair in [*results, (out, lse), (cache.k, cache.v)] for x in pair]

    expected = run()
    for schedule in SCHEDULES:
        for seed in (1, 2) if schedule == "random" else (1,):
            with emulator.schedule(schedule, seed):
                for a, b in zip(run(), expected, strict=True):
                    assert_bitwise_equal(a, b, schedule)
