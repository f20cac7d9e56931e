"""How EXAONE replies are taken apart by transformers: into thinking, tool calls and an answer.

transformers' server and ``tokenizer.parse_response`` read a description of a family's replies from
``tokenizer.response_template``. Checkpoints of EXAONE 4.0 and 4.5 ship none, and transformers has
none to fall back on, so that a call would stay text.
"""

from __future__ import annotations

import copy
from typing import Any

MODEL_TYPES = ("exaone4", "exaone4_5")
# A call is taken for one when all of it is there: one that the length limit cuts, or that has
# another shape, stays text, because transformers makes an error of the whole reply of it.
_STRING = r'"(?:\\.|[^"\\<]|<(?!/tool_call>))*+"'
_OBJECT = r"(?P<object>\{(?:[^{}\"<]|" + _STRING + r"|(?&object))*+\})"
_CALL = r'\s*<tool_call>(?=\s*\{\s*"name"\s*:\s*' + _STRING + r'\s*,\s*"arguments"\s*:\s*' + _OBJECT
_CALL += r"\s*\}\s*</tool_call>)"
_END = r"\s*(?:\[\|endofturn\|\]|<\|endofturn\|>)"
# Both families: thinking ends with </think> and is opened by the prompt, a call is JSON in tags.
_EXAONE: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": ["[|assistant|]\n", "<|assistant|>\n"],
    "fields": {
        "reasoning_content": {
            "open": "<think>",
            "close_pattern": r"</think>\s*|" + _END,  # blank lines are no part of the answer
            "content": "text",
        },
        "tool_calls": {
            "open_pattern": _CALL,
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {
            "close_pattern": _END,
            "content": "text",
        },
    },
}


def add_response_template(processor: Any, model_type: str) -> None:
    """Give the tokenizer of an EXAONE checkpoint, or of its processor, a ``response_template``; one
    that it has stays, and other models' tokenizers are left alone."""
    tokenizer = getattr(processor, "tokenizer", processor)
    if model_type in MODEL_TYPES and getattr(tokenizer, "response_template", None) is None:
        tokenizer.response_template = copy.deepcopy(_EXAONE)
