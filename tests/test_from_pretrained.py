"""The two ways to a model: arguments honoured or refused, never ignored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import exafuse
import pytest
import tiny_models
import torch
from exafuse import reference


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save(tiny_models.build("llama"), tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head": "regression"}, "head: expected None or one of causal_lm, base, .*'regression'"),
        ({"num_labels": 3}, "num_labels: expected None for a language model, got 3"),
        ({"quantize": "int2"}, "quantize: expected int8, int4, fp8"),
        ({"mtp": True}, "mtp: expected a checkpoint with"),
        ({"dtype": "float8"}, "dtype: expected"),
        ({"dtype": torch.int64}, "dtype: expected"),
        ({"backend": "fast"}, "backend"),
        ({"device": "cpu", "device_map": "auto"}, "one of them"),
        ({"device_map": {"model": 0, "lm_head": 1}}, "single device"),
    ],
)
def test_arguments_it_cannot_honour_are_refused(
    folder: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        exafuse.from_pretrained(folder, **arguments)


def test_an_absent_gpu_is_named(folder: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ValueError, match="no GPU here"):
        exafuse.from_pretrained(folder, device="cuda")


def test_dtype_device_and_backend_are_honoured(folder: Path) -> None:
    for dtype in ("bfloat16", torch.bfloat16):
        model = exafuse.from_pretrained(folder, dtype=dtype, device="cpu", backend="reference")
        assert model.dtype == torch.bfloat16
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.backend is reference
    assert not model.training
    assert exafuse.from_pretrained(folder, device_map={"": "cpu"}).device.type == "cpu"
    assert exafuse.from_pretrained(folder, dtype="auto", device="cpu").dtype == torch.float32


def test_a_model_that_does_not_fit_is_refused_before_the_first_weight(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": 16384, "intermediate_size": 65536, "num_hidden_layers": 400}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to("/nonexistent/weights")  # never opened
    with pytest.raises(exafuse.DoesNotFitError, match=r"GiB") as error:
        exafuse.from_pretrained(tmp_path, device="cpu", dtype="bfloat16")
    assert "dtype" in str(error.value)
    monkeypatch.setattr("exafuse.weights.memory.free_bytes", lambda device: 10)
    with pytest.raises(exafuse.DoesNotFitError):
        exafuse.from_config(config, device="cpu")


def test_from_config_is_reproducible_and_not_trivial() -> None:
    config = {
        "model_type": "qwen2",
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
    a, b, c = (exafuse.from_config(config, device="cpu", seed=s) for s in (1, 1, 2))
    ids = torch.arange(10)[None]
    assert torch.equal(a(ids).logits, b(ids).logits)
    assert not torch.equal(a(ids).logits, c(ids).logits)
    assert a.lm_head.weight is a.model.embed_tokens.weight


@torch.no_grad()
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_save_and_load_again_gives_the_same_logits(family: str, tmp_path: Path) -> None:
    source = tiny_models.save(tiny_models.build(family), tmp_path / "a")
    model = exafuse.from_pretrained(source, device="cpu")
    model.save_pretrained(tmp_path / "b")
    again = exafuse.from_pretrained(tmp_path / "b", device="cpu")
    ids = torch.randint(0, 97, (2, 17))
    assert torch.equal(model(ids).logits, again(ids).logits)
    assert again.config == model.config
    assert again.generation_config == model.generation_config
