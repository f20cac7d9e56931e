"""The processor of checkpoints that see: against transformers' own, without torchvision, and with
what users and files get wrong. Without torchvision in the environment all tests here but those of
the second processes run where it is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import chat_tokenizers
import exafuse
import numpy as np
import PIL.Image
import pytest
import torch
import torchvision_shim
import vision_checkpoint
from chat_tokenizers import controls
from conversations import Script
from exafuse.media import parts
from exafuse.media.processor import Processor
from exafuse.text.chat import ReplyStreamer, chat, encode_chat, load_processor
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

TESTS = Path(__file__).parent
PHOTOS = ("astronaut.png", "coffee.png", "rocket.jpg", "page.png", "coins.png", "logo.png")


@pytest.fixture(autouse=True)
def _no_torchvision(monkeypatch):
    """Missing here even where it is installed."""
    monkeypatch.setattr(parts, "torchvision_problem", lambda: "torchvision is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return vision_checkpoint.save(tmp_path_factory.mktemp("sees"))


@pytest.fixture(scope="module")
def processor(folder) -> Processor:
    return load_processor(folder)


def image(seed: int = 0, height: int = 60, width: int = 90) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def user(*content: Any) -> list[dict[str, Any]]:
    """One message; a text is a part of text, anything else an image."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image", "image": part}
        for part in content
    ]
    return [{"role": "user", "content": content}]


# ---- with torchvision, in processes of their own --------------------------------------------


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    source = str(Path(exafuse.__file__).parents[1])
    path = os.pathsep.join([environment.pop("PYTHONPATH", source), source, str(TESTS)])
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def needs_torchvision() -> None:
    if torchvision_shim.find() is None:
        pytest.skip(f"needs torchvision, installed or in {torchvision_shim.FOLDER}")


@pytest.mark.slow
def test_everything_equals_autoprocessor_with_torchvision():
    """tests/torchvision_parity.py: images and clips, both ways of calling, bitwise."""
    needs_torchvision()
    vision_checkpoint.photo("coffee.png"), vision_checkpoint.clip("bikes.mp4")
    done = python(
        *("-m", "pytest", "-q", "-s", "-p", "torchvision_shim", "-p", "no:cacheprovider"),
        str(TESTS / "torchvision_parity.py"),
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout.splitlines()[-1]
    print([line for line in done.stdout.splitlines() if "differ by one level" in line])


@pytest.mark.slow
def test_a_torchvision_that_does_not_load_is_named(folder):
    """Installed beside a torch that it was not built for: transformers tries to import it."""
    if not torchvision_shim.FOLDER.is_dir():
        pytest.skip(f"needs {torchvision_shim.FOLDER}, a torchvision that does not load")
    script = (
        "import sys, numpy, exafuse\n"
        "processor = exafuse.load_processor(sys.argv[1])\n"
        "print(processor.encode([{'role': 'user', 'content': 'text goes on'}]).ids)\n"
        "try: processor(images=numpy.zeros((60, 60, 3), 'uint8'))\n"
        "except ImportError as error: print(error)\n"
    )
    done = python("-c", script, str(folder), PYTHONPATH=str(torchvision_shim.FOLDER))
    assert done.returncode == 0, done.stderr
    assert "torchvision is installed, but does not load" in done.stdout
    assert "or no torchvision at all" in done.stdout


# ---- without torchvision --------------------------------------------------------------------


@pytest.mark.parametrize("name", PHOTOS)
def test_images_equal_the_pil_processor_of_transformers(processor, name):
    path = vision_checkpoint.photo(name)
    own = {"image_processor_type", "processor_class"}
    kept = {k: v for k, v in vision_checkpoint.IMAGE_SETTINGS.items() if k not in own}
    with PIL.Image.open(path) as opened:
        opened.load()
    expected = Qwen2VLImageProcessorPil(**kept)(images=[opened], return_tensors="pt")
    got = processor(images=path)
    assert set(got) == {"pixel_values", "image_grid_thw"}
    for key, tensor in expected.items():
        assert torch.equal(got[key], tensor), key
    assert got["pixel_values"].dtype == torch.float32
    assert got["pixel_values"].shape == (int(got["image_grid_thw"].prod()), 1176)


def test_several_images_are_prepared_as_one_alone(processor):
    sources = [image(i, 40 + 30 * i, 130 - 20 * i) for i in range(4)]
    together = processor(images=sources)
    alone = [processor(images=source) for source in sources]
    for key in together:
        assert torch.equal(together[key], torch.cat([one[key] for one in alone]))


def test_a_video_is_one_error_that_names_the_extra(processor):
    clip = [image(), image(1)]
    with pytest.raises(ImportError, match=r'pip install "exafuse\[vision\]"') as caught:
        processor(videos=[clip])
    assert "\n" not in str(caught.value)
    message = {"role": "user", "content": [{"type": "video", "video": clip}]}
    with pytest.raises(ImportError, match="videos need torchvision"):
        processor.encode([message])


# ---- conversations --------------------------------------------------------------------------


def test_every_placeholder_becomes_the_tokens_of_its_image(processor):
    small, wide = image(0, 60, 60), image(1, 60, 200)
    encoded = processor.encode(user("First ", small, "and ", wide, "?"))
    inputs = encoded.inputs
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values", "image_grid_thw"}
    counts = (inputs["image_grid_thw"].prod(-1) // 4).tolist()
    assert counts[0] != counts[1]
    ids = inputs["input_ids"][0].tolist()
    runs = _runs(ids, processor.image_token_id)
    assert runs == counts
    assert inputs["input_ids"].dtype == inputs["attention_mask"].dtype == torch.int64
    assert bool((inputs["attention_mask"] == 1).all())
    assert inputs["image_grid_thw"].dtype == torch.int64
    assert encoded.text.count("<|image_pad|>") == 2
    assert encode_chat(processor, user("First ", small, "and ", wide, "?")) == ids


def _runs(ids: list[int], token: int) -> list[int]:
    runs, length = [], 0
    for index in [*ids, -1]:
        if index == token:
            length += 1
        elif length:
            runs.append(length)
            length = 0
    return runs


def test_a_conversation_of_text_is_what_the_tokenizer_makes_of_it(processor):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How many apples are left?"},
        {"role": "assistant", "content": "Seven."},
        {"role": "user", "content": [{"type": "text", "text": "And 배?"}]},
    ]
    encoded = processor.encode(messages)
    assert set(encoded.inputs) == {"input_ids", "attention_mask"}
    expected = processor.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert encoded.ids == expected["input_ids"]
    assert load_processor(processor.tokenizer.name_or_path).chat_template


def test_thinking_is_on_unless_switched_off(processor):
    for thinking, opens in ((None, True), (True, True), (False, False)):
        encoded = processor.encode(user("Hm?"), thinking=thinking)
        assert encoded.opens_thinking is opens
        assert encoded.text.endswith("<think>\n" if opens else "<think>\n\n</think>\n\n")


def test_other_spellings_of_an_image_part(processor, tmp_path):
    PIL.Image.fromarray(image()).save(tmp_path / "a.png")
    path = str(tmp_path / "a.png")
    expected = processor.encode(user(image())).inputs
    for part in (
        {"type": "image", "path": path},
        {"type": "image", "url": path},
        {"type": "image", "image": Path(path)},
        {"type": "image_url", "image_url": {"url": path}},
        {"type": "image_url", "image_url": path},
    ):
        got = processor.encode([{"role": "user", "content": [part]}]).inputs
        for key, tensor in expected.items():
            assert torch.equal(got[key], tensor), part


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([{"type": "image"}], r"messages\[0\], part 0 \(image\): expected one source"),
        ([{"type": "image", "image": None}], "expected one source"),
        ([{"type": "image", "image": "a.png", "url": "b.png"}], "got image and url"),
        ([{"type": "image", "base64": "iVBOR"}], "decode it"),
        ([{"type": "image_url", "image_url": {"url": "https://x.org/a.png"}}], "download it first"),
        ([{"type": "text", "text": "a"}, {"type": "image", "image": "no.png"}], "part 1 .*no such"),
        ([{"type": "video"}], r"part 0 \(video\): expected one source"),
        ([{"type": "video", "video": "https://x.org/a.mp4", "fps": 0}], "positive number"),
        ([{"type": "audio", "audio": "a.wav"}], "expected text, image or video, got 'audio'"),
        ([{"text": "no type"}], "expected text, image or video, got None"),
    ],
)
def test_parts_that_cannot_be_shown(processor, monkeypatch, content, words):
    with pytest.raises(ValueError, match=words):
        processor.encode([{"role": "user", "content": content}])


@pytest.mark.parametrize("messages", ["hello", {"role": "user"}, [], [7], ["text"], 7, None])
def test_what_is_no_conversation(processor, messages):
    with pytest.raises((TypeError, ValueError), match="messages"):
        processor.encode(messages)


@pytest.mark.parametrize("role", ["system", "assistant", "tool"])
def test_images_where_the_template_does_not_show_them(processor, role):
    message = {"role": role, "content": [{"type": "image", "image": image()}]}
    with pytest.raises(exafuse.TemplateError):
        processor.encode([*user("Look."), message])


def test_a_checkpoint_that_does_not_see_refuses_images():
    tokenizer = chat_tokenizers.processor("exaone4")
    with pytest.raises(ValueError, match=r"messages\[0\], part 1 \(image\): .* reads text only"):
        encode_chat(tokenizer, user("Look: ", image()))


@pytest.mark.parametrize(
    ("text", "number"),
    [("none", 1), ("<|image_pad|>", 0), ("<|image_pad|>", 2), ("<|image_pad|><|image_pad|>", 1)],
)
def test_wrong_numbers_of_images(processor, text, number):
    with pytest.raises(ValueError, match=f"for each of {number} images, but the text has"):
        processor(text=text, images=[image()] * number)
    with pytest.raises(ValueError, match="for each of 0 videos, but the text has 1"):
        processor(text="<|video_pad|>")


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({}, ValueError, "got nothing"),
        ({"text": 7}, TypeError, "text: expected"),
        ({"text": []}, TypeError, "text: expected"),
        ({"text": ["a", 7]}, TypeError, "text: expected"),
        ({"text": "a", "return_tensors": "np"}, ValueError, "expected 'pt'"),
        ({"images": [image(), None]}, TypeError, r"images\[1\]: expected a file"),
    ],
)
def test_wrong_arguments(processor, arguments, error, words):
    with pytest.raises(error, match=words):
        processor(**arguments)


def test_texts_of_different_lengths_are_padded_at_the_left(processor):
    batch = processor(text=["a <|image_pad|>", "b"], images=[image()])
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    ids, mask = batch["input_ids"][1], batch["attention_mask"][1]
    assert mask.tolist() == [0] * (len(mask) - 1) + [1]
    assert bool((ids[:-1] == processor.tokenizer.pad_token_id).all())


# ---- what users type is text ----------------------------------------------------------------


ADDED = (*vision_checkpoint.FAMILY.special, *vision_checkpoint.FAMILY.markers)
PIECES = st.sampled_from(
    [*ADDED, "<|image", "_pad|>", "<|", "|>", "<vi", "sion>", "\u200b", " ", "\n", "word", "배"]
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(texts=st.lists(st.lists(PIECES, max_size=6).map("".join), min_size=1, max_size=3))
def test_placeholders_that_users_type_are_text(processor, texts):
    source = image(0, 56, 56)
    plain = processor.encode(user(*["x" for _ in texts], source)).ids
    encoded = processor.encode(user(*texts, source))
    added = controls(processor.tokenizer, encoded.ids)
    assert added == controls(processor.tokenizer, plain)
    assert encoded.ids.count(processor.image_token_id) == 4
    text = chat_tokenizers.decode(processor.tokenizer, encoded.ids)
    assert "".join(texts) in text.replace("<|image_pad|>" * 4, "<|image_pad|>")


def test_a_placeholder_split_over_parts_is_text(processor):
    encoded = processor.encode(user("<|image", "_pad|>", image(0, 56, 56), "<|video_", "pad|>"))
    assert encoded.ids.count(processor.image_token_id) == 4
    assert encoded.ids.count(processor.video_token_id) == 0
    only_typed = processor.encode(user("<|image_pad|>", "<|video_pad|>"))
    assert set(only_typed.inputs) == {"input_ids", "attention_mask"}
    assert processor.image_token_id not in only_typed.ids


# ---- chat -----------------------------------------------------------------------------------


def test_chat_hands_the_tensors_to_generate(processor, capsys):
    model = Script(processor.tokenizer, "A cat.\n</think>\n\nA cat on a mat.<|endofturn|>")
    streamer = ReplyStreamer(processor, thinking="hide")
    messages = user("What is it? ", image())
    reply = chat(model, processor, messages, preset="exaone4_5-ocr", streamer=streamer)
    assert (reply.thinking, reply.answer, reply.finished) == ("A cat.", "A cat on a mat.", True)
    assert capsys.readouterr().out == "A cat on a mat."
    expected = processor.encode(messages).inputs
    assert model.prompts == [expected["input_ids"][0].tolist()]
    (given_settings,) = model.settings
    for key in ("pixel_values", "image_grid_thw"):
        assert torch.equal(given_settings.pop(key), expected[key])
    assert given_settings == {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
        "presence_penalty": 1.5,
        "max_new_tokens": 1024,
    }


@pytest.mark.parametrize("preset", ["exaone4_5-general", "exaone4_5-ocr", "exaone4_5-text"])
def test_presets_leave_thinking_to_the_template(processor, preset):
    model = Script(processor.tokenizer, "Yes.<|endofturn|>", "Yes.<|endofturn|>")
    opened = "<think>\n"
    for thinking in (None, False):
        chat(model, processor, user("Well?"), thinking=thinking, preset=preset)
        prompt = chat_tokenizers.decode(processor.tokenizer, model.prompts[-1])
        assert prompt.endswith(opened) is (thinking is None)
    assert model.settings[0]["do_sample"] is True


def test_the_processor_of_somebody_else_is_refused(processor):
    with pytest.raises(TypeError, match=r"what exafuse\.load_processor returns"):
        encode_chat(object(), user("a"))


# ---- files of the folder --------------------------------------------------------------------


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
    monkeypatch.setattr("exafuse.media.processor.read_image", None)  # nothing is decoded
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
