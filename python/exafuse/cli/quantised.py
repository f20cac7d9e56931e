"""Checkpoints whose weights are quantised: transformers loads them, our kernels run the layers."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from exafuse.errors import CheckpointError

METHODS = ("awq", "bitsandbytes", "compressed-tensors", "fbgemm_fp8", "fp8", "gptq", "torchao")
# They report, on every start, kernels of theirs that this machine cannot use.
_TALKATIVE = ("bitsandbytes", "torchao", "torch.utils._pytree")


def hush_libraries() -> None:
    """No word below an error from the libraries of quantisation."""
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)


def check_for_transformers(folder: Path, quantisation: dict[str, Any] | None) -> None:
    """Raise unless transformers finds everything of a model in its folder, and runs none of it.

    Args:
        folder: the checkpoint.
        quantisation: what its config.json says of quantised weights, None if nothing.

    Raises:
        CheckpointError: the weights are no safetensors files of the folder, an adapter names
            another model, or the method is one that we do not trust a file to name.
    """
    from exafuse.config.quantisation import describe_method, method_of
    from exafuse.weights.checkpoint import Checkpoint

    if quantisation is not None and method_of(quantisation) not in METHODS:
        raise CheckpointError(
            f"{folder}: config.json: quantization_config: expected a quant_method of "
            f"{', '.join(METHODS)}, got {describe_method(method_of(quantisation))}"
        )
    if (folder / "adapter_config.json").exists():  # transformers would follow it to another model
        raise CheckpointError(
            f"{folder}: expected a model, got an adapter as well (adapter_config.json); merge it, "
            "or load it with peft"
        )
    Checkpoint.open(folder)  # no file but those of the folder, and nothing but tensors in them


def load_quantised(
    folder: Path,
    quantisation: dict[str, Any],
    values: dict[str, Any],
    arguments: argparse.Namespace,
) -> Any:
    """The model of a folder whose weights are quantised, patched.

    Args:
        folder: the checkpoint.
        quantisation: what its config.json says of that.
        values: what it says besides.
        arguments: of the command line.

    Raises:
        ConfigError: the model is none of ours.
        CheckpointError: the files are not what they must be, the method is one that we do not
            trust a file to name, or transformers cannot load it here.
        ValueError: an argument that such a folder cannot have.
    """
    import torch
    import transformers

    from exafuse.config import load_config
    from exafuse.config.head import require_language_model
    from exafuse.config.quantisation import describe_method, method_of
    from exafuse.generation.config import GenerationConfig
    from exafuse.integrations.generating import PatchedModel
    from exafuse.integrations.patching import patch

    if arguments.quantize is not None:
        raise ValueError(
            f"quantize: expected unquantised weights, those of {folder} are quantised already"
        )
    config = load_config(values)
    method = describe_method(method_of(quantisation))
    check_for_transformers(folder, quantisation)
    require_language_model(config.head, arguments.model, "generate text")
    if not arguments.quiet:
        print(
            f"exafuse: the weights are quantised by {method}: transformers loads them, "
            "exafuse.patch runs the layers between them on our kernels",
            file=sys.stderr,
        )
    if arguments.quiet or not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    classes = {"exaone4_5": transformers.AutoModelForImageTextToText}
    loader = classes.get(config.model_type, transformers.AutoModelForCausalLM)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model = loader.from_pretrained(
            str(folder),
            dtype=arguments.dtype,
            device_map=device,
            attn_implementation="sdpa",  # and none that a file names
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    # A library or a device that the method needs, or a file that is not what the config says.
    except (AttributeError, ImportError, KeyError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: the weights are quantised by {method}, and transformers cannot load them "
            f"here: {type(error).__name__}: {error}"
        ) from error
    generation = GenerationConfig.from_folder(folder, config)
    return PatchedModel(patch(model, arguments.backend), config, generation)
