"""transformers' own classifiers and bare models on our kernels, against themselves plain."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exafuse
import head_cases as cases
import pytest
import torch
import transformers
from exafuse.integrations import transformers as integration
from torch import Tensor

HEADS = [kind for kind in cases.SUFFIXES if kind != "causal_lm"]
BACKENDS = ["reference", pytest.param("emulated", marks=pytest.mark.emulated)]
Run = Callable[[Any], Any]


@pytest.fixture(scope="module", params=cases.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name == "emulated":
        from kernel_backends import _emulated

        _emulated()  # builds it
    return name


def model_with(family: str, kind: str, **changes: Any) -> transformers.PreTrainedModel:
    return cases.build(family, kind, attention="sdpa", **changes)


def results(model: Any, calls: list[dict[str, Any]]) -> list[Tensor]:
    """Scores of each call, and the hidden states of tokens."""
    found = []
    with torch.no_grad():
        for batch in calls:
            out = model(**batch, output_hidden_states=True)
            mask = batch.get("attention_mask")
            found.append(cases.scores(out, mask))
            tokens = slice(None) if mask is None else mask.bool()
            found += [state[tokens] for state in out.hidden_states]
    return found


@pytest.mark.parametrize("kind", HEADS)
def test_patched_scores_equal_those_of_the_model(family: str, kind: str, backend: str) -> None:
    model = model_with(family, kind)
    calls = [cases.inputs(padding) for padding in ("left", "right", "none")]
    calls.append({"input_ids": cases.inputs("none")["input_ids"][:1]})
    before = results(model, calls)
    with exafuse.patched(model, backend=backend):
        patched = results(model, calls)
    for ours, plain in zip(patched, before, strict=True):
        cases.close(ours, plain)
    assert any(not torch.equal(a, b) for a, b in zip(patched, before, strict=True))
    for after, plain in zip(results(model, calls), before, strict=True):
        assert torch.equal(after, plain)


@pytest.mark.parametrize("name", cases.LOSSES)
def test_patched_losses_and_gradients_equal_those_of_the_model(
    family: str, name: str, backend: str
) -> None:
    kind, changes, arguments = cases.LOSSES[name]
    model = model_with(family, kind, **changes)
    batch = cases.batch_for(arguments)
    twin = copy.deepcopy(model)

    def loss(model: Any) -> Tensor:
        return model(**batch, use_cache=False).loss

    expected = cases.gradients(model, loss)
    with exafuse.patched(twin, backend=backend):
        cases.close(loss(twin), loss(model), name)
        found = cases.gradients(twin, loss)
    cases.close_gradients(found, expected)
    assert any(not torch.equal(found[n], expected[n]) for n in found), "nothing was replaced"
    again = cases.gradients(twin, loss)
    for key, gradient in expected.items():
        assert torch.equal(again[key], gradient), key


@pytest.mark.parametrize("kind", HEADS)
def test_the_attention_alone(
    family: str, kind: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``attn_implementation="exafuse"``, chosen after loading."""
    from exafuse.layers import resolve_backend

    integration.register()
    monkeypatch.setattr(
        integration.attention, "__kwdefaults__", {"backend": resolve_backend(backend)}
    )
    model = model_with(family, kind)
    batch = cases.inputs()
    before = results(model, [batch])
    model.set_attn_implementation(integration.NAME)
    attended = results(model, [batch])
    for ours, plain in zip(attended, before, strict=True):
        cases.close(ours, plain)
    assert any(not torch.equal(a, b) for a, b in zip(attended, before, strict=True))
    model.set_attn_implementation("sdpa")
    for after, plain in zip(results(model, [batch]), before, strict=True):
        assert torch.equal(after, plain)


@pytest.mark.parametrize("kind", HEADS)
def test_loaded_with_our_attention(kind: str, tmp_path: Path) -> None:
    """From a folder that our own model saved, by the Auto class of the head."""
    _, ours = cases.pair("exaone4", kind, tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    name = integration.register()
    model = cases.class_of("exaone4", kind).from_pretrained(
        tmp_path / "ours", attn_implementation=name
    )
    assert model.config._attn_implementation == name
    batch = cases.inputs("left")
    mask = batch["attention_mask"]
    with torch.no_grad():
        cases.close(cases.scores(model(**batch), mask), cases.scores(ours(**batch), mask))


@pytest.mark.emulated
@pytest.mark.slow
@pytest.mark.parametrize("kind", HEADS)
def test_half_precision_runs_on_the_kernels(kind: str, tmp_path: Path) -> None:
    """Patched and in our own graph, in bf16: as near to fp32 as transformers in bf16."""
    from kernel_backends import _emulated

    _emulated()  # builds it
    exact = model_with("exaone4", kind).bfloat16().float()
    half = copy.deepcopy(exact).bfloat16()
    half.save_pretrained(tmp_path)
    head = "base" if kind == "base" else None
    own = exafuse.from_pretrained(tmp_path, device="cpu", backend="emulated", head=head)
    batch = cases.inputs("left")
    mask = batch["attention_mask"]
    with torch.no_grad():
        truth, plain, ours = (
            cases.scores(model(**batch), mask).float() for model in (exact, half, own)
        )
        with exafuse.patched(half, backend="emulated"):
            patched = cases.scores(half(**batch), mask).float()
    theirs, *mine = (float((x - truth).norm() / truth.norm()) for x in (plain, ours, patched))
    assert max(mine) <= 1.25 * theirs, (mine, theirs)
