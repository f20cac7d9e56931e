"""The tensors of heads: which there are, making those that a file lacks, what to say about them."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from torch import Tensor

from exafuse.weights.names import HEAD

# Of every head that a model may have. Which it has, the config says; a file can hold another.
HEAD_TENSORS = frozenset(
    (HEAD, "score.weight", "score.bias", "qa_outputs.weight", "qa_outputs.bias")
)


def make_head(
    names: Iterable[str], tensors: Mapping[str, Tensor], std: float, folder: Path
) -> None:
    """Draw ``tensors``, by name, from N(0, std), biases 0, and say so: ``folder`` has none."""
    for name in names:
        if name.endswith("bias"):
            tensors[name].zero_()
        else:
            tensors[name].normal_(0, std)
    warnings.warn(
        f"{folder}: {', '.join(names)}: not in the file, initialised at random; train the model "
        "before its scores mean anything",
        stacklevel=5,
    )


def about_heads(missing: Collection[str], found: Collection[str]) -> str:
    """What to do about a head that the file lacks."""
    if not HEAD_TENSORS.intersection(missing):
        return ""
    if HEAD in missing:
        reason = "no lm_head.weight although tie_word_embeddings is false"
    else:
        reason = "architectures in config.json names this head"
    others = sorted(HEAD_TENSORS.intersection(found).difference(missing))
    if others:
        reason += f", and the file has {', '.join(others)}"
    return f' ({reason}; head="base" loads the model without a head, another head= by its name)'
