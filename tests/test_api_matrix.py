"""Every argument of every op, made wrong or unusual in every way, on both paths.

A call is refused by a ValueError or a TypeError that names the argument, or gives what the
reference gives on plain tensors; never anything else, and the process lives on. What the attention
ops refuse is in test_bad_attention.py, memory of the outputs in test_bad_memory.py.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from api_calls import CALLS, ROWWISE, Arguments, Call, cloned, named_in
from exafuse import ops, reference
from kernel_backends import Backend, emulated
from torch import Tensor
from wrong_arguments import BF16, wrong_numbers, wrong_tensors

__all__ = ["emulated"]  # a fixture

OPTIONAL = {"q_weight", "k_weight", "k_out", "out", "q_out", "residual_out", "v_out"}
DIMENSIONS = {"hidden", "head_dim", "num_heads", "num_kv_heads", "intermediate_size"}


def paths(emulated: Backend) -> dict[str, ModuleType]:
    return {"kernels": emulated.ops, "reference": reference}


# ---- what is refused -----------------------------------------------------------------------------


def right_names(call: Call, name: str, value: Any, other: Any) -> set[str]:
    """Those of which one must be named when `other` stands for `value`."""
    if name in call.buffers:
        return {name, "out"}
    if name in ("gate", "up", "gate_up"):
        names = {name, "gate_up"}
    elif name in ("qkv", "q", "k", "v") and call.op.startswith("qk_"):
        names = {name, "qkv", "q"}
    elif name.startswith("num_"):  # heads that do not divide the width
        names = {name, "num_heads", "qkv", "q", "k"}
    else:
        names = {name}
    if isinstance(other, Tensor) and isinstance(value, Tensor):
        first = name in ("x", "q", "k", "v", "qkv", "gate", "gate_up")
        if first or name in ("cos", "k_cache") or other.shape != value.shape:
            # Which of two tensors is the wrong one is a matter of their order.
            names |= {*call.arguments(BF16), *call.buffers, *DIMENSIONS, "out"}
    return names


def wrong_values(name: str, value: Any) -> Iterator[tuple[str, Any, bool]]:
    if isinstance(value, Tensor):
        dtypes = {BF16, torch.float32} if name.endswith("weight") else set()
        optional = name in OPTIONAL
        yield from wrong_tensors(value, optional, dtypes)
    elif name == "eps":
        for other in (None, "x", [1.0], torch.tensor(1e-6), math.nan, math.inf, -math.inf, -1e-6):
            yield f"{other!r}", other, False
    else:
        for what, other in wrong_numbers(zero=True):
            yield what, other, False


def overlapping(call: Call, arguments: Arguments) -> Iterator[tuple[str, Arguments]]:
    """Buffers that lie on part of an input or of each other, or on themselves."""
    for output in (*call.buffers, *call.mutated):
        for name, value in arguments.items():
            if name == output or not isinstance(value, Tensor) or value.dtype != BF16:
                continue
            large, small = arguments[output], value
            if large.numel() < small.numel():
                large, small = small, large
            memory = torch.zeros(large.numel() + 8, dtype=BF16)
            changes = {
                output: memory[: arguments[output].numel()].view(arguments[output].shape),
                name: memory[8 : 8 + value.numel()].view(value.shape),
            }
            yield f"{output} on {name}", {**arguments, **changes}
        shape = arguments[output].shape
        flat = torch.zeros(1, *shape[1:], dtype=BF16).expand(shape)
        yield f"expanded {output}", {**arguments, output: flat}


@pytest.mark.emulated
@pytest.mark.parametrize("name", ROWWISE)
def test_what_is_wrong_is_refused_by_name(name: str, emulated: Backend) -> None:
    call = CALLS[name]
    arguments = {**call.arguments(BF16), **call.outputs(BF16)}
    calls, faults = Counter[str](), []

    def expect(path: str, what: str, changed: Arguments, names: set[str]) -> None:
        calls[path] += 1
        try:
            call.run(paths(emulated)[path], changed)
        except (ValueError, TypeError) as error:
            if not named_in(error) & names:
                faults.append(f"{path}: {what}: {type(error).__name__}: {str(error)[:150]}")
        except Exception as error:
            faults.append(f"{path}: {what}: {type(error).__name__}: {str(error)[:150]}")
        else:
            faults.append(f"{path}: {what}: accepted")

    for argument, value in arguments.items():
        for what, other, kernels_only in wrong_values(argument, value):
            names = right_names(call, argument, value, other)
            if argument == "up" and other is None:
                names |= {"out"}  # a gate alone is taken for both
            for path in ("kernels",) if kernels_only else ("kernels", "reference"):
                changed = {**cloned(arguments), argument: other}
                expect(path, f"{argument}: {what}", changed, names)
    for what, changed in overlapping(call, arguments):
        names = {*call.buffers, *call.mutated, "out"}
        expect("kernels", what, changed, names)
    assert not faults, f"{len(faults)} of {calls.total()}:\n" + "\n".join(faults)
    assert calls.total() > 80
    emulated.count(calls["kernels"])


@pytest.mark.parametrize("path", ["kernels", "reference", "auto"])
def test_tuples_of_the_wrong_length_are_named(path: str, emulated: Backend) -> None:
    module = {**paths(emulated), "auto": ops}[path]
    for name, call in CALLS.items():
        arguments = call.arguments(BF16)
        if len(call.buffers) > 1:
            for out in ((torch.zeros(6, 64),), (None,) * 4, torch.zeros(2, 6, 64), "xyz"):
                keywords = {k: v for k, v in arguments.items() if k not in "qkv"}
                if name == "qk_norm_rope, apart":
                    keywords["qkv"] = tuple(arguments[part] for part in "qkv")
                elif call.op == "qk_norm_rope":
                    keywords["qkv"] = arguments["qkv"]
                elif call.op == "apply_rope":
                    keywords |= {part: arguments[part] for part in "qk"}
                with pytest.raises(TypeError, match=r"^out: expected a tuple of \d tensors, got "):
                    getattr(module, call.op)(**keywords, out=out)
    for op in ("qk_norm_rope", "qk_norm_rope_cache"):
        arguments = CALLS[op].arguments(BF16)
        for qkv in (None, 3, [arguments["qkv"]] * 3, (arguments["qkv"],) * 2, ()):
            with pytest.raises(TypeError, match=r"^qkv: expected a torch.Tensor or a tuple of q"):
                getattr(module, op)(**{**arguments, "qkv": qkv})
