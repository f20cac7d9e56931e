"""The processor of checkpoints that see: against transformers' own, without torchvision, and with
what users and files get wrong. Without torchvision in the environment all tests here but those of
the second processes run where it is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import chat_tokenizers
import exafuse
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
from vision_checkpoint import image, user

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
