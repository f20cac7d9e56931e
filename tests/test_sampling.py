"""Penalties, warpers and the draw against transformers' own classes, bit for bit in fp32."""

from __future__ import annotations

import math

import pytest
import torch
from exafuse.generation import sampling
from exafuse.generation.sampling import SamplingParams, ScoreChain
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

VOCAB = 97
NO_IDS = torch.zeros(1, 0, dtype=torch.int64)
CPU = torch.device("cpu")


def random_scores(batch: int = 4, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(batch, vocab) * 3


def tied_scores(batch: int = 4, vocab: int = VOCAB) -> torch.Tensor:
    """Rows where every score occurs many times, and some ids are already removed."""
    scores = torch.randint(-3, 4, (batch, vocab)).float()
    scores[torch.rand(batch, vocab) < 0.2] = -math.inf
    scores[:, 0] = 1.0
    return scores


def flat_scores(batch: int = 4, vocab: int = VOCAB) -> torch.Tensor:
    return torch.zeros(batch, vocab)


def peaked_scores(batch: int = 4, vocab: int = VOCAB) -> torch.Tensor:
    scores = random_scores(batch, vocab)
    scores[:, vocab // 2] += 100
    return scores


KINDS = [random_scores, tied_scores, flat_scores, peaked_scores]
SHAPES = [(1, VOCAB), (4, VOCAB), (2, 1), (3, 1000)]


def test_temperature() -> None:
    for value in (0.1, 0.6, 1.5, 100.0):
        scores = random_scores()
        assert torch.equal(
            sampling.apply_temperature(scores, value),
            TemperatureLogitsWarper(value)(NO_IDS, scores),
        )


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("k", [1, 2, 7, 50, VOCAB, 5000])
def test_top_k(make, shape, k) -> None:
    scores = make(*shape)
    kept = sampling.keep_top_k(scores, k)
    assert torch.equal(kept, TopKLogitsWarper(k)(NO_IDS, scores))


def test_top_k_keeps_ties() -> None:
    kept = sampling.keep_top_k(torch.tensor([[1.0, 2.0, 2.0]]), 1)
    assert kept.tolist() == [[-math.inf, 2.0, 2.0]]


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("p", [1e-9, 1e-6, 0.3, 0.5, 0.8, 0.95, 0.999999, 1.0])
def test_top_p(make, shape, p) -> None:
    scores = make(*shape)
    kept = sampling.keep_top_p(scores, p)
    assert torch.equal(kept, TopPLogitsWarper(p)(NO_IDS, scores))
    assert (kept > -math.inf).any(dim=-1).all()


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    scores = torch.tensor([[0.5, 0.3, 0.2]]).log()
    assert (sampling.keep_top_p(scores, 0.5) > -math.inf).tolist() == [[True, False, False]]
    assert (sampling.keep_top_p(scores, 0.51) > -math.inf).tolist() == [[True, True, False]]


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 1.0])
def test_min_p(make, shape, p) -> None:
    scores = make(*shape)
    assert torch.equal(sampling.keep_min_p(scores, p), MinPLogitsWarper(p)(NO_IDS, scores))


@pytest.mark.parametrize("penalty", [0.5, 1.3, 3.0])
@pytest.mark.parametrize("make", KINDS)
def test_repetition_penalty_over_prompt_and_output(make, penalty) -> None:
    scores = make()
    ids = torch.randint(0, VOCAB, (4, 30))
    chain = ScoreChain(SamplingParams(repetition_penalty=penalty), ids[:, :20], None, VOCAB)
    for column in range(20, 30):
        chain.record(ids[:, column])
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, scores)
    assert torch.equal(chain.scores(scores, ids), expected)


def test_repetition_penalty_spares_left_padding() -> None:
    ids = torch.tensor([[7, 7, 7, 3], [1, 2, 3, 4]])
    mask = torch.tensor([[0, 0, 0, 1], [1, 1, 1, 1]])
    scores = random_scores(2)
    chain = ScoreChain(SamplingParams(repetition_penalty=3.0), ids, mask, VOCAB)
    got = chain.scores(scores, ids)
    for row, padding in enumerate((3, 0)):
        theirs = RepetitionPenaltyLogitsProcessor(3.0, prompt_ignore_length=padding)
        assert torch.equal(got[row], theirs(ids[row : row + 1], scores[row : row + 1])[0])
    assert got[0, 7] == scores[0, 7], "the pad id must not be penalised"
    assert got[0, 3] != scores[0, 3]


def test_presence_penalty_counts_the_output_only_and_once() -> None:
    prompt = torch.tensor([[1, 2]])
    chain = ScoreChain(SamplingParams(presence_penalty=1.5), prompt, None, 5)
    scores = torch.tensor([[0.5, 1.0, -1.0, 2.0, 0.0]])
    assert torch.equal(chain.scores(scores, prompt), scores), "prompt ids are not penalised"
    chain.record(torch.tensor([3]))
    chain.record(torch.tensor([3]))
    chain.record(torch.tensor([2]))
    assert chain.scores(scores, prompt).tolist() == [[0.5, 1.0, -2.5, 0.5, 0.0]]


def test_presence_penalty_below_zero_invites_repeats() -> None:
    chain = ScoreChain(SamplingParams(presence_penalty=-2.0), torch.tensor([[0]]), None, 3)
    chain.record(torch.tensor([1]))
    assert chain.scores(torch.zeros(1, 3), torch.tensor([[0, 1]])).tolist() == [[0.0, 2.0, 0.0]]


@pytest.mark.parametrize("make", KINDS)
def test_chain_follows_the_order_of_transformers(make) -> None:
    ids = torch.randint(0, VOCAB, (4, 12))
    shift = torch.randn(VOCAB)
    theirs = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.2),
            lambda _, scores: scores + shift,
            TemperatureLogitsWarper(0.7),
            TopKLogitsWarper(20),
            TopPLogitsWarper(0.9),
            MinPLogitsWarper(0.02),
        ]
    )
    params = SamplingParams(
        do_sample=True, temperature=0.7, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.2
    )
    chain = ScoreChain(params, ids, None, VOCAB, [lambda _, scores: scores + shift])
    scores = make()
    assert torch.equal(chain.scores(scores, ids), theirs(ids, scores.clone()))


def test_chain_with_the_limits_of_top_k() -> None:
    scores, ids = random_scores(), torch.zeros(4, 1, dtype=torch.int64)
    for k, kept in ((0, VOCAB), (1, 1), (VOCAB, VOCAB)):
        chain = ScoreChain(SamplingParams(do_sample=True, top_k=k), ids, None, VOCAB)
        left = (chain.scores(scores, ids) > -math.inf).sum(dim=-1)
        assert left.tolist() == [kept] * 4


def test_chain_without_drawing_ignores_the_warpers() -> None:
    params = SamplingParams(do_sample=False, temperature=0.1, top_k=1, top_p=0.1, min_p=0.9)
    scores = random_scores()
    chain = ScoreChain(params, torch.zeros(4, 1, dtype=torch.int64), None, VOCAB)
    assert torch.equal(chain.scores(scores, NO_IDS), scores)


def test_chain_leaves_the_logits_alone_and_works_in_fp32() -> None:
    def spoil(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.fill_(1.0)

    for dtype in (torch.float32, torch.bfloat16):
        logits = random_scores().to(dtype)
        before = logits.clone()
        chain = ScoreChain(SamplingParams(), torch.zeros(4, 1).long(), None, VOCAB, [spoil])
        assert chain.scores(logits, NO_IDS).dtype == torch.float32
        assert torch.equal(logits, before)


@pytest.mark.parametrize(
    "result", [None, torch.zeros(4), torch.zeros(4, VOCAB, dtype=torch.int64)], ids=repr
)
def test_a_processor_that_returns_no_scores_is_named(result) -> None:
    class Broken:
        def __call__(self, ids, scores):
            return result

    chain = ScoreChain(SamplingParams(), torch.zeros(4, 1).long(), None, VOCAB, [Broken()])
    with pytest.raises(ValueError, match=rf"Broken: expected it to return scores \[4, {VOCAB}\]"):
        chain.scores(random_scores(), NO_IDS)


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("vocab", [1, 2, VOCAB, 32003])
def test_draw_equals_multinomial(batch, vocab) -> None:
    scores = sampling.keep_top_k(random_scores(batch, vocab), 20)
    for seed in range(50):
        torch.manual_seed(seed)
        expected = torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
        after = torch.get_rng_state()
        torch.manual_seed(seed)
        assert torch.equal(sampling.draw(scores), expected)
        assert torch.equal(torch.get_rng_state(), after), "the generator must advance alike"
        private = sampling.seeded_generator(seed, CPU)
        assert torch.equal(sampling.draw(scores, private), expected)


def test_draw_follows_the_distribution() -> None:
    """Chi-square over 10^6 draws: 9 degrees of freedom, the 1e-6 tail is at 46.7."""
    probs = torch.tensor([0.3, 0.2, 0.15, 0.1, 0.08, 0.07, 0.05, 0.03, 0.015, 0.005])
    draws, rows = 1_000_000, 50_000
    generator = sampling.seeded_generator(1, CPU)
    counts = torch.zeros(10)
    for _ in range(draws // rows):
        ids = sampling.draw(probs.log().expand(rows, 10), generator)
        counts += torch.bincount(ids, minlength=10)
    chi_square = ((counts - draws * probs) ** 2 / (draws * probs)).sum().item()
    assert chi_square < 46.7
    # And the test can fail: the same counts against a distribution that is off by 1 % of a token.
    off = probs + torch.tensor([0.003, -0.003] + [0.0] * 8)
    assert ((counts - draws * off) ** 2 / (draws * off)).sum().item() > 46.7


def test_draw_never_takes_a_removed_token() -> None:
    scores = torch.full((2000, 5), -math.inf)
    scores[:, 3] = 0.0
    assert (sampling.draw(scores) == 3).all()


@pytest.mark.parametrize("do_sample", [False, True])
def test_unusable_rows(do_sample) -> None:
    nan, inf = math.nan, math.inf
    rows = {
        (0.0, 1.0): False,
        (-inf, 1.0): False,
        (-3e38, -3e38): False,
        (-inf, -inf): True,
        (nan, 1.0): True,
        (nan, nan): True,
        (nan, -inf): True,
        (inf, nan): True,
        (inf, 1.0): do_sample,  # greedy choice can take it, a softmax cannot
    }
    got = sampling.unusable_rows(torch.tensor(list(rows)), do_sample)
    assert got.tolist() == list(rows.values())


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_bad_scores_stay_visible_through_the_chain(bad) -> None:
    params = SamplingParams(
        do_sample=True,
        temperature=0.7,
        top_k=5,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.5,
        presence_penalty=1.0,
    )
    ids = torch.zeros(2, 3, dtype=torch.int64)
    chain = ScoreChain(params, ids, None, VOCAB)
    chain.record(torch.tensor([4, 4]))
    logits = random_scores(2)
    logits[1] = bad
    if math.isnan(bad):
        logits[1, 1:] = 0.5  # a single NaN, elsewhere than any limit looks
    got = sampling.unusable_rows(chain.scores(logits, ids), do_sample=True)
    assert got.tolist() == [False, True]


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, True, "7"])
def test_bad_seeds(seed) -> None:
    with pytest.raises(ValueError, match=r"seed: expected an integer from 0 to 2\*\*63 - 1"):
        sampling.seeded_generator(seed, CPU)


def test_the_last_draw_can_be_revoked() -> None:
    scores = random_scores()
    torch.manual_seed(3)
    expected = [sampling.draw(scores).tolist() for _ in range(3)]
    torch.manual_seed(3)
    draw = sampling.TokenDraw(None, CPU)
    for ids in expected[:2]:
        with draw.noted():
            assert draw.once(scores).tolist() == ids
    draw.revoke()
    assert sampling.draw(scores).tolist() == expected[1], "the second draw never happened"


def test_revoking_never_rewinds_what_others_drew() -> None:
    draw = sampling.TokenDraw(None, CPU)
    with draw.noted():
        draw.once(random_scores())
    torch.rand(1)
    state = torch.get_rng_state()
    draw.revoke()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_private_draw_leaves_the_global_generator_alone() -> None:
    scores, state = random_scores(), torch.get_rng_state()
    draw = sampling.TokenDraw(7, CPU)
    with draw.noted():
        draw.once(scores)
    draw.revoke()
    assert torch.equal(torch.get_rng_state(), state)


def test_global_generator_is_torchs_own() -> None:
    assert sampling.global_generator(CPU) is torch.default_generator
