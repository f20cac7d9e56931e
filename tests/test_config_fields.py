"""Every config field with wrong values, and fields that contradict each other: ConfigErrors."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import pytest
from config_cases import FAMILY, FULL, ROPE, F, S, expect_error
from exafuse.config import load_config

NAN, INF = math.nan, math.inf
WORDS = ["32", "", "true", "null"]
BAD_BY_TYPE: dict[str, list[Any]] = {
    "integer": [*WORDS, True, False, 2.5, 32.0, [4], {}, -7, NAN, INF, 2**70],
    "number": [*WORDS, True, False, [1.0], {"a": 1}, -1.0, NAN, INF, -INF, 10**400],
    "boolean": [*WORDS, 0, 1, 1.0, [True], {}, "false", NAN],
    "string": [0, 1.5, True, ["silu"], {}, "", "SILU", "relu", "a" * 10**5],
    "list": ["1", 1.5, True, {}, -1, NAN, [[]], [None], [True], ["x" * 10**5]],
}
NULLABLE = {
    *("head_dim", "num_key_value_heads", "layer_types", "sliding_window", "torch_dtype"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout", "rope_theta"),
    *("sliding_window_pattern", "rope_scaling", "attention_factor", "beta_fast", "beta_slow"),
    *("mscale", "mscale_all_dim", "truncate", "original_max_position_embeddings"),
}


def kind_of(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    names = {int: "integer", float: "number", str: "string", list: "list"}
    return names[type(value)]


def bad_values(key: str, good: Any, nullable: bool) -> list[Any]:
    values = list(BAD_BY_TYPE[kind_of(good)])
    if key == "sliding_window_pattern":
        values = [v for v in values if v != ""] + ["XYZ", "lllg", "LLLX", 0]
    return values if nullable else [*values, None]


@pytest.mark.parametrize("model_type", FAMILY)
def test_every_field_with_wrong_values(model_type: str) -> None:
    base = {"model_type": model_type, **FULL, **FAMILY[model_type]}
    load_config(base)
    tried = 0
    for key, good in base.items():
        for bad in bad_values(key, good, key in NULLABLE):
            expect_error({**base, key: bad}, "config: ", key)
            tried += 1
    assert tried >= 9 * len(base)


def test_every_text_field_of_exaone4_5_with_wrong_values() -> None:
    text = {"model_type": "exaone4_5_text", **FULL, **FAMILY["exaone4"]}
    del text["tie_word_embeddings"]  # only the outer one counts
    load_config({"model_type": "exaone4_5", "text_config": text})
    for key, good in text.items():
        for bad in bad_values(key, good, key in NULLABLE):
            changed = {"model_type": "exaone4_5", "text_config": {**text, key: bad}}
            expect_error(changed, f"text_config.{key}")
    for bad in (None, [], "text", 3, True):
        expect_error({"model_type": "exaone4_5", "text_config": bad}, "text_config")


VISION = {
    "depth": 2,
    "hidden_size": 64,
    "hidden_act": "silu",
    "intermediate_size": 80,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "in_channels": 3,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "window_size": 112,
    "initializer_range": 0.02,
}


def test_every_vision_field_with_wrong_values() -> None:
    text = {"model_type": "exaone4_5_text", **FULL, **FAMILY["exaone4"]}
    del text["tie_word_embeddings"]
    vision = {**VISION, "out_hidden_size": text["hidden_size"]}
    base = {"model_type": "exaone4_5", "text_config": text, "vision_config": vision}
    base |= {"image_token_id": 7, "video_token_id": 8}
    load_config(base)
    for key, good in vision.items():
        for bad in bad_values(key, good, False):
            expect_error({**base, "vision_config": {**vision, key: bad}}, f"vision_config.{key}")
    for key in ("image_token_id", "video_token_id"):
        for bad in bad_values(key, 7, False):
            expect_error({**base, key: bad}, f"config: {key}")
    for key in ("num_nextn_predict_layers", "_num_mtp_layers"):
        for bad in (-1, 1.5, "1", True, [1], 2**40):
            expect_error({**base, "text_config": {**text, key: bad}}, f"text_config.{key}")
            expect_error({**base, key: bad}, f"config: {key}")
    for bad in ([], "vision", 3, True):
        expect_error({**base, "vision_config": bad}, "vision_config")
    for bad in ([[1]], "1", 1.5, True, [2**40]):
        changed = {**vision, "fullatt_block_indexes": bad}
        expect_error({**base, "vision_config": changed}, "vision_config.fullatt_block_indexes")


@pytest.mark.parametrize("layout", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("rope_type", ROPE)
def test_every_rope_field_with_wrong_values(rope_type: str, layout: str) -> None:
    base = {"model_type": "llama", **FULL}
    rope = {"rope_type": rope_type, "rope_theta": 1e4, **ROPE[rope_type]}
    load_config({**base, layout: rope})
    for key, good in rope.items():
        nullable = key in NULLABLE or (key == "factor" and rope_type in ("yarn", "longrope"))
        nullable |= key == "rope_type"  # absent: the default type
        for bad in bad_values(key, good, nullable):
            expect_error({**base, layout: {**rope, key: bad}}, f"{layout}.{key}")
    for key in ("factor", "low_freq_factor", "high_freq_factor", "short_factor", "long_factor"):
        if key in rope and (key, rope_type) != ("factor", "longrope"):
            missing = {k: v for k, v in rope.items() if k != key}
            expect_error({**base, layout: missing}, f"{layout}.{key}")
    for bad in (0, 0.0, -2.0, 1e9):
        expect_error({**base, layout: {**rope, "factor": bad}}, f"{layout}.factor")
    for number in (0.0, -1.0, NAN, INF, 1e30, True, "1"):
        for key in {"short_factor", "long_factor"} & set(rope):
            expect_error({**base, layout: {**rope, key: [1.0] * 7 + [number]}}, f"{layout}.{key}")
    for bad in (0, 1.0, -5.0, 1e30):
        expect_error({**base, layout: {**rope, "rope_theta": bad}}, f"{layout}.rope_theta")


ROPE_CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown type": ({"rope_scaling": {"type": "mrope", "factor": 2.0}}, "llama3"),
    "two types": (
        {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}},
        "rope_scaling.type",
    ),
    "not an object": ({"rope_scaling": [1, 2]}, "rope_scaling"),
    "per layer type": ({"rope_parameters": {F: {"rope_type": "default"}}}, F),
    "partial outside": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "partial inside": ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary"),
    "high below low": (
        {"rope_scaling": {**ROPE["llama3"], "rope_type": "llama3", "high_freq_factor": 1.0}},
        "high_freq_factor",
    ),
    "short list": (
        {"rope_scaling": {**ROPE["longrope"], "rope_type": "longrope", "long_factor": [1.0] * 7}},
        "long_factor",
    ),
    "original 1": (
        {"rope_scaling": {**ROPE["longrope"], "rope_type": "longrope"}, "head_dim": 16}
        | {"original_max_position_embeddings": 1},
        "original_max_position_embeddings",
    ),
    "dynamic with pairs of one": (
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "head_dim": 2},
        "head_dim",
    ),
}


@pytest.mark.parametrize("case", ROPE_CONTRADICTIONS)
def test_rope_contradictions(case: str) -> None:
    changes, word = ROPE_CONTRADICTIONS[case]
    expect_error({"model_type": "llama", **FULL, **changes}, word)


SIZES: dict[str, tuple[dict[str, Any], str]] = {
    "heads do not divide": ({"hidden_size": 65, "head_dim": None}, "hidden_size"),
    "kv heads do not divide": ({"num_key_value_heads": 3}, "num_key_value_heads"),
    "more kv heads": ({"num_key_value_heads": 8}, "num_key_value_heads"),
    "odd head_dim": ({"head_dim": 15}, "head_dim"),
    "odd derived head_dim": ({"hidden_size": 60, "head_dim": None}, "head_dim"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers"),
    "negative layers": ({"num_hidden_layers": -1}, "num_hidden_layers"),
    "10^9 layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    "vocabulary 2^40": ({"vocab_size": 2**40}, "vocab_size"),
    "10^12 positions": ({"max_position_embeddings": 10**12}, "max_position_embeddings"),
    "intermediate 10^15": ({"intermediate_size": 10**15}, "intermediate_size"),
    "head_dim 2^40": ({"head_dim": 2**40}, "head_dim"),
    "legal parts, absurd whole": (
        {"hidden_size": 2**20, "intermediate_size": 2**24, "num_hidden_layers": 2**14}
        | {"layer_types": None},
        "parameters",
    ),
    "eps 0": ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
    "eps below fp32": ({"rms_norm_eps": 1e-40}, "rms_norm_eps"),
    "eps above 1": ({"rms_norm_eps": 2.0}, "rms_norm_eps"),
    "eos outside": ({"eos_token_id": [2, 97]}, "eos_token_id"),
    "bos outside": ({"bos_token_id": 97}, "bos_token_id"),
    "pad outside": ({"pad_token_id": 97}, "pad_token_id"),
    "two dtypes": ({"dtype": "float16"}, "torch_dtype"),
    "dtype unknown": ({"torch_dtype": "float64"}, "torch_dtype"),
    "sliding llama": ({"layer_types": [F, S, F]}, "layer_types"),
    "layer_types short": ({"layer_types": [F, F]}, "layer_types"),
    "layer_types long": ({"layer_types": [F] * 4}, "layer_types"),
    "layer type unknown": ({"layer_types": [F, "chunked_attention", F]}, "layer_types[1]"),
    "per-layer sizes": ({"per_layer_config": {"0": {"head_dim": 8}}}, "per_layer_config"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act"),
}


@pytest.mark.parametrize("case", SIZES)
def test_sizes_and_contradictions(case: str) -> None:
    changes, word = SIZES[case]
    tracemalloc.start()
    try:
        expect_error({"model_type": "llama", **FULL, **changes}, word)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_head_dim_beside_indivisible_hidden_size_is_legal() -> None:
    values = {"model_type": "llama", **FULL, "hidden_size": 1792, "num_attention_heads": 24}
    assert load_config({**values, "num_key_value_heads": 8, "head_dim": 128}).head_dim == 128


EXAONE: dict[str, tuple[dict[str, Any], str]] = {
    "window 0": ({"sliding_window": 0}, "sliding_window"),
    "window negative": ({"sliding_window": -4}, "sliding_window"),
    "sliding without window": ({"sliding_window": None, "layer_types": [S, S, F]}, "layer_types"),
    "pattern 0": ({"sliding_window_pattern": 0}, "sliding_window_pattern"),
    "pattern XYZ": ({"sliding_window_pattern": "XYZ"}, "sliding_window_pattern"),
    "pattern empty": ({"sliding_window_pattern": ""}, "sliding_window_pattern"),
    "pattern null": ({"sliding_window_pattern": None, "layer_types": None}, "layer_types"),
    "types too long": ({"layer_types": [S, S, F, S]}, "layer_types"),
}


@pytest.mark.parametrize("case", EXAONE)
def test_exaone_contradictions(case: str) -> None:
    changes, word = EXAONE[case]
    if case == "pattern null":
        word = "sliding_window_pattern"
    expect_error({"model_type": "exaone4", **FULL, **FAMILY["exaone4"], **changes}, word)


def test_qwen2_sliding_types_without_window() -> None:
    values = {"model_type": "qwen2", **FULL, "layer_types": [F, S, S]}
    expect_error({**values, "use_sliding_window": False}, "use_sliding_window")
    expect_error({**values, "use_sliding_window": True, "sliding_window": None}, "layer_types")
