"""Generated conversations for the chat tests, and a model that follows a script."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from exafuse.config import RopeConfig
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

SETTINGS = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)

SCHEMA = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": 'Finds a "word" in <a dictionary>\nor \\u003c not | at all [.',
        "parameters": {
            "type": "object",
            "properties": {"text": {"type": "string"}, "낱말": {"type": "string"}},
            "required": ["text"],
        },
    },
}

# Words, punctuation that also begins or ends markers, blanks, what JSON escapes, private use.
PLAIN_PIECES = st.sampled_from(
    [
        *("ferry", "바구니", "감을 샀다.", "x", "im_end", "user", "endofturn", "think", "🦭", "é"),
        *("<", ">", "|", "[", "]", "<|", "|>", "[|", "|]", "</", "\\", '"', "'", "{", "}", "&lt;"),
        *(" ", "  ", "\n", "\n\n", "\t", "\ue000", "\uf8ff", "\U000f0000", "\\ue000", "\\n", "7"),
    ]
)
PLAIN_TEXT = st.lists(PLAIN_PIECES, max_size=8).map("".join)


def conversations(text: st.SearchStrategy[str]) -> st.SearchStrategy[list[dict[str, Any]]]:
    """System, user, assistant, a call and its result, in the orders that templates accept."""

    @st.composite
    def build(draw: Callable[..., Any]) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        if draw(st.booleans()):
            messages.append({"role": "system", "content": draw(text)})
        for _ in range(draw(st.integers(1, 3))):
            parts = draw(st.lists(text, min_size=1, max_size=3))
            content = [{"type": "text", "text": part} for part in parts]
            messages.append({"role": "user", "content": content if len(parts) > 1 else parts[0]})
            if draw(st.booleans()):
                function = {"name": "lookup", "arguments": {draw(text): draw(text), "n": 3}}
                call = {"type": "function", "function": function}
                messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
                messages.append({"role": "tool", "content": draw(text)})
            if draw(st.booleans()):
                messages.append({"role": "assistant", "content": draw(text)})
        return messages

    return build()


class Script:
    """Stands in for a model: its replies are written down, its prompts and settings are kept."""

    device = torch.device("cpu")

    def __init__(
        self,
        tokenizer: Any,
        *replies: str,
        context: int = 4096,
        rope: RopeConfig | None = None,
        **generation: Any,
    ) -> None:
        self.tokenizer = tokenizer
        self.replies = list(replies)
        self.prompts: list[list[int]] = []
        self.settings: list[dict[str, Any]] = []
        self.config = SimpleNamespace(max_position_embeddings=context, rope=rope or RopeConfig())
        self.generation_config = SimpleNamespace(**generation)

    def generate(self, input_ids: torch.Tensor, **keywords: Any) -> torch.Tensor:
        assert torch.equal(keywords.pop("attention_mask"), torch.ones_like(input_ids))
        streamer = keywords.pop("streamer")
        self.prompts.append(input_ids[0].tolist())
        self.settings.append(keywords)
        reply = self.tokenizer(self.replies.pop(0), add_special_tokens=False, return_tensors="pt")
        if streamer is not None:
            streamer.put(input_ids)
            for index in reply.input_ids[0]:
                streamer.put(index.reshape(1))
            streamer.end()
        return torch.cat([input_ids, reply.input_ids], dim=1)
