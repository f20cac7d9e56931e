"""The files behind the processor of a checkpoint that sees: every defect named, no class taken from
a file, and no picture larger than the model can read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import chat_tokenizers
import exafuse
import pytest
import torch
import vision_checkpoint
from exafuse.media import parts
from exafuse.media.processor import Processor
from exafuse.text.chat import load_processor
from vision_checkpoint import image, user


@pytest.fixture(autouse=True)
def _no_torchvision(monkeypatch):
    monkeypatch.setattr(parts, "torchvision_problem", lambda: "torchvision is not installed")


@pytest.fixture(scope="module")
def processor(tmp_path_factory) -> Processor:
    return vision_checkpoint.processor(tmp_path_factory.mktemp("sees"))


def rewritten(tmp_path: Path, name: str, **changes: Any) -> Path:
    folder = vision_checkpoint.save(tmp_path)
    values = json.loads((folder / name).read_text())
    values.update(changes)
    vision_checkpoint.write(folder / name, values)
    return folder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"patch_size": 16}, "patch_size: expected patch_size of config.json's vision_config, 14"),
        ({"merge_size": 4}, "expected spatial_merge_size"),
        ({"temporal_patch_size": 1}, "expected temporal_patch_size"),
        ({"patch_size": 0}, "patch_size: expected an integer"),
        ({"patch_size": "14"}, "patch_size: expected an integer"),
        ({"patch_size": True}, "patch_size: expected an integer"),
        ({"size": 224}, "size.shortest_edge: expected an integer"),
        ({"size": {"height": 224, "width": 224}}, "size.shortest_edge"),
        ({"size": {"shortest_edge": 100, "longest_edge": 10}}, "shortest_edge <= longest_edge"),
        ({"size": {"shortest_edge": 1, "longest_edge": 2**31}}, "size.longest_edge"),
        ({"min_pixels": -1}, "min_pixels: expected an integer"),
        ({"image_mean": [0.5]}, "image_mean: expected three numbers"),
        ({"image_std": [0.5, 0.0, 0.5]}, "image_std: expected three numbers"),
        ({"image_mean": ["a", 1, 1]}, "image_mean: expected three numbers"),
        ({"rescale_factor": 0}, "rescale_factor: expected a positive number"),
        ({"rescale_factor": "1/255"}, "rescale_factor: expected a positive number"),
        ({"resample": 9}, "resample: expected a filter"),
        ({"resample": "bicubic"}, "resample: expected a filter"),
        ({"do_resize": "yes"}, "do_resize: expected a flag"),
        ({"image_processor_type": "CLIPImageProcessor"}, "got 'CLIPImageProcessor'"),
        ({"image_processor_type": "../../evil.Evil"}, "image_processor_type: expected one of"),
    ],
)
def test_malformed_settings(tmp_path, changes, words):
    folder = rewritten(tmp_path, "preprocessor_config.json", **changes)
    with pytest.raises(exafuse.ConfigError, match=words) as caught:
        load_processor(folder)
    assert "preprocessor_config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fps": 0}, "fps: expected a positive number"),
        ({"num_frames": 1.5}, "num_frames: expected an integer"),
        ({"do_sample_frames": 1}, "do_sample_frames: expected a flag"),
        ({"video_processor_type": "LlavaVideoProcessor"}, "got 'LlavaVideoProcessor'"),
    ],
)
def test_malformed_settings_of_videos(tmp_path, changes, words):
    with pytest.raises(exafuse.ConfigError, match=words):
        load_processor(rewritten(tmp_path, "video_preprocessor_config.json", **changes))


@pytest.mark.parametrize("content", ["[]", "7", "{", '{"size": NaN}', '{"a": 1, "a": 2}', ""])
def test_settings_that_are_no_object(tmp_path, content):
    folder = vision_checkpoint.save(tmp_path)
    (folder / "preprocessor_config.json").write_text(content)
    with pytest.raises(exafuse.ConfigError, match=r"preprocessor_config\.json"):
        load_processor(folder)


def test_settings_as_older_files_write_them(tmp_path, processor):
    settings = {**vision_checkpoint.IMAGE_SETTINGS, "min_pixels": 56 * 56, "max_pixels": 224 * 224}
    expected = processor(images=image())["pixel_values"]
    older = {"min_pixels": 56 * 56, "max_pixels": 224 * 224}
    for size in (None, older, {"shortest_edge": 9, "longest_edge": 99}):
        folder = vision_checkpoint.save(tmp_path)
        vision_checkpoint.write(folder / "preprocessor_config.json", {**settings, "size": size})
        assert torch.equal(load_processor(folder)(images=image())["pixel_values"], expected)
    # Keys of other classes, and an image processor from the nested file of today.
    (folder / "preprocessor_config.json").unlink()
    nested = {**vision_checkpoint.IMAGE_SETTINGS, "auto_map": {"AutoProcessor": "evil.Evil"}}
    vision_checkpoint.write(folder / "processor_config.json", {"image_processor": nested})
    assert torch.equal(load_processor(folder)(images=image())["pixel_values"], expected)


def test_without_settings_text_goes_on_and_images_are_refused(tmp_path):
    folder = vision_checkpoint.save(tmp_path)
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        (folder / name).unlink()
    processor = load_processor(folder)
    assert processor.encode(user("Hello.")).ids
    with pytest.raises(ValueError, match=r"expected preprocessor_config\.json"):
        processor.encode(user(image()))


def test_a_checkpoint_that_does_not_resize(tmp_path):
    processor = load_processor(rewritten(tmp_path, "preprocessor_config.json", do_resize=False))
    assert processor(images=image(0, 56, 84))["image_grid_thw"].tolist() == [[1, 4, 6]]
    with pytest.raises(exafuse.MediaError, match="multiples of 28, got 90 x 60"):
        processor(images=image())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_token_id": 5}, "image_token_id: expected the id"),
        ({"video_token_id": 5}, "video_token_id: expected the id"),
        ({"image_token_id": None}, "image_token_id: expected the id"),
    ],
)
def test_ids_that_are_not_the_tokenizers(tmp_path, changes, words):
    with pytest.raises(exafuse.TemplateError, match=words):
        load_processor(rewritten(tmp_path, "config.json", **changes))


def test_a_tokenizer_without_placeholders(tmp_path):
    folder = vision_checkpoint.save(tmp_path, text_config={"vocab_size": 1000})
    chat_tokenizers.save_family("exaone4", folder)
    with pytest.raises(exafuse.TemplateError, match=r"expected <\|image_pad\|> among"):
        load_processor(folder)


def test_a_template_where_processors_once_kept_it(tmp_path):
    folder = vision_checkpoint.save(tmp_path)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    assert load_processor(folder).chat_template is None
    vision_checkpoint.write(folder / "chat_template.json", {"chat_template": template})
    assert load_processor(folder).chat_template == template
    vision_checkpoint.write(folder / "chat_template.json", {"chat_template": "{% if %}"})
    with pytest.raises(exafuse.TemplateError, match="does not compile"):
        load_processor(folder)


# ---- more than the model can read -----------------------------------------------------------


def with_context(folder: Path, tokens: int) -> Processor:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = tokens
    vision_checkpoint.write(folder / "config.json", config)
    processor = load_processor(folder)
    assert processor.max_tokens == tokens
    return processor


def test_images_that_take_more_tokens_than_the_model_reads(tmp_path, monkeypatch):
    processor = with_context(vision_checkpoint.save(tmp_path), 20)
    assert processor.encode(user(image(0, 56, 56)))  # 4 tokens
    monkeypatch.setattr("exafuse.media.preparation.read_image", None)  # nothing is decoded
    with pytest.raises(ValueError, match=r"takes 64 tokens, and 20 of the 20 .* are left"):
        processor.encode(user(image(0, 400, 400)))
    with pytest.raises(ValueError, match=r"images\[5\]: takes 4 tokens, and 0 of the 20"):
        processor(images=[image(0, 56, 56)] * 6)


def test_hostile_bounds_on_the_size_of_images(tmp_path):
    """A file that asks for 2^31 pixels of every image."""
    size = {"shortest_edge": 2**31 - 1, "longest_edge": 2**31 - 1}
    processor = load_processor(rewritten(tmp_path, "preprocessor_config.json", size=size))
    with pytest.raises(ValueError, match="tokens, and 262,144 of the 262,144"):
        processor(images=image())
