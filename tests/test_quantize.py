"""quantize=: torchao's weights in our own graph, made while the checkpoint is read."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import checkpoint_files as files
import drop_in_cases
import exafuse
import pytest
import tiny_models
import tiny_vision
import torch
import transformers
from exafuse import DoesNotFitError
from exafuse.weights import memory
from exafuse.weights.quantising import WORKING_BYTES, is_quantised, storage_bytes
from exafuse.weights.safetensors_file import CHUNK_BYTES

torchao = pytest.importorskip("torchao", reason="quantisation is torchao's (the extra quant)")
from torchao import quantization  # noqa: E402  (not before it is known to be there)

FAMILIES = list(drop_in_cases.FAMILIES)
ON_CPU = ("int8", "fp8")
LINEARS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


def config_of(name: str) -> Any:
    """What the name stands for."""
    classes = {
        "int8": quantization.Int8WeightOnlyConfig,
        "fp8": quantization.Float8WeightOnlyConfig,
    }
    return classes[name](set_inductor_config=False)


def make(folder: Path, family: str = "exaone4", **overrides: Any) -> transformers.PreTrainedModel:
    model = drop_in_cases.build(family, **overrides)
    tiny_models.save(model, folder)
    return model


def load(folder: Path, **options: Any) -> Any:
    return exafuse.from_pretrained(folder, device="cpu", progress=False, **options)


def quantised_names(model: torch.nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if is_quantised(p)}


@pytest.mark.parametrize("quantize", ON_CPU)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers_with_the_same_weights(
    tmp_path: Path, family: str, quantize: str
) -> None:
    """Rows are scaled one by one: merged projections hold what separate ones would."""
    plain = make(tmp_path, family, hidden_size=96, num_attention_heads=6)
    options = transformers.TorchAoConfig(config_of(quantize))
    theirs = type(plain).from_pretrained(tmp_path, quantization_config=options, dtype="float32")
    ours = load(tmp_path, quantize=quantize)
    ids = drop_in_cases.prompts(plain)
    with torch.no_grad():
        logits, expected = ours(ids).logits, theirs(ids).logits
        drop_in_cases.close(logits, expected)
        unquantised = plain(ids).logits
    error = float((logits - unquantised).norm() / unquantised.norm())
    assert 1e-3 < error < 0.3, "quantisation left no trace, or nothing else"
    out = ours.generate(ids, max_new_tokens=8)
    assert torch.equal(out, theirs.generate(ids, max_new_tokens=8, do_sample=False))


@pytest.mark.parametrize("shard", ["1GB", "60KB"], ids=["single", "sharded"])
@pytest.mark.parametrize("quantize", ON_CPU)
def test_weights_are_those_that_torchao_makes(tmp_path: Path, quantize: str, shard: str) -> None:
    files.make(tmp_path, "exaone4", shard)
    expected, ours = load(tmp_path), load(tmp_path, quantize=quantize)
    quantization.quantize_(expected.text.layers, config_of(quantize))
    assert len(quantised_names(ours)) == 4 * len(LINEARS)
    for (name, mine), theirs in zip(ours.named_parameters(), expected.parameters(), strict=True):
        assert type(mine) is type(theirs), name
        inner = mine.__tensor_flatten__()[0] if is_quantised(mine) else []
        for part in inner:
            assert torch.equal(getattr(mine, part), getattr(theirs, part)), (name, part)
        assert inner or torch.equal(mine, theirs), name
        assert mine.dtype == torch.float32
        assert mine.requires_grad == (not inner)


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_head_and_norms_stay(tmp_path: Path, tied: bool) -> None:
    make(tmp_path, tie_word_embeddings=tied)
    model = load(tmp_path, quantize="int8", dtype="bfloat16")
    assert quantised_names(model) == {
        name for name, _ in model.named_parameters() if name.split(".")[-2] in LINEARS
    }
    assert model.dtype == torch.bfloat16 == model.lm_head.weight.dtype
    assert (model.lm_head.weight is model.text.embed_tokens.weight) == tied
    assert model.config.dtype == "bfloat16"


def test_biases_stay(tmp_path: Path) -> None:
    make(tmp_path, "qwen2")
    plain, model = load(tmp_path), load(tmp_path, quantize="int8")
    for a, b in zip(plain.text.layers, model.text.layers, strict=True):
        assert torch.equal(a.self_attn.qkv_proj.bias, b.self_attn.qkv_proj.bias)


def test_vision_tower_and_draft_module_stay(tmp_path: Path) -> None:
    source = exafuse.from_config(vision_config_with_mtp(), device="cpu", seed=1)
    source.save_pretrained(tmp_path)
    model = load(tmp_path, quantize="int8")
    assert model.mtp is not None
    names = quantised_names(model)
    assert len(names) == len(LINEARS) * model.config.num_layers
    assert {name.split("layers")[0] for name in names} == {"model.language_model."}
    ids = torch.tensor([[9, 10, 11, 12]])
    drafted = model.generate(ids, max_new_tokens=6, draft="mtp")
    assert torch.equal(drafted, model.generate(ids, max_new_tokens=6))


def vision_config_with_mtp() -> dict[str, Any]:
    model = tiny_vision.build({}, {})
    config = model.config.to_dict()
    config["text_config"]["num_nextn_predict_layers"] = 1
    layer_types = config["text_config"]["layer_types"]
    config["text_config"]["layer_types"] = [*layer_types, "sliding_attention"]
    return config


def test_heads_stay(tmp_path: Path) -> None:
    make(tmp_path, "llama")
    with pytest.warns(UserWarning, match="initialised"):
        model = load(tmp_path, quantize="int8", head="sequence_classification", num_labels=3)
    assert "score.weight" not in quantised_names(model)
    assert len(quantised_names(model)) == len(LINEARS) * model.config.num_layers
    with torch.no_grad():
        assert model(torch.tensor([[3, 4, 5]])).logits.shape == (1, 3)


def test_a_torchao_configuration(tmp_path: Path) -> None:
    plain = make(tmp_path)
    by_group = quantization.Int8WeightOnlyConfig(
        granularity=quantization.PerGroup(32), set_inductor_config=False
    )
    model, by_row = load(tmp_path, quantize=by_group), load(tmp_path, quantize="int8")
    weight = model.text.layers[0].self_attn.o_proj.weight
    assert weight.scale.shape == (64, 2)
    ids = drop_in_cases.prompts(plain)
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, by_row(ids).logits)


@pytest.mark.emulated
def test_kernels_between_quantised_layers(tmp_path: Path) -> None:
    """On the emulator in bf16: as near to fp32 arithmetic as the reference is."""
    from kernel_backends import _emulated

    _emulated()  # builds it
    plain = make(tmp_path)
    ids = drop_in_cases.prompts(plain)
    exact = load(tmp_path, quantize="int8")
    half = {"quantize": "int8", "dtype": "bfloat16"}
    with torch.no_grad():
        expected = exact(ids).logits
        reference = load(tmp_path, backend="reference", **half)(ids).logits
        ours = load(tmp_path, backend="emulated", **half)(ids).logits
    mine, theirs = (float((x - expected).norm()) for x in (ours, reference))
    assert mine <= 1.25 * theirs
    assert theirs <= 0.1 * float(expected.norm())


def test_gradients_reach_what_stands_before_a_quantised_layer(tmp_path: Path) -> None:
    """As an adapter or a trained norm needs them: those of the same weights in fp32."""
    make(tmp_path, "exaone4")
    quantised, plain = load(tmp_path, quantize="int8"), load(tmp_path)
    for mine, theirs in zip(quantised.text.layers, plain.text.layers, strict=True):
        for name, module in theirs.named_modules():
            if name.endswith(LINEARS):
                module.weight.data = mine.get_submodule(name).weight.dequantize()
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    grads = []
    for model in (quantised, plain):
        model(ids, labels=ids, use_cache=False).loss.backward()
        grads.append(dict(model.named_parameters())["model.embed_tokens.weight"].grad)
    drop_in_cases.close(*grads)


def test_a_copy_computes_the_same(tmp_path: Path) -> None:
    make(tmp_path)
    model = load(tmp_path, quantize="int8")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(ids).logits, model(ids).logits)


RSS_SCRIPT = """
import sys
from pathlib import Path
import exafuse
import load_guard
from exafuse.weights.quantising import storage_bytes
folder = Path(sys.argv[1])
def load(folder, **options):
    return exafuse.from_pretrained(folder, device="cpu", progress=False, **options)
for quantize in (None, "int8", "fp8"):
    load(folder.parent / "tiny", quantize=quantize)
    before = load_guard.reset_peak_rss()
    model = load(folder, quantize=quantize)
    grown = load_guard.peak_rss() - before
    parameters = list(model.parameters())
    print(grown, sum(map(storage_bytes, parameters)), max(p.numel() for p in parameters))
    del model, parameters
"""


@pytest.mark.slow
def test_peak_memory_is_that_of_the_quantised_model(tmp_path: Path) -> None:
    config = {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 32,
        "num_attention_heads": 8,
    }
    for name, changes in (("tiny", {"num_hidden_layers": 1}), ("big", {})):
        model = exafuse.from_config({**config, **changes}, dtype="bfloat16", device="cpu", seed=0)
        model.save_pretrained(tmp_path / name)
    plain = sum(p.nbytes for p in model.parameters())
    del model
    done = subprocess.run(
        [sys.executable, "-c", RSS_SCRIPT, str(tmp_path / "big")],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    (_, same, _), *quantised = lines
    assert same == plain
    for grown, final, largest in quantised:
        assert final < 0.54 * plain
        # Beyond the result: one weight before, and copies while it is quantised.
        assert grown <= final + (2 + WORKING_BYTES) * largest + 2 * CHUNK_BYTES
        assert grown < 0.8 * plain


def test_what_does_not_fit_is_refused_by_its_quantised_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path)
    model = load(tmp_path, quantize="int8")
    final = sum(map(storage_bytes, model.parameters()))
    largest = max(p.numel() for p in model.parameters() if is_quantised(p))
    read: list[Any] = []
    monkeypatch.setattr("exafuse.weights.checkpoint.read_tensor", lambda *a, **k: read.append(a))
    monkeypatch.setattr(memory, "free_bytes", lambda device: final)
    with pytest.raises(DoesNotFitError, match="quantised as 'int8'"):
        load(tmp_path, quantize="int8", dtype="float32")
    assert not read
    enough = final + (4 + WORKING_BYTES) * largest
    assert enough < sum(p.nbytes for p in load_unread(tmp_path, monkeypatch, read).parameters())
    monkeypatch.setattr(memory, "free_bytes", lambda device: enough)
    load(tmp_path, quantize="int8", dtype="float32")
    assert read


def load_unread(folder: Path, monkeypatch: pytest.MonkeyPatch, read: list[Any]) -> Any:
    """The model in fp32 whatever is free; nothing of it is read."""
    with monkeypatch.context() as context:
        context.setattr(memory, "free_bytes", lambda device: None)
        model = load(folder)
    read.clear()
    return model


@pytest.mark.parametrize(
    ("quantize", "error", "words"),
    [
        ("int2", ValueError, "expected int8, int4, fp8 or a torchao configuration, got 'int2'"),
        (8, TypeError, "expected int8, int4, fp8 or a torchao configuration, got int"),
        (transformers.TorchAoConfig(config_of("int8")), TypeError, "pass its quant_type"),
        (quantization.FqnToConfig({}), ValueError, "one configuration for all layers"),
        ("int4", ValueError, "'int4' runs on a GPU only .*got device cpu.*'int8' and 'fp8' run"),
        (quantization.Int4WeightOnlyConfig(), ValueError, "torchao cannot run Int4WeightOnlyC"),
    ],
)
def test_refusals(tmp_path: Path, quantize: Any, error: type[Exception], words: str) -> None:
    files.make(tmp_path)
    with pytest.raises(error, match=f"quantize: .*{words}|quantize: {words}"):
        load(tmp_path, quantize=quantize)


def test_a_layer_that_no_group_fits_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchao leaves such a layer as it is, and says so in its log at most."""
    make(tmp_path)
    monkeypatch.setattr(quantization, "quantize_", lambda *arguments: None)
    with pytest.raises(ValueError, match=r"'int8' leaves a layer of 1024 x 1024 .* as it is"):
        load(tmp_path, quantize="int8")


def test_a_quantised_model_is_not_saved(tmp_path: Path) -> None:
    make(tmp_path / "source")
    model = load(tmp_path / "source", quantize="int8")
    with pytest.raises(ValueError, match=r"qkv_proj.weight: is quantised .*same quantize="):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_without_torchao_the_error_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ImportError, match=r"torchao >= 0.18: pip install 'exafuse\[quant\]'"):
        load(tmp_path, quantize="int8")


@pytest.fixture
def gpu_folder(tmp_path: Path) -> Path:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8}
    make(tmp_path, "llama", **sizes)
    return tmp_path


@pytest.mark.gpu
@pytest.mark.parametrize("quantize", ["int8", "fp8", "int4"])
def test_on_a_gpu(gpu_folder: Path, quantize: str) -> None:
    plain = exafuse.from_pretrained(gpu_folder, device="cuda", dtype="bfloat16")
    model = exafuse.from_pretrained(gpu_folder, device="cuda", dtype="bfloat16", quantize=quantize)
    ids = torch.randint(1, 97, (2, 11), device="cuda")
    with torch.no_grad():
        expected, logits = plain(ids).logits.float(), model(ids).logits.float()
    error = float((logits - expected).norm() / expected.norm())
    assert error < {"int8": 0.1, "fp8": 0.3, "int4": 0.8}[quantize]
    assert model.generate(ids, max_new_tokens=4).shape == (2, 15)
