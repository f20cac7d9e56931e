"""config.json -> ModelConfig: the one place where a checkpoint's description is read, checked and completed.

Both layouts of the file are understood (transformers 4 and 5). Keys that change the computation and are not
implemented are errors; keys that cannot matter are known and passed over; everything else is reported in one
warning. Nothing that a config names is ever imported, fetched or run. Past this module nobody reads a dict.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final, Literal, cast

from exafuse.config_fields import REQUIRED, Fields
from exafuse.config_keys import check_architectures, check_unimplemented, report_unread
from exafuse.config_layers import (
    FULL,
    SLIDING,
    LayerPlan,
    LayerType,
    plan_layers,
    read_exaone_layers,
    read_llama_layers,
    read_qwen2_layers,
)
from exafuse.config_rope import MAX_POSITIONS, RopeConfig, read_rope
from exafuse.errors import ConfigError
from exafuse.strict_json import read_json, shorten

__all__ = ["LayerPlan", "ModelConfig", "RopeConfig", "load_config", "read_json"]

DType = Literal["bfloat16", "float16", "float32"]
ModelType = Literal["llama", "qwen2", "exaone4", "exaone4_5"]

CONFIG_LIMIT_BYTES: Final = 2 * 2**20
_MAX_PARAMETERS: Final = 2**42  # 4.4e12, ten times the largest open model
_MIN_EPS: Final = (
    1.1754943508222875e-38  # the smallest normal fp32: below it the sum is unprotected
)


@dataclass(frozen=True)
class _Defaults:
    """What a family assumes for keys that its file does not have (transformers' class defaults)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_kv_heads: int | None
    max_position_embeddings: int
    rms_norm_eps: float
    bos_token_id: int | None
    eos_token_id: tuple[int, ...]


_EXAONE_DEFAULTS: Final = _Defaults(102400, 4096, 16384, 32, 2048, 1e-5, 0, (2,))
_DEFAULTS: Final[dict[str, _Defaults]] = {
    "llama": _Defaults(32000, 4096, 11008, None, 2048, 1e-6, 1, (2,)),
    "qwen2": _Defaults(151936, 4096, 22016, 32, 32768, 1e-6, None, ()),
    "exaone4": _EXAONE_DEFAULTS,
    "exaone4_5": _EXAONE_DEFAULTS,
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A causal language model of one of the supported families, complete and consistent.

    ``model_type`` "exaone4_5" stands for the text part of that model. ``sliding_window`` counts the query
    itself and is None for a model without windows; ``layers`` has it in the form that the ops take.
    ``eos_token_id`` is empty where the config names none. ``dtype`` is the file's, "float32" if it names none.
    """

    model_type: ModelType
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    sliding_window: int | None
    layer_types: tuple[LayerType, ...]
    rope: RopeConfig
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    initializer_range: float
    use_cache: bool
    bos_token_id: int | None
    pad_token_id: int | None
    eos_token_id: tuple[int, ...]
    dtype: DType
    attention_dropout: float = 0.0  # inference never drops; training with it is refused

    @cached_property
    def layers(self) -> tuple[LayerPlan, ...]:
        """The plan of every layer: window, RoPE or NoPE, placement of the norms."""
        return plan_layers(self.model_type, self.layer_types, self.sliding_window)

    def num_parameters(self) -> int:
        """Number of weights, a tied head counted once."""
        hidden, width = self.hidden_size, self.intermediate_size
        q_rows = self.num_heads * self.head_dim
        qkv_rows = q_rows + 2 * self.num_kv_heads * self.head_dim
        layer = hidden * (qkv_rows + q_rows + 3 * width) + 2 * hidden
        layer += self.qkv_bias * qkv_rows + self.o_bias * hidden
        layer += self.mlp_bias * (2 * width + hidden) + self.qk_norm * 2 * self.head_dim
        embeddings = self.vocab_size * hidden * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_layers * layer + hidden

    def cache_bytes(
        self, batch_size: int, context: int, dtype_bytes: int, chunk: int = 2048
    ) -> int:
        """Bytes of a KV cache for ``context`` tokens in each of ``batch_size`` rows.

        A sliding layer keeps a ring of ``sliding_window - 1 + chunk`` slots, rounded up to a multiple of
        128, where that is less than the context; ``chunk`` is the longest call in tokens.
        """
        slots = 0
        for layer_type in self.layer_types:
            ring = context
            if layer_type == SLIDING and self.sliding_window is not None:
                ring = -(-(self.sliding_window - 1 + chunk) // 128) * 128
            slots += min(ring, context)
        return 2 * batch_size * slots * self.num_kv_heads * self.head_dim * dtype_bytes

    def to_dict(self) -> dict[str, object]:
        """A config.json of this model in the older layout, which transformers 4 and 5 both read."""
        if self.model_type == "exaone4_5":
            raise ConfigError(
                "exaone4_5: expected a whole model to write, got its text part alone, without the vision tower"
            )
        result: dict[str, object] = {
            "architectures": [_ARCHITECTURE[self.model_type]],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope.theta,
            "rope_scaling": self.rope.to_dict(),
            "attention_dropout": self.attention_dropout,
            "initializer_range": self.initializer_range,
            "use_cache": self.use_cache,
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": _one_or_list(self.eos_token_id),
            "pad_token_id": self.pad_token_id,
            "torch_dtype": self.dtype,
        }
        if self.model_type == "llama":
            result |= {"attention_bias": self.qkv_bias, "mlp_bias": self.mlp_bias}
        else:
            result |= {"sliding_window": self.sliding_window, "layer_types": list(self.layer_types)}
        if self.model_type == "qwen2":
            result |= {
                "use_sliding_window": self.sliding_window is not None,
                # Only read where layer_types is not: the number of full layers before the first window.
                "max_window_layers": (*self.layer_types, SLIDING).index(SLIDING),
            }
        return result


_ARCHITECTURE: Final = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "exaone4": "Exaone4ForCausalLM",
}


def load_config(source: str | Path | Mapping[str, object]) -> ModelConfig:
    """Read and check a model's configuration.

    Args:
        source: a checkpoint folder, the path of a config.json, or the parsed object itself.

    Raises:
        ConfigError: naming file and field, what was expected and what came.

    For "exaone4_5" the result describes the text part (its layer plan can be shown and its memory estimated).
    """
    if isinstance(source, Mapping):
        values: object = source
        name = "config"
    elif isinstance(source, str | os.PathLike):
        path = Path(source)
        path = path / "config.json" if path.is_dir() else path
        values = read_json(path, "model configuration", CONFIG_LIMIT_BYTES)
        name = str(path)
    else:
        raise TypeError(
            f"source: expected a folder, a path or a mapping, got {type(source).__name__}"
        )
    if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
        raise ConfigError(
            f"{name}: expected a JSON object with named fields, got {type(values).__name__}"
        )
    fields = Fields(values, name)
    model_type = _read_model_type(fields)
    check_architectures(fields, model_type)
    check_unimplemented(fields)
    if model_type == "exaone4_5":
        return _read_exaone4_5(fields)
    config = _read_text_model(fields, fields, model_type)
    report_unread(fields)
    return config


def _read_model_type(fields: Fields) -> ModelType:
    model_type = fields.string("model_type", REQUIRED)
    if model_type not in _DEFAULTS:
        raise fields.error("model_type", f"one of {', '.join(_DEFAULTS)}")
    return cast(ModelType, model_type)


def _read_exaone4_5(fields: Fields) -> ModelConfig:
    """The text part: its fields are those of ``text_config``; copies beside it are never read."""
    text = fields.section("text_config")
    if text is None:
        raise fields.error("text_config", "an object (the language model)")
    text_type = text.string("model_type", "exaone4")
    if text_type not in ("exaone4", "exaone4_5_text"):
        raise text.error("model_type", "exaone4 or exaone4_5_text")
    check_architectures(text, "exaone4")
    check_unimplemented(text)
    config = _read_text_model(text, fields, "exaone4_5")
    report_unread(text)
    report_unread(fields, nested=True)
    return config


def _read_text_model(fields: Fields, top: Fields, model_type: ModelType) -> ModelConfig:
    """Everything about the decoder; ``top`` is the file's outermost object, where dtype and tying live."""
    default = _DEFAULTS[model_type]
    vocab_size = fields.integer("vocab_size", default.vocab_size, 1, 2**24)
    hidden_size = fields.integer("hidden_size", default.hidden_size, 1, 2**20)
    num_layers = fields.integer("num_hidden_layers", 32, 1, 2**14)
    num_heads = fields.integer("num_attention_heads", 32, 1, 2**16)
    num_kv_heads = fields.optional_integer(
        "num_key_value_heads", default.num_kv_heads, 1, num_heads
    )
    num_kv_heads = num_kv_heads or num_heads
    if num_heads % num_kv_heads:
        raise fields.error(
            "num_key_value_heads",
            f"a divisor of num_attention_heads ({num_heads})",
            f"{num_kv_heads}",
        )
    head_dim = _read_head_dim(fields, hidden_size, num_heads)
    max_positions = fields.integer(
        "max_position_embeddings", default.max_position_embeddings, 1, MAX_POSITIONS
    )

    window: int | None = None
    if model_type == "llama":
        layer_types = read_llama_layers(fields, num_layers)
    elif model_type == "qwen2":
        window, layer_types = read_qwen2_layers(fields, num_layers)
    else:
        window, layer_types = read_exaone_layers(
            fields, num_layers, may_be_longer=model_type == "exaone4_5"
        )

    attention_bias = model_type == "llama" and fields.boolean("attention_bias", False)
    config = ModelConfig(
        model_type=model_type,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size", default.intermediate_size, 1, 2**24),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        rms_norm_eps=fields.number("rms_norm_eps", default.rms_norm_eps, _MIN_EPS, 1.0),
        tie_word_embeddings=top.boolean("tie_word_embeddings", False),
        sliding_window=window,
        layer_types=layer_types,
        rope=read_rope(fields, head_dim, max_positions),
        qkv_bias=attention_bias or model_type == "qwen2",
        o_bias=attention_bias,
        mlp_bias=model_type == "llama" and fields.boolean("mlp_bias", False),
        qk_norm=model_type in ("exaone4", "exaone4_5"),
        initializer_range=fields.number("initializer_range", 0.02, 0.0, 1.0),
        use_cache=fields.boolean("use_cache", True),
        bos_token_id=fields.optional_integer(
            "bos_token_id", default.bos_token_id, 0, vocab_size - 1
        ),
        pad_token_id=_read_pad(fields, vocab_size),
        eos_token_id=fields.integers("eos_token_id", default.eos_token_id, 0, vocab_size - 1),
        dtype=_read_dtype(top) or _read_dtype(fields) or "float32",
        attention_dropout=fields.optional_number("attention_dropout", 0.0, 1.0) or 0.0,
    )
    if config.num_parameters() > _MAX_PARAMETERS:
        raise ConfigError(
            f"{fields.file}: hidden_size, intermediate_size, num_hidden_layers, vocab_size: expected a model of "
            f"at most {_MAX_PARAMETERS:,} parameters, got {config.num_parameters():,}"
        )
    return config


def _read_head_dim(fields: Fields, hidden_size: int, num_heads: int) -> int:
    """``head_dim``, or hidden_size / num_heads where it is absent or null. RoPE needs it even."""
    if not fields.has("head_dim"):
        if hidden_size % num_heads:
            raise fields.error(
                "hidden_size",
                f"a multiple of num_attention_heads ({num_heads}), or head_dim beside it",
                f"{hidden_size}",
            )
        head_dim = hidden_size // num_heads
    else:
        head_dim = fields.integer("head_dim", REQUIRED, 1, 2**14)
    if head_dim % 2 or head_dim > 2**14:
        raise fields.error(
            "head_dim", "an even number up to 16,384 (RoPE rotates pairs)", f"{head_dim}"
        )
    return head_dim


def _read_pad(fields: Fields, vocab_size: int) -> int | None:
    # Some published Llama files say -1 for "none".
    pad = fields.optional_integer("pad_token_id", None, -1, vocab_size - 1)
    return None if pad == -1 else pad


def _read_dtype(fields: Fields) -> DType | None:
    """``dtype``, or ``torch_dtype`` as older files call it; None where neither is there."""
    names = {
        fields.string(key, REQUIRED): key for key in ("torch_dtype", "dtype") if fields.has(key)
    }
    if len(names) == 2:
        raise fields.error("dtype", f"the same as torch_dtype ({shorten(next(iter(names)))})")
    for name, key in names.items():
        if name not in ("bfloat16", "float16", "float32"):
            raise fields.error(key, "one of bfloat16, float16, float32")
        return cast(DType, name)
    return None


def _one_or_list(ids: tuple[int, ...]) -> int | list[int] | None:
    return list(ids) if len(ids) > 1 else (ids[0] if ids else None)
