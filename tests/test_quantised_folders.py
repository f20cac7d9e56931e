"""Folders whose weights are quantised: named by our loader, run by the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import drop_in_cases
import exafuse
import pytest
import safetensors.torch
import torch
import transformers
import vision_checkpoint
from command_line import make_folder, run
from exafuse import ConfigError
from exafuse.cli import commands as cli
from exafuse.cli.quantised import hush_libraries
from exafuse.config import load_config
from exafuse.config.quantisation import method_of, read_quantisation
from exafuse.generation.config import GenerationConfig
from exafuse.integrations.generating import PatchedModel
from torch import Tensor

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
BLOCK = 128  # weights a side that share a scale in the fp8 layout


@pytest.fixture(autouse=True)
def quiet_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    hush_libraries()
    monkeypatch.setattr(transformers.utils.logging, "disable_progress_bar", lambda: None)


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("plain"), None, **SIZES)


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("chat"), "qwen2", **SIZES)


def by_transformers(source: Path, folder: Path, method: Any) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, quantization_config=method, dtype=torch.float32, device_map="cpu"
    )
    model.save_pretrained(folder)


def torchao_int8(source: Path, folder: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="the extra quant")
    method = quantization.Int8WeightOnlyConfig(set_inductor_config=False)
    by_transformers(source, folder, transformers.TorchAoConfig(method))


def nf4(source: Path, folder: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra quant")
    method = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    by_transformers(source, folder, method)


def llm_int8(source: Path, folder: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra quant")
    by_transformers(source, folder, transformers.BitsAndBytesConfig(load_in_8bit=True))


def in_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix in e4m3, a scale for every block of it."""
    rows, columns = (-(-size // BLOCK) for size in weight.shape)
    padded = torch.zeros(rows * BLOCK, columns * BLOCK)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    blocks = padded.view(rows, BLOCK, columns, BLOCK)
    scale = blocks.abs().amax((1, 3), keepdim=True).clamp(min=1e-6) / 448
    values = (blocks / scale).view_as(padded)[: weight.shape[0], : weight.shape[1]]
    return values.to(torch.float8_e4m3fn).contiguous(), scale.view(rows, columns)


def fp8(source: Path, folder: Path) -> None:
    """As the published FP8 checkpoints are laid out; transformers makes one on a GPU only."""
    folder.mkdir()
    state: dict[str, Tensor] = {}
    for name, tensor in safetensors.torch.load_file(source / "model.safetensors").items():
        if "layers" in name and "proj" in name and tensor.ndim == 2:
            state[name], state[f"{name}_scale_inv"] = in_blocks(tensor)
        else:
            state[name] = tensor.clone()
    safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))


METHODS = {"torchao": torchao_int8, "nf4": nf4, "LLM.int8": llm_int8, "fp8": fp8}
NAMES = {"torchao": "torchao", "nf4": "bitsandbytes", "LLM.int8": "bitsandbytes", "fp8": "fp8"}


def quantised(source: Path, folder: Path, method: str) -> Path:
    """``source`` with quantised weights."""
    METHODS[method](source, folder)
    for path in source.iterdir():
        if not (folder / path.name).exists() and path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def plain_answer(folder: Path, prompt: str, num_tokens: int) -> str:
    """Of transformers alone."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    inputs = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False)
    new = out[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True) + "\n"


@pytest.mark.parametrize("method", METHODS)
def test_generate_runs_what_transformers_loads(
    plain_folder: Path, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = quantised(plain_folder, tmp_path / "quantised", method)
    with pytest.raises(ConfigError, match=f"quantised by '{NAMES[method]}'"):
        exafuse.from_pretrained(folder)
    capsys.readouterr()
    argv = ["generate", str(folder), "The ferry", "--device", "cpu", "--temperature", "0"]
    assert cli.main([*argv, "--max-new-tokens", "6"]) == 0
    captured = capsys.readouterr()
    assert captured.out == plain_answer(folder, "The ferry", 6)
    said = [line for line in captured.err.splitlines() if "quantised by" in line]
    assert len(said) == 1
    assert NAMES[method] in said[0]
    assert "transformers loads them, exafuse.patch" in said[0]


def test_options_of_generate_apply(
    plain_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sampling, penalties and stop texts are our own, whoever runs the model."""
    folder = quantised(plain_folder, tmp_path / "quantised", "torchao")
    argv = ["generate", str(folder), "The market", "--device", "cpu", "--quiet"]
    argv += ["--max-new-tokens", "12"]
    outputs = []
    for options in (
        ["--temperature", "0"],
        ["--temperature", "0", "--presence-penalty", "2"],
        ["--temperature", "1.5", "--seed", "1"],
        ["--temperature", "1.5", "--seed", "1"],
        ["--temperature", "1.5", "--seed", "2"],
    ):
        assert cli.main([*argv, *options]) == 0
        outputs.append(capsys.readouterr().out)
    greedy, penalised, one, same, two = outputs
    assert one == same
    assert len({greedy, penalised, one, two}) == 4
    stop = greedy[3:6]
    assert cli.main([*argv, "--temperature", "0", "--stop", stop]) == 0
    shorter = capsys.readouterr().out.rstrip("\n")
    assert greedy.startswith(shorter)
    assert len(shorter) < len(greedy.rstrip("\n"))


def test_chat_talks_to_it(
    chat_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    import io
    import sys

    folder = quantised(chat_folder, tmp_path / "quantised", "torchao")
    monkeypatch.setattr(sys, "stdin", io.StringIO("The ferry\n/reset\nThe ferry\n/exit\n"))
    argv = ["chat", str(folder), "--device", "cpu", "--temperature", "0", "--max-new-tokens", "8"]
    capsys.readouterr()
    assert cli.main(argv) == 0
    captured = capsys.readouterr()
    first, second = captured.out[: len(captured.out) // 2], captured.out[len(captured.out) // 2 :]
    assert first == second != ""
    assert captured.err.count("quantised by 'torchao'") == 1
    argv = ["generate", str(folder), "The ferry", *argv[2:], "--quiet"]
    assert cli.main(argv) == 0
    captured = capsys.readouterr()
    assert captured.out == first
    assert "quantised" not in captured.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--quantize", "int8"], "--quantize: expected unquantised weights"),
        (["--draft", "prompt_lookup"], "--draft: not for this model, which transformers runs"),
        (["--cuda-graph"], "--cuda-graph: not for this model, which transformers runs"),
    ],
)
def test_options_that_do_not_apply(
    plain_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    words: str,
) -> None:
    folder = quantised(plain_folder, tmp_path / "quantised", "torchao")
    capsys.readouterr()
    assert cli.main(["generate", str(folder), "x", "--device", "cpu", *options]) == 2
    assert words in capsys.readouterr().err


OTHERS = {
    "awq": {"bits": 4, "group_size": 128, "version": "gemm", "zero_point": True},
    "gptq": {"bits": 4, "group_size": 128, "desc_act": False, "sym": True},
    "compressed-tensors": {"format": "pack-quantized", "config_groups": {}},
}


@pytest.mark.parametrize("method", OTHERS)
def test_a_method_whose_library_is_missing(
    plain_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    """One line that names the method and the reason, never a traceback."""
    for path in plain_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, **OTHERS[method]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError) as refusal:
        exafuse.from_pretrained(tmp_path)
    for part in (f"'{method}'", "original checkpoint", "exafuse.patch(model)", "exafuse generate"):
        assert part in str(refusal.value)
    assert cli.main(["generate", str(tmp_path), "x", "--device", "cpu", "--quiet"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(rf"quantised by '{method}', and transformers cannot load them here", error)


def refusal_of(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says of a folder before transformers sees it."""
    capsys.readouterr()
    assert cli.main(["generate", str(folder), "x", "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_what_transformers_must_not_follow(
    plain_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Files outside the folder, pickles, other models and unknown methods are refused by us."""
    folder = quantised(plain_folder, tmp_path / "quantised", "torchao")

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("transformers was asked")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", never)
    weights, config = folder / "model.safetensors", folder / "config.json"
    adapter = folder / "adapter_config.json"
    adapter.write_text(json.dumps({"base_model_name_or_path": "/elsewhere"}))
    assert "adapter_config.json" in refusal_of(folder, capsys)
    adapter.unlink()
    content = weights.read_bytes()
    weights.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    assert "pickle" in refusal_of(folder, capsys)
    (folder / "pytorch_model.bin").unlink()
    index = {"weight_map": {"model.norm.weight": "../plain/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "not a plain file name" in refusal_of(folder, capsys)
    (folder / "model.safetensors.index.json").unlink()
    weights.write_bytes(content)
    values = json.loads(config.read_text())
    for section, words in (
        ({"quant_method": "evil"}, "got 'evil'"),
        ({"bits": 4}, "got an unnamed method"),
        ("int4", "got an unnamed method"),
    ):
        config.write_text(json.dumps({**values, "quantization_config": section}))
        assert words in refusal_of(folder, capsys)
    config.write_text(json.dumps({**values, "model_type": "gpt2"}))
    assert "model_type" in refusal_of(folder, capsys)


def test_older_bitsandbytes_files_name_no_method() -> None:
    assert method_of({"load_in_4bit": True}) == "bitsandbytes"
    assert method_of({"load_in_8bit": True, "load_in_4bit": False}) == "bitsandbytes"
    assert method_of({"load_in_8bit": False}) is None


def test_a_model_that_sees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """EXAONE 4.5: the tower is quantised or not as the method likes; pictures go in as ever."""
    quantization = pytest.importorskip("torchao.quantization", reason="the extra quant")
    pillow = pytest.importorskip("PIL.Image", reason="the extra vision")
    source = vision_checkpoint.save_model(tmp_path / "source")
    method = quantization.Int8WeightOnlyConfig(set_inductor_config=False)
    loader = transformers.AutoModelForImageTextToText
    loader.from_pretrained(
        source, quantization_config=transformers.TorchAoConfig(method), device_map="cpu"
    ).save_pretrained(tmp_path / "quantised")
    for path in source.iterdir():
        if not (tmp_path / "quantised" / path.name).exists() and path.suffix == ".json":
            (tmp_path / "quantised" / path.name).write_bytes(path.read_bytes())
    for path in source.glob("*.jinja"):
        (tmp_path / "quantised" / path.name).write_bytes(path.read_bytes())
    answers = []
    for seed in (0, 1):
        pillow.fromarray(vision_checkpoint.image(seed)).save(tmp_path / "picture.png")
        argv = ["generate", str(tmp_path / "quantised"), "what is it", "--device", "cpu"]
        argv += ["--image", str(tmp_path / "picture.png"), "--max-new-tokens", "8"]
        capsys.readouterr()
        assert cli.main([*argv, "--temperature", "0"]) == 0, capsys.readouterr().err
        answers.append(capsys.readouterr().out)
    assert answers[0] != answers[1]


def test_quantisation_named_in_the_text_part_alone(tmp_path: Path) -> None:
    values = {"model_type": "exaone4_5", "text_config": {"a": 1}}
    section = {"compression_config": {"quant_method": "compressed-tensors"}}
    for name, part in (("text_config", section), ("vision_config", section)):
        content = {**values, name: {**values.get(name, {}), **part}}
        (tmp_path / "config.json").write_text(json.dumps(content))
        found, rest = read_quantisation(tmp_path)
        assert method_of(found) == "compressed-tensors"
        assert "compression_config" not in json.dumps(rest)
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_quantisation(tmp_path) == (None, values)


def test_the_command_quantises(plain_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchao", reason="the extra quant")
    argv = ["generate", str(plain_folder), "The ferry", "--device", "cpu", "--temperature", "0"]
    argv += ["--max-new-tokens", "6"]
    assert cli.main([*argv, "--quantize", "int8"]) == 0
    printed = capsys.readouterr().out
    model = exafuse.from_pretrained(plain_folder, device="cpu", quantize="int8")
    tokenizer = transformers.AutoTokenizer.from_pretrained(plain_folder)
    ids = tokenizer("The ferry", return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=6)
    assert printed == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) + "\n"
    assert cli.main([*argv, "--quantize", "int4"]) == 2
    assert "--quantize: 'int4' runs on a GPU only" in capsys.readouterr().err


@pytest.mark.slow
def test_libraries_are_quiet_in_a_process_of_its_own(plain_folder: Path) -> None:
    argv = ["generate", str(plain_folder), "x", "--device", "cpu", "--max-new-tokens", "2"]
    done = run([*argv, "--quantize", "int8"])
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("family", list(drop_in_cases.FAMILIES))
def test_generation_over_a_transformers_model(family: str, tmp_path: Path) -> None:
    """Our generate on a patched model: its own greedy tokens, left-padded rows too."""
    model = drop_in_cases.build(family)
    model.save_pretrained(tmp_path)
    config = load_config(tmp_path)
    ids, mask = drop_in_cases.prompts(model), torch.ones(2, 11, dtype=torch.int64)
    mask[0, :4] = 0
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = [
        model.generate(ids, **options),
        model.generate(ids, attention_mask=mask, **options),
    ]
    exafuse.patch(model)
    wrapped = PatchedModel(model, config, GenerationConfig.from_model_config(config))
    results = [
        wrapped.generate(ids, max_new_tokens=8),
        wrapped.generate(ids, attention_mask=mask, max_new_tokens=8),
    ]
    assert torch.equal(results[0], expected[0])
    assert torch.equal(results[1][:, 11:], expected[1][:, 11:])


def test_an_answer_beyond_the_window_ends_at_its_eos(tmp_path: Path) -> None:
    """The step that was queued too much cannot be taken back from transformers' sliding cache."""
    model = drop_in_cases.build("exaone4")
    model.save_pretrained(tmp_path)
    config = load_config(tmp_path)
    wrapped = PatchedModel(exafuse.patch(model), config, GenerationConfig.from_model_config(config))
    ids = drop_in_cases.prompts(model)[:1]
    free = wrapped.generate(ids, max_new_tokens=40, eos_token_id=None)
    options = {"max_new_tokens": 60, "eos_token_id": int(free[0, -1])}
    out = wrapped.generate(ids, return_dict_in_generate=True, **options)
    assert torch.equal(out.sequences, wrapped.generate(ids, **options))
    assert out.past_key_values is None
