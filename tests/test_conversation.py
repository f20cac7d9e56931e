"""`exafuse chat`: turns, commands, and Ctrl-C at a real terminal."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time

import chat_tokenizers
import exafuse
import pytest
from command_line import SOURCE, make_folder, run
from exafuse.cli import commands as cli
from exafuse.cli.conversation import Conversation
from scripted_model import ScriptedModel


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


@pytest.mark.parametrize(
    "error",
    [
        exafuse.DoesNotFitError("the cache needs 9 GiB"),
        exafuse.BackendError("no GPU"),
        RuntimeError("scores of rows [0]: expected finite ones"),
        MemoryError("out of memory"),
    ],
)
def test_a_failed_turn_keeps_the_conversation(capsys, monkeypatch, error):
    conversation = scripted(chat_tokenizers.processor("qwen2"), "Seven.", "never", "Nine.")
    conversation.answer("How many?")
    before = list(conversation.messages)
    assert len(before) == 2
    with monkeypatch.context() as patch:

        def failing(*_args, **_options):
            raise error

        patch.setattr(ScriptedModel, "next_logits", failing)
        assert conversation.handle("And now?")
    assert capsys.readouterr().err == f"exafuse: error: {error}\n"
    assert conversation.messages == before
    conversation.answer("Again?")
    assert [message["content"] for message in conversation.messages[2:]] == ["Again?", "Nine."]


def test_chat_needs_a_template(tmp_path, capsys):
    folder = make_folder(tmp_path, None)
    assert cli.main(["chat", str(folder), "--device", "cpu"]) == 2
    assert "exafuse generate" in capsys.readouterr().err


@pytest.mark.slow
def test_chat_from_a_pipe(tmp_path):
    chat_folder = make_folder(tmp_path, "qwen2")
    argv = ["chat", str(chat_folder), "--device", "cpu", "--max-new-tokens", "4"]
    done = run(argv, input="hello\n/exit\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("\n")
    assert ">" not in done.stdout.splitlines()[0][:1]


@pytest.mark.slow
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
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a run in the background may ignore it
