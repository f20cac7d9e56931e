"""Arguments that the backward kernels of the norms must refuse, by a message that names them."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from backward_backends import backward_extension
from kernel_backends import Backend, cuda_extension, emulated, extension

__all__ = ["emulated", "extension"]  # fixtures

BF16 = torch.bfloat16


def arguments() -> dict[str, Any]:
    x = torch.zeros(40, 64, dtype=BF16)
    return {
        "grad": x.clone(),
        "grad_residual": x.clone(),
        "new_residual": x,
        "weight": torch.ones(64),
        "eps": 1e-6,
        "grad_sum": torch.empty_like(x),
        "grad_weight": torch.empty(64),
        "workspace": torch.empty(128),
    }


WRONG = [
    ("grad", torch.zeros(40, 72, dtype=BF16), r"grad: expected \(40, 64\), got \(40, 72\)"),
    ("grad", torch.zeros(40, 64), "grad: expected dtype bfloat16, got float32"),
    ("grad", torch.zeros(40, 128, dtype=BF16)[:, ::2], "grad: expected stride 1"),
    ("grad", torch.zeros((), dtype=BF16).expand(40, 64), "grad: expected stride 1"),
    ("grad_residual", torch.zeros(8, 64, dtype=BF16), r"grad_residual: expected \(40, 64\)"),
    ("grad_residual", torch.zeros(40, 64, dtype=torch.half), "grad_residual: expected dtype bfl"),
    ("new_residual", torch.zeros(40, 60, dtype=BF16), "hidden: expected a multiple of 8"),
    ("new_residual", torch.zeros(40, 64, dtype=torch.double), "new_residual: expected dtype"),
    ("weight", torch.ones(72), r"weight: expected \(hidden=64\), got \(72,\)"),
    ("weight", torch.ones(64, dtype=torch.half), "weight: expected dtype bfloat16 or float32"),
    ("weight", torch.ones(128)[::2], "weight: expected stride 1"),
    ("eps", -1.0, "eps: expected a finite number >= 0"),
    ("grad_sum", torch.zeros(40, 72, dtype=BF16), r"grad_sum: expected \(40, 64\)"),
    ("grad_sum", torch.zeros(40, 64), "grad_sum: expected dtype bfloat16"),
    ("grad_sum", torch.zeros(64, dtype=BF16).expand(40, 64), "grad_sum: expected an output whose"),
    ("grad_weight", torch.zeros(72), r"grad_weight: expected \(hidden=64\), got \(72,\)"),
    ("grad_weight", torch.zeros(64, dtype=BF16), "grad_weight: expected dtype float32"),
    ("workspace", None, "workspace: expected 128 or more elements of float32, got None"),
    ("workspace", torch.zeros(127), r"workspace: expected 128 or more elements, got \(127,\)"),
    ("workspace", torch.zeros(2, 64), r"workspace: expected 128 or more elements, got \(2, 64\)"),
    ("workspace", torch.zeros(128, dtype=BF16), "workspace: expected dtype float32"),
    ("workspace", torch.zeros(129)[1:], "workspace: expected data aligned to 16 bytes"),
]


@pytest.mark.parametrize(("name", "value", "words"), WRONG)
def test_wrong_arguments_are_named(
    name: str, value: object, words: str, extension: ModuleType
) -> None:
    with pytest.raises(ValueError, match=f"^{words}"):
        extension.add_rms_norm_backward(**{**arguments(), name: value})


@pytest.mark.parametrize("name", list(arguments()))
def test_what_is_no_tensor_is_a_type_error(name: str, extension: ModuleType) -> None:
    kind = "a number" if name == "eps" else "a torch.Tensor"
    for value in ("x", [1.0]):
        words = f"^{name}: expected {kind}, got {type(value).__name__}"
        with pytest.raises(TypeError, match=words):
            extension.add_rms_norm_backward(**{**arguments(), name: value})


@pytest.mark.parametrize("output", ["grad_sum", "grad_weight", "workspace"])
def test_outputs_share_no_memory(output: str, extension: ModuleType) -> None:
    """Not even with the input that they belong to: autograd may have kept it."""
    given = arguments()
    whole = torch.zeros(40 * 64, dtype=torch.float32)
    for name, other in given.items():
        if name in (output, "eps"):
            continue
        shared = {
            n: whole.view(given[n].dtype)[: given[n].numel()].view(given[n].shape)
            for n in (output, name)
        }
        pair = rf"({output}|{name}): expected memory apart from ({output}|{name}), got an overlap"
        with pytest.raises(ValueError, match=f"^{pair}"):
            extension.add_rms_norm_backward(**{**given, **shared})
        assert other is given[name]


def test_rms_norm_backward_names_its_own_arguments(extension: ModuleType) -> None:
    given = arguments()
    given |= {"x": given.pop("new_residual"), "grad_x": given.pop("grad_sum")}
    del given["grad_residual"]
    for name in ("x", "grad_x"):
        with pytest.raises(ValueError, match=f"^{name}: expected dtype"):
            extension.rms_norm_backward(**{**given, name: given[name].double()})


def test_the_device_is_checked_last() -> None:
    with pytest.raises(ValueError, match=r"^grad: expected a cuda tensor, got cpu$"):
        cuda_extension().add_rms_norm_backward(**arguments())


def test_the_gradient_of_weight_is_optional(emulated: Backend) -> None:
    given = arguments() | {"grad_weight": None, "workspace": None}
    backward_extension(emulated).add_rms_norm_backward(**given)
    assert given["grad_sum"].eq(0).all()
    given = arguments()
    given["workspace"].fill_(torch.nan)
    backward_extension(emulated).add_rms_norm_backward(**given)
    assert given["grad_weight"].eq(0).all()
