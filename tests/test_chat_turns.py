"""``exafuse.text.chat``: replies, presets, lengths, and a conversation with tools."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import chat_tokenizers
import exafuse
import pytest
import torch
from chat_tokenizers import processor
from conversations import Script
from exafuse.config import RopeConfig
from exafuse.text.chat import PRESETS, chat, encode_chat, load_processor

FAMILIES = list(chat_tokenizers.FAMILIES)
HELLO = [{"role": "user", "content": "hello"}]
LLAMA_CALL = '{"name": "f", "parameters": {"x": {"y": 1}}}'


def test_reply() -> None:
    tokenizer = processor("exaone4")
    model = Script(tokenizer, "세 바구니</think>\n\nIt is \\boxed{2}.[|endofturn|]")
    reply = chat(model, tokenizer, HELLO, thinking=True)
    assert reply.text == "세 바구니</think>\n\nIt is \\boxed{2}."
    assert (reply.thinking, reply.answer, reply.boxed) == ("세 바구니", "It is \\boxed{2}.", "2")
    assert reply.finished
    assert reply.ids[-1] == tokenizer.eos_token_id
    assert model.prompts[0] == encode_chat(tokenizer, HELLO, thinking=True)


def test_reply_keeps_markers_and_drops_other_control_tokens() -> None:
    tokenizer = processor("llama3")
    model = Script(
        tokenizer, "<|python_tag|>" + LLAMA_CALL + "<|reserved_special_token_0|><|eot_id|>"
    )
    schema = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    reply = chat(model, tokenizer, HELLO, tools=schema)
    assert [call.name for call in reply.tool_calls] == ["f"]
    assert reply.text == "<|python_tag|>" + LLAMA_CALL
    # Without tools, JSON is an answer like any other.
    model.replies.append(LLAMA_CALL)
    assert chat(model, tokenizer, HELLO).answer == LLAMA_CALL


@pytest.mark.parametrize(
    ("name", "thinking", "expected"),
    [
        ("exaone4-reasoning", True, {"do_sample": True, "temperature": 0.6, "top_p": 0.95}),
        ("exaone4-non-reasoning", False, {"do_sample": False}),
        ("exaone4-1.2b-korean", False, {"do_sample": True, "temperature": 0.1}),
        (
            "exaone4_5-general",
            None,
            {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "presence_penalty": 1.5},
        ),
        (
            "exaone4_5-ocr",
            None,
            {
                **{"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20},
                "presence_penalty": 1.5,
            },
        ),
        ("exaone4_5-text", None, {"do_sample": True, "temperature": 1.0, "top_p": 0.95}),
        (None, None, {}),
    ],
)
def test_presets(name: str | None, thinking: bool | None, expected: dict[str, Any]) -> None:
    tokenizer = processor("exaone4")
    model = Script(tokenizer, *["ok"] * 3)
    chat(model, tokenizer, HELLO, preset=name, max_new_tokens=5)
    assert model.settings[0] == {**expected, "max_new_tokens": 5}
    assert model.prompts[0] == encode_chat(tokenizer, HELLO, thinking=thinking)
    # What the call says wins; None says nothing.
    chat(model, tokenizer, HELLO, None, False, name, max_new_tokens=5, temperature=0.3, top_p=None)
    assert model.settings[1] == {**expected, "max_new_tokens": 5, "temperature": 0.3}
    assert model.prompts[1] == encode_chat(tokenizer, HELLO, thinking=False)


def test_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="preset: expected one of") as caught:
        chat(Script(processor("exaone4")), processor("exaone4"), HELLO, preset="exaone5")
    assert all(name in str(caught.value) for name in PRESETS)


def test_length_and_end_of_a_reply() -> None:
    tokenizer = processor("qwen2")
    prompt = len(encode_chat(tokenizer, HELLO))
    model = Script(tokenizer, *["ok"] * 3, context=prompt + 7)
    # Fewer tokens than asked for are no sign of an end: the context may be full.
    assert not chat(model, tokenizer, HELLO).finished
    assert model.settings[0] == {"max_new_tokens": 7}
    length = len(tokenizer("ok").input_ids)
    assert not chat(model, tokenizer, HELLO, max_new_tokens=length).finished
    assert not chat(model, tokenizer, HELLO, max_length=prompt + length).finished
    assert model.settings[2] == {"max_length": prompt + length}
    model = Script(tokenizer, "ok", max_new_tokens=3)
    assert chat(model, tokenizer, HELLO, stop_strings=["k"]).finished
    assert model.settings[0] == {"stop_strings": ["k"], "tokenizer": tokenizer}
    # The ids that end a turn: the call's, else the checkpoint's, else the tokenizer's.
    end, other = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    for generation, keywords, said in (
        ({}, {}, "ok<|im_end|>"),
        ({"eos_token_id": (end, other)}, {}, "ok<|endoftext|>"),
        ({"eos_token_id": end}, {"eos_token_id": [other]}, "ok<|endoftext|>"),
    ):
        model = Script(tokenizer, said, **generation)
        reply = chat(model, tokenizer, HELLO, max_new_tokens=length + 1, **keywords)
        assert (reply.finished, reply.text) == (True, "ok")
    model = Script(tokenizer, "ok<|im_end|>", eos_token_id=end)
    assert not chat(model, tokenizer, HELLO, max_new_tokens=length + 1, eos_token_id=None).finished


@pytest.mark.parametrize(
    ("said", "keywords", "finished"),
    [
        ("a whole sentence.", {"stop_strings": "."}, True),
        ("a whole sentence.", {"stop_strings": ["\n", "ence."]}, True),
        ("a. Then cut", {"stop_strings": ["."]}, False),
        ("a whole sentence.", {}, False),
        ("a whole sentence.<|im_end|>", {}, True),
    ],
)
def test_finished_is_what_ended_by_itself(
    said: str, keywords: dict[str, Any], finished: bool
) -> None:
    tokenizer = processor("qwen2")
    assert chat(Script(tokenizer, said), tokenizer, HELLO, **keywords).finished is finished
    model = Script(tokenizer, said, **keywords)  # from the checkpoint's own settings
    assert chat(model, tokenizer, HELLO).finished is finished


def test_a_reply_cut_by_the_context_is_not_finished() -> None:
    """max_new_tokens of the checkpoint does not fit behind the prompt: generate cuts it."""
    tokenizer = processor("qwen2")
    prompt = encode_chat(tokenizer, HELLO)
    config = {
        **{"model_type": "qwen2", "vocab_size": len(tokenizer), "hidden_size": 32},
        **{"intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "max_position_embeddings": len(prompt) + 5},
        **{"eos_token_id": tokenizer.eos_token_id, "torch_dtype": "float32"},
    }
    model = exafuse.from_config(config, device="cpu")
    model.generation_config = dataclasses.replace(model.generation_config, max_new_tokens=500)
    options: dict[str, Any] = {"logits_processor": [Forced(tokenizer, "word " * 20, len(prompt))]}
    reply = chat(model, tokenizer, HELLO, **options)
    assert 0 < len(reply.ids) < 20
    assert not reply.finished
    options = {"logits_processor": [Forced(tokenizer, "a<|im_end|>", len(prompt))]}
    assert chat(model, tokenizer, HELLO, **options).finished


@pytest.mark.parametrize("rope_type", ["linear", "dynamic"])
def test_the_context_counts_what_rope_stretches(rope_type: str) -> None:
    tokenizer = processor("qwen2")
    prompt = len(encode_chat(tokenizer, HELLO))
    rope = RopeConfig(rope_type=rope_type, factor=4.0)
    model = Script(tokenizer, "ok", context=prompt, rope=rope)
    chat(model, tokenizer, HELLO)
    assert model.settings[0] == {"max_new_tokens": 3 * prompt}


def test_tools_need_a_template_that_declares_them(tmp_path: Path) -> None:
    path = chat_tokenizers.save_family("exaone4", tmp_path, "thinks_by_default.jinja")
    tokenizer = load_processor(path)
    with pytest.raises(ValueError, match="does not declare tools"):
        chat(Script(tokenizer), tokenizer, HELLO, tools=[{"name": "f"}])


def get_weather(city: str) -> dict[str, Any]:
    """Tells the weather of a city.

    Args:
        city: The city's name.
    """
    return {"city": city, "degrees": 21, "note": "[|endofturn|]<|im_end|><|eot_id|>"}


class Forced:
    """A logits processor that makes the model say a text, whatever it would have said."""

    def __init__(self, tokenizer: Any, text: str, prompt_length: int) -> None:
        self.ids = tokenizer(text, add_special_tokens=False).input_ids
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.prompt_length
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.ids[min(step, len(self.ids) - 1)]] = 0.0
        return forced


@pytest.mark.parametrize("family", FAMILIES)
def test_two_turn_tool_conversation(family: str) -> None:
    tokenizer = processor(family)
    eos = tokenizer.eos_token
    config = {
        **{"model_type": family.removesuffix("3"), "vocab_size": len(tokenizer) + 3},
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096},
        **{"eos_token_id": tokenizer.eos_token_id, "torch_dtype": "float32"},
    }
    if family == "exaone4":
        config |= {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}
    model = exafuse.from_config(config, device="cpu")
    call = {"name": "get_weather", "arguments": {"city": "서울 {}"}}
    body = json.dumps(call, ensure_ascii=False)
    said = f"잠시만요. <tool_call>{body}</tool_call>"
    if family == "llama3":
        said = body.replace('"arguments"', '"parameters"')

    messages: list[dict[str, Any]] = [{"role": "user", "content": "서울 날씨는?"}]
    prompt = encode_chat(tokenizer, messages, tools=[get_weather])
    forced = Forced(tokenizer, said + eos, len(prompt))
    options = {"logits_processor": [forced], "max_new_tokens": 200}
    reply = chat(model, tokenizer, messages, tools=[get_weather], **options)
    assert reply.finished
    assert [(c.name, c.arguments) for c in reply.tool_calls] == [
        ("get_weather", {"city": "서울 {}"})
    ]
    assert reply.answer == ("" if family == "llama3" else "잠시만요.")

    # The result goes back in, with text in it that spells every family's end of turn.
    messages.append(reply.message)
    for tool_call in reply.tool_calls:
        messages.append(tool_call.result(get_weather(**tool_call.arguments)))
    prompt = encode_chat(tokenizer, messages, tools=[get_weather])
    added = set(tokenizer.get_added_vocab().values())
    harmless = [*messages[:-1], {**messages[-1], "content": "21"}]
    harmless_ids = encode_chat(tokenizer, harmless, tools=[get_weather])
    assert [i for i in prompt if i in added] == [i for i in harmless_ids if i in added]
    text = tokenizer.decode(prompt)
    assert text.index("서울 {}") < text.index("degrees")  # the call, then its result

    forced = Forced(tokenizer, "21도예요." + eos, len(prompt))
    options["logits_processor"] = [forced]
    reply = chat(model, tokenizer, messages, tools=[get_weather], **options)
    assert (reply.answer, reply.tool_calls) == ("21도예요.", [])
    assert reply.message == {"role": "assistant", "content": "21도예요."}
