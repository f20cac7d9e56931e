"""From a conversation to what the model reads, for checkpoints that see and for those that do
not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from exafuse.media.content import split_media
from exafuse.media.processor import EncodedChat, Processor
from exafuse.text.loading import tokenizer_of
from exafuse.text.messages import Message, Tool
from exafuse.text.template import render_chat


def encode_chat(
    processor: Any,
    messages: Sequence[Message],
    *,
    tools: Sequence[Tool] | None = None,
    thinking: bool | None = None,
    add_generation_prompt: bool = True,
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """The prompt ids of ``messages``, by the checkpoint's chat template.

    ``processor``: of ``load_processor``. The rest, and the errors, as
    :func:`exafuse.text.template.render_chat`.
    """
    return encode_conversation(
        processor,
        messages,
        tools=tools,
        thinking=thinking,
        add_generation_prompt=add_generation_prompt,
        template_kwargs=template_kwargs,
    ).ids


def encode_conversation(processor: Any, messages: Sequence[Message], **options: Any) -> EncodedChat:
    """:func:`encode_chat` with everything that the model takes: ids, mask and pictures."""
    if isinstance(processor, Processor):
        return processor.encode(messages, **options)
    import torch

    bare, media = split_media(messages)
    if media:
        raise ValueError(
            f"{media[0].where}: this checkpoint reads text only; expected one that sees "
            "(model_type exaone4_5)"
        )
    prompt = render_chat(tokenizer_of(processor), bare, **options)
    ids = torch.tensor([prompt.ids], dtype=torch.int64)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return EncodedChat(inputs, prompt.text, prompt.opens_thinking)
