"""What ``generate`` returns beside the ids, and the callables it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exafuse.generation.generate import GenerateOutput
from generation_pair import FAMILIES, Pair, prompt, token_at
from torch import Tensor
from transformers import EosTokenCriteria, LogitsProcessorList, StoppingCriteriaList


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("with_eos", [False, True])
def test_dict_output_with_scores(pair: Pair, with_eos: bool) -> None:
    ids = prompt(2, 7)
    kwargs: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    if with_eos:
        kwargs["eos_token_id"] = [token_at(pair, ids, row, 3 + row) for row in range(2)]
    kwargs |= {"return_dict_in_generate": True, "output_scores": True}
    theirs, ours = pair.theirs.generate(ids, **kwargs), pair.ours.generate(ids, **kwargs)
    assert isinstance(ours, GenerateOutput)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert len(ours.scores) == len(theirs.scores) == ours.sequences.shape[1] - 7
    for a, b in zip(ours.scores, theirs.scores, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert a.dtype == torch.float32
    assert ours.draft_stats is None
    assert ours.past_key_values.get_seq_length() == ours.sequences.shape[1] - 1
    plain = pair.ours.generate(ids, max_new_tokens=3, return_dict_in_generate=True)
    assert plain.scores is None


def test_processors_and_criteria(llama: Pair) -> None:
    """User callables see transformers' arguments, in transformers' place."""

    class Forbid:
        def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
            scores[:, ids[0, -1]] = -torch.inf  # in place, and depending on the ids so far
            return scores

    class Enough:
        def __call__(self, ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            return ids[:, -1] % 7 == 0

    ids = prompt(3, 6)
    kwargs = {"do_sample": True, "temperature": 0.9, "max_new_tokens": 20, "eos_token_id": 1}
    llama.check(
        ids,
        pad=0,
        logits_processor=LogitsProcessorList([Forbid()]),
        stopping_criteria=StoppingCriteriaList([Enough()]),
        **kwargs,
    )


def test_criteria_that_name_eos_ids_pad_the_rows(llama: Pair) -> None:
    ids = prompt(3, 6)
    criterion = EosTokenCriteria([token_at(llama, ids, row, 2 + 3 * row) for row in range(3)])
    llama.check(ids, pad=0, stopping_criteria=StoppingCriteriaList([criterion]), max_new_tokens=15)


def test_criteria_without_eos_leave_finished_rows_running(llama: Pair) -> None:
    ids = prompt(3, 6)
    token = token_at(llama, ids, 0, 2)

    def stop(ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return ids[:, -1] == token

    for pad in (None, 0):  # a pad id alone does not make transformers pad either
        criteria = StoppingCriteriaList([stop])
        llama.check(ids, pad=pad, stopping_criteria=criteria, max_new_tokens=15)


def test_criteria_may_answer_with_one_bool_and_see_the_scores(llama: Pair) -> None:
    seen: list[Any] = []

    def third(ids: Tensor, scores: Any) -> bool:
        seen.append(scores)
        return ids.shape[1] >= 9

    ids = prompt(2, 6)
    assert llama.ours.generate(ids, stopping_criteria=[third]).shape == (2, 9)
    assert seen[0] is None
    seen.clear()
    llama.ours.generate(
        ids, stopping_criteria=[third], return_dict_in_generate=True, output_scores=True
    )
    assert [len(scores) for scores in seen[:3]] == [1, 2, 3]
