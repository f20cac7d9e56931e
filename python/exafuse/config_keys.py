"""The keys that a config.json may have: known, refused, or reported. The only such list in the package."""

from __future__ import annotations

import warnings
from typing import Final

from exafuse.config_fields import Fields
from exafuse.errors import ConfigError
from exafuse.strict_json import shorten

_HEADS: Final = (
    "ForCausalLM",
    "Model",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
)
ARCHITECTURES: Final[dict[str, tuple[str, ...]]] = {
    "llama": tuple(f"Llama{head}" for head in _HEADS),
    "qwen2": tuple(f"Qwen2{head}" for head in _HEADS),
    "exaone4": tuple(f"Exaone4{head}" for head in _HEADS),
    "exaone4_5": ("Exaone4_5_ForConditionalGeneration", "Exaone4_5_Model"),
}

# Keys by which a file could ask a loader to run or fetch something. Never looked at, only reported.
_ACTIVE: Final = (
    "auto_map",
    "trust_remote_code",
    "custom_pipelines",
    "_attn_implementation_internal",
    "_attn_implementation",
    "attn_implementation",
    "_experts_implementation_internal",
    "_experts_implementation",
    "experts_implementation",
    "code_revision",
)

# Bookkeeping of the training and serving tools: no bearing on what the model computes.
_PASSED_OVER: Final = frozenset(
    {
        "_attn_implementation_autoset",
        "_commit_hash",
        "_name_or_path",
        "chunk_size_feed_forward",
        "classifier_dropout",
        "finetuning_task",
        "id2label",
        "is_encoder_decoder",
        "label2id",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "torchscript",
        "transformers.js_config",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
        # EXAONE: sizes said twice, names of tokens, the draft module (not built from this file).
        "_num_mtp_layers",
        "max_window_layers",
        "mtp_loss_scaling_factor",
        "mtp_share_layers",
        "num_kv_heads",
        "num_nextn_predict_layers",
        "reorder_qk_norm",
        "image_token_id",
        "video_token_id",
        "vision_end_token_id",
        "vision_start_token_id",
        "vision_token_id",
    }
)


def check_architectures(fields: Fields, model_type: str) -> None:
    """``architectures``, where given, must name classes of the family that ``model_type`` names."""
    for name in fields.strings("architectures") or ():
        if name in ARCHITECTURES[model_type]:
            continue
        owner = next((family for family, names in ARCHITECTURES.items() if name in names), None)
        expected = f"for model_type {model_type} one of {', '.join(ARCHITECTURES[model_type])}"
        got = shorten(name) + (f", which belongs to model_type {owner}" if owner else "")
        raise fields.error("architectures", expected, got)


def check_unimplemented(fields: Fields) -> None:
    """Refuse what would change the computation and is not implemented; report what is never acted on."""
    if fields.string("hidden_act", "silu") != "silu":
        raise fields.error("hidden_act", "silu, the only activation implemented")
    for key in ("quantization_config", "compression_config"):
        if fields.has(key):
            raise _quantized(fields, key)
    if fields.has("per_layer_config") and fields.raw("per_layer_config") not in ({}, []):
        raise fields.error("per_layer_config", "the same sizes in every layer")
    if fields.has("dual_chunk_attention_config"):
        warnings.warn(
            f"{fields.file}: {fields.prefix}dual_chunk_attention_config: not implemented; plain attention is "
            "used, as transformers does, which differs beyond the original context",
            stacklevel=2,
        )
    active = [key for key in _ACTIVE if fields.raw(key)]
    if active:
        warnings.warn(
            f"{fields.file}: never acted on and ignored (no code of a checkpoint is run): "
            f"{', '.join(fields.prefix + key for key in active)}",
            stacklevel=2,
        )


def report_unread(fields: Fields, *, nested: bool = False) -> None:
    """One warning with the keys that neither this package nor the list above knows.

    ``nested``: the object also holds copies of its ``text_config``'s fields, which do not count.
    """
    unread = [key for key in fields.unread() if key not in _PASSED_OVER]
    if nested:
        text = fields.section("text_config")
        copies = set(text.unread()) if text is not None else set()
        unread = [key for key in unread if key not in copies and key != "vision_config"]
    if unread:
        more = f" and {len(unread) - 12} more" if len(unread) > 12 else ""
        warnings.warn(
            f"{fields.file}: unknown and ignored: "
            f"{', '.join(shorten(fields.prefix + key) for key in unread[:12])}{more}",
            stacklevel=2,
        )


def _quantized(fields: Fields, key: str) -> ConfigError:
    section = fields.raw(key)
    method = section.get("quant_method") if isinstance(section, dict) else None
    return fields.error(
        key,
        "unquantised weights (bfloat16, float16 or float32); take the original checkpoint, or load "
        "this one with transformers",
        f"quantisation method {shorten(method)}",
    )
