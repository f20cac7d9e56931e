"""Folders of tiny transformers models that can be talked to."""

from __future__ import annotations

from pathlib import Path

import chat_tokenizers
import drop_in_cases

# The families of weights, and whose tokenizer and chat template stands beside them.
CHATS = {"llama": "llama3", "qwen2": "qwen2", "exaone4": "exaone4"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def make_chat_folder(folder: Path, family: str) -> Path:
    """Weights, tokenizer and template; random words, which hardly ever come to an end."""
    chat_tokenizers.save_family(CHATS[family], folder)
    tokenizer = chat_tokenizers.processor(CHATS[family])
    size = max(tokenizer.get_vocab().values()) + 1
    model = drop_in_cases.build(
        family,
        vocab_size=size,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_position_embeddings=2048,
    )
    model.save_pretrained(folder)
    return folder
