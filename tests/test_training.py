"""Training a tiny EXAONE 4 of transformers: patched, compiled and plain, from the same start."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import drop_in_cases
import exafuse
import pytest
import torch
from exafuse.ops.registered import library
from kernel_backends import Backend, emulated
from torch import Tensor

__all__ = ["emulated"]  # a fixture

TEXT = Path(__file__).parents[1] / "LICENSE"
LENGTH, BATCH = 32, 4


def batches(steps: int) -> Tensor:
    """Pieces of a text as its bytes, `[steps, BATCH, LENGTH]`."""
    text = torch.tensor(list(TEXT.read_bytes())).clamp(max=127)
    generator = torch.Generator().manual_seed(11)
    starts = torch.randint(0, len(text) - LENGTH, (steps, BATCH), generator=generator)
    return text[starts[..., None] + torch.arange(LENGTH)]


def model_of(layers: int) -> Any:
    """Three sliding layers to a global one, windows shorter than the text."""
    return drop_in_cases.build(
        "exaone4", num_hidden_layers=layers, vocab_size=128, sliding_window=9
    ).train()


def losses(model: Any, steps: int) -> list[float]:
    """The loss of each step of AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    curve = []
    for ids in batches(steps):
        loss = model(ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(float(loss.detach()))
    return curve


def apart(curve: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(curve, other, strict=True))


@pytest.mark.slow
def test_200_steps_follow_the_same_losses() -> None:
    model = model_of(4)
    plain = losses(copy.deepcopy(model), 200)
    ours = losses(exafuse.patch(copy.deepcopy(model)), 200)
    assert plain[-1] < plain[0] - 1.0, "nothing was learnt"
    assert apart(plain, ours) <= 1e-3
    assert plain != ours, "nothing was patched"


@pytest.mark.slow
@pytest.mark.emulated
def test_the_kernels_train_as_plain_pytorch(
    emulated: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward on the emulated kernels."""
    from emulator.control import Emulator
    from kernel_backends import emulator_library

    monkeypatch.setattr(library.direct, "ops", emulated.ops)
    model, steps = model_of(2), 12
    plain = losses(copy.deepcopy(model), steps)
    emulator = Emulator(emulator_library())
    emulator.clear_launches()
    ours = losses(exafuse.patch(copy.deepcopy(model), backend="emulated"), steps)
    launched = {record.kernel for record in emulator.launches()}
    assert [kernel for kernel in launched if "backward" in kernel]
    assert plain[-1] < plain[0] - 0.05
    assert apart(plain, ours) <= 1e-3


@pytest.mark.slow
def test_gradients_of_a_compiled_model_are_those_of_the_eager_one() -> None:
    """One graph, forward and backward, on two lengths; the plain model's gradients as well."""
    model = exafuse.patch(model_of(2))
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (LENGTH, 20):
        ids, gradients = batches(1)[0, :, :length], []
        for call in (model, compiled):
            model.zero_grad()
            call(ids, labels=ids, use_cache=False).loss.backward()
            gradients.append([p.grad.clone() for p in model.parameters()])
        with torch.no_grad():
            plain = exafuse.unpatch(copy.deepcopy(model))
        plain.zero_grad()
        plain(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad for p in plain.parameters()])
        eager, ours, theirs = gradients
        for a, b, c in zip(eager, ours, theirs, strict=True):
            assert float((a - b).norm()) <= 2e-6 * float(a.norm()) + 1e-7
            assert float((a - c).norm()) <= 2e-5 * float(c.norm()) + 1e-7
