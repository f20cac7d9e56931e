"""Generation with drafts: what it returns beside the ids, caches after rollbacks, refusals."""

from __future__ import annotations

from typing import Any

import exafuse
import pytest
import torch
from exafuse.generation.acceptance import Decision
from exafuse.generation.generate import DraftStats, GenerationConfig
from exafuse.models.causal_lm import CausalLM
from host_reads import HostReads
from torch import Tensor
from trained_mtp import Phrases, length_of, padded_prompts, trained, watch_decisions

pytestmark = pytest.mark.slow  # a model is trained first
KINDS = ["mtp", "prompt_lookup"]


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return trained()


@pytest.fixture
def decisions(monkeypatch: pytest.MonkeyPatch) -> list[Decision]:
    """Every decision that is taken during the test."""
    return watch_decisions(monkeypatch)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_tokens(model: CausalLM, kind: str) -> None:
    ids, mask = padded_prompts()
    free = model.generate(ids, attention_mask=mask, max_new_tokens=20)
    kwargs: dict[str, Any] = {
        "attention_mask": mask,
        "max_new_tokens": 20,
        "eos_token_id": int(free[0, 37]),
        "return_dict_in_generate": True,
        "output_scores": True,
        "repetition_penalty": 1.1,
    }
    plain, out = model.generate(ids, **kwargs), model.generate(ids, draft=kind, **kwargs)
    assert torch.equal(out.sequences, plain.sequences)
    assert len(out.scores) == len(plain.scores)
    ends = [length_of(row, [kwargs["eos_token_id"]]) for row in out.sequences[:, 30:].tolist()]
    for column, (ours, theirs) in enumerate(zip(out.scores, plain.scores, strict=True)):
        assert ours.dtype == torch.float32
        for row, end in enumerate(ends):
            expected = theirs[row] if column < end else torch.zeros(97)
            torch.testing.assert_close(ours[row], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_add_up(model: CausalLM, kind: str, decisions: list[Decision]) -> None:
    ids, mask = padded_prompts()
    for k in (1, 3, 6):
        decisions.clear()
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=50,
            draft=kind,
            num_draft_tokens=k,
            return_dict_in_generate=True,
        )
        stats = out.draft_stats
        assert isinstance(stats, DraftStats)
        assert stats.kind == kind
        assert stats.steps == len(decisions) - 1
        assert stats.new_tokens == 5 * 49
        assert stats.row_steps == sum(bool(t) for d in decisions[1:] for t in d.tokens)
        assert stats.accepted == sum(sum(d.accepted) for d in decisions)
        assert 0 < stats.accepted <= stats.drafted <= k * stats.row_steps
        assert stats.tokens_per_step == stats.new_tokens / stats.row_steps > 1
        assert stats.acceptance_rate == stats.accepted / stats.drafted
        assert max(d.ids.shape[1] for d in decisions) == k + 1
    assert model.generate(ids, return_dict_in_generate=True).draft_stats is None
    one = model.generate(ids, max_new_tokens=1, draft=kind, return_dict_in_generate=True)
    assert (one.draft_stats.steps, one.draft_stats.tokens_per_step) == (0, 0.0)
    assert one.draft_stats.acceptance_rate == 0.0


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_caches_after_rollbacks_equal_recomputed_ones(model: CausalLM, kind: str) -> None:
    """Every key and value that a later query can see, in rings that have wrapped and in full
    layers; and the answer goes on as if nothing had been drafted."""
    ids, mask = padded_prompts()
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=150, draft=kind, return_dict_in_generate=True
    )
    cache, prompts = out.past_key_values, mask.sum(1).tolist()
    assert [layer.ring for layer in cache.layers] == [True, False, True]
    assert max(cache.lengths) > 128
    expected = []
    for row, length in enumerate(cache.lengths):
        assert length == prompts[row] + 149
        text = out.sequences[row : row + 1, 30 - prompts[row] :]
        fresh = model.new_cache(1, length)
        model.next_logits(text[:, :-1], fresh)
        for ours, theirs, plan in zip(cache.layers, fresh.layers, model.config.layers, strict=True):
            left = plan.window_size[0]
            first = 0 if left < 0 else max(0, length - left)
            positions = torch.arange(first, length)
            for a, b in ((ours.k, theirs.k), (ours.v, theirs.v)):
                got = a[row, positions % a.shape[1]]
                want = b[0, positions % b.shape[1]]
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        expected.append(model.next_logits(text[:, -1:], fresh))
    logits = model.next_logits(out.sequences[:, -1:], cache)
    torch.testing.assert_close(logits, torch.cat(expected), rtol=1e-3, atol=1e-3)


def test_a_seed_repeats_the_draws(model: CausalLM) -> None:
    ids, mask = padded_prompts()
    kwargs: dict[str, Any] = {
        "attention_mask": mask,
        "max_new_tokens": 20,
        "do_sample": True,
        "temperature": 1.5,
        "draft": "mtp",
    }
    state = torch.get_rng_state()
    a, b, c = (model.generate(ids, seed=seed, **kwargs) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state), "a private generator draws"
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("calls", [0, 3])
def test_scores_that_are_no_numbers_are_an_error(
    model: CausalLM, do_sample: bool, calls: int
) -> None:
    ids, left = Phrases(3).batch(2, 20), [calls]

    def spoil(module: Any, inputs: Any, logits: Tensor) -> Tensor:
        left[0] -= 1
        return logits if left[0] >= 0 else logits * float("nan")

    message = r"scores of rows \[0\] at new token \d+: expected"
    with model.lm_head.register_forward_hook(spoil), pytest.raises(RuntimeError, match=message):
        model.generate(ids, draft="prompt_lookup", do_sample=do_sample, max_new_tokens=30)


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_go_with_the_prompt_only(model: CausalLM, kind: str) -> None:
    """The tower runs once, and the head reads the pictures' features as the model does."""
    generator = torch.Generator().manual_seed(5)
    ids = Phrases(5).batch(2, 50)
    ids[(ids == 7) | (ids == 8)] = 9
    ids[0, 28:32] = ids[1, 42:48] = 7  # images of 4 and 6 tokens, read in two chunks
    media = {
        "pixel_values": torch.randn(16 + 24, 1176, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 6]]),
    }
    calls: list[int] = []
    kwargs: dict[str, Any] = {"max_new_tokens": 30, "output_scores": True}
    with model.model.visual.register_forward_hook(lambda *_: calls.append(1)):
        plain, out = (
            model.generate(
                {"input_ids": ids, **media}, draft=draft, return_dict_in_generate=True, **kwargs
            )
            for draft in (None, kind)
        )
    assert len(calls) == 2
    assert torch.equal(out.sequences, plain.sequences)
    for a, b in zip(out.scores, plain.scores, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    blind = model.generate(ids, return_dict_in_generate=True, **kwargs)
    assert (blind.scores[0] - plain.scores[0]).abs().amax(1).min() > 1e-2, "pictures must matter"


def test_what_does_not_go_with_drafts(model: CausalLM) -> None:
    ids, _ = padded_prompts()
    for name in ("logits_processor", "stopping_criteria"):
        with pytest.raises(ValueError, match=f"{name}, draft: expected a single row, got 5"):
            model.generate(ids, draft="mtp", **{name: [lambda ids, scores: scores]})
    with pytest.raises(ValueError, match=r"num_draft_tokens: expected at most 31 .* got 32"):
        model.generate(ids, draft="mtp", num_draft_tokens=32)
    with pytest.raises(ValueError, match="draft: expected None, 'mtp' or 'prompt_lookup', got 'x'"):
        model.generate(ids, draft="x")
    settings = GenerationConfig(cache_implementation="static")
    assert model.generate(ids, draft="mtp", generation_config=settings).shape == (5, 50)


def test_frequencies_that_change_with_the_length_do_not_go_with_drafts() -> None:
    config: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }
    ropes: dict[str, dict[str, Any]] = {
        "dynamic": {"rope_type": "dynamic", "factor": 4.0},
        "longrope": {
            "rope_type": "longrope",
            "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8,
            "original_max_position_embeddings": 64,
            "factor": 4.0,
        },
    }
    for name, rope in ropes.items():
        positions = 64 if name == "dynamic" else 256
        values = {**config, "max_position_embeddings": positions, "rope_scaling": rope}
        m = exafuse.from_config(values, "float32", "cpu", backend="reference", seed=0)
        ids = torch.randint(1, 97, (1, 40), generator=torch.Generator().manual_seed(0))
        plain = m.generate(ids, max_new_tokens=21)
        assert torch.equal(m.generate(ids, max_new_tokens=21, draft="prompt_lookup"), plain)
        with pytest.raises(ValueError, match=f"draft: RoPE of type '{name}' .* come to 65; exp"):
            m.generate(ids, max_new_tokens=22, draft="prompt_lookup")
        longer = torch.cat((ids, ids), dim=1)
        if name == "longrope":  # stretched from the first token on
            plain = m.generate(longer, max_new_tokens=20)
            assert torch.equal(m.generate(longer, max_new_tokens=20, draft="prompt_lookup"), plain)
        else:
            with pytest.raises(ValueError, match="draft: RoPE of type 'dynamic'"):
                m.generate(longer, max_new_tokens=20, draft="prompt_lookup")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("do_sample", [False, True])
def test_a_step_waits_for_the_device_once(
    model: CausalLM, kind: str, do_sample: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the tokens that it brought; drafting and cutting caches wait for nothing."""
    reads = HostReads(monkeypatch)
    monkeypatch.setattr(model, "backend", reads.not_counting(model.backend))
    next_hidden, steps = model.next_hidden, []

    def watched(*args: Any, **kwargs: Any) -> Any:
        if len(steps) == 1:
            reads.counts.clear()
        steps.append(1)
        return next_hidden(*args, **kwargs)

    monkeypatch.setattr(model, "next_hidden", watched)
    ids, mask = padded_prompts()
    with reads:
        model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=20,
            do_sample=do_sample,
            seed=0 if do_sample else None,
            repetition_penalty=1.1,
            draft=kind,
        )
        waits = reads.counts.total()
    assert len(steps) > 4
    assert set(+reads.counts) == {"tolist"}, reads.counts
    assert waits == len(steps) - 1
