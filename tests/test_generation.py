"""``generate`` against transformers, token for token in fp32, on tiny models of every family."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import transformers
from exafuse.generation.generate import GenerationConfig
from generation_pair import FAMILIES, Pair, left_padded, prompt, token_at


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair("llama", tmp_path_factory.mktemp("llama"))


# ---- greedy, padding, lengths -------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
def test_greedy(pair: Pair, batch: int) -> None:
    assert pair.check(prompt(batch, 11), max_new_tokens=24).shape == (batch, 35)


def test_shortest_prompt_and_answer(pair: Pair) -> None:
    assert pair.check(prompt(2, 1), max_new_tokens=1).shape == (2, 2)


@pytest.mark.parametrize("given", ["mask", "inferred"])
def test_left_padded_batch(pair: Pair, given: str) -> None:
    ids, mask = left_padded()
    kwargs = {"attention_mask": mask} if given == "mask" else {}
    batch = pair.check(ids, pad=0, max_new_tokens=20, **kwargs)
    for row in range(3):
        alone = ids[row : row + 1, mask[row].bool()]
        answer = pair.ours.generate(alone, max_new_tokens=20)
        assert torch.equal(answer[0, -20:], batch[row, -20:]), "a row alone answers alike"


def test_pad_that_is_an_eos_marks_no_padding(llama: Pair) -> None:
    ids, _ = left_padded(pad=5)
    llama.check(ids, pad=5, eos_token_id=[5, 7], max_new_tokens=10)


def test_ragged_lists_equal_the_rows_alone(pair: Pair) -> None:
    rows = [prompt(1, length)[0].tolist() for length in (3, 12, 1, 7)]
    config = GenerationConfig(pad_token_id=2)
    out = pair.ours.generate(rows, max_new_tokens=15, generation_config=config)
    assert out.shape == (4, 27)
    for row, ids in enumerate(rows):
        assert out[row, : 12 - len(ids)].tolist() == [2] * (12 - len(ids))
        assert (
            out[row, 12 - len(ids) :].tolist()
            == pair.ours.generate(ids, max_new_tokens=15)[0].tolist()
        )


def test_ragged_lists_without_a_pad_id_take_the_first_eos(llama: Pair) -> None:
    out = llama.ours.generate([[11, 12, 13], [14]], max_new_tokens=2, eos_token_id=[6, 5])
    assert out[1, :2].tolist() == [6, 6]


@pytest.mark.parametrize("length", [7, 25])
def test_twenty_new_tokens_when_nothing_is_set(llama: Pair, length: int) -> None:
    with pytest.warns(UserWarning, match="model-agnostic default"):  # transformers' own
        assert llama.check(prompt(1, length)).shape == (1, length + 20)


def test_default_length_ends_with_the_context(llama: Pair) -> None:
    with pytest.warns(UserWarning, match="model-agnostic default"):
        assert llama.check(prompt(1, 250)).shape == (1, 256)


def test_max_length_counts_the_prompt(llama: Pair) -> None:
    assert llama.check(prompt(2, 9), max_length=15).shape == (2, 15)


def test_max_new_tokens_goes_before_max_length(llama: Pair) -> None:
    ids = prompt(2, 9)
    with pytest.warns(UserWarning, match="max_length=12: no effect, max_new_tokens=7"):
        out = llama.ours.generate(ids, max_length=12, max_new_tokens=7)
    assert torch.equal(out, llama.theirs.generate(ids, max_length=12, max_new_tokens=7))


@pytest.mark.parametrize("name", [None, "dynamic", "static"])
def test_cache_implementation_changes_nothing(pair: Pair, name: str | None) -> None:
    ids = prompt(2, 9)
    expected = pair.theirs.generate(ids, max_new_tokens=12)
    got = pair.ours.generate(ids, max_new_tokens=12, cache_implementation=name)
    assert torch.equal(got, expected)


# ---- end of sequence ----------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [0, None])
@pytest.mark.parametrize("steps", [(0, 0, 0), (3, 9, 5), (2, 30, 30)], ids=str)
def test_rows_end_at_their_own_eos(pair: Pair, pad: int | None, steps: tuple[int, ...]) -> None:
    ids = prompt(3, 8)
    eos = [token_at(pair, ids, row, step) for row, step in enumerate(steps)]
    out = pair.check(ids, pad=pad, eos_token_id=eos, max_new_tokens=25)
    if steps == (0, 0, 0):
        assert out.shape == (3, 9), "the eos itself is kept and nothing follows"


def test_one_eos_as_int_and_none_at_all(llama: Pair) -> None:
    ids = prompt(1, 8)
    eos = token_at(llama, ids, 0, 4)
    ended = llama.check(ids, eos_token_id=eos, max_new_tokens=12)
    assert ended.shape[1] <= 13
    llama.ours.generation_config = GenerationConfig(eos_token_id=(eos,))
    try:
        assert torch.equal(llama.ours.generate(ids, max_new_tokens=12), ended)
        free = llama.ours.generate(ids, max_new_tokens=12, eos_token_id=None)
        assert free.shape == (1, 20), "None means no eos, not the model's"
    finally:
        llama.ours.generation_config = GenerationConfig()


def test_ids_the_vocabulary_does_not_have_are_never_fed(llama: Pair) -> None:
    """Checkpoints name such eos and pad ids; finished rows then go on with the first real eos."""
    ids = prompt(2, 4)
    real = token_at(llama, ids, 0, 1)
    llama.ours.generation_config = GenerationConfig(eos_token_id=(5000, real), pad_token_id=-1)
    try:
        out = llama.ours.generate(ids, max_new_tokens=12)
    finally:
        llama.ours.generation_config = GenerationConfig()
    assert torch.equal(out, llama.theirs.generate(ids, max_new_tokens=12, eos_token_id=real))
    assert out[0, -1] == real, "the first row ended before the second and was padded"


# ---- drawing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
        {"top_k": 0},
        {"top_k": 0, "top_p": 0.7},
        {"temperature": 1.7, "top_k": 0, "min_p": 0.1},
        {"temperature": 0.6, "top_p": 0.95, "repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_draws_equal_transformers(pair: Pair, kwargs: dict[str, Any]) -> None:
    for seed in range(3):
        pair.check(prompt(3, 6), seed=seed, do_sample=True, max_new_tokens=16, **kwargs)


def test_draws_with_eos_leave_the_generator_where_transformers_does(pair: Pair) -> None:
    """The step that was queued too many must not show in the next draw."""
    ids = prompt(2, 6)
    eos = [token_at(pair, ids, row, 4, do_sample=True) for row in range(2)]
    out = pair.check(ids, pad=0, do_sample=True, eos_token_id=eos, max_new_tokens=40)
    assert out.shape[1] < 46, "the test must end by eos"


def test_left_padded_draws_with_repetition_penalty(pair: Pair) -> None:
    penalty = inspect.signature(transformers.RepetitionPenaltyLogitsProcessor).parameters
    if "Tensor" not in str(penalty["prompt_ignore_length"].annotation):
        pytest.skip(f"transformers {transformers.__version__} penalises padding as if it were text")
    ids, mask = left_padded()
    pair.check(
        ids,
        pad=0,
        attention_mask=mask,
        do_sample=True,
        repetition_penalty=2.0,
        max_new_tokens=12,
    )


def test_repetition_penalty_while_greedy(pair: Pair) -> None:
    pair.check(prompt(2, 9), repetition_penalty=1.8, max_new_tokens=25)


def test_presence_penalty_changes_the_first_repeat(llama: Pair) -> None:
    ids = prompt(1, 6)
    out = llama.ours.generate(
        ids,
        max_new_tokens=20,
        presence_penalty=1.5,
        return_dict_in_generate=True,
        output_scores=True,
    )
    plain = llama.ours.generate(
        ids, max_new_tokens=1, return_dict_in_generate=True, output_scores=True
    )
    assert torch.equal(out.scores[0], plain.scores[0]), "the prompt is not penalised"
    step = 5
    so_far = out.sequences[:, : 6 + step]
    raw = llama.ours(so_far).logits[:, -1].float()
    distinct = so_far[0, 6:].unique()
    raw[0, distinct] -= 1.5
    torch.testing.assert_close(out.scores[step], raw, rtol=1e-4, atol=1e-4)


def test_a_seed_is_private_and_repeatable(llama: Pair) -> None:
    ids = prompt(2, 6)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = llama.ours.generate(ids, do_sample=True, seed=11, max_new_tokens=20)
    assert torch.equal(torch.get_rng_state(), before), "the global generator is untouched"
    assert torch.equal(llama.ours.generate(ids, do_sample=True, seed=11, max_new_tokens=20), first)
    assert not torch.equal(
        llama.ours.generate(ids, do_sample=True, seed=12, max_new_tokens=20), first
    )
    torch.manual_seed(11)
    assert torch.equal(llama.theirs.generate(ids, do_sample=True, max_new_tokens=20), first)
