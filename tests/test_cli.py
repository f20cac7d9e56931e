"""The `exafuse` command: its parser, its errors, its exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import exafuse
import pytest
import torch
from command_line import SOURCE, exit_code, run
from exafuse.cli import commands as cli
from exafuse.cli import registry

CONFIG = Path(__file__).parent / "data" / "configs" / "llama-2-7b.json"


def test_help_names_every_command(capsys):
    assert exit_code(["--help"]) == 0
    text = capsys.readouterr().out
    for name in ("info", "generate", "chat", "verify", "plan", "serve"):
        assert f"\n    {name} " in text
        assert exit_code([name, "--help"]) == 0
        assert registry.COMMANDS[name][0].split()[0] in capsys.readouterr().out


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
        (["generate", "x", "y", "--image"], "--image"),
        (["generate", "x", "y", "--video"], "--video"),
        (["generate", "x", "y", "--draft", "luck"], "--draft"),
        (["generate", "mistyped", "y"], "a Hub name has the form 'owner/model'"),
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
    monkeypatch.setattr(registry, "COMMANDS", dict(registry.COMMANDS))

    @registry.command("greet", "Say hello.")
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
    monkeypatch.setattr(registry, "COMMANDS", dict(registry.COMMANDS))

    def use(error):
        def run(_arguments):
            raise error

        registry.command("fail", "Fail.")(lambda _parser: run)
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
    monkeypatch.setattr(registry, "COMMANDS", dict(registry.COMMANDS))

    def run(_arguments):
        warnings.simplefilter("always")
        warnings.warn("two\nlines", UserWarning, stacklevel=1)
        return 0

    registry.command("warn", "Warn.")(lambda _parser: run)
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
