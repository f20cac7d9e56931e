"""Printing a reply while it is generated."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Literal

from exafuse.text.loading import tokenizer_of
from exafuse.text.messages import THINK_CLOSE, THINK_OPEN
from exafuse.text.reply import hidden_ids, reply_text

ThinkingDisplay = Literal["show", "dim", "hide"]

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
_REPLACEMENT = "\ufffd"  # what a character decodes to while some of its bytes are missing


class ReplyStreamer:
    """A streamer for ``generate``: writes the text of one reply as soon as it is certain.

    A character whose bytes are spread over several tokens (Korean, emoji) is written when its last
    token has come. ``tokenizer``: of ``load_processor``, a processor as well. ``write`` takes text
    (default: standard output, flushed). ``thinking``: the
    thought as it is, dimmed by terminal codes, or left out; its tags are written only by "show".
    """

    def __init__(
        self,
        tokenizer: Any,
        write: Callable[[str], Any] | None = None,
        *,
        thinking: ThinkingDisplay = "show",
    ) -> None:
        if thinking not in ("show", "dim", "hide"):
            raise ValueError(f"thinking: expected 'show', 'dim' or 'hide', got {thinking!r}")
        self._tokenizer = tokenizer = tokenizer_of(tokenizer)
        self._write = write or _write_to_stdout
        self._thinking = thinking
        self._hidden = hidden_ids(tokenizer)
        self._begin()

    def _begin(self) -> None:
        self._written: list[int] = []  # the ids of the last piece that was passed on
        self._ids: list[int] = []  # the ids behind them
        self._pending = ""  # may be the beginning of a tag
        self._prompt_seen = False
        self._in_thought = False
        self._answer_begun = False
        self._skip_blank = False  # behind a hidden thought

    def put(self, value: Any) -> None:
        """Takes ids, int64 tensor: the prompt ``[1, seq]`` first, then ``[1]`` a step."""
        if value.ndim > 1 and value.shape[0] > 1:
            raise ValueError(f"ReplyStreamer: expected one conversation, got {value.shape[0]} rows")
        ids = value.reshape(-1).tolist()
        if not self._prompt_seen:
            self._prompt_seen = True
            tail = reply_text(self._tokenizer, ids[-32:], self._hidden)
            if tail.rstrip().endswith(THINK_OPEN):
                self._enter_thought("")
            return
        self._ids += [index for index in ids if index not in self._hidden]
        text = self._new_text()
        if not text.endswith(_REPLACEMENT):
            self._advance(text)

    def end(self) -> None:
        """Writes what is left and gets ready for the next reply."""
        self._advance(self._new_text())
        self._emit(self._pending)
        if self._in_thought and self._thinking == "dim":
            self._write(_PLAIN)
        self._begin()

    def _new_text(self) -> str:
        """The text of ``self._ids``.

        It is decoded behind the last piece, because decoders treat the beginning of a text apart
        (a blank is dropped there). That piece begins and ends with whole characters: a cut inside
        one would leave bytes that are no text, and decoders with a byte fallback then give up the
        whole run of bytes, the next characters included.
        """
        before = reply_text(self._tokenizer, self._written, ())
        text = reply_text(self._tokenizer, self._written + self._ids, ())
        if text.startswith(before):
            return text[len(before) :]
        # Bytes that are no text (yet) spoiled the run they share with the last piece.
        return reply_text(self._tokenizer, self._ids, ())

    def _advance(self, new: str) -> None:
        if not new:
            return
        self._written, self._ids = self._ids, []
        self._pending += new
        if self._thinking != "show":
            self._switch()
        keep = 0 if self._thinking == "show" else self._tag_beginning()
        cut = len(self._pending) - keep
        self._emit(self._pending[:cut])
        self._pending = self._pending[cut:]

    def _switch(self) -> None:
        """Enters or leaves the thought if its tag is complete."""
        text = self._pending.lstrip()
        if not self._in_thought and not self._answer_begun and text.startswith(THINK_OPEN):
            self._enter_thought(text.removeprefix(THINK_OPEN))
        if self._in_thought and THINK_CLOSE in self._pending:
            thought, _, rest = self._pending.partition(THINK_CLOSE)
            self._emit(thought)
            self._in_thought, self._answer_begun = False, True
            if self._thinking == "dim":
                self._write(_PLAIN)
            self._pending = rest
            self._skip_blank = self._thinking == "hide"

    def _enter_thought(self, pending: str) -> None:
        self._in_thought = True
        self._pending = pending
        if self._thinking == "dim":
            self._write(_DIM)

    def _tag_beginning(self) -> int:
        """How many characters at the end of the pending text may belong to a tag."""
        if self._answer_begun:
            return 0
        if not self._in_thought:
            text = self._pending.lstrip()
            return len(self._pending) if THINK_OPEN.startswith(text) else 0
        lengths = range(min(len(THINK_CLOSE) - 1, len(self._pending)), 0, -1)
        return next((k for k in lengths if THINK_CLOSE.startswith(self._pending[-k:])), 0)

    def _emit(self, text: str) -> None:
        if self._skip_blank:
            text = text.lstrip()
        if not text:
            return
        self._skip_blank = False
        if not self._in_thought:
            self._answer_begun = True
        if not (self._in_thought and self._thinking == "hide"):
            self._write(text)


def _write_to_stdout(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
