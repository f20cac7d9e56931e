"""ModelConfig: what a model is, complete and consistent; made by ``config.load_config`` alone."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal

from exafuse.config.head import ARCHITECTURES, LANGUAGE_MODEL, HeadConfig, ProblemType, another_head
from exafuse.config.layer_plan import FULL, SLIDING, LayerPlan, LayerType, plan_layers
from exafuse.config.rope import RopeConfig
from exafuse.config.vision import VisionConfig
from exafuse.errors import ConfigError

DType = Literal["bfloat16", "float16", "float32"]
ModelType = Literal["llama", "qwen2", "exaone4", "exaone4_5"]

_TILE: Final = 128  # tokens; kernels walk the cache in such tiles


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A model of one of the supported families.

    For "exaone4_5" the fields describe the language model; ``vision`` is its tower, None for the
    text part alone, and ``mtp_layer_types`` has an entry for every layer of the draft module, none
    where the file does not speak of one (its weights may be there nevertheless).

    ``sliding_window`` counts the query itself and is None for a model without windows; ``layers``
    has it in the form that the ops take. ``eos_token_id`` is empty where the config names none.
    ``dtype`` is the file's, "float32" if it names none.
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
    vision: VisionConfig | None = None
    image_token_id: int | None = None  # stands in the text for one token of an image
    video_token_id: int | None = None
    mtp_layer_types: tuple[LayerType, ...] = ()
    head: HeadConfig = LANGUAGE_MODEL

    @property
    def num_labels(self) -> int:
        """Classes that the head tells apart; 0 for a head that has none."""
        return len(self.head.labels)

    @property
    def id2label(self) -> dict[int, str]:
        """Names of the classes by their ids."""
        return dict(enumerate(self.head.labels))

    @property
    def label2id(self) -> dict[str, int]:
        """Ids of the classes by their names."""
        return {name: index for index, name in self.id2label.items()}

    @property
    def problem_type(self) -> ProblemType | None:
        """The loss of a sequence classification; None = by number and dtype of the labels."""
        return self.head.problem_type

    @cached_property
    def layers(self) -> tuple[LayerPlan, ...]:
        """The plan of every layer: window, RoPE or NoPE, placement of the norms."""
        return plan_layers(self.model_type, self.layer_types, self.sliding_window)

    @cached_property
    def mtp_layers(self) -> tuple[LayerPlan, ...]:
        """The plans of the draft module's layers, counted from 0."""
        return plan_layers(self.model_type, self.mtp_layer_types, self.sliding_window)

    def with_mtp_layers(self, number: int) -> ModelConfig:
        """The same model with so many layers in its draft module; new ones slide if any layer
        does."""
        new = FULL if self.sliding_window is None else SLIDING
        kinds = (*self.mtp_layer_types, *[new] * number)[:number]
        return dataclasses.replace(self, mtp_layer_types=kinds)

    def with_head(self, kind: str | None, num_labels: int | None) -> ModelConfig:
        """The same body with another head; arguments as for ``load_config``, None = this one's.

        Raises:
            ValueError: the family has no such head, or the number of labels contradicts theirs.
        """
        head = another_head(self.head, self.model_type, kind, num_labels)
        drafts = self.mtp_layer_types if head.kind == "causal_lm" else ()
        return dataclasses.replace(self, head=head, mtp_layer_types=drafts)

    def num_parameters(self) -> int:
        """Number of weights, tower, draft module and head included; a tied output matrix is counted
        once."""
        hidden, width = self.hidden_size, self.intermediate_size
        q_rows = self.num_heads * self.head_dim
        qkv_rows = q_rows + 2 * self.num_kv_heads * self.head_dim
        layer = hidden * (qkv_rows + q_rows + 3 * width) + 2 * hidden
        layer += self.qkv_bias * qkv_rows + self.o_bias * hidden
        layer += self.mlp_bias * (2 * width + hidden) + self.qk_norm * 2 * self.head_dim
        has_matrix = self.head.kind == "causal_lm" and not self.tie_word_embeddings
        embeddings = self.vocab_size * hidden * (2 if has_matrix else 1)
        embeddings += self.head.num_parameters(hidden)
        total = embeddings + self.num_layers * layer + hidden
        if self.vision is not None:
            total += self.vision.num_parameters()
        if self.mtp_layer_types:  # the layers, a projection of two hidden states to one, 3 norms
            total += len(self.mtp_layer_types) * layer + 2 * hidden * hidden + 3 * hidden
        return total

    def cache_bytes(
        self, batch_size: int, context: int, dtype_bytes: int, chunk: int = 2048
    ) -> int:
        """Bytes of a KV cache made for ``context`` tokens in each of ``batch_size`` rows.

        Slots come in tiles of 128. A sliding layer keeps a ring for ``sliding_window - 1 + chunk``
        tokens where that is less than the context; ``chunk`` is the longest call.
        """
        slots = 0
        for plan in self.layers:
            left = plan.window_size[0]
            tokens = context if left < 0 else min(context, left + chunk)
            slots += -(-tokens // _TILE) * _TILE
        return 2 * batch_size * slots * self.num_kv_heads * self.head_dim * dtype_bytes

    def to_dict(self) -> dict[str, object]:
        """A config.json of this model in the older layout, which transformers 4 and 5 both read.

        Raises:
            ConfigError: it is the text part of a larger model.
        """
        text = self._text_dict()
        architecture = ARCHITECTURES[self.model_type][self.head.kind]
        if self.model_type != "exaone4_5":
            return {"architectures": [architecture], **text, **self.head.to_dict()}
        if self.vision is None:
            raise ConfigError(
                "exaone4_5: expected a whole model to write, got its text part alone; "
                "copy the checkpoint's own config.json"
            )
        tied, dtype = text.pop("tie_word_embeddings"), text["torch_dtype"]
        text["model_type"] = "exaone4"
        if self.mtp_layer_types:
            text["num_nextn_predict_layers"] = len(self.mtp_layer_types)
        return {
            "architectures": [architecture],
            "model_type": self.model_type,
            "image_token_id": self.image_token_id,
            "video_token_id": self.video_token_id,
            "tie_word_embeddings": tied,
            "torch_dtype": dtype,
            "text_config": text,
            "vision_config": self.vision.to_dict() | {"torch_dtype": dtype},
        }

    def _text_dict(self) -> dict[str, object]:
        result: dict[str, object] = {
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
                # For readers that do not know layer_types: how many full layers come first.
                "max_window_layers": (*self.layer_types, SLIDING).index(SLIDING),
            }
        return result


def _one_or_list(ids: tuple[int, ...]) -> int | list[int] | None:
    return list(ids) if len(ids) > 1 else (ids[0] if ids else None)
