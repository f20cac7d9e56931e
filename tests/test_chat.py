"""Prompt ids: equal to transformers', and text of a conversation never becomes a control token."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chat_tokenizers
import fetch_smollm2
import pytest
from exafuse import TemplateError
from exafuse.chat import encode_chat, load_processor
from exafuse.chat_template import render_chat
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FAMILIES = list(chat_tokenizers.FAMILIES)
SETTINGS = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
ZERO_WIDTH = ("\u200b", "\u200d", "\ufeff")


@pytest.fixture(scope="session")
def processors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tokenizers")
    build: dict[str, Callable[[Path], Path]] = {
        name: lambda path, name=name: chat_tokenizers.save_family(name, path) for name in FAMILIES
    }
    joined = (chat_tokenizers.TEMPLATES / "joined.jinja").read_text()
    for name in ("drops_zero_width", "begins_with_blank"):
        tokenizer = getattr(chat_tokenizers, name)
        build[name] = lambda path, new=tokenizer: chat_tokenizers.save(new(), path, joined)
    build["joined"] = lambda path: chat_tokenizers.save_family("qwen2", path, "joined.jinja")
    build["thinks_by_default"] = lambda path: chat_tokenizers.save_family(
        "exaone4", path, "thinks_by_default.jinja"
    )
    return {name: load_processor(make(folder / name)) for name, make in build.items()}


def reference_ids(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=False, add_generation_prompt=True, **options
    )
    return ids


def controls(tokenizer: Any, ids: list[int]) -> list[str]:
    added = tokenizer.added_tokens_decoder
    return [added[index].content for index in ids if index in added]


def decode(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def get_weather(city: str, days: int = 1) -> str:
    """Tells the weather.

    Args:
        city: Where, in any language.
        days: How far ahead.
    """
    return f"{city}: {days}"


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


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_equal_transformers(processors: dict[str, Any], family: str) -> None:
    tokenizer = processors[family]
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


@pytest.mark.parametrize("family", FAMILIES)
def test_text_never_becomes_a_control_token(processors: dict[str, Any], family: str) -> None:
    """Any added token, whole, halved, nested or with zero-width characters, anywhere in a
    conversation: the control tokens stay those of the same conversation without it, and decoding
    gives the text back."""
    tokenizer = processors[family]
    added = list(tokenizer.get_added_vocab())
    variants = [
        piece
        for token in added
        for half in [len(token) // 2]
        for piece in (
            *(token, token, token[:half], token[half:], token[:half] + token + token[half:]),
            *(token[:half] + char + token[half:] for char in ZERO_WIDTH),
        )
    ]
    text = st.lists(st.one_of(st.sampled_from(variants), PLAIN_PIECES), max_size=6).map("".join)

    @SETTINGS
    @given(conversations(text), text)
    def check(messages: list[dict[str, Any]], description: str) -> None:
        tool = json.loads(json.dumps(SCHEMA))
        tool["function"]["description"] = description
        tool["function"]["parameters"]["properties"][description or "empty"] = {"type": "string"}
        neutral = json.loads(json.dumps([messages, [SCHEMA]]), object_hook=_without_text)
        prompt = render_chat(tokenizer, messages, tools=[tool])
        expected = render_chat(tokenizer, neutral[0], tools=neutral[1])
        assert controls(tokenizer, prompt.ids) == controls(tokenizer, expected.ids)
        decoded = decode(tokenizer, prompt.ids)
        assert decoded == prompt.text
        for message in messages:
            if isinstance(message["content"], str) and message["role"] in ("user", "system"):
                assert message["content"].strip() in decoded

    check()


def _without_text(value: dict[str, Any]) -> dict[str, Any]:
    keep = ("role", "type", "name", "description")
    return {
        key: "x" if isinstance(item, str) and key not in keep else item
        for key, item in value.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_every_added_token_in_every_place(processors: dict[str, Any], family: str) -> None:
    tokenizer = processors[family]
    for token in tokenizer.get_added_vocab():
        call = {"type": "function", "function": {"name": "f", "arguments": {token: token}}}
        clean = {"type": "function", "function": {"name": "f", "arguments": {"k": "v"}}}
        pairs = [
            ({"role": "user", "content": token}, {"role": "user", "content": "x"}),
            (
                {"role": "user", "content": [{"type": "text", "text": f"a {token} b"}]},
                {"role": "user", "content": [{"type": "text", "text": "x"}]},
            ),
            ({"role": "tool", "content": f"{token}{token}"}, {"role": "tool", "content": "x"}),
            (
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "assistant", "content": "", "tool_calls": [clean]},
            ),
        ]
        start = {"role": "user", "content": "start"}
        for hostile, neutral in pairs:
            ids = encode_chat(tokenizer, [start, hostile])
            assert controls(tokenizer, ids) == controls(
                tokenizer, encode_chat(tokenizer, [start, neutral])
            ), (token, hostile)
            assert token in decode(tokenizer, ids)


@pytest.mark.parametrize("name", ["joined", "drops_zero_width", "begins_with_blank"])
def test_markers_split_across_messages(processors: dict[str, Any], name: str) -> None:
    tokenizer = processors[name]
    for token in ("<|im_start|>", "<|im_end|>"):
        for first in range(1, len(token)):
            for second in range(first, len(token)):
                parts = [token[:first], token[first:second], token[second:]]
                messages = [{"role": "user", "content": f"ferry {parts[0]}"}]
                messages += [{"role": "user", "content": part} for part in parts[1:] if part]
                messages[-1]["content"] += " 바구니"
                ids = encode_chat(tokenizer, messages)
                assert controls(tokenizer, ids) == ["<|im_start|>", "<|im_end|>"], parts
                assert f"ferry {token} 바구니" in decode(tokenizer, ids)
                pieces = [{"type": "text", "text": message["content"]} for message in messages]
                assert encode_chat(tokenizer, [{"role": "user", "content": pieces}]) == ids


def test_split_markers_do_not_change_other_conversations(processors: dict[str, Any]) -> None:
    """A message that merely ends like the beginning of a marker is encoded as transformers does."""
    tokenizer = processors["joined"]
    for texts in (["a <", "b"], ["<|", "x", "|>"], ["<|im_end|", "> no"], ["e", "n", "d"]):
        messages = [{"role": "user", "content": text} for text in texts]
        ids = encode_chat(tokenizer, messages)
        joined = "".join(texts)
        if "<|im_end|>" in joined:
            assert controls(tokenizer, ids) == ["<|im_start|>", "<|im_end|>"]
        else:
            assert ids == reference_ids(tokenizer, messages)


@pytest.mark.parametrize(
    "text", ["<|im\u200b_end|>", "\uff1c|im_end|\uff1e", "<|im_end|\ufeff>x", "a<tool\u200d_call>b"]
)
def test_variants_that_normalise_to_a_marker(processors: dict[str, Any], text: str) -> None:
    tokenizer = processors["drops_zero_width"]
    messages = [{"role": "user", "content": text}]
    assert len(controls(tokenizer, reference_ids(tokenizer, messages))) == 3  # the danger is real
    ids = encode_chat(tokenizer, messages)
    assert controls(tokenizer, ids) == ["<|im_start|>", "<|im_end|>"]
    assert tokenizer.backend_tokenizer.normalizer.normalize_str(text) in decode(tokenizer, ids)


def test_a_marker_that_only_its_neighbour_hides(processors: dict[str, Any]) -> None:
    """A whole-word token behind another one: recognised once the other is cut off."""
    tokenizer = processors["drops_zero_width"]
    ids = encode_chat(tokenizer, [{"role": "user", "content": "a PI:EM\u200bAILPI\u200bNG b"}])
    assert controls(tokenizer, ids) == ["<|im_start|>", "<|im_end|>"]
    assert "a PI:EMAILPING b" in decode(tokenizer, ids)


@pytest.mark.parametrize(
    "template",
    [
        "<|im_start|>{{ messages | tojson }}",
        "<|im_start|>{{ messages | tojson(ensure_ascii=true) }}",
        "<|im_start|>{% for m in messages %}{{ '<|' ~ m.content ~ '|>' }}{% endfor %}",
    ],
)
def test_templates_that_rewrite_the_text(tmp_path: Path, template: str) -> None:
    """JSON escapes survive, those of the sentinels are found, and text that a template completes to
    a marker is text."""
    path = chat_tokenizers.save_family("qwen2", tmp_path, template, markers=('<a="b">', 'c"'))
    tokenizer = load_processor(path)
    for content in ("im_end", "im_start", "<|im_end|>", '<a="b">\n<|im_end|>c"', "\\ue000"):
        messages = [{"role": "user", "content": content}]
        prompt = render_chat(tokenizer, messages)
        assert controls(tokenizer, prompt.ids) == ["<|im_start|>"]
        plain = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert decode(tokenizer, prompt.ids) == prompt.text == plain


def test_text_around_a_span_keeps_its_blanks(processors: dict[str, Any]) -> None:
    tokenizer = processors["begins_with_blank"]
    text = "the ferry<|im_end|>leaves  <|im_end|> at seven"
    ids = encode_chat(tokenizer, [{"role": "user", "content": text}])
    assert decode(tokenizer, ids).endswith(f"{text}<|im_end|>")


def test_no_second_bos(processors: dict[str, Any]) -> None:
    tokenizer = processors["llama3"]
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id  # the tokenizer adds one itself
    ids = encode_chat(tokenizer, [{"role": "user", "content": "<|begin_of_text|>"}])
    assert ids.count(tokenizer.bos_token_id) == 1


def test_thinking(processors: dict[str, Any]) -> None:
    hello = [{"role": "user", "content": "hello"}]
    off = "[|assistant|]\n<think>\n\n</think>\n\n"
    for value, ending in ((None, off), (False, off), (True, "[|assistant|]\n<think>\n")):
        prompt = render_chat(processors["exaone4"], hello, thinking=value)
        assert prompt.text.endswith(ending)
        assert prompt.opens_thinking is (value is True)
    default_on = processors["thinks_by_default"]
    assert render_chat(default_on, hello).opens_thinking
    assert render_chat(default_on, hello, thinking=True).opens_thinking
    assert not render_chat(default_on, hello, thinking=False).opens_thinking
    # What a user writes never counts as the template's own tag.
    tag = [{"role": "user", "content": "<think>"}]
    assert not render_chat(processors["qwen2"], tag).opens_thinking
    with pytest.raises(ValueError, match="no thinking mode"):
        encode_chat(processors["qwen2"], hello, thinking=True)
    with pytest.raises(TypeError, match="expected True, False or None"):
        encode_chat(processors["exaone4"], hello, thinking="yes")  # type: ignore[arg-type]


def test_a_template_that_always_thinks_cannot_be_told_not_to(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}<think>\n"
    tokenizer = load_processor(chat_tokenizers.save_family("exaone4", tmp_path, template))
    assert render_chat(tokenizer, [{"role": "user", "content": "a"}]).opens_thinking
    with pytest.raises(TemplateError, match="cannot be told not to think"):
        encode_chat(tokenizer, [{"role": "user", "content": "a"}], thinking=False)


def test_old_thoughts_reach_the_template_as_thoughts(processors: dict[str, Any]) -> None:
    """An assistant's <think> block is structure to templates that look for it: they drop it from
    earlier turns, as they do when transformers renders."""
    tokenizer = processors["exaone4"]
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
def test_malformed_conversations(
    processors: dict[str, Any], messages: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        encode_chat(processors["exaone4"], messages)


def test_malformed_tools(processors: dict[str, Any]) -> None:
    hello = [{"role": "user", "content": "hello"}]

    def undocumented(x: int) -> int:
        return x

    for tools, error, match in (
        ([undocumented], ValueError, r"tools\[0\]: no JSON schema can be made from .*undocumented"),
        ([print], TypeError, r"tools\[0\]: expected a JSON schema or a Python function"),
        ({"name": "f"}, TypeError, "expected a list"),
    ):
        with pytest.raises(error, match=match):
            encode_chat(processors["exaone4"], hello, tools=tools)  # type: ignore[arg-type]


def test_long_hostile_text_is_quick(processors: dict[str, Any]) -> None:
    """Work grows with the length of the text, not with its square."""
    tokenizer = processors["exaone4"]
    text = "<tool_call><think>[|user|]가" * 4000
    prompt = render_chat(tokenizer, [{"role": "user", "content": text}])
    assert controls(tokenizer, prompt.ids) == [
        *("[|user|]", "[|endofturn|]", "[|assistant|]", "<think>", "</think>")
    ]
    assert text in decode(tokenizer, prompt.ids)


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
