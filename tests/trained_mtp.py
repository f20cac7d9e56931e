"""A tiny EXAONE 4.5 language model and draft head, trained for seconds on made-up phrases.

Phrases of four to eight tokens follow each other; after each, one of three others comes. So the
next token is sure within a phrase and a guess at its end: drafts are accepted sometimes.
"""

from __future__ import annotations

import functools
import random
from typing import Any

import exafuse
import pytest
import torch
import torch.nn.functional as F
from exafuse.generation import speculative
from exafuse.generation.acceptance import Decision
from exafuse.layers import Step
from exafuse.models.causal_lm import CausalLM
from exafuse.rotary import RotaryState
from torch import Tensor

CONFIG: dict[str, Any] = {
    "model_type": "exaone4_5",
    "tie_word_embeddings": True,
    "text_config": {
        "model_type": "exaone4_5_text",
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": 9,
        "layer_types": [
            "sliding_attention",
            "full_attention",
            "sliding_attention",
            "sliding_attention",  # the head's
        ],
        "num_nextn_predict_layers": 1,
        "max_position_embeddings": 1024,
        "initializer_range": 0.1,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "vision_config": {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "num_key_value_heads": 1,
        "out_hidden_size": 48,
        "window_size": 56,
        "fullatt_block_indexes": [1],
    },
    "image_token_id": 7,
    "video_token_id": 8,
}
_STEPS = 70
_BATCH, _LENGTH = 16, 40


class Phrases:
    """An endless text of tokens 1 to 96."""

    def __init__(self, seed: int = 0):
        self._random = random.Random(seed)
        draw = random.Random(7)
        self._phrases = [
            [draw.randrange(1, 97) for _ in range(draw.randint(4, 8))] for _ in range(20)
        ]
        self._next = [draw.sample(range(20), 3) for _ in range(20)]

    def ids(self, length: int) -> list[int]:
        """So many tokens, from somewhere within a phrase."""
        text: list[int] = []
        phrase = self._random.randrange(20)
        start = self._random.randrange(4)
        while len(text) < start + length:
            text += self._phrases[phrase]
            phrase = self._random.choices(self._next[phrase], weights=[5, 3, 2])[0]
        return text[start : start + length]

    def batch(self, rows: int, length: int) -> Tensor:
        """int64 ``[rows, length]``."""
        return torch.tensor([self.ids(length) for _ in range(rows)])


def head_states(model: CausalLM, embeds: Tensor, hidden: Tensor) -> Tensor:
    """The head over whole rows ``[batch, pairs, hidden_size]`` at once, without a cache."""
    batch, pairs = hidden.shape[:2]
    cos, sin = model.rotary(pairs, hidden.device, RotaryState())
    positions = torch.arange(pairs, dtype=torch.int32).repeat(batch)
    starts = torch.arange(0, batch * pairs + 1, pairs, dtype=torch.int32)
    step = Step(cos, sin, positions, starts, pairs, None, {})
    out = model.mtp(embeds.flatten(0, 1), hidden.flatten(0, 1), step, model.backend)
    return out.view(batch, pairs, -1)


@functools.cache
def trained() -> CausalLM:
    """The model; the same in every process with one thread."""
    torch.manual_seed(0)
    model = exafuse.from_config(CONFIG, dtype="float32", device="cpu", backend="reference", seed=0)
    text = Phrases()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=6e-3, total_steps=_STEPS)
    model.train()
    for _ in range(_STEPS):
        ids = text.batch(_BATCH, _LENGTH)
        out = model(ids, labels=ids, output_hidden_states=True)
        hidden = out.hidden_states[-1].detach()
        embeds = model.text.embed_tokens(ids).detach()
        logits = model.lm_head(head_states(model, embeds[:, 1:], hidden[:, :-1])[:, :-1])
        loss = out.loss + 0.5 * F.cross_entropy(logits.flatten(0, 1), ids[:, 2:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    model.prefill_chunk = 32  # short prompts are read in several chunks
    return model.requires_grad_(False)


def padded_prompts() -> tuple[Tensor, Tensor]:
    """Ids and mask ``[5, 30]`` of left-padded prompts of 30, 1, 7, 19 and 2 tokens."""
    ids = Phrases(11).batch(5, 30)
    mask = (torch.arange(30) >= 30 - torch.tensor([30, 1, 7, 19, 2])[:, None]).long()
    return ids * mask, mask


def length_of(answer: list[int], eos: list[int]) -> int:
    """Tokens up to the first of these ids."""
    ends = [at for at, token in enumerate(answer) if token in eos]
    return ends[0] + 1 if ends else len(answer)


def watch_decisions(monkeypatch: pytest.MonkeyPatch) -> list[Decision]:
    """A list that every decision about drafts will be put into."""
    taken: list[Decision] = []
    decide = speculative.decide

    def watched(*args: Any, **kwargs: Any) -> Decision:
        taken.append(decide(*args, **kwargs))
        return taken[-1]

    monkeypatch.setattr(speculative, "decide", watched)
    return taken
