"""Our processor against transformers' AutoProcessor, which needs torchvision: run by
test_processor.py in a process of its own, see torchvision_shim.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL.Image
import pytest
import torch
import vision_checkpoint
from exafuse.cli import commands as cli
from exafuse.media.processor import Processor
from exafuse.text.chat import load_processor
from exafuse.text.reply import hidden_ids, reply_text
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

PHOTOS = (
    *("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "page.png", "coins.png"),
    *("color.png", "logo.png", "horse.png", "microaneurysms.png"),
)
CLIPS = ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4", "carphone_distorted.mp4")
NUM_FRAMES = 7  # of each clip; an odd number, so that the last one is repeated


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vision_checkpoint.save(tmp_path_factory.mktemp("sees"))


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor).__name__ == "Exaone4_5_Processor"
    assert type(processor.image_processor).__name__ == "Qwen2VLImageProcessor"
    return processor


@pytest.fixture(scope="module")
def ours(folder: Path) -> Processor:
    processor = load_processor(folder)
    assert isinstance(processor, Processor)
    assert type(processor.image_processor).__name__ == "Qwen2VLImageProcessor"
    return processor


def frames(name: str, count: int | None = None) -> np.ndarray[Any, Any]:
    """The first frames of a clip, [frames, height, width, 3], by PyAV and nothing of ours."""
    with av.open(str(vision_checkpoint.clip(name))) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(decoded[:count])


def opened(name: str) -> PIL.Image.Image:
    with PIL.Image.open(vision_checkpoint.photo(name)) as image:
        image.load()
        return image


def assert_equal(ours: Any, theirs: Any) -> None:
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("name", PHOTOS)
def test_a_photograph_by_the_call(ours: Processor, theirs: Any, name: str) -> None:
    path = vision_checkpoint.photo(name)
    text = "<|user|>\n<vision><|image_pad|></vision>What is it?<|endofturn|>\n"
    expected = theirs(text=text, images=opened(name), return_tensors="pt")
    assert_equal(ours(text=text, images=path), expected)
    assert_equal(ours(text=[text], images=[opened(name)]), expected)
    assert_equal(ours([path], text), expected)


@pytest.mark.parametrize("name", ["chelsea.png", "coins.png", "logo.png"])
def test_arrays_and_tensors(ours: Processor, theirs: Any, name: str) -> None:
    array = np.asarray(opened(name))
    image = torch.from_numpy(array.copy())
    if image.ndim == 3:
        image = image.permute(2, 0, 1)
    expected = theirs.image_processor(images=[image[None] if image.ndim == 2 else image])
    for source in (array, image, image.half() / 255 if name == "coins.png" else image):
        ours_now = ours(images=[source])
        assert torch.equal(ours_now["image_grid_thw"], expected["image_grid_thw"])
        levels = (ours_now["pixel_values"] - expected["pixel_values"]).abs() * min(
            vision_checkpoint.STD
        )
        # Transparency is put on white by PIL here, by torch there.
        assert levels.max() <= (1.01 / 255 if name == "logo.png" else 0)


def test_several_photographs_in_several_texts(ours: Processor, theirs: Any) -> None:
    images = [opened(name) for name in PHOTOS[:4]]
    texts = ["a <|image_pad|> b <|image_pad|><|image_pad|>", "no more than <|image_pad|>"]
    theirs.tokenizer.padding_side = "left"
    expected = theirs(text=texts, images=images, return_tensors="pt", padding=True)
    assert_equal(ours(text=texts, images=images), expected)


@pytest.mark.parametrize("name", CLIPS)
def test_a_clip_by_the_call(ours: Processor, theirs: Any, name: str) -> None:
    text = "<|user|>\n<vision><|video_pad|></vision>What moves?<|endofturn|>\n"
    array = frames(name, NUM_FRAMES)
    expected = theirs(text=text, videos=[array], return_tensors="pt")
    assert expected["video_grid_thw"][0, 0] == (NUM_FRAMES + 1) // 2
    assert_equal(ours(text=text, videos=[array]), expected)
    assert_equal(ours(text=text, videos=[PIL.Image.fromarray(f) for f in array]), expected)
    assert_equal(ours(text=text, videos=torch.from_numpy(array).permute(0, 3, 1, 2)), expected)


def test_a_whole_clip_from_its_file(ours: Processor, theirs: Any) -> None:
    path = vision_checkpoint.clip("carphone_pristine.mp4")
    expected = theirs(text="<|video_pad|>", videos=[frames(path.name)], return_tensors="pt")
    assert_equal(ours(text="<|video_pad|>", videos=path), expected)
    assert expected["video_grid_thw"][0, 0] == 60


@pytest.mark.parametrize("options", [{"fps": 2}, {"fps": 12.5}, {"num_frames": 6}])
def test_sampled_frames(ours: Processor, theirs: Any, options: dict[str, float]) -> None:
    path = vision_checkpoint.clip("carphone_pristine.mp4")
    metadata = {"fps": 30000 / 1001, "total_num_frames": 120, "duration": 120 * 1001 / 30000}
    expected = theirs(
        text="<|video_pad|>",
        videos=[frames(path.name)],
        video_metadata=[metadata],
        do_sample_frames=True,
        return_tensors="pt",
        **options,
    )
    assert expected["video_grid_thw"][0, 0] < 60
    assert_equal(ours(text="<|video_pad|>", videos=[path], **options), expected)


def test_a_checkpoint_that_samples(tmp_path: Path) -> None:
    folder = vision_checkpoint.save(tmp_path)
    settings = {**vision_checkpoint.VIDEO_SETTINGS, "do_sample_frames": True, "fps": 3.0}
    vision_checkpoint.write(folder / "video_preprocessor_config.json", settings)
    path = vision_checkpoint.clip("carphone_pristine.mp4")
    grid = load_processor(folder)(videos=path)["video_grid_thw"]
    assert grid[0, 0] == 6  # 120 frames at 29.97 a second are 4 seconds: 12 frames
    grid = load_processor(folder)(videos=frames(path.name, 8))["video_grid_thw"]
    assert grid[0, 0] == 4  # chosen by the caller already


CONVERSATIONS = {
    "text": [{"role": "user", "content": "How many apples are left?"}],
    "one": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}],
    "many": [
        {"role": "system", "content": "Look closely."},
        {
            "role": "user",
            "content": [
                {"type": "image"},
                {"type": "text", "text": "Which of the two moves, "},
                {"type": "video"},
                {"type": "text", "text": "or this one?"},
                {"type": "image"},
            ],
        },
        {"role": "assistant", "content": "The second."},
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "And 배?"}]},
    ],
}


def filled(conversation: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation with photographs and frames of clips in its parts."""
    sources: dict[str, list[Any]] = {
        "image": [opened("coffee.png"), opened("page.png")],
        "video": [frames(CLIPS[2], 5), frames(CLIPS[0], 2)],
    }

    def part_of(part: dict[str, Any]) -> dict[str, Any]:
        kind = part["type"]
        return part if kind == "text" else {**part, kind: sources[kind].pop(0)}

    return [
        message
        if isinstance(message["content"], str)
        else {**message, "content": [part_of(part) for part in message["content"]]}
        for message in conversation
    ]


@pytest.mark.parametrize(
    ("name", "thinking"), [("text", True), ("one", None), ("many", None), ("many", False)]
)
def test_conversations(ours: Processor, theirs: Any, name: str, thinking: bool | None) -> None:
    options = {} if thinking is None else {"enable_thinking": thinking}
    call = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, **options}
    messages = filled(CONVERSATIONS[name])
    expected = theirs.apply_chat_template(messages, return_tensors="pt", **call)
    assert_equal(ours.apply_chat_template(messages, **call), expected)
    assert_equal(ours.encode(messages, thinking=thinking).inputs, expected)
    text = theirs.apply_chat_template(messages, add_generation_prompt=True, **options)
    assert ours.apply_chat_template(messages, add_generation_prompt=True, **options) == text


def test_settings_saved_by_transformers(ours: Processor, theirs: Any, tmp_path: Path) -> None:
    """The nested file of today instead of the two older ones."""
    theirs.save_pretrained(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()
    config = (Path(ours.tokenizer.name_or_path) / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    messages = filled(CONVERSATIONS["many"])
    again = load_processor(tmp_path).encode(messages).inputs
    assert_equal(again, ours.encode(messages).inputs)


PIXELS = {"min_pixels": 56 * 56, "max_pixels": 84 * 84}


@pytest.mark.parametrize(
    "images",
    [
        {"size": None, **PIXELS},
        {"size": PIXELS, **PIXELS},
        {"size": {"shortest_edge": 9, "longest_edge": 99}, **PIXELS},
        {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "do_normalize": None},
        {"do_normalize": False, "rescale_factor": 0.01},
        {"resample": 2, "image_processor_type": "Qwen2VLImageProcessorFast"},
    ],
    ids=["pixels", "both", "contradiction", "normalised", "not normalised", "bilinear"],
)
def test_settings_of_older_and_other_files(tmp_path: Path, images: dict[str, Any]) -> None:
    """One file, which then speaks for the videos as well."""
    folder = vision_checkpoint.save(tmp_path)
    (folder / "video_preprocessor_config.json").unlink()
    settings = {**vision_checkpoint.IMAGE_SETTINGS, **images}
    settings = {key: value for key, value in settings.items() if value is not None}
    vision_checkpoint.write(folder / "preprocessor_config.json", settings)
    theirs, ours = AutoProcessor.from_pretrained(folder), load_processor(folder)
    text, clip = "<|image_pad|> and <|video_pad|>", frames(CLIPS[2], 3)
    expected = theirs(text=text, images=opened("chelsea.png"), videos=[clip], return_tensors="pt")
    assert_equal(ours(text=text, images=opened("chelsea.png"), videos=[clip]), expected)


def test_the_image_processor_without_torchvision_is_within_one_level(ours: Processor) -> None:
    settings = {
        key: value
        for key, value in vision_checkpoint.IMAGE_SETTINGS.items()
        if key not in ("image_processor_type", "processor_class")
    }
    pil = Qwen2VLImageProcessorPil(**settings)
    differing = total = 0
    for name in PHOTOS:
        path = vision_checkpoint.photo(name)
        a = ours(images=path)["pixel_values"]
        b = pil(images=[opened(name)], return_tensors="pt")["pixel_values"]
        scale = 255 * torch.tensor(vision_checkpoint.STD).repeat_interleave(2 * 14 * 14)
        levels = ((a - b) * scale).abs()
        assert levels.max() < 1.01, name
        differing += int((levels > 0.5).sum())
        total += levels.numel()
        assert (levels > 0.5).float().mean() <= 0.01, name
    print(f"{differing} of {total} values differ by one level: {differing / total:.3%}")


def test_a_clip_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The answer to a clip and a photograph is that of transformers' model and processor."""
    folder = vision_checkpoint.save_model(tmp_path)
    path, photo = vision_checkpoint.clip(CLIPS[2]), vision_checkpoint.photo("rocket.jpg")
    argv = ["generate", str(folder), "What moves?", "--device", "cpu", "--temperature", "0"]
    argv += ["--max-new-tokens", "12", "--no-thinking", "--video", str(path), "--fps", "2"]
    assert cli.main([*argv, "--image", str(photo)]) == 0
    said = capsys.readouterr().out
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager")
    chosen = [int(i) for i in np.arange(8) * 120 / 8]  # four seconds, two frames each
    content = [
        {"type": "video", "video": frames(path.name)[chosen]},
        {"type": "image", "image": opened("rocket.jpg")},
        {"type": "text", "text": "What moves?"},
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        enable_thinking=False,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    prompt = inputs["input_ids"].shape[1]
    ids = model.eval().generate(**inputs, max_new_tokens=12, do_sample=False)[0, prompt:].tolist()
    tokenizer = processor.tokenizer
    assert inputs["video_grid_thw"][0, 0] == 4
    assert said == reply_text(tokenizer, ids, hidden_ids(tokenizer)) + "\n"
