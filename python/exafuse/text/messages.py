"""The parts of a conversation, checked and brought into the form that chat templates expect."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from exafuse.strict_json import shorten

Tool = Mapping[str, Any] | Callable[..., Any]
Message = Mapping[str, Any]

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
# A template that takes an assistant's thought from the turn's text, or from a field of its own.
_READS_THOUGHTS_RE = re.compile(r"reasoning_content|split\(\s*['\"]</think>")


def check_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as dictionaries, each with a plain role; else ``TypeError`` / ``ValueError``."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise TypeError(
            f"messages: expected a list of {{'role': ..., 'content': ...}}, got {shorten(messages)}"
        )
    if not messages:
        raise ValueError("messages: expected at least one message, got none")
    for position, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TypeError(f"messages[{position}]: expected a dict, got {shorten(message)}")
        role = message.get("role")
        # A role is structure: templates write it between control tokens, so it may not spell one.
        if not isinstance(role, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_ -]*", role):
            raise ValueError(
                f"messages[{position}]: role: expected a plain name such as 'user', "
                f"got {shorten(role)}"
            )
        _check_content(f"messages[{position}]", role, message)
    return [dict(message) for message in messages]


def _check_content(where: str, role: str, message: Message) -> None:
    content = message.get("content")
    if content is None:
        if role != "assistant":  # whose turn may consist of tool calls
            raise ValueError(
                f"{where}: expected the key 'content' in a message of role {role!r}, "
                f"got {shorten(sorted(map(str, message)))}"
            )
    elif role != "tool" and not isinstance(content, str):  # a tool may return any JSON
        if not isinstance(content, list | tuple):
            raise TypeError(f"{where}: content: expected a text or a list, got {shorten(content)}")
        if not all(isinstance(part, Mapping) for part in content):
            raise TypeError(
                f"{where}: content: expected parts such as {{'type': 'text', 'text': ...}}, "
                f"got {shorten(content)}"
            )


def tool_schemas(tools: Sequence[Tool] | None) -> list[dict[str, Any]] | None:
    """The JSON schema of every tool; None for no tools."""
    if not tools:
        return None
    if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
        raise TypeError(f"tools: expected a list of schemas or functions, got {shorten(tools)}")
    schemas: list[dict[str, Any]] = []
    for position, tool in enumerate(tools):
        if isinstance(tool, Mapping):
            schemas.append(dict(tool))
        elif inspect.isfunction(tool) or inspect.ismethod(tool):
            from transformers.utils import get_json_schema

            try:
                schemas.append(get_json_schema(tool))
            except Exception as exc:
                raise ValueError(
                    f"tools[{position}]: no JSON schema can be made from {tool.__qualname__}: {exc}"
                ) from exc
        else:
            raise TypeError(
                f"tools[{position}]: expected a JSON schema or a Python function, "
                f"got {shorten(tool)}"
            )
    return schemas


def with_thoughts_apart(
    messages: list[dict[str, Any]], tokenizer: Any, template: str
) -> list[dict[str, Any]]:
    """Moves an assistant's ``<think>...</think>`` from the turn's text to ``reasoning_content``.

    Templates that drop or re-format old thoughts look for the tag in the text; hidden behind a
    sentinel they would not find it. Only where the tag is an added token: elsewhere nothing is
    hidden.
    """
    if THINK_CLOSE not in tokenizer.get_added_vocab() or not _READS_THOUGHTS_RE.search(template):
        return messages
    result = []
    for message in messages:
        content = message.get("content")
        if (
            message["role"] == "assistant"
            and isinstance(content, str)
            and not message.get("reasoning_content")
            and THINK_CLOSE in content
        ):
            thought, _, answer = content.partition(THINK_CLOSE)
            thought = thought.lstrip().removeprefix(THINK_OPEN).strip()
            message = {**message, "content": answer.lstrip("\n"), "reasoning_content": thought}
        result.append(message)
    return result
