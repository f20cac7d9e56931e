"""exafuse.patch over adapters, quantised and offloaded linear layers: all go on working."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import drop_in_cases
import exafuse
import pytest
import tiny_models
import torch
import transformers
from torch import Tensor

peft = pytest.importorskip("peft", reason="adapters are peft's (the extra test)")
FAMILIES = list(drop_in_cases.FAMILIES)
# peft asks transformers for it by its former name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(model: Any, targets: list[str] = TARGETS, **options: Any) -> Any:
    """A copy with LoRA adapters that already say something."""
    torch.manual_seed(11)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **options
    )
    wrapped = peft.get_peft_model(copy.deepcopy(model), config).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name or "lora_magnitude" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return wrapped


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> transformers.PreTrainedModel:
    return drop_in_cases.build(request.param)


def both(model: Any, call: Any) -> tuple[Tensor, Tensor]:
    """Result of the plain model and of the patched one; unpatched it is bitwise the first again."""
    with torch.no_grad():
        plain = call(model)
        with exafuse.patched(model):
            ours = call(model)
        assert torch.equal(call(model), plain)
    return ours, plain


@pytest.mark.parametrize("name", ["logits", "left_padded", "chunked", "static_cache"])
def test_logits_of_an_adapted_model(model: Any, name: str) -> None:
    wrapped = adapted(model)
    call = drop_in_cases.FORWARDS[name]
    ours, plain = both(wrapped, lambda wrapped: call(wrapped.get_base_model()))
    drop_in_cases.close(ours, plain)
    with torch.no_grad():
        assert not torch.allclose(plain, call(model)), "the adapters say nothing"


def test_called_through_the_wrapper(model: Any) -> None:
    wrapped, ids = adapted(model), drop_in_cases.prompts(model)
    drop_in_cases.close(*both(wrapped, lambda m: m(input_ids=ids).logits))
    options = {"max_new_tokens": 10, "do_sample": False}
    ours, plain = both(wrapped, lambda m: m.generate(input_ids=ids, **options))
    assert torch.equal(ours, plain)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}], ids=str)
def test_gradients_of_the_adapters(model: Any, options: dict[str, Any]) -> None:
    """Equal ones, and none for the frozen weights."""
    ids, gradients = drop_in_cases.prompts(model), []
    wrapped = adapted(model, **options).train()
    for patch in (False, True):
        wrapped.zero_grad()
        if patch:
            exafuse.patch(wrapped)
        wrapped(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        trained = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
        assert all(p.grad is None for n, p in wrapped.named_parameters() if n not in trained)
        gradients.append({name: p.grad.clone() for name, p in trained.items()})
    plain, ours = gradients
    assert len(plain) >= 2 * len(TARGETS) * model.config.num_hidden_layers
    for name, gradient in plain.items():
        error = float((ours[name] - gradient).norm())
        assert error <= 2e-5 * float(gradient.norm()) + 1e-9, name


def test_training_an_adapter_follows_the_same_loss(model: Any) -> None:
    curves = []
    for patch in (False, True):
        wrapped = adapted(model).train()
        if patch:
            exafuse.patch(wrapped)
        trained = [p for p in wrapped.parameters() if p.requires_grad]
        optimizer, curve = torch.optim.Adam(trained, lr=1e-2), []
        for step in range(8):
            ids = drop_in_cases.prompts(model, length=10 + step % 3)
            loss = wrapped(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(float(loss.detach()))
        curves.append(curve)
    plain, ours = curves
    assert plain[-1] < plain[0] - 0.1
    assert max(abs(a - b) for a, b in zip(plain, ours, strict=True)) <= 1e-3


def test_merge_and_unload(model: Any) -> None:
    wrapped, call = adapted(model), drop_in_cases.logits
    with torch.no_grad():
        expected = call(wrapped.get_base_model())
        exafuse.patch(wrapped)
        wrapped.merge_adapter()
        drop_in_cases.close(call(wrapped.get_base_model()), expected)
        wrapped.unmerge_adapter()
        drop_in_cases.close(call(wrapped.get_base_model()), expected)
        with wrapped.disable_adapter():
            drop_in_cases.close(call(wrapped.get_base_model()), call(model))
        merged = wrapped.merge_and_unload()
        assert not [n for n, _ in merged.named_modules() if "lora" in n]
        drop_in_cases.close(call(merged), expected)


def test_unload_gives_the_base_back(model: Any) -> None:
    wrapped = exafuse.patch(adapted(model))
    base = wrapped.unload()
    with torch.no_grad():
        drop_in_cases.close(drop_in_cases.logits(base), drop_in_cases.logits(model))


def test_adapting_a_patched_model(model: Any) -> None:
    """The other order: patch first."""
    expected = adapted(model)
    base = exafuse.patch(copy.deepcopy(model))
    wrapped = adapted(base)
    ids = drop_in_cases.prompts(model)
    with torch.no_grad():
        drop_in_cases.close(wrapped(input_ids=ids).logits, expected(input_ids=ids).logits)


def test_saved_and_loaded_adapters(model: Any, tmp_path: Path) -> None:
    wrapped, ids = adapted(model), drop_in_cases.prompts(model)
    wrapped.save_pretrained(tmp_path / "plain")
    with exafuse.patched(wrapped):
        wrapped.save_pretrained(tmp_path / "patched")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        plain, patched = (tmp_path / way / file for way in ("plain", "patched"))
        assert plain.read_bytes() == patched.read_bytes()
    base = exafuse.patch(copy.deepcopy(model))
    again = peft.PeftModel.from_pretrained(base, tmp_path / "patched").eval()
    with torch.no_grad():
        expected = wrapped(input_ids=ids).logits
        drop_in_cases.close(again(input_ids=ids).logits, expected)


def test_two_adapters_take_turns(model: Any) -> None:
    wrapped, ids = adapted(model), drop_in_cases.prompts(model)
    wrapped.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B.other" in name:
                parameter.normal_(0, 0.1)
    exafuse.patch(wrapped)
    results = []
    for name in ("default", "other"):
        wrapped.set_adapter(name)
        with torch.no_grad():
            ours = wrapped(input_ids=ids).logits
            exafuse.unpatch(wrapped)
            drop_in_cases.close(ours, wrapped(input_ids=ids).logits)
            exafuse.patch(wrapped)
        results.append(ours)
    assert not torch.allclose(*results)


def test_an_adapted_norm_is_called_as_it_is(model: Any) -> None:
    """An adapter around a norm's weight: not fused by a weight that is not all of it."""
    wrapped, ids = adapted(model, modules_to_save=["norm"]), drop_in_cases.prompts(model)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "norm.modules_to_save" in name:
                parameter.mul_(1.3)
    drop_in_cases.close(*both(wrapped, lambda m: m(input_ids=ids).logits))


def test_adapters_over_transformers_own_interface(model: Any) -> None:
    """``model.add_adapter``: the model is not wrapped, its layers are."""
    twin, ids = copy.deepcopy(model), drop_in_cases.prompts(model)
    twin.add_adapter(peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False))
    twin.eval()
    drop_in_cases.close(*both(twin, lambda m: m(ids).logits))
    with torch.no_grad():
        assert not torch.allclose(twin(ids).logits, model(ids).logits)


@pytest.fixture(scope="module", params=FAMILIES)
def wide(request: pytest.FixtureRequest) -> transformers.PreTrainedModel:
    """Of widths that blocks of 64 weights divide."""
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 8}
    return drop_in_cases.build(request.param, **sizes)


def by_transformers(model: Any, folder: Path, quantization_config: Any) -> Any:
    tiny_models.save(model, folder)
    return (
        type(model)
        .from_pretrained(
            folder,
            quantization_config=quantization_config,
            dtype=torch.float32,
            device_map="cpu",
            attn_implementation="sdpa",
        )
        .eval()
    )


def torchao_int8(model: Any, folder: Path) -> Any:
    quantization = pytest.importorskip("torchao.quantization", reason="the extra quant")
    method = quantization.Int8WeightOnlyConfig(set_inductor_config=False)
    return by_transformers(model, folder, transformers.TorchAoConfig(method))


def nf4(model: Any, folder: Path) -> Any:
    pytest.importorskip("bitsandbytes", reason="the extra quant")
    method = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return by_transformers(model, folder, method)


def llm_int8(model: Any, folder: Path) -> Any:
    pytest.importorskip("bitsandbytes", reason="the extra quant")
    return by_transformers(model, folder, transformers.BitsAndBytesConfig(load_in_8bit=True))


QUANTISERS = {"torchao int8": torchao_int8, "nf4": nf4, "LLM.int8": llm_int8}


@pytest.mark.parametrize("method", list(QUANTISERS))
def test_quantised_linear_layers(wide: Any, method: str, tmp_path: Path) -> None:
    quantised, ids = QUANTISERS[method](wide, tmp_path), drop_in_cases.prompts(wide)
    ours, plain = both(quantised, lambda m: m(ids).logits)
    with torch.no_grad():
        exact = wide(ids).logits
    error = float((plain - exact).norm() / exact.norm())
    assert 1e-3 < error < 0.5, "quantisation left no trace, or nothing else"
    if method == "torchao int8":
        drop_in_cases.close(ours, plain)
    else:
        # bitsandbytes rounds activations too, to int8 or to bf16: a rounding can fall differently.
        assert float((ours - plain).norm()) <= 0.02 * float(plain.norm())


@pytest.mark.parametrize("method", ["torchao int8", "nf4"])
def test_adapters_on_quantised_layers(wide: Any, method: str, tmp_path: Path) -> None:
    """QLoRA: equal gradients through quantised weights."""
    quantised, ids = QUANTISERS[method](wide, tmp_path), drop_in_cases.prompts(wide)
    wrapped = adapted(quantised).train()
    gradients = []
    for patch in (False, True):
        wrapped.zero_grad()
        if patch:
            exafuse.patch(wrapped)
        wrapped(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad.clone() for p in wrapped.parameters() if p.requires_grad])
    for plain, ours in zip(*gradients, strict=True):
        assert float((ours - plain).norm()) <= 2e-5 * float(plain.norm()) + 1e-9


# Of older versions of transformers, for which such a model is on no device.
@pytest.mark.filterwarnings("ignore:You are calling .generate.. with the `input_ids`:UserWarning")
@pytest.mark.parametrize("where", ["cpu", "disk"])
# transformers 5.8 says so of every offloaded model.
@pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")
def test_offloaded_by_a_device_map(model: Any, where: str, tmp_path: Path) -> None:
    """accelerate brings each weight when its layer is called, from memory or from the disk."""
    from accelerate import cpu_offload, disk_offload

    twin = copy.deepcopy(model)
    with torch.no_grad():
        expected = drop_in_cases.left_padded(model)
    if where == "disk":
        disk_offload(twin, str(tmp_path), execution_device=torch.device("cpu"))
    else:
        cpu_offload(twin, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in twin.parameters())
    ours, plain = both(twin, drop_in_cases.left_padded)
    drop_in_cases.close(ours, expected)
    assert torch.equal(plain, expected)
    ids, options = drop_in_cases.prompts(model), {"max_new_tokens": 6, "do_sample": False}
    ours, plain = both(twin, lambda m: m.generate(ids, **options))
    assert torch.equal(ours, plain)


def test_device_map_with_layers_on_the_disk(model: Any, tmp_path: Path) -> None:
    """As ``from_pretrained`` places them: hooks on some layers only."""
    tiny_models.save(model, tmp_path / "model")
    names = {name: "cpu" for name, _ in model.model.named_children() if name != "layers"}
    device_map: dict[str, Any] = {f"model.{name}": place for name, place in names.items()}
    device_map |= {f"model.layers.{i}": "disk" for i in range(1, model.config.num_hidden_layers)}
    device_map |= {"model.layers.0": "cpu", "lm_head": "cpu"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # accelerate: no device but the CPU to bring them to
        placed = (
            type(model)
            .from_pretrained(
                tmp_path / "model",
                device_map=device_map,
                offload_folder=tmp_path / "disk",
                attn_implementation="sdpa",
            )
            .eval()
        )
    assert any(p.is_meta for p in placed.model.layers[1].parameters())
    ours, plain = both(placed, drop_in_cases.logits)
    with torch.no_grad():
        drop_in_cases.close(plain, drop_in_cases.logits(model))
    drop_in_cases.close(ours, plain)


def test_adapters_on_offloaded_layers(model: Any) -> None:
    from accelerate import cpu_offload

    wrapped, ids = adapted(model), drop_in_cases.prompts(model)
    with torch.no_grad():
        expected = wrapped(input_ids=ids).logits
    cpu_offload(wrapped, execution_device=torch.device("cpu"))
    ours, _ = both(wrapped, lambda m: m(input_ids=ids).logits)
    drop_in_cases.close(ours, expected)
