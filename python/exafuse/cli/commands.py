"""The ``exafuse`` command: its parser, its errors, its exit codes.

The subcommands are in ``answering`` and ``checking``. Nothing heavy is imported before a command
runs, so that ``--help`` and ``plan`` answer at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from exafuse import __version__
from exafuse.cli import (
    answering,  # noqa: F401  (they enter their commands into the table)
    benchmarks,  # noqa: F401
    checking,  # noqa: F401
    registry,
    serving,  # noqa: F401
)
from exafuse.cli.flags import in_flags
from exafuse.cli.quantised import hush_libraries
from exafuse.errors import ExafuseError

# What a user can cause: a wrong argument or file, a missing library, memory that does not suffice.
# Anything else is a defect of ours and keeps its traceback.
EXPECTED_ERRORS = (ExafuseError, ValueError, OSError, ImportError, MemoryError)


class _Parser(argparse.ArgumentParser):
    """An argument error is one line, as every other error is."""

    def error(self, message: str) -> NoReturn:
        print(f"exafuse: error: {message} (see `{self.prog} --help`)", file=sys.stderr)
        raise SystemExit(2)


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command; ``namespace.run(namespace)`` is the command's exit code."""
    parser = _Parser(
        prog="exafuse", description="Run and check EXAONE 4, Qwen2 and Llama checkpoints."
    )
    parser.add_argument("--version", action="version", version=f"exafuse {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (help_text, declare) in registry.COMMANDS.items():
        subparser = commands.add_parser(name, help=help_text, description=help_text)
        subparser.set_defaults(run=declare(subparser))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 a check failed, 2 an error, 130 Ctrl-C.

    ``EXAFUSE_DEBUG=1`` shows the traceback of an error instead of its one line.
    """
    if argv is None:  # a process of our own: its streams are ours to set up
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
        hush_libraries()
    arguments = argparse.Namespace()
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            arguments = build_parser().parse_args(argv)
            run: registry.Run = arguments.run
            code = run(arguments)
            sys.stdout.flush()  # here, where a reader that has left is still caught
            return code
        except KeyboardInterrupt:
            print(file=sys.stderr)
            return 130
        except BrokenPipeError:
            # The reader of our output has left (`exafuse plan ... | head`); nothing to tell it.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except Exception as error:
            is_expected = isinstance(error, EXPECTED_ERRORS) or _is_out_of_memory(error)
            if not is_expected or os.environ.get("EXAFUSE_DEBUG", "") not in ("", "0"):
                raise
            given = [name for name, value in vars(arguments).items() if value is not None]
            print(f"exafuse: error: {in_flags(_one_line(error), given)}", file=sys.stderr)
            return 2


def _show_warning(
    message: Warning | str, category: type[Warning], *_place: object, **_more: object
) -> None:
    print(f"exafuse: warning: {_one_line(message)}", file=sys.stderr)


def _one_line(message: object) -> str:
    """Text of an error or warning, which may quote a file, without line breaks and controls."""
    from exafuse.cli.terminal import without_controls

    text = without_controls(" ".join(str(message).split()))
    return text or type(message).__name__


def _is_out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)
