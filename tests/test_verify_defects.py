"""`verify` finds each planted defect and names the layer where it is."""

from __future__ import annotations

import json
import math

import pytest
import torch
from exafuse.cli.commands import main
from exafuse.verification.report import Check, LayerError
from exafuse.verification.sides import Trace
from verify_pairs import GLOBAL, HYBRID, LLAMA, QWEN2, broken, compare, folders, verify_report

__all__ = ["broken", "folders"]  # fixtures


def layer(model, index):
    return model.model.layers[index]


def scale_one_weight(model):
    layer(model, 1).mlp.down_proj.weight[3, 5] += 0.01


def rotate_a_layer_without_positions(model):
    layer(model, 3).self_attn.rope = True


def do_not_rotate(model):
    layer(model, 2).self_attn.rope = False


def window_of_one_more(model):
    attention = layer(model, 2).self_attn
    left, right = attention.window_size
    attention.window_size = (left + 1, right)


def window_of_one_less(model):
    attention = layer(model, 1).self_attn
    left, right = attention.window_size
    attention.window_size = (left - 1, right)


def window_that_hardly_cuts(model):
    layer(model, 0).self_attn.window_size = (50, 0)


def no_query_norm(model):
    layer(model, 1).self_attn.q_norm.weight.fill_(1)


def swap_two_layers(model):
    layers = model.model.layers
    layers[1].mlp, layers[2].mlp = layers[2].mlp, layers[1].mlp


def other_embedding(model):
    model.model.embed_tokens.weight[:, 0] += 0.01


def other_head(model):
    model.lm_head.weight[17] *= 1.01


def nan_in_a_weight(model):
    layer(model, 1).self_attn.o_proj.weight[0, 0] = math.nan


DEFECTS = {
    scale_one_weight: "layer 1",
    rotate_a_layer_without_positions: "layer 3",
    do_not_rotate: "layer 2",
    window_of_one_more: "layer 2",
    window_of_one_less: "layer 1",
    window_that_hardly_cuts: "layer 0",
    no_query_norm: "layer 1",
    swap_two_layers: "layer 1",
    other_embedding: "embedding",
    nan_in_a_weight: "layer 1",
}


@pytest.mark.parametrize("change", DEFECTS, ids=lambda change: change.__name__)
def test_a_defect_is_found_and_its_layer_named(folders, broken, change):
    broken(change)
    report = compare(folders[HYBRID])
    assert not report.ok
    assert report.first_diverging_layer.startswith(DEFECTS[change])
    assert report.failures[0].startswith(DEFECTS[change])
    assert "is the first to diverge" in str(report)
    assert "DIFFERS" in report.summary()
    assert f"OVER {report.layers[1].error:.2e}" in str(report) or report.layers[1].ok
    json.dumps(report.to_dict(), allow_nan=False)


# One weight off by 0.01 is about what half precision rounds: only fp32 can tell it.
LARGE_DEFECTS = [change for change in DEFECTS if change is not scale_one_weight]


@pytest.mark.parametrize("change", LARGE_DEFECTS, ids=lambda change: change.__name__)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_defect_is_found_in_half_precision(folders, broken, change, dtype):
    broken(change)
    report = compare(folders[HYBRID], dtype=dtype)
    assert not report.ok
    assert report.first_diverging_layer.startswith(DEFECTS[change])


def test_a_defect_of_the_head_is_told_from_one_of_a_layer(folders, broken):
    broken(other_head)
    report = compare(folders[HYBRID])
    assert not report.ok
    assert report.first_diverging_layer is None
    assert report.failures[0].startswith("the head diverges, logits: largest error")


@pytest.mark.parametrize("name", [LLAMA, QWEN2, GLOBAL])
def test_the_other_families(folders, broken, name):
    broken(scale_one_weight)
    report = compare(folders[name])
    assert report.first_diverging_layer.startswith("layer 1 ")


def test_a_defect_that_only_decoding_shows(folders, broken, monkeypatch):
    """Sound in prefill, wrong one token at a time: hidden states agree, the logits do not."""

    def forgets(model):
        sound = model.next_logits

        def next_logits(ids, cache, *args, **options):
            if ids.shape[1] == 1:
                cache.layers[3].k[:, 0] = 0
            return sound(ids, cache, *args, **options)

        model.next_logits = next_logits

    broken(forgets)
    report = compare(folders[HYBRID])
    assert report.first_diverging_layer is None
    assert not report.ok
    assert report.greedy_prefix < 12 or report.checks[0].value > report.checks[0].limit


def test_top1_tokens_that_differ_without_a_near_tie_are_a_failure():
    logits = torch.tensor([[1.0, 1.0 + 2e-5, 0.0], [2.0, 1.0, 0.0], [0.0, 1.0, 3.0]])
    other = logits.clone()
    other[0] = torch.tensor([1.0 + 2e-5, 1.0, 0.0])  # a near tie, decided the other way
    hidden = (torch.ones(3, 4),)
    about = {"model": "m", "side": "a", "against": "b", "dtype": "float32", "device": "cpu"}
    about |= {"num_prompt_tokens": 2, "num_tokens": 2, "notes": ()}

    def judge(a, b):
        ours, theirs = Trace(hidden, a, (1, 2)), Trace(hidden, b, (1, 2))
        return verify_report._report(ours, theirs, [], (), 1e-4, **about)

    report = judge(logits, other)
    assert report.ok
    assert report.top1_agreement == pytest.approx(2 / 3)
    assert report.greedy_prefix == 2
    other[1] = torch.tensor([1.0, 2.0, 0.0])
    report = judge(logits, other)
    assert report.failures == ("1 of 3 top-1 tokens differ without a near tie",)
    assert report.greedy_prefix == 0


def test_limits_let_nothing_pass_that_is_not_a_number():
    entry = LayerError("x", math.nan, 1.0, math.nan, 1.0, 0)
    assert not entry.ok
    assert not Check("x", math.nan, 1.0).ok
    assert not Check("x", math.inf, 1.0).ok
    assert verify_report._number(torch.tensor(math.nan)) == math.inf
    rows = verify_report._row_errors(torch.tensor([[math.nan, 1.0]]), torch.ones(1, 2))
    assert rows.tolist() == [math.inf]


def test_command_on_a_broken_model(folders, broken, capsys):
    broken(window_of_one_more)
    argv = ["verify", str(folders[HYBRID]), "--backend", "reference", "--tokens", "5"]
    assert main(argv) == 1
    assert "FAILED: layer 2 (window 5" in capsys.readouterr().out
    assert main([*argv, "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["first_diverging_layer"] == "layer 2 (window 5, RoPE, post-norm)"


def test_command_on_broken_tiny_models(broken, capsys):
    broken(scale_one_weight)
    argv = ["verify", "--tiny", "llama", "--backend", "reference", "--tokens", "4"]
    assert main(argv) == 1
    assert "FAILED: layer 1 (all tokens" in capsys.readouterr().out
