"""What test_patch.py and test_attn_implementation.py leave out: EXAONE 4.5 in every use of its text
side, and every use of every family on the emulated kernels."""

from __future__ import annotations

from typing import Any

import drop_in_cases
import exafuse
import pytest
import torch
import transformers
from exafuse.integrations import transformers as integration
from kernel_backends import Backend, emulated
from torch import Tensor

__all__ = ["emulated"]  # a fixture

FAMILIES = [*drop_in_cases.FAMILIES, "exaone4_5"]
USES = {**drop_in_cases.FORWARDS, **drop_in_cases.GENERATIONS}


def build(family: str) -> Any:
    if family == "exaone4_5":
        return drop_in_cases.build_vision_language()
    return drop_in_cases.build(family)


@pytest.fixture(scope="module")
def vision_language() -> Any:
    return build("exaone4_5")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return build(request.param)


def result_of(name: str, model: Any) -> Tensor:
    """The plain model's; what transformers itself cannot do is skipped."""
    try:
        return USES[name](model)
    except RuntimeError as error:
        if name != "assisted" or transformers.__version__ != "5.8.0":
            raise
        pytest.skip(f"transformers 5.8.0 has no assisted generation for this model: {error}")


def same(name: str, ours: Tensor, plain: Tensor) -> None:
    """Logits within their tolerance, tokens exactly."""
    if name in drop_in_cases.GENERATIONS:
        assert torch.equal(ours, plain)
    else:
        drop_in_cases.close(ours, plain)


@pytest.mark.parametrize("name", USES)
def test_a_patched_vision_language_model(vision_language: Any, name: str) -> None:
    with torch.no_grad():
        plain = result_of(name, vision_language)
        with exafuse.patched(vision_language):
            same(name, USES[name](vision_language), plain)
        assert torch.equal(USES[name](vision_language), plain), "unpatch left something"


@pytest.mark.parametrize("name", USES)
def test_our_attention_in_a_vision_language_model(vision_language: Any, name: str) -> None:
    """Chosen after the model was loaded, and taken back."""
    with torch.no_grad():
        plain = result_of(name, vision_language)
        vision_language.set_attn_implementation(integration.register())
        try:
            same(name, USES[name](vision_language), plain)
        finally:
            vision_language.set_attn_implementation("sdpa")


@pytest.mark.emulated
@pytest.mark.parametrize("name", USES)
def test_patched_models_on_the_kernels(model: Any, name: str, emulated: Backend) -> None:
    """fp32: norms, rotations and activations run on the emulator, attention in plain PyTorch."""
    from emulator.control import Emulator
    from kernel_backends import emulator_library

    with torch.no_grad():
        plain = result_of(name, model)
        emulator = Emulator(emulator_library())
        emulator.clear_launches()
        with exafuse.patched(model, backend="emulated"):
            same(name, USES[name](model), plain)
    assert emulator.num_launches() > 0
