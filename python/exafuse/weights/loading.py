"""Loading weights from a checkpoint folder into a model (saving: ``saving.py``, re-exported here).

The rows of merged projections are read from the file straight into their place; no tensor exists
twice. Nothing is allocated or read before names, shapes and dtypes of all tensors are agreed.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from exafuse.errors import CheckpointError
from exafuse.weights.checkpoint import Checkpoint
from exafuse.weights.heads import HEAD_TENSORS, about_heads, make_head
from exafuse.weights.memory import check_fits
from exafuse.weights.names import (
    HEAD,
    MERGES,
    Part,
    Slot,
    checkpoint_slots,
    embedding_name,
    is_not_loaded,
    parts_of,
    split_prefix,
    unmerged_state_dict,
)
from exafuse.weights.quantising import Quantiser
from exafuse.weights.safetensors_file import CHUNK_BYTES, DTYPE_NAMES, TensorInfo, first_five, quote
from exafuse.weights.saving import save_weights
from exafuse.weights.targets import Target, needed_bytes

__all__ = [
    "MERGES",
    "Checkpoint",
    "TensorInfo",
    "check_fits",
    "load_weights",
    "save_weights",
    "unmerged_state_dict",
]

_LOADED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def load_weights(
    model: nn.Module,
    folder: str | Path,
    *,
    dtype: str | torch.dtype | None = "auto",
    device: str | torch.device = "cpu",
    tie_word_embeddings: bool,
    check_finite: bool = False,
    progress: bool = False,
    new_head_std: float | None = None,
    quantiser: Quantiser | None = None,
) -> None:
    """Fill a model that was built on the meta device from a checkpoint folder, shard by shard.

    The names must match exactly; only rotary tables, and ``mtp.*`` where the model has no such
    module, may be left over. The memory used
    beyond the model's own is one chunk of a few MiB. A model is changed only when all is read.

    A backbone may have any of its prefixes in the file, whatever the head. A head that the user has
    chosen instead of the file's may be missing there, and the file's be left over.

    Args:
        model: parameters named as in the checkpoint, but for ``MERGES``; on the meta device.
        folder: holds ``model.safetensors``, or shards and their index.
        dtype: "auto" or None takes the file's; "float32", "float16", "bfloat16" cast to it.
        device: where the parameters are made.
        tie_word_embeddings: the config's word. If the file nevertheless holds another output head
            than the embedding, the file's is used, untied, with a warning (as transformers does).
        check_finite: raise if a loaded tensor holds NaN or Inf.
        progress: show a progress bar, if standard error is a terminal.
        new_head_std: allow for another head than the file's: what the file lacks of it is drawn
            from N(0, new_head_std), biases 0, with a warning. None = the head is the file's.
        quantiser: quantises each of its weights as soon as it is complete, so that besides the
            quantised model there are never more than a few plain weights.

    Raises:
        CheckpointError: a file is malformed, or its tensors are not those of the model.
        DoesNotFitError: before the first tensor is read.
        ValueError: ``dtype`` is none of the above; it cannot be quantised that way on ``device``.
    """
    device = torch.device(device)
    wanted = _parse_dtype(dtype)
    checkpoint = Checkpoint.open(folder)
    slots = checkpoint_slots(model)
    sources = _match(checkpoint, slots, tie_word_embeddings, new_head_std is not None)
    dtype = wanted or _common_dtype(checkpoint.folder, sources.values())
    tied = HEAD in slots and tie_word_embeddings and _head_is_tied(checkpoint, sources, dtype)
    if tied:
        sources.pop(HEAD, None)

    old = dict(model.named_parameters(remove_duplicate=False))
    new_head = sorted(name for name in slots if name not in sources and not (tied and name == HEAD))
    names = sorted({slots[name].parameter for name in [*sources, *new_head]})
    num_bytes, what = needed_bytes({name: old[name] for name in names}, dtype, device, quantiser)
    check_fits(num_bytes, device, f"{checkpoint.folder}: {what}")
    targets = {name: Target(name, old[name], dtype, device, quantiser) for name in names}
    for name in sources:
        targets[slots[name].parameter].missing += 1
    _read_all(checkpoint, sources, slots, targets, device, check_finite, progress)
    if new_head_std is not None and new_head:
        tensors = {name: targets[name].values for name in new_head}
        make_head(new_head, tensors, new_head_std, checkpoint.folder)

    for name in names:
        _set_parameter(model, name, targets[name].parameter())
    if tied:
        _set_parameter(model, HEAD, model.get_parameter(embedding_name(slots)))


def _parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or dtype == "auto":
        return None
    parsed = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if parsed not in _LOADED_DTYPES:
        raise ValueError(
            f"dtype: expected 'auto', 'float32', 'float16' or 'bfloat16'; got {quote(dtype)}"
        )
    return parsed


def _match(
    checkpoint: Checkpoint, slots: Mapping[str, Slot], tie_word_embeddings: bool, any_head: bool
) -> dict[str, TensorInfo]:
    """Slot name -> tensor of the checkpoint; raises unless names, shapes and dtypes all agree.

    ``any_head``: the head may be missing, and another be left over.
    """
    found = _renamed(checkpoint, slots)
    others = HEAD_TENSORS if any_head else frozenset()
    missing = [name for name in slots if name not in found and name not in others]
    if tie_word_embeddings and HEAD in missing:
        missing.remove(HEAD)
    unexpected = [
        info.name for name, info in found.items() if name not in slots and name not in others
    ]
    faults = []
    if any_head:
        missing = [name for name in missing if name not in HEAD_TENSORS]
        unexpected = [
            name
            for name in unexpected
            if split_prefix(name, parts_of(slots))[2] not in HEAD_TENSORS
        ]
    if missing:
        hint = about_heads(missing, found)
        faults.append(f"{len(missing)} tensors are missing: {first_five(missing)}{hint}")
    if unexpected:
        faults.append(f"{len(unexpected)} tensors are unexpected: {first_five(unexpected)}")
    misshapen = [
        f"{quote(found[name].name)} (expected {list(slot.shape)}, got {list(found[name].shape)})"
        for name, slot in slots.items()
        if name in found and found[name].shape != slot.shape
    ]
    if misshapen:
        faults.append(
            f"{len(misshapen)} tensors have another shape than the config says: "
            + ", ".join(misshapen[:5])
        )
    if faults:
        raise CheckpointError(f"{checkpoint.folder}: " + "; ".join(faults))
    for info in found.values():
        if info.dtype not in _LOADED_DTYPES:
            raise CheckpointError(
                f"{checkpoint.folder / info.file}: tensor {quote(info.name)}: dtype: expected F32, "
                f"F16 or BF16, got {DTYPE_NAMES[info.dtype]}; a quantised checkpoint must be "
                "loaded by the library that made it"
            )
    return {name: found[name] for name in slots if name in found}


def _renamed(checkpoint: Checkpoint, names: Collection[str]) -> dict[str, TensorInfo]:
    """The model's name -> tensor to load; an error if a part is there under two prefixes."""
    found: dict[str, TensorInfo] = {}
    examples: dict[Part, dict[str, str]] = {}
    parts = parts_of(names)
    for info in checkpoint.tensors.values():
        if is_not_loaded(info.name, names):
            continue
        part, prefix, name = split_prefix(info.name, parts)
        if part is not None:
            examples.setdefault(part, {}).setdefault(prefix, info.name)
        found[name] = info
    for prefixes in examples.values():
        if len(prefixes) > 1:
            raise CheckpointError(
                f"{checkpoint.folder}: expected one prefix for all tensors of the backbone, got "
                f"{len(prefixes)}: {first_five(list(prefixes.values()))}"
            )
    return found


def _common_dtype(folder: Path, infos: Iterable[TensorInfo]) -> torch.dtype:
    examples: dict[torch.dtype, str] = {}
    for info in infos:
        examples.setdefault(info.dtype, info.name)
    if len(examples) != 1:
        listed = ", ".join(f"{quote(name)} is {DTYPE_NAMES[d]}" for d, name in examples.items())
        raise CheckpointError(
            f"{folder}: dtype 'auto': expected one dtype for all tensors, but {listed}; "
            "ask for one, for example dtype='bfloat16'"
        )
    return next(iter(examples))


def _head_is_tied(
    checkpoint: Checkpoint, sources: Mapping[str, TensorInfo], dtype: torch.dtype
) -> bool:
    """Whether the file holds no output head of its own, or one equal to the embedding."""
    if HEAD not in sources:
        return True
    head, embedding = sources[HEAD], sources[embedding_name(sources)]
    with ExitStack() as stack:
        shards = {
            file: stack.enter_context(checkpoint.open_shard(file))
            for file in {head.file, embedding.file}
        }
        num_values = head.nbytes // head.dtype.itemsize
        step = CHUNK_BYTES // 4
        for start in range(0, num_values, step):
            pair = []
            for info in (head, embedding):
                # A tensor of its own: these values of the file, without the rest.
                count = min(step, num_values - start)
                size = info.dtype.itemsize
                part = replace(
                    info, shape=(count,), offset=info.offset + start * size, nbytes=count * size
                )
                pair.append(torch.empty(count, dtype=dtype))
                shards[info.file].read_into(part, pair[-1])
            if not torch.equal(*pair):
                warnings.warn(
                    f"{checkpoint.folder}: tie_word_embeddings is true, but {quote(head.name)} "
                    f"differs from {quote(embedding.name)}; the file's head is used, untied",
                    stacklevel=3,
                )
                return False
    return True


def _read_all(
    checkpoint: Checkpoint,
    sources: Mapping[str, TensorInfo],
    slots: Mapping[str, Slot],
    targets: Mapping[str, Target],
    device: torch.device,
    check_finite: bool,
    progress: bool,
) -> None:
    """Read every source into its rows, file by file and in the order of the bytes."""
    from tqdm.auto import tqdm

    # One buffer for everything that cannot be read in place; pinned, it feeds a GPU twice as fast.
    staging = torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
    order = sorted(sources, key=lambda name: (sources[name].file, sources[name].offset))
    shown = progress and sys.stderr.isatty()
    total = sum(info.nbytes for info in sources.values())
    with tqdm(
        total=total, desc="Loading weights", unit="B", unit_scale=True, disable=not shown
    ) as bar:
        for file in checkpoint.files:
            with checkpoint.open_shard(file, staging) as shard:
                for name in order:
                    info, slot = sources[name], slots[name]
                    if info.file != file:
                        continue

                    def on_chunk(part: Tensor, num_bytes: int, info: TensorInfo = info) -> None:
                        bar.update(num_bytes)
                        if check_finite and not torch.isfinite(part).all():
                            raise CheckpointError(
                                f"{checkpoint.folder / info.file}: tensor {quote(info.name)}: "
                                f"holds NaN or Inf (as {part.dtype})"
                            )

                    target = targets[slot.parameter]
                    shard.read_into(info, target.values[slot.rows], on_chunk)
                    target.read_one()


def _set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    module, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(module), attribute, parameter)
