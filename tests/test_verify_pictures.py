"""`verify` on a model with a vision tower: every stage is compared, each defect is named."""

from __future__ import annotations

import json
import shutil

import exafuse
import pytest
import torch
from exafuse.config import load_config
from exafuse.models import placeholders, vision_layout
from exafuse.verification.pictures import with_pictures
from test_exaone4_5_weights import released_like
from verify_pairs import PICTURES, broken, compare, folders, verify

__all__ = ["broken", "folders"]  # fixtures

TOWER = [
    "patch embedding",
    "tower block 0 (windows of 56 pixels)",
    "tower block 1 (whole frames)",
    "tower block 2 (windows of 56 pixels)",
    "tower block 3 (whole frames)",
    "merger",
]


def test_every_stage_is_compared(folders):
    report = compare(folders[PICTURES])
    assert report.ok, str(report)
    names = [entry.name for entry in report.layers]
    assert names[:12] == [f"{kind}: {stage}" for kind in ("image", "video") for stage in TOWER]
    assert names[12] == "embedding, with the features in their places"
    assert names[13].startswith("layer 0 (window 5")
    assert names[-1] == "MTP head, scores of its drafts"
    assert len(names) == 12 + 1 + 4 + 1
    assert all(0 < entry.error < 1e-5 for entry in report.layers)
    assert report.num_prompt_tokens == 60 + 15 + 1 + 12
    json.dumps(report.to_dict(), allow_nan=False)


def test_pictures_of_a_prompt():
    """Ragged windows, a picture of one token, frames apart; text keeps its order and its ids."""
    config = load_config(verify.TINY_CONFIGS[PICTURES])
    ids = torch.arange(60)[None]
    prompt, inputs = with_pictures(ids, config)
    counts = [int((prompt == token).sum()) for token in (7, 8)]
    assert inputs["image_grid_thw"].tolist() == [[1, 10, 6], [1, 2, 2]]
    assert inputs["video_grid_thw"].tolist() == [[2, 4, 6]]
    assert counts == [16, 12]
    assert inputs["pixel_values"].shape == (64, 1176)
    assert inputs["pixel_values_videos"].shape == (48, 1176)
    text = prompt[(prompt != 7) & (prompt != 8)]
    assert text.tolist() == [*range(7), 0, 0, *range(9, 60)]
    assert prompt[0, -1] == 59


def tower(model):
    return model.model.visual


def scale_one_weight(model):
    tower(model).blocks[2].mlp.down_proj.weight[3, 5] += 0.05


def whole_frames_where_windows_are(model):
    vision = tower(model).config
    object.__setattr__(vision, "full_attention_blocks", (1, 2, 3))


def windows_where_whole_frames_are(model):
    vision = tower(model).config
    object.__setattr__(vision, "full_attention_blocks", (3,))


def swap_heads(model):
    weight = tower(model).blocks[1].attn.qkv.weight
    weight[:32] = torch.cat([weight[16:32], weight[:16]])


def no_bias(model):
    tower(model).blocks[0].attn.proj.bias.zero_()


def turn_columns_into_rows(model):
    vision = tower(model).config
    object.__setattr__(vision, "rope_theta", 9000.0)


def other_patches(model):
    tower(model).patch_embed.proj.weight.transpose_(3, 4)


def other_merger(model):
    tower(model).merger.mlp[0].bias[3] += 0.05


def approximate_gelu(model):
    tower(model).merger.mlp[1].approximate = "tanh"


def halves_of_the_projection(model):
    weight = model.mtp.fc.weight
    weight.copy_(torch.cat([weight[:, 64:], weight[:, :64]], dim=1))


def window_of_the_draft_module(model):
    model.mtp.layers[0].self_attn.window_size = (5, 0)


def no_norm_of_the_hidden_state(model):
    model.mtp.pre_fc_norm_hidden.weight.fill_(1)


DEFECTS = {
    halves_of_the_projection: "MTP head",
    window_of_the_draft_module: "MTP head",
    no_norm_of_the_hidden_state: "MTP head",
    scale_one_weight: "image: tower block 2",
    whole_frames_where_windows_are: "image: tower block 2",
    windows_where_whole_frames_are: "image: tower block 1",
    swap_heads: "image: tower block 1",
    no_bias: "image: tower block 0",
    turn_columns_into_rows: "image: tower block 0",
    other_patches: "image: patch embedding",
    other_merger: "image: merger",
    approximate_gelu: "image: merger",
}


@pytest.mark.parametrize("change", DEFECTS, ids=lambda change: change.__name__)
def test_a_defect_is_named(folders, broken, change):
    broken(change)
    report = compare(folders[PICTURES])
    assert not report.ok
    assert report.first_diverging_layer.startswith(DEFECTS[change])
    assert "is the first to diverge" in report.failures[0]


HALF = (
    whole_frames_where_windows_are,
    swap_heads,
    no_bias,
    other_patches,
    halves_of_the_projection,
)


@pytest.mark.parametrize("change", HALF, ids=lambda change: change.__name__)
def test_a_defect_is_named_in_bf16(folders, broken, change):
    broken(change)
    report = compare(folders[PICTURES], dtype="bfloat16")
    assert report.first_diverging_layer.startswith(DEFECTS[change])


def test_features_in_wrong_places_are_named(folders, broken, monkeypatch):
    sound = placeholders.Placeholders.fill

    def shifted(self, embeds, index):
        return sound(self, embeds, torch.where(index > 0, index - 1, index))

    monkeypatch.setattr(placeholders.Placeholders, "fill", shifted)
    report = compare(folders[PICTURES])
    assert report.first_diverging_layer == "embedding, with the features in their places"


def test_tokens_left_in_window_order_are_named(folders, monkeypatch):
    """Only the last permutation shows nowhere but in the merger's output."""
    sound = vision_layout.VisionLayout.of.__func__

    def unsorted(cls, *args):
        layout = sound(cls, *args)
        object.__setattr__(layout, "inverse", torch.arange(len(layout.inverse)))
        return layout

    monkeypatch.setattr(vision_layout.VisionLayout, "of", classmethod(unsorted))
    assert compare(folders[PICTURES]).first_diverging_layer == "image: merger"


def test_frames_that_see_each_other_are_named(folders, monkeypatch):
    """Two frames as one segment: pictures are sound, the video is not."""
    sound = vision_layout.VisionLayout.of.__func__

    def joined(cls, grids, *args):
        layout = sound(cls, grids, *args)
        if grids[0][0] > 1:
            object.__setattr__(layout, "cu_frames", layout.cu_frames[[0, -1]])
            object.__setattr__(layout, "max_frame", int(layout.cu_frames[-1]))
        return layout

    monkeypatch.setattr(vision_layout.VisionLayout, "of", classmethod(joined))
    report = compare(folders[PICTURES])
    assert report.first_diverging_layer == "video: tower block 1 (whole frames)"


def test_a_checkpoint_without_draft_module(folders, tmp_path):
    model = exafuse.from_pretrained(folders[PICTURES], device="cpu", mtp=False)
    model.save_pretrained(tmp_path)
    report = compare(tmp_path)
    assert report.ok, str(report)
    assert report.layers[-1].name.startswith("layer 3")


def test_the_released_layout_is_verified(folders, tmp_path):
    """transformers itself refuses 5 layer types for 4 layers."""
    shutil.copytree(folders[PICTURES], tmp_path / "model")
    released_like(tmp_path / "model")
    report = compare(tmp_path / "model")
    assert report.ok, str(report)
