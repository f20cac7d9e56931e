"""From a conversation to prompt ids: the checkpoint's own chat template, rendered by transformers.

The ids equal ``tokenizer.apply_chat_template(..., tokenize=True)`` for every conversation that
contains no added-token text. Where a message, a tool declaration or a tool result does contain
some, that span is encoded as ordinary text: it never becomes a control id, and decoding gives it
back.

Rendering happens in transformers' sandbox. It keeps a template from reaching files, modules or the
interpreter; it does not bound time or memory: a template that loops or allocates without end is not
defended against, so load checkpoints from people you trust that far.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from exafuse.errors import TemplateError
from exafuse.strict_json import shorten
from exafuse.text.loading import template_errors
from exafuse.text.messages import (
    THINK_OPEN,
    Message,
    Tool,
    check_messages,
    tool_schemas,
    with_thoughts_apart,
)
from exafuse.text.spans import Guard, Sentinels, all_strings, map_strings


@dataclass(frozen=True)
class Prompt:
    """An encoded conversation. ``text`` is what ``ids`` decode to; ``opens_thinking`` says whether
    the template left a ``<think>`` open for the model to continue."""

    ids: list[int]
    text: str
    opens_thinking: bool


def render_chat(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    tools: Sequence[Tool] | None = None,
    thinking: bool | None = None,
    add_generation_prompt: bool = True,
    template_kwargs: Mapping[str, Any] | None = None,
) -> Prompt:
    """The prompt ids of ``messages``, by the tokenizer's chat template.

    ``tools``: JSON schemas, or Python functions with type hints and a Google-style docstring.
    ``thinking``: passed to the template as ``enable_thinking``; None leaves the template's default.
    ``add_generation_prompt``: end with the opening of the assistant's turn.
    ``template_kwargs``: further variables for the template.

    Raises ``TemplateError`` if the template refuses or fails, ``ValueError`` / ``TypeError`` for
    malformed messages or tools.
    """
    schemas = tool_schemas(tools)
    template = template_source(tokenizer, schemas)
    chat = with_thoughts_apart(check_messages(messages), tokenizer, template)
    variables = dict(template_kwargs or {})
    if thinking is not None:
        _check_thinking(thinking, template)
        variables["enable_thinking"] = thinking

    guard = Guard.of(tokenizer)
    source: dict[str, Any] = {"messages": chat, "tools": schemas, "variables": variables}
    texts = all_strings(source)
    names = [str(name) for name in tokenizer.special_tokens_map.values()]
    sentinels = Sentinels("\0".join([*texts, *names, *guard.contents, template]))
    hidden = map_strings(source, lambda text: sentinels.hide(text, guard.spans(text)))

    def render(conversation: dict[str, Any]) -> str:
        return _render(tokenizer, conversation, add_generation_prompt)

    rendered = render(hidden)
    pieces = sentinels.split(rendered)
    if any(map(guard.may_join, all_strings(hidden))):
        pieces = _cut_joins(pieces, guard, sentinels, hidden, rendered, render)
    opens_thinking = add_generation_prompt and rendered.rstrip().endswith(THINK_OPEN)
    if thinking is False and opens_thinking:
        raise TemplateError(
            f"{_name(tokenizer)}: the chat template opens {THINK_OPEN} whatever enable_thinking "
            "says; this model cannot be told not to think"
        )
    with template_errors(f"{_name(tokenizer)}: the rendered conversation cannot be encoded"):
        ids = _encode_pieces(tokenizer, guard, pieces)
    return Prompt(ids, "".join(text for text, _ in pieces), opens_thinking)


def template_source(tokenizer: Any, tools: Sequence[Tool] | None) -> str:
    """The text of the chat template that a conversation with these tools is rendered by."""
    with template_errors(f"{_name(tokenizer)}: no chat template for this conversation"):
        return str(tokenizer.get_chat_template(None, tools=tools or None))


def mentions_tools(tokenizer: Any) -> bool:
    """Whether the chat template looks at the declared tools at all."""
    source = template_source(tokenizer, [{}])
    return re.search(r"\b(?:tools|available_tools)\b", source) is not None


def _name(tokenizer: Any) -> str:
    return str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)


def _render(tokenizer: Any, conversation: dict[str, Any], add_generation_prompt: bool) -> str:
    with template_errors(f"{_name(tokenizer)}: the chat template failed"):
        rendered = tokenizer.apply_chat_template(
            conversation["messages"],
            tools=conversation["tools"],
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **conversation["variables"],
        )
    return str(rendered)


def _check_thinking(thinking: object, template: str) -> None:
    if not isinstance(thinking, bool):
        raise TypeError(f"thinking: expected True, False or None, got {shorten(thinking)}")
    if thinking and "enable_thinking" not in template and THINK_OPEN not in template:
        raise ValueError(
            "thinking=True: the chat template of this checkpoint has no thinking mode "
            "(it mentions neither enable_thinking nor <think>); leave thinking unset"
        )


def _cut_joins(
    pieces: list[tuple[str, bool]],
    guard: Guard,
    sentinels: Sentinels,
    conversation: dict[str, Any],
    rendered: str,
    render: Callable[[dict[str, Any]], str],
) -> list[tuple[str, bool]]:
    """Cuts added tokens that several strings of the conversation form together ("<|im_" ending one
    message, "end|>" beginning the next), which no string contains alone.

    A second rendering shows where the outer characters of the suspicious strings end up: they are
    replaced by sentinels of their own. A token match that holds one of them is not the template's.
    """
    suspects = sorted({text for text in all_strings(conversation) if guard.may_join(text)})
    positions = _edge_positions(rendered, sentinels, conversation, suspects, render)
    result: list[tuple[str, bool]] = []
    start = 0
    for text, is_span in pieces:
        edges = sorted(p - start for p in positions if start <= p < start + len(text))
        end = 0
        for cut in [] if is_span else guard.cuts(text, edges):
            result += [(text[end:cut], False), (text[cut], True)]
            end = cut + 1
        result.append((text[end:], is_span))
        start += len(text)
    return _merge_spans(result)


def _merge_spans(pieces: list[tuple[str, bool]]) -> list[tuple[str, bool]]:
    merged: list[tuple[str, bool]] = []
    for text, is_span in pieces:
        if merged and merged[-1][1] and is_span:
            merged[-1] = (merged[-1][0] + text, True)
        elif text:
            merged.append((text, is_span))
    return merged


def _edge_positions(
    rendered: str,
    sentinels: Sentinels,
    conversation: dict[str, Any],
    suspects: list[str],
    render: Callable[[dict[str, Any]], str],
) -> set[int]:
    """Where the first and last characters of ``suspects`` stand in the expanded text.

    A suspect that the template branches on (a schema's "type", say) changes the rendering when its
    characters are replaced: such strings are found one by one and left alone.
    """

    def probe(chosen: list[str]) -> set[int] | None:
        marks = Sentinels(sentinels.corpus + rendered)

        def mark(text: str) -> str:
            if text not in chosen:
                return text
            first = len(text) - len(text.lstrip())
            last = len(text.rstrip()) - 1
            return marks.hide(text, [(p, p + 1) for p in sorted({first, last})])

        positions: set[int] = set()
        plain: list[str] = []
        offset = 0
        with_marks = render(map_strings(conversation, mark))
        for text, is_edge in marks.split(with_marks):
            expanded = "".join(part for part, _ in sentinels.split(text))
            if is_edge:
                positions.update(range(offset, offset + len(expanded)))
            plain.append(text)
            offset += len(expanded)
        return positions if "".join(plain) == rendered else None

    found = probe(suspects)
    if found is None:
        found = set()
        for suspect in suspects:
            found |= probe([suspect]) or set()
    return found


def _encode_pieces(tokenizer: Any, guard: Guard, pieces: list[tuple[str, bool]]) -> list[int]:
    """The ids of the pieces, those of hidden spans free of added tokens."""

    def encode(text: str, split_special_tokens: bool) -> list[int]:
        encoding = tokenizer(
            text,
            add_special_tokens=False,
            split_special_tokens=split_special_tokens,
            return_attention_mask=False,
            verbose=False,  # length is judged by generate, not by the tokenizer's config
        )
        return list(encoding["input_ids"])

    def encode_inside(text: str, split_special_tokens: bool) -> list[int]:
        # Some tokenizers begin every text with a blank. Inside a conversation there is none: encode
        # behind a line break and take its ids away again.
        ids = encode("\n" + text, split_special_tokens)
        return ids[len(lead) :] if ids[: len(lead)] == lead else encode(text, split_special_tokens)

    x = encode("x", False)
    adds_blank = len(pieces) > 1 and tokenizer.decode(x + x) != "xx"
    lead = encode("\n", False) if adds_blank else []
    ids: list[int] = []
    for position, (text, is_span) in enumerate(pieces):
        inner = encode_inside if adds_blank and position else encode
        ids += guard.encode_as_text(text, inner) if is_span else inner(text, False)
    return ids
