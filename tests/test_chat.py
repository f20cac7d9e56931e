"""Prompt ids equal those of transformers; thinking; malformed conversations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import chat_tokenizers
import fetch_smollm2
import pytest
from chat_tokenizers import controls, decode, processor
from conversations import PLAIN_TEXT, SCHEMA, SETTINGS, conversations
from exafuse import TemplateError
from exafuse.text.chat import encode_chat, load_processor
from exafuse.text.template import render_chat
from hypothesis import given
from hypothesis import strategies as st

FAMILIES = list(chat_tokenizers.FAMILIES)


def reference_ids(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=False, add_generation_prompt=True, **options
    )
    return ids


def get_weather(city: str, days: int = 1) -> str:
    """Tells the weather.

    Args:
        city: Where, in any language.
        days: How far ahead.
    """
    return f"{city}: {days}"


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_equal_transformers(family: str) -> None:
    tokenizer = processor(family)
    added = tuple(tokenizer.get_added_vocab())

    @SETTINGS
    @given(
        conversations(PLAIN_TEXT.filter(lambda text: not any(token in text for token in added))),
        st.sampled_from([None, [SCHEMA], [get_weather], [SCHEMA, get_weather]]),
        st.sampled_from([None, False, *([True] if family == "exaone4" else [])]),
    )
    def check(messages: list[dict[str, Any]], tools: Any, thinking: bool | None) -> None:
        named = {} if thinking is None else {"enable_thinking": thinking}
        before = json.dumps(messages)
        ids = encode_chat(tokenizer, messages, tools=tools, thinking=thinking)
        assert ids == reference_ids(tokenizer, messages, tools=tools, **named)
        assert json.dumps(messages) == before

    check()


def test_no_second_bos() -> None:
    tokenizer = processor("llama3")
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id  # the tokenizer adds one itself
    ids = encode_chat(tokenizer, [{"role": "user", "content": "<|begin_of_text|>"}])
    assert ids.count(tokenizer.bos_token_id) == 1


def test_thinking() -> None:
    hello = [{"role": "user", "content": "hello"}]
    off = "[|assistant|]\n<think>\n\n</think>\n\n"
    for value, ending in ((None, off), (False, off), (True, "[|assistant|]\n<think>\n")):
        prompt = render_chat(processor("exaone4"), hello, thinking=value)
        assert prompt.text.endswith(ending)
        assert prompt.opens_thinking is (value is True)
    default_on = processor("thinks_by_default")
    assert render_chat(default_on, hello).opens_thinking
    assert render_chat(default_on, hello, thinking=True).opens_thinking
    assert not render_chat(default_on, hello, thinking=False).opens_thinking
    # What a user writes never counts as the template's own tag.
    tag = [{"role": "user", "content": "<think>"}]
    assert not render_chat(processor("qwen2"), tag).opens_thinking
    with pytest.raises(ValueError, match="no thinking mode"):
        encode_chat(processor("qwen2"), hello, thinking=True)
    with pytest.raises(TypeError, match="expected True, False or None"):
        encode_chat(processor("exaone4"), hello, thinking="yes")  # type: ignore[arg-type]


def test_a_template_that_always_thinks_cannot_be_told_not_to(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}<think>\n"
    tokenizer = load_processor(chat_tokenizers.save_family("exaone4", tmp_path, template))
    assert render_chat(tokenizer, [{"role": "user", "content": "a"}]).opens_thinking
    with pytest.raises(TemplateError, match="cannot be told not to think"):
        encode_chat(tokenizer, [{"role": "user", "content": "a"}], thinking=False)


def test_old_thoughts_reach_the_template_as_thoughts() -> None:
    """An assistant's <think> block is structure to templates that look for it: they drop it from
    earlier turns, as they do when transformers renders."""
    tokenizer = processor("exaone4")
    said = "<think>\nthree of five [|endofturn|]\n</think>\n\nTwo baskets."
    messages = [
        {"role": "user", "content": "How many?"},
        {"role": "assistant", "content": said},
        {"role": "user", "content": "And apples?"},
    ]
    assert encode_chat(tokenizer, messages) == reference_ids(tokenizer, messages)
    last = render_chat(tokenizer, messages[:2], add_generation_prompt=False)
    assert last.text.endswith(f"[|assistant|]\n{said}[|endofturn|]\n")
    assert controls(tokenizer, last.ids)[-4:] == [
        *("[|assistant|]", "<think>", "</think>", "[|endofturn|]")
    ]


@pytest.mark.parametrize(
    ("messages", "error", "match"),
    [
        ([], ValueError, "at least one message"),
        ("hello", TypeError, "expected a list"),
        ({"role": "user", "content": "a"}, TypeError, "expected a list"),
        (["hello"], TypeError, r"messages\[0\]: expected a dict"),
        ([{"content": "a"}], ValueError, r"messages\[0\]: role"),
        ([{"role": "<|im_end|>", "content": "a"}], ValueError, "plain name"),
        ([{"role": "user\n", "content": "a"}], ValueError, "plain name"),
        ([{"role": "stranger", "content": "a"}], TemplateError, "unknown role stranger"),
        ([{"role": "user"}], ValueError, r"messages\[0\]: expected the key 'content'"),
        ([{"role": "user", "content": 3}], TypeError, "expected a text or a list, got 3"),
        ([{"role": "user", "content": ["a"]}], TypeError, "expected parts such as"),
    ],
)
def test_malformed_conversations(messages: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        encode_chat(processor("exaone4"), messages)


def test_malformed_tools() -> None:
    hello = [{"role": "user", "content": "hello"}]

    def undocumented(x: int) -> int:
        return x

    for tools, error, match in (
        ([undocumented], ValueError, r"tools\[0\]: no JSON schema can be made from .*undocumented"),
        ([print], TypeError, r"tools\[0\]: expected a JSON schema or a Python function"),
        ({"name": "f"}, TypeError, "expected a list"),
    ):
        with pytest.raises(error, match=match):
            encode_chat(processor("exaone4"), hello, tools=tools)  # type: ignore[arg-type]


def test_real_tokenizer() -> None:
    """SmolLM2's tokenizer and template."""
    folder = fetch_smollm2.DEFAULT_FOLDER
    if not fetch_smollm2.is_complete(folder):
        pytest.skip(f"no SmolLM2 checkpoint in {folder}; make demo fetches it")
    tokenizer = load_processor(folder)
    messages = [
        {"role": "system", "content": "짧게 대답하세요. 🦭"},
        {"role": "user", "content": "What is the capital of France? <|im_ end|> 1 < 2 [x]"},
        {"role": "assistant", "content": "  Paris.\n"},
        {"role": "user", "content": chat_tokenizers.TEXT},
    ]
    assert encode_chat(tokenizer, messages) == reference_ids(tokenizer, messages)
    for token in tokenizer.get_added_vocab():
        hostile = [{"role": "user", "content": f"a {token}\n{token}b"}]
        ids = encode_chat(tokenizer, hostile)
        assert controls(tokenizer, ids) == ["<|im_start|>", "<|im_end|>"] * 2 + ["<|im_start|>"]
        assert f"a {token}\n{token}b" in decode(tokenizer, ids)
