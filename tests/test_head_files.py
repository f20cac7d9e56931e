"""Heads in files: names and prefixes, labels, what is missing or left over, what commands say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoint_files as files
import exafuse
import head_cases as cases
import pytest
import torch
import transformers

LABELS = {
    "id2label": {0: "bad", 1: "fair", 2: "good"},
    "label2id": {"bad": 0, "fair": 1, "good": 2},
}
HEADS = [kind for kind in cases.SUFFIXES if kind != "causal_lm"]


# ---- there and back -------------------------------------------------------------------------


@pytest.mark.parametrize("family", cases.FAMILIES)
@pytest.mark.parametrize("kind", HEADS)
def test_a_saved_folder_is_the_one_that_transformers_saves(
    family: str, kind: str, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"tie_word_embeddings": True} if family == "qwen2" else {}
    if kind in ("sequence_classification", "token_classification"):
        changes |= LABELS
    if kind == "sequence_classification":
        changes["problem_type"] = "multi_label_classification"
    if kind == "token_classification":
        changes["classifier_dropout"] = 0.25
    theirs, ours = cases.pair(family, kind, tmp_path / "theirs", **changes)
    ours.save_pretrained(tmp_path / "ours")
    assert (tmp_path / "ours" / "model.safetensors").read_bytes() == (
        tmp_path / "theirs" / "model.safetensors"
    ).read_bytes()
    assert not (tmp_path / "ours" / "generation_config.json").exists()

    auto = {
        "base": transformers.AutoModel,
        "sequence_classification": transformers.AutoModelForSequenceClassification,
        "token_classification": transformers.AutoModelForTokenClassification,
        "question_answering": transformers.AutoModelForQuestionAnswering,
    }[kind]
    again, report = auto.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert type(again) is type(theirs)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for key in ("architectures", "problem_type", "pad_token_id"):
        assert getattr(again.config, key) == getattr(theirs.config, key), key
    if kind in ("sequence_classification", "token_classification"):
        assert again.config.id2label == theirs.config.id2label == LABELS["id2label"]
        assert again.config.label2id == theirs.config.label2id
        assert ours.config.id2label == LABELS["id2label"]
        assert ours.config.label2id == LABELS["label2id"]
    batch = cases.inputs()
    with torch.no_grad():
        assert torch.equal(cases.scores(again.eval()(**batch)), cases.scores(theirs(**batch)))
    reloaded = cases.load(tmp_path / "ours", head="base" if kind == "base" else None)
    assert type(reloaded) is type(ours)
    assert reloaded.config == ours.config


def test_a_sharded_classifier(tmp_path: Path) -> None:
    theirs = cases.build("exaone4", "question_answering")
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    batch = cases.inputs("none")
    with torch.no_grad():
        cases.close(cases.scores(cases.load(tmp_path)(**batch)), cases.scores(theirs(**batch)))


@pytest.mark.parametrize("prefix", ["", "model.", "transformer."])
@pytest.mark.parametrize("kind", [*HEADS, "causal_lm"])
def test_every_prefix_goes_with_every_head(kind: str, prefix: str, tmp_path: Path) -> None:
    _, ours = cases.pair("exaone4", kind, tmp_path)
    state = files.read(tmp_path)
    bare = {n.removeprefix("model.").removeprefix("transformer."): t for n, t in state.items()}
    heads = ("lm_head", "score", "qa_outputs")
    files.write(tmp_path, {n if n.startswith(heads) else prefix + n: t for n, t in bare.items()})
    again = cases.load(tmp_path, head="base" if kind == "base" else None)
    batch = cases.inputs()
    with torch.no_grad():
        assert torch.equal(cases.scores(again(**batch)), cases.scores(ours(**batch)))


def test_a_model_with_a_tower_without_its_output_matrix(tmp_path: Path) -> None:
    """Its tower and language model by name, as transformers saves the bare model; no drafts."""
    from exafuse.verification.tiny import TINY_CONFIGS, make_tiny

    (values,) = (v for v in TINY_CONFIGS.values() if v["model_type"] == "exaone4_5")
    make_tiny(values, tmp_path / "whole")
    whole, base = cases.load(tmp_path / "whole"), cases.load(tmp_path / "whole", head="base")
    ids = torch.tensor([[9, 10, 11, 12]])
    with torch.no_grad():
        assert torch.equal(whole.lm_head(base(ids).last_hidden_state), whole(ids).logits)
    base.save_pretrained(tmp_path / "base")
    names = files.read(tmp_path / "base")
    assert {name.split(".")[0] for name in names} == {"language_model", "visual"}
    theirs, report = transformers.AutoModel.from_pretrained(
        tmp_path / "base", attn_implementation="eager", output_loading_info=True
    )
    assert type(theirs).__name__ == "Exaone4_5_Model"
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        cases.close(base(ids).last_hidden_state, theirs(ids).last_hidden_state)
        assert torch.equal(
            cases.load(tmp_path / "base", head="base")(ids).last_hidden_state,
            base(ids).last_hidden_state,
        )
    cases.refused(tmp_path / "whole", "mtp: expected None", error=ValueError, head="base", mtp=True)


# ---- a head that the file lacks -------------------------------------------------------------


@pytest.mark.parametrize("kind", cases.TENSORS)
def test_a_new_head_is_initialised_and_named_once(kind: str, tmp_path: Path) -> None:
    theirs = cases.build("llama", "causal_lm", initializer_range=0.5, num_hidden_layers=1)
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="initialised at random") as caught:
        model = exafuse.from_pretrained(tmp_path, device="cpu", head=kind)
    assert len(caught) == 1
    assert str(caught[0].message).startswith(f"{tmp_path}: {', '.join(cases.TENSORS[kind])}: ")
    state = dict(model.named_parameters())
    for name in cases.TENSORS[kind]:
        tensor = state[name].detach()
        assert not tensor.is_meta
        if name.endswith("bias"):
            assert not tensor.any()
        else:
            assert 0.35 < float(tensor.std()) < 0.65
    assert torch.equal(model.text.norm.weight, theirs.model.norm.weight)
    model(cases.inputs()["input_ids"])
    model.save_pretrained(tmp_path / "new")
    assert cases.load(tmp_path / "new").config.head.kind == kind


def test_what_the_file_has_of_a_head_is_kept(tmp_path: Path) -> None:
    """A sequence classifier's matrix, and a new bias beside it."""
    theirs, _ = cases.pair("qwen2", "sequence_classification", tmp_path)
    with pytest.warns(UserWarning, match=": score.bias: not in the file"):
        model = exafuse.from_pretrained(tmp_path, device="cpu", head="token_classification")
    assert torch.equal(model.score.weight, theirs.score.weight)
    assert not model.score.bias.any()


@pytest.mark.parametrize("kind", HEADS)
def test_other_heads_are_left_out(kind: str, tmp_path: Path) -> None:
    theirs, _ = cases.pair("llama", kind, tmp_path)
    body = cases.load(tmp_path, head="base")
    assert not [n for n, _ in body.named_parameters() if not n.startswith("model.")]
    inner = theirs if kind == "base" else theirs.base_model
    ids = cases.inputs("none")["input_ids"]
    with torch.no_grad():
        cases.close(body(ids).last_hidden_state, inner(ids).last_hidden_state)
    with pytest.warns(UserWarning, match=r"lm_head\.weight: not in the file"):
        lm = exafuse.from_pretrained(tmp_path, device="cpu", head="causal_lm")
    assert lm.generate(ids, max_new_tokens=2).shape == (4, 13)


def test_a_headless_file_is_a_language_model_if_its_embedding_is_tied(tmp_path: Path) -> None:
    for tied in (True, False):
        theirs = cases.build("qwen2", "base", tie_word_embeddings=tied)
        theirs.save_pretrained(tmp_path)
        if not tied:
            cases.refused(
                tmp_path, "'lm_head.weight'", "tie_word_embeddings is false", 'head="base"'
            )
            continue
        ids = cases.inputs("none")["input_ids"]
        with torch.no_grad():
            expected = theirs(ids).last_hidden_state @ theirs.embed_tokens.weight.T
            cases.close(cases.load(tmp_path)(ids).logits, expected)


def test_a_classifier_of_causal_weights_is_refused_by_name(tmp_path: Path) -> None:
    cases.build("llama", "causal_lm").save_pretrained(tmp_path)
    cases.edit(tmp_path, architectures=["LlamaForSequenceClassification"])
    words = ("'score.weight'", "'lm_head.weight'", "architectures", 'head="base"')
    cases.refused(tmp_path, *words)
    assert cases.load(tmp_path, head="causal_lm")(torch.tensor([[1]])).logits.shape == (1, 1, 97)


def test_a_language_model_of_a_classifiers_weights_is_refused(tmp_path: Path) -> None:
    cases.build("llama", "sequence_classification").save_pretrained(tmp_path)
    cases.edit(tmp_path, architectures=["LlamaForCausalLM"])
    cases.refused(
        tmp_path, "'lm_head.weight'", "the file has score.weight", "unexpected: 'score.weight'"
    )


def test_a_quantised_body_and_a_plain_head(tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="quantising needs torchao (the extra quant)")
    theirs, plain = cases.pair("llama", "sequence_classification", tmp_path)
    model = exafuse.from_pretrained(tmp_path, device="cpu", quantize="int8")
    assert torch.equal(model.score.weight, theirs.score.weight)
    batch = cases.inputs()
    with torch.no_grad():
        exact, rounded = plain(**batch).logits, model(**batch).logits
    assert 0 < float((rounded - exact).norm() / exact.norm()) < 0.05
