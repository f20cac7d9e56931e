"""Pixels, grids and placeholders that do not fit together: each a clear error, the cache intact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import exafuse
import pytest
import tiny_models
import tiny_vision
import torch
from exafuse.models.exaone4_5 import Exaone4_5
from tiny_vision import IMAGE, VIDEO

IDS = torch.tensor([[20, *[IMAGE] * 4, 21, *[VIDEO] * 8, 22]])


def vision(**changes: Any) -> dict[str, Any]:
    """A 4x4 image (4 tokens) and a 4x4 video of 2 x 2 frames (8 tokens)."""
    return {
        "pixel_values": torch.ones(16, 1176),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "pixel_values_videos": torch.ones(32, 1176),
        "video_grid_thw": torch.tensor([[2, 4, 4]]),
        **changes,
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Exaone4_5:
    folder = tiny_models.save(tiny_vision.build(), tmp_path_factory.mktemp("exaone4_5"))
    model = exafuse.from_pretrained(folder, backend="reference", device="cpu")
    assert isinstance(model, Exaone4_5)
    return model


def grid(*rows: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor(rows)


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no grid": ({"image_grid_thw": None}, "pixel_values, image_grid_thw: expected both"),
    "no pixels": ({"pixel_values_videos": None}, "pixel_values_videos, video_grid_thw: .* both"),
    "no images": ({"image_grid_thw": torch.zeros(0, 3, dtype=torch.int64)}, r"expected \(n >= 1"),
    "flat grid": ({"image_grid_thw": torch.tensor([1, 4, 4])}, r"expected \(n >= 1, 3\)"),
    "two columns": ({"image_grid_thw": grid((4, 4))}, r"expected \(n >= 1, 3\)"),
    "float grid": ({"image_grid_thw": grid((1, 4, 4)).float()}, "expected integers"),
    "bool grid": ({"image_grid_thw": grid((1, 4, 4)).bool()}, "expected integers"),
    "zero": ({"video_grid_thw": grid((0, 4, 4))}, "expected positive numbers"),
    "negative": ({"video_grid_thw": grid((-2, -4, 4))}, "expected positive numbers"),
    "odd rows": ({"image_grid_thw": grid((1, 5, 4))}, "multiples of 2"),
    "odd columns": ({"image_grid_thw": grid((1, 4, 3))}, "multiples of 2"),
    "grid too large": ({"image_grid_thw": grid((1, 4, 6))}, r"expected \(24, 1176\) by image_grid"),
    "grid too small": ({"video_grid_thw": grid((1, 4, 4))}, r"expected \(16, 1176\) by video_grid"),
    # far beyond memory and beyond int64: refused before anything is allocated
    "huge": ({"image_grid_thw": grid((2**40, 2**40, 2**40))}, "image pixel values: expected"),
    "grids too many": ({"image_grid_thw": grid((1, 4, 4), (1, 4, 4))}, r"expected \(32, 1176\)"),
    "patch size": ({"pixel_values": torch.ones(16, 1175)}, r"expected \(16, 1176\)"),
    "images": ({"pixel_values": torch.ones(1, 3, 56, 56)}, r"got \(1, 3, 56, 56\)"),
    "bytes": ({"pixel_values": torch.ones(16, 1176).byte()}, "expected floating point"),
    "another picture": (
        {"pixel_values": torch.ones(32, 1176), "image_grid_thw": grid((1, 4, 4), (1, 4, 4))},
        "expected 8 image placeholders .* got 4",
    ),
    "a picture less": (
        {"pixel_values": None, "image_grid_thw": None, "pixel_values_videos": torch.ones(16, 1176)}
        | {"video_grid_thw": grid((1, 4, 4))},
        "expected 4 video placeholders .* got 8",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_a_value_error(model: Exaone4_5, fault: str) -> None:
    changes, message = FAULTS[fault]
    with pytest.raises(ValueError, match=message):
        model(IDS, **vision(**changes))
    cache = model.new_cache(1)
    given = {k: v for k, v in vision(**changes).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        model.next_logits(IDS, cache, **given)
    assert cache.get_seq_length() == 0
    with torch.no_grad():
        expected = model(IDS, **vision()).logits[:, -1]
        torch.testing.assert_close(model.next_logits(IDS, cache, **vision()), expected)


@pytest.mark.parametrize("bad", [[[1, 4, 4]], "1x4x4", 3])
def test_what_is_no_tensor_is_a_type_error(model: Exaone4_5, bad: Any) -> None:
    for name in vision():
        with pytest.raises(TypeError, match=r"expected a torch\.Tensor"):
            model(IDS, **vision(**{name: bad}))
    with pytest.raises(TypeError, match="pixels"):
        model.next_logits(IDS, model.new_cache(1), pixels=torch.ones(1))


def test_features_check_their_grids(model: Exaone4_5) -> None:
    with pytest.raises(ValueError, match="image_grid_thw"):
        model.get_image_features(torch.ones(16, 1176), grid((1, 3, 4)))
    with pytest.raises(ValueError, match="video pixel values"):
        model.get_video_features(torch.ones(16, 1176), grid((2, 4, 4)))


def test_a_text_model_refuses_pictures(tmp_path: Path) -> None:
    folder = tiny_models.save(tiny_models.build("exaone4"), tmp_path)
    model = exafuse.from_pretrained(folder, backend="reference", device="cpu")
    assert not model.has_vision
    with pytest.raises(ValueError, match=r"pixel_values, image_grid_thw: .* no vision tower"):
        model(IDS, pixel_values=torch.ones(16, 1176), image_grid_thw=grid((1, 4, 4)))


def test_broken_pixels_stay_with_their_picture(model: Exaone4_5) -> None:
    """NaN in one picture reaches no other."""
    pixels = torch.ones(32, 1176)
    pixels[3] = float("nan")
    two = grid((1, 4, 4), (1, 4, 4))
    with torch.no_grad():
        first, second = model.get_image_features(pixels, two).pooler_output
    assert first.isnan().all()
    assert not second.isnan().any()


@torch.no_grad()
def test_pixels_of_any_float_dtype_and_stride(model: Exaone4_5) -> None:
    pixels = torch.randn(16, 1176, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = model.get_image_features(pixels.float(), grid((1, 4, 4))).pooler_output[0]
    for dtype in (torch.bfloat16, torch.float64):
        got = model.get_image_features(pixels.to(dtype), grid((1, 4, 4)).int()).pooler_output[0]
        assert torch.equal(got, expected)
    strided = torch.stack([pixels, -pixels], dim=1).float().transpose(0, 1)[0]
    assert not strided.is_contiguous()
    for given in (strided, pixels.float().T.contiguous().T):
        assert torch.equal(
            model.get_image_features(given, grid((1, 4, 4))).pooler_output[0], expected
        )
