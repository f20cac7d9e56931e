"""Labels in config.json, and what the commands say of a classifier's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import command_line
import head_cases as cases
import pytest
from exafuse.cli import serving
from exafuse.cli.plan import plan
from exafuse.config import load_config
from exafuse.errors import ConfigError

# ---- labels ---------------------------------------------------------------------------------


def test_num_labels_and_the_file(tmp_path: Path) -> None:
    cases.build("llama", "causal_lm", num_labels=2).save_pretrained(tmp_path)
    for values in ({}, {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "num_labels": 2}):
        cases.edit(tmp_path, **values)  # what old files say although nothing has labels
        config = load_config(tmp_path, head="sequence_classification", num_labels=5)
        assert config.num_labels == 5
        assert load_config(tmp_path, head="token_classification").num_labels == 2
    cases.edit(tmp_path, id2label={"0": "no", "1": "yes"})
    named = load_config(tmp_path, head="sequence_classification")
    assert named.id2label == {0: "no", 1: "yes"}
    for given in (3, 1):
        words = (f"num_labels: expected 2, as many as {tmp_path}", "'no', 'yes'", f"got {given}")
        head = "sequence_classification"
        cases.refused(tmp_path, *words, error=ValueError, head=head, num_labels=given)
    for kind in ("base", "question_answering", "causal_lm", None):
        cases.refused(
            tmp_path, "num_labels: expected None", error=ValueError, head=kind, num_labels=2
        )
    for wrong in (0, -1, 10**9):
        with pytest.raises(ValueError, match="num_labels: expected 1 to"):
            load_config(tmp_path, head="sequence_classification", num_labels=wrong)
    for wrong in (True, 2.0, "2"):
        with pytest.raises(TypeError, match="num_labels: expected an int"):
            load_config(tmp_path, head="sequence_classification", num_labels=wrong)


def test_a_classifiers_own_number_counts_even_without_names(tmp_path: Path) -> None:
    cases.build("llama", "sequence_classification").save_pretrained(tmp_path)
    words = ("num_labels: expected 3", "got 5")
    cases.refused(tmp_path, *words, error=ValueError, num_labels=5)
    assert cases.load(tmp_path, num_labels=3).config.num_labels == 3
    cases.build("llama", "token_classification", num_labels=2).save_pretrained(tmp_path / "two")
    assert "id2label" not in json.loads((tmp_path / "two" / "config.json").read_text())
    cases.refused(tmp_path / "two", "num_labels: expected 2", error=ValueError, num_labels=3)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no names": ({"id2label": {}}, "id2label"),
    "a list": ({"id2label": ["a", "b"]}, "id2label"),
    "a gap": ({"id2label": {"0": "a", "2": "b"}}, "id2label"),
    "words for ids": ({"id2label": {"a": "a", "b": "b"}}, "id2label"),
    "numbers for names": ({"id2label": {"0": 1, "1": 2}}, "id2label"),
    "two numbers": ({"id2label": {"0": "a", "1": "b"}, "num_labels": 3}, "num_labels"),
    "no number": ({"num_labels": "3"}, "num_labels"),
    "a problem": ({"problem_type": "ranking"}, "problem_type"),
    "a problem of another type": ({"problem_type": 3}, "problem_type"),
    "one of one": (
        {"num_labels": 1, "problem_type": "single_label_classification"},
        "problem_type",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_malformed_labels_are_refused_where_they_matter(name: str) -> None:
    changes, key = WRONG[name]
    values = {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"], **changes}
    with pytest.raises(ConfigError, match=f"config: {key}: expected .*got"):
        load_config(values)
    load_config(values, head="base")


def test_dropout_and_bias_of_a_token_classification() -> None:
    values = {"model_type": "qwen2", "architectures": ["Qwen2ForTokenClassification"]}
    for changes, dropout in (
        ({}, 0.1),
        ({"hidden_dropout": 0.3}, 0.3),
        ({"hidden_dropout": 0.3, "classifier_dropout": 0.0}, 0.0),
        ({"classifier_dropout": None}, 0.1),
    ):
        head = load_config(values | changes).head
        assert (head.dropout, head.bias, head.labels) == (dropout, True, ("LABEL_0", "LABEL_1"))
    config = load_config(values | {"token_classification_bias": False})
    assert not config.head.bias
    assert load_config(config.to_dict()) == config
    with pytest.raises(ConfigError, match="classifier_dropout"):
        load_config(values | {"classifier_dropout": 2})


# ---- commands -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", cases.TENSORS)
def test_commands_say_what_a_classifiers_folder_is(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases.build("exaone4", kind).save_pretrained(tmp_path)
    capsys.readouterr()
    folder = str(tmp_path)
    said = f"got a model for {kind.replace('_', ' ')}"
    for argv in (["generate", folder, "hello"], ["chat", folder], ["verify", folder]):
        assert command_line.exit_code(argv) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"exafuse: error: {folder}: expected a language model to ")
        assert said in error
        assert f"exafuse.from_pretrained('{folder}')" in error
        assert error.count("\n") == 1
    assert command_line.exit_code(["plan", folder]) == 0
    assert f"head: {said.removeprefix('got ')}" in capsys.readouterr().out
    written = plan(folder).to_dict()
    assert written["head"] == kind
    assert written["num_parameters"] == sum(p.numel() for p in cases.load(tmp_path).parameters())


@pytest.mark.parametrize("kind", cases.TENSORS)
def test_a_classifier_is_not_served(kind: str, tmp_path: Path) -> None:
    cases.build("qwen2", kind).save_pretrained(tmp_path)
    message = f"expected a language model to serve, got a model for {kind.replace('_', ' ')}"
    with pytest.raises(ConfigError, match=message):
        serving._check_checkpoint(tmp_path)
