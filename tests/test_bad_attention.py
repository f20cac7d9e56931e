"""Arguments that the attention ops refuse, generated: every one of them made wrong in every way.

Both paths refuse the same, the kernels a little more (layouts that they cannot read). The error is
a ValueError or a TypeError that names the argument, or the dimension that does not fit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from exafuse import ops, reference
from kernel_backends import Backend, emulated
from wrong_arguments import BF16, wrong_numbers, wrong_tensors

__all__ = ["emulated"]  # a fixture

Arguments = dict[str, Any]
# (what is wrong, arguments, names of which one must begin the message, on kernels alone)
Wrong = tuple[str, Arguments, set[str], bool]


def table(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def heads(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=BF16)


def equal_arguments(seqlen_q: int) -> Arguments:
    return {
        "q": heads(2, seqlen_q, 4, 16),
        "k": heads(2, 30, 2, 16),
        "v": heads(2, 30, 2, 16),
        "out": heads(2, seqlen_q, 4, 16),
        "lse": torch.zeros(2, 4, seqlen_q),
    }


def packed_arguments() -> Arguments:
    return {
        "q": heads(25, 4, 16),
        "k": heads(40, 2, 16),
        "v": heads(40, 2, 16),
        "cu_seqlens_q": table(0, 5, 25),
        "cu_seqlens_k": table(0, 10, 40),
        "max_seqlen_q": 20,
        "max_seqlen_k": 30,
        "out": heads(25, 4, 16),
        "lse": torch.zeros(4, 25),
    }


def cache_arguments() -> Arguments:
    """Appends to chosen rows of a contiguous cache."""
    return {
        "q": heads(2, 3, 4, 16),
        "k_cache": heads(5, 128, 2, 16),
        "v_cache": heads(5, 128, 2, 16),
        "k": heads(2, 1, 2, 16),
        "v": heads(2, 1, 2, 16),
        "cache_seqlens": table(7, 90),
        "cache_batch_idx": table(3, 0),
        "cache_leftpad": table(0, 5),
        "out": heads(2, 3, 4, 16),
        "lse": torch.zeros(2, 4, 3),
    }


def page_arguments() -> Arguments:
    """Packed queries over pages."""
    return {
        "q": heads(25, 4, 16),
        "k_cache": heads(6, 128, 2, 16),
        "v_cache": heads(6, 128, 2, 16),
        "cache_seqlens": table(70, 200),
        "block_table": torch.tensor([[1, 2], [5, 0]], dtype=torch.int32),
        "cu_seqlens_q": table(0, 5, 25),
        "max_seqlen_q": 20,
        "out": heads(25, 4, 16),
        "lse": torch.zeros(4, 25),
    }


def vision_arguments() -> Arguments:
    return {
        "qkv": heads(25, 8 * 16),
        "num_heads": 4,
        "num_kv_heads": 2,
        "cos": torch.ones(25, 8),
        "sin": torch.ones(25, 8),
        "cu_seqlens": table(0, 5, 25),
        "max_seqlen": 20,
        "out": heads(25, 4, 16),
    }


CALLS: dict[str, tuple[str, Callable[[], Arguments]]] = {
    "prefill": ("flash_attn_func", lambda: equal_arguments(20)),
    "few queries": ("flash_attn_func", lambda: equal_arguments(2)),
    "packed": ("flash_attn_varlen_func", packed_arguments),
    "cache": ("flash_attn_with_kvcache", cache_arguments),
    "pages": ("flash_attn_with_kvcache", page_arguments),
    "vision": ("vision_attn", vision_arguments),
}
OPTIONAL = {"k", "v", "cache_batch_idx", "cache_leftpad", "block_table", "out", "lse"}
DIMENSIONS = {
    *("batch", "num_heads", "head_dim", "hidden", "num_kv_heads", "rows", "slots", "total_q"),
    *("qkv", "workspace"),
}


def overlaps(arguments: Arguments) -> Iterator[Wrong]:
    """Outputs that lie on inputs or on each other; only kernels mind."""
    for output in ("out", "k_cache", "v_cache"):
        if output not in arguments or (output != "out" and "k" not in arguments):
            continue
        for name, value in arguments.items():
            same = isinstance(value, torch.Tensor) and value.dtype == BF16
            if not same or name == output or value.numel() < 256:
                continue
            large, small = arguments[output], value
            if large.numel() < small.numel():
                large, small = small, large
            view = large.flatten()[: small.numel()].view(small.shape)
            changed = output if small is arguments[output] else name
            yield f"{output} on {name}", {**arguments, changed: view}, set(arguments), True
    shape = arguments["out"].shape
    expanded = heads(1, *shape[1:]).expand(shape)
    yield "expanded out", {**arguments, "out": expanded}, {"out"}, True


def wrong_choices(op: str, arguments: Arguments) -> Iterator[tuple[str, Any, set[str]]]:
    """Arguments with defaults: `(name, value, names in the message)`."""
    for value in (0, 0.0, -0.5, math.nan, math.inf, -math.inf, "x", torch.tensor(0.5), [1.0]):
        yield "softmax_scale", value, {"softmax_scale"}
    if op == "vision_attn":
        return
    bad: list[Any] = [None, 3, (1,), (1, 2, 3), ("a", 0), (1.0, 0), (-2, 0), (0, -2), (None, 0)]
    for value in (*bad, (torch.tensor(1), 0), (-(2**70), 0)):
        yield "window_size", value, {"window_size"}
    for value in (1.0, -1.0, torch.tensor(1.0), torch.zeros(3), "x"):
        yield "softcap", value, {"softcap"}
    yield "alibi_slopes", torch.zeros(4), {"alibi_slopes"}
    if op != "flash_attn_with_kvcache":
        yield "dropout_p", 0.1, {"dropout_p"}
        if op == "flash_attn_varlen_func":
            yield "block_table", torch.zeros(2, 2, dtype=torch.int32), {"block_table"}
        return
    yield "rotary_cos", torch.zeros(9, 8), {"rotary_cos"}
    yield "rotary_sin", torch.zeros(9, 8), {"rotary_sin"}
    for value in (-1, 2**31, 2**70, 3.0, "x", [3, 4]):
        yield "cache_seqlens", value, {"cache_seqlens"}
    yield "ring", True, {"ring"}  # no bounded window, or pages
    if "cu_seqlens_q" in arguments:
        yield "max_seqlen_q", None, {"max_seqlen_q"}
        yield "cache_batch_idx", table(0, 1), {"cache_batch_idx"}
    else:
        yield "cache_seqlens", None, {"cache_seqlens"}  # with k and v
        yield "k", None, {"k", "v"}
        yield "v", None, {"k", "v"}


def everything_wrong(call: str) -> Iterator[Wrong]:
    op, make = CALLS[call]
    arguments = make()
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            for what, other, kernels_only in wrong_tensors(
                value,
                optional=name in {*OPTIONAL, "cache_seqlens"},
                free_dims={1} if name == "block_table" else (),  # any number of pages will do
                strided=name != "cache_seqlens",
            ):
                named = {name}
                if isinstance(other, torch.Tensor) and other.numel() != value.numel():
                    # Which of two tensors is the wrong one is a matter of their order.
                    named = {*arguments, *DIMENSIONS}
                elif name in ("q", "qkv") and isinstance(other, torch.Tensor):
                    named = {*arguments, *DIMENSIONS}
                elif name == "cu_seqlens_q" and other is None:
                    named = {"q", "cu_seqlens_q"}  # a cache is asked as if q were not packed
                if name == "cu_seqlens" and "shape" in what:
                    continue  # other segments, that the device alone knows
                yield f"{name}: {what}", {**arguments, name: other}, named, kernels_only
        else:
            for what, other in wrong_numbers(zero=name.startswith("num_")):
                named = {name, "num_heads"} if name == "num_kv_heads" else {name}
                yield f"{name}: {what}", {**arguments, name: other}, named, False
    for name, value, named in wrong_choices(op, arguments):
        shown = tuple(value.shape) if isinstance(value, torch.Tensor) else value
        yield f"{name} = {shown!r}", {**arguments, name: value}, named, False
    yield from overlaps(arguments)
    wide = {n: x for n, x in arguments.items() if isinstance(x, torch.Tensor) and x.dtype == BF16}
    for width in (12, 136):
        changed = {n: torch.zeros(*x.shape[:-1], width, dtype=BF16) for n, x in wide.items()}
        if op == "vision_attn":
            changed = {"qkv": heads(25, 8 * width), "out": heads(25, 4, width)}
            changed |= {n: torch.ones(25, width // 2) for n in ("cos", "sin")}
        yield f"head_dim {width}", {**arguments, **changed}, {"head_dim"}, True


@pytest.mark.parametrize("call", CALLS)
def test_what_is_wrong_is_named(call: str, emulated: Backend) -> None:
    op = CALLS[call][0]
    refused, faults = 0, []
    for what, arguments, named, kernels_only in everything_wrong(call):
        for path, module in (("kernels", emulated.ops), ("reference", reference)):
            if path == "reference" and kernels_only:
                continue
            try:
                with torch.no_grad():
                    getattr(module, op)(**arguments)
            except (ValueError, TypeError) as error:
                names = re.match(r"((?:\w+(?:\[\d\])?(?:, )?)+): ", str(error))
                words = set(re.findall(r"\w+", names[1])) if names else set()
                if words & named:
                    refused += 1
                else:
                    faults.append(f"{path}: {what}: {type(error).__name__}: {str(error)[:150]}")
            except Exception as error:
                faults.append(f"{path}: {what}: {type(error).__name__}: {str(error)[:150]}")
            else:
                faults.append(f"{path}: {what}: accepted")
    assert not faults, f"{len(faults)} of {refused + len(faults)}:\n" + "\n".join(faults)
    assert refused > 150


@pytest.mark.parametrize("call", CALLS)
def test_the_same_call_without_a_fault_is_taken(call: str, emulated: Backend) -> None:
    op, make = CALLS[call]
    for module in (emulated.ops, reference, ops):
        arguments = make()
        result = getattr(module, op)(**arguments)
        assert (result if isinstance(result, torch.Tensor) else result[0]) is arguments["out"]
        assert not arguments["out"].any()
