"""Whole models on the emulated kernels; attention, which has no kernel yet, on the reference."""

from __future__ import annotations

import collections
import re
from pathlib import Path

import exafuse
import pytest
import tiny_models
import torch
import transformers
from emulator.control import Emulator
from exafuse import ops
from exafuse.ops.front_door import emulator_problem, load_emulated
from torch import Tensor

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(bool(emulator_problem()), reason=emulator_problem()),
]

CASES = {
    "llama": {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 96},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "exaone4": {
        "num_hidden_layers": 4,
        "sliding_window": 6,
        "layer_types": [
            "sliding_attention",
            "sliding_attention",
            "sliding_attention",
            "full_attention",
        ],
    },
}
# What one decode step must launch: per layer, and once at the end (or at the start).
PER_LAYER = {
    "llama": {"rms_norm<1>": 2, "heads": 1, "silu_and_mul": 1},
    "qwen2": {"rms_norm<1>": 2, "heads": 1, "silu_and_mul": 1},
    "exaone4": {"rms_norm<2>": 2, "heads": 1, "silu_and_mul": 1},
}


def stem(kernel: str) -> str:
    """``rms_norm<op>`` (0 = alone, 1 = after an addition, 2 = before one), ``heads``, ..."""
    name = re.search(r"(\w+)_kernel<", kernel)
    op = re.search(r"NormOp\)(\d)", kernel)
    assert name is not None, kernel
    return name[1] + (f"<{op[1]}>" if op else "")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        family: tiny_models.save(
            tiny_models.build(family, 7, **overrides), tmp_path_factory.mktemp(family)
        )
        for family, overrides in CASES.items()
    }


@pytest.fixture
def emulator() -> Emulator:
    control = Emulator(Path(load_emulated().__file__))
    control.clear_launches()
    return control


@torch.no_grad()
@pytest.mark.parametrize("family", CASES)
def test_greedy_tokens_equal_the_reference_in_fp32(folders: dict[str, Path], family: str) -> None:
    ids = torch.randint(0, 97, (2, 23))
    emulated, reference = (
        exafuse.from_pretrained(folders[family], backend=backend, device="cpu").generate(
            ids, max_new_tokens=24, do_sample=False
        )
        for backend in ("emulated", "reference")
    )
    assert torch.equal(emulated, reference)


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", CASES)
def test_low_precision_logits_are_as_near_to_fp32_as_transformers(
    folders: dict[str, Path], tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    load = transformers.AutoModelForCausalLM.from_pretrained
    load(folders[family], dtype=dtype).save_pretrained(tmp_path)  # weights the dtype holds exactly
    exact = load(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    theirs = load(tmp_path, dtype=dtype, attn_implementation="sdpa").eval()
    ours = exafuse.from_pretrained(tmp_path, backend="emulated", device="cpu")
    ids = torch.randint(0, 97, (4, 40))
    truth = exact(ids).logits
    logits = ours(ids).logits.float()
    our_error, their_error = rms(logits - truth), rms(theirs(ids).logits.float() - truth)
    assert our_error <= 1.25 * their_error, f"{our_error:.4g} vs {their_error:.4g}"
    top = truth.topk(2, dim=-1)
    clear = top.values[..., 0] - top.values[..., 1] > 4 * our_error
    assert clear.float().mean() > 0.5, "the test must have something to compare"
    assert torch.equal(logits.argmax(-1)[clear], top.indices[..., 0][clear])


@torch.no_grad()
@pytest.mark.parametrize("family", CASES)
def test_each_layer_launches_the_fused_kernels(
    folders: dict[str, Path], emulator: Emulator, family: str
) -> None:
    model = exafuse.from_pretrained(folders[family], backend="emulated", device="cpu")
    cache = model.new_cache(2)
    model.next_logits(torch.randint(0, 97, (2, 9)), cache)
    emulator.clear_launches()
    model.next_logits(torch.randint(0, 97, (2, 1)), cache)
    counts = collections.Counter(stem(record.kernel) for record in emulator.launches())
    expected = collections.Counter(
        {name: n * model.config.num_layers for name, n in PER_LAYER[family].items()}
    )
    # Pre-norm: the first norm has nothing to add yet. Post-norm: the final norm.
    expected["rms_norm<0>"] = 1
    assert counts == expected


def test_a_needed_gradient_takes_the_reference(
    folders: dict[str, Path], emulator: Emulator
) -> None:
    model = exafuse.from_pretrained(folders["llama"], backend="emulated", device="cpu")
    ids = torch.randint(0, 97, (1, 8))
    model(ids, labels=ids).loss.backward()
    assert emulator.num_launches() == 0
    assert all(p.grad is not None for p in model.parameters())


def test_attention_says_that_it_has_no_kernel() -> None:
    assert ops.paths()["flash_attn_with_kvcache"] == ("reference", "no kernel yet")
