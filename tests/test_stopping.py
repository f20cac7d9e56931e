"""Stop strings and streamers, with tokenizers and classes of transformers on the other side."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_tokenizers
import torch
import transformers
from exafuse.generation.generate import GenerationConfig
from exafuse.generation.stopping import CUT_CHARACTER, StopStrings, verdict
from generation_pair import Pair, prompt
from scripted_model import Collector, ScriptedModel
from transformers import (
    PreTrainedTokenizerFast,
    StopStringCriteria,
    TextIteratorStreamer,
    TextStreamer,
)

TOKENIZERS = {"bytes": tiny_tokenizers.byte_level, "fallback": tiny_tokenizers.byte_fallback}
PIECES = [
    *("Stop", "stop", " the", " dog", "ped", "!", "\n", "\n\n", "User:", " ", "  ", "x + 1"),
    *("서울", "수도는", "좋네요.", "é", "🙂", "<|end|>", "</s>", "```", "hello", "return", "ing"),
]
STRINGS = [
    *("Stop", "stop", "op", "p", "\n\nUser:", "\n", " ", "서울", "울", "도는 서", "🙂", "</s>"),
    *("<|end|>", "the dog", "dogs", "ing the", "aa", "aaa", "x + 1", "never in the text at all"),
]


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return TOKENIZERS[request.param]()


@pytest.fixture(scope="module")
def bytes_tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizers.byte_level()


@pytest.fixture(scope="module")
def llama(
    bytes_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Pair:
    return Pair("llama", tmp_path_factory.mktemp("llama"), vocab_size=len(bytes_tokenizer))


def random_ids(tokenizer: PreTrainedTokenizerFast, generator: torch.Generator) -> list[int]:
    """Ids of text in random order and random cuts: pieces are encoded each for itself."""
    ids: list[int] = []
    while len(ids) < 60:
        piece = PIECES[int(torch.randint(len(PIECES), (), generator=generator))]
        repeat = int(torch.randint(1, 3, (), generator=generator))
        ids += tokenizer(piece * repeat, add_special_tokens=False)["input_ids"]
    return ids[:60]


def test_stop_strings_stop_where_transformers_does(tokenizer: PreTrainedTokenizerFast) -> None:
    """Token by token over random texts; the first 5 ids are the prompt's."""
    if not hasattr(StopStringCriteria, "_get_stop_string_matching_mode"):
        version = transformers.__version__
        pytest.skip(f"transformers {version} overlooks stop strings in bytes of several tokens")
    generator = torch.Generator().manual_seed(0)
    rows = [random_ids(tokenizer, generator) for _ in range(6)]
    hits = 0
    for text in STRINGS:
        theirs = StopStringCriteria(tokenizer, [text, "aab"])
        ours = StopStrings(tokenizer, [text, "aab"], np.array([row[:5] for row in rows]))
        for length in range(6, 61):
            ids = torch.tensor([row[:length] for row in rows])
            got = ours.completed_by(ids[:, -1].numpy())
            expected = theirs(ids, None)
            hits += int(expected.sum())
            assert got.tolist() == expected.tolist(), (text, length, tokenizer.batch_decode(ids))
    assert hits > 100, "the texts must contain the strings"


def test_random_bytes_stop_where_transformers_does(
    bytes_tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Broken UTF-8 around a stop string neither hides it nor makes one up."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, len(bytes_tokenizer), (40, 60), generator=generator)
    strings = ["a", "e", "th", " d", "서", "ng", "\n", "é"]
    theirs = StopStringCriteria(bytes_tokenizer, strings)
    ours = StopStrings(bytes_tokenizer, strings, ids[:, :3].numpy())
    hits = 0
    for length in range(4, 61):
        expected = theirs(ids[:, :length], None)
        hits += int(expected.sum())
        assert ours.completed_by(ids[:, length - 1].numpy()).tolist() == expected.tolist()
    assert hits > 100


@pytest.mark.parametrize("eos", [True, False])
@pytest.mark.parametrize("do_sample", [True, False])
def test_generate_with_stop_strings(
    llama: Pair, bytes_tokenizer: PreTrainedTokenizerFast, eos: bool, do_sample: bool
) -> None:
    """Strings cut out of what the model says freely, so that rows end at different steps."""
    ids = prompt(3, 6)
    torch.manual_seed(0)
    free = llama.theirs.generate(ids, max_new_tokens=30, do_sample=do_sample, top_k=None)
    strings = []
    for row in free[:, 6:]:
        whole = [t for t in map(bytes_tokenizer.decode, row) if t and CUT_CHARACTER not in t]
        strings.append(whole[len(whole) // 2])
    ended = llama.check(
        ids,
        pad=0 if eos else None,
        eos_token_id=[int(free[2, 20]), int(free[0, 29])] if eos else None,
        do_sample=do_sample,
        max_new_tokens=60,
        stop_strings=strings,
        tokenizer=bytes_tokenizer,
    )
    assert ended.shape[1] < 66, "the test must end by its strings"


def test_the_token_that_completes_a_string_is_kept_whole(
    bytes_tokenizer: PreTrainedTokenizerFast,
) -> None:
    script = bytes_tokenizer(" the dog. Stopping there")["input_ids"]
    model = ScriptedModel([script], vocab_size=len(bytes_tokenizer))
    streamer = Collector()
    out = model.generate(
        [5],
        max_new_tokens=30,
        stop_strings="St",
        tokenizer=SimpleNamespace(tokenizer=bytes_tokenizer),  # a processor holds its tokenizer
        streamer=streamer,
    )
    assert bytes_tokenizer.decode(out[0, 1:]) == " the dog. Stop"
    assert [step[0] for step in streamer.steps] == out[0, 1:].tolist()


def test_rows_ended_by_a_string_are_padded_also_in_the_stream(
    bytes_tokenizer: PreTrainedTokenizerFast,
) -> None:
    stop, go, eos = (bytes_tokenizer(t)["input_ids"][0] for t in ("Stop", "x", "</s>"))
    model = ScriptedModel(
        [[go, stop, go, go, go], [go, go, go, go, eos]], vocab_size=len(bytes_tokenizer)
    )
    streamer = Collector()
    out = model.generate(
        [[go], [go]],
        max_new_tokens=9,
        stop_strings=["Stop"],
        tokenizer=bytes_tokenizer,
        eos_token_id=eos,
        streamer=streamer,
        generation_config=GenerationConfig(pad_token_id=0),
    )
    assert out[:, 1:].tolist() == [[go, stop, 0, 0, 0], [go, go, go, go, eos]]
    assert streamer.steps == [list(pair) for pair in zip(*out[:, 1:].tolist(), strict=True)]


def test_a_tokenizer_that_cannot_decode_is_named() -> None:
    with pytest.raises(TypeError, match="tokenizer: expected one with decode, got list"):
        ScriptedModel([[1]]).generate([1], stop_strings="a", tokenizer=[])


def test_verdicts() -> None:
    cpu = torch.device("cpu")
    assert verdict(True, 2, cpu).tolist() == [True, True]
    assert verdict(torch.tensor([True, False]), 2, cpu).tolist() == [True, False]
    assert verdict(torch.tensor([[True], [False]]), 2, cpu).tolist() == [True, False]
    assert verdict(torch.tensor(False), 2, cpu).tolist() == [False, False]
    with pytest.raises(TypeError, match=r"expected bool or bool \[2\]"):
        verdict(torch.tensor([True, False, True]), 2, cpu)


# ---- streamers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("skip_prompt", [False, True])
def test_text_streamer_prints_what_transformers_prints(
    llama: Pair,
    bytes_tokenizer: PreTrainedTokenizerFast,
    capsys: pytest.CaptureFixture[str],
    skip_prompt: bool,
) -> None:
    printed = []
    for model in (llama.theirs, llama.ours):
        streamer = TextStreamer(bytes_tokenizer, skip_prompt=skip_prompt)
        model.generate(prompt(1, 8), max_new_tokens=25, streamer=streamer)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert len(printed[0]) > 20


def test_iterator_streamer_in_a_thread(
    llama: Pair, bytes_tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = prompt(1, 8)
    streamer = TextIteratorStreamer(bytes_tokenizer, skip_prompt=True, timeout=30)
    outputs: list[torch.Tensor] = []
    kwargs = {"max_new_tokens": 25, "streamer": streamer}
    thread = Thread(target=lambda: outputs.append(llama.ours.generate(ids, **kwargs)))
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == bytes_tokenizer.decode(outputs[0][0, 8:])


def test_iterator_streamer_of_a_refused_call_ends(
    llama: Pair, bytes_tokenizer: PreTrainedTokenizerFast
) -> None:
    streamer = TextIteratorStreamer(bytes_tokenizer, timeout=30)

    def call() -> None:
        with pytest.raises(ValueError, match="max_new_tokens"):
            llama.ours.generate(prompt(1, 8), max_new_tokens=0, streamer=streamer)

    thread = Thread(target=call)
    thread.start()
    assert list(streamer) == [""]
    thread.join()


def test_interrupted_real_model_answers_as_before(llama: Pair, tmp_path: Path) -> None:
    class Interrupting(Collector):
        def put(self, value: torch.Tensor) -> None:
            super().put(value)
            if len(self.steps) == 3:
                raise KeyboardInterrupt

    ids = prompt(2, 40)
    before = llama.ours.generate(ids, max_new_tokens=10)
    streamer = Interrupting()
    with pytest.raises(KeyboardInterrupt):
        llama.ours.generate(ids, max_new_tokens=10, streamer=streamer)
    assert streamer.ended == 1
    assert torch.equal(llama.ours.generate(ids, max_new_tokens=10), before)


def test_an_error_between_layers_leaves_the_model_usable(llama: Pair) -> None:
    ids = prompt(2, 10)
    before = llama.ours.generate(ids, max_new_tokens=6)
    calls: Iterator[int] = iter(range(100))

    def interrupt(module: torch.nn.Module, inputs: object) -> None:
        if next(calls) == 3:
            raise KeyboardInterrupt

    hook = llama.ours.model.layers[1].register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            llama.ours.generate(ids, max_new_tokens=6)
    finally:
        hook.remove()
    assert torch.equal(llama.ours.generate(ids, max_new_tokens=6), before)
