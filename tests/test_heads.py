"""Heads in our own graph against transformers: scores, losses, gradients, files."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import exafuse
import head_cases as cases
import pytest
import tiny_models
import torch
import transformers

HEADS = [kind for kind in cases.SUFFIXES if kind != "causal_lm"]


@pytest.fixture(scope="module", params=cases.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@torch.no_grad()
@pytest.mark.parametrize("kind", HEADS)
def test_scores_equal_those_of_transformers(family: str, kind: str, tmp_path: Path) -> None:
    theirs, ours = cases.pair(family, kind, tmp_path)
    for padding in ("left", "right", "mixed", "none"):
        batch = cases.inputs(padding)
        a, b = (
            model(**batch, output_hidden_states=True, use_cache=use_cache)
            for model, use_cache in ((ours, None), (theirs, False))
        )
        mask = batch["attention_mask"]
        cases.close(cases.scores(a, mask), cases.scores(b, mask), padding)
        assert len(a.hidden_states) == len(b.hidden_states)
        for x, y in zip(a.hidden_states, b.hidden_states, strict=True):
            cases.close(x[mask.bool()], y[mask.bool()], padding)
    one = {name: x[:1] for name, x in batch.items()}
    as_tuple = ours(one["input_ids"], return_dict=False)
    assert torch.equal(as_tuple[0], ours(one["input_ids"])[0])
    embeds = ours.get_input_embeddings()(one["input_ids"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that padding cannot be told, in a classifier
        a, b = ours(inputs_embeds=embeds), theirs(inputs_embeds=embeds)
    cases.close(cases.scores(a), cases.scores(b), "inputs_embeds")


@torch.no_grad()
@pytest.mark.parametrize("kind", HEADS)
def test_chunks_on_a_cache_go_on(family: str, kind: str, tmp_path: Path) -> None:
    theirs, ours = cases.pair(family, kind, tmp_path)
    ids = cases.inputs("none")["input_ids"]
    our_cache = ours.new_cache(4)
    their_cache = transformers.DynamicCache(config=theirs.config)
    for part in ids.split((3, 1, 7), dim=1):
        a = ours(part, past_key_values=our_cache)
        b = theirs(part, past_key_values=their_cache)
        cases.close(cases.scores(a), cases.scores(b))
    assert our_cache.get_seq_length() == 11
    if kind in ("base", "sequence_classification"):
        assert a.past_key_values is our_cache
        assert ours(ids).past_key_values.get_seq_length() == 11


@pytest.mark.parametrize("name", cases.LOSSES)
def test_losses_and_gradients_equal_those_of_transformers(
    family: str, name: str, tmp_path: Path
) -> None:
    kind, changes, arguments = cases.LOSSES[name]
    theirs, ours = cases.pair(family, kind, tmp_path, **changes)
    batch = cases.batch_for(arguments)
    a, b = ours(**batch), theirs(**batch)
    cases.close(a.loss, b.loss)
    assert a.loss.dtype == b.loss.dtype
    assert torch.equal(a[0], a.loss)
    found, expected = (
        cases.gradients(model, lambda model: model(**batch).loss) for model in (ours, theirs)
    )
    cases.close_gradients(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("case", [tiny_models.random_case(s) for s in range(300, 372)], ids=str)
def test_random_configurations(case: tiny_models.Case, tmp_path: Path) -> None:
    """Windows, biases, GQA groups, RoPE types, tied embeddings: scores, loss and gradients."""
    name = list(cases.LOSSES)[case.seed % len(cases.LOSSES)]
    kind, changes, arguments = cases.LOSSES[name]
    theirs, ours = cases.pair(case.family, kind, tmp_path, **{**case.overrides, **changes})
    batch = cases.batch_for(arguments)
    vocab = case.overrides["vocab_size"]
    batch["input_ids"] = batch["input_ids"] % (vocab - 1) + (batch["attention_mask"] > 0)
    if kind == "causal_lm":
        labels = batch["labels"]
        batch["labels"] = torch.where(labels < 0, labels, labels % vocab)
    a, b = ours(**batch), theirs(**batch)
    mask = batch["attention_mask"]
    cases.close(cases.scores(a, mask), cases.scores(b, mask))
    cases.close(a.loss, b.loss)
    found, expected = (
        cases.gradients(model, lambda model: model(**batch).loss) for model in (ours, theirs)
    )
    cases.close_gradients(found, expected)


@pytest.mark.emulated
@pytest.mark.parametrize("name", cases.LOSSES)
def test_gradients_on_the_kernels(name: str, tmp_path: Path) -> None:
    from kernel_backends import _emulated

    _emulated()  # builds it
    kind, changes, arguments = cases.LOSSES[name]
    theirs, reference = cases.pair("exaone4", kind, tmp_path, **changes)
    ours = exafuse.from_pretrained(tmp_path, device="cpu", backend="emulated")
    batch = cases.batch_for(arguments)
    found, plain, expected = (
        cases.gradients(model, lambda model: model(**batch).loss)
        for model in (ours, reference, theirs)
    )
    cases.close_gradients(found, expected)
    assert any(not torch.equal(found[n], plain[n]) for n in found), "no kernel has run"


def test_the_embedding_of_the_pad_id_is_not_trained(tmp_path: Path) -> None:
    """Also where the id is a token like others, as an eos id that pads."""
    theirs, ours = cases.pair("llama", "sequence_classification", tmp_path)
    ids = cases.inputs("none")["input_ids"]
    ids[:, 4] = cases.PAD
    labels = torch.tensor([0, 1, 2, 1])
    found, expected = (
        cases.gradients(model, lambda model: model(ids, labels=labels).loss)
        for model in (ours, theirs)
    )
    cases.close_gradients(found, expected)
    assert not found["model.embed_tokens.weight"][cases.PAD].any()


@torch.no_grad()
@pytest.mark.parametrize("name", cases.LOSSES)
def test_losses_in_bf16_are_in_the_same_dtype(name: str, tmp_path: Path) -> None:
    kind, changes, arguments = cases.LOSSES[name]
    theirs, ours = cases.pair("llama", kind, tmp_path, **changes)
    batch = cases.batch_for(arguments)
    if "number" in name or "several" in name:  # floats in the dtype of the model
        batch["labels"] = batch["labels"].bfloat16()
    a, b = ours.bfloat16()(**batch).loss, theirs.bfloat16()(**batch).loss
    assert a.dtype == b.dtype
    assert abs(float(a - b)) <= 0.05 * max(1.0, abs(float(b)))


def test_dropout_of_a_token_classification(tmp_path: Path) -> None:
    theirs, ours = cases.pair("qwen2", "token_classification", tmp_path, classifier_dropout=0.4)
    batch = cases.inputs("none")
    results = []
    for model in (ours, theirs):
        model.train()
        torch.manual_seed(3)
        results.append(model(**batch).logits.detach())
        assert not torch.equal(results[-1], model.eval()(**batch).logits)
    cases.close(*results)
    defaults = exafuse.from_config(ours.config, device="cpu", head="sequence_classification")
    assert not any(isinstance(m, torch.nn.Dropout) for m in defaults.modules())


# ---- which token of a row is classified -----------------------------------------------------


@torch.no_grad()
def test_the_last_token_is_the_rightmost_that_does_not_pad(tmp_path: Path) -> None:
    theirs, ours = cases.pair("llama", "sequence_classification", tmp_path)
    rows = [
        [5, 6, 7, 8, 9],
        [5, 0, 7, 0, 0],  # padding ids between tokens are nothing special
        [0, 0, 0, 0, 9],
        [0, 0, 0, 0, 0],  # nothing else: the first column
        [5, 0, 0, 0, 0],
    ]
    for row in rows:
        ids = torch.tensor([row])
        cases.close(ours(ids).logits, theirs(ids).logits, str(row))
    ids = torch.tensor(rows)
    cases.close(ours(ids).logits, theirs(ids).logits)


@torch.no_grad()
def test_without_a_pad_id_there_is_one_row(tmp_path: Path) -> None:
    theirs, ours = cases.pair("exaone4", "sequence_classification", tmp_path, pad_token_id=None)
    ids = torch.tensor([[4, 0, 6, 0]])
    cases.close(ours(ids).logits, theirs(ids).logits)
    for model in (ours, theirs):
        with pytest.raises(ValueError, match="pad"):
            model(ids.repeat(2, 1))
    ours.config = dataclasses.replace(ours.config, pad_token_id=0)
    theirs.config.pad_token_id = 0
    cases.close(ours(ids.repeat(2, 1)).logits, theirs(ids.repeat(2, 1)).logits)


def test_a_mask_that_hides_the_last_token_is_refused(tmp_path: Path) -> None:
    """Another id pads than the config says: transformers would classify padding."""
    _, ours = cases.pair("llama", "sequence_classification", tmp_path)
    ids = torch.tensor([[5, 6, 7], [5, 9, 9]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    with pytest.raises(ValueError, match=r"attention_mask: row 1.*pad_token_id \(0\).*column 2"):
        ours(ids, attention_mask=mask)
    with pytest.warns(UserWarning, match="inputs_embeds: padding"):
        ours(inputs_embeds=ours.get_input_embeddings()(ids))
