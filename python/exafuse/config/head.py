"""What a model's hidden states are turned into: the head, its labels, the loss they are for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal, cast

from exafuse.config.fields import REQUIRED, Fields
from exafuse.config.limits import MAX_VOCAB
from exafuse.errors import ConfigError
from exafuse.strict_json import shorten

HeadKind = Literal[
    "causal_lm", "base", "sequence_classification", "token_classification", "question_answering"
]
ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]

# How transformers ends the name of a class with this head.
SUFFIXES: Final[dict[HeadKind, str]] = {
    "causal_lm": "ForCausalLM",
    "base": "Model",
    "sequence_classification": "ForSequenceClassification",
    "token_classification": "ForTokenClassification",
    "question_answering": "ForQuestionAnswering",
}
_PREFIXES: Final = {"llama": "Llama", "qwen2": "Qwen2", "exaone4": "Exaone4"}
# Family -> head -> class in transformers: every head that the family has.
ARCHITECTURES: Final[dict[str, dict[HeadKind, str]]] = {
    **{
        family: {kind: prefix + suffix for kind, suffix in SUFFIXES.items()}
        for family, prefix in _PREFIXES.items()
    },
    "exaone4_5": {"causal_lm": "Exaone4_5_ForConditionalGeneration", "base": "Exaone4_5_Model"},
}
LABELLED: Final = ("sequence_classification", "token_classification")
_PROBLEM_TYPES: Final = ("regression", "single_label_classification", "multi_label_classification")
_DEFAULT_NUM_LABELS: Final = 2
_DEFAULT_DROPOUT: Final = 0.1


@dataclass(frozen=True)
class HeadConfig:
    """The head of a model.

    Attributes:
        kind: which one; "base" is none, the hidden states themselves.
        labels: name of each class, of the two kinds of classification only.
        problem_type: the loss of a sequence classification; None = by labels and their dtype.
        dropout: before the scores of a token classification, in training.
        bias: whether the scores of a token classification have one.
    """

    kind: HeadKind = "causal_lm"
    labels: tuple[str, ...] = ()
    problem_type: ProblemType | None = None
    dropout: float = 0.0
    bias: bool = False

    @property
    def num_outputs(self) -> int:
        """Scores for each token, or for each sequence; 0 where they are not the head's business."""
        return 2 if self.kind == "question_answering" else len(self.labels)

    def num_parameters(self, hidden_size: int) -> int:
        """Number of weights, without those of a language model's output matrix."""
        has_bias = self.kind == "question_answering" or self.bias
        return self.num_outputs * (hidden_size + has_bias)

    def describe(self) -> str:
        """The model in words, with its article."""
        if self.kind == "causal_lm":
            return "a language model"
        if self.kind == "base":
            return "a model without a head"
        words = f"a model for {self.kind.replace('_', ' ')}"
        many = "label" if len(self.labels) == 1 else "labels"
        return f"{words} ({len(self.labels)} {many})" if self.labels else words

    def to_dict(self) -> dict[str, object]:
        """The keys of config.json that are about the head; its class's name is not among them."""
        result: dict[str, object] = {}
        if self.labels:
            result["id2label"] = {str(index): name for index, name in enumerate(self.labels)}
            result["label2id"] = {name: index for index, name in enumerate(self.labels)}
        if self.problem_type is not None:
            result["problem_type"] = self.problem_type
        if self.kind == "token_classification":
            result["classifier_dropout"] = self.dropout
            if not self.bias:
                result["token_classification_bias"] = False
        return result


LANGUAGE_MODEL: Final = HeadConfig()


def require_language_model(head: HeadConfig, name: str, purpose: str) -> None:
    """Raise for a checkpoint that has no words to say.

    Raises:
        ConfigError: naming the checkpoint, what it is and how its scores are had.
    """
    if head.kind != "causal_lm":
        raise ConfigError(
            f"{name}: expected a language model to {purpose}, got {head.describe()}, as "
            f"architectures in its config.json says; exafuse.from_pretrained({name!r}) in Python "
            "gives a model that is called with token ids and returns its scores"
        )


def check_head(head: str | None, num_labels: int | None, model_type: str) -> None:
    """Raise for arguments that no model of the family can honour.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    known = ARCHITECTURES[model_type]
    if head is not None and head not in known:
        hint = "" if head not in SUFFIXES else f"; a model of {model_type} has no such head"
        raise ValueError(f"head: expected None or one of {', '.join(known)}, got {head!r}{hint}")
    if num_labels is None:
        return
    if isinstance(num_labels, bool) or not isinstance(num_labels, int):
        raise TypeError(f"num_labels: expected an int, got {type(num_labels).__name__}")
    if not 1 <= num_labels <= MAX_VOCAB:
        raise ValueError(f"num_labels: expected 1 to {MAX_VOCAB:,}, got {num_labels}")


def named_head(fields: Fields, model_type: str) -> HeadKind:
    """The head that the first of ``architectures`` names; bare models count as language models,
    which their embedding makes them where it is tied."""
    first = (fields.strings("architectures") or ("",))[0]
    kinds = {name: kind for kind, name in ARCHITECTURES[model_type].items()}
    kind = kinds.get(first, "causal_lm")
    return "causal_lm" if kind == "base" else kind


def read_head(
    fields: Fields, model_type: str, head: str | None, num_labels: int | None
) -> HeadConfig:
    """The head of a config.json, or the one that ``head`` asks for.

    Args:
        fields: of the whole file.
        model_type: its family.
        head: see :func:`check_head`; None = the file's.
        num_labels: None = the file's.

    Raises:
        ConfigError: a key about the head is malformed, or two of them contradict each other.
        ValueError: ``head`` or ``num_labels`` is impossible, or contradicts the file.
    """
    check_head(head, num_labels, model_type)
    named = named_head(fields, model_type)
    kind = named if head is None else cast(HeadKind, head)
    if kind not in LABELLED:
        _refuse_labels(kind, num_labels)
        return HeadConfig(kind)
    labels = _read_labels(fields, num_labels, named in LABELLED)
    if kind == "sequence_classification":
        return HeadConfig(kind, labels, _read_problem_type(fields, len(labels)))
    dropout = _DEFAULT_DROPOUT
    for key in ("hidden_dropout", "classifier_dropout"):  # the last one counts
        if fields.has(key):
            dropout = fields.number(key, REQUIRED, 0.0, 1.0)
    bias = fields.boolean("token_classification_bias", True)
    return HeadConfig(kind, labels, dropout=dropout, bias=bias)


def another_head(
    head: HeadConfig, model_type: str, kind: str | None, num_labels: int | None
) -> HeadConfig:
    """``head``, or what ``kind`` asks for in its place; arguments and errors as for
    :func:`read_head`."""
    check_head(kind, num_labels, model_type)
    new = head.kind if kind is None else cast(HeadKind, kind)
    if new not in LABELLED:
        _refuse_labels(new, num_labels)
        return HeadConfig(new)
    labels = _agreed_labels(head.labels, num_labels, bool(head.labels), "the config")
    if new == head.kind:
        return replace(head, labels=labels)
    if new == "token_classification":
        return HeadConfig(new, labels, dropout=_DEFAULT_DROPOUT, bias=True)
    return HeadConfig(new, labels)


def _refuse_labels(kind: HeadKind, num_labels: int | None) -> None:
    if num_labels is not None:
        raise ValueError(
            f"num_labels: expected None for {HeadConfig(kind).describe()}, got {num_labels}"
        )


def _read_labels(fields: Fields, num_labels: int | None, named: bool) -> tuple[str, ...]:
    """The names in ``id2label``, or as many generic ones as are wanted; ``named``: the weights in
    the file have this many rows."""
    labels: tuple[str, ...] = ()
    table = fields.raw("id2label")
    if table is not None:
        expected = "an object with the ids 0, 1, 2, ... and a name for each"
        if not isinstance(table, Mapping) or not table:
            raise fields.error("id2label", expected)
        names = {str(key): name for key, name in table.items()}
        ids = [str(index) for index in range(len(table))]
        if sorted(names) != sorted(ids) or not all(isinstance(x, str) for x in names.values()):
            raise fields.error("id2label", expected)
        labels = tuple(names[key] for key in ids)
    if fields.has("num_labels"):
        number = fields.integer("num_labels", REQUIRED, 1, MAX_VOCAB)
        if labels and len(labels) != number:
            raise fields.error("num_labels", f"{len(labels)}, the number of names in id2label")
        labels = labels or _generic_labels(number)
    return _agreed_labels(labels, num_labels, named, f"{fields.file}")


def _generic_labels(number: int) -> tuple[str, ...]:
    return tuple(f"LABEL_{index}" for index in range(number))


def _agreed_labels(
    labels: tuple[str, ...], num_labels: int | None, named: bool, where: str
) -> tuple[str, ...]:
    """The labels of ``where``, or generic ones where only their number is known. What every file
    says, generic names of a model that is no classifier (``named``), says nothing."""
    if named:
        labels = labels or _generic_labels(_DEFAULT_NUM_LABELS)
    elif labels == _generic_labels(len(labels)) and num_labels is not None:
        labels = ()
    if num_labels is None or num_labels == len(labels):
        return labels or _generic_labels(_DEFAULT_NUM_LABELS)
    if not labels:
        return _generic_labels(num_labels)
    names = ", ".join(shorten(name) for name in labels[:4]) + (", ..." if labels[4:] else "")
    raise ValueError(
        f"num_labels: expected {len(labels)}, as many as {where} has in id2label ({names}), got "
        f"{num_labels}; leave it out, or change id2label there"
    )


def _read_problem_type(fields: Fields, num_labels: int) -> ProblemType | None:
    if not fields.has("problem_type"):
        return None
    value = fields.string("problem_type", REQUIRED)
    if value not in _PROBLEM_TYPES:
        raise fields.error("problem_type", f"null or one of {', '.join(_PROBLEM_TYPES)}")
    if value == "single_label_classification" and num_labels == 1:
        raise fields.error("problem_type", "regression for one label, or more labels")
    return cast(ProblemType, value)
