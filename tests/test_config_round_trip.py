"""ModelConfig.to_dict: transformers builds the same model from it as from the original config."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from exafuse.config import load_config

S, F = "sliding_attention", "full_attention"
HF_CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "exaone4": (transformers.Exaone4Config, transformers.Exaone4ForCausalLM),
}


def random_rope(rng: random.Random, head_dim: int) -> dict[str, Any]:
    kind = rng.choice(["default", "linear", "dynamic", "llama3", "yarn", "longrope"])
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": rng.choice([1e4, 5e5, 1e6])}
    if kind != "default":
        rope["factor"] = rng.choice([1.0, 2.0, 8.5])
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": rng.choice([2.0, 4.0])}
    if kind in ("llama3", "yarn", "longrope"):
        rope["original_max_position_embeddings"] = rng.choice([32, 64, 256])
    if kind == "yarn" and rng.random() < 0.5:
        rope |= {"mscale": 0.7, "mscale_all_dim": 1.1, "truncate": False, "beta_fast": 16.0}
        rope["factor"] = rng.choice([2.0, None])
    if kind == "longrope":
        rope["short_factor"] = [rng.uniform(1, 2) for _ in range(head_dim // 2)]
        rope["long_factor"] = [rng.uniform(1, 9) for _ in range(head_dim // 2)]
        rope["attention_factor"] = rng.choice([None, 1.25])
        rope = {key: value for key, value in rope.items() if value is not None}
    return rope


def random_config(seed: int) -> dict[str, Any]:
    """A legal config.json in the newer layout, of any family, small enough to run."""
    rng = random.Random(seed)
    model_type = rng.choice(list(HF_CLASSES))
    layers, head_dim = rng.randint(1, 5), rng.choice([8, 16, 32])
    values: dict[str, Any] = {
        "model_type": model_type,
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": rng.choice([1, 2, 4]),
        "head_dim": head_dim,
        "max_position_embeddings": 256,
    }
    values["rope_parameters"] = random_rope(rng, head_dim)
    values["tie_word_embeddings"] = rng.random() < 0.5
    values["rms_norm_eps"] = rng.choice([1e-5, 1e-6])
    values["eos_token_id"] = rng.choice([None, 3, [3, 4]])
    values["pad_token_id"] = rng.choice([None, 5])
    values["dtype"] = rng.choice(["float32", "bfloat16"])
    if model_type == "llama":
        values |= {"attention_bias": rng.random() < 0.5, "mlp_bias": rng.random() < 0.5}
    elif rng.random() < 0.7:
        values["sliding_window"] = rng.choice([2, 5])
        values["use_sliding_window"] = True
        values["layer_types"] = [rng.choice([S, F]) for _ in range(layers)]
    else:
        values |= {"sliding_window": None, "layer_types": [F] * layers}
    if model_type == "exaone4":
        values.pop("use_sliding_window", None)
    return values


@pytest.mark.parametrize("seed", range(60))
def test_to_dict_is_the_same_model_in_transformers(seed: int, tmp_path: Path) -> None:
    """to_dict -> file -> transformers: the same shapes, rotations, windows and logits."""
    values = random_config(seed)
    config = load_config(values)
    assert load_config(config.to_dict()) == config
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    ours = transformers.AutoConfig.from_pretrained(tmp_path)
    theirs = HF_CLASSES[config.model_type][0](**values)
    assert type(ours) is type(theirs)
    assert ours.architectures == [HF_CLASSES[config.model_type][1].__name__]
    assert load_config(ours.to_dict()) == config  # and back from the newer layout

    models = []
    for hf_config in (ours, theirs):
        hf_config._attn_implementation = "eager"
        torch.manual_seed(seed)
        models.append(HF_CLASSES[config.model_type][1](hf_config).float().eval())
    shapes = [{n: p.shape for n, p in model.named_parameters()} for model in models]
    assert shapes[0] == shapes[1]
    assert sum(p.numel() for p in models[0].parameters()) == config.num_parameters()
    ids = torch.randint(0, 97, (1, 12), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        logits = [model(ids).logits for model in models]
    assert torch.equal(logits[0], logits[1])


def test_random_configs_cover_every_family_and_rope_type() -> None:
    """The sixty seeds above meet each family with each type."""
    met = {
        (values["model_type"], values["rope_parameters"]["rope_type"])
        for values in map(random_config, range(60))
    }
    types = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
    assert met == set(itertools.product(HF_CLASSES, types))
