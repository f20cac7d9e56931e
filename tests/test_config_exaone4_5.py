"""The config of EXAONE 4.5: language model, vision tower, draft module, placeholder ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from config_cases import F, S
from exafuse.config import LayerPlan, load_config
from exafuse.errors import ConfigError
from test_config import TINY

CONFIGS = Path(__file__).parent / "data" / "configs"


def vision(**changes: Any) -> dict[str, Any]:
    """A small valid ``vision_config``."""
    return {"depth": 2, "hidden_size": 32, "num_heads": 8, "out_hidden_size": 64, **changes}


def outer(text: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A small valid exaone4_5 config.json."""
    text = {**TINY, "model_type": "exaone4_5_text", "sliding_window": 5, **text}
    ids = {"image_token_id": 7, "video_token_id": 8}
    return {
        "model_type": "exaone4_5",
        "text_config": text,
        "vision_config": vision(),
        **ids,
        **changes,
    }


def test_exaone4_5_reads_the_text_part() -> None:
    text = {"tie_word_embeddings": True, "layer_types": [S, S, F, S]}
    copies = {"sliding_window": None, "vocab_size": 7}
    config = load_config(outer(text, **copies))
    assert config.model_type == "exaone4_5"
    assert config.layer_types == (S, S, F)  # the fourth is the draft module's
    assert config.mtp_layers == (LayerPlan(0, S, (4, 0), True, "post"),)
    assert (config.vocab_size, config.sliding_window) == (97, 5)
    assert (config.image_token_id, config.video_token_id) == (7, 8)
    assert not config.tie_word_embeddings  # only the outer key counts
    assert load_config(outer(text, tie_word_embeddings=True)).tie_word_embeddings
    values = outer(text)
    del values["vision_config"]
    alone = load_config(values)
    assert alone.vision is None
    with pytest.raises(ConfigError, match="text part alone"):
        alone.to_dict()


def test_released_vision_tower() -> None:
    config = load_config(CONFIGS / "exaone-4.5-33b.json")
    assert config.vision is not None
    assert config.vision.num_parameters() == 1_286_482_944
    assert (config.vision.head_dim, config.vision.window_units) == (64, 4)
    assert config.vision.full_attention_blocks == (6, 13, 20, 27)
    assert config.vision.patch_values == 1176
    assert (config.image_token_id, config.video_token_id) == (67, 68)
    assert config.mtp_layers == (LayerPlan(0, S, (4095, 0), True, "post"),)


def test_number_of_mtp_layers() -> None:
    """A key beats the layer types; a silent file has none, and can be given some."""
    assert load_config(outer({"layer_types": [S, S, F]})).mtp_layers == ()
    assert len(load_config(outer({"layer_types": [S, S, F, S, S]})).mtp_layers) == 2
    told = {"layer_types": [S, S, F, S], "num_nextn_predict_layers": 2}
    config = load_config(outer(told))
    assert config.mtp_layer_types == (S, S)
    assert config.with_mtp_layers(0).mtp_layers == ()
    full = load_config(outer({"sliding_window": None}))
    assert full.with_mtp_layers(1).mtp_layers == (LayerPlan(0, F, (-1, 0), True, "post"),)


VISION_FAULTS = {
    "depth": 0,
    "hidden_size": 30,
    "num_heads": 16,  # heads of 2: nothing to turn with the column
    "num_key_value_heads": 3,
    "window_size": 27,
    "out_hidden_size": 32,
    "hidden_act": "gelu",
    "head_dim": 16,
    "model_type": "qwen2_vl",
    "patch_size": [14, 14],
    "fullatt_block_indexes": [-1],
    "rope_parameters": {"rope_type": "yarn"},
}


@pytest.mark.parametrize("key", VISION_FAULTS)
def test_vision_faults_are_named(key: str) -> None:
    load_config(outer({}))
    values = outer({}, vision_config=vision(**{key: VISION_FAULTS[key]}))
    with pytest.raises(ConfigError, match=f"vision_config.*{key}"):
        load_config(values)


def test_placeholder_ids() -> None:
    with pytest.raises(ConfigError, match="video_token_id: expected another id"):
        load_config(outer({}, video_token_id=7))
    with pytest.raises(ConfigError, match="image_token_id: expected an integer from 0 to 96"):
        load_config(outer({}, image_token_id=97))


def test_exaone4_5_of_transformers_loads() -> None:
    text = {**TINY, "model_type": "exaone4", "sliding_window": 5, "rms_norm_eps": 1e-4}
    theirs = transformers.Exaone4_5_Config(
        text_config=text, vision_config=vision(), dtype="bfloat16"
    )
    config = load_config(json.loads(theirs.to_json_string(use_diff=False)))
    assert (config.rms_norm_eps, config.sliding_window) == (1e-4, 5)
    assert (config.layer_types, config.dtype) == ((S, S, S), "bfloat16")
    # the class defaults stand in for what the file does not say
    assert config.vision is not None
    assert (config.vision.intermediate_size, config.vision.num_kv_heads) == (3420, 8)
