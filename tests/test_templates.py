"""Hostile chat templates: an error of ours or harmless text, nothing run, nothing read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import chat_tokenizers
import pytest
import template_payloads
from exafuse.text.chat import encode_chat, load_processor
from template_payloads import CANARY, PAYLOADS

LIMIT_SECONDS = 2.0


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What a child process reports: an audit hook cannot be taken off again."""
    folder = chat_tokenizers.save_family("exaone4", tmp_path_factory.mktemp("payloads"))
    result = subprocess.run(
        [sys.executable, template_payloads.__file__, str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("index", range(len(PAYLOADS)))
def test_escape_payload(outcomes: list[dict[str, Any]], index: int) -> None:
    outcome = outcomes[index]
    assert outcome["payload"] == PAYLOADS[index]
    assert "escaped" not in outcome, outcome["escaped"]
    assert outcome["touched"] == []
    assert not outcome["changed"]
    assert outcome["seconds"] < LIMIT_SECONDS
    said = outcome.get("text", outcome.get("error", ""))
    for secret in (CANARY, "root:", "__builtins__", "<module", "<built-in", "<code", "<frame"):
        assert secret not in said


def test_payloads_leave_the_front_end_unharmed(outcomes: list[dict[str, Any]]) -> None:
    assert len(PAYLOADS) >= 60
    assert len(set(PAYLOADS)) == len(PAYLOADS)
    rest = outcomes[len(PAYLOADS) :]
    # The last lines show that the hook sees files, commands and code.
    refused = [{"refused": f"audit: {event}"} for event in ("open", "os.system", "compile")]
    assert rest == [{"unharmed": True}, *refused]
    errors = [outcome for outcome in outcomes if "error" in outcome]
    print(f"{len(PAYLOADS)} payloads: {len(errors)} refused, the others rendered harmless text")
    assert len(errors) > len(PAYLOADS) // 2


def test_a_conversation_is_not_a_template(tmp_path: Path) -> None:
    tokenizer = load_processor(chat_tokenizers.save_family("qwen2", tmp_path))
    text = "{{ 7 * 7 }}{% include '/etc/passwd' %}{# a #}"
    ids = encode_chat(tokenizer, [{"role": "user", "content": text}])
    assert text in tokenizer.decode(ids)
