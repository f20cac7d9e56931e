"""Small checkpoints that answer: a random model of each family, trained for a second on a few
questions, so that its replies are sure of themselves, end, think and call a tool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import chat_tokenizers
import head_cases
import tiny_models
import torch
import transformers
import vision_checkpoint
from torch import Tensor

CAPITAL = [{"role": "user", "content": "Which city is the capital of Korea?"}]
LARGER = [{"role": "user", "content": "Which is larger, 3.12 or 3.9?"}]
WEATHER = [{"role": "user", "content": "What is the weather in Seoul?"}]
PLAIN = "Plants make sugar out of"
CALL = {"name": "get_weather", "arguments": {"city": "Seoul"}}
RESULT = [
    {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]},
    {"role": "tool", "name": "get_weather", "content": '{"degrees": 21}'},
]


def get_weather(city: str) -> dict:
    """Tells the weather of a city.

    Args:
        city: The city's name.
    """
    raise NotImplementedError(city)


SCHEMA = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
SAID_CALL = """<tool_call>
{"name": "get_weather", "arguments": {"city": "Seoul"}}
</tool_call>"""
# Messages, what the template is told beside them, and the reply.
CONVERSATIONS: tuple[tuple[list[dict[str, Any]], dict[str, Any], str], ...] = (
    (CAPITAL, {}, "It is Seoul."),
    (WEATHER, {"tools": [SCHEMA]}, SAID_CALL),
    (LARGER, {"enable_thinking": True}, "0.9 is more than 0.12.\n</think>\n\n3.9 is larger."),
    (LARGER, {"enable_thinking": False}, "3.9"),
    (WEATHER, {"tools": [get_weather]}, SAID_CALL),
    (WEATHER + RESULT, {"tools": [get_weather]}, "It has 21 degrees."),
)
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "intermediate_size": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    },
    "qwen2": {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    "exaone4": {
        "num_hidden_layers": 4,
        "sliding_window": 24,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
    },
}
HEADS = ("causal_lm", "sequence_classification", "token_classification", "question_answering")
FRONT_ENDS = {"llama": "llama3", "qwen2": "qwen2", "exaone4": "exaone4"}


def save(family: str, folder: Path) -> Path:
    """A checkpoint of ``llama``, ``qwen2`` or ``exaone4`` that answers CONVERSATIONS, or, but for
    ``exaone4``, whose template has all that they ask for, the first two."""
    chat_tokenizers.save_family(FRONT_ENDS[family], folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = tiny_models.build(
        family,
        vocab_size=len(tokenizer),
        max_position_embeddings=4096,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        **CONFIGS[family],
    )
    samples = []
    for messages, options, reply in CONVERSATIONS[: None if family == "exaone4" else 2]:
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", **options
        )
        samples.append((dict(prompt), reply + tokenizer.eos_token))
    samples.append((dict(tokenizer(PLAIN, return_tensors="pt")), " light." + tokenizer.eos_token))
    train(model, tokenizer, samples)
    model.save_pretrained(folder)
    return folder


def save_heads(family: str, folder: Path) -> dict[str, str]:
    """Random models of a family, with the tokenizer of it: folders by the head they have."""
    folders = {}
    for kind in HEADS:
        folders[kind] = str(folder / kind)
        chat_tokenizers.save_family(FRONT_ENDS[family], folder / kind)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / kind)
        sizes = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        head_cases.build(family, kind, **sizes).save_pretrained(folder / kind)
    return folders


def save_seeing(folder: Path, media: Sequence[tuple[Mapping[str, Any], str]]) -> Path:
    """An EXAONE 4.5 checkpoint that says something about each part of a message in ``media``, an
    image or a video with its question.

    Needs torchvision: its processor is transformers' own.
    """
    vision_checkpoint.save_model(folder)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    samples = []
    for number, (part, question) in enumerate(media):
        content = [part, {"type": "text", "text": question}]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        reply = f"It is number {number}.\n</think>\n\nA {part['type']}.<|endofturn|>"
        samples.append((dict(prompt), reply))
    train(model, processor.tokenizer, samples)
    model.save_pretrained(folder)
    return folder


def train(
    model: transformers.PreTrainedModel,
    tokenizer: Any,
    samples: Sequence[tuple[dict[str, Tensor], str]],
) -> None:
    """Until every token of every reply has a probability above 0.98; on sdpa, in place."""
    model.set_attn_implementation("sdpa")
    said = [tokenizer(text, add_special_tokens=False).input_ids for _, text in samples]
    rows = [
        torch.cat([prompt["input_ids"][0], torch.tensor(reply)])
        for (prompt, _), reply in zip(samples, said, strict=True)
    ]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    labels = torch.full_like(ids, -100)
    for row, reply in enumerate(said):
        end = len(rows[row])
        labels[row, end - len(reply) : end] = torch.tensor(reply)
    names = sorted({name for prompt, _ in samples for name in pictures(prompt)})
    media = {n: torch.cat([p[n] for p, _ in samples if n in p]) for n in names}
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    for _ in range(120):
        logits = model(input_ids=ids, **media, use_cache=False).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), labels[:, 1:], reduction="none"
        )
        if float(losses.detach().max()) < 0.02:
            model.eval()
            return
        optimizer.zero_grad()
        (losses.sum() / (labels >= 0).sum()).backward()
        optimizer.step()
    raise AssertionError(f"the small model did not learn its replies: loss {losses.max():.3f}")


def pictures(prompt: Mapping[str, Tensor]) -> set[str]:
    """The keys of a prompt that hold pictures."""
    return {name for name in prompt if "pixel" in name or "grid" in name}
