"""What the extension refuses, and in which words: every message names the argument, what was
expected and what came.

Runs on the CUDA extension where it is installed (no GPU is needed: the device is checked last) and
on the emulated one.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from exafuse.ops import front_door
from kernel_backends import cuda_extension, emulated, extension
from poison import sparse

__all__ = ["emulated", "extension"]  # fixtures

BF16 = torch.bfloat16


def norm_arguments() -> dict[str, Any]:
    x = torch.zeros(3, 64, dtype=BF16)
    return {"x": x, "weight": torch.ones(64), "eps": 1e-6, "out": torch.empty_like(x)}


def add_norm_arguments() -> dict[str, Any]:
    arguments = norm_arguments()
    x = arguments["x"]
    return arguments | {"residual": x.clone(), "residual_out": torch.empty_like(x)}


def rope_arguments() -> dict[str, Any]:
    """Two query heads over one kv head of 16, four tokens."""
    return {
        "q": torch.zeros(4, 64, dtype=BF16),
        "k": None,
        "v": None,
        "num_heads": 2,
        "num_kv_heads": 1,
        "q_weight": torch.ones(16, dtype=BF16),
        "k_weight": torch.ones(16),
        "cos": torch.ones(8, 8),
        "sin": torch.ones(8, 8),
        "positions": torch.zeros(4, dtype=torch.int32),
        "eps": 1e-6,
        "q_out": torch.empty(4, 2, 16, dtype=BF16),
        "k_out": torch.empty(4, 1, 16, dtype=BF16),
        "v_out": torch.empty(4, 1, 16, dtype=BF16),
    }


def cache_arguments() -> dict[str, Any]:
    arguments = rope_arguments()
    del arguments["k_out"], arguments["v_out"]
    return arguments | {
        "k_cache": torch.zeros(2, 8, 1, 16, dtype=BF16),
        "v_cache": torch.zeros(2, 8, 1, 16, dtype=BF16),
        "slot_mapping": torch.arange(4),
    }


def alone_arguments() -> dict[str, Any]:
    arguments = rope_arguments()
    names = ("cos", "sin", "positions", "q_out", "k_out")
    return {name: arguments[name] for name in names} | {
        "q": torch.zeros(4, 2, 16, dtype=BF16),
        "k": torch.zeros(4, 1, 16, dtype=BF16),
    }


def silu_arguments() -> dict[str, Any]:
    gate = torch.zeros(3, 64, dtype=BF16)
    return {"gate": gate, "up": None, "out": torch.empty(3, 32, dtype=BF16)}


ARGUMENTS: dict[str, Callable[[], dict[str, Any]]] = {
    "rms_norm": norm_arguments,
    "add_rms_norm": add_norm_arguments,
    "rms_norm_add": lambda: {k: v for k, v in add_norm_arguments().items() if k != "residual_out"},
    "qk_norm_rope": rope_arguments,
    "qk_norm_rope_cache": cache_arguments,
    "apply_rope": alone_arguments,
    "silu_and_mul": silu_arguments,
}
assert set(ARGUMENTS) == set(front_door.KERNELS)


def columns(rows: int, width: int, taken: int) -> torch.Tensor:
    """A view `[rows, taken]` of every second column."""
    return torch.zeros(rows, 2 * width, dtype=BF16)[:, ::2][:, :taken]


def misaligned(*shape: int) -> torch.Tensor:
    """A bf16 tensor at an odd address."""
    size = torch.Size(shape).numel() * 2
    return torch.frombuffer(bytearray(size + 1), dtype=BF16, offset=1).view(shape)


WRONG: list[tuple[str, dict[str, Any], str]] = [
    # shape and rank
    ("rms_norm", {"weight": torch.ones(32)}, r"weight: expected \(hidden=64\), got \(32,\)"),
    ("rms_norm", {"weight": torch.ones(64, 1)}, r"weight: expected \(hidden=64\), got \(64, 1\)"),
    ("rms_norm", {"x": torch.zeros((), dtype=BF16)}, r"x: expected \(\.\.\., hidden\), got \(\)"),
    (
        "rms_norm",
        {"x": torch.zeros(3, 60, dtype=BF16)},
        r"hidden: expected a multiple of 8 .* got 60",
    ),
    ("rms_norm", {"x": torch.zeros(1, 65544, dtype=BF16)}, r"hidden: .* to 65536, got 65544"),
    (
        "rms_norm",
        {"x": torch.zeros(3, 0, dtype=BF16)},
        r"hidden: expected a multiple of 8 .* got 0",
    ),
    ("rms_norm", {"x": torch.zeros([1] * 9, dtype=BF16)}, r"x: expected at most 8 dimensions, got"),
    (
        "rms_norm",
        {"out": torch.zeros(2, 64, dtype=BF16)},
        r"out: expected \(3, 64\), got \(2, 64\)",
    ),
    (
        "add_rms_norm",
        {"residual": torch.zeros(64, dtype=BF16)},
        r"residual: expected \(3, 64\), got",
    ),
    (
        "add_rms_norm",
        {"residual_out": torch.zeros(4, 64, dtype=BF16)},
        r"residual_out: expected \(3",
    ),
    ("rms_norm_add", {"residual": torch.zeros(3, 8, dtype=BF16)}, r"residual: expected \(3, 64\)"),
    ("qk_norm_rope", {"q": torch.zeros(4, 62, dtype=BF16)}, r"qkv: expected \(num_tokens, 4 heads"),
    (
        "qk_norm_rope",
        {"q": torch.zeros(4, 4, 16, dtype=BF16)},
        r"qkv: expected \(num_tokens, 4 hea",
    ),
    ("qk_norm_rope", {"q": torch.zeros(4, 48, dtype=BF16)}, r"head_dim: .*multiple of 8.*got 12"),
    ("qk_norm_rope", {"q": torch.zeros(4, 544, dtype=BF16)}, r"head_dim: .* 8 to 128, got 136"),
    ("qk_norm_rope", {"k": torch.zeros(4, 16, dtype=BF16)}, r"k, v: expected both or neither"),
    (
        "qk_norm_rope",
        {"num_heads": 3, "num_kv_heads": 2},
        r"num_heads: expected a positive multiple",
    ),
    ("qk_norm_rope", {"num_heads": 0}, r"num_heads: expected a positive multiple of num_kv_heads"),
    ("qk_norm_rope", {"num_kv_heads": -1}, r"num_heads: expected a positive multiple"),
    (
        "qk_norm_rope",
        {"q_weight": torch.ones(8)},
        r"q_weight: expected \(head_dim=16\), got \(8,\)",
    ),
    ("qk_norm_rope", {"sin": None}, r"cos, sin: expected both tables or neither"),
    ("qk_norm_rope", {"positions": None}, r"positions: expected int32 \(num_tokens,\) when cos"),
    (
        "qk_norm_rope",
        {"cos": torch.ones(8, 16)},
        r"cos: expected \(rows, 8\), got \(8, 16\)|cos: exp",
    ),
    ("qk_norm_rope", {"sin": torch.ones(7, 8)}, r"sin: expected \(rows=8, 8\), got \(7, 8\)"),
    (
        "qk_norm_rope",
        {"cos": torch.ones(0, 8), "sin": torch.ones(0, 8)},
        r"cos: expected at least one",
    ),
    (
        "qk_norm_rope",
        {"positions": torch.zeros(3, dtype=torch.int32)},
        r"positions: expected \(num_tokens=4\), got \(3,\)",
    ),
    (
        "qk_norm_rope",
        {"k_out": torch.zeros(4, 2, 16, dtype=BF16)},
        r"k_out: expected \(num_tokens=4, num_kv_heads=1, head_dim=16\), got \(4, 2, 16\)",
    ),
    ("qk_norm_rope", {"v_out": torch.zeros(4, 16, dtype=BF16)}, r"v_out: expected \(num_tokens=4,"),
    (
        "qk_norm_rope_cache",
        {"k_cache": torch.zeros(2, 8, 2, 16, dtype=BF16)},
        r"k_cache: expected \(rows=2, slots=8, num_kv_heads=1, head_dim=16\), got \(2, 8, 2, 16\)",
    ),
    (
        "qk_norm_rope_cache",
        {"v_cache": torch.zeros(2, 9, 1, 16, dtype=BF16)},
        r"v_cache: .*slots=8",
    ),
    ("qk_norm_rope_cache", {"slot_mapping": torch.arange(5)}, r"slot_mapping: expected \(num_tok"),
    ("apply_rope", {"k": torch.zeros(5, 1, 16, dtype=BF16)}, r"k: expected \(num_tokens=4, num_kv"),
    (
        "apply_rope",
        {"q": torch.zeros(4, 32, dtype=BF16)},
        r"q: expected \(num_tokens, num_heads, h",
    ),
    (
        "silu_and_mul",
        {"gate": torch.zeros(3, 63, dtype=BF16)},
        r"gate_up: expected \(\.\.\., 2 \* in",
    ),
    (
        "silu_and_mul",
        {"gate": torch.zeros((), dtype=BF16)},
        r"gate_up: expected \(\.\.\., 2 \* inter",
    ),
    (
        "silu_and_mul",
        {"up": torch.zeros(3, 32, dtype=BF16)},
        r"up: expected \(3, 64\), got \(3, 32\)",
    ),
    (
        "silu_and_mul",
        {"out": torch.zeros(3, 64, dtype=BF16)},
        r"out: expected \(3, 32\), got \(3, 64",
    ),
    # numbers
    ("rms_norm", {"eps": float("nan")}, r"eps: expected a finite number >= 0, got nan"),
    ("rms_norm", {"eps": -1e-6}, r"eps: expected a finite number >= 0, got -0\.000001"),
    ("qk_norm_rope", {"eps": float("inf")}, r"eps: expected a finite number >= 0, got inf"),
    # dtype
    (
        "rms_norm",
        {"x": torch.zeros(3, 64).double()},
        r"x: expected dtype bfloat16 or float16 or fl",
    ),
    ("rms_norm", {"x": torch.zeros(3, 64, dtype=torch.int32)}, r"x: expected dtype .*, got int32"),
    (
        "rms_norm",
        {"weight": torch.ones(64).half()},
        r"weight: expected dtype bfloat16 or float32, g",
    ),
    ("rms_norm", {"out": torch.zeros(3, 64)}, r"out: expected dtype bfloat16, got float32"),
    (
        "add_rms_norm",
        {"residual": torch.zeros(3, 64)},
        r"residual: expected dtype bfloat16, got fl",
    ),
    (
        "qk_norm_rope",
        {"q_weight": torch.ones(16).half()},
        r"q_weight: expected dtype bfloat16 or f",
    ),
    ("qk_norm_rope", {"sin": torch.ones(8, 8, dtype=BF16)}, r"sin: expected dtype float32, got bf"),
    (
        "qk_norm_rope",
        {"positions": torch.zeros(4, dtype=torch.int64)},
        r"positions: expected dtype int32, got int64",
    ),
    (
        "qk_norm_rope_cache",
        {"slot_mapping": torch.arange(4, dtype=torch.int32)},
        r"slot_mapping: expected dtype int64, got int32",
    ),
    (
        "qk_norm_rope_cache",
        {"v_cache": torch.zeros(2, 8, 1, 16)},
        r"v_cache: expected dtype bfloat",
    ),
    ("apply_rope", {"k": torch.zeros(4, 1, 16)}, r"k: expected dtype bfloat16, got float32"),
    (
        "silu_and_mul",
        {"gate": torch.zeros(3, 32, dtype=BF16), "up": torch.zeros(3, 32)},
        r"up: expected dtype bfloat16, got float32",
    ),
    # stride
    (
        "rms_norm",
        {"x": columns(3, 64, 64)},
        r"x: expected stride 1 in the last dimension, got strid",
    ),
    (
        "rms_norm",
        {"out": torch.zeros(64, 3, dtype=BF16).t()},
        r"out: expected stride 1 in the last",
    ),
    (
        "qk_norm_rope",
        {"q": columns(4, 64, 64)},
        r"q: expected stride 1 in the last dimension, got st",
    ),
    (
        "qk_norm_rope",
        {"cos": torch.ones(8, 8).t()},
        r"cos: expected stride 1 in the last dimension",
    ),
    ("silu_and_mul", {"gate": columns(3, 64, 64)}, r"gate_up: expected stride 1 in the last dimen"),
    # alignment
    ("rms_norm", {"x": misaligned(3, 64)}, r"x: expected data aligned to its elements of 2 bytes"),
    ("silu_and_mul", {"gate": misaligned(3, 64)}, r"gate_up: expected data aligned to its element"),
    # outputs that share memory with themselves
    (
        "rms_norm",
        {"out": torch.zeros(64, dtype=BF16).expand(3, 64)},
        r"out: expected an output whose",
    ),
    (
        "rms_norm",
        {"out": torch.zeros(200, dtype=BF16).as_strided((3, 64), (63, 1))},
        r"out: expected an output whose elements do not share memory, got shape \(3, 64\) with",
    ),
    (
        "qk_norm_rope_cache",
        {"k_cache": torch.zeros(1, 8, 1, 16, dtype=BF16).expand(2, 8, 1, 16)},
        r"k_cache: expected an output whose elements do not share memory",
    ),
]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    WRONG,
    ids=[f"{name}-{'-'.join(changes)}-{i}" for i, (name, changes, _) in enumerate(WRONG)],
)
def test_wrong_arguments_are_named(
    extension: ModuleType, name: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        getattr(extension, name)(**{**ARGUMENTS[name](), **changes})
    assert type(caught.value) is ValueError


def overlapping() -> list[tuple[str, dict[str, Any], str]]:
    buffer = torch.zeros(1024, dtype=BF16)
    x = buffer[:192].view(3, 64)
    qkv = buffer[:256].view(4, 64)
    cache = torch.zeros(2, 8, 2, 16, dtype=BF16)
    return [
        ("rms_norm", {"x": x, "out": buffer[64:256].view(3, 64)},
         "out: expected exactly the memory of x or memory apart from it, got a partial overlap"),
        ("rms_norm", {"x": x, "weight": buffer[512:576], "out": buffer[500:692].view(3, 64)},
         "out: expected memory apart from weight, got an overlap"),
        ("add_rms_norm", {"out": x, "residual_out": x},
         "residual_out: expected memory apart from out"),
        ("add_rms_norm", {"residual": x, "out": buffer[1:193].view(3, 64)},
         "out: expected exactly the memory of residual"),
        ("qk_norm_rope", {"q": qkv, "q_out": qkv.view(4, 4, 16)[:, 1:3]},
         "q_out: expected exactly the memory of q"),
        ("qk_norm_rope", {"q": qkv, "k_out": qkv.view(4, 4, 16)[:, 3:]},
         "k_out: expected memory apart from v"),
        ("qk_norm_rope", {"k_out": buffer[:64].view(4, 1, 16), "v_out": buffer[:64].view(4, 1, 16)},
         "v_out: expected memory apart from k_out"),
        ("qk_norm_rope_cache", {"k_cache": cache[:, :, :1], "v_cache": cache[:, :, :1]},
         "v_cache: expected memory apart from k_cache"),
        ("qk_norm_rope_cache", {"q": qkv, "k_cache": buffer[:256].view(2, 8, 1, 16)},
         "k_cache: expected memory apart from q"),
        ("apply_rope",
         {"q_out": buffer[:128].view(4, 2, 16), "k_out": buffer[64:128].view(4, 1, 16)},
         "k_out: expected memory apart from q_out"),
        ("silu_and_mul", {"gate": x, "out": buffer[16:112].view(3, 32)},
         "out: expected exactly the memory of gate_up"),
    ]  # fmt: skip


@pytest.mark.parametrize("number", range(len(overlapping())))
def test_outputs_that_overlap_are_refused(extension: ModuleType, number: int) -> None:
    name, changes, message = overlapping()[number]
    with pytest.raises(ValueError, match=message):
        getattr(extension, name)(**{**ARGUMENTS[name](), **changes})


def test_interleaved_views_of_one_buffer_are_apart(emulated: object) -> None:
    """Outputs may be columns of one workspace, caches halves of one tensor."""
    extension = front_door.load_emulated()
    workspace = torch.zeros(4, 4, 16, dtype=BF16)
    parts = {"q_out": workspace[:, :2], "k_out": workspace[:, 2:3], "v_out": workspace[:, 3:]}
    extension.qk_norm_rope(**{**rope_arguments(), **parts})
    both = torch.zeros(2, 8, 2, 1, 16, dtype=BF16)
    caches = {"k_cache": both[:, :, 0], "v_cache": both[:, :, 1]}
    extension.qk_norm_rope_cache(**{**cache_arguments(), **caches})
    stacked = torch.zeros(2, 2, 8, 1, 16, dtype=BF16)
    caches = {"k_cache": stacked[0], "v_cache": stacked[1]}
    extension.qk_norm_rope_cache(**{**cache_arguments(), **caches})


@pytest.mark.parametrize("value", [3, None, "x", [1.0]])
@pytest.mark.parametrize("name", front_door.KERNELS)
def test_what_is_no_tensor_is_a_type_error_that_names_it(
    extension: ModuleType, name: str, value: object
) -> None:
    optional = {"k", "v", "q_weight", "k_weight", "cos", "sin", "positions", "v_out", "up"}
    if name == "apply_rope":
        optional = set()
    for argument in ARGUMENTS[name]():
        if argument in ("eps", "num_heads", "num_kv_heads") or (
            value is None and argument in optional
        ):
            continue
        changes = {argument: value}
        if name == "qk_norm_rope" and argument in ("k", "v"):
            changes = {
                "k": torch.zeros(4, 16, dtype=BF16),
                "v": torch.zeros(4, 16, dtype=BF16),
                **changes,
            }
            changes["q"] = torch.zeros(4, 32, dtype=BF16)
        if name == "qk_norm_rope_cache" and argument in ("k", "v"):
            changes = {
                "k": torch.zeros(4, 16, dtype=BF16),
                "v": torch.zeros(4, 16, dtype=BF16),
                **changes,
            }
            changes["q"] = torch.zeros(4, 32, dtype=BF16)
        shown = {"gate": "gate(_up)?", "q": "q(kv)?"}.get(argument, argument)
        kind = type(value).__name__
        with pytest.raises(TypeError, match=rf"^{shown}: expected a torch.Tensor, got {kind}$"):
            getattr(extension, name)(**{**ARGUMENTS[name](), **changes})


def test_what_is_no_number_is_a_type_error_that_names_it(extension: ModuleType) -> None:
    for eps in ("x", None, torch.tensor(1e-6)):
        with pytest.raises(TypeError, match=r"^eps: expected a number, got "):
            extension.rms_norm(**{**norm_arguments(), "eps": eps})
    for heads in (2.0, None, torch.tensor(2)):
        with pytest.raises(TypeError, match=r"^num_heads: expected an int, got "):
            extension.qk_norm_rope(**{**rope_arguments(), "num_heads": heads})


class Wrapped(torch.Tensor):
    """A subclass, as quantisation libraries make them."""


def test_tensors_without_plain_memory_are_told_apart(extension: ModuleType) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    x = torch.zeros(3, 64, dtype=BF16)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
    for tensor in (
        fake,
        x.to("meta"),
        x.as_subclass(Wrapped),
        torch._neg_view(x),
        x.to_sparse(),
    ):
        with pytest.raises(extension.NotAPlainTensor):
            extension.rms_norm(**{**norm_arguments(), "x": tensor})

    def inside(row: torch.Tensor) -> torch.Tensor:
        with pytest.raises(extension.NotAPlainTensor):
            extension.rms_norm(row, torch.ones(64), 1e-6, torch.empty(64, dtype=BF16))
        return row

    torch.vmap(inside)(x)


def test_parameters_are_plain_tensors(emulated: object) -> None:
    extension = front_door.load_emulated()
    arguments = norm_arguments() | {"weight": torch.nn.Parameter(torch.ones(64))}
    extension.rms_norm(**arguments)
    assert not arguments["out"].isnan().any()


@pytest.mark.parametrize("name", front_door.KERNELS)
def test_the_device_is_checked_last(name: str) -> None:
    """CPU tensors come through every other check of the CUDA extension first."""
    extension = cuda_extension()
    with pytest.raises(ValueError, match=r": expected a cuda tensor, got cpu$"):
        getattr(extension, name)(**ARGUMENTS[name]())


def test_five_leading_dimensions_that_cannot_be_merged(emulated: object) -> None:
    extension = front_door.load_emulated()
    x = torch.zeros([4] * 5 + [64], dtype=BF16)[::2, ::2, ::2, ::2, ::2]
    weight = torch.ones(64)
    with pytest.raises(ValueError, match="at most 4 leading dimensions"):
        extension.rms_norm(x, weight, 1e-6, torch.empty(x.shape, dtype=BF16))
    four = x[0]
    extension.rms_norm(four, weight, 1e-6, torch.empty(four.shape, dtype=BF16))


def test_more_work_than_a_grid_holds(emulated: object) -> None:
    """More than 2^31 blocks of 256 rows, in a terabyte of addresses: refused, not silently cut."""
    extension = front_door.load_emulated()
    rows = 2**39 + 1
    gate_up = torch.zeros(1, 2, dtype=BF16).expand(rows, 2)
    with pytest.raises(ValueError, match=r"too much work for one launch: 2147483649 blocks, at mo"):
        extension.silu_and_mul(gate_up, None, sparse(rows, BF16).view(rows, 1))
