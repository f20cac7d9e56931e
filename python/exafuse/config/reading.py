"""config.json -> ModelConfig: the one place where a model's description is read and checked.

Both layouts of the file are understood (transformers 4 and 5). Keys that change the computation and
are not implemented are errors; keys that cannot matter are known and passed over; the others are
reported in one warning. Nothing that a config names is ever imported, fetched or run. Past this
module nobody reads a dict.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

from exafuse.config.fields import REQUIRED, Fields
from exafuse.config.head import HeadConfig, read_head
from exafuse.config.keys import check_architectures, check_unimplemented, report_unread
from exafuse.config.layer_plan import (
    LayerPlan,
    LayerType,
    read_exaone_layers,
    read_llama_layers,
    read_qwen2_layers,
)
from exafuse.config.limits import (
    CONFIG_LIMIT_BYTES,
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_HIDDEN,
    MAX_INTERMEDIATE,
    MAX_LAYERS,
    MAX_PARAMETERS,
    MAX_VOCAB,
    MIN_EPS,
)
from exafuse.config.model import DType, ModelConfig, ModelType
from exafuse.config.rope import MAX_POSITIONS, RopeConfig, read_rope
from exafuse.config.vision import read_vision
from exafuse.errors import ConfigError
from exafuse.strict_json import read_json, shorten

__all__ = ["LayerPlan", "ModelConfig", "RopeConfig", "load_config"]


@dataclass(frozen=True)
class _Defaults:
    """What a family assumes for keys that its file does not have (transformers' class defaults)."""

    vocab_size: int
    intermediate_size: int
    num_kv_heads: int | None
    max_position_embeddings: int
    rms_norm_eps: float
    bos_token_id: int | None
    eos_token_id: tuple[int, ...]
    hidden_size: int = 4096
    num_layers: int = 32
    num_heads: int = 32


_EXAONE_DEFAULTS: Final = _Defaults(102400, 16384, 32, 2048, 1e-5, 0, (2,))
_DEFAULTS: Final[dict[str, _Defaults]] = {
    "llama": _Defaults(32000, 11008, None, 2048, 1e-6, 1, (2,)),
    "qwen2": _Defaults(151936, 22016, 32, 32768, 1e-6, None, ()),
    "exaone4": _EXAONE_DEFAULTS,
    "exaone4_5": _EXAONE_DEFAULTS,
}


def load_config(
    source: str | Path | Mapping[str, object],
    *,
    head: str | None = None,
    num_labels: int | None = None,
) -> ModelConfig:
    """Read and check a model's configuration.

    Args:
        source: a checkpoint folder, the path of a config.json, or the parsed object itself.
        head: another head than the file's, by its kind: see :class:`HeadConfig`.
        num_labels: of a head that classifies, where the file does not name its labels.

    Raises:
        ConfigError: naming file and field, what was expected and what came.
        ValueError: ``head`` or ``num_labels`` is impossible, or contradicts the file.

    A file of "exaone4_5" without ``vision_config`` describes its text part alone.
    """
    values: object
    if isinstance(source, Mapping):
        values, name = source, "config"
    elif isinstance(source, str | os.PathLike):
        path = Path(source)
        path = path / "config.json" if os.path.isdir(path) else path
        values, name = read_json(path, "model configuration", CONFIG_LIMIT_BYTES), str(path)
    else:
        got = type(source).__name__
        raise TypeError(f"source: expected a folder, a path or a mapping, got {got}")
    if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
        got = type(values).__name__
        raise ConfigError(f"{name}: expected a JSON object with named fields, got {got}")

    fields = Fields(values, name)
    model_type = _read_model_type(fields)
    check_architectures(fields, model_type)
    check_unimplemented(fields)
    kind = read_head(fields, model_type, head, num_labels)
    if model_type == "exaone4_5":
        return _read_exaone4_5(fields, kind)
    config = _read_text_model(fields, fields, model_type, kind)
    report_unread(fields)
    return config


def _read_model_type(fields: Fields) -> ModelType:
    model_type = fields.raw("model_type")
    if not isinstance(model_type, str) or model_type not in _DEFAULTS:
        raise fields.error("model_type", f"one of {', '.join(_DEFAULTS)}")
    return cast(ModelType, model_type)


def _read_exaone4_5(fields: Fields, head: HeadConfig) -> ModelConfig:
    """Language model, vision tower, draft module. The fields of the first are those of
    ``text_config``: copies beside it are never read."""
    text = fields.section("text_config")
    if text is None:
        raise fields.error("text_config", "an object (the language model)")
    if text.string("model_type", "exaone4") not in ("exaone4", "exaone4_5_text"):
        raise text.error("model_type", "exaone4 or exaone4_5_text")
    check_unimplemented(text)
    config = _read_text_model(text, fields, "exaone4_5", head)
    vision = fields.section("vision_config")
    if vision is not None:
        config = _with_vision(config, vision, fields)
    number = _read_num_mtp_layers(fields, text, default=len(config.mtp_layer_types))
    config = config.with_mtp_layers(number if head.kind == "causal_lm" else 0)
    _check_size(text, config)
    report_unread(text, known=("architectures", "tie_word_embeddings"))
    report_unread(fields, known=text.known())
    return config


def _with_vision(config: ModelConfig, vision: Fields, top: Fields) -> ModelConfig:
    last = config.vocab_size - 1
    image, video = top.integer("image_token_id", 67, 0, last), "video_token_id"
    if image == top.integer(video, 68, 0, last):
        raise top.error(video, f"another id than image_token_id ({image})")
    return dataclasses.replace(
        config,
        vision=read_vision(vision, config.hidden_size),
        image_token_id=image,
        video_token_id=top.integer(video, 68, 0, last),
    )


def _read_num_mtp_layers(fields: Fields, text: Fields, default: int) -> int:
    """Layers of the draft module; a file that does not say may have it nevertheless."""
    for place in (text, fields):
        for key in ("num_nextn_predict_layers", "_num_mtp_layers"):
            if place.has(key):
                return place.integer(key, REQUIRED, 0, MAX_LAYERS)
    return default


def _read_text_model(
    fields: Fields, top: Fields, model_type: ModelType, head: HeadConfig
) -> ModelConfig:
    """The decoder. ``top`` is the outermost object of the file, where dtype and tying live."""
    default = _DEFAULTS[model_type]
    vocab_size = fields.integer("vocab_size", default.vocab_size, 1, MAX_VOCAB)
    num_layers = fields.integer("num_hidden_layers", default.num_layers, 1, MAX_LAYERS)
    hidden_size = fields.integer("hidden_size", default.hidden_size, 1, MAX_HIDDEN)
    num_heads = fields.integer("num_attention_heads", default.num_heads, 1, MAX_HEADS)
    head_dim = _read_head_dim(fields, hidden_size, num_heads)
    max_positions = fields.integer(
        "max_position_embeddings", default.max_position_embeddings, 1, MAX_POSITIONS
    )

    window: int | None = None
    layer_types: tuple[LayerType, ...]
    if model_type == "llama":
        layer_types = read_llama_layers(fields, num_layers)
    elif model_type == "qwen2":
        window, layer_types = read_qwen2_layers(fields, num_layers)
    else:
        has_mtp = model_type == "exaone4_5"
        window, layer_types = read_exaone_layers(fields, num_layers, may_be_longer=has_mtp)

    def token_ids(key: str) -> Fields:
        return fields if fields.present(key) else top

    llama = model_type == "llama"
    attention_bias = llama and fields.boolean("attention_bias", False)
    config = ModelConfig(
        model_type=model_type,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.integer(
            "intermediate_size", default.intermediate_size, 1, MAX_INTERMEDIATE
        ),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=_read_kv_heads(fields, default.num_kv_heads, num_heads),
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        rms_norm_eps=fields.number("rms_norm_eps", default.rms_norm_eps, MIN_EPS, 1.0),
        tie_word_embeddings=top.boolean("tie_word_embeddings", False),
        sliding_window=window,
        layer_types=layer_types[:num_layers],
        mtp_layer_types=layer_types[num_layers:],
        rope=read_rope(fields, head_dim, max_positions),
        qkv_bias=attention_bias or model_type == "qwen2",
        o_bias=attention_bias,
        mlp_bias=llama and fields.boolean("mlp_bias", False),
        qk_norm=model_type in ("exaone4", "exaone4_5"),
        initializer_range=fields.number("initializer_range", 0.02, 0.0, 1.0),
        use_cache=fields.boolean("use_cache", True),
        bos_token_id=token_ids("bos_token_id").optional_integer(
            "bos_token_id", default.bos_token_id, 0, vocab_size - 1
        ),
        pad_token_id=_read_pad(token_ids("pad_token_id"), vocab_size),
        eos_token_id=token_ids("eos_token_id").integers(
            "eos_token_id", default.eos_token_id, 0, vocab_size - 1
        ),
        dtype=_read_dtype(top, fields),
        attention_dropout=fields.optional_number("attention_dropout", 0.0, 1.0) or 0.0,
        head=head,
    )
    _check_size(fields, config)
    return config


def _check_size(fields: Fields, config: ModelConfig) -> None:
    if config.num_parameters() > MAX_PARAMETERS:
        raise ConfigError(
            f"{fields.file}: {fields.prefix}hidden_size, intermediate_size, num_hidden_layers, "
            f"vocab_size: expected a model of at most {MAX_PARAMETERS:,} parameters, "
            f"got {config.num_parameters():,}"
        )


def _read_head_dim(fields: Fields, hidden_size: int, num_heads: int) -> int:
    """``head_dim``, or hidden_size / num_heads where it is absent or null. RoPE needs it even."""
    if fields.has("head_dim"):
        head_dim = fields.integer("head_dim", REQUIRED, 1, MAX_HEAD_DIM)
    elif hidden_size % num_heads == 0:
        head_dim = hidden_size // num_heads
    else:
        expected = f"a multiple of num_attention_heads ({num_heads}), or head_dim beside it"
        raise fields.error("hidden_size", expected, f"{hidden_size}")
    if head_dim % 2 or head_dim > MAX_HEAD_DIM:
        expected = f"an even number up to {MAX_HEAD_DIM:,} (RoPE rotates pairs)"
        raise fields.error("head_dim", expected, f"{head_dim}")
    return head_dim


def _read_kv_heads(fields: Fields, default: int | None, num_heads: int) -> int:
    """``num_key_value_heads``; null means one for every query head."""
    key = "num_key_value_heads"
    num_kv_heads = fields.optional_integer(key, default, 1, MAX_HEADS) or num_heads
    if num_heads % num_kv_heads:
        expected = f"a divisor of num_attention_heads ({num_heads})"
        raise fields.error(key, expected, f"{num_kv_heads}")
    return num_kv_heads


def _read_pad(fields: Fields, vocab_size: int) -> int | None:
    """``pad_token_id``; some published Llama files say -1 for none."""
    pad = fields.optional_integer("pad_token_id", None, -1, vocab_size - 1)
    return None if pad == -1 else pad


def _read_dtype(top: Fields, fields: Fields) -> DType:
    """``dtype``, or ``torch_dtype`` as older files call it; the outer object's comes first."""
    found: list[str] = []
    for place in (top, fields):
        names = {key: place.string(key, REQUIRED) for key in _DTYPE_KEYS if place.has(key)}
        for key, name in names.items():
            if name not in _DTYPES:
                raise place.error(key, f"one of {', '.join(_DTYPES)}")
        if len(set(names.values())) > 1:
            raise place.error("dtype", f"the same as torch_dtype ({shorten(names['torch_dtype'])})")
        found += names.values()
    return cast(DType, found[0]) if found else "float32"


_DTYPE_KEYS: Final = ("dtype", "torch_dtype")
_DTYPES: Final = ("bfloat16", "float16", "float32")
