"""exafuse.PresencePenalty in transformers' generate: the same words as our own presence penalty."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import drop_in_cases
import exafuse
import pytest
import torch
import transformers
from exafuse.generation.sampling import presence_penalty
from torch import Tensor

NEW_TOKENS = 24


@pytest.fixture(scope="module", params=list(drop_in_cases.FAMILIES))
def model(request: pytest.FixtureRequest) -> transformers.PreTrainedModel:
    return drop_in_cases.build(request.param)


def generate(model: Any, penalty: Any, batch: int = 2, **options: Any) -> Tensor:
    ids = drop_in_cases.prompts(model, batch)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **options}
    with torch.no_grad():
        return model.generate(
            ids,
            attention_mask=drop_in_cases.left_padding(ids),
            logits_processor=[penalty],
            **options,
        )


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("penalty", [1.5, -0.7])
def test_tokens_equal_those_of_our_own_generation(
    model: Any, penalty: float, drawn: bool, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    own = exafuse.from_pretrained(tmp_path, device="cpu", progress=False)
    ids = drop_in_cases.prompts(model)
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": drawn}
    if drawn:
        options |= {"temperature": 1.3, "top_k": 20}
    expected = own.generate(
        ids,
        attention_mask=drop_in_cases.left_padding(ids),
        presence_penalty=penalty,
        **({"seed": 11} if drawn else {}),
        **options,
    )
    for prompt_length in (None, ids.shape[1]):
        torch.manual_seed(11)
        with exafuse.patched(model):
            ours = generate(model, exafuse.PresencePenalty(penalty, prompt_length), **options)
        assert torch.equal(ours, expected)
    torch.manual_seed(11)
    assert not torch.equal(generate(model, exafuse.PresencePenalty(0), **options), expected)


def test_only_what_was_generated_is_penalised() -> None:
    scores = torch.randn(2, 9)
    penalise = exafuse.PresencePenalty(1.25, prompt_length=2)
    assert torch.equal(penalise(torch.tensor([[3, 4], [5, 5]]), scores), scores)
    ids = torch.tensor([[3, 4, 8, 8, 3], [5, 5, 0, 1, 2]])
    expected = scores.clone()
    for row, seen in enumerate(({8, 3}, {0, 1, 2})):
        for token in seen:
            expected[row, token] -= 1.25
    before = scores.clone()
    assert torch.equal(penalise(ids, scores), expected)
    assert torch.equal(scores, before), "the caller's scores were written to"


def test_beams_keep_their_own_tokens(model: Any) -> None:
    """Beams change rows from step to step: what counts is what a row holds, not its place."""

    def by_definition(ids: Tensor, scores: Tensor) -> Tensor:
        rows = [
            presence_penalty(
                row,
                torch.isin(torch.arange(row.shape[0]), sequence[11:]),
                1.0,
            )
            for sequence, row in zip(ids, scores, strict=True)
        ]
        return torch.stack(rows)

    options: dict[str, Any] = {"num_beams": 3, "batch": 3}
    expected = generate(model, by_definition, **options)
    assert torch.equal(generate(model, exafuse.PresencePenalty(1.0), **options), expected)
    assert torch.equal(generate(model, exafuse.PresencePenalty(1.0, 11), **options), expected)


def test_speculation_changes_nothing(model: Any) -> None:
    """Candidates are judged position by position, rejected ones as if they had never been."""
    options: dict[str, Any] = {"batch": 1, "eos_token_id": 96}  # transformers 5.8 needs an end
    plain = generate(model, exafuse.PresencePenalty(1.5, 11), **options)
    options["prompt_lookup_num_tokens"] = 3
    assert torch.equal(generate(model, exafuse.PresencePenalty(1.5, 11), **options), plain)


def test_embeddings_have_no_prompt(model: Any) -> None:
    embeds = model.get_input_embeddings()(drop_in_cases.prompts(model))
    options: dict[str, Any] = {"inputs_embeds": embeds, "max_new_tokens": NEW_TOKENS}
    options |= {"do_sample": False}
    with torch.no_grad():
        results = [
            model.generate(logits_processor=[exafuse.PresencePenalty(1.5, n)], **options)
            for n in (None, 0)
        ]
        ids = drop_in_cases.prompts(model)
        with_ids = model.generate(
            ids,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            logits_processor=[exafuse.PresencePenalty(1.5)],
        )
    for result in results:
        assert torch.equal(result, with_ids[:, ids.shape[1] :])


def test_an_object_serves_the_same_prompt_again_and_no_other(model: Any) -> None:
    penalty = exafuse.PresencePenalty(1.5)
    first = generate(model, penalty)
    assert torch.equal(generate(model, penalty), first)
    with pytest.raises(ValueError, match=r"expected 2 rows of 35 ids.*got 1 of 11; make a new one"):
        generate(model, penalty, batch=1)
    with pytest.raises(ValueError, match="2 rows"), torch.no_grad():
        model.generate(first[:, :20], logits_processor=[penalty], max_new_tokens=2)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((2.5,), ValueError, "penalty: expected from -2 to 2 (0 is neutral), got 2.5"),
        ((float("nan"),), ValueError, "penalty: expected from -2 to 2"),
        (("1.5",), TypeError, "penalty: expected a number, got str"),
        ((True,), TypeError, "penalty: expected a number, got bool"),
        ((1.0, -1), ValueError, "prompt_length: expected at least 0, got -1"),
        ((1.0, 2.0), TypeError, "prompt_length: expected an integer or None, got float"),
    ],
)
def test_wrong_arguments_are_named(arguments: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        exafuse.PresencePenalty(*arguments)


def test_a_prompt_longer_than_the_ids_is_refused() -> None:
    with pytest.raises(ValueError, match=r"prompt_length: expected at most the 3 ids.*got 4"):
        exafuse.PresencePenalty(1.0, 4)(torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 5))


def test_transformers_itself_refuses_the_keyword(model: Any) -> None:
    """The reason for all this; where it fails one day, this file can say less."""
    with pytest.raises(ValueError, match="presence_penalty"):
        model.generate(drop_in_cases.prompts(model), presence_penalty=1.5, max_new_tokens=2)
