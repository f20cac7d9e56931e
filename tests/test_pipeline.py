"""pipeline("text-generation") over patched models and over attn_implementation="exafuse": the words
of the plain pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import exafuse
import pytest
import torch
from chat_folders import CHATS, WEATHER, make_chat_folder
from exafuse.integrations import patching
from exafuse.integrations.transformers import register
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, pipeline

NEW_TOKENS = 10
GREEDY = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
TALK = [
    {"role": "system", "content": "Answer briefly."},
    {"role": "user", "content": "How many apples are left in the baskets?"},
]
TURNS = [
    *TALK,
    {"role": "assistant", "content": "Seven."},
    {"role": "user", "content": "Show the steps."},
]
PROMPTS = ["It rained all week;", "The ferry leaves the harbour at seven, and the gulls", "서울의"]


@pytest.fixture(scope="module", params=list(CHATS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_folder(tmp_path_factory.mktemp(request.param), request.param)


def by_patch(folder: Path) -> Any:
    model = exafuse.patch(AutoModelForCausalLM.from_pretrained(folder))
    return pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(folder))


def by_name(folder: Path) -> Any:
    with exafuse.patched_transformers():
        return pipeline("text-generation", model=str(folder), device_map="cpu")


def by_attention(folder: Path) -> Any:
    options = {"attn_implementation": register()}
    return pipeline("text-generation", model=str(folder), model_kwargs=options)


WAYS: dict[str, Callable[[Path], Any]] = {
    "patch": by_patch,
    "patched_transformers": by_name,
    "attn_implementation": by_attention,
}


@pytest.fixture(scope="module")
def plain(folder: Path) -> Any:
    return pipeline("text-generation", model=str(folder))


@pytest.fixture(scope="module", params=list(WAYS))
def ours(request: pytest.FixtureRequest, folder: Path) -> Any:
    pipe = WAYS[request.param](folder)
    assert pipe.model.config._attn_implementation == "exafuse"
    assert patching.is_patched(pipe.model) == (request.param != "attn_implementation")
    return pipe


@contextmanager
def counted(ours: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of our attention functions as they are called."""
    from exafuse import ops

    called: list[str] = []
    for name in ("flash_attn_func", "flash_attn_with_kvcache"):
        original = getattr(ops, name)

        def call(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            called.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(ops, name, call)
    yield called


def test_plain_prompts(ours: Any, plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with counted(ours, monkeypatch) as called:
        results = ours(PROMPTS[0], **GREEDY), ours(PROMPTS[1], return_full_text=False, **GREEDY)
    expected = plain(PROMPTS[0], **GREEDY), plain(PROMPTS[1], return_full_text=False, **GREEDY)
    assert results == expected
    assert results[0][0]["generated_text"].startswith(PROMPTS[0])
    assert len(called) >= ours.model.config.num_hidden_layers


@pytest.mark.parametrize("messages", [TALK, TURNS], ids=["talk", "turns"])
def test_messages(ours: Any, plain: Any, messages: Any) -> None:
    result = ours(messages, **GREEDY)
    assert result == plain(messages, **GREEDY)
    answer = result[0]["generated_text"]
    assert answer[:-1] == messages
    assert answer[-1]["role"] == "assistant"
    assert answer[-1]["content"]


@pytest.mark.parametrize("batch_size", [2, 3])
def test_batches_are_padded_on_the_left(ours: Any, plain: Any, batch_size: int) -> None:
    """Prompts of different lengths, and conversations, a few at a time."""
    for pipe in (ours, plain):
        pipe.tokenizer.padding_side = "left"
    for inputs in (PROMPTS, [TALK, TURNS, TALK[1:]]):
        batched = ours(inputs, batch_size=batch_size, **GREEDY)
        assert batched == plain(inputs, batch_size=batch_size, **GREEDY)
        assert batched == [ours(one, **GREEDY) for one in inputs]


def test_generators_and_several_answers(ours: Any, plain: Any) -> None:
    lazily = [result[0]["generated_text"] for result in ours((p for p in PROMPTS), **GREEDY)]
    assert lazily == [plain(prompt, **GREEDY)[0]["generated_text"] for prompt in PROMPTS]
    options = {"num_beams": 3, "num_return_sequences": 2, **GREEDY}
    beams = ours(PROMPTS[0], **options)
    assert beams == plain(PROMPTS[0], **options)
    assert len(beams) == 2


def test_drawn_answers_with_the_same_seed(ours: Any, plain: Any) -> None:
    texts = []
    for pipe in (ours, plain):
        torch.manual_seed(5)
        texts.append(pipe(TALK, max_new_tokens=NEW_TOKENS, do_sample=True, temperature=0.8))
    assert texts[0] == texts[1]


def test_tools_and_a_streamer(ours: Any, plain: Any, capsys: pytest.CaptureFixture[str]) -> None:
    expected = plain(TALK, tools=[WEATHER], **GREEDY)
    capsys.readouterr()
    streamer = TextStreamer(ours.tokenizer, skip_prompt=True, skip_special_tokens=True)
    result = ours(TALK, tools=[WEATHER], streamer=streamer, **GREEDY)
    assert result == expected
    assert capsys.readouterr().out.strip() == result[0]["generated_text"][-1]["content"].strip()


def test_a_static_cache_and_a_presence_penalty(ours: Any, plain: Any) -> None:
    static = {"cache_implementation": "static", "disable_compile": True, **GREEDY}
    assert ours(TALK, **static) == plain(TALK, **GREEDY)
    penalty = exafuse.PresencePenalty
    penalised = ours(TALK, logits_processor=[penalty(1.9)], **GREEDY)
    assert penalised == plain(TALK, logits_processor=[penalty(1.9)], **GREEDY)
