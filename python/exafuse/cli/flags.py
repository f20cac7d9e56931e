"""Flags of the command line and the keyword arguments behind them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection
from typing import Any

# Flags that are not their keyword with hyphens.
_FLAGS = {"stop_strings": "--stop", "num_draft_tokens": "--draft-tokens"}
_KEYWORDS = (
    *("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("presence_penalty", "seed", "stop_strings", "draft", "num_draft_tokens", "cuda_graph"),
)
# The length of plain text, where neither the call nor the checkpoint says.
DEFAULT_RAW_TOKENS = 512


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """How the next token is chosen; everything left out is the checkpoint's own setting."""
    from exafuse.text.settings import DEFAULT_MAX_NEW_TOKENS

    add = parser.add_argument
    add(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="stop after N tokens (default: the checkpoint's, else "
        f"{DEFAULT_MAX_NEW_TOKENS} for an answer and {DEFAULT_RAW_TOKENS} for plain text)",
    )
    add("--temperature", type=float, metavar="T", help="0 = always the likeliest token")
    add("--top-p", type=float, metavar="P")
    add("--top-k", type=int, metavar="K")
    add("--min-p", type=float, metavar="P")
    add("--repetition-penalty", type=float, metavar="R")
    add("--presence-penalty", type=float, metavar="A")
    add("--seed", type=int, metavar="N", help="for repeatable sampling")
    add(
        "--stop",
        action="append",
        dest="stop_strings",
        metavar="TEXT",
        help="stop after this text (repeatable)",
    )
    add("--preset", metavar="NAME", help="a model page's recommended sampling")
    add("--thinking", action=argparse.BooleanOptionalAction, help="for models that can think")
    add(
        "--draft",
        choices=("mtp", "prompt_lookup"),
        help="guess several tokens and check them at once: by the checkpoint's MTP head, or by "
        "what stands in the prompt",
    )
    add("--draft-tokens", type=int, dest="num_draft_tokens", metavar="N", help="(default: 3)")
    add(
        "--cuda-graph",
        action="store_true",
        default=None,
        help="capture the decoding step and replay it for every token",
    )


def sampling_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of ``generate`` for what was given on the command line."""
    options = {name: getattr(arguments, name) for name in _KEYWORDS}
    if arguments.num_draft_tokens is not None and arguments.draft is None:
        raise ValueError("num_draft_tokens: needs --draft")
    if arguments.temperature == 0:
        options |= {"temperature": None, "do_sample": False}
    else:
        warps = (arguments.temperature, arguments.top_p, arguments.top_k, arguments.min_p)
        if any(value is not None for value in warps):
            options["do_sample"] = True
    return {name: value for name, value in options.items() if value is not None}


class MediaAction(argparse.Action):
    """Collects ``--image`` and ``--video`` in one list of message parts, in the order given."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        kind = str(self.const)
        parts = [*(getattr(namespace, self.dest) or []), {"type": kind, kind: values}]
        setattr(namespace, self.dest, parts)


def add_media_arguments(parser: argparse.ArgumentParser) -> None:
    """What the model looks at."""
    for kind in ("image", "video"):
        parser.add_argument(
            f"--{kind}",
            action=MediaAction,
            const=kind,
            dest="media",
            metavar="FILE",
            help=f"{'an image' if kind == 'image' else 'a video'} to look at (repeatable; the "
            "model sees them in this order, before the prompt)",
        )


def add_frame_arguments(parser: argparse.ArgumentParser) -> None:
    """Which frames of videos are looked at."""
    parser.add_argument(
        "--fps",
        type=float,
        metavar="F",
        help="frames of a second of video to look at (default: the checkpoint's, often all)",
    )
    parser.add_argument(
        "--num-frames", type=int, metavar="N", help="frames of a video to look at, spread evenly"
    )


def in_flags(message: str, given: Collection[str]) -> str:
    """An error message about keyword arguments, in the words of the command line.

    ``given``: the keywords that the command line set. Only what a message begins with is taken for
    one of them, so that the same name in a file stays what it is.
    """
    name, mark, rest = message.partition(":")
    name, equals, value = name.partition("=")
    if mark and name in given:
        flag = _FLAGS.get(name, f"--{name.replace('_', '-')}")
        if equals and value == "False":
            flag = flag.replace("--", "--no-", 1)
        message = f"{flag}:{rest}"
        message = message.replace("pass do_sample=False", "use --temperature 0")
    return re.sub(r"\bfps or num_frames\b", "--fps or --num-frames", message)
