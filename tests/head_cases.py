"""Tiny transformers models with every head, calls of them with labels, and their gradients."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exafuse
import pytest
import tiny_models
import torch
import transformers
from exafuse.errors import CheckpointError
from exafuse.models.backbone import Backbone
from exafuse.weights.names import checkpoint_slots, saved_name
from torch import Tensor

SUFFIXES = {
    "causal_lm": "ForCausalLM",
    "base": "Model",
    "sequence_classification": "ForSequenceClassification",
    "token_classification": "ForTokenClassification",
    "question_answering": "ForQuestionAnswering",
}
PREFIXES = {"llama": "Llama", "qwen2": "Qwen2", "exaone4": "Exaone4"}
OVERRIDES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "exaone4": {"num_hidden_layers": 4, "sliding_window": 5, "sliding_window_pattern": 4},
}
FAMILIES = list(PREFIXES)
PAD = 0
# What each head adds to the body, as files name it.
TENSORS = {
    "sequence_classification": ["score.weight"],
    "token_classification": ["score.bias", "score.weight"],
    "question_answering": ["qa_outputs.bias", "qa_outputs.weight"],
}


def class_of(family: str, kind: str) -> type[transformers.PreTrainedModel]:
    """The class of transformers with this head."""
    cls: type[transformers.PreTrainedModel] = getattr(
        transformers, PREFIXES[family] + SUFFIXES[kind]
    )
    return cls


def build(
    family: str, kind: str, seed: int = 1, attention: str = "eager", **overrides: Any
) -> transformers.PreTrainedModel:
    """An fp32 model of transformers in evaluation, no weight of it trivial."""
    options = {
        **tiny_models.BASE,
        "pad_token_id": PAD,
        "num_labels": 3,
        **OVERRIDES[family],
        **overrides,
    }
    config = tiny_models.FAMILIES[family][0](**options)
    config._attn_implementation = attention
    return tiny_models.randomise(class_of(family, kind)(config).eval(), seed)


def pair(
    family: str, kind: str, folder: Path, **overrides: Any
) -> tuple[transformers.PreTrainedModel, Backbone]:
    """The two models of one folder that transformers saved."""
    theirs = build(family, kind, **overrides)
    theirs.save_pretrained(folder)
    head = "base" if kind == "base" else None
    return theirs, exafuse.from_pretrained(folder, device="cpu", backend="reference", head=head)


def inputs(padding: str = "mixed") -> dict[str, Tensor]:
    """Four rows of ids, padded "left", "right", "mixed" or "none"."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(1, 97, (4, 11), generator=generator)
    for row, count in enumerate((0, 3, 6, 10)):
        side = {"left": 0, "right": 1, "mixed": row % 2, "none": None}[padding]
        if side == 0:
            ids[row, :count] = PAD
        elif side == 1 and count:
            ids[row, -count:] = PAD
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def _draw(high: int, shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def _floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(9))


def _token_labels(high: int) -> Tensor:
    labels = _draw(high, (4, 11), 3)
    mask = inputs()["attention_mask"]
    labels[mask == 0] = -100
    labels[0, 2:5] = -100
    # The first token behind padding is predicted by padding: of no meaning on either side.
    labels[:, 1:][(mask[:, 1:] == 1) & (mask[:, :-1] == 0)] = -100
    return labels


def batch_for(arguments: dict[str, Any]) -> dict[str, Any]:
    """Inputs and ``arguments`` of a loss; a span is sought among all columns, and what transformers
    computes for padding is part of that, so that there is none."""
    return inputs("none" if "start_positions" in arguments else "mixed") | arguments


# name: head, config, arguments of the loss.
LOSSES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "next tokens": ("causal_lm", {}, {"labels": _token_labels(97)}),
    "next tokens, counted by the caller": (
        *("causal_lm", {}),
        {"labels": _token_labels(97), "num_items_in_batch": 17},
    ),
    "next tokens, counted in a tensor": (
        *("causal_lm", {}),
        {"labels": _token_labels(97), "num_items_in_batch": torch.tensor(5)},
    ),
    "one class": ("sequence_classification", {}, {"labels": _draw(3, (4,), 1)}),
    "one class, a column": ("sequence_classification", {}, {"labels": _draw(3, (4, 1), 1)}),
    "one class, a row ignored": (
        *("sequence_classification", {}),
        {"labels": torch.tensor([2, -100, 0, 1])},
    ),
    "several classes": (
        *("sequence_classification", {}),
        {"labels": _draw(2, (4, 3), 2).float()},
    ),
    "several classes by problem_type": (
        *("sequence_classification", {"problem_type": "multi_label_classification"}),
        {"labels": _draw(2, (4, 3), 2).float()},
    ),
    "one class by problem_type": (
        *("sequence_classification", {"problem_type": "single_label_classification"}),
        {"labels": _draw(3, (4,), 4)},
    ),
    "a number": ("sequence_classification", {"num_labels": 1}, {"labels": _floats(4)}),
    "a number in a column": (
        *("sequence_classification", {"num_labels": 1}),
        {"labels": _floats(4, 1)},
    ),
    "several numbers": (
        *("sequence_classification", {"problem_type": "regression"}),
        {"labels": _floats(4, 3)},
    ),
    "a class for each token": ("token_classification", {}, {"labels": _token_labels(3)}),
    "a span": (
        *("question_answering", {}),
        {
            "start_positions": torch.tensor([0, 2, 11, 40]),  # the last two are beyond the columns
            "end_positions": torch.tensor([3, 10, -4, 5]),
        },
    ),
    "a span in columns, counted by the caller": (
        *("question_answering", {}),
        {
            "start_positions": torch.tensor([[1], [2], [3], [4]]),
            "end_positions": torch.tensor([[5], [5], [7], [10]]),
            "num_items_in_batch": 3,
        },
    ),
}


def scores(output: Any, mask: Tensor | None = None) -> Tensor:
    """What a head gives, stacked; of tokens alone, where it gives something for each."""
    names = ("start_logits", "end_logits") if hasattr(output, "start_logits") else ("logits",)
    if hasattr(output, "last_hidden_state"):
        names = ("last_hidden_state",)
    found = torch.stack([getattr(output, name) for name in names], -1)
    if mask is None or found.shape[:2] != mask.shape:
        return found
    return found[mask.bool()]


def close(ours: Tensor, theirs: Tensor, what: str = "") -> None:
    """Within the rule of fp32 models: 2e-5 of the largest value."""
    assert ours.shape == theirs.shape, what
    limit = 2e-5 * float(theirs.detach().abs().max())
    worst = float((ours - theirs).detach().abs().max())
    assert worst <= limit, f"{what}: error {worst:.3g}, limit {limit:.3g}"


def gradients(model: Any, call: Callable[[Any], Tensor]) -> dict[str, Tensor]:
    """Of the loss that ``call`` returns, under the names of the file; of ours or of theirs."""
    model.zero_grad()
    call(model).backward()
    if not isinstance(model, Backbone):
        return {name: p.grad.clone() for name, p in model.named_parameters()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    result = {}
    for name, slot in checkpoint_slots(model).items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        gradient = parameters[slot.parameter].grad
        assert gradient is not None, name
        result[saved_name(name, model)] = gradient[slot.rows].clone()
    return result


def close_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """The same names, and each within 2e-5 of its own norm; what is zero but for rounding (the bias
    of a softmax over columns) within 1e-6 of the largest norm."""
    assert ours.keys() == theirs.keys()
    floor = 1e-6 * max(float(gradient.norm()) for gradient in theirs.values())
    for name, expected in theirs.items():
        error = float((ours[name] - expected).norm())
        assert error <= 2e-5 * float(expected.norm()) + floor, f"{name}: {error:.3g}"


def load(folder: Path, **options: Any) -> Any:
    """Without any warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return exafuse.from_pretrained(folder, device="cpu", backend="reference", **options)


def edit(folder: Path, **changes: Any) -> None:
    """Keys of config.json; None removes one."""
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: x for key, x in values.items() if x is not None}))


def refused(folder: Path, *words: str, error: type[Exception] = CheckpointError, **o: Any) -> None:
    with pytest.raises(error) as caught:
        load(folder, **o)
    for word in words:
        assert word in str(caught.value), str(caught.value)
