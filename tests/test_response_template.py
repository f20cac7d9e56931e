"""EXAONE replies as transformers takes them apart, for its server: whole, and as they stream."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import chat_tokenizers
import pytest
import vision_checkpoint
from exafuse.text.response_template import add_response_template
from transformers import AutoTokenizer

parsing = pytest.importorskip(
    "transformers.utils.chat_parsing", reason="this transformers takes no replies apart"
)

HELLO = [{"role": "user", "content": "Hello <think> [|assistant|]"}]
CALL = '<tool_call>{"name": "f", "arguments": {"x": [1, "}\\""], "y": {}}}</tool_call>'
SAID = {"name": "f", "arguments": {"x": [1, '}"'], "y": {}}}
# A reply after a prompt that opens the thinking or closes it; thinking, answer, calls.
REPLIES: dict[str, tuple[bool, str, str | None, str | None, int]] = {
    "answer": (False, "3.9 is larger.", None, "3.9 is larger.", 0),
    "thinking": (True, "So.\n</think>\n\n3.9 is larger.", "So.", "3.9 is larger.", 0),
    "still thinking": (True, "So it", "So it", None, 0),
    "call": (False, CALL, None, None, 1),
    "thinking, call": (True, "So.\n</think>\n\n" + CALL, "So.", None, 1),
    "text, two calls": (False, f"Wait.\n{CALL}\n{CALL}", None, "Wait.", 2),
    "call over lines": (False, CALL.replace("{", "\n{ ", 1), None, None, 1),
    "cut": (False, CALL[:30], None, CALL[:30], 0),
    "no JSON": (False, "a <tool_call>{b</tool_call> c", None, "a <tool_call>{b</tool_call> c", 0),
    "no object": (False, '<tool_call>["f"]</tool_call>', None, '<tool_call>["f"]</tool_call>', 0),
    "no name": (False, "<tool_call>{}</tool_call>", None, "<tool_call>{}</tool_call>", 0),
}


@pytest.fixture(scope="module", params=["exaone4", "exaone4_5"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "exaone4":
        chat_tokenizers.save_family("exaone4", folder)
    else:
        vision_checkpoint.save_front_end(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    add_response_template(tokenizer, request.param)
    return tokenizer


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("name", REPLIES)
def test_reply(tokenizer: Any, name: str, ended: bool) -> None:
    thinks, reply, thinking, answer, calls = REPLIES[name]
    prompt = tokenizer.apply_chat_template(
        HELLO, add_generation_prompt=True, tokenize=False, enable_thinking=thinks
    )
    said = reply + (tokenizer.eos_token if ended else "")
    ids = tokenizer(said, add_special_tokens=False).input_ids
    parsed = tokenizer.parse_response(ids, prefix=prompt)
    found = [call["function"] for call in parsed.get("tool_calls", [])]
    assert found == [SAID] * calls
    assert (parsed.get("reasoning_content") or "").strip() == (thinking or "")
    assert parsed.get("content") == answer

    stream = parsing.ResponseParser(tokenizer.response_template, prefix=prompt)
    events = [event for character in said for event in stream.feed(character)]
    events += stream.finalize()[1]
    pieces = [e for e in events if e["type"] == "region_chunk" and e["field"] == "content"]
    assert "".join(piece["text"] for piece in pieces) == (answer or "")
    closed = [e for e in events if e["type"] == "region_close" and e["field"] == "tool_calls"]
    assert [json.loads(json.dumps(e["value"]["function"])) for e in closed] == [SAID] * calls


def test_other_tokenizers_are_left_alone(tmp_path: Path) -> None:
    for name, model_type in (("qwen2", "qwen2"), ("llama3", "llama")):
        tokenizer = AutoTokenizer.from_pretrained(chat_tokenizers.save_family(name, tmp_path))
        add_response_template(tokenizer, model_type)
        assert tokenizer.response_template is None
    own = tokenizer.response_template = {"defaults": {}, "fields": {}}
    add_response_template(tokenizer, "exaone4")
    assert tokenizer.response_template is own
