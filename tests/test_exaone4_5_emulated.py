"""EXAONE 4.5 on the emulated kernels. Attention has none for fp32: that runs on the reference."""

from __future__ import annotations

import collections
import math
from pathlib import Path
from typing import Any

import exafuse
import pytest
import tiny_models
import tiny_vision
import torch
from case_counts import add_cases
from emulator.control import Emulator
from exafuse.models.exaone4_5 import Exaone4_5
from exafuse.ops.front_door import emulator_problem, load_emulated
from test_models import rms
from test_models_emulated import stem

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(bool(emulator_problem()), reason=emulator_problem()),
]

NUM_CASES = 100
HEADS = (8, 16, 24, 64)  # the kernels take multiples of 8


def load(folder: Path, backend: str) -> Exaone4_5:
    model = exafuse.from_pretrained(folder, backend=backend, device="cpu")
    assert isinstance(model, Exaone4_5)
    return model


@pytest.fixture
def emulator() -> Emulator:
    control = Emulator(Path(load_emulated().__file__))
    control.clear_launches()
    return control


@torch.no_grad()
def test_greedy_tokens_equal_the_reference_in_fp32(tmp_path: Path) -> None:
    theirs = tiny_vision.build()
    folder = tiny_models.save(theirs, tmp_path)
    generator = torch.Generator().manual_seed(0)
    prompt = tiny_vision.make_prompt(theirs.config, [[1, 6, 10], [1, 4, 4]], [[2, 4, 4]], generator)
    emulated, reference = (
        load(folder, backend).generate(
            prompt.ids, **prompt.vision, max_new_tokens=16, do_sample=False
        )
        for backend in ("emulated", "reference")
    )
    assert torch.equal(emulated, reference)


def outputs(model: torch.nn.Module, prompt: tiny_vision.Prompt) -> dict[str, torch.Tensor]:
    """fp32 logits of a call, and the features that its tower made."""
    features = []

    def hook(_: object, __: object, out: Any) -> None:
        features.append(out[1] if isinstance(out, tuple) else out.pooler_output)

    handle = model.model.visual.register_forward_hook(hook)
    logits = model(prompt.ids, **prompt.vision).logits.float()
    handle.remove()
    return {"logits": logits, "features": torch.cat(features).float()}


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_features_and_logits_are_as_near_to_fp32_as_transformers(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    """Error of features and logits against the fp32 model: 1.25x transformers' own (sdpa) each,
    1.05x in the geometric mean."""
    ratios: dict[str, list[float]] = {"features": [], "logits": []}
    first = 0 if dtype == torch.bfloat16 else 1
    for seed in range(first, 2 * (NUM_CASES // 2), 2):
        case = tiny_vision.random_case(seed, HEADS)
        folder = tiny_models.save(case.build(), tmp_path / str(seed))
        # Weights that the dtype holds exactly, so that only the computation differs.
        theirs = tiny_vision.load(folder, dtype=dtype, attn_implementation="sdpa")
        theirs.save_pretrained(folder)
        exact = tiny_vision.load(folder, dtype=torch.float32, attn_implementation="eager")
        ours = load(folder, "emulated")
        prompt = case.prompt(exact.config)
        for name in ("pixel_values", "pixel_values_videos"):
            if name in prompt.vision:
                prompt.vision[name] = prompt.vision[name].to(dtype).float()

        truth, peer, mine = (outputs(model, prompt) for model in (exact, theirs, ours))
        for name, value in truth.items():
            error, allowed = rms(mine[name] - value), 1.25 * rms(peer[name] - value)
            assert error <= allowed, f"{case}, {name}: {error:.4g} > {allowed:.4g}"
            ratios[name].append(1.25 * error / allowed)
        add_cases("emulated", 1)
    for name, values in ratios.items():
        mean = math.exp(sum(map(math.log, values)) / len(values))
        print(f"{name}: {len(values)} cases, ratio mean {mean:.3f} max {max(values):.3f}")
        assert mean <= 1.05


@torch.no_grad()
def test_sixteen_pictures_launch_no_more_kernels_than_one(
    tmp_path: Path, emulator: Emulator
) -> None:
    folder = tiny_models.save(tiny_vision.build(), tmp_path)
    tiny_vision.load(folder, dtype=torch.bfloat16).save_pretrained(folder)
    model = load(folder, "emulated")
    sizes = [[1, 2 * (1 + i % 4), 2 * (1 + i % 3)] for i in range(15)]
    seen = []
    for grids in ([[1, 10, 12]], [*sizes, [1, 10, 12]]):
        pixels = tiny_vision.pixels(grids, 1176, torch.Generator().manual_seed(0))
        emulator.clear_launches()
        model.get_image_features(pixels, torch.tensor(grids))
        seen.append(collections.Counter(stem(record.kernel) for record in emulator.launches()))
    assert seen[0] == seen[1]
    # Two blocks see windows and two whole frames; frames are rotated in a launch of their own.
    assert seen[0] == {
        "rms_norm<0>": 1,
        "rms_norm<1>": 8,
        "silu_and_mul": 4,
        "vision_window": 2,
        "vision_rope": 2,
        "prefill_sm80": 2,
    }
