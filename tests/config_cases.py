"""Valid configs to spoil, and what a refusal must look like: shared by the tests of bad configs."""

from __future__ import annotations

import time
from typing import Any

import pytest
from exafuse.config import load_config
from exafuse.errors import ConfigError

S, F = "sliding_attention", "full_attention"
FULL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
    "use_cache": True,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
    "layer_types": [F, F, F],
}
FAMILY: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": False, "mlp_bias": True},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "exaone4": {"sliding_window": 8, "sliding_window_pattern": 4},
}
ROPE: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "truncate": True,
    },
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.0,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
    },
}


def expect_error(source: Any, *words: str) -> str:
    """load_config refuses, within two seconds, in words that include these; the whole message."""
    start = time.process_time()  # of this process: a busy machine is no defect
    with pytest.raises(ConfigError) as caught:
        load_config(source)
    assert time.process_time() - start < 2
    message = str(caught.value)
    for word in (*words, "expected", "got"):
        assert word in message, message
    assert len(message) < 700
    message.encode("utf-8")
    return message
