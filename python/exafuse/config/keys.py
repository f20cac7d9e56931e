"""The keys that a config.json may have: known, refused or reported. The only such list."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Final

from exafuse.config.fields import Fields
from exafuse.config.head import ARCHITECTURES
from exafuse.config.quantisation import KEYS as QUANTISATION_KEYS
from exafuse.config.quantisation import ROUTE as QUANTISATION_ROUTE
from exafuse.config.quantisation import describe_method, method_of
from exafuse.strict_json import shorten

# Keys by which a file could ask a loader to run or fetch something. Reported, never acted on.
_ACTIVE: Final = (
    "auto_map",
    "trust_remote_code",
    "custom_pipelines",
    "code_revision",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
    "_experts_implementation",
    "_experts_implementation_internal",
)

# No bearing on what the model computes.
_PASSED_OVER: Final = frozenset(
    {
        # bookkeeping of training and serving tools
        "_attn_implementation_autoset",
        "_commit_hash",
        "_name_or_path",
        "name_or_path",
        "pretraining_tp",
        "return_dict",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        # classification heads
        "classifier_dropout",
        "id2label",
        "label2id",
        "num_labels",
        "problem_type",
        "token_classification_bias",
        # EXAONE: sizes said twice, names of tokens, the draft module
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
_LISTED: Final = 12


def check_architectures(fields: Fields, model_type: str) -> None:
    """``architectures``, where given, must name classes of the family that ``model_type`` names."""
    known = tuple(ARCHITECTURES[model_type].values())
    for name in fields.strings("architectures") or ():
        if name not in known:
            owners = [family for family, names in ARCHITECTURES.items() if name in names.values()]
            got = shorten(name) + "".join(f", which belongs to model_type {o}" for o in owners)
            expected = f"for model_type {model_type} one of {', '.join(known)}"
            raise fields.error("architectures", expected, got)


def check_unimplemented(fields: Fields) -> None:
    """Refuse what would change the computation and is not implemented; report what is ignored."""
    if fields.string("hidden_act", "silu") != "silu":
        raise fields.error("hidden_act", "silu, the only activation implemented")
    for key in QUANTISATION_KEYS:
        if section := fields.raw(key):
            method = describe_method(method_of(section))
            raise fields.error(key, QUANTISATION_ROUTE, f"weights quantised by {method}")
    if fields.raw("per_layer_config"):
        raise fields.error("per_layer_config", "the same sizes in every layer")
    if fields.raw("dual_chunk_attention_config"):
        warnings.warn(
            f"{fields.file}: {fields.prefix}dual_chunk_attention_config: not implemented; plain "
            "attention is used (as in transformers), which is not what the model was made for "
            "beyond its original context",
            stacklevel=3,
        )
    active = [fields.prefix + key for key in _ACTIVE if fields.raw(key)]
    if active:
        warnings.warn(
            f"{fields.file}: ignored, because no code of a checkpoint is run: {', '.join(active)}",
            stacklevel=3,
        )


def report_unread(fields: Fields, known: Iterable[str] = ()) -> None:
    """One warning with the keys that nothing has read and nobody knows.

    A key whose value is null, false, zero or empty asks for nothing and is not reported.
    """
    known = _PASSED_OVER.union(known)
    unread = [k for k in fields.unread() if k not in known and fields.raw(k)]
    if unread:
        names = ", ".join(shorten(fields.prefix + key) for key in unread[:_LISTED])
        more = f" and {len(unread) - _LISTED} more" if len(unread) > _LISTED else ""
        warnings.warn(f"{fields.file}: unknown and ignored: {names}{more}", stacklevel=3)
