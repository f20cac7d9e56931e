"""exafuse.patch_transformers: what from_pretrained builds under it runs on our kernels."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import drop_in_cases
import exafuse
import pytest
import torch
import transformers
from chat_folders import CHATS, make_chat_folder
from exafuse.integrations import patching
from test_patch import pictures
from test_patch import vision_model as vision_model
from transformers import AutoModelForCausalLM, monkey_patching

FAMILIES = list(drop_in_cases.FAMILIES)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    drop_in_cases.build(request.param).save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No test leaves a replacement registered."""
    yield
    assert monkey_patching.get_patch_mapping() == {}


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def load_patched(folder: Path, **options: Any) -> Any:
    with exafuse.patched_transformers():
        return load(folder, **options)


def replaced(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if patching._FORWARD in vars(module)]


@pytest.mark.parametrize("name", ["hidden_states", "left_padded", "chunked", "static_cache"])
def test_logits_equal_those_of_the_plain_model(folder: Path, name: str) -> None:
    call = drop_in_cases.FORWARDS[name]
    with torch.no_grad():
        drop_in_cases.close(call(load_patched(folder)), call(load(folder)))


@pytest.mark.parametrize("name", ["greedy, left padded", "beams", "assisted"])
def test_greedy_tokens_equal_those_of_the_plain_model(folder: Path, name: str) -> None:
    call = drop_in_cases.GENERATIONS[name]
    assert torch.equal(call(load_patched(folder)), call(load(folder)))


def test_the_same_layers_as_by_patch(folder: Path) -> None:
    by_hand = exafuse.patch(load(folder))
    model = load_patched(folder)
    assert replaced(model) == replaced(by_hand)
    assert model.config._attn_implementation == "exafuse"
    for (_, ours), (_, theirs) in zip(model.named_modules(), by_hand.named_modules(), strict=True):
        assert type(ours) is type(theirs), "classes are transformers' own"
    with torch.no_grad():
        assert torch.equal(drop_in_cases.logits(model), drop_in_cases.logits(by_hand))


def test_files_and_keys_are_those_of_the_plain_model(folder: Path, tmp_path: Path) -> None:
    model = load_patched(folder)
    assert model.state_dict().keys() == load(folder).state_dict().keys()
    model.save_pretrained(tmp_path)
    load(folder).save_pretrained(tmp_path / "plain")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    with torch.no_grad():
        again = drop_in_cases.logits(load_patched(tmp_path))
        assert torch.equal(again, drop_in_cases.logits(model))


def test_models_before_and_after_are_plain(folder: Path) -> None:
    """transformers keeps references to replacements; hidden states are still recorded."""
    before = load(folder)
    with torch.no_grad():
        expected = drop_in_cases.hidden_states(before)
        with exafuse.patched_transformers():
            load(folder)
            assert torch.equal(drop_in_cases.hidden_states(before), expected)
            direct = type(before)(before.config)
        for model in (load(folder), direct):
            assert not replaced(model)
            assert model.config._attn_implementation == "sdpa"
        assert torch.equal(drop_in_cases.hidden_states(load(folder)), expected)
        drop_in_cases.close(drop_in_cases.hidden_states(load_patched(folder)), expected)


def test_unpatch_makes_a_loaded_model_plain(folder: Path) -> None:
    model, plain = load_patched(folder), load(folder)
    with pytest.raises(ValueError, match="patched already"):
        exafuse.patch(model)
    exafuse.unpatch(model)
    assert not replaced(model)
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        assert torch.equal(drop_in_cases.logits(model), drop_in_cases.logits(plain))
    exafuse.unpatch(exafuse.patch(model))
    with pytest.raises(ValueError, match="patch_transformers"):
        exafuse.unpatch(model)


def test_another_attention_that_is_asked_for_stays(folder: Path) -> None:
    model = load_patched(folder, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    ids = drop_in_cases.prompts(model)
    with torch.no_grad():
        out = model(ids, output_attentions=True)
        assert len(out.attentions) == model.config.num_hidden_layers
        model.set_attn_implementation("exafuse")
        drop_in_cases.close(model(ids).logits, out.logits)


def test_from_config_and_offloading(folder: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(folder)
    with exafuse.patched_transformers():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config)
    assert replaced(model)
    with torch.no_grad():
        ours = drop_in_cases.logits(model)
        drop_in_cases.close(ours, drop_in_cases.logits(exafuse.unpatch(model)))


@pytest.mark.parametrize("where", ["cpu", {"": "cpu"}, "disk"])
def test_device_maps(folder: Path, where: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"device_map": where}
    if where == "disk":
        layers = transformers.AutoConfig.from_pretrained(folder).num_hidden_layers
        names = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
        names += [f"model.layers.{i}" for i in range(layers)]
        options["device_map"] = dict.fromkeys(names, "cpu") | {"model.layers.1": "disk"}
        options["offload_folder"] = tmp_path
    model = load_patched(folder, **options)
    if where == "disk":
        assert next(model.model.layers[1].parameters()).is_meta
    with torch.no_grad():
        expected = drop_in_cases.left_padded(load(folder))
        drop_in_cases.close(drop_in_cases.left_padded(model), expected)
        exafuse.unpatch(model)
        assert torch.equal(drop_in_cases.left_padded(model), expected)


def test_quantised_loads(folder: Path) -> None:
    """int8 weights put in by transformers: the layers around them are ours."""
    quantization = pytest.importorskip("torchao.quantization")
    options = {
        "quantization_config": transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    }
    plain, model = load(folder, **options), load_patched(folder, **options)
    assert type(model.model.layers[0].mlp.up_proj.weight.data).__name__.startswith("Int8")
    assert replaced(model) == replaced(load_patched(folder))
    with torch.no_grad():
        drop_in_cases.close(drop_in_cases.logits(model), drop_in_cases.logits(plain))


def test_the_vision_language_model(vision_model: Any, tmp_path: Path) -> None:
    vision_model.save_pretrained(tmp_path)
    with exafuse.patched_transformers():
        model = type(vision_model).from_pretrained(tmp_path).eval()
    assert replaced(model) == replaced(exafuse.patch(vision_model))
    exafuse.unpatch(vision_model)
    assert model.state_dict().keys() == vision_model.state_dict().keys()
    inputs = pictures(model)
    with torch.no_grad():
        expected = vision_model(**inputs).logits
        drop_in_cases.close(model(**inputs).logits, expected)
        exafuse.unpatch(model)
        assert not replaced(model)
        # Loading asked for SDPA where the original was built eager.
        drop_in_cases.close(model(**inputs).logits, expected)


def test_an_error_while_loading_leaves_later_models_plain(folder: Path) -> None:
    """transformers does not restore its classes when a model cannot be built."""
    config = transformers.AutoConfig.from_pretrained(folder)
    config.hidden_act = "no such activation"
    with pytest.raises(KeyError), exafuse.patched_transformers():
        AutoModelForCausalLM.from_config(config)
    config.hidden_act = "silu"
    with exafuse.patched_transformers():
        assert not replaced(type(load(folder))(config)), "a class called directly"
    assert not replaced(load(folder))


def test_classes_of_the_same_name_in_other_families_stay_theirs() -> None:
    config = transformers.Qwen2_5_VLTextConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    with exafuse.patched_transformers():
        model = transformers.AutoModel.from_config(config)
    assert not replaced(model)
    assert {type(m).__module__ for m in model.modules() if type(m).__name__ == "Qwen2MLP"} == {
        "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl"
    }


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: exafuse.unpatch_transformers(), "expected a call of exafuse.patch_transformers"),
        (lambda: exafuse.patch_transformers("fast"), "backend"),
    ],
)
def test_calls_out_of_order_are_refused(call: Callable[[], None], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
    with exafuse.patched_transformers(), pytest.raises(ValueError, match="in force already"):
        exafuse.patch_transformers()


def test_other_replacements_are_left_alone(folder: Path) -> None:
    class Other(torch.nn.Module):
        pass

    monkey_patching.register_patch_mapping({"SomebodysLayer": Other})
    try:
        with exafuse.patched_transformers():
            assert replaced(load(folder))
        assert monkey_patching.get_patch_mapping() == {"SomebodysLayer": Other}
    finally:
        monkey_patching.clear_patch_mapping()


def test_a_cleared_registry_is_no_error() -> None:
    with exafuse.patched_transformers():
        monkey_patching.clear_patch_mapping()


def test_an_older_transformers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers.monkey_patching", None)
        with pytest.raises(ImportError, match=r"transformers >= 5\.8.*exafuse\.patch\("):
            exafuse.patch_transformers()


@pytest.mark.parametrize("family", list(CHATS))
def test_the_visualizer_of_attention_masks_shows_the_same(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It asks for eager attention and draws that mask; our layers and compact masks stay away."""
    from transformers.utils.attention_visualizer import AttentionMaskVisualizer

    make_chat_folder(tmp_path, family)
    shown = []
    for context in (nullcontext(), exafuse.patched_transformers()):
        with context:
            capsys.readouterr()
            AttentionMaskVisualizer(str(tmp_path))("The ferry leaves the harbour")
            shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert shown[0].count("⬚") >= 10
