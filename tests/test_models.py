"""Our model graphs against transformers: same weights, same calls, every layer compared."""

from __future__ import annotations

import math
from pathlib import Path

import exafuse
import pytest
import tiny_models
import torch
import transformers
from exafuse.models.causal_lm import CausalLM
from torch import Tensor

NUM_CASES = 210


def load_pair(
    case: tiny_models.Case, folder: Path
) -> tuple[transformers.PreTrainedModel, CausalLM]:
    theirs = tiny_models.build(case.family, case.seed, **case.overrides)
    tiny_models.save(theirs, folder)
    ours = exafuse.from_pretrained(folder, backend="reference", dtype="float32", device="cpu")
    return theirs, ours


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def assert_same(ours: Tensor, theirs: Tensor, what: str) -> None:
    limit = 2e-5 * float(theirs.abs().max())
    worst = float((ours - theirs).abs().max())
    assert worst <= limit, f"{what}: max |dlogit| {worst:.3g} > {limit:.3g}"


def splits(total: int, generator: torch.Generator) -> list[int]:
    sizes = []
    while sum(sizes) < total:
        left = total - sum(sizes)
        sizes.append(int(torch.randint(1, left + 1, (), generator=generator)))
    return sizes


@torch.no_grad()
@pytest.mark.parametrize("case", [tiny_models.random_case(s) for s in range(NUM_CASES)], ids=str)
def test_parity_fp32(case: tiny_models.Case, tmp_path: Path) -> None:
    """One shot, random chunks, step by step, no cache, left padding: the same calls on both
    sides."""
    theirs, ours = load_pair(case, tmp_path)
    generator = torch.Generator().manual_seed(case.seed)
    window = case.window or 5
    lengths = (1, window - 1, window, window + 1, 2 * window + 1, 3 * window + 2, 3 * window + 5)
    length = lengths[case.seed % len(lengths)]
    vocab = case.overrides["vocab_size"]
    ids = torch.randint(0, vocab, (2, length), generator=generator)

    tiny_models.reset_rope(theirs)
    a = ours(ids, output_hidden_states=True)
    b = theirs(ids, output_hidden_states=True)
    assert_same(a.logits, b.logits, "one shot")
    assert len(a.hidden_states) == len(b.hidden_states)
    for index, (x, y) in enumerate(zip(a.hidden_states, b.hidden_states, strict=True)):
        assert relative(x, y) <= 1e-5, f"hidden state {index}: {relative(x, y):.3g}"

    for name, sizes in (
        ("chunks", splits(length + 9, generator)),
        ("step by step", [length] + [1] * 5),
    ):
        ids = torch.randint(0, vocab, (2, sum(sizes)), generator=generator)
        tiny_models.reset_rope(theirs)
        our_cache = their_cache = None
        for chunk in ids.split(sizes, dim=1):
            a = ours(chunk, past_key_values=our_cache, use_cache=True)
            b = theirs(chunk, past_key_values=their_cache, use_cache=True)
            our_cache, their_cache = a.past_key_values, b.past_key_values
            assert_same(a.logits, b.logits, f"{name} {sizes}")
        assert our_cache.get_seq_length() == sum(sizes)

    tiny_models.reset_rope(theirs)
    uncached = ours(ids, use_cache=False)
    assert uncached.past_key_values is None
    assert_same(uncached.logits, theirs(ids, use_cache=False).logits, "no cache")

    left_padded(case, theirs, ours, generator)


def left_padded(
    case: tiny_models.Case,
    theirs: transformers.PreTrainedModel,
    ours: CausalLM,
    generator: torch.Generator,
) -> None:
    """A ragged batch, padded at the left, then two decode steps."""
    vocab, columns = case.overrides["vocab_size"], 3 * (case.window or 4) + 3
    ids = torch.randint(0, vocab, (3, columns + 2), generator=generator)
    mask = torch.ones(3, columns + 2, dtype=torch.int64)
    for row in (1, 2):
        mask[row, : int(torch.randint(1, columns, (), generator=generator))] = 0
    tiny_models.reset_rope(theirs)
    our_cache = their_cache = None
    start = 0
    for stop in (columns, columns + 1, columns + 2):
        chunk, so_far = ids[:, start:stop], mask[:, :stop]
        a = ours(chunk, attention_mask=so_far, past_key_values=our_cache, use_cache=True)
        b = theirs(chunk, attention_mask=so_far, past_key_values=their_cache, use_cache=True)
        our_cache, their_cache = a.past_key_values, b.past_key_values
        real = mask[:, start:stop].bool()
        assert_same(a.logits[real], b.logits[real], f"left padding, columns {start}:{stop}")
        assert not a.logits[~real].any(), "padding must come out as zeros"
        start = stop


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


@pytest.mark.slow
@torch.no_grad()
def test_parity_bf16(tmp_path: Path) -> None:
    """In bf16 our distance to the fp32 model is at most transformers' own (sdpa): 1.25x each,
    1.05x in the geometric mean."""
    ratios = []
    for seed in range(0, NUM_CASES, 3):
        case = tiny_models.random_case(seed + seed // 3 % 3)
        folder = tiny_models.save(
            tiny_models.build(case.family, case.seed, **case.overrides), tmp_path / str(seed)
        )
        # Weights that bf16 holds exactly, so that only the computation differs.
        rounded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        rounded.save_pretrained(folder)
        load = transformers.AutoModelForCausalLM.from_pretrained
        exact = load(folder, dtype=torch.float32, attn_implementation="eager").eval()
        theirs = load(folder, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
        ours = exafuse.from_pretrained(folder, backend="reference", device="cpu")
        assert ours.dtype == torch.bfloat16
        ids = torch.randint(0, case.overrides["vocab_size"], (4, 24))
        truth = exact(ids).logits
        our_error = rms(ours(ids).logits.float() - truth)
        their_error = rms(theirs(ids).logits.float() - truth)
        assert our_error <= 1.25 * their_error, f"{case}: {our_error:.4g} vs {their_error:.4g}"
        ratios.append(our_error / their_error)
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    print(f"bf16: {len(ratios)} configurations, error ratio mean {mean:.3f} max {max(ratios):.3f}")
    assert mean <= 1.05
