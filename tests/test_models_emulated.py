"""Whole models on the emulated kernels, attention included; in fp32, where it has no kernel, on the
reference there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import exafuse
import pytest
import tiny_models
import torch
import transformers
from emulator.control import Emulator
from exafuse.layers import Attention
from exafuse.ops import front_door
from exafuse.ops.front_door import emulator_problem, load_emulated
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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
PRE_NORM = ["rms_norm<1>", "heads", "attention", "rms_norm<1>", "silu_and_mul"]
# What one step must launch, in order: a layer, and what follows the last one. The first norm of a
# pre-norm model has nothing to add yet.
LAYER = {
    "llama": PRE_NORM,
    "qwen2": PRE_NORM,
    "exaone4": ["heads", "attention", "rms_norm<2>", "silu_and_mul", "rms_norm<2>"],
}
LAST = {"llama": ["rms_norm<1>"], "qwen2": ["rms_norm<1>"], "exaone4": ["rms_norm<0>"]}
# Kernels that write the keys and values of a call anew, or put them another way round.
COPIES = {"copy_", "clone", "_to_copy", "contiguous", "cat", "index_copy_", "index_put_"}


class Copies(TorchDispatchMode):
    """Notes every torch op inside the attention layers of a model that copies a tensor."""

    def __init__(self, model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        # A model that nobody looks at calls the kernels directly: so does this one.
        monkeypatch.setattr(front_door, "_watchers", lambda: 0)
        self.names: list[str] = []
        self.inside = self.layers = 0
        for module in model.modules():
            if isinstance(module, Attention):
                module.register_forward_pre_hook(lambda *_: self.count(1))
                module.register_forward_hook(lambda *_: self.count(0))

    def count(self, inside: int) -> None:
        self.inside = inside
        self.layers += inside

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if self.inside and name in COPIES:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


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


def launched(emulator: Emulator) -> list[str]:
    stems = [stem(record.kernel) for record in emulator.launches()]
    emulator.clear_launches()
    return stems


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", CASES)
def test_each_layer_launches_the_fused_kernels(
    folders: dict[str, Path],
    emulator: Emulator,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    dtype: torch.dtype,
) -> None:
    """A prefill, a decode step, a few tokens at once, and a call without a cache."""
    model = exafuse.from_pretrained(folders[family], backend="emulated", device="cpu", dtype=dtype)
    cache = model.new_cache(2)
    copies = Copies(model, monkeypatch)
    steps = {30: "prefill_sm80", 1: "decode", 4: "decode", None: "prefill_sm80"}
    for tokens, attention in steps.items():
        emulator.clear_launches()
        with copies:
            if tokens is None:
                model(torch.randint(0, 97, (2, 30)))
            else:
                model.next_logits(torch.randint(0, 97, (2, tokens)), cache)
        layer = [attention if name == "attention" else name for name in LAYER[family]]
        expected = layer * model.config.num_layers + LAST[family]
        if family != "exaone4":
            expected[0] = "rms_norm<0>"
        assert launched(emulator) == expected, tokens
    assert copies.names == []
    assert copies.layers == len(steps) * model.config.num_layers


@torch.no_grad()
def test_queries_and_caches_reach_attention_as_they_are(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the preparing kernel wrote is what the attention kernel reads: no copy lies between."""
    model = exafuse.from_pretrained(
        folders["exaone4"], backend="emulated", device="cpu", dtype=torch.bfloat16
    )
    extension = load_emulated()
    written: list[tuple[int, ...]] = []
    read: list[tuple[int, ...]] = []

    def note(name: str, calls: list[tuple[int, ...]], *tensors: int) -> None:
        function = getattr(extension, name)

        def call(*args: Any) -> None:
            calls.append(tuple(args[i].data_ptr() for i in tensors))
            function(*args)

        monkeypatch.setattr(extension, name, call)

    note("qk_norm_rope_cache", written, 14, 11, 12)
    note("flash_attn_with_kvcache", read, 0, 1, 2)
    cache = model.new_cache(2)
    for tokens in (20, 1, 3):
        model.next_logits(torch.randint(0, 97, (2, tokens)), cache)
    assert len(read) == 3 * model.config.num_layers
    assert read == written


def test_a_needed_gradient_takes_the_reference(
    folders: dict[str, Path], emulator: Emulator
) -> None:
    model = exafuse.from_pretrained(folders["llama"], backend="emulated", device="cpu")
    ids = torch.randint(0, 97, (1, 8))
    model(ids, labels=ids).loss.backward()
    assert emulator.num_launches() == 0
    assert all(p.grad is not None for p in model.parameters())
