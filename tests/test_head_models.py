"""Heads in our own graph: labels that fit no loss, models from configs, the documented examples."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import exafuse
import head_cases as cases
import pytest
import tiny_models
import torch
from exafuse.models import losses
from exafuse.models.heads import SequenceClassifier

HEADS = [kind for kind in cases.SUFFIXES if kind != "causal_lm"]


@pytest.fixture(scope="module", params=cases.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


# ---- labels ---------------------------------------------------------------------------------

WRONG_LABELS: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "class too high": ("sequence_classification", {}, {"labels": [0, 1, 3, 2]}, "got 3"),
    "negative class": ("sequence_classification", {}, {"labels": [0, -1, 1, 2]}, "got -1"),
    "rows": ("sequence_classification", {}, {"labels": [0, 1]}, r"expected \(4,\), got \(2,\)"),
    "yes and no": (
        *("sequence_classification", {}),
        *({"labels": [0.0, 1.0, 1.0, 0.0]}, r"\(4, 3\) for problem_type multi_label"),
    ),
    "numbers": (
        *("sequence_classification", {"num_labels": 1}),
        *({"labels": [[1.0, 2.0]] * 4}, r"\(4, 1\) or \(4,\) for problem_type regression"),
    ),
    "floats for classes": (
        *("sequence_classification", {"problem_type": "single_label_classification"}),
        *({"labels": [0.0, 1.0, 2.0, 0.0]}, "expected int64 ids"),
    ),
    "tokens": ("token_classification", {}, {"labels": [[0] * 10] * 4}, r"got \(4, 10\)"),
    "class of a token": ("token_classification", {}, {"labels": [[7] * 11] * 4}, "got 7"),
    "span": ("question_answering", {}, {"start_positions": [1, 2]}, r"start_positions.*\(2,\)"),
    "floats for a span": (
        *("question_answering", {}),
        *({"end_positions": [1.0] * 4}, "end_positions: expected int64"),
    ),
    "next token": ("causal_lm", {}, {"labels": [[97] * 11] * 4}, "labels: .* 0 to 96.* got 97"),
}


@pytest.mark.parametrize("name", WRONG_LABELS)
def test_wrong_labels_are_refused_before_anything_runs(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, changes, arguments, message = WRONG_LABELS[name]
    config = cases.build("llama", kind, **changes).config.to_dict()
    model = exafuse.from_config(config, device="cpu", head=kind)
    monkeypatch.setattr(model, "_body", None)  # whoever calls it fails otherwise
    labels = {key: torch.tensor(value) for key, value in arguments.items()}
    with pytest.raises(ValueError, match=message):
        model(cases.inputs("none")["input_ids"], **labels)


def test_a_span_needs_both_ends(tmp_path: Path) -> None:
    theirs, ours = cases.pair("llama", "question_answering", tmp_path)
    ids = cases.inputs("none")["input_ids"]
    for model in (ours, theirs):
        assert model(ids, start_positions=torch.tensor([1, 2, 3, 4])).loss is None


@torch.no_grad()
def test_a_span_in_a_padded_batch_is_sought_in_all_columns(tmp_path: Path) -> None:
    """Padding scores the bias alone."""
    _, ours = cases.pair("exaone4", "question_answering", tmp_path)
    batch, ends = cases.inputs(), torch.tensor([[1, 2, 9, 0], [4, 7, 10, 0]])
    out = ours(**batch, start_positions=ends[0], end_positions=ends[1])
    for name, bias in zip(("start_logits", "end_logits"), ours.qa_outputs.bias, strict=True):
        padding = getattr(out, name)[batch["attention_mask"] == 0]
        assert torch.equal(padding, bias.expand_as(padding))
    both = [
        -scores.log_softmax(1)[range(4), positions].mean()
        for scores, positions in zip((out.start_logits, out.end_logits), ends, strict=True)
    ]
    cases.close(out.loss, sum(both) / 2)


@torch.no_grad()
def test_int32_labels_are_labels(tmp_path: Path) -> None:
    """transformers takes int64 alone."""
    batch = cases.inputs()
    for kind in ("causal_lm", "sequence_classification", "token_classification"):
        _, ours = cases.pair("llama", kind, tmp_path / kind)
        labels = torch.tensor([2, 0, 1, 1])
        if kind != "sequence_classification":
            labels = batch["input_ids"] % 3
        a, b = (ours(**batch, labels=x).loss for x in (labels, labels.int()))
        assert torch.equal(a, b)


def test_integers_may_say_yes_and_no() -> None:
    head = exafuse.config.HeadConfig(
        "sequence_classification", ("a", "b"), "multi_label_classification"
    )
    scores, labels = torch.randn(3, 2), torch.tensor([[0, 1], [1, 1], [0, 0]])
    expected = losses.sequence_classification_loss(scores, labels.float(), head)
    assert torch.equal(losses.sequence_classification_loss(scores, labels, head), expected)


# ---- models ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HEADS)
def test_from_config_makes_every_head(family: str, kind: str) -> None:
    config = cases.build(family, kind).config.to_dict()
    a, b = (exafuse.from_config(config, device="cpu", head=kind, seed=4) for _ in range(2))
    assert a.config.head.kind == kind
    assert sum(p.numel() for p in a.parameters()) == a.config.num_parameters()
    ids = cases.inputs("none")["input_ids"]
    assert torch.equal(cases.scores(a(ids)), cases.scores(b(ids)))
    again = exafuse.from_config(a.config, device="cpu", seed=4)
    assert type(again) is type(a)
    if kind in ("sequence_classification", "token_classification"):
        assert a.config.num_labels == 3
        assert a.config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
        with pytest.raises(ValueError, match=r"num_labels: expected 3.*got 5"):
            exafuse.from_config(a.config, device="cpu", num_labels=5)
    lm = exafuse.from_config(a.config, device="cpu", head="causal_lm")
    assert lm(ids).logits.shape == (4, 11, 97)


def test_generate_names_what_it_needs(family: str) -> None:
    config = cases.build(family, "base").config.to_dict()
    for kind in HEADS:
        model = exafuse.from_config(config, device="cpu", head=kind)
        with pytest.raises(ValueError, match=r'expected a language model.*head="causal_lm"'):
            model.generate(torch.tensor([[1, 2]]))


def test_chat_names_what_it_needs(tmp_path: Path) -> None:
    import chat_tokenizers

    chat_tokenizers.save_family("exaone4", tmp_path)
    processor = exafuse.load_processor(tmp_path)
    config = cases.build("llama", "base").config.to_dict()
    model = exafuse.from_config(config, device="cpu", head="sequence_classification")
    with pytest.raises(ValueError, match=r"generate: expected a language model"):
        exafuse.chat(model, processor, [{"role": "user", "content": "hi"}])


def test_a_family_without_heads_says_so() -> None:
    from exafuse.verification.tiny import TINY_CONFIGS

    (values,) = (v for v in TINY_CONFIGS.values() if v["model_type"] == "exaone4_5")
    with pytest.raises(ValueError, match=r"head: expected None or one of causal_lm, .*no such"):
        exafuse.from_config(values, device="cpu", head="token_classification")
    model = exafuse.from_config(values, device="cpu", head="base")
    assert sum(p.numel() for p in model.parameters()) == model.config.num_parameters()
    assert model(torch.tensor([[9, 10, 11]])).last_hidden_state.shape == (1, 3, 64)


def test_copies_and_pickles_of_a_classifier(tmp_path: Path) -> None:
    import copy

    _, ours = cases.pair("qwen2", "sequence_classification", tmp_path)
    batch = cases.inputs()
    twin = copy.deepcopy(ours)
    assert isinstance(twin, SequenceClassifier)
    assert torch.equal(twin(**batch).logits, ours(**batch).logits)


@pytest.mark.slow
def test_a_classifier_learns() -> None:
    """Which of two tokens ends a text: 60 steps of Adam on the reference."""
    config = cases.build("exaone4", "sequence_classification").config.to_dict()
    model = exafuse.from_config(
        config | {"num_labels": 2, "id2label": {"0": "a", "1": "b"}},
        device="cpu",
        head="sequence_classification",
        seed=1,
    ).train()
    generator = torch.Generator().manual_seed(2)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        ids = torch.randint(3, 97, (8, 6), generator=generator)
        labels = torch.randint(2, (8,), generator=generator)
        ids[:, -1] = labels + 1
        loss = model(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits.argmax(-1), labels)
    assert float(loss.detach()) < 0.05


def test_the_documented_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Python block of docs/heads.md, one after the other, on a tiny checkpoint."""
    import re

    import tiny_tokenizers

    text = (Path(__file__).parent.parent / "docs" / "heads.md").read_text()
    tokenizer = tiny_tokenizers.byte_level()
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_models.save(
        tiny_models.build("exaone4", vocab_size=len(tokenizer), tie_word_embeddings=True),
        tmp_path / "model",
    )
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 4
    names: dict[str, Any] = {}
    for block in blocks:
        source = block.replace('"LGAI-EXAONE/EXAONE-4.0-1.2B"', '"model"')
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            exec(compile(source, "docs/heads.md", "exec"), names)
    saved = json.loads((tmp_path / "reviews" / "config.json").read_text())
    assert saved["architectures"] == ["Exaone4ForSequenceClassification"]
