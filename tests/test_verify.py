"""`verify` says yes to sound models; its report, its arguments, its command."""

from __future__ import annotations

import dataclasses
import json
import time

import exafuse
import pytest
import torch
import transformers
from exafuse.cli.commands import main
from exafuse.config import load_config
from exafuse.errors import CheckpointError
from exafuse.verification.report import Report
from exafuse.verification.sides import Trace
from verify_pairs import GLOBAL, HYBRID, LLAMA, QWEN2, compare, folders, verify, verify_sides

__all__ = ["folders"]  # a fixture


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_tiny_models_of_all_families_agree_with_transformers(dtype):
    started = time.perf_counter()
    reports = list(verify.verify_tiny("all", backend="reference", dtype=dtype))
    seconds = time.perf_counter() - started
    assert [report.model.removeprefix("tiny ") for report in reports] == list(verify.TINY_CONFIGS)
    for report in reports:
        assert report.ok, str(report)
        assert report.against == "transformers"
        assert report.first_diverging_layer is None
        assert report.num_tokens == 64
        if dtype == "float32":
            assert report.greedy_prefix == 64
            assert report.top1_agreement == 1
    assert seconds < 30


def test_tiny_models_are_what_they_should_be(folders):
    for name, folder in folders.items():
        config = load_config(folder)
        model = exafuse.from_pretrained(folder, device="cpu", backend="reference")
        for parameter_name, parameter in model.named_parameters():
            assert parameter.std() > 0.02, f"{name}: {parameter_name} hides mistakes"
        logits = model(verify.random_ids(150, 97)).logits
        assert 2 < logits.std() < 4.5
        windows = [plan.window_size[0] + 1 for plan in config.layers if plan.window_size[0] >= 0]
        assert all(2 * window + 3 < verify.TINY_PROMPT_TOKENS for window in windows)
    kinds = {
        (plan.window_size[0] >= 0, plan.rope, plan.norm)
        for folder in folders.values()
        for plan in load_config(folder).layers
    }
    assert kinds == {
        (False, True, "pre"),
        (True, True, "pre"),
        (False, True, "post"),
        (True, True, "post"),
        (False, False, "post"),
    }


def test_report_in_full(folders):
    report = compare(folders[HYBRID])
    assert report.ok
    assert (report.side, report.against, report.dtype) == ("reference", "transformers", "float32")
    assert (report.num_prompt_tokens, report.num_tokens, report.device) == (60, 12, "cpu")
    assert [entry.name for entry in report.layers] == [
        "embedding",
        "layer 0 (window 5, RoPE, post-norm)",
        "layer 1 (window 5, RoPE, post-norm)",
        "layer 2 (window 5, RoPE, post-norm)",
        "layer 3 (all tokens, NoPE, post-norm), with the final norm",
    ]
    assert report.layers[0].error == 0
    assert all(0 < entry.error <= entry.worst_error < 1e-5 for entry in report.layers[1:])
    assert 0 < report.checks[0].value <= report.checks[0].limit
    assert report.checks[0].limit == pytest.approx(2e-5 * report.max_logit)
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert values["schema"] == 1
    assert values["ok"] is True
    assert len(values["layers"]) == 5
    assert str(report).endswith("OK")
    assert "agrees with transformers" in report.summary()


def test_hidden_states_are_those_of_transformers(folders):
    """The traces really hold what they are compared by."""
    ids = verify.random_ids(9, 97)
    place = torch.device("cpu")
    trace = verify_sides.run_side(
        "transformers", folders[LLAMA], ids, 3, None, "float32", "float32", device=place
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(folders[LLAMA], dtype=torch.float32)
    expected = model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert list(trace.tokens) == expected[0, 9:].tolist()
    with torch.no_grad():
        out = model(expected[:, :-1], output_hidden_states=True)
    torch.testing.assert_close(trace.logits, out.logits[0], rtol=0, atol=1e-4)
    for ours, theirs in zip(trace.hidden, out.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs[0, :9], rtol=0, atol=1e-4)


def test_fed_tokens_replace_own_ones(folders):
    ids = verify.random_ids(9, 97)
    forced = (5, 6, 7)
    for side in ("reference", "transformers"):
        trace = verify_sides.run_side(
            side, folders[QWEN2], ids, 3, forced, "float32", "float32", device=torch.device("cpu")
        )
        assert trace.tokens == forced
        assert trace.logits.shape == (9 + 2, 97)


def test_weights_are_rounded_alike_on_both_sides(folders):
    """bf16 on an fp32 file: the fp32 run must use the rounded weights, or hide half the error."""
    report = compare(folders[LLAMA], dtype="bfloat16")
    assert report.ok, str(report)
    assert report.layers[0].error == 0
    assert report.layers[-1].error > 1e-3


def test_only_the_last_tokens_of_a_long_prompt_are_kept(folders, monkeypatch):
    monkeypatch.setattr(verify_sides, "COMPARED_TOKENS", 20)
    ids = verify.random_ids(60, 97)
    for side in ("reference", "transformers"):
        trace = verify_sides.run_side(
            side, folders[HYBRID], ids, 5, None, "float32", "float32", device=torch.device("cpu")
        )
        assert {state.shape[0] for state in trace.hidden} == {20}
        assert trace.logits.shape[0] == 20 + 4
    assert compare(folders[HYBRID]).ok


def test_the_edge_of_a_window_that_is_not_reached_is_noted(folders):
    ids = verify.random_ids(3, 97)
    report = verify.compare_folder(folders[HYBRID], "model", ids, 2, backend="reference")
    assert report.notes == (
        "5 tokens do not reach the end of the window of 5: its edge is not tested",
    )
    assert "note: 5 tokens" in str(report)
    assert compare(folders[HYBRID]).notes == ()


def test_a_side_against_itself(folders):
    with pytest.raises(ValueError, match="'reference' already"):
        compare(folders[LLAMA], against="reference")


def test_default_side_to_compare_with(folders, monkeypatch):
    seen = []

    def run(side, *_args, **_options):
        seen.append(side)
        raise InterruptedError

    monkeypatch.setattr(verify, "run_side", run)
    for backend, device, expected in (
        ("reference", "cpu", "transformers"),
        ("emulated", "cpu", "reference"),
        ("cuda", "cuda", "reference"),
    ):
        with pytest.raises(InterruptedError):
            compare(folders[LLAMA], backend=backend, device=device)
        assert seen.pop() == expected


@pytest.mark.parametrize(
    ("backend", "device"), [("cuda", "cpu"), ("emulated", "cuda"), ("emulated", "cuda:1")]
)
def test_a_backend_on_the_wrong_device_is_no_agreement(folders, backend, device):
    """There the ops would take the reference: both sides the same, whatever the kernels do."""
    words = f"backend='{backend}'.*device='{device}'"
    with pytest.raises(ValueError, match=words):
        compare(folders[LLAMA], backend=backend, device=device)
    with pytest.raises(ValueError, match=words):
        verify.verify(folders[LLAMA], backend=backend, device=torch.device(device))
    with pytest.raises(ValueError, match=words):
        next(verify.verify_tiny("llama", backend=backend, device=device))


def test_in_half_precision_the_kernels_are_on_trial(folders, monkeypatch):
    runs = []

    def run(side, _folder, ids, _tokens, forced, precision, rounded_to, **_options):
        runs.append((side, precision, rounded_to))
        hidden = tuple(torch.ones(ids.shape[1], 4) for _ in range(3))
        return Trace(hidden, torch.ones(ids.shape[1] + 11, 97), forced or (0,) * 12)

    monkeypatch.setattr(verify, "run_side", run)
    expected = [
        ("reference", "float32", "bfloat16"),
        ("emulated", "bfloat16", "bfloat16"),
        ("transformers", "bfloat16", "bfloat16"),
    ]
    for backend, against in (("emulated", "reference"), ("reference", "emulated")):
        runs.clear()
        report = compare(folders[LLAMA], backend=backend, against=against, dtype="bfloat16")
        assert runs == expected
        assert (report.side, report.against) == ("emulated", "reference")
    with pytest.raises(ValueError, match="one at a time"):
        compare(folders[LLAMA], backend="emulated", against="cuda", dtype="bfloat16")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"against": "vllm"}, "against: expected one of reference, transformers"),
        ({"backend": "fast"}, "backend: expected auto, cuda"),
        ({"dtype": "int8"}, "dtype: expected auto, bfloat16"),
        ({"dtype": torch.float64}, "dtype: expected auto, bfloat16"),
    ],
)
def test_unknown_names(folders, options, words):
    with pytest.raises(ValueError, match=words):
        compare(folders[LLAMA], **options)


def test_lengths(folders):
    with pytest.raises(ValueError, match="at least 1, got 0"):
        verify.verify(folders[LLAMA], tokens=0)
    with pytest.raises(ValueError, match="exceed the model's 256 positions"):
        verify.verify(folders[LLAMA], tokens=250)


def test_a_window_of_one_token_is_not_compared_with_transformers(tmp_path):
    values = verify.TINY_CONFIGS[HYBRID] | {"sliding_window": 1}
    verify.make_tiny(values, tmp_path)
    with pytest.raises(ValueError, match="window of 1"):
        compare(tmp_path)


def test_folder_without_tokenizer(folders):
    report = verify.verify(folders[LLAMA], tokens=2, device="cpu", backend="reference")
    assert report.ok
    assert report.num_prompt_tokens == 48
    with pytest.raises(exafuse.TemplateError, match=r"tokenizer\.json"):
        verify.verify(folders[LLAMA], prompt="Hello")


def test_folder_with_tokenizer(folders, tmp_path):
    from tiny_tokenizers import byte_level

    values = verify.TINY_CONFIGS[LLAMA] | {"vocab_size": 400}
    verify.make_tiny(values, tmp_path)
    tokenizer = byte_level()
    tokenizer.save_pretrained(tmp_path)
    options = {"tokens": 2, "device": "cpu", "backend": "reference"}
    report = verify.verify(tmp_path, prompt="The quick brown fox", **options)
    assert report.ok, str(report)
    assert report.num_prompt_tokens == len(tokenizer("The quick brown fox")["input_ids"])
    with pytest.raises(ValueError, match="at least one token"):
        verify.verify(tmp_path, prompt="", **options)


def test_command_on_a_folder(folders, capsys):
    argv = ["verify", str(folders[GLOBAL]), "--backend", "reference", "--tokens", "5"]
    assert main(argv) == 0
    captured = capsys.readouterr()
    assert "5 of 5 tokens equal" in captured.out
    assert captured.err == ""  # transformers' own bars and warnings are held back
    assert main([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True


def test_command_on_tiny_models(capsys):
    argv = ["verify", "--tiny", "exaone4", "--backend", "reference", "--tokens", "4"]
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all("reference agrees with transformers in float32" in line for line in lines)
    assert main([*argv, "--json", "--dtype", "bfloat16"]) == 0
    assert [report["dtype"] for report in json.loads(capsys.readouterr().out)] == ["bfloat16"] * 2


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "either a checkpoint or --tiny"),
        (["folder", "--tiny", "all"], "either a checkpoint or --tiny"),
        (["--tiny", "all", "--prompt", "x"], "no tokenizer"),
        (["no/such/folder"], "no such folder"),
        (["--tiny", "gpt2"], "invalid choice"),
    ],
)
def test_command_with_wrong_arguments(argv, words, capsys):
    try:
        code = main(["verify", *argv])
    except SystemExit as error:
        code = error.code
    assert code == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("exafuse: error: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err


def test_library_errors_are_those_of_loading(tmp_path):
    with pytest.raises(CheckpointError):
        verify.verify(tmp_path / "absent")


def test_settings_of_transformers_are_put_back(folders):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    compare(folders[LLAMA])
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_report_is_frozen(folders):
    report = compare(folders[LLAMA])
    assert isinstance(report, Report)
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.model = "other"
