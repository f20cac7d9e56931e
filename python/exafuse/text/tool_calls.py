"""Tool calls in a model's reply, found by the markers that its chat template uses.

Two notations are known: JSON between ``<tool_call>`` and ``</tool_call>`` (EXAONE 4, Qwen2.5), and
the bare JSON of Llama 3.x, ``{"name": ..., "parameters": {...}}``, optionally behind
``<|python_tag|>``. A call that cannot be read is reported, never dropped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container
from dataclasses import dataclass
from typing import Any, Literal

ToolCallStyle = Literal["tag", "json"]

CALL_OPEN, CALL_CLOSE, PYTHON_TAG = "<tool_call>", "</tool_call>", "<|python_tag|>"
_BLANK_RE = re.compile(r"\s*")
_SEPARATOR_RE = re.compile(r"[\s;]*")
# What begins like a call, even if it does not parse.
_CALL_START_RE = re.compile(r'\{\s*"(?:name|function|type)"\s*:')
# Python's own limit on the digits of an integer raises ValueError; control characters inside a
# string, which models do write, are accepted.
_DECODER = json.JSONDecoder(strict=False)


@dataclass(frozen=True)
class ToolCall:
    """One call that the model asks for."""

    name: str
    arguments: dict[str, Any]

    def result(self, value: Any) -> dict[str, Any]:
        """The ``tool`` message that answers this call: ``value`` as text, else as JSON."""
        content = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        return {"role": "tool", "name": self.name, "content": content}


@dataclass(frozen=True)
class MalformedToolCall:
    """A call that cannot be read: its text, and why."""

    text: str
    reason: str


@dataclass(frozen=True)
class ParsedCalls:
    """``rest`` is the reply without the calls that were read; malformed ones stay in it."""

    calls: list[ToolCall]
    malformed: list[MalformedToolCall]
    rest: str


def tool_call_style(template: str, added_tokens: Container[str]) -> ToolCallStyle | None:
    """Which notation a chat template makes its model use; None if it knows of no tools."""
    if CALL_OPEN in template:
        return "tag"
    if PYTHON_TAG in template or ("parameters" in template and PYTHON_TAG in added_tokens):
        return "json"
    return None


def parse_tool_calls(text: str, style: ToolCallStyle | None) -> ParsedCalls:
    """The calls in the answer part of a reply, in order."""
    if style == "tag":
        return _parse_tagged(text)
    if style == "json":
        return _parse_bare(text)
    return ParsedCalls([], [], text)


def _parse_tagged(text: str) -> ParsedCalls:
    calls: list[ToolCall] = []
    malformed: list[MalformedToolCall] = []
    rest: list[str] = []
    position = 0
    while (start := text.find(CALL_OPEN, position)) >= 0:
        rest.append(text[position:start])
        body = start + len(CALL_OPEN)
        try:
            found, position = _read_tag_body(text, body)
            calls += found
        except (ValueError, RecursionError) as exc:
            position = _end_of_tag(text, body)
            malformed.append(MalformedToolCall(text[start:position], _reason(exc)))
            rest.append(text[start:position])
    return ParsedCalls(calls, malformed, "".join([*rest, text[position:]]))


def _read_tag_body(text: str, position: int) -> tuple[list[ToolCall], int]:
    """The calls from ``position`` up to the closing tag, and where the tag ends. Reading JSON value
    by value, a closing tag inside a string is text. At the end of the reply no tag is needed."""
    calls: list[ToolCall] = []
    position = _skip(_BLANK_RE, text, position)
    while not text.startswith(CALL_CLOSE, position):
        if position == len(text) and calls:
            return calls, position
        value, position = _DECODER.raw_decode(text, position)
        calls += _calls_of(value)
        position = _skip(_BLANK_RE, text, position)
    if not calls:
        raise ValueError("expected a JSON object, got an empty tag")
    return calls, position + len(CALL_CLOSE)


def _end_of_tag(text: str, body: int) -> int:
    close, following = text.find(CALL_CLOSE, body), text.find(CALL_OPEN, body)
    if close >= 0 and (following < 0 or close < following):
        return close + len(CALL_CLOSE)
    return following if following >= 0 else len(text)


def _parse_bare(text: str) -> ParsedCalls:
    """Llama 3: the whole reply is calls, or none of it is."""
    tagged = text.lstrip().startswith(PYTHON_TAG)
    body = text.lstrip().removeprefix(PYTHON_TAG) if tagged else text
    position = _skip(_SEPARATOR_RE, body, 0)
    if not tagged and not _CALL_START_RE.match(body, position):
        return ParsedCalls([], [], text)
    calls: list[ToolCall] = []
    try:
        while position < len(body):
            value, position = _DECODER.raw_decode(body, position)
            calls += _calls_of(value)
            position = _skip(_SEPARATOR_RE, body, position)
        if not calls:
            raise ValueError("expected a JSON object, got nothing behind the marker")
    except (ValueError, RecursionError) as exc:
        unread = body[position:] or text
        return ParsedCalls(calls, [MalformedToolCall(unread.strip(), _reason(exc))], unread)
    return ParsedCalls(calls, [], "")


def _calls_of(value: Any) -> list[ToolCall]:
    """One JSON value as calls: an object, one in OpenAI's ``function`` wrapping, or a list."""
    if isinstance(value, list):
        return [call for item in value for call in _calls_of(item)]
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object with a name, got {type(value).__name__}")
    name = value.get("name")
    if not isinstance(name, str) or not name:
        raise ValueError('expected "name" with the name of a tool')
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        arguments = json.loads(arguments, strict=False)
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise ValueError(f'expected "arguments" to be an object, got {type(arguments).__name__}')
    return [ToolCall(name, arguments)]


def _skip(pattern: re.Pattern[str], text: str, position: int) -> int:
    match = pattern.match(text, position)
    return match.end() if match else position


def _reason(exc: Exception) -> str:
    if isinstance(exc, json.JSONDecodeError):
        return f"expected JSON, got text that is not at character {exc.pos} ({exc.msg})"
    return "expected JSON, got nesting too deep" if isinstance(exc, RecursionError) else str(exc)
