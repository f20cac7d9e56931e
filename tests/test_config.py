"""What load_config makes of good files: golden layer plans, both layouts, the families' rules."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from exafuse.config import LayerPlan, ModelConfig, RopeConfig, load_config
from exafuse.errors import ConfigError
from exafuse.kv_cache import KVCache

CONFIGS = Path(__file__).parent / "data" / "configs"
S, F = "sliding_attention", "full_attention"
TINY = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "max_position_embeddings": 256,
}
HF_CONFIGS = {
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "exaone4": transformers.Exaone4Config,
}
LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def tiny(model_type: str, **changes: Any) -> dict[str, Any]:
    """A small valid config.json of the family."""
    return {**TINY, "model_type": model_type, **changes}


def load(model_type: str, **changes: Any) -> ModelConfig:
    return load_config(tiny(model_type, **changes))


def llama3(theta: float, factor: float) -> RopeConfig:
    values = {**LLAMA3, "factor": factor, "theta": theta}
    return RopeConfig(**values)


def default_rope(theta: float) -> RopeConfig:
    return RopeConfig(theta=theta)


YARN_4X = RopeConfig(
    rope_type="yarn", theta=1e6, factor=4.0, original_max_position_embeddings=32768
)
# file: parameters, layers, heads, kv heads, head_dim, window, RoPE, tied, eos
RELEASED = {
    "exaone-4.0-32b": (32003216384, 64, 40, 8, 128, 4096, llama3(1e6, 16.0), False, (361,)),
    "exaone-4.0-1.2b": (1279391488, 30, 32, 8, 64, None, llama3(1e6, 16.0), True, (361,)),
    "exaone-4.5-33b": (34350097664, 64, 40, 8, 128, 4096, llama3(1e6, 16.0), False, (53,)),
    "qwen2-0.5b": (494032768, 24, 14, 2, 64, None, default_rope(1e6), True, (151643,)),
    "qwen2-1.5b": (1543714304, 28, 12, 2, 128, None, default_rope(1e6), True, (151643,)),
    "qwen2-7b": (7615616512, 28, 28, 4, 128, None, default_rope(1e6), False, (151643,)),
    "qwen2-72b": (72706203648, 80, 64, 8, 128, None, YARN_4X, False, (151645, 151643)),
    "llama-2-7b": (6738415616, 32, 32, 32, 128, None, default_rope(1e4), False, (2,)),
    "llama-3-8b": (8030261248, 32, 32, 8, 128, None, default_rope(5e5), False, (128001,)),
    "llama-3.1-8b": (
        *(8030261248, 32, 32, 8, 128, None, llama3(5e5, 8.0), False),
        (128001, 128008, 128009),
    ),
    "llama-3.2-1b": (1235814400, 16, 32, 8, 64, None, llama3(5e5, 32.0), True, (128001,)),
    "llama-3.2-3b": (3212749824, 28, 24, 8, 128, None, llama3(5e5, 32.0), True, (128001,)),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_config_golden(name: str) -> None:
    parameters, layers, heads, kv_heads, head_dim, window, rope, tied, eos = RELEASED[name]
    config = load_config(CONFIGS / f"{name}.json")
    assert config.num_parameters() == parameters
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (layers, heads, kv_heads)
    assert (config.head_dim, config.sliding_window) == (head_dim, window)
    assert config.rope == rope
    assert (config.tie_word_embeddings, config.eos_token_id) == (tied, eos)
    assert config.dtype == ("float16" if name == "llama-2-7b" else "bfloat16")
    assert config.rms_norm_eps == (1e-6 if name.startswith("qwen2") else 1e-5)
    assert config.qk_norm == name.startswith("exaone")
    assert config.qkv_bias == name.startswith("qwen2")
    assert not config.o_bias
    assert not config.mlp_bias

    norm = "post" if name.startswith("exaone") else "pre"
    expected = []
    for index in range(layers):
        if window is not None and index % 4 != 3:  # three sliding layers, then a global one
            expected.append(LayerPlan(index, S, (4095, 0), True, norm))
        else:
            expected.append(LayerPlan(index, F, (-1, 0), window is None, norm))
    assert config.layers == tuple(expected)


def test_cache_bytes_released() -> None:
    config = load_config(CONFIGS / "exaone-4.0-32b.json")
    per_token = 2 * 8 * 128 * 2  # key and value, bf16
    # 48 rings of 4095 + 2048 slots, rounded up to 6144, and 16 layers that keep everything
    assert config.cache_bytes(1, 131072, 2) == per_token * (48 * 6144 + 16 * 131072)
    assert config.cache_bytes(3, 1000, 2) == 3 * per_token * 64 * 1024
    assert config.cache_bytes(1, 131072, 2, chunk=1) == per_token * (48 * 4096 + 16 * 131072)


def test_cache_bytes_are_what_a_cache_takes() -> None:
    config = load("exaone4", sliding_window=300, sliding_window_pattern=2)
    for context, chunk in ((1, 64), (128, 64), (129, 64), (384, 64), (400, 64), (2000, 2048)):
        options = {"dtype": torch.float16, "device": "cpu", "max_length": context, "chunk": chunk}
        cache = KVCache(config, 2, **options)
        assert config.cache_bytes(2, context, 2, chunk) == cache.nbytes


def test_load_config_sources(tmp_path: Path) -> None:
    values = tiny("qwen2")
    (tmp_path / "config.json").write_text(json.dumps(values))
    expected = load_config(values)
    for source in (tmp_path, str(tmp_path), tmp_path / "config.json"):
        assert load_config(source) == expected
    with pytest.raises(TypeError, match="folder, a path or a mapping"):
        load_config(3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"nowhere.*cannot open"):
        load_config(tmp_path / "nowhere")


@pytest.mark.parametrize("model_type", HF_CONFIGS)
def test_class_defaults_are_those_of_transformers(model_type: str) -> None:
    ours = load_config({"model_type": model_type})
    assert ours == load_config(HF_CONFIGS[model_type]().to_dict())
    assert load("llama", hidden_size=128, head_dim=None).head_dim == 32
    assert load("llama", num_key_value_heads=None).num_kv_heads == 4
    assert load("exaone4", head_dim=None).head_dim == 16  # transformers crashes on this null


EXAONE_LAYERS: dict[str, tuple[dict[str, Any], int | None, str]] = {
    "default": ({}, 4096, "SSSFSS"),
    "int": ({"sliding_window_pattern": 2, "sliding_window": 8}, 8, "SFSFSF"),
    "int-1": ({"sliding_window_pattern": 1, "sliding_window": 8}, 8, "FFFFFF"),
    "int-beyond-layers": ({"sliding_window_pattern": 9, "sliding_window": 8}, 8, "SSSSSS"),
    "LLLG": ({"sliding_window_pattern": "LLLG", "sliding_window": 8}, 8, "SSSFSS"),
    "GL": ({"sliding_window_pattern": "GL", "sliding_window": 8}, 8, "FSFSFS"),
    "string-beyond-layers": ({"sliding_window_pattern": "LLLLGLLLLG"}, 4096, "SSSSFS"),
    "no-window": ({"sliding_window": None}, None, "FFFFFF"),
    "no-window-null": ({"sliding_window": None, "sliding_window_pattern": None}, None, "FFFFFF"),
    "no-window-0": ({"sliding_window": None, "sliding_window_pattern": 0}, None, "FFFFFF"),
    "no-window-LLLG": ({"sliding_window": None, "sliding_window_pattern": "LLLG"}, None, "FFFFFF"),
    "types-win": ({"layer_types": [F, F, S, S, F, S], "sliding_window_pattern": 4}, 4096, "FFSSFS"),
    "nope-everywhere": ({"layer_types": [F] * 6, "sliding_window": 5}, 5, "FFFFFF"),
    "window-1": ({"sliding_window": 1, "sliding_window_pattern": 2}, 1, "SFSFSF"),
    "window-beyond-context": ({"sliding_window": 10**6}, 10**6, "SSSFSS"),
    "with-mtp": ({"num_nextn_predict_layers": 1}, 4096, "SSSFSS"),
}


@pytest.mark.parametrize("case", EXAONE_LAYERS)
def test_exaone_layer_rules(case: str) -> None:
    changes, window, letters = EXAONE_LAYERS[case]
    config = load("exaone4", num_hidden_layers=6, **changes)
    assert config.sliding_window == window
    assert config.layer_types == tuple(S if letter == "S" else F for letter in letters)
    for plan, letter in zip(config.layers, letters, strict=True):
        assert plan.window_size == ((window - 1, 0) if letter == "S" else (-1, 0))
        assert plan.rope == (window is None or letter == "S")
        assert plan.norm == "post"


QWEN2_LAYERS: dict[str, tuple[dict[str, Any], int | None, str]] = {
    "published": ({"sliding_window": 131072, "max_window_layers": 3}, None, "FFF"),
    "window": (
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        4,
        "FSS",
    ),
    "window-null": ({"use_sliding_window": True, "sliding_window": None}, None, "FFF"),
    "window-late": ({"use_sliding_window": True, "sliding_window": 4}, 4, "FFF"),
    "types": ({"use_sliding_window": True, "layer_types": [S, F, S]}, 4096, "SFS"),
    "types-full": ({"layer_types": [F, F, F]}, None, "FFF"),
}


@pytest.mark.parametrize("case", QWEN2_LAYERS)
def test_qwen2_layer_rules(case: str) -> None:
    changes, window, letters = QWEN2_LAYERS[case]
    config = load("qwen2", **changes)
    assert config.sliding_window == window
    assert config.layer_types == tuple(S if letter == "S" else F for letter in letters)
    assert all(plan.rope and plan.norm == "pre" for plan in config.layers)


def test_biases() -> None:
    llama = load("llama", attention_bias=True, mlp_bias=True)
    assert (llama.qkv_bias, llama.o_bias, llama.mlp_bias) == (True, True, True)
    qwen2 = load("qwen2")
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.mlp_bias) == (True, False, False)
    exaone = load("exaone4")
    assert (exaone.qkv_bias, exaone.o_bias, exaone.mlp_bias) == (False, False, False)


def test_rope_precedence() -> None:
    linear, yarn = {"type": "linear", "factor": 2.0}, {"rope_type": "yarn", "factor": 3.0}
    # rope_scaling replaces rope_parameters as a whole, its rope_theta included
    config = load("llama", rope_scaling=linear, rope_parameters={**yarn, "rope_theta": 7.0})
    assert config.rope == RopeConfig(rope_type="linear", factor=2.0, theta=1e4)
    config = load("llama", rope_scaling=linear, rope_theta=5.0)
    assert config.rope.theta == 5.0
    config = load("llama", rope_scaling={**linear, "rope_theta": 9.0}, rope_theta=5.0)
    assert config.rope.theta == 9.0
    # an empty or null rope_scaling is none
    for nothing in ({}, None):
        config = load("llama", rope_scaling=nothing, rope_parameters=yarn)
        assert config.rope.rope_type == "yarn"
    # the original length: outside beats inside beats max_position_embeddings
    inside = {**yarn, "original_max_position_embeddings": 64}
    original = "original_max_position_embeddings"
    assert load("llama", rope_parameters=yarn).rope.original_max_position_embeddings == 256
    assert load("llama", rope_parameters=inside).rope.original_max_position_embeddings == 64
    config = load("llama", rope_parameters=inside, **{original: 32})
    assert config.rope.original_max_position_embeddings == 32
    # both spellings of the type, in agreement
    assert load("llama", rope_scaling={**linear, "rope_type": "linear"}).rope.factor == 2.0
    assert load("llama", rope_parameters={"rope_theta": 8.0}).rope == RopeConfig(theta=8.0)


def test_token_ids_and_dtype() -> None:
    assert load("llama", eos_token_id=[5, 6]).eos_token_id == (5, 6)
    assert load("llama", eos_token_id=None).eos_token_id == ()
    assert load("llama", pad_token_id=-1).pad_token_id is None
    assert load("llama").dtype == "float32"
    assert load("llama", torch_dtype="float16").dtype == "float16"
    assert load("llama", torch_dtype="float16", dtype="float16").dtype == "float16"


def test_attention_dropout_is_remembered() -> None:
    assert load("qwen2", attention_dropout=0.25).attention_dropout == 0.25
    assert load("llama", attention_dropout=None).attention_dropout == 0.0


def test_import_needs_no_torch() -> None:
    """Reading a config (``exafuse plan``) starts without torch and transformers."""
    code = "import sys, exafuse.config; print({'torch', 'transformers'} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"
