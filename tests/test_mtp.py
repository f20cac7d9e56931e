"""The multi-token prediction head against one made of transformers' modules, and its cache."""

from __future__ import annotations

import random
from typing import Any

import exafuse
import pytest
import torch
from exafuse.errors import ConfigError
from exafuse.generation.acceptance import Decision
from exafuse.generation.call import Call
from exafuse.generation.drafts import MtpDrafter
from exafuse.generation.prompts import Prompt
from exafuse.generation.sampling import SamplingParams, ScoreChain, TokenDraw
from exafuse.generation.settings import Settings
from exafuse.models.causal_lm import CausalLM
from exafuse.models.mtp import MTPHead
from exafuse.ops.front_door import emulator_problem
from exafuse.verification.mtp import PlainHead, draft_logits, relative_error
from exafuse.weights.names import unmerged_state_dict
from torch import Tensor
from trained_mtp import CONFIG

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e6,
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def model(seed: int = 0, backend: str = "reference", **text: Any) -> CausalLM:
    """Random weights with norms far from 1; ``text`` changes the language model."""
    config = {**CONFIG, "text_config": {**CONFIG["text_config"], **text}}
    vision = {**CONFIG["vision_config"], "out_hidden_size": config["text_config"]["hidden_size"]}
    config["vision_config"] = vision
    made = exafuse.from_config(config, "float32", "cpu", backend=backend, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in made.named_parameters():
        scale, centre = (0.3, 1.0) if "norm" in name else (0.15, 0.0)
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = centre + scale * noise
    return made.requires_grad_(False)


def random_text_config(seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    group, kv, head_dim = rng.randint(1, 8), rng.choice([1, 2, 3]), rng.choice([8, 16, 24, 32])
    window = rng.choice([None, 2, 3, 5, 9, 40])
    kinds = ["full_attention" if window is None else "sliding_attention"] * 4
    if window is not None and rng.random() < 0.3:
        kinds[3] = "full_attention"  # then the head's layer does not rotate
    config: dict[str, Any] = {
        "num_attention_heads": group * kv,
        "num_key_value_heads": kv,
        "head_dim": head_dim,
        "hidden_size": 8 * group * kv,
        "intermediate_size": rng.choice([40, 96]),
        "sliding_window": window,
        "layer_types": kinds,
        "rms_norm_eps": rng.choice([1e-5, 1e-6]),
    }
    if rng.random() < 0.5:
        config["rope_parameters"] = LLAMA3
    return config


def text_states(m: CausalLM, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What entered the first layer and what left the final norm: ``[tokens, hidden_size]``."""
    states = m(ids, use_cache=False, output_hidden_states=True).hidden_states
    return states[0][0], states[-1][0]


def plain_head(m: CausalLM) -> PlainHead:
    return PlainHead(m.config, unmerged_state_dict(m))


@torch.no_grad()
@pytest.mark.parametrize("seed", range(40))
def test_draft_logits_equal_a_plain_head(seed: int) -> None:
    rng = random.Random(seed)
    m = model(seed, **random_text_config(seed))
    ids = torch.randint(1, 97, (1, rng.choice([2, 3, 9, 30, 70, 150])))
    embeds, hidden = text_states(m, ids)
    m.prefill_chunk = rng.choice([1, 7, 32, 2048])  # a ring of 128 slots wraps at 150 tokens
    drafted = torch.randint(1, 97, (rng.randint(0, 4),))
    pairs = embeds[1:], hidden[:-1], drafted
    ours = draft_logits(m, *pairs)
    plain = plain_head(m).draft_logits(*pairs, m.text.embed_tokens, m.lm_head)
    assert ours.shape == (ids.shape[1] - 1 + len(drafted), 97)
    assert relative_error(ours, plain) <= 1e-5


@torch.no_grad()
def test_the_plain_head_notices_what_may_go_wrong() -> None:
    """Swapped halves, a skipped norm and the wrong token each move the scores far away."""
    m = model(1)
    ids = torch.randint(1, 97, (1, 30))
    embeds, hidden = text_states(m, ids)
    none = torch.empty(0, dtype=torch.int64)
    plain = plain_head(m)
    right = plain.draft_logits(embeds[1:], hidden[:-1], none, m.text.embed_tokens, m.lm_head)
    assert relative_error(draft_logits(m, embeds[:-1], hidden[:-1], none), right) > 0.1
    fc = m.mtp.fc.weight
    m.mtp.fc.weight = torch.nn.Parameter(torch.cat(fc.split(fc.shape[0], dim=1)[::-1], dim=1))
    assert relative_error(draft_logits(m, embeds[1:], hidden[:-1], none), right) > 0.1
    m.mtp.fc.weight = fc
    m.mtp.norm.weight = torch.nn.Parameter(torch.ones_like(m.mtp.norm.weight))
    assert relative_error(draft_logits(m, embeds[1:], hidden[:-1], none), right) > 0.1


def drafter(m: CausalLM, ids: Tensor, mask: Tensor) -> MtpDrafter:
    """One for a greedy answer to a prompt that it has yet to read."""
    settings = Settings(SamplingParams(), (), None, (), None, None, frozenset(), False)
    call = Call(
        model=m,
        prompt=Prompt(ids, mask, int(mask.sum(1).max())),
        settings=settings,
        processors=(),
        criteria=(),
        streamer=None,
        tokenizer=None,
        draw=TokenDraw(None, m.device),
        keep_cache=False,
        keep_scores=False,
        progress=None,
        media={},
    )
    return MtpDrafter(call, ids.shape[1])


def decision(tokens: list[list[int]], columns: int) -> Decision:
    """What brought each row these tokens, out of at most ``columns``."""
    ids = torch.tensor([(row + [1] * columns)[:columns] for row in tokens])
    rows = len(tokens)
    return Decision(ids, tokens, [0] * rows, [False] * rows, [-1] * rows, ())


@torch.no_grad()
@pytest.mark.parametrize("chunk", [pytest.param(5, marks=pytest.mark.slow), 16, 2048])
def test_drafts_after_rollbacks_equal_those_of_a_head_that_reads_all_anew(chunk: int) -> None:
    """A ragged batch whose rows advance by unequal steps, until its rings wrap."""
    m = model(3)
    m.prefill_chunk = chunk
    lengths, columns = [60, 1, 23, 2], 60
    prompt = torch.randint(1, 97, (4, columns))
    mask = (torch.arange(columns) >= columns - torch.tensor(lengths)[:, None]).long()
    d, cache = drafter(m, prompt, mask), m.new_cache(4)
    for packing, embeds, states in m.next_hidden(prompt, cache, mask):
        d.read_prompt(packing, embeds, states)
        hidden = states[packing.last_tokens(m.device).clamp(min=0)][:, None]
    mark, plain = cache.mark(), plain_head(m)
    chain = ScoreChain(SamplingParams(), prompt, None, 97)
    texts = [prompt[row, columns - n :].tolist() for row, n in enumerate(lengths)]
    rng = random.Random(chunk)
    brought = [[rng.randrange(1, 97)] for _ in texts]
    for _ in range(40):
        for text, tokens in zip(texts, brought, strict=True):
            text += tokens
        drafts = d.propose(3, chain, decision(brought, hidden.shape[1]), hidden).ids
        for text, drafted in zip(texts, drafts, strict=True):
            embeds, states = text_states(m, torch.tensor([text]))
            logits = plain.draft_logits(
                embeds[1:], states[:-1], drafted[:2], m.text.embed_tokens, m.lm_head
            )
            assert drafted.tolist() == logits[-3:].argmax(-1).tolist()
        # Three tokens are tried, of which rows take 0 to 3; another one follows those.
        tried = [[rng.randrange(1, 97) for _ in range(3)] for _ in texts]
        feed = torch.tensor([[text[-1], *row] for text, row in zip(texts, tried, strict=True)])
        ((packing, _, states),) = m.next_hidden(feed, cache)
        hidden = packing.pad(states)
        brought = [[*row[: rng.randint(0, 3)], rng.randrange(1, 97)] for row in tried]
        new = [len(text) - n + len(b) for text, n, b in zip(texts, lengths, brought, strict=True)]
        cache.keep_after(mark, [n - 1 for n in new])
        assert cache.lengths == [n + start - 1 for n, start in zip(new, lengths, strict=True)]
    assert max(cache.lengths) > 128
    assert cache.layers[0].ring == (chunk < 2048)


def test_a_head_of_another_depth_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"num_nextn_predict_layers: expected 1, got 2; .*mtp=Fa"):
        MTPHead(model().config.with_mtp_layers(2))


def test_an_untrained_head_changes_no_answer() -> None:
    m = model(2)
    m.prefill_chunk = 16
    ids = torch.randint(1, 97, (3, 25), generator=torch.Generator().manual_seed(0))
    plain = m.generate(ids, max_new_tokens=30)
    assert torch.equal(m.generate(ids, max_new_tokens=30, draft="mtp"), plain)


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


@torch.no_grad()
@pytest.mark.emulated
@pytest.mark.skipif(bool(emulator_problem()), reason=emulator_problem())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_head_on_the_kernels_is_as_near_to_fp32_as_the_plain_one(dtype: torch.dtype) -> None:
    """Reading 60 pairs, and drafting from them, with weights that the dtype holds exactly."""
    m = model(5, "emulated", num_attention_heads=6, num_key_value_heads=2, hidden_size=96).to(dtype)
    exact = PlainHead(m.config, {k: v.float() for k, v in unmerged_state_dict(m).items()})
    plain = PlainHead(m.config, unmerged_state_dict(m), dtype=dtype)
    ids, drafted = torch.randint(1, 97, (1, 61)), torch.randint(1, 97, (3,))
    embeds, hidden = text_states(m, ids)
    embed, lm_head = m.text.embed_tokens, m.lm_head
    m.prefill_chunk = 32
    ours = draft_logits(m, embeds[1:], hidden[:-1], drafted)
    theirs = plain.draft_logits(embeds[1:], hidden[:-1], drafted, embed, lm_head)
    truth = exact.draft_logits(
        embeds[1:].float(),
        hidden[:-1].float(),
        drafted,
        lambda token: embed(token).float(),
        lambda x: torch.nn.functional.linear(x, lm_head.weight.float()),
    )
    assert rms(ours - truth) <= 1.25 * rms(theirs - truth)


@torch.no_grad()
@pytest.mark.emulated
@pytest.mark.skipif(bool(emulator_problem()), reason=emulator_problem())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_drafts_are_verified_on_the_kernels(dtype: torch.dtype) -> None:
    """Several queries a row in one decode call, rows cut back by unequal numbers of tokens. In half
    precision matrix products of another shape round so much that near ties are left out."""
    m = model(6, "emulated").to(dtype)
    m.prefill_chunk = 16
    ids = torch.randint(1, 97, (3, 9), generator=torch.Generator().manual_seed(1))
    ids = torch.cat((ids, ids), dim=1)
    kwargs: dict[str, Any] = {"max_new_tokens": 24, "return_dict_in_generate": True}
    plain = m.generate(ids, output_scores=True, **kwargs)
    for kind in ("mtp", "prompt_lookup"):
        out = m.generate(ids, draft=kind, **kwargs)
        for row, (ours, theirs) in enumerate(zip(out.sequences, plain.sequences, strict=True)):
            differing = (ours != theirs).nonzero()
            if len(differing):
                best, second = plain.scores[int(differing[0]) - 18][row].topk(2).values.tolist()
                limit = {torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype]
                assert best - second < limit * abs(best)
        if kind == "prompt_lookup":
            assert 0 < out.draft_stats.accepted < out.draft_stats.drafted
