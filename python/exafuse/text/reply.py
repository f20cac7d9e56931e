"""A model's reply taken apart: thought, answer, tool calls, boxed result."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from exafuse.text.messages import THINK_CLOSE, THINK_OPEN
from exafuse.text.tool_calls import (
    CALL_CLOSE,
    CALL_OPEN,
    PYTHON_TAG,
    MalformedToolCall,
    ToolCall,
    ToolCallStyle,
    parse_tool_calls,
)

# Control tokens that structure a reply. Others (end of turn, padding) are not part of its text.
REPLY_MARKERS = frozenset({THINK_OPEN, THINK_CLOSE, CALL_OPEN, CALL_CLOSE, PYTHON_TAG})
_BRACES_RE = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)


@dataclass(frozen=True)
class Reply:
    """What the model said.

    ``text``: everything, markers included. ``thinking``: the thought, None if there was none; still
    set, with an empty ``answer``, when the reply ended before the thought did. ``answer``: the rest
    without the tool calls. ``boxed``: the content of the last ``\\boxed{...}`` of the answer.
    ``malformed_tool_calls``: calls that could not be read; their text stays in ``answer``.
    ``finished``: the reply ended by itself, with an end-of-turn id or a stop string; False if a
    length limit or the end of the context cut it off. ``ids``: the new token ids.
    """

    text: str
    thinking: str | None
    answer: str
    tool_calls: list[ToolCall]
    boxed: str | None
    malformed_tool_calls: list[MalformedToolCall] = field(default_factory=list)
    finished: bool = True
    ids: list[int] = field(default_factory=list)

    @property
    def message(self) -> dict[str, Any]:
        """The assistant's turn, to append to the conversation."""
        message: dict[str, Any] = {"role": "assistant", "content": self.answer}
        if self.thinking:
            message["reasoning_content"] = self.thinking
        if self.tool_calls:
            message["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.tool_calls
            ]
        return message


def parse_reply(
    text: str,
    *,
    style: ToolCallStyle | None = None,
    opened_thinking: bool = False,
    finished: bool = True,
    ids: Sequence[int] = (),
) -> Reply:
    """``text`` taken apart. ``opened_thinking``: the prompt ended inside an open ``<think>``."""
    thinking, rest = split_thinking(text, opened_thinking)
    parsed = parse_tool_calls(rest, style)
    answer = parsed.rest.strip()
    return Reply(
        text=text,
        thinking=thinking,
        answer=answer,
        tool_calls=parsed.calls,
        boxed=last_boxed(answer),
        malformed_tool_calls=parsed.malformed,
        finished=finished,
        ids=list(ids),
    )


def split_thinking(text: str, opened: bool = False) -> tuple[str | None, str]:
    """(thought or None, the text behind it). A thought that never ends takes everything."""
    if not opened:
        if not text.lstrip().startswith(THINK_OPEN):
            return None, text
        text = text.lstrip()
    # A model may write the tag although the prompt has opened the thought already.
    thought, _, rest = text.lstrip().removeprefix(THINK_OPEN).partition(THINK_CLOSE)
    return thought.strip(), rest.lstrip()


def last_boxed(text: str) -> str | None:
    """The content of the last complete ``\\boxed{...}``, braces inside it balanced; None if there
    is none. ``\\{`` and ``\\}`` are text."""
    open_braces: list[tuple[int, bool]] = []
    best: tuple[int, str] | None = None
    for match in _BRACES_RE.finditer(text):
        token = match.group()
        if token.endswith("{") and (token == "{" or token.startswith("\\boxed")):
            open_braces.append((match.end(), token != "{"))
        elif token == "}" and open_braces:
            start, is_box = open_braces.pop()
            if is_box and (best is None or start > best[0]):
                best = start, text[start : match.start()]
    return best[1].strip() if best else None


def hidden_ids(tokenizer: Any) -> frozenset[int]:
    """The special tokens that are not part of a reply's text."""
    return frozenset(
        index
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special and token.content not in REPLY_MARKERS
    )


def reply_text(tokenizer: Any, ids: Sequence[int], hidden: Collection[int]) -> str:
    """The decoded reply: markers of thought and tool calls kept, other control tokens left out."""
    text = tokenizer.decode(
        [index for index in ids if index not in hidden],
        skip_special_tokens=False,
        clean_up_tokenization_spaces=False,
    )
    return str(text)
