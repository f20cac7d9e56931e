"""The loop behind ``exafuse chat``: a conversation typed at a terminal."""

from __future__ import annotations

import contextlib
import sys
from typing import Any, TextIO

from exafuse.cli.terminal import AnswerPrinter, is_terminal, prefill_bar
from exafuse.errors import ExafuseError

HELP = """\
/reset         forget the conversation (the system message stays)
/system TEXT   set the system message and start over; without TEXT, remove it
/exit          leave (so does Ctrl-D)
/help          this list
Ctrl-C stops an answer; what was written of it stays in the conversation."""


class Conversation:
    """Messages so far, and the commands that change them.

    Args:
        model, tokenizer: what ``exafuse.text.chat`` takes.
        system: system message, or None.
        thinking, preset: as in ``exafuse.text.chat``.
        options: keyword arguments of ``generate``.
        quiet: no progress bar, no statistics.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        system: str | None = None,
        thinking: bool | None = None,
        preset: str | None = None,
        options: dict[str, Any] | None = None,
        quiet: bool = False,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.thinking, self.preset = thinking, preset
        self.options = options or {}
        self.quiet = quiet
        self.system = system
        self.messages: list[dict[str, Any]] = []
        self.reset()

    def reset(self) -> None:
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def run(self, source: TextIO | None = None) -> None:
        """Read lines until /exit or the end of input; each is a command or a message."""
        source = sys.stdin if source is None else source
        asks = is_terminal(source) and not self.quiet
        if asks:
            with contextlib.suppress(ImportError):  # only for editing and recalling lines
                import readline  # noqa: F401
            print("/help lists the commands, /exit leaves.")
        while True:
            try:
                line = input("> ") if is_terminal(source) else source.readline()
            except EOFError:
                return
            except KeyboardInterrupt:
                print("\n(/exit leaves)")
                continue
            if not line and not is_terminal(source):
                return
            if not self.handle(line.strip()):
                return

    def handle(self, line: str) -> bool:
        """Act on one line; False = leave."""
        word, _, rest = line.partition(" ")
        if word == "/exit":
            return False
        if word == "/help":
            print(HELP)
        elif word == "/reset":
            self.reset()
        elif word == "/system":
            self.system = rest.strip() or None
            self.reset()
        elif word.startswith("/"):
            print(f"{word}: no such command. Known are:\n{HELP}")
        elif line:
            self.answer(line)
        return True

    def answer(self, text: str) -> None:
        """Send one message and print the answer. A failure or Ctrl-C before the first word of it
        leaves the conversation as it was."""
        from exafuse.text.chat import chat

        self.messages.append({"role": "user", "content": text})
        printer = AnswerPrinter(self.tokenizer)
        try:
            chat(
                self.model,
                self.tokenizer,
                self.messages,
                thinking=self.thinking,
                preset=self.preset,
                streamer=printer,
                progress=prefill_bar(self.quiet),
                **self.options,
            )
        except KeyboardInterrupt:
            print("(stopped)")
        # A conversation that got too long, a cache that does not fit, scores that are not finite:
        # none of them is a reason to lose the conversation so far.
        except (ExafuseError, ValueError, RuntimeError, MemoryError) as error:
            print(f"exafuse: error: {error}", file=sys.stderr)
        # The thought is not kept: templates leave earlier ones out of the conversation.
        if printer.answer:
            self.messages.append({"role": "assistant", "content": printer.answer})
        else:
            self.messages.pop()
        if not self.quiet and is_terminal(sys.stderr):
            print(f"[{printer.statistics()}]", file=sys.stderr)
