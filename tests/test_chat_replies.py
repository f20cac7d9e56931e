"""Replies: thought, tool calls, boxed results, presets, streaming; a conversation with tools."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import chat_tokenizers
import exafuse
import pytest
import torch
from exafuse.chat import PRESETS, ReplyStreamer, chat, encode_chat, load_processor
from exafuse.chat_reply import last_boxed, parse_reply, split_thinking
from exafuse.tool_calls import parse_tool_calls, tool_call_style
from hypothesis import given, settings
from hypothesis import strategies as st

FAMILIES = list(chat_tokenizers.FAMILIES)


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("reply_tokenizers")
    return {
        name: load_processor(chat_tokenizers.save_family(name, folder / name)) for name in FAMILIES
    }


class Script:
    """Stands in for a model: its replies are written down, its prompts and settings are kept."""

    device = torch.device("cpu")

    def __init__(
        self, tokenizer: Any, *replies: str, context: int = 4096, **generation: Any
    ) -> None:
        self.tokenizer = tokenizer
        self.replies = list(replies)
        self.prompts: list[list[int]] = []
        self.settings: list[dict[str, Any]] = []
        self.config = SimpleNamespace(max_position_embeddings=context)
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


HELLO = [{"role": "user", "content": "hello"}]

# ---- thought and boxed result ----------------------------------------------------------------


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


# ---- tool calls ------------------------------------------------------------------------------


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


def test_style_comes_from_the_template(tokenizers: dict[str, Any]) -> None:
    expected = {"exaone4": "tag", "qwen2": "tag", "llama3": "json"}
    for family, style in expected.items():
        tokenizer = tokenizers[family]
        found = tool_call_style(tokenizer.chat_template, tokenizer.get_added_vocab())
        assert found == style, family
    assert tool_call_style("{{ messages }}", ()) is None
    text = tagged(CALL)
    assert parse_reply(text).answer == text


def test_calls_inside_a_thought_are_not_made() -> None:
    reply = parse_reply(f"<think>maybe {tagged(CALL)}</think>No.", style="tag")
    assert (reply.tool_calls, reply.answer) == ([], "No.")


# ---- chat ------------------------------------------------------------------------------------


def test_reply(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["exaone4"]
    model = Script(tokenizer, "세 바구니</think>\n\nIt is \\boxed{2}.[|endofturn|]")
    reply = chat(model, tokenizer, HELLO, thinking=True)
    assert reply.text == "세 바구니</think>\n\nIt is \\boxed{2}."
    assert (reply.thinking, reply.answer, reply.boxed) == ("세 바구니", "It is \\boxed{2}.", "2")
    assert reply.finished
    assert reply.ids[-1] == tokenizer.eos_token_id
    assert model.prompts[0] == encode_chat(tokenizer, HELLO, thinking=True)


def test_reply_keeps_markers_and_drops_other_control_tokens(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["llama3"]
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
def test_presets(
    tokenizers: dict[str, Any], name: str | None, thinking: bool | None, expected: dict[str, Any]
) -> None:
    tokenizer = tokenizers["exaone4"]
    model = Script(tokenizer, *["ok"] * 3)
    chat(model, tokenizer, HELLO, preset=name, max_new_tokens=5)
    assert model.settings[0] == {**expected, "max_new_tokens": 5}
    assert model.prompts[0] == encode_chat(tokenizer, HELLO, thinking=thinking)
    # What the call says wins; None says nothing.
    chat(model, tokenizer, HELLO, None, False, name, max_new_tokens=5, temperature=0.3, top_p=None)
    assert model.settings[1] == {**expected, "max_new_tokens": 5, "temperature": 0.3}
    assert model.prompts[1] == encode_chat(tokenizer, HELLO, thinking=False)


def test_unknown_preset_lists_the_known_ones(tokenizers: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="preset: expected one of") as caught:
        chat(Script(tokenizers["exaone4"]), tokenizers["exaone4"], HELLO, preset="exaone5")
    assert all(name in str(caught.value) for name in PRESETS)


def test_length_and_end_of_a_reply(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["qwen2"]
    prompt = len(encode_chat(tokenizer, HELLO))
    model = Script(tokenizer, *["ok"] * 3, context=prompt + 7)
    assert chat(model, tokenizer, HELLO).finished  # generation stopped early: a stop string, say
    assert model.settings[0] == {"max_new_tokens": 7}
    length = len(tokenizer("ok").input_ids)
    assert not chat(model, tokenizer, HELLO, max_new_tokens=length).finished
    assert not chat(model, tokenizer, HELLO, max_length=prompt + length).finished
    assert model.settings[2] == {"max_length": prompt + length}
    model = Script(tokenizer, "ok", max_new_tokens=3)
    chat(model, tokenizer, HELLO, stop_strings=["k"])
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


def test_tools_need_a_template_that_declares_them(tmp_path: Path) -> None:
    path = chat_tokenizers.save_family("exaone4", tmp_path, "thinks_by_default.jinja")
    tokenizer = load_processor(path)
    with pytest.raises(ValueError, match="does not declare tools"):
        chat(Script(tokenizer), tokenizer, HELLO, tools=[{"name": "f"}])


# ---- a conversation with tools, by a model ---------------------------------------------------


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
def test_two_turn_tool_conversation(tokenizers: dict[str, Any], family: str) -> None:
    tokenizer = tokenizers[family]
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
    said = (
        body.replace('"arguments"', '"parameters"')
        if family == "llama3"
        else f"잠시만요. {tagged(body)}"
    )

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


# ---- streaming -------------------------------------------------------------------------------


def stream(tokenizer: Any, text: str, opened: bool = False, **options: Any) -> list[str]:
    written: list[str] = []
    streamer = ReplyStreamer(tokenizer, written.append, **options)
    for _ in range(2):  # a streamer is ready for the next reply after end()
        written.clear()
        prompt = "<think>\n" if opened else "[|assistant|]\n"
        streamer.put(tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids)
        for index in tokenizer(text, add_special_tokens=False).input_ids:
            streamer.put(torch.tensor([index]))
        streamer.end()
    return written


@settings(max_examples=150, deadline=None, derandomize=True)
@given(text=st.text(st.sampled_from("가나다라마바사닭 뷁힣🦭é<>/think|\n "), max_size=30))
def test_streamed_pieces_are_whole_characters(tokenizers: dict[str, Any], text: str) -> None:
    """Syllables and emoji are several tokens each here; no piece ends inside one."""
    written = stream(tokenizers["qwen2"], text)
    assert "".join(written) == text
    assert not any("\ufffd" in piece for piece in written)


def test_text_is_streamed_as_soon_as_it_is_certain(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["exaone4"]
    text = "갈매기들이 뷁 등대를 지나 🦭 따라온다."
    pieces = stream(tokenizer, f"{text}[|endofturn|]")
    assert "".join(pieces) == text
    ids = tokenizer(text, add_special_tokens=False).input_ids
    whole = {tokenizer.decode(ids[:k]) for k in range(len(ids) + 1)}
    whole = {prefix for prefix in whole if not prefix.endswith("\ufffd")}
    assert {"".join(pieces[:k]) for k in range(len(pieces) + 1)} == whole


def test_streamed_bytes_that_are_no_text(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["exaone4"]
    written: list[str] = []
    streamer = ReplyStreamer(tokenizer, written.append)
    broken = tokenizer("뷁", add_special_tokens=False).input_ids[:1]
    ids = [*broken, *tokenizer(" ok", add_special_tokens=False).input_ids, *broken]
    streamer.put(torch.tensor([[0]]))
    for index in ids:
        streamer.put(torch.tensor([index]))
    streamer.end()
    assert "".join(written) == tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("text", "opened", "dimmed", "hidden"),
    [
        ("<think>\na\n</think>\n\nb", False, "\x1b[2m\na\n\x1b[0m\n\nb", "b"),
        ("a\n</think>\n\nb</think>", True, "\x1b[2ma\n\x1b[0m\n\nb</think>", "b</think>"),
        ("unfinished </thi", True, "\x1b[2munfinished </thi\x1b[0m", ""),
        ("<thing", False, "<thing", "<thing"),
        ("a <think> b", False, "a <think> b", "a <think> b"),
        ("", False, "", ""),
    ],
)
def test_streamed_thought(
    tokenizers: dict[str, Any], text: str, opened: bool, dimmed: str, hidden: str
) -> None:
    for family in ("exaone4", "qwen2"):  # the tags are one token each, or several
        if family == "qwen2" and opened:
            continue
        tokenizer = tokenizers[family]
        assert "".join(stream(tokenizer, text, opened)) == text
        assert "".join(stream(tokenizer, text, opened, thinking="dim")) == dimmed
        assert "".join(stream(tokenizer, text, opened, thinking="hide")) == hidden


def test_streamer_arguments(tokenizers: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tokenizers["qwen2"]
    with pytest.raises(ValueError, match="expected 'show', 'dim' or 'hide'"):
        ReplyStreamer(tokenizer, thinking="no")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected one conversation, got 2 rows"):
        ReplyStreamer(tokenizer).put(torch.zeros(2, 3, dtype=torch.int64))
    chat(Script(tokenizer, "감<|im_end|>"), tokenizer, HELLO, streamer=ReplyStreamer(tokenizer))
    assert capsys.readouterr().out == "감"
