"""Names of the weights: in checkpoints, in the model, and the one table of merges between the two.

Parameters carry the checkpoint's names, except that projections which read the same input are one
matrix in the model (``MERGES``). Loading and saving both go by ``checkpoint_slots``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

# Merged module in the model -> the checkpoint's modules, in the order of the rows.
MERGES: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
HEAD = "lm_head.weight"
# How the names of the backbone begin in a saved file where they do not begin with "model.".
_SAVED_PREFIXES = {"base": "", "question_answering": "transformer."}

# A checkpoint may hold these without the model having a place for them: rotary tables that very old
# Llama files carry (they are recomputed), and the draft module of EXAONE 4.5.
_NOT_LOADED = ("*rotary_emb.inv_freq", "mtp.*")


@dataclass(frozen=True)
class Part:
    """A part of a model: how its names begin here, and (group 1) how they may begin in a file."""

    prefix: str
    pattern: re.Pattern[str]


_BACKBONE = r"((?:embed_tokens|layers|norm)\..+)"
# The backbone's names start with "model." in a causal LM, with "transformer." in a question
# answering model and with nothing in a bare backbone.
_TEXT = (Part("model.", re.compile(rf"(model\.|transformer\.|){_BACKBONE}", re.DOTALL)),)
# With a vision tower there are today's names, those of older files, and a text model's own.
_LANGUAGE = r"(model\.language_model\.|language_model\.model\.|language_model\.|model\.|)"
_MULTIMODAL = (
    Part("model.language_model.", re.compile(_LANGUAGE + _BACKBONE, re.DOTALL)),
    Part("model.visual.", re.compile(r"(model\.visual\.|visual\.)(.+)", re.DOTALL)),
    Part("", re.compile(r"(language_model\.|)(lm_head\..+)", re.DOTALL)),
)


def embedding_name(names: Iterable[str]) -> str:
    """The input embedding among a model's names."""
    (name,) = (name for name in names if name.endswith("embed_tokens.weight"))
    return name


def parts_of(names: Iterable[str]) -> tuple[Part, ...]:
    """The parts of the model that has these names."""
    with_tower = any(name.startswith("model.visual.") for name in names)
    return _MULTIMODAL if with_tower else _TEXT


def is_not_loaded(name: str, names: Iterable[str] = ()) -> bool:
    """Whether a checkpoint may hold this tensor although the model, which has these ``names``, has
    no place for it."""
    return any(
        fnmatchcase(name, pattern) and not any(fnmatchcase(other, pattern) for other in names)
        for pattern in _NOT_LOADED
    )


def num_mtp_layers(names: Iterable[str]) -> int:
    """How many layers the draft module among a file's names has; 0 if there is none."""
    found = (re.match(r"mtp\.layers\.(\d{1,4})\.", name) for name in names)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def split_prefix(name: str, parts: tuple[Part, ...] = _TEXT) -> tuple[Part | None, str, str]:
    """Which part a name of a file belongs to (None: to none), how it begins there, and the model's
    own name for it."""
    for part in parts:
        match = part.pattern.fullmatch(name)
        if match:
            return part, match[1], part.prefix + match[2]
    return None, "", name


@dataclass(frozen=True)
class Slot:
    """Where a tensor of the checkpoint lives in the model: these rows of this parameter."""

    parameter: str
    rows: slice
    shape: tuple[int, ...]


def checkpoint_slots(model: nn.Module) -> dict[str, Slot]:
    """Checkpoint name -> place in the model, for every parameter.

    ``model.config`` (``num_heads``, ``num_kv_heads``, ``head_dim``) says where q, k and v part.
    """
    slots: dict[str, Slot] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        *path, module, kind = name.split(".")
        parts = MERGES.get(module, (module,))
        start = 0
        for part, rows in zip(parts, _rows_of_parts(module, parameter, model), strict=True):
            part_name = ".".join([*path, part, kind])
            slots[part_name] = Slot(name, slice(start, start + rows), (rows, *parameter.shape[1:]))
            start += rows
        if start != parameter.shape[0]:
            raise ValueError(f"{name}: expected {start} rows by the config, got {parameter.shape}")
    return slots


def _rows_of_parts(module: str, parameter: Tensor, model: nn.Module) -> tuple[int, ...]:
    """How many rows of a (merged) parameter belong to each of its parts."""
    if module == "qkv_proj":
        config: Any = model.config
        kv_rows = config.num_kv_heads * config.head_dim
        return config.num_heads * config.head_dim, kv_rows, kv_rows
    count = len(MERGES.get(module, (module,)))
    return (parameter.shape[0] // count,) * count


def saved_name(name: str, model: Any) -> str:
    """What transformers calls this tensor in a file of a model with the head that the config
    names."""
    prefix = _SAVED_PREFIXES.get(model.config.head.kind, "model.")
    return prefix + name.removeprefix("model.") if name.startswith("model.") else name


def unmerged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor under its checkpoint name, as a view of the model's parameter (no copy)."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {
        name: parameters[slot.parameter].detach()[slot.rows]
        for name, slot in checkpoint_slots(model).items()
    }
