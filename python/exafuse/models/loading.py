"""``from_pretrained`` and ``from_config``: the two ways to a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from exafuse.config import ModelConfig, load_config
from exafuse.config.head import HeadKind
from exafuse.config.model import DType
from exafuse.generation.config import GenerationConfig
from exafuse.layers import RMSNorm, resolve_backend
from exafuse.models.backbone import Backbone
from exafuse.models.causal_lm import CausalLM
from exafuse.models.exaone4_5 import Exaone4_5, Exaone4_5Base
from exafuse.models.heads import (
    BaseModel,
    QuestionAnswerer,
    SequenceClassifier,
    TokenClassifier,
)
from exafuse.weights.checkpoint import Checkpoint
from exafuse.weights.hub import resolve_folder
from exafuse.weights.loading import load_weights
from exafuse.weights.memory import check_fits
from exafuse.weights.names import num_mtp_layers
from exafuse.weights.quantising import Quantiser

CLASSES: dict[HeadKind, type[Backbone]] = {
    "causal_lm": CausalLM,
    "base": BaseModel,
    "sequence_classification": SequenceClassifier,
    "token_classification": TokenClassifier,
    "question_answering": QuestionAnswerer,
}
VISION_CLASSES: dict[HeadKind, type[Backbone]] = {"causal_lm": Exaone4_5, "base": Exaone4_5Base}
DTYPES: dict[DType, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


def from_pretrained(
    folder_or_name: str | Path,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    backend: str = "auto",
    head: str | None = None,
    num_labels: int | None = None,
    quantize: Any = None,
    revision: str | None = None,
    mtp: bool | None = None,
    *,
    progress: bool = True,
    check_finite: bool = False,
) -> Backbone:
    """Load a checkpoint folder or a Hub name.

    Args:
        folder_or_name: an existing folder wins; anything else is a Hub repository id.
        dtype: None or "auto" = that of the weights in the file; or "bfloat16", "float16",
            "float32", a torch dtype to cast to.
        device: None = the GPU if there is one, else the CPU.
        device_map: a single device, spelled as in accelerate ("cuda:0", {"": 0}).
        backend: "auto" (kernels where they can run), "cuda", "emulated" or "reference".
        head: None = what ``architectures`` in config.json names, a language model where that is
            nothing or a bare model; or "causal_lm", "base" (hidden states),
            "sequence_classification", "token_classification", "question_answering". What the file
            lacks of a head that is asked for by name is initialised, with a warning; what it has
            of another is left out.
        num_labels: of a head that classifies; None = the file's (``id2label``), else 2.
        quantize: "int8", "fp8", "int4" (on a GPU, in bfloat16) or a torchao configuration object:
            torchao quantises the weights of the decoder layers' linear layers as they are read.
            Embeddings, heads, norms, vision tower and draft module stay in ``dtype``.
        revision: of a Hub repository.
        mtp: load the draft module; None = if the file has it, True = a ValueError if it does not.
        progress: show a bar while loading (never when stderr is not a terminal).
        check_finite: refuse weights that hold NaN or infinity.

    Raises:
        ConfigError, CheckpointError: the folder's files are not what they must be.
        DoesNotFitError: the weights do not fit the free memory; nothing has been read.
        ValueError: an argument is impossible, or ``num_labels`` contradicts the file.
        ImportError: ``quantize`` without torchao (the extra "quant").
    """
    functions = resolve_backend(backend)
    target = _device(device, device_map, backend)
    folder = resolve_folder(str(folder_or_name), revision)
    config = load_config(folder, head=head, num_labels=num_labels)
    config = _with_mtp(config, folder, mtp)
    kind = _dtype(dtype, config)
    # Where the file decides, or torchao does, loading knows what is needed.
    if dtype not in (None, "auto") and quantize is None:
        check_fits(config.num_parameters() * kind.itemsize, target, f"the weights of {folder}")
    with torch.device("meta"):
        model = model_class(config)(config, functions)
    quantiser = None if quantize is None else Quantiser(quantize, model, model.text.layers)
    load_weights(
        model,
        folder,
        dtype="auto" if dtype is None else dtype,
        device=target,
        tie_word_embeddings=config.tie_word_embeddings,
        check_finite=check_finite,
        progress=progress,
        new_head_std=None if head is None else config.initializer_range,
        quantiser=quantiser,
    )
    model.config = _as_loaded(config, model.dtype)
    if isinstance(model, CausalLM):
        model.generation_config = GenerationConfig.from_folder(folder, config)
    return model


def from_config(
    config: ModelConfig | Mapping[str, Any] | str | Path,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    head: str | None = None,
    *,
    backend: str = "auto",
    seed: int | None = None,
    num_labels: int | None = None,
) -> Backbone:
    """A model with random weights, made on the device: matrices N(0, initializer_range), norms 1.

    Args:
        config: a ModelConfig, a dict as in config.json, or a path to one.
        dtype, device, backend: as in :func:`from_pretrained`.
        head, num_labels: as in :func:`from_pretrained`; None = the config's.
        seed: of a private generator; None = torch's global one.
    """
    if isinstance(config, ModelConfig):
        config = config.with_head(head, num_labels)
    else:
        config = load_config(config, head=head, num_labels=num_labels)
    target, kind = _device(device, None, backend), _dtype(dtype, config)
    check_fits(config.num_parameters() * kind.itemsize, target, "the random weights")
    with torch.device("meta"):
        model = model_class(config)(config, resolve_backend(backend))
    model = model.to(kind).to_empty(device=target)
    if isinstance(model, CausalLM) and config.tie_word_embeddings:
        model.lm_head.weight = model.text.embed_tokens.weight
    _init_weights(model, config.initializer_range, seed)
    model.config = _as_loaded(config, kind)
    if isinstance(model, CausalLM):
        model.generation_config = GenerationConfig.from_model_config(config)
    return model


def model_class(config: ModelConfig) -> type[Backbone]:
    """The class that runs this model."""
    classes = VISION_CLASSES if config.model_type == "exaone4_5" else CLASSES
    return classes[config.head.kind]


def _with_mtp(config: ModelConfig, folder: Path, mtp: bool | None) -> ModelConfig:
    """The config with as many draft layers as are to be loaded: the file's weights decide."""
    if config.head.kind != "causal_lm":
        if mtp:
            raise ValueError(f"mtp: expected None or False for {config.head.describe()}, got True")
        return config.with_mtp_layers(0)
    number = 0
    if config.model_type == "exaone4_5" and mtp is not False:
        number = num_mtp_layers(Checkpoint.open(folder).tensors)
    if mtp and not number:
        raise ValueError(f"mtp: expected a checkpoint with mtp.* tensors, {folder} has none")
    return config.with_mtp_layers(number)


@torch.no_grad()
def _init_weights(model: nn.Module, std: float, seed: int | None) -> None:
    generator = None
    if seed is not None:
        generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv3d):
            nn.init.normal_(module.weight, std=std, generator=generator)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)


def _as_loaded(config: ModelConfig, dtype: torch.dtype) -> ModelConfig:
    """The config with the dtype that the weights have now: what is saved with them must say so."""
    (name,) = (name for name, kind in DTYPES.items() if kind == dtype)
    return dataclasses.replace(config, dtype=name)


def _dtype(dtype: str | torch.dtype | None, config: ModelConfig) -> torch.dtype:
    if dtype is None or dtype == "auto":
        return DTYPES[config.dtype]
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    if dtype in DTYPES.values():
        assert isinstance(dtype, torch.dtype)
        return dtype
    raise ValueError(f"dtype: expected auto, {', '.join(DTYPES)}, got {dtype!r}")


def _device(
    device: str | torch.device | None, device_map: str | Mapping[str, Any] | None, backend: str
) -> torch.device:
    if device_map is not None:
        if device is not None:
            raise ValueError("device, device_map: expected one of them")
        one: Any = None
        if isinstance(device_map, Mapping):
            one = device_map[""] if set(device_map) == {""} else None
        elif device_map != "auto":
            one = device_map
        if device_map != "auto" and one is None:
            raise ValueError(
                f"device_map: expected 'auto' or a single device, got {device_map!r}; "
                "to spread a model over devices load it with transformers"
            )
        device = torch.device("cuda", one) if isinstance(one, int) else one
    if device is None:
        device = "cuda" if torch.cuda.is_available() and backend != "emulated" else "cpu"
    target = torch.device(device)
    if (backend, target.type) in (("cuda", "cpu"), ("emulated", "cuda")):
        raise ValueError(f"backend, device: {backend!r} kernels cannot run on device {device!r}")
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {device} was asked for, but torch finds no GPU here")
    return target
