"""The ``exafuse`` command: info, generate, chat, verify, plan.

A subcommand is one function here: it gets an argument parser, declares its arguments and returns
the function that runs it. The decorator ``command`` enters it into the table. Nothing heavy is
imported before a command runs, so that ``--help`` and ``plan`` answer at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from exafuse import __version__
from exafuse.errors import ExafuseError

Run = Callable[[argparse.Namespace], int]
Declare = Callable[[argparse.ArgumentParser], Run]
COMMANDS: dict[str, tuple[str, Declare]] = {}

# What a user can cause: a wrong argument or file, a missing library, memory that does not suffice.
# Anything else is a defect of ours and keeps its traceback.
EXPECTED_ERRORS = (ExafuseError, ValueError, OSError, ImportError, MemoryError)
DTYPES = ("auto", "bfloat16", "float16", "float32")
DEFAULT_MAX_NEW_TOKENS = 512  # of plain text, where neither the call nor the checkpoint says
BACKENDS = ("auto", "cuda", "emulated", "reference")


def command(name: str, help_text: str) -> Callable[[Declare], Declare]:
    """Enter a subcommand: ``help_text`` is its line in ``exafuse --help``."""

    def enter(declare: Declare) -> Declare:
        COMMANDS[name] = (help_text, declare)
        return declare

    return enter


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
    for name, (help_text, declare) in COMMANDS.items():
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
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            arguments = build_parser().parse_args(argv)
            run: Run = arguments.run
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
            print(f"exafuse: error: {_one_line(error)}", file=sys.stderr)
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


# ---- info and plan --------------------------------------------------------------------------


@command("info", "Show what is installed and which path each op takes on this machine.")
def _info(parser: argparse.ArgumentParser) -> Run:
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--strict", action="store_true", help="exit with 1 if anything keeps the kernels off"
    )

    def run(arguments: argparse.Namespace) -> int:
        from exafuse.cli import info

        result = info.report()
        print(info.to_json(result) if arguments.json else info.render(result))
        return 1 if arguments.strict and result["problems"] else 0

    return run


@command("plan", "Show each layer's window, RoPE or NoPE, norms and cache, from config.json alone.")
def _plan(parser: argparse.ArgumentParser) -> Run:
    parser.add_argument("model", help="checkpoint folder, config.json, or Hub name")
    parser.add_argument("--context", type=int, metavar="N", help="tokens (default: the model's)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="sequences (default: 1)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="default: the file's")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--png", metavar="FILE", help="draw who attends to what (matplotlib)")

    def run(arguments: argparse.Namespace) -> int:
        from exafuse.cli.plan import draw, plan

        dtype = None if arguments.dtype == "auto" else arguments.dtype
        result = plan(arguments.model, arguments.context, arguments.batch, dtype)
        if arguments.png:
            draw(result, arguments.png)
        print(json.dumps(result.to_dict(), indent=2) if arguments.json else result)
        return 0

    return run


# ---- generate and chat ----------------------------------------------------------------------


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The model and how to load it."""
    parser.add_argument("model", help="checkpoint folder or Hub name")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="default: the file's")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: the GPU if there is one)")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="default: auto")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub name")
    parser.add_argument("--quiet", action="store_true", help="no progress bars, no statistics")


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """How the next token is chosen; everything left out is the checkpoint's own setting."""
    add = parser.add_argument
    add("--max-new-tokens", type=int, metavar="N", help="stop after N tokens")
    add("--temperature", type=float, metavar="T", help="0 = always the likeliest token")
    add("--top-p", type=float, metavar="P")
    add("--top-k", type=int, metavar="K")
    add("--min-p", type=float, metavar="P")
    add("--repetition-penalty", type=float, metavar="R")
    add("--presence-penalty", type=float, metavar="A")
    add("--seed", type=int, metavar="N", help="for repeatable sampling")
    add("--stop", action="append", metavar="TEXT", help="stop after this text (repeatable)")
    add("--preset", metavar="NAME", help="a model page's recommended sampling")
    add("--thinking", action=argparse.BooleanOptionalAction, help="for models that can think")


def sampling_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of ``generate`` for what was given on the command line."""
    names = ("top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "seed")
    options = {name: getattr(arguments, name) for name in names}
    options["max_new_tokens"] = arguments.max_new_tokens
    options["stop_strings"] = arguments.stop
    if arguments.temperature == 0:
        options["do_sample"] = False
    else:
        options["temperature"] = arguments.temperature
        warps = (arguments.temperature, arguments.top_p, arguments.top_k, arguments.min_p)
        if any(value is not None for value in warps):
            options["do_sample"] = True
    return {name: value for name, value in options.items() if value is not None}


def load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """(model, tokenizer) of the checkpoint that the arguments name."""
    from exafuse.models import from_pretrained
    from exafuse.text.loading import load_processor
    from exafuse.weights.hub import resolve_folder

    folder = resolve_folder(arguments.model, arguments.revision)
    tokenizer = load_processor(folder)  # first: it is quick, and fails for a folder without one
    model = from_pretrained(
        folder,
        dtype=arguments.dtype,
        device=arguments.device,
        backend=arguments.backend,
        progress=not arguments.quiet,
    )
    return model, tokenizer


@command("generate", "Continue a prompt, or answer it if the checkpoint has a chat template.")
def _generate(parser: argparse.ArgumentParser) -> Run:
    add_model_arguments(parser)
    parser.add_argument("prompt", help='the text; "-" reads it from standard input')
    parser.add_argument("--raw", action="store_true", help="plain text, without chat template")
    add_sampling_arguments(parser)

    def run(arguments: argparse.Namespace) -> int:
        from exafuse.cli.terminal import AnswerPrinter, is_terminal

        prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
        _check_text(prompt)
        model, tokenizer = load(arguments)
        printer = AnswerPrinter(tokenizer)
        generate_text(model, tokenizer, prompt, arguments, printer)
        if is_terminal(sys.stderr) and not arguments.quiet:
            print(f"[{printer.statistics()}]", file=sys.stderr)
        return 0

    return run


def generate_text(
    model: Any, tokenizer: Any, prompt: str, arguments: argparse.Namespace, printer: Any
) -> None:
    """Stream the continuation of ``prompt``, or the answer to it, to ``printer``."""
    from exafuse.cli.terminal import prefill_bar
    from exafuse.generation.settings import context_length

    options = sampling_options(arguments)
    progress = prefill_bar(arguments.quiet)
    if tokenizer.chat_template is not None and not arguments.raw:
        from exafuse.text.chat import chat

        messages = [{"role": "user", "content": prompt}]
        chat(
            model,
            tokenizer,
            messages,
            thinking=arguments.thinking,
            preset=arguments.preset,
            streamer=printer,
            progress=progress,
            **options,
        )
        return
    reason = "--raw was given" if arguments.raw else "this checkpoint has no chat template"
    for name in ("thinking", "preset"):
        if getattr(arguments, name) is not None:
            raise ValueError(f"--{name} needs the chat template, but {reason}")
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if ids.shape[1] == 0:
        raise ValueError("the prompt is empty: expected at least one token")
    limits = (options.get("max_new_tokens"), model.generation_config.max_new_tokens)
    if limits == (None, None):
        room = context_length(model.config) - ids.shape[1]
        options["max_new_tokens"] = max(1, min(DEFAULT_MAX_NEW_TOKENS, room))
    model.generate(
        ids.to(model.device), streamer=printer, tokenizer=tokenizer, progress=progress, **options
    )


def _check_text(text: str) -> None:
    if not text:
        raise ValueError("the prompt is empty: expected some text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the prompt is not valid UTF-8: {error}") from None


@command("chat", "Talk to a model; /help lists what else can be typed.")
def _chat(parser: argparse.ArgumentParser) -> Run:
    add_model_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message")
    add_sampling_arguments(parser)

    def run(arguments: argparse.Namespace) -> int:
        from exafuse.cli.conversation import Conversation

        model, tokenizer = load(arguments)
        if tokenizer.chat_template is None:
            raise ValueError(
                f"{arguments.model} has no chat template: use `exafuse generate` to continue text"
            )
        conversation = Conversation(
            model,
            tokenizer,
            system=arguments.system,
            thinking=arguments.thinking,
            preset=arguments.preset,
            options=sampling_options(arguments),
            quiet=arguments.quiet,
        )
        conversation.run()
        return 0

    return run


# ---- verify ---------------------------------------------------------------------------------


@command("verify", "Compare a checkpoint's output with another path, layer by layer.")
def _verify(parser: argparse.ArgumentParser) -> Run:
    sides = ("reference", "transformers", "cuda", "emulated")
    families = ("all", "llama", "qwen2", "exaone4")
    add = parser.add_argument
    add("model", nargs="?", help="checkpoint folder or Hub name")
    add("--tiny", choices=families, help="tiny random models of these families instead")
    add("--against", choices=sides, help="default: reference for kernels, else transformers")
    add("--tokens", type=int, default=64, metavar="N", help="greedy tokens (default: 64)")
    add("--prompt", metavar="TEXT", help="what the model reads first")
    add("--dtype", choices=DTYPES, default="auto", help="default: the file's")
    add("--device", help="cpu, cuda, cuda:1 (default: the GPU if there is one)")
    add("--backend", choices=BACKENDS, default="auto", help="the side under test")
    add("--json", action="store_true", help="print JSON")
    add("--quiet", action="store_true", help="no progress bars")

    def run(arguments: argparse.Namespace) -> int:
        from exafuse.verification.verify import verify, verify_tiny

        if (arguments.model is None) == (arguments.tiny is None):
            raise ValueError("verify: expected either a checkpoint or --tiny")
        options: dict[str, Any] = {
            "tokens": arguments.tokens,
            "device": arguments.device,
            "backend": arguments.backend,
        }
        if arguments.tiny:
            if arguments.prompt is not None:
                raise ValueError("--prompt: tiny models have no tokenizer")
            reports = []
            for report in verify_tiny(
                arguments.tiny, arguments.against, dtype=arguments.dtype, **options
            ):
                reports.append(report)
                if not arguments.json:
                    print(report.summary() if report.ok else report, flush=True)
            if arguments.json:
                print(json.dumps([report.to_dict() for report in reports], indent=2))
            return 0 if all(report.ok for report in reports) else 1
        report = verify(
            arguments.model,
            arguments.against,
            prompt=arguments.prompt,
            dtype=arguments.dtype,
            progress=not arguments.quiet,
            **options,
        )
        print(json.dumps(report.to_dict(), indent=2) if arguments.json else report)
        return 0 if report.ok else 1

    return run
