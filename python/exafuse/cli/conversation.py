"""The loop behind ``exafuse chat``: a conversation typed at a terminal."""

from __future__ import annotations

import contextlib
import sys
from typing import Any, TextIO

from exafuse.cli.flags import in_flags
from exafuse.cli.terminal import (
    AnswerPrinter,
    cut_off,
    is_terminal,
    prefill_bar,
    without_controls,
)
from exafuse.errors import ExafuseError

HELP = """\
/reset         forget the conversation (the system message stays)
/system TEXT   set the system message and start over; without TEXT, remove it
/image FILE    show an image together with the next message (for models that see)
/video FILE    likewise a video
/exit          leave (so does Ctrl-D)
/help          this list
Ctrl-C stops an answer; what was written of it stays in the conversation."""


class Conversation:
    """Messages so far, and the commands that change them.

    Args:
        model, processor: what ``exafuse.text.chat`` takes.
        system: system message, or None.
        thinking, preset: as in ``exafuse.text.chat``.
        options: keyword arguments of ``generate``.
        frames: fps and num_frames of the parts that show a video.
        quiet: no progress bar, no statistics.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        system: str | None = None,
        thinking: bool | None = None,
        preset: str | None = None,
        options: dict[str, Any] | None = None,
        frames: dict[str, Any] | None = None,
        quiet: bool = False,
    ) -> None:
        self.model, self.processor = model, processor
        self.thinking, self.preset = thinking, preset
        self.options = options or {}
        self.frames = frames or {}
        self.quiet = quiet
        self.system = system
        self.messages: list[dict[str, Any]] = []
        self.shown: list[dict[str, Any]] = []  # parts that go with the next message
        self.reset()

    def reset(self) -> None:
        self.shown = []
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
        elif word in ("/image", "/video"):
            self.show(word[1:], rest.strip())
        elif word.startswith("/"):
            print(f"{word}: no such command. Known are:\n{HELP}")
        elif line:
            self.answer(line)
        return True

    def show(self, kind: str, name: str) -> None:
        """Take an image or a video file along with the next message; say so, or what is wrong."""
        from exafuse.media.images import read_image
        from exafuse.media.processor import Processor
        from exafuse.media.videos import read_header

        # A file dragged into a terminal comes in quotes.
        name = name[1:-1] if name[:1] in ("'", '"') and name[-1:] == name[:1] else name
        try:
            if not isinstance(self.processor, Processor):
                raise ValueError(f"/{kind}: this checkpoint reads text only")
            if not name:
                raise ValueError(f"/{kind}: expected the name of a file")
            if kind == "image":  # kept decoded: the file may be gone at a later turn
                image = read_image(name, name)
                part, size = {"type": kind, kind: image}, f"{image.width} x {image.height}"
            else:
                header = read_header(name, name)
                part = {"type": kind, kind: name, **self.frames}
                size = f"{header.width} x {header.height}, {header.num_frames} frames"
        except (ExafuseError, ValueError, ImportError, MemoryError) as error:
            self._complain(error)
            return
        self.shown.append(part)
        print(f"{name}, {size}, goes with the next message")

    def _complain(self, error: Exception) -> None:
        given = [*self.options, "thinking", "preset", *self.frames]
        text = without_controls(in_flags(str(error), given))
        print(f"exafuse: error: {text}", file=sys.stderr)

    def answer(self, text: str) -> None:
        """Send one message and print the answer. A failure or Ctrl-C before the first word of it
        leaves the conversation as it was, pictures for the next message included."""
        from exafuse.text.chat import chat

        content: Any = [*self.shown, {"type": "text", "text": text}] if self.shown else text
        self.messages.append({"role": "user", "content": content})
        printer = AnswerPrinter(self.processor)
        reply = None
        try:
            reply = chat(
                self.model,
                self.processor,
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
        except (ExafuseError, ValueError, RuntimeError, MemoryError, ImportError) as error:
            self._complain(error)
        # The thought is not kept: templates leave earlier ones out of the conversation.
        if printer.answer:
            self.messages.append({"role": "assistant", "content": printer.answer})
            self.shown = []
        else:
            self.messages.pop()
        by_default = "max_new_tokens" not in self.options
        if reply is not None and not reply.finished and by_default and not self.quiet:
            print(cut_off(len(reply.ids)), file=sys.stderr)
        if not self.quiet and is_terminal(sys.stderr):
            print(f"[{printer.statistics()}]", file=sys.stderr)
