"""Pictures all the way: from a file or the command line to a small random EXAONE 4.5's answer."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import exafuse
import PIL.Image
import pytest
import torch
import vision_checkpoint
from command_line import exit_code
from exafuse.cli import commands as cli
from exafuse.cli.conversation import Conversation
from exafuse.media import parts
from transformers import AutoModelForImageTextToText

QUESTION = {"type": "text", "text": "What is to be seen?"}


@pytest.fixture(autouse=True)
def _no_torchvision(monkeypatch):
    monkeypatch.setattr(parts, "torchvision_problem", lambda: "torchvision is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return vision_checkpoint.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder) -> Any:
    return exafuse.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="module")
def processor(folder) -> Any:
    return exafuse.load_processor(folder)


@pytest.fixture(scope="module")
def theirs(folder) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").eval()


def show(*names: str) -> list[dict[str, Any]]:
    parts = [{"type": "image", "image": vision_checkpoint.photo(name)} for name in names]
    return [{"role": "user", "content": [*parts, QUESTION]}]


CONVERSATIONS = {
    "one photograph": lambda: show("rocket.jpg"),
    "photographs of all kinds": lambda: show("coffee.png", "page.png", "logo.png"),
    "two turns": lambda: [
        *show("coins.png"),
        {"role": "assistant", "content": "Coins."},
        *show("chelsea.png"),
    ],
    "text alone": lambda: [{"role": "user", "content": "How many apples are left?"}],
}


@pytest.mark.parametrize("name", list(CONVERSATIONS))
@torch.no_grad()
def test_the_answer_is_that_of_transformers(model, processor, theirs, name):
    messages = CONVERSATIONS[name]()
    reply = exafuse.chat(model, processor, messages, max_new_tokens=24, do_sample=False)
    inputs = processor.encode(messages).inputs
    prompt = inputs["input_ids"].shape[1]
    expected = theirs.generate(**inputs, max_new_tokens=24, do_sample=False)[0, prompt:].tolist()
    assert reply.ids == expected[: len(reply.ids)]
    assert len(reply.ids) == len(expected)
    ours, reference = model(**inputs).logits, theirs(**inputs).logits
    assert torch.linalg.norm(ours - reference) <= 1e-5 * torch.linalg.norm(reference)


def test_the_picture_matters(model, processor):
    logits = [
        model(**processor.encode(show(name)).inputs).logits[0, -1]
        for name in ("coins.png", "page.png")
    ]
    assert (logits[0] - logits[1]).abs().max() > 0.01


@pytest.mark.parametrize("draft", ["mtp", "prompt_lookup"])
def test_drafting_does_not_change_the_answer(model, processor, draft):
    messages = show("coffee.png", "coins.png")
    options = {"max_new_tokens": 20, "do_sample": False}
    expected = exafuse.chat(model, processor, messages, **options).ids
    assert exafuse.chat(model, processor, messages, draft=draft, **options).ids == expected


def test_a_processed_batch_goes_into_generate_as_it_is(model, processor):
    text = processor.apply_chat_template(show("rocket.jpg"), add_generation_prompt=True)
    batch = processor(text=text, images=[vision_checkpoint.photo("rocket.jpg")])
    ids = model.generate(batch, max_new_tokens=8, do_sample=False)
    expected = exafuse.chat(
        model, processor, show("rocket.jpg"), max_new_tokens=8, do_sample=False
    ).ids
    assert ids[0, batch["input_ids"].shape[1] :].tolist() == expected


# ---- command line ---------------------------------------------------------------------------


def generate(folder, *argv):
    options = ["--device", "cpu", "--max-new-tokens", "10", "--temperature", "0"]
    return cli.main(["generate", str(folder), "What is to be seen?", *options, *argv])


def test_images_from_the_command_line(folder, model, processor, capsys):
    photos = [str(vision_checkpoint.photo(name)) for name in ("coffee.png", "rocket.jpg")]
    argv = [word for photo in photos for word in ("--image", photo)]
    assert generate(folder, *argv) == 0
    said = capsys.readouterr()
    messages = show("coffee.png", "rocket.jpg")
    reply = exafuse.chat(model, processor, messages, max_new_tokens=10, do_sample=False)
    assert said.out == f"<think>\n{reply.text}\n"
    assert said.err == ""
    assert generate(folder, *argv, "--no-thinking") == 0
    assert not capsys.readouterr().out.startswith("<think>")
    assert generate(folder, *reversed_pairs(argv)) == 0
    assert capsys.readouterr().out != said.out


def reversed_pairs(argv):
    return [*argv[2:], *argv[:2]]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--image", "missing.png"], "part 0 (image): no such file: 'missing.png'"),
        (["--image", "https://example.org/a.png"], "download it first"),
        (["--image", __file__], "got another kind of file"),
        (["--video", "missing.mp4"], 'pip install "exafuse[vision]"'),
        (["--video", "missing.mp4", "--fps", "2", "--num-frames", "3"], "fps or num_frames"),
        (["--video", "missing.mp4", "--fps", "0"], "fps: expected a positive number"),
        (["--image"], "expected one argument"),
    ],
)
def test_pictures_that_cannot_be_shown(folder, capsys, monkeypatch, tmp_path, argv, words):
    monkeypatch.chdir(tmp_path)
    command = ["generate", str(folder), "x", "--device", "cpu", *argv]
    assert exit_code(command) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("exafuse: error: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err.replace("--fps or --num-frames", "fps or num_frames")


def test_images_in_a_conversation(folder, model, processor, tmp_path, capsys):
    picture = tmp_path / "a picture.png"
    with PIL.Image.open(vision_checkpoint.photo("coins.png")) as image:
        image.save(picture)
    options = {"max_new_tokens": 6, "do_sample": False}
    conversation = Conversation(model, processor, thinking=False, options=options)
    conversation.run(io.StringIO(f"/image '{picture}'\nWhat is it?\nAnd now?\n"))
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.startswith(f"{picture}, 384 x 303, goes with the next message\n")
    roles = [message["role"] for message in conversation.messages]
    assert roles == ["user", "assistant"] * 2
    first, _, second, _ = conversation.messages
    assert [part["type"] for part in first["content"]] == ["image", "text"]
    assert second["content"] == "And now?"
    picture.unlink()  # a later turn does not need the file
    conversation.handle("Once more?")
    assert len(conversation.messages) == 6
    expected = exafuse.chat(model, processor, conversation.messages[:-1], thinking=False, **options)
    assert conversation.messages[-1]["content"] == expected.answer


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/image", "expected the name of a file"),
        ("/image missing.png", "no such file"),
        ("/image https://example.org/a.png", "download it first"),
        ("/video missing.mp4", "no such file"),
        (f"/video {__file__}", "cannot be read as a video"),
    ],
)
def test_pictures_that_cannot_go_with_a_message(model, processor, capsys, line, words):
    conversation = Conversation(model, processor)
    assert conversation.handle(line)
    assert words in capsys.readouterr().err
    assert conversation.shown == []


def test_pictures_wait_for_a_message_that_succeeds(model, processor, capsys, monkeypatch):
    conversation = Conversation(model, processor, options={"max_new_tokens": 4})
    conversation.handle(f"/video {vision_checkpoint.clip('carphone_distorted.mp4')}")
    assert "176 x 144, 120 frames, goes with the next message" in capsys.readouterr().out
    conversation.handle("What moves?")
    assert "videos need torchvision" in capsys.readouterr().err
    assert conversation.messages == []
    assert len(conversation.shown) == 1
    conversation.handle("/reset")
    assert conversation.shown == []


def test_a_model_that_does_not_see_says_so_at_once(capsys):
    import chat_tokenizers

    conversation = Conversation(None, chat_tokenizers.processor("qwen2"))
    conversation.handle("/image a.png")
    assert "this checkpoint reads text only" in capsys.readouterr().err
