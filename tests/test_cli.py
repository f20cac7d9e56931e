"""The `exafuse` command: arguments, streams, errors, and the conversation at a terminal."""

from __future__ import annotations

import argparse
import io
import os
import pty
import select
import subprocess
import sys
import time
import warnings
from pathlib import Path

import chat_tokenizers
import exafuse
import pytest
import torch
from exafuse import cli, terminal
from exafuse.chat import chat, load_processor
from exafuse.conversation import Conversation
from exafuse.terminal import DIM, PLAIN, AnswerPrinter, prefill_bar, without_controls
from exafuse.verify import TINY_CONFIGS, make_tiny
from scripted_model import ScriptedModel

SOURCE = Path(exafuse.__file__).parents[1]
CONFIG = Path(__file__).parent / "data" / "configs" / "llama-2-7b.json"
LLAMA = next(iter(TINY_CONFIGS))


class Terminal(io.StringIO):
    """A stream that claims to be one."""

    def isatty(self):
        return True


def make_folder(folder, family, **changes):
    """A tiny checkpoint with the tokenizer and chat template of a family (None: no template)."""
    chat_tokenizers.save_family(family or "qwen2", folder)
    if family is None:
        (folder / "chat_template.jinja").unlink()
    size = max(load_processor(folder).get_vocab().values()) + 1
    eos = size - 1  # a token that the random model hardly ever picks
    values = TINY_CONFIGS[LLAMA] | {"vocab_size": size, "eos_token_id": eos} | changes
    make_tiny(values, folder)
    return folder


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


def run(argv, **options):
    environment = os.environ | {"PYTHONPATH": str(SOURCE), "HF_HUB_OFFLINE": "1"}
    environment |= options.pop("env", {})
    command = [sys.executable, "-m", "exafuse", *argv]
    options = {"capture_output": True, "text": True, "timeout": 120} | options
    return subprocess.run(command, env=environment, check=False, **options)


def exit_code(argv):
    """Of main(), whether it returns or argparse leaves."""
    try:
        return cli.main(argv)
    except SystemExit as error:
        return error.code


# ---- parser and errors ----------------------------------------------------------------------


def test_help_names_every_command(capsys):
    assert exit_code(["--help"]) == 0
    text = capsys.readouterr().out
    for name in ("info", "generate", "chat", "verify", "plan"):
        assert f"\n    {name} " in text
        assert exit_code([name, "--help"]) == 0
        assert cli.COMMANDS[name][0].split()[0] in capsys.readouterr().out


def test_version(capsys):
    assert exit_code(["--version"]) == 0
    assert capsys.readouterr().out == f"exafuse {exafuse.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["plan"], "model"),
        (["plan", "x", "--context", "many"], "--context"),
        (["generate", "x", "y", "--image", "a.png"], "--image"),
        (["generate", "x", "y", "--video", "a.mp4"], "--video"),
        (["generate", "x", "y", "--dtype", "int4"], "--dtype"),
        (["generate", "x", "y", "--top-k", "1.5"], "--top-k"),
        (["generate", "no/such", "y"], "no such folder"),
        (["generate", "x", ""], "prompt is empty"),
        (["chat", "no/such"], "no such folder"),
        (["plan", str(CONFIG), "--context", "0"], "at least 1"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(argv, words, capsys):
    assert exit_code(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("exafuse: error: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err


def test_a_new_command_is_one_function(monkeypatch, capsys):
    monkeypatch.setattr(cli, "COMMANDS", dict(cli.COMMANDS))

    @cli.command("greet", "Say hello.")
    def _greet(parser):
        parser.add_argument("name")

        def run(arguments):
            print(f"hello {arguments.name}")
            return 7

        return run

    assert cli.main(["greet", "you"]) == 7
    assert capsys.readouterr().out == "hello you\n"
    assert exit_code(["--help"]) == 0
    assert "Say hello." in capsys.readouterr().out


@pytest.fixture
def failing(monkeypatch):
    """Have `exafuse fail` raise what the test wants."""
    monkeypatch.setattr(cli, "COMMANDS", dict(cli.COMMANDS))

    def use(error):
        def run(_arguments):
            raise error

        cli.command("fail", "Fail.")(lambda _parser: run)
        return cli.main(["fail"])

    return use


@pytest.mark.parametrize(
    "error",
    [
        exafuse.ConfigError("a file\nis bad"),
        exafuse.DoesNotFitError("too large"),
        exafuse.BackendError("no GPU"),
        ValueError("top_p: out of range"),
        FileNotFoundError(2, "No such file", "x"),
        ImportError("matplotlib is missing"),
        torch.OutOfMemoryError("CUDA out of memory"),
        ValueError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_that_a_user_can_cause(failing, capsys, monkeypatch, error):
    monkeypatch.delenv("EXAFUSE_DEBUG", raising=False)
    assert failing(error) == 2
    text = capsys.readouterr().err
    assert text.startswith("exafuse: error: ")
    assert text.count("\n") == 1
    assert len(text) > len("exafuse: error: \n")
    assert "Traceback" not in text


def test_debug_shows_the_traceback(failing, monkeypatch):
    monkeypatch.setenv("EXAFUSE_DEBUG", "1")
    with pytest.raises(exafuse.ConfigError):
        failing(exafuse.ConfigError("bad"))
    monkeypatch.setenv("EXAFUSE_DEBUG", "0")
    assert failing(exafuse.ConfigError("bad")) == 2


def test_defects_keep_their_traceback(failing):
    with pytest.raises(AssertionError):
        failing(AssertionError("ours"))
    with pytest.raises(TypeError):
        failing(TypeError("ours"))


def test_ctrl_c_is_130(failing, capsys):
    assert failing(KeyboardInterrupt()) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_errors_cannot_control_the_terminal(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "\\u001b]0;owned\\u0007\\u009b2J"}')
    assert cli.main(["plan", str(tmp_path)]) == 2
    text = capsys.readouterr().err
    assert not {"\x1b", "\x07", "\x9b"} & set(text)


def test_warnings_are_one_line(monkeypatch, capsys):
    monkeypatch.setattr(cli, "COMMANDS", dict(cli.COMMANDS))

    def run(_arguments):
        warnings.simplefilter("always")
        warnings.warn("two\nlines", UserWarning, stacklevel=1)
        return 0

    cli.command("warn", "Warn.")(lambda _parser: run)
    before = warnings.showwarning
    assert cli.main(["warn"]) == 0
    assert capsys.readouterr().err == "exafuse: warning: two lines\n"
    assert warnings.showwarning is before


def test_module_and_errors_in_a_process():
    done = run(["plan", str(CONFIG)])
    assert (done.returncode, done.stderr) == (0, "")
    assert "32 layers" in done.stdout
    done = run(["plan", "no/such/folder"], env={"EXAFUSE_DEBUG": ""})
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    done = run(["plan", "no/such/folder"], env={"EXAFUSE_DEBUG": "1"})
    assert done.returncode == 1
    assert "Traceback" in done.stderr


@pytest.mark.parametrize("more", [[], ["--json"]], ids=["little", "much"])
def test_a_reader_that_leaves_is_no_error(more):
    environment = os.environ | {"PYTHONPATH": str(SOURCE)}
    command = [sys.executable, "-m", "exafuse", "plan", str(CONFIG), *more]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        errors = process.stderr.read()
    assert (process.returncode, errors) == (0, b"")


def test_output_that_the_encoding_cannot_hold(chat_folder):
    argv = ["generate", str(chat_folder), "배", "--device", "cpu", "--max-new-tokens", "3"]
    done = run(argv, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr


# ---- generate -------------------------------------------------------------------------------


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
    ],
)
def test_sampling_options(argv, expected):
    parser = argparse.ArgumentParser()
    cli.add_sampling_arguments(parser)
    assert cli.sampling_options(parser.parse_args(argv)) == expected


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--temperature", "-1"], "temperature"),
        (["--top-p", "1.5"], "top_p"),
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


# ---- conversation ---------------------------------------------------------------------------


def scripted(tokenizer, *replies):
    """A conversation with a model that gives these replies, one a turn."""
    end = tokenizer.convert_tokens_to_ids(tokenizer.eos_token)
    scripts = [tokenizer(text, add_special_tokens=False)["input_ids"] + [end] for text in replies]
    size = max(tokenizer.get_vocab().values()) + 1

    class Model(ScriptedModel):
        def generate(self, *args, **options):
            turn = ScriptedModel([scripts.pop(0)], size, context=4096)
            turn.generation_config = self.generation_config
            return turn.generate(*args, eos_token_id=end, **options)

    return Conversation(Model([[0]], size, context=4096), tokenizer, options={})


def test_turns_go_on_from_each_other(capsys):
    conversation = scripted(chat_tokenizers.processor("qwen2"), "Seven.", "Eight.", "Nine.")
    conversation.run(io.StringIO("How many?\nAnd now?\n\n/reset\nAgain?\n/exit\nnever read\n"))
    assert capsys.readouterr().out == "Seven.\nEight.\nNine.\n"
    assert conversation.messages == [
        {"role": "user", "content": "Again?"},
        {"role": "assistant", "content": "Nine."},
    ]


def test_thought_is_not_kept(capsys):
    conversation = scripted(
        chat_tokenizers.processor("exaone4"), "<think>\nhm\n</think>\n\n7.", "8."
    )
    conversation.run(io.StringIO("How many?\n"))
    assert conversation.messages[-1] == {"role": "assistant", "content": "7."}
    assert "hm" in capsys.readouterr().out


def test_commands(capsys):
    conversation = scripted(chat_tokenizers.processor("qwen2"), "Yes.")
    assert conversation.handle("/system Be brief.")
    assert conversation.messages == [{"role": "system", "content": "Be brief."}]
    assert conversation.handle("hello")
    assert len(conversation.messages) == 3
    assert conversation.handle("/reset")
    assert conversation.messages == [{"role": "system", "content": "Be brief."}]
    assert conversation.handle("/system")
    assert conversation.messages == []
    capsys.readouterr()
    assert conversation.handle("/help")
    assert "/reset" in capsys.readouterr().out
    assert conversation.handle("/fly")
    assert "/fly: no such command" in capsys.readouterr().out
    assert conversation.handle("")
    assert not conversation.handle("/exit")


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(capsys, monkeypatch):
    conversation = scripted(chat_tokenizers.processor("qwen2"), "One two three four.", "Done.")
    sound, calls = ScriptedModel.next_logits, []

    def interrupted(self, *args, **options):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return sound(self, *args, **options)

    monkeypatch.setattr(ScriptedModel, "next_logits", interrupted)
    conversation.answer("Count.")
    assert "(stopped)" in capsys.readouterr().out
    said = conversation.messages[-1]
    assert said["role"] == "assistant"
    assert "One two three four.".startswith(said["content"])
    assert said["content"]
    conversation.answer("Go on.")
    assert conversation.messages[-1]["content"] == "Done."
    assert len(conversation.messages) == 4


def test_ctrl_c_before_the_first_word_undoes_the_turn(monkeypatch):
    conversation = scripted(chat_tokenizers.processor("qwen2"), "never")

    def interrupted(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(ScriptedModel, "next_logits", interrupted)
    conversation.answer("Hello?")
    assert conversation.messages == []


def test_a_conversation_that_got_too_long_can_be_reset(capsys):
    conversation = scripted(chat_tokenizers.processor("qwen2"), "never", "Here.")
    conversation.answer("word " * 9000)
    text = capsys.readouterr().err
    assert text.startswith("exafuse: error: ")
    assert conversation.messages == []
    conversation.answer("Hello?")
    assert conversation.messages[-1]["content"] == "Here."


def test_chat_needs_a_template(folder, capsys):
    assert cli.main(["chat", str(folder), "--device", "cpu"]) == 2
    assert "exafuse generate" in capsys.readouterr().err


def test_chat_from_a_pipe(chat_folder):
    argv = ["chat", str(chat_folder), "--device", "cpu", "--max-new-tokens", "4"]
    done = run(argv, input="hello\n/exit\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("\n")
    assert ">" not in done.stdout.splitlines()[0][:1]


def test_chat_at_a_terminal_survives_ctrl_c(tmp_path):
    """A real pseudo-terminal: prompt, an endless answer, Ctrl-C, then /exit."""
    folder = make_folder(tmp_path, "qwen2", max_position_embeddings=100_000, eos_token_id=None)
    argv = ["-m", "exafuse", "chat", str(folder), "--device", "cpu", "--max-new-tokens", "90000"]
    environment = os.environ | {"PYTHONPATH": str(SOURCE), "TERM": "dumb"}
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, *argv],
        env=environment,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=_take_terminal,
    )
    os.close(slave)
    output = bytearray()

    def wait_for(done, what, keys=b""):
        limit = time.monotonic() + 90
        while not done():
            assert time.monotonic() < limit, f"no {what} in {bytes(output)!r}"
            if select.select([master], [], [], 1.0)[0]:
                output.extend(os.read(master, 65536))
            else:
                os.write(master, keys)

    try:
        wait_for(lambda: output.endswith(b"> "), "prompt")
        os.write(master, b"hello\n")
        length = len(output)
        wait_for(lambda: len(output) > length + 200, "answer")
        os.write(master, b"\x03")
        wait_for(lambda: b"(stopped)" in output, "stop")
        wait_for(lambda: output.endswith(b"> "), "second prompt")
        # Python's input() misses a signal that comes just before it waits: press until heard.
        wait_for(lambda: b"(/exit leaves)" in output, "advice", keys=b"\x03")
        os.write(master, b"/exit\n")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(master)
    assert b"Traceback" not in output


def _take_terminal():
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
