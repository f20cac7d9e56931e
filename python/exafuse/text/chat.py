"""Conversations: ``exafuse.chat(model, processor, messages)`` and what stands behind it.

``load_processor`` loads a checkpoint's text front end, ``encode_chat`` turns a conversation into
prompt ids, ``chat`` generates the next turn and takes it apart into a :class:`Reply`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from exafuse.text.encoding import encode_chat, encode_conversation
from exafuse.text.loading import load_processor, tokenizer_of
from exafuse.text.messages import Message, Tool
from exafuse.text.reply import Reply, hidden_ids, parse_reply, reply_text
from exafuse.text.settings import DEFAULT_MAX_NEW_TOKENS
from exafuse.text.streaming import ReplyStreamer
from exafuse.text.template import mentions_tools, template_source
from exafuse.text.tool_calls import MalformedToolCall, ToolCall, tool_call_style

__all__ = [
    "PRESETS",
    "MalformedToolCall",
    "Preset",
    "Reply",
    "ReplyStreamer",
    "ToolCall",
    "chat",
    "encode_chat",
    "load_processor",
]


@dataclass(frozen=True)
class Preset:
    """Sampling that a model's page recommends. ``thinking`` None: the template's own default."""

    thinking: bool | None
    settings: Mapping[str, Any] = field(default_factory=dict)


def _sampling(**settings: Any) -> Mapping[str, Any]:
    return MappingProxyType({"do_sample": True, **settings})


# What a page does not name stays as the checkpoint's generation_config.json has it.
PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "exaone4-reasoning": Preset(True, _sampling(temperature=0.6, top_p=0.95)),
        # The page asks for a temperature below 0.6: greedy is the choice that repeats exactly.
        "exaone4-non-reasoning": Preset(False, MappingProxyType({"do_sample": False})),
        # The 1.2B model in Korean, against slipping into other languages.
        "exaone4-1.2b-korean": Preset(False, _sampling(temperature=0.1)),
        "exaone4_5-general": Preset(
            None, _sampling(temperature=1.0, top_p=0.95, presence_penalty=1.5)
        ),
        # Reading documents, and Korean.
        "exaone4_5-ocr": Preset(
            None, _sampling(temperature=0.6, top_p=0.95, top_k=20, presence_penalty=1.5)
        ),
        "exaone4_5-text": Preset(None, _sampling(temperature=1.0, top_p=0.95)),
    }
)


def chat(
    model: Any,
    processor: Any,
    messages: Sequence[Message],
    tools: Sequence[Tool] | None = None,
    thinking: bool | None = None,
    preset: str | None = None,
    streamer: Any = None,
    **generate_kwargs: Any,
) -> Reply:
    """The model's next turn in a conversation.

    ``model``: ours, or a patched transformers model (``generate`` arguments are then its own).
    ``processor``: from :func:`load_processor`. ``messages``: dicts with ``role`` and ``content``;
    append ``reply.message``, and for every tool call ``call.result(value)``, to go on. For a model
    that sees, the content of a user's message may be a list of ``{"type": "text", "text": ...}``,
    ``{"type": "image", "image": source}`` and ``{"type": "video", "video": source}`` (with ``fps``
    or ``num_frames`` if wanted); a source is a file, a PIL image, an array or a list of frames.
    ``tools``: JSON schemas, or Python functions with type hints and a Google-style docstring.
    ``thinking``: True or False where the template has a switch; None is the template's default.
    ``preset``: a name of ``PRESETS``; nothing of it applies unless named, and arguments given here
    win over it. ``streamer``: e.g. :class:`ReplyStreamer`. Everything else goes to
    ``model.generate``; without a length there or in the checkpoint, a reply ends after 1024 tokens
    (or at the end of the context).

    Raises ``TemplateError`` if the template fails, ``MediaError`` for an image or a video that
    cannot be read, ``ValueError`` / ``TypeError`` for arguments.
    """
    tokenizer = tokenizer_of(processor)
    chosen = _preset(preset)
    thinking = chosen.thinking if thinking is None else thinking
    # None leaves a setting open, as in generate; for eos_token_id alone it says "no such token".
    given = {k: v for k, v in generate_kwargs.items() if v is not None or k == "eos_token_id"}
    settings = {**chosen.settings, **given}
    if tools and not mentions_tools(tokenizer):
        raise ValueError(
            "tools: the chat template of this checkpoint does not declare tools to the model; "
            "describe them in a message, or use a checkpoint whose template does"
        )
    prompt = encode_conversation(processor, messages, tools=tools, thinking=thinking)
    settings |= _length(model, settings, len(prompt.ids))
    if settings.get("stop_strings"):
        settings.setdefault("tokenizer", tokenizer)

    # The mask is all ones: a padding id in the prompt is the template's, not padding.
    inputs = {name: tensor.to(model.device) for name, tensor in prompt.inputs.items()}
    output = model.generate(inputs.pop("input_ids"), streamer=streamer, **inputs, **settings)
    sequences = getattr(output, "sequences", output)
    new_ids: list[int] = sequences[0, len(prompt.ids) :].tolist()

    stops = _stop_ids(model, tokenizer, settings)
    strings = _setting(model, settings, "stop_strings")
    finished = bool(new_ids) and (
        new_ids[-1] in stops or _ends_with(strings, tokenizer, prompt.ids, new_ids)
    )
    said = new_ids
    while said and said[-1] in stops:
        said = said[:-1]
    style = tool_call_style(template_source(tokenizer, tools), tokenizer.get_added_vocab())
    return parse_reply(
        reply_text(tokenizer, said, hidden_ids(tokenizer)),
        # Bare JSON is a call only if there was something to call; otherwise it is the answer.
        style=style if tools or style == "tag" else None,
        opened_thinking=prompt.opens_thinking,
        finished=finished,
        ids=new_ids,
    )


def _preset(name: str | None) -> Preset:
    if name is None:
        return Preset(None)
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(sorted(PRESETS))}; got {name!r}")
    return PRESETS[name]


def _length(model: Any, settings: Mapping[str, Any], prompt_length: int) -> dict[str, int]:
    """``max_new_tokens``, if neither the call nor the checkpoint limits the reply."""
    from exafuse.generation.settings import context_length

    names = ("max_new_tokens", "max_length")
    if any(_setting(model, settings, name) is not None for name in names):
        return {}
    config = model.config
    if hasattr(config, "get_text_config"):  # transformers' own model, patched or not
        context = config.get_text_config().max_position_embeddings
    else:
        context = context_length(config)
    return {"max_new_tokens": min(DEFAULT_MAX_NEW_TOKENS, max(context - prompt_length, 1))}


def _stop_ids(model: Any, tokenizer: Any, settings: Mapping[str, Any]) -> frozenset[int]:
    ids = _setting(model, settings, "eos_token_id")
    if ids is None and settings.get("eos_token_id", ...) is not None:
        ids = tokenizer.eos_token_id
    return frozenset(() if ids is None else [ids] if isinstance(ids, int) else ids)


def _ends_with(
    strings: str | Sequence[str] | None, tokenizer: Any, prompt: Sequence[int], new: Sequence[int]
) -> bool:
    """Whether the last new token completed one of the strings, as ``generate`` judges it."""
    if not strings:
        return False
    import numpy as np

    from exafuse.generation.stopping import StopStrings

    strings = (strings,) if isinstance(strings, str) else tuple(strings)
    before = np.array([[*prompt, *new[:-1]]], dtype=np.int64)
    completed = StopStrings(tokenizer, strings, before).completed_by(np.array(new[-1:]))
    return bool(completed[0])


def _setting(model: Any, settings: Mapping[str, Any], name: str) -> Any:
    """A generation setting, from the first place that has it: the call, the generation_config of
    the call, the model's."""
    value = settings.get(name, ...)
    sources = [settings.get("generation_config"), getattr(model, "generation_config", None)]
    while value is ... and sources:
        source = sources.pop(0)
        found = source.get(name) if isinstance(source, Mapping) else getattr(source, name, None)
        value = ... if found is None else found
    return None if value is ... else value
