"""`exafuse generate`: prompts in, text out, and how the text is printed."""

from __future__ import annotations

import argparse
import io
import sys

import chat_tokenizers
import exafuse
import pytest
import torch
from command_line import Terminal, exit_code, make_folder, run
from exafuse.cli import commands as cli
from exafuse.cli import flags, terminal
from exafuse.cli.terminal import DIM, PLAIN, AnswerPrinter, prefill_bar, without_controls
from exafuse.text.chat import chat, load_processor


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("plain"), None)


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("chat"), "qwen2")


@pytest.fixture(scope="module")
def thinking_folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("thinking"), "exaone4")


def generate(folder, *argv):
    return cli.main(["generate", str(folder), *argv, "--device", "cpu", "--max-new-tokens", "12"])


@pytest.mark.slow
def test_output_that_the_encoding_cannot_hold(chat_folder):
    argv = ["generate", str(chat_folder), "배", "--device", "cpu", "--max-new-tokens", "3"]
    done = run(argv, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr


def test_raw_text_is_continued_greedily(folder, capsys):
    assert generate(folder, "The ferry") == 0
    captured = capsys.readouterr()
    tokenizer = load_processor(folder)
    model = exafuse.from_pretrained(folder, device="cpu")
    ids = tokenizer("The ferry", return_tensors="pt")["input_ids"]
    new = model.generate(ids, max_new_tokens=12)[0, ids.shape[1] :].tolist()
    assert captured.out == tokenizer.decode(new, skip_special_tokens=True) + "\n"
    assert captured.err == ""  # not a terminal: no bars, no statistics


def test_chat_template_is_used_where_there_is_one(chat_folder, capsys):
    assert generate(chat_folder, "The ferry") == 0
    answered = capsys.readouterr().out
    tokenizer = load_processor(chat_folder)
    model = exafuse.from_pretrained(chat_folder, device="cpu")
    message = {"role": "user", "content": "The ferry"}
    reply = chat(model, tokenizer, [message], max_new_tokens=12)
    assert answered == reply.text + "\n"
    assert generate(chat_folder, "The ferry", "--raw") == 0
    assert capsys.readouterr().out != answered


def test_prompt_from_standard_input(folder, capsys, monkeypatch):
    assert generate(folder, "apples are left") == 0
    expected = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO("apples are left"))
    assert generate(folder, "-") == 0
    assert capsys.readouterr().out == expected
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert generate(folder, "-") == 2


def test_sampling_is_repeatable_and_differs(folder, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        assert generate(folder, "rain", "--temperature", "1.5", "--seed", seed) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert generate(folder, "rain", "--temperature", "0", "--seed", "1") == 0
    greedy = capsys.readouterr().out
    assert generate(folder, "rain") == 0
    assert capsys.readouterr().out == greedy


def test_stop_text(folder, capsys):
    assert generate(folder, "The market opened") == 0
    text = capsys.readouterr().out.rstrip("\n")
    stop = text[len(text) // 2 :][:2]
    assert generate(folder, "The market opened", "--stop", "@@@", "--stop", stop) == 0
    shorter = capsys.readouterr().out.rstrip("\n")
    assert text.startswith(shorter)
    assert stop in shorter
    assert len(shorter) < len(text)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], {}),
        (["--temperature", "0"], {"do_sample": False}),
        (["--temperature", "0.7"], {"temperature": 0.7, "do_sample": True}),
        (["--top-p", "0.9"], {"top_p": 0.9, "do_sample": True}),
        (["--top-k", "0"], {"top_k": 0, "do_sample": True}),
        (["--min-p", "0.1"], {"min_p": 0.1, "do_sample": True}),
        (["--temperature", "0", "--top-k", "5"], {"top_k": 5, "do_sample": False}),
        (["--repetition-penalty", "1.1"], {"repetition_penalty": 1.1}),
        (["--presence-penalty", "1.5"], {"presence_penalty": 1.5}),
        (["--seed", "3", "--max-new-tokens", "9"], {"seed": 3, "max_new_tokens": 9}),
        (["--stop", "a", "--stop", "b"], {"stop_strings": ["a", "b"]}),
        (["--cuda-graph"], {"cuda_graph": True}),
        (["--draft", "mtp", "--draft-tokens", "2"], {"draft": "mtp", "num_draft_tokens": 2}),
    ],
)
def test_sampling_options(argv, expected):
    parser = argparse.ArgumentParser()
    flags.add_sampling_arguments(parser)
    assert flags.sampling_options(parser.parse_args(argv)) == expected


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ["--temperature", "-1"],
            "error: --temperature: expected above 0 (for greedy decoding use",
        ),
        (["--temperature", "-1"], "use --temperature 0), got -1.0"),
        (["--top-p", "1.5"], "error: --top-p: expected above 0"),
        (["--max-new-tokens", "0"], "error: --max-new-tokens: expected at least 1"),
        (["--seed", "-3"], "error: --seed: expected"),
        (["--draft", "mtp"], "draft"),
        (["--image", "a.png"], "an image needs the chat template"),
        (["--thinking"], "--thinking needs the chat template, but this checkpoint has no"),
        (["--no-thinking"], "--thinking needs"),
        (["--preset", "exaone4-reasoning"], "--preset needs"),
        (["--backend", "cuda"], "cuda"),
        (["--revision", "main"], "revision"),
    ],
)
def test_values_that_cannot_be(folder, argv, words, capsys):
    if words == "cuda" and torch.cuda.is_available():
        argv = ["--device", "cpu", "--backend", "nonsense"]
    assert exit_code(["generate", str(folder), "x", "--device", "cpu", *argv]) == 2
    text = capsys.readouterr().err
    assert text.startswith("exafuse: error: ")
    assert words in text


@pytest.mark.parametrize(
    ("message", "given", "expected"),
    [
        ("top_p: out of range", ["top_p"], "--top-p: out of range"),
        ("top_p: out of range", [], "top_p: out of range"),  # of a file, then
        ("stop_strings: expected text", ["stop_strings"], "--stop: expected text"),
        ("thinking=False: no switch", ["thinking"], "--no-thinking: no switch"),
        ("thinking=True: no mode", ["thinking"], "--thinking: no mode"),
        ("config.json: top_p: 3", ["top_p"], "config.json: top_p: 3"),
        ("videos[0]: with fps or num_frames", [], "videos[0]: with --fps or --num-frames"),
        ("no colon in this top_p", ["top_p"], "no colon in this top_p"),
    ],
)
def test_errors_name_flags_and_not_keywords(message, given, expected):
    assert flags.in_flags(message, given) == expected


def test_thinking_where_there_is_no_such_mode(chat_folder, capsys):
    assert generate(chat_folder, "x", "--thinking") == 2
    assert "error: --thinking: the chat template of this checkpoint" in capsys.readouterr().err


def test_images_for_a_model_that_does_not_see(chat_folder, capsys):
    assert generate(chat_folder, "x", "--image", "a.png") == 2
    assert "this checkpoint reads text only" in capsys.readouterr().err
    assert generate(chat_folder, "x", "--raw", "--image", "a.png") == 2
    assert "an image needs the chat template, but --raw was given" in capsys.readouterr().err


def test_a_folder_that_is_no_checkpoint(tmp_path, capsys):
    assert generate(tmp_path, "x") == 2
    assert "it has no config.json" in capsys.readouterr().err


@pytest.mark.parametrize("raw", [[], ["--raw"]], ids=["answer", "plain text"])
def test_an_answer_that_the_default_limit_ends(chat_folder, capsys, monkeypatch, raw):
    monkeypatch.setattr("exafuse.text.chat.DEFAULT_MAX_NEW_TOKENS", 7)
    monkeypatch.setattr("exafuse.cli.answering.DEFAULT_RAW_TOKENS", 7)
    argv = ["generate", str(chat_folder), "x", "--device", "cpu", *raw]
    assert cli.main(argv) == 0
    notice = "[cut off after 7 tokens; --max-new-tokens N allows more]\n"
    assert capsys.readouterr().err == notice
    assert cli.main([*argv, "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    assert cli.main([*argv, "--max-new-tokens", "5"]) == 0  # the limit was wished
    assert capsys.readouterr().err == ""
    assert cli.main([*argv, "--stop", "e", "--stop", "a", "--seed", "1"]) == 0
    assert exit_code(["generate", "--help"]) == 0
    assert "1024 for an answer and 512 for plain text" in " ".join(capsys.readouterr().out.split())


def test_raw_and_thinking_exclude_each_other(chat_folder, capsys):
    assert generate(chat_folder, "x", "--raw", "--thinking") == 2
    assert "--raw was given" in capsys.readouterr().err


def test_unknown_preset_lists_the_known_ones(chat_folder, capsys):
    assert generate(chat_folder, "x", "--preset", "fast") == 2
    assert "exaone4-reasoning" in capsys.readouterr().err


def test_thought_is_printed_with_its_tags_into_a_pipe(thinking_folder, capsys):
    assert generate(thinking_folder, "x", "--thinking") == 0
    assert capsys.readouterr().out.startswith("<think>\n")
    assert generate(thinking_folder, "x", "--no-thinking") == 0
    assert not capsys.readouterr().out.startswith("<think>")


def test_length_of_plain_text_is_bounded_by_the_context(folder, capsys):
    assert cli.main(["generate", str(folder), "The ferry leaves", "--device", "cpu"]) == 0
    tokenizer = load_processor(folder)
    assert len(tokenizer(capsys.readouterr().out)["input_ids"]) > 100


def test_statistics_on_a_terminal(folder, monkeypatch):
    errors = Terminal()
    monkeypatch.setattr(sys, "stderr", errors)
    assert generate(folder, "The ferry") == 0
    assert "12 new, " in errors.getvalue()
    assert "tokens/s]" in errors.getvalue()
    errors.seek(0)
    errors.truncate()
    assert generate(folder, "The ferry", "--quiet") == 0
    assert errors.getvalue() == ""


# ---- printing -------------------------------------------------------------------------------


def feed(printer, tokenizer, prompt, text):
    """Hand a prompt and a reply to a streamer as generate does."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    prompt_ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    printer.put(prompt_ids)
    for token in ids:
        printer.put(torch.tensor([token]))
    printer.end()


def test_thought_is_dimmed_on_a_terminal(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    tokenizer = chat_tokenizers.processor("exaone4")
    stream = Terminal()
    printer = AnswerPrinter(tokenizer, stream)
    feed(printer, tokenizer, "[|assistant|]\n<think>\n", "apples first</think>\n\n서울입니다.")
    assert stream.getvalue() == f"{DIM}apples first{PLAIN}\n\n서울입니다.\n"
    assert printer.answer == "서울입니다."


def test_no_color_and_pipes_get_the_tags(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    tokenizer = chat_tokenizers.processor("exaone4")
    for stream in (Terminal(), io.StringIO()):
        printer = AnswerPrinter(tokenizer, stream)
        feed(printer, tokenizer, "<think>\n", "apples</think>\n\n7[|endofturn|]")
        assert stream.getvalue() == "<think>\napples</think>\n\n7\n"
        assert printer.answer == "7"


def test_a_reply_cannot_control_the_terminal():
    tokenizer = chat_tokenizers.processor("qwen2")
    reply = "a\x1b]0;owned\x07b\x9b2Jc\r\nd\te"
    stream = Terminal()
    feed(AnswerPrinter(tokenizer, stream), tokenizer, "x", reply)
    assert stream.getvalue() == "a]0;ownedb2Jc\nd\te\n"
    stream = io.StringIO(newline="")
    feed(AnswerPrinter(tokenizer, stream), tokenizer, "x", reply)
    assert stream.getvalue() == reply + "\n"


def test_printer_that_never_got_anything_prints_nothing():
    stream = io.StringIO()
    AnswerPrinter(chat_tokenizers.processor("qwen2"), stream).end()
    assert stream.getvalue() == ""


def test_without_controls_keeps_every_visible_character():
    text = "abc äöü 서울 \U0001f600 \n\t\u200b"
    assert without_controls(text) == text
    assert without_controls("".join(map(chr, range(32)))) == "\t\n"


def test_prefill_bar_is_for_long_prompts_on_terminals(monkeypatch):
    assert prefill_bar(quiet=False) is None  # pytest's stderr is no terminal
    errors = Terminal()
    monkeypatch.setattr(sys, "stderr", errors)
    assert prefill_bar(quiet=True) is None
    progress = prefill_bar(quiet=False)
    progress(100, 100)
    assert errors.getvalue() == ""
    total = 2 * terminal.PREFILL_BAR_TOKENS
    progress(terminal.PREFILL_BAR_TOKENS, total)
    assert "reading the prompt:  50%" in errors.getvalue()
    progress(total, total)
