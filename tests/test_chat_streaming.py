"""Streaming a reply: whole characters, as soon as they are certain; the thought shown or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chat_tokenizers import processor
from conversations import Script
from exafuse.text.chat import ReplyStreamer, chat
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import byte_fallback, byte_level

HELLO = [{"role": "user", "content": "hello"}]
TINY = {"byte_fallback": byte_fallback(), "byte_level": byte_level()}


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
def test_streamed_pieces_are_whole_characters(text: str) -> None:
    """Syllables and emoji are several tokens each here; no piece ends inside one."""
    written = stream(processor("qwen2"), text)
    assert "".join(written) == text
    assert not any("\ufffd" in piece for piece in written)


@pytest.mark.parametrize("kind", [*TINY, "begins_with_blank"])
def test_neighbours_spelled_in_bytes_stay_whole(kind: str) -> None:
    """A run of bytes is text or not as a whole; what was written of it must not spoil the rest."""
    tokenizer = TINY.get(kind) or processor(kind)
    runs = 0

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(text=st.text(st.sampled_from("가나뷁힣🦭🧭é ab\n"), max_size=20))
    def check(text: str) -> None:
        nonlocal runs
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert "\ufffd" not in tokenizer.decode(ids)
        pieces = stream(tokenizer, text)
        assert "".join(pieces) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert not any("\ufffd" in piece for piece in pieces)
        runs += len(pieces) > 2

    check()
    assert runs > 50  # the text comes in pieces, not in one at the end
    assert "".join(stream(tokenizer, "a가나b")) == "a가나b"


def test_a_broken_byte_behind_a_character_spoils_nothing_else() -> None:
    tokenizer = TINY["byte_fallback"]
    whole = tokenizer("a가", add_special_tokens=False).input_ids
    broken = tokenizer.convert_tokens_to_ids("<0xEB>")
    written: list[str] = []
    streamer = ReplyStreamer(tokenizer, written.append)
    streamer.put(torch.tensor([[0]]))
    for index in [*whole, broken, *tokenizer("b c", add_special_tokens=False).input_ids]:
        streamer.put(torch.tensor([index]))
    streamer.end()
    assert "".join(written) == "a가\ufffd b c"


def test_text_is_streamed_as_soon_as_it_is_certain() -> None:
    tokenizer = processor("exaone4")
    text = "갈매기들이 뷁 등대를 지나 🦭 따라온다."
    pieces = stream(tokenizer, f"{text}[|endofturn|]")
    assert "".join(pieces) == text
    ids = tokenizer(text, add_special_tokens=False).input_ids
    whole = {tokenizer.decode(ids[:k]) for k in range(len(ids) + 1)}
    whole = {prefix for prefix in whole if not prefix.endswith("\ufffd")}
    assert {"".join(pieces[:k]) for k in range(len(pieces) + 1)} == whole


def test_streamed_bytes_that_are_no_text() -> None:
    tokenizer = processor("exaone4")
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
def test_streamed_thought(text: str, opened: bool, dimmed: str, hidden: str) -> None:
    for family in ("exaone4", "qwen2"):  # the tags are one token each, or several
        if family == "qwen2" and opened:
            continue
        tokenizer = processor(family)
        assert "".join(stream(tokenizer, text, opened)) == text
        assert "".join(stream(tokenizer, text, opened, thinking="dim")) == dimmed
        assert "".join(stream(tokenizer, text, opened, thinking="hide")) == hidden


def test_streamer_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = processor("qwen2")
    with pytest.raises(ValueError, match="expected 'show', 'dim' or 'hide'"):
        ReplyStreamer(tokenizer, thinking="no")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected one conversation, got 2 rows"):
        ReplyStreamer(tokenizer).put(torch.zeros(2, 3, dtype=torch.int64))
    chat(Script(tokenizer, "감<|im_end|>"), tokenizer, HELLO, streamer=ReplyStreamer(tokenizer))
    assert capsys.readouterr().out == "감"
