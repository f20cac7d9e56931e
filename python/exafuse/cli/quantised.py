"""Checkpoints whose weights are quantised: transformers loads them, our kernels run the layers."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from exafuse.errors import CheckpointError

# They report, on every start, kernels of theirs that this machine cannot use.
_TALKATIVE = ("bitsandbytes", "torchao", "torch.utils._pytree")


def hush_libraries() -> None:
    """No word below an error from the libraries of quantisation."""
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)


def load_quantised(
    folder: Path, method: str, values: dict[str, Any], arguments: argparse.Namespace
) -> Any:
    """The model of a folder whose weights are quantised by ``method``, patched.

    Args:
        folder: the checkpoint.
        method: for messages.
        values: its config.json without what it says of quantisation.
        arguments: of the command line.

    Raises:
        ConfigError: the model is none of ours.
        CheckpointError: transformers cannot load it here.
        ValueError: an argument that such a folder cannot have.
    """
    import torch
    import transformers

    from exafuse.config import load_config
    from exafuse.config.head import require_language_model
    from exafuse.generation.config import GenerationConfig
    from exafuse.integrations.generating import PatchedModel
    from exafuse.integrations.patching import patch

    if arguments.quantize is not None:
        raise ValueError(
            f"quantize: expected unquantised weights, those of {folder} are quantised by {method}"
        )
    config = load_config(values)
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
