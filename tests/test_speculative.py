"""Generation with drafts: the same greedy answers, and draws from the same distribution."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from exafuse.generation import acceptance
from exafuse.generation.acceptance import Drafts
from exafuse.generation.generate import GenerateOutput
from exafuse.generation.sampling import SamplingParams, ScoreChain, draw, draw_from
from exafuse.models.causal_lm import CausalLM
from generation_pair import FAMILIES, Pair, left_padded
from torch import Tensor
from trained_mtp import Phrases, trained

KINDS = ["mtp", "prompt_lookup"]
TIE = 1e-4  # of the largest logit: two scores so close are decided by rounding


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return trained()


def noisy(rows: int, length: int, share: float, seed: int) -> Tensor:
    """Text of which a share is replaced by random tokens: what follows is hard to guess."""
    generator = torch.Generator().manual_seed(seed)
    ids = Phrases(seed).batch(rows, length)
    noise = torch.randint(1, 97, ids.shape, generator=generator)
    return torch.where(torch.rand(ids.shape, generator=generator) < share, noise, ids)


def prompts(seed: int, rows: int) -> tuple[Tensor, Tensor]:
    """A left-padded batch of prompts of 1 to 40 tokens, from sure to hopeless."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.cat([noisy(1, 40, share, seed * 100 + row) for row, share in _shares(rows)])
    lengths = torch.randint(1, 41, (rows,), generator=rng)
    lengths[0] = 40
    mask = (torch.arange(40) >= 40 - lengths[:, None]).long()
    return ids * mask, mask


def _shares(rows: int) -> list[tuple[int, float]]:
    return [(row, (0.0, 0.2, 0.5, 1.0)[row % 4]) for row in range(rows)]


def both(m: Any, ids: Any, kind: str, **kwargs: Any) -> tuple[Any, GenerateOutput]:
    """The answer of one token at a time and that with drafts."""
    plain = m.generate(ids, return_dict_in_generate=True, **kwargs)
    drafted = m.generate(ids, return_dict_in_generate=True, draft=kind, **kwargs)
    return plain, drafted


def compare(plain: GenerateOutput, drafted: Tensor, columns: int) -> int:
    """How many rows differ at a tie; an AssertionError for a row that differs elsewhere."""
    assert drafted.shape == plain.sequences.shape
    ties = 0
    for row, (ours, theirs) in enumerate(zip(drafted, plain.sequences, strict=True)):
        if torch.equal(ours, theirs):
            continue
        at = int((ours != theirs).int().argmax())
        scores = plain.scores[at - columns][row]
        best, second = scores.topk(2).values.tolist()
        assert best - second < TIE * scores.abs().max(), f"row {row}, column {at}: {best - second}"
        ties += 1
    return ties


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_answers_to_many_prompts_are_the_same(model: CausalLM, kind: str) -> None:
    """560 prompts, 80 of them alone, the rest in left-padded batches of unequal acceptance."""
    ties, answers, totals = 0, 0, Counter[str]()
    for seed in range(16):
        ids, mask = prompts(seed, 30)
        kwargs: dict[str, Any] = {"max_new_tokens": 20, "output_scores": True}
        kwargs["num_draft_tokens"] = (3, 3, 1, 5)[seed % 4]
        plain, drafted = both(model, ids, kind, attention_mask=mask, **kwargs)
        ties += compare(plain, drafted.sequences, 40)
        answers += len(ids)
        for name in ("drafted", "accepted", "new_tokens", "row_steps"):
            totals[name] += getattr(drafted.draft_stats, name)
    for seed in range(80):
        ids = noisy(1, 1 + seed % 40, (0.0, 0.3, 1.0)[seed % 3], 5000 + seed)
        plain, drafted = both(model, ids, kind, max_new_tokens=16, output_scores=True)
        ties += compare(plain, drafted.sequences, ids.shape[1])
        answers += 1
    rate = totals["accepted"] / totals["drafted"]
    gain = totals["new_tokens"] / totals["row_steps"]
    print(
        f"\n{kind}: {answers} prompts, {ties} ties, acceptance {rate:.3f}, {gain:.2f} tokens/step"
    )
    assert answers >= 500
    assert 0.05 < rate < 0.95
    assert gain > 1.05


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_look_up(family: str, tmp_path: Path) -> None:
    m = Pair(family, tmp_path).ours
    m.prefill_chunk = 16
    ids, mask = left_padded()
    accepted = 0
    for start in range(3):  # a text that repeats itself, and random models that soon do so
        prompt = torch.cat((ids, ids[:, start:]), dim=1).clamp(min=10)
        both_masks = torch.cat((mask, torch.ones_like(ids[:, start:])), dim=1)
        kwargs: dict[str, Any] = {"max_new_tokens": 60, "output_scores": True}
        plain, drafted = both(m, prompt, "prompt_lookup", attention_mask=both_masks, **kwargs)
        compare(plain, drafted.sequences, prompt.shape[1])
        accepted += drafted.draft_stats.accepted
    assert accepted > 0


def tree(
    m: CausalLM, ids: Tensor, params: SamplingParams, steps: int
) -> dict[tuple[int, ...], float]:
    """The exact probability of every answer of so many tokens to a prompt ``[1, columns]``."""
    answers, probs = torch.empty(1, 0, dtype=torch.int64), torch.ones(1, dtype=torch.float64)
    for step in range(steps):
        text = torch.cat((ids.expand(len(answers), -1), answers), dim=1)
        chain = ScoreChain(params, ids.expand(len(answers), -1), None, 97)
        for column in range(step):
            chain.record(answers[:, column])
        logits = m(text, use_cache=False, logits_to_keep=1).logits[:, -1]
        after = chain.scores(logits, text).softmax(-1).double()
        rows, tokens = after.nonzero(as_tuple=True)
        probs = probs[rows] * after[rows, tokens]
        answers = torch.cat((answers[rows], tokens[:, None]), dim=1)
    return {tuple(a): p for a, p in zip(answers.tolist(), probs.tolist(), strict=True)}


def p_value(
    counts: Counter[tuple[int, ...]], probs: dict[tuple[int, ...], float], least: int = 10
) -> float:
    """Pearson's chi-square test; answers that are expected less than 8 times are one class."""
    total = sum(counts.values())
    assert set(counts) <= set(probs), "an answer that cannot be"
    frequent = [a for a, p in probs.items() if p * total >= 8]
    observed = [counts[a] for a in frequent]
    expected = [probs[a] * total for a in frequent]
    if total - sum(expected) >= 8:
        observed.append(total - sum(observed))
        expected.append(total - sum(expected))
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    assert len(expected) >= least, "too few classes to tell anything"
    half = torch.tensor([len(expected) - 1, statistic], dtype=torch.float64) / 2
    return float(torch.special.gammaincc(half[0], half[1]))


@pytest.mark.parametrize("certain", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_a_position_is_drawn_as_without_a_draft(seed: int, certain: bool) -> None:
    """Any p and q over 8 tokens; a third of the rows have no proposal but a filler p allows."""
    generator = torch.Generator().manual_seed(seed)
    rows = 30000
    scores = (2 * torch.randn(1, 8, generator=generator)).expand(rows, -1)
    q = (2 * torch.randn(1, 8, generator=generator)).softmax(-1).expand(rows, -1)
    ids = torch.full((rows,), 3) if certain else draw_from(q, generator)
    proposed = torch.arange(rows) % 3 > 0
    drafts = Drafts(ids[:, None], [1] * rows, proposed[:, None], () if certain else (q,))
    got, accepted = acceptance._draw_or_accept(scores, drafts, 0, generator)
    assert torch.equal(got[accepted], ids[accepted])
    assert 0 < accepted[proposed].float().mean() < 1
    probs = {(token,): float(p) for token, p in enumerate(scores[0].double().softmax(-1))}
    for some in (proposed, ~proposed):
        counts = Counter((token,) for token in got[some].tolist())
        assert p_value(counts, probs, least=5) > 1e-3
    assert not accepted[~proposed].any()


PLAIN = {"temperature": 1.6, "top_k": 4}
RICH = {
    "temperature": 1.8,
    "top_k": 6,
    "top_p": 0.96,
    "min_p": 0.01,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.6,
}
ROWS, STEPS = 4000, 4


def repetitive() -> Tensor:
    """A prompt ``[1, 20]`` in which looking up finds something, but not always the right thing."""
    ids = noisy(1, 13, 0.15, seed=4)
    return torch.cat((ids, ids[:, :7]), dim=1)


def draws(m: CausalLM, ids: Tensor, kind: str | None, seed: int, **sampling: Any) -> GenerateOutput:
    return m.generate(
        ids.expand(ROWS, -1),
        do_sample=True,
        max_new_tokens=STEPS,
        eos_token_id=None,
        draft=kind,
        seed=seed,
        return_dict_in_generate=True,
        **sampling,
    )


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("sampling", [PLAIN, RICH], ids=["plain", "rich"])
def test_drafts_leave_the_distribution_alone(
    model: CausalLM, sampling: dict[str, Any], kind: str | None
) -> None:
    """4000 answers of four tokens, against the exact probability of each."""
    ids = repetitive()
    probs = tree(model, ids, SamplingParams(do_sample=True, **sampling), STEPS)
    out = draws(model, ids, kind, 0, **sampling)
    p = p_value(Counter(map(tuple, out.sequences[:, ids.shape[1] :].tolist())), probs)
    rate = out.draft_stats.acceptance_rate if kind is not None else None
    print(f"\n{kind}: p = {p:.3f} over {len(probs)} answers, acceptance {rate}")
    assert p > 1e-3
    assert rate is None or 0.02 < rate < 0.98


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_the_chi_square_test_notices_wrong_acceptance(
    model: CausalLM, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a rejection the token must not be drawn from the model's whole distribution."""
    right = acceptance._draw_or_accept

    def wrong(scores: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        ids, accepted = right(scores, *args)
        return torch.where(accepted, ids, draw(scores, args[-1])), accepted

    monkeypatch.setattr(acceptance, "_draw_or_accept", wrong)
    ids = repetitive()
    probs = tree(model, ids, SamplingParams(do_sample=True, **PLAIN), STEPS)
    out = draws(model, ids, kind, 0, **PLAIN)
    p = p_value(Counter(map(tuple, out.sequences[:, ids.shape[1] :].tolist())), probs)
    assert p < 1e-6
