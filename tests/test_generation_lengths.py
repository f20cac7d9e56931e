"""How long ``generate`` goes on: the context of a model, and the limits a call may set."""

from __future__ import annotations

import pytest
from exafuse.config import RopeConfig
from exafuse.generation.generate import GenerationConfig
from exafuse.generation.settings import context_length
from scripted_model import ScriptedModel


@pytest.mark.parametrize(
    ("rope", "positions", "context"),
    [
        ({}, 64, 64),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16}, 64, 64),
        ({"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 16}, 64, 64),
        ({"rope_type": "linear", "factor": 4.0}, 64, 256),
        ({"rope_type": "dynamic", "factor": 2.0}, 64, 128),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 64, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256, 256),
        ({"rope_type": "yarn", "original_max_position_embeddings": 64}, 256, 256),
    ],
    ids=str,
)
def test_context_length(rope: dict, positions: int, context: int) -> None:
    model = ScriptedModel([[1]], context=positions)
    model.config.rope = RopeConfig(**rope)
    assert context_length(model.config) == context


def test_the_last_position_can_be_used_and_none_beyond() -> None:
    model = ScriptedModel([[*range(20, 40)]], context=12)
    assert model.generate([1, 2], max_new_tokens=10).shape == (1, 12)
    assert model.generate([1, 2], max_length=12).shape == (1, 12)
    calls = len(model.caches)
    with pytest.raises(
        ValueError, match=r"max_new_tokens: expected at most 10, got 11: the prompt"
    ):
        model.generate([1, 2], max_new_tokens=11)
    with pytest.raises(ValueError, match=r"max_length: expected at most 12, got 13: the prompt"):
        model.generate([1, 2], max_length=13)
    assert len(model.caches) == calls, "refused before anything was computed"
    model.generation_config = GenerationConfig(max_new_tokens=500)
    assert model.generate([1, 2]).shape == (1, 12), "the model's own wish is cut to the context"


def test_padding_takes_no_context() -> None:
    model = ScriptedModel([[20] * 9, [21] * 9], context=12)
    config = GenerationConfig(pad_token_id=0)
    rows = [[1] * 8, [2]]
    assert model.generate(rows, max_new_tokens=4, generation_config=config).shape == (2, 12)
    mask = [[0, 1, 1], [0, 0, 1]]  # one column is padding in every row
    ids = [[0, 1, 2], [0, 0, 3]]
    assert model.generate(ids, attention_mask=mask, max_new_tokens=10).shape == (2, 13)
    with pytest.raises(
        ValueError, match="the prompt has 8 tokens and the context of the model is 12"
    ):
        model.generate(rows, max_new_tokens=5, generation_config=config)
