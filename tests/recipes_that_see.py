"""The recipes of docs/recipes.md that need torchvision: run by test_recipes.py in a process of its
own, see torchvision_shim.py."""

from __future__ import annotations

import PIL.Image
import pytest
import talking_models
import vision_checkpoint
from recipe_runs import SEEING, Ran, check_against_plain, run
from transformers.video_utils import load_video

NAME = "LGAI-EXAONE/EXAONE-4.5-33B"


@pytest.fixture(scope="module")
def replaced(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the page names: a checkpoint, a picture, a clip."""
    photo, clip = vision_checkpoint.photo("coffee.png"), vision_checkpoint.clip("bikes.mp4")
    with PIL.Image.open(photo) as image:
        frames, _ = load_video(str(clip), fps=2, backend="pyav")
        parts = [{"type": "image", "image": image}, {"type": "video", "video": frames}]
        folder = talking_models.save_seeing(
            tmp_path_factory.mktemp("sees"),
            list(zip(parts, ("What is this?", "What happens?"), strict=True)),
        )
    return {NAME: str(folder), "seoul.jpg": str(photo), "clip.mp4": str(clip)}


def test_images(replaced: dict[str, str]) -> None:
    ran = run("Images", replaced)
    check_against_plain(SEEING["Images"], ran)
    assert ran.plain["same_ids"].tolist() == ran.plain["ids"].tolist()
    assert ran.own["reply"].answer == "A image."


def test_video(replaced: dict[str, str]) -> None:
    ran = run("Video", replaced)
    check_against_plain(SEEING["Video"], ran)
    # Which frames are two a second is not the same in both: the plain model gets ours.
    expected = ran.plain["model"].generate(**ran.own["inputs"], max_new_tokens=512)
    assert ran.own["ids"].tolist() == expected.tolist()
    assert_says(ran, "A video.")


def assert_says(ran: Ran, words: str) -> None:
    for namespace in (ran.own, ran.drop_in, ran.plain):
        prompt = namespace["inputs"]["input_ids"].shape[1]
        said = ran.plain["processor"].decode(namespace["ids"][0, prompt:])
        assert words in said
