"""``Processor``: text, images and videos to the tensors that an EXAONE 4.5 model takes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from exafuse.errors import TemplateError
from exafuse.media import parts
from exafuse.media.content import Kind, Medium, check_part_types, split_media
from exafuse.media.preparation import prepare
from exafuse.strict_json import shorten
from exafuse.text.messages import Message, Tool
from exafuse.text.template import render_chat

# A bound where config.json names none: no model of this family reads more.
DEFAULT_MAX_TOKENS = 2**18


@dataclass(frozen=True)
class EncodedChat:
    """A conversation as the model reads it.

    ``inputs``: input_ids and attention_mask int64 ``[1, seq]`` and, where there are pictures,
    pixel_values and pixel_values_videos fp32 ``[patches, values]``, image_grid_thw and
    video_grid_thw int64 ``[pictures, 3]``. ``text``: the rendered conversation, one placeholder for
    a picture. ``opens_thinking``: the template left a ``<think>`` open.
    """

    inputs: dict[str, Any]
    text: str
    opens_thinking: bool

    @property
    def ids(self) -> list[int]:
        ids: list[int] = self.inputs["input_ids"][0].tolist()
        return ids


class Processor:
    """The front end of a checkpoint that sees: a tokenizer, an image and a video processor.

    Made by ``exafuse.load_processor``. The last two are transformers' classes, set up from the
    checkpoint's files and loaded at first use; without torchvision there are images only.

    Attributes:
        tokenizer: the transformers tokenizer.
        image_token, image_token_id, video_token, video_token_id: what a template writes for an
            image and a video, once for each; the model sees it once for each of their tokens.
    """

    def __init__(
        self,
        tokenizer: Any,
        settings: parts.Settings,
        *,
        image_token: str,
        video_token: str,
        max_tokens: int = DEFAULT_MAX_TOKENS,
    ) -> None:
        self.tokenizer = tokenizer
        self._settings = settings
        self.image_token, self.video_token = image_token, video_token
        self.image_token_id: int = tokenizer.convert_tokens_to_ids(image_token)
        self.video_token_id: int = tokenizer.convert_tokens_to_ids(video_token)
        self.max_tokens = max_tokens

    @cached_property
    def image_processor(self) -> Any:
        """transformers' image processor; ``ValueError`` if the checkpoint has no settings for it,
        ``ImportError`` if a library is missing."""
        return parts.image_processor(self._required("image", self._settings.image))

    @cached_property
    def video_processor(self) -> Any:
        """transformers' video processor; ``ImportError`` without torchvision."""
        return parts.video_processor(self._required("video", self._settings.video))

    def _required(self, kind: Kind, settings: Mapping[str, Any] | None) -> Mapping[str, Any]:
        if settings is None:
            raise ValueError(
                f"this folder has no settings for {kind}s: expected preprocessor_config.json or "
                "processor_config.json beside config.json; copy it from the checkpoint"
            )
        return settings

    @property
    def chat_template(self) -> Any:
        return self.tokenizer.chat_template

    def decode(self, *arguments: Any, **keywords: Any) -> Any:
        """``tokenizer.decode``."""
        return self.tokenizer.decode(*arguments, **keywords)

    def batch_decode(self, *arguments: Any, **keywords: Any) -> Any:
        """``tokenizer.batch_decode``."""
        return self.tokenizer.batch_decode(*arguments, **keywords)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        *,
        fps: float | None = None,
        num_frames: int | None = None,
        return_tensors: str = "pt",
    ) -> Any:
        """Tensors for text that is rendered already, in transformers' order of arguments.

        ``text``: one text or several, which are padded at the left; ``image_token`` and
        ``video_token`` in it stand for ``images`` and ``videos``, in order over all texts. Control
        tokens in it are control tokens: for what users write, use ``chat`` or
        ``apply_chat_template``. ``images``: one or a list, each as ``media.images.read_image``
        takes it. ``videos``: one or a list, each as ``media.videos.read_video`` takes it; a list
        that does not hold lists, arrays of four axes or paths is one video's frames.
        ``fps``, ``num_frames``: which frames of the videos are looked at.

        Returns a mapping as ``EncodedChat.inputs``, without input_ids if there is no text.
        """
        from transformers import BatchFeature

        if return_tensors != "pt":
            raise ValueError(f"return_tensors: expected 'pt', got {shorten(return_tensors)}")
        media = [
            Medium("image", source, f"images[{i}]") for i, source in enumerate(_images(images))
        ]
        media += [
            Medium("video", source, f"videos[{i}]", fps, num_frames)
            for i, source in enumerate(_videos(videos))
        ]
        if text is None and not media:
            raise ValueError("expected text, images or videos, got nothing")
        rows: list[list[int]] = []
        if text is not None:
            texts = [text] if isinstance(text, str) else text
            if (
                not isinstance(texts, list | tuple)
                or not texts
                or not all(isinstance(item, str) for item in texts)
            ):
                raise TypeError(f"text: expected a text or a list of texts, got {shorten(text)}")
            rows = [list(self.tokenizer(item)["input_ids"]) for item in texts]
            self._check_counts([index for row in rows for index in row], media, "the text has")
        data, counts = prepare(self, media)
        if rows:
            rows = self._expand(rows, counts)
            data = {**self._padded(rows), **data}
        return BatchFeature(data)

    def apply_chat_template(
        self,
        conversation: Sequence[Message],
        *,
        tools: Sequence[Tool] | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = "pt",
        **template_kwargs: Any,
    ) -> Any:
        """A conversation rendered (default), as ids (``tokenize``), or as all tensors
        (``return_dict``), under the names that transformers' processors have.

        Nothing that a message says becomes a control token or a placeholder: it is encoded as text.
        """
        from transformers import BatchFeature

        if return_tensors not in ("pt", "auto", None):
            raise ValueError(f"return_tensors: expected 'pt', got {shorten(return_tensors)}")
        if not (tokenize or return_dict):
            bare, _ = split_media(conversation)
            return render_chat(
                self.tokenizer,
                bare,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                template_kwargs=template_kwargs,
            ).text
        encoded = self.encode(
            conversation,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            template_kwargs=template_kwargs,
        )
        return BatchFeature(encoded.inputs) if return_dict else encoded.inputs["input_ids"]

    def encode(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] | None = None,
        thinking: bool | None = None,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> EncodedChat:
        """A conversation with its pictures; arguments and errors as ``text.template.encode_chat``,
        and ``MediaError`` / ``ValueError`` for pictures that cannot be read."""
        bare, media = split_media(messages)
        check_part_types(bare)
        prompt = render_chat(
            self.tokenizer,
            bare,
            tools=tools,
            thinking=thinking,
            add_generation_prompt=add_generation_prompt,
            template_kwargs=template_kwargs,
        )
        self._check_counts(prompt.ids, media, "the chat template wrote")
        data, counts = prepare(self, media)
        rows = self._expand([prompt.ids], counts)
        return EncodedChat(self._padded(rows) | data, prompt.text, prompt.opens_thinking)

    def _check_counts(self, ids: Sequence[int], media: Sequence[Medium], what: str) -> None:
        for kind, token, token_id in self._tokens():
            given = sum(medium.kind == kind for medium in media)
            found = ids.count(token_id)
            if found != given:
                raise TemplateError(
                    f"expected one {token} for each of {given} {kind}s, but {what} {found}; "
                    f"{kind}s belong into messages of the user"
                )

    def _tokens(self) -> tuple[tuple[Kind, str, int], ...]:
        return (
            ("image", self.image_token, self.image_token_id),
            ("video", self.video_token, self.video_token_id),
        )

    def _expand(
        self, rows: Sequence[Sequence[int]], counts: Mapping[int, list[int]]
    ) -> list[list[int]]:
        """Every placeholder repeated for the tokens of its picture."""
        left = {token_id: iter(numbers) for token_id, numbers in counts.items()}
        expanded = []
        for row in rows:
            ids: list[int] = []
            for index in row:
                ids += [index] * next(left[index]) if index in left else [index]
            expanded.append(ids)
        return expanded

    def _padded(self, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
        import torch

        length = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        if pad is None and any(len(row) < length for row in rows):
            raise ValueError("text: texts of different lengths need a padding token; give one each")
        ids = [[pad] * (length - len(row)) + list(row) for row in rows]
        mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
        return {
            "input_ids": torch.tensor(ids, dtype=torch.int64),
            "attention_mask": torch.tensor(mask, dtype=torch.int64),
        }


def _images(images: Any) -> list[Any]:
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]


def _videos(videos: Any) -> list[Any]:
    """A list of videos is told from a list of frames by its first item."""
    if videos is None:
        return []
    if not isinstance(videos, list | tuple):
        return [videos]
    is_frames = bool(videos) and not (
        isinstance(videos[0], str | os.PathLike | list | tuple)
        or getattr(videos[0], "ndim", None) == 4
    )
    return [videos] if is_frames else list(videos)
