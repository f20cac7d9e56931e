"""Memory that the extension refuses: overlaps, other devices, tensors that are none or have none.

Runs on the CUDA extension where it is installed (no GPU is needed: the device is checked last) and
on the emulated one.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from exafuse.ops import front_door
from kernel_backends import cuda_extension, emulated, extension
from op_arguments import ARGUMENTS, BF16, cache_arguments, norm_arguments, rope_arguments
from poison import sparse

__all__ = ["emulated", "extension"]  # fixtures


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
    arguments = ARGUMENTS[name]()
    numbers = {n for n, x in arguments.items() if isinstance(x, float | int)}
    optional = {"q_weight", "k_weight", "cos", "sin", "positions", "v_out", "up", "lse"}
    if name in ("apply_rope", "vision_attn"):
        optional = set()
    if name.startswith("qk_norm_rope"):
        optional |= {"k", "v"}
    if name == "flash_attn_with_kvcache":
        # Without one of them, another one is wrong: test_bad_attention.py.
        optional |= {"k", "v", "block_table"}
        optional |= {n for n in arguments if n.startswith(("cache_", "cu_"))}
    for argument in arguments:
        if argument in numbers or (value is None and argument in {*optional, "workspace"}):
            continue
        if argument == "cu_seqlens_q" and arguments[argument] is None:
            continue  # says how q is laid out, which is looked at first
        if (argument, name) == ("workspace", "flash_attn_with_kvcache") and "emulated" not in (
            extension.__name__
        ):
            continue  # is looked at last, behind the device, which these CPU tensors are not on
        changes = {argument: value}
        if argument in ("k", "v") and name.startswith("qk_norm_rope"):  # three projections
            widths = {"q": 32, "k": 16, "v": 16}
            apart = {part: torch.zeros(4, width, dtype=BF16) for part, width in widths.items()}
            changes = {**apart, argument: value}
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


@pytest.mark.emulated
def test_a_workspace_is_long_enough_and_aligned(emulated: object) -> None:
    name = "flash_attn_with_kvcache"
    size = ARGUMENTS[name]()["workspace"].numel()
    function = getattr(front_door.load_emulated(), name)
    for workspace, words in (
        (torch.zeros(1), r"or more elements, got \(1,\)"),
        (torch.zeros(size + 1)[1:], "aligned to 16 bytes"),
    ):
        with pytest.raises(ValueError, match=f"^workspace: expected .*{words}"):
            function(**{**ARGUMENTS[name](), "workspace": workspace})
