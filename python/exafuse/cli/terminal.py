"""What the commands share for talking to a terminal: answers as they are written, progress."""

from __future__ import annotations

import os
import sys
import time
import unicodedata
from collections.abc import Callable
from typing import Any, TextIO

from exafuse.text.loading import tokenizer_of
from exafuse.text.messages import THINK_OPEN
from exafuse.text.reply import hidden_ids, reply_text, split_thinking
from exafuse.text.streaming import ReplyStreamer

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
PREFILL_BAR_TOKENS = 4096  # shorter prompts are read before anyone could look at a bar


def is_terminal(stream: TextIO) -> bool:
    return hasattr(stream, "isatty") and stream.isatty()


def without_controls(text: str) -> str:
    """``text`` without the control characters that could move a cursor or retitle a window."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def cut_off(num_tokens: int) -> str:
    """What is said of an answer that the default limit ended."""
    return f"[cut off after {num_tokens:,} tokens; --max-new-tokens N allows more]"


class AnswerPrinter:
    """A streamer that prints a reply as it comes, and remembers it. ``tokenizer``: a tokenizer or
    a processor.

    On a terminal the thought is dimmed and its tags are left out; elsewhere (and under NO_COLOR)
    the text is printed with its tags, the one that the prompt ended with included.
    """

    def __init__(self, tokenizer: Any, stream: TextIO | None = None) -> None:
        self.stream = sys.stdout if stream is None else stream
        self.tokenizer = tokenizer = tokenizer_of(tokenizer)
        self.is_terminal = is_terminal(self.stream)
        dims = self.is_terminal and "NO_COLOR" not in os.environ
        self._streamer = ReplyStreamer(tokenizer, self._write, thinking="dim" if dims else "show")
        self._opens_tag = not dims
        self._opened_thinking = False
        self._prompt_ids: list[int] = []
        self._ids: list[int] = []
        self._first_token = 0.0

    def put(self, value: Any) -> None:
        """Ids, int64 tensor: the prompt ``[1, seq]`` first, then ``[1]`` a step."""
        ids = value.reshape(-1).tolist()
        if self._prompt_ids:
            self._first_token = self._first_token or time.perf_counter()
            self._ids += ids
        else:
            self._prompt_ids = ids
            text = reply_text(self.tokenizer, ids[-32:], hidden_ids(self.tokenizer))
            self._opened_thinking = text.rstrip().endswith(THINK_OPEN)
            if self._opened_thinking and self._opens_tag:
                self._write(f"{THINK_OPEN}\n")
        self._streamer.put(value)

    def end(self) -> None:
        """Print what was held back and end the line; nothing if generation never began."""
        if self._prompt_ids:
            self._streamer.end()
            self._write("\n")

    @property
    def answer(self) -> str:
        """What has come so far behind the thought; also after an interruption."""
        text = reply_text(self.tokenizer, self._ids, hidden_ids(self.tokenizer))
        return split_thinking(text, self._opened_thinking)[1].strip()

    def statistics(self) -> str:
        """Counts, and the decode speed without the first token, which waits for the prompt."""
        text = f"{len(self._prompt_ids)} prompt tokens, {len(self._ids)} new"
        if len(self._ids) < 2:
            return text
        seconds = time.perf_counter() - self._first_token
        return f"{text}, {(len(self._ids) - 1) / seconds:.1f} tokens/s"

    def _write(self, text: str) -> None:
        # The model's words must not control the terminal; the two codes are the streamer's own.
        if self.is_terminal and text not in (DIM, PLAIN):
            text = without_controls(text)
        self.stream.write(text)
        self.stream.flush()


def prefill_bar(quiet: bool) -> Callable[[int, int], None] | None:
    """``progress(done_tokens, total_tokens)`` that draws a bar for long prompts, on terminals."""
    if quiet or not is_terminal(sys.stderr):
        return None
    bar: Any = None

    def progress(done: int, total: int) -> None:
        nonlocal bar
        if total < PREFILL_BAR_TOKENS:
            return
        if bar is None:
            from tqdm import tqdm

            bar = tqdm(
                total=total, desc="reading the prompt", unit="token", leave=False, mininterval=0
            )
        bar.update(done - bar.n)
        if done >= total:
            bar.close()
            bar = None

    return progress
