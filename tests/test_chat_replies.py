"""Replies taken apart: thought, boxed results, tool calls."""

from __future__ import annotations

from typing import Any

import pytest
from chat_tokenizers import processor
from exafuse.text.reply import last_boxed, parse_reply, split_thinking
from exafuse.text.tool_calls import parse_tool_calls, tool_call_style
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("text", "opened", "thinking", "answer"),
    [
        ("Paris.", False, None, "Paris."),
        ("<think>\na\n</think>\n\nParis.", False, "a", "Paris."),
        ("\n<think></think>Paris.", False, "", "Paris."),
        ("a\nb\n</think>\n\nParis.", True, "a\nb", "Paris."),
        ("<think>a</think>Paris.", True, "a", "Paris."),
        ("a thought without end", True, "a thought without end", ""),
        ("<think>a thought without end", False, "a thought without end", ""),
        ("a < b </think> c", False, None, "a < b </think> c"),
        ("say <think> aloud", False, None, "say <think> aloud"),
        ("a</think>b</think>c", True, "a", "b</think>c"),
        ("", True, "", ""),
        ("", False, None, ""),
    ],
)
def test_thinking_is_split_off(text: str, opened: bool, thinking: str | None, answer: str) -> None:
    assert split_thinking(text, opened) == (thinking, answer)
    assert parse_reply(text, opened_thinking=opened).message == {
        "role": "assistant",
        "content": answer.strip(),
        **({"reasoning_content": thinking} if thinking else {}),
    }


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed{ 2 }", "2"),
        (r"\boxed {x}", "x"),
        (r"\boxed{a \{ b}", r"a \{ b"),
        (r"\boxed{a \} b}", r"a \} b"),
        (r"\boxed{\text{세 바구니}}", r"\text{세 바구니}"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"}} {\boxed{7}} {", "7"),
        (r"\\boxed{4}", None),
        (r"\boxed 5", None),
        (r"\boxed{6", None),
        ("", None),
    ],
)
def test_boxed(text: str, boxed: str | None) -> None:
    assert last_boxed(text) == boxed


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.recursive(st.sampled_from(["", "x", r"\{", "가"]), lambda inner: inner.map("{{{}}}".format))
)
def test_boxed_nests(content: str) -> None:
    assert last_boxed(f"a {{b}} \\boxed{{{content}}} c") == content


def test_boxed_is_looked_for_in_the_answer_only() -> None:
    reply = parse_reply(r"<think>\boxed{1}?</think>It is \boxed{2}.")
    assert (reply.boxed, parse_reply(r"<think>\boxed{1}").boxed) == ("2", None)


def tagged(body: str) -> str:
    return f"<tool_call>{body}</tool_call>"


CALL = '{"name": "f", "arguments": {"x": 1}}'


@pytest.mark.parametrize(
    ("text", "calls", "rest"),
    [
        (tagged(CALL), [("f", {"x": 1})], ""),
        (f"Wait.\n{tagged(CALL)}\n", [("f", {"x": 1})], "Wait.\n\n"),
        (tagged(f"\n{CALL}\n") * 3, [("f", {"x": 1})] * 3, ""),
        (tagged(f"{CALL}\n{CALL}"), [("f", {"x": 1})] * 2, ""),
        (tagged(f"[{CALL}, {CALL}]"), [("f", {"x": 1})] * 2, ""),
        (f"<tool_call>{CALL}", [("f", {"x": 1})], ""),  # the end of the turn closed it
        (
            tagged('{"name": "f", "parameters": {"x": {"y": [{}]}}}'),
            [("f", {"x": {"y": [{}]}})],
            "",
        ),
        (tagged('{"name": "f", "arguments": "{\\"x\\": 1}"}'), [("f", {"x": 1})], ""),
        (tagged('{"type": "function", "function": ' + CALL + "}"), [("f", {"x": 1})], ""),
        (tagged('{"name": "f"}'), [("f", {})], ""),
        (tagged('{"name": "f", "arguments": {"x": "a\nb"}}'), [("f", {"x": "a\nb"})], ""),
        (
            tagged('{"name": "f", "arguments": {"x": "} </tool_call> <tool_call>{"}}'),
            [("f", {"x": "} </tool_call> <tool_call>{"})],
            "",
        ),
        ("no call {here}", [], "no call {here}"),
    ],
)
def test_tagged_calls(text: str, calls: list[tuple[str, Any]], rest: str) -> None:
    parsed = parse_tool_calls(text, "tag")
    assert [(call.name, call.arguments) for call in parsed.calls] == calls
    assert (parsed.rest, parsed.malformed) == (rest, [])


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ('{"name": "f", "arguments": {"x": 1}', "expected JSON"),
        ("f(x=1)", "expected JSON"),
        ("", "got an empty tag"),
        (f"{CALL} and more", "expected JSON"),
        ('{"arguments": {}}', 'expected "name"'),
        ('{"name": 3}', 'expected "name"'),
        ('{"name": "f", "arguments": [1]}', 'expected "arguments" to be an object, got list'),
        ('{"name": "f", "arguments": "{"}', "expected JSON"),
        ("3", "expected a JSON object with a name, got int"),
        ("[" * 100_000, "nesting too deep"),
        ('{"name": "f", "arguments": {"x": ' + "9" * 5000 + "}}", "digits"),
    ],
)
def test_malformed_calls_are_reported_not_lost(body: str, reason: str) -> None:
    text = f"a {tagged(body)} b {tagged(CALL)}"
    parsed = parse_tool_calls(text, "tag")
    assert [call.name for call in parsed.calls] == ["f"]  # the next call is still read
    assert [call.text for call in parsed.malformed] == [tagged(body)]
    assert reason in parsed.malformed[0].reason
    assert parsed.rest == f"a {tagged(body)} b "
    cut_off = parse_tool_calls(f"<tool_call>{body}", "tag")
    assert cut_off.malformed
    assert cut_off.rest == f"<tool_call>{body}"


LLAMA_CALL = '{"name": "f", "parameters": {"x": {"y": 1}}}'


@pytest.mark.parametrize(
    ("text", "count", "malformed"),
    [
        (LLAMA_CALL, 1, 0),
        (f"\n<|python_tag|>{LLAMA_CALL}", 1, 0),
        (f"{LLAMA_CALL}; {LLAMA_CALL}\n{LLAMA_CALL}", 3, 0),
        (f"<|python_tag|>[{LLAMA_CALL}, {LLAMA_CALL}]", 2, 0),
        (f'{LLAMA_CALL}; {{"name": "g", "parameters": ', 1, 1),
        ('<|python_tag|>lookup.call(query="x")', 0, 1),
        ('{"name": "f", "parameters": {', 0, 1),
        ('{"degrees": 21}', 0, 0),  # an answer in JSON
        (f"I would call {LLAMA_CALL}", 0, 0),
    ],
)
def test_bare_calls(text: str, count: int, malformed: int) -> None:
    parsed = parse_tool_calls(text, "json")
    assert [call.arguments for call in parsed.calls] == [{"x": {"y": 1}}] * count
    assert len(parsed.malformed) == malformed
    assert bool(parsed.rest) == (count == 0 or malformed > 0)


def test_style_comes_from_the_template() -> None:
    expected = {"exaone4": "tag", "qwen2": "tag", "llama3": "json"}
    for family, style in expected.items():
        tokenizer = processor(family)
        found = tool_call_style(tokenizer.chat_template, tokenizer.get_added_vocab())
        assert found == style, family
    assert tool_call_style("{{ messages }}", ()) is None
    text = tagged(CALL)
    assert parse_reply(text).answer == text


def test_calls_inside_a_thought_are_not_made() -> None:
    reply = parse_reply(f"<think>maybe {tagged(CALL)}</think>No.", style="tag")
    assert (reply.tool_calls, reply.answer) == ([], "No.")
