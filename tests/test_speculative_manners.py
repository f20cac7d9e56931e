"""Generation with drafts beside the tokens: ends, padding, streams, penalties, callables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from exafuse.generation.acceptance import Decision
from exafuse.models.causal_lm import CausalLM
from scripted_model import Collector
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


class Characters:
    """A tokenizer in which every id is a character."""

    def decode(self, ids: list[int], **kwargs: Any) -> str:
        return "".join(chr(0x4E00 + token) for token in ids)


def ended_by_a_draft(decisions: list[Decision]) -> int:
    """Rows that a drafted token ended which was not the last one in its step."""
    return sum(
        ended and len(tokens) == accepted and len(tokens) < decision.ids.shape[1]
        for decision in decisions
        for tokens, accepted, ended in zip(
            decision.tokens, decision.accepted, decision.ended, strict=True
        )
    )


@pytest.mark.parametrize("kind", KINDS)
def test_rows_end_at_their_eos_within_a_draft_too(
    model: CausalLM, kind: str, decisions: list[Decision]
) -> None:
    ids, mask = padded_prompts()
    kwargs: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 40}
    free = model.generate(ids, **kwargs)
    decisions.clear()
    for row in (0, 2, 4):
        for at in (0, 11, 12, 13, 39):
            eos = [int(free[row, 30 + at]), int(free[(row + 1) % 5, 30 + 2 * at // 3])]
            plain = model.generate(ids, eos_token_id=eos, **kwargs)
            out = model.generate(
                ids, eos_token_id=eos, draft=kind, return_dict_in_generate=True, **kwargs
            )
            assert torch.equal(out.sequences, plain)
            new = [length_of(answer, eos) for answer in plain[:, 30:].tolist()]
            prompts = mask.sum(1).tolist()
            held = [p + n - 1 for p, n in zip(prompts, new, strict=True)]
            assert out.past_key_values.lengths == held
            assert out.past_key_values.get_seq_length() == plain.shape[1] - 1
    assert ended_by_a_draft(decisions) > 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eos", [None, 0])
def test_stop_strings_end_rows_within_a_draft(model: CausalLM, kind: str, eos: int | None) -> None:
    """Where rows are padded, and where, for want of any eos, they go on until all have ended."""
    ids, mask = padded_prompts()
    kwargs: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 40}
    free = model.generate(ids, **kwargs)
    kwargs |= {"eos_token_id": eos, "tokenizer": Characters()}
    stopped = 0
    for at in (0, 5, 12, 13, 22):
        strings = [Characters().decode(row[30 + at : 32 + at].tolist()) for row in free]
        streamers = Collector(), Collector()
        plain = model.generate(ids, stop_strings=strings, streamer=streamers[0], **kwargs)
        got = model.generate(ids, stop_strings=strings, streamer=streamers[1], draft=kind, **kwargs)
        assert torch.equal(got, plain)
        assert streamers[1].steps == streamers[0].steps
        stopped += plain.shape[1] < 70
    assert stopped >= 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 5])
def test_streamers_get_what_they_get_without_drafts(model: CausalLM, kind: str, rows: int) -> None:
    """Column by column, however many tokens a step brings, and rows that have ended padded."""
    ids, mask = (part[:rows] for part in padded_prompts())
    free = model.generate(ids, attention_mask=mask, max_new_tokens=30)
    eos = [int(free[row, 30 + 6 * row + 4]) for row in range(rows)]
    for kwargs in ({}, {"eos_token_id": eos}):
        seen = Collector(), Collector()
        for draft, streamer in ((None, seen[0]), (kind, seen[1])):
            model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=30,
                draft=draft,
                streamer=streamer,
                **kwargs,
            )
        assert seen[1].prompt == seen[0].prompt
        assert seen[1].steps == seen[0].steps
        assert seen[1].ended == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 4, 5, 17])
def test_no_answer_is_too_long(model: CausalLM, kind: str, max_new_tokens: int) -> None:
    ids, mask = padded_prompts()
    kwargs: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": max_new_tokens}
    plain = model.generate(ids, **kwargs)
    out = model.generate(ids, draft=kind, return_dict_in_generate=True, **kwargs)
    assert torch.equal(out.sequences, plain)
    assert out.past_key_values.lengths == (mask.sum(1) + max_new_tokens - 1).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_penalties_see_every_token_before_each_position(model: CausalLM, kind: str) -> None:
    ids, mask = padded_prompts()
    for kwargs in (
        {"repetition_penalty": 1.5},
        {"presence_penalty": 2.0},
        {"repetition_penalty": 0.8, "presence_penalty": -1.0},
    ):
        plain = model.generate(ids, attention_mask=mask, max_new_tokens=40, **kwargs)
        got = model.generate(ids, attention_mask=mask, max_new_tokens=40, draft=kind, **kwargs)
        assert torch.equal(got, plain)
        without = model.generate(ids, attention_mask=mask, max_new_tokens=40)
        assert not torch.equal(plain, without), "the penalty must matter"


class Recorder:
    """A processor and criterion with a memory: it sees each position once, in order, or fails."""

    def __init__(self, stop_at: Callable[[list[int]], bool] = lambda ids: False):
        self.processed: list[list[int]] = []
        self.judged: list[list[int]] = []
        self.num_scores: list[int | None] = []
        self.stop_at = stop_at

    def process(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.processed.append(ids[0].tolist())
        scores[:, ids[0, -1]] -= 3.0  # in place
        return scores

    def judge(self, ids: Tensor, scores: Any) -> Tensor:
        self.judged.append(ids[0].tolist())
        self.num_scores.append(None if scores is None else len(scores))
        return torch.tensor([self.stop_at(ids[0].tolist())])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stops", [False, True])
def test_callables_see_one_position_after_the_other(
    model: CausalLM, kind: str, stops: bool
) -> None:
    ids = Phrases(3).batch(1, 20)
    free = model.generate(ids, max_new_tokens=30)[0].tolist()
    recorders = []
    for draft in (None, kind):
        recorder = Recorder(lambda seen: stops and len(seen) >= 36 and seen[-1] in free[:36])
        out = model.generate(
            ids,
            max_new_tokens=30,
            draft=draft,
            logits_processor=[recorder.process],
            stopping_criteria=[recorder.judge],
            return_dict_in_generate=True,
            output_scores=True,
        )
        recorders.append((recorder, out))
    (plain, expected), (got, out) = recorders
    assert torch.equal(out.sequences, expected.sequences)
    calls = out.sequences.shape[1] - 20
    # Without drafts one more step is queued before the host knows of the end.
    assert len(plain.processed) == calls + (calls < 30)
    assert got.processed == plain.processed[:calls]
    assert got.judged == plain.judged[:calls]
    assert got.num_scores == plain.num_scores[:calls]
    for a, b in zip(out.scores, expected.scores, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prefill_chunk_of_padding_alone_is_skipped(
    model: CausalLM, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """24 columns in chunks of 8, of which the first 10 are padding in every row."""
    monkeypatch.setattr(model, "prefill_chunk", 8)
    ids, mask = padded_prompts()
    ids, mask = ids[:, -24:], mask[:, -24:].clone()
    mask[:, :10] = 0
    kwargs: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 12}
    drafted = model.generate(ids, draft=kind, **kwargs)
    assert torch.equal(drafted, model.generate(ids, **kwargs))
