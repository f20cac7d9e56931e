"""``exafuse generate`` and ``chat``: a model's words, once or in a conversation."""

from __future__ import annotations

import argparse
import sys
import warnings
from typing import Any

from exafuse.cli.flags import (
    DEFAULT_RAW_TOKENS,
    add_frame_arguments,
    add_media_arguments,
    add_sampling_arguments,
    sampling_options,
)
from exafuse.cli.quantised import load_quantised
from exafuse.cli.registry import BACKENDS, DTYPES, QUANTISATIONS, Run, command
from exafuse.errors import CheckpointError


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The model and how to load it."""
    parser.add_argument("model", help="checkpoint folder or Hub name")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="default: the file's")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: the GPU if there is one)")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="default: auto")
    parser.add_argument(
        "--quantize",
        choices=QUANTISATIONS,
        help="make the weights smaller while loading, by torchao (int4: on a GPU)",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a Hub name")
    parser.add_argument("--quiet", action="store_true", help="no progress bars, no statistics")


def load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """(model, tokenizer or processor) of the checkpoint that the arguments name."""
    from exafuse.config import load_config
    from exafuse.config.head import require_language_model
    from exafuse.config.quantisation import read_quantisation
    from exafuse.models import from_pretrained
    from exafuse.text.loading import load_processor
    from exafuse.weights.hub import resolve_folder

    folder = resolve_folder(arguments.model, arguments.revision)
    if not (folder / "config.json").exists():
        raise CheckpointError(
            f"{folder}: expected a checkpoint folder, with config.json, weights and tokenizer; "
            "it has no config.json"
        )
    quantisation, values = read_quantisation(folder)
    if quantisation is not None:
        processor = load_processor(folder)
        return load_quantised(folder, quantisation, values, arguments), processor
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the config is read again with the model, and speaks then
        require_language_model(load_config(folder).head, arguments.model, "generate text")
    processor = load_processor(folder)  # first: it is quick, and fails for a folder without one
    model = from_pretrained(
        folder,
        dtype=arguments.dtype,
        device=arguments.device,
        backend=arguments.backend,
        quantize=arguments.quantize,
        progress=not arguments.quiet,
    )
    return model, processor


@command("generate", "Continue a prompt, or answer it if the checkpoint has a chat template.")
def _generate(parser: argparse.ArgumentParser) -> Run:
    add_model_arguments(parser)
    parser.add_argument("prompt", help='the text; "-" reads it from standard input')
    parser.add_argument("--raw", action="store_true", help="plain text, without chat template")
    add_media_arguments(parser)
    add_frame_arguments(parser)
    add_sampling_arguments(parser)

    def run(arguments: argparse.Namespace) -> int:
        from exafuse.cli.terminal import AnswerPrinter, is_terminal

        prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
        _check_text(prompt)
        model, processor = load(arguments)
        printer = AnswerPrinter(processor)
        if processor.chat_template is not None and not arguments.raw:
            answer(model, processor, prompt, arguments, printer)
        else:
            continue_text(model, processor, prompt, arguments, printer)
        if is_terminal(sys.stderr) and not arguments.quiet:
            print(f"[{printer.statistics()}]", file=sys.stderr)
        return 0

    return run


def answer(
    model: Any, processor: Any, prompt: str, arguments: argparse.Namespace, printer: Any
) -> None:
    """Stream the answer to ``prompt``, and to the pictures before it, to ``printer``."""
    from exafuse.cli.terminal import cut_off, prefill_bar
    from exafuse.text.chat import chat

    content: Any = prompt
    if arguments.media:
        parts = [with_frames(part, arguments) for part in arguments.media]
        content = [*parts, {"type": "text", "text": prompt}]
    reply = chat(
        model,
        processor,
        [{"role": "user", "content": content}],
        thinking=arguments.thinking,
        preset=arguments.preset,
        streamer=printer,
        progress=prefill_bar(arguments.quiet),
        **sampling_options(arguments),
    )
    if not reply.finished and arguments.max_new_tokens is None and not arguments.quiet:
        print(cut_off(len(reply.ids)), file=sys.stderr)


def with_frames(part: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """A video part with what the command line says about frames; any other part as it is."""
    if part["type"] != "video":
        return part
    return {**part, "fps": arguments.fps, "num_frames": arguments.num_frames}


def continue_text(
    model: Any, processor: Any, prompt: str, arguments: argparse.Namespace, printer: Any
) -> None:
    """Stream the continuation of ``prompt`` to ``printer``."""
    from exafuse.cli.terminal import cut_off, prefill_bar
    from exafuse.generation.settings import context_length
    from exafuse.text.loading import tokenizer_of

    reason = "--raw was given" if arguments.raw else "this checkpoint has no chat template"
    for name, flag in (("thinking", "--thinking"), ("preset", "--preset"), ("media", "an image")):
        if getattr(arguments, name) is not None:
            raise ValueError(f"{flag} needs the chat template, but {reason}")
    tokenizer = tokenizer_of(processor)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if ids.shape[1] == 0:
        raise ValueError("the prompt is empty: expected at least one token")
    options = sampling_options(arguments)
    limits = (options.get("max_new_tokens"), model.generation_config.max_new_tokens)
    is_default = limits == (None, None)
    if is_default:
        room = context_length(model.config) - ids.shape[1]
        options["max_new_tokens"] = max(1, min(DEFAULT_RAW_TOKENS, room))
    output = model.generate(
        ids.to(model.device),
        streamer=printer,
        tokenizer=tokenizer,
        progress=prefill_bar(arguments.quiet),
        **options,
    )
    new_ids = output[0, ids.shape[1] :].tolist()
    is_full = is_default and len(new_ids) == options["max_new_tokens"]
    if is_full and new_ids[-1] not in _end_ids(model) and not arguments.quiet:
        print(cut_off(len(new_ids)), file=sys.stderr)


def _end_ids(model: Any) -> tuple[int, ...]:
    ids = model.generation_config.eos_token_id
    return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)


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
    add_frame_arguments(parser)
    add_sampling_arguments(parser)

    def run(arguments: argparse.Namespace) -> int:
        from exafuse.cli.conversation import Conversation

        model, processor = load(arguments)
        if processor.chat_template is None:
            raise ValueError(
                f"{arguments.model} has no chat template: use `exafuse generate` to continue text"
            )
        conversation = Conversation(
            model,
            processor,
            system=arguments.system,
            thinking=arguments.thinking,
            preset=arguments.preset,
            options=sampling_options(arguments),
            frames={"fps": arguments.fps, "num_frames": arguments.num_frames},
            quiet=arguments.quiet,
        )
        conversation.run()
        return 0

    return run
