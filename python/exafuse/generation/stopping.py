"""Stop flags and tokens on their way from the device to the host, read one step late.

Waiting for "are all rows done?" after every token would leave the device idle while the host queues
the next step. So each step's tokens and flags are copied asynchronously, and the host looks at them
after the following step has been queued; a step that turns out to be surplus is cut by the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from exafuse.strict_json import shorten

StoppingCriterion = Callable[[Tensor, tuple[Tensor, ...] | None], Any]
"""Ids int64 ``[batch, length]``, the scores of all steps or None -> bool or bool ``[batch]``."""


def verdict(result: Any, batch_size: int, device: torch.device) -> Tensor:
    """A criterion's answer as bool ``[batch]``; TypeError for what is none."""
    if isinstance(result, bool):
        return torch.full((batch_size,), result, device=device)
    if not isinstance(result, Tensor) or result.numel() not in (1, batch_size):
        raise TypeError(
            f"stopping_criteria: expected bool or bool [{batch_size}], got {shorten(result)}"
        )
    return result.to(device=device, dtype=torch.bool).reshape(-1).expand(batch_size)


class Streamer(Protocol):
    """What transformers' streamers offer; any object with these two methods will do."""

    def put(self, value: Tensor) -> Any:
        """Take int64 ids on the CPU: the prompt ``[batch, seq]`` first, then ``[batch]`` a step."""

    def end(self) -> Any:
        """Generation is over, also when it ended with an exception."""


CUT_CHARACTER = "\ufffd"


class StopStrings:
    """Which rows have just completed a stop string, judged on decoded text.

    As transformers' StopStringCriteria does: a string counts when it ends within the text of the
    newest token, and may have begun in the prompt.
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str], prompt_ids: np.ndarray):
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor holds one
        if not hasattr(tokenizer, "decode"):
            raise TypeError(f"tokenizer: expected one with decode, got {type(tokenizer).__name__}")
        self._tokenizer = tokenizer
        self._strings = tuple(strings)
        # A token is at least a byte, so no match reaches back further; one more token in front
        # takes what decoders do to the first word of a text, three more the start of a character.
        self._window = max(len(text.encode()) for text in self._strings) + 1
        self._tails = [row[-self._window - 3 :].tolist() for row in prompt_ids]

    def completed_by(self, next_ids: np.ndarray) -> np.ndarray:
        """Bool ``[batch]`` for the ids int64 ``[batch]`` that the rows got next."""
        return np.array([self.completes(row, i) for row, i in enumerate(next_ids.tolist())])

    def completes(self, row: int, next_id: int) -> bool:
        """Whether the id that a row got next completes a string."""
        self._tails[row] = [*self._tails[row], next_id][-self._window - 3 :]
        text, old = self._newest(self._tails[row])
        return any(s in text and text.rfind(s) + len(s) > old for s in self._strings)

    def _newest(self, ids: list[int]) -> tuple[str, int]:
        """The text of the last ids, and how much of it was there before the newest one.

        A character may be spread over up to four tokens, and some decoders spoil a whole run of
        bytes when it starts or ends within one: both ends are moved to where the text is whole.
        """
        start = max(len(ids) - self._window, 0)
        text = self._decode(ids[start:])
        for earlier in range(start - 1, max(start - 4, -1), -1):
            if not text.startswith(CUT_CHARACTER):
                break
            text, start = self._decode(ids[earlier:]), earlier
        old = 0
        for dropped in range(4):
            old_text = self._decode(ids[start : len(ids) - 1 - dropped])
            old = max(old, _common_prefix_length(old_text, text))
            if not old_text.endswith(CUT_CHARACTER):
                break
        return text, old

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text


def _common_prefix_length(a: str, b: str) -> int:
    differing = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differing, min(len(a), len(b)))


class _Slot:
    """Host memory for one step, and the event that says the copy into it has landed."""

    def __init__(self, batch_size: int, device: torch.device):
        on_gpu = device.type == "cuda"
        self.memory = torch.zeros(3, batch_size, dtype=torch.int64, pin_memory=on_gpu)
        self.view: np.ndarray = self.memory.numpy()  # reading it involves no tensor operation
        self.landed = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]


class StopCheck:
    """The host's side of a generation: knows when to stop, and feeds the streamer.

    After step t the loop calls ``send``; when step t + 1 is queued and sent too, ``next_report``
    looks at step t. Two slots suffice for that.
    """

    def __init__(
        self,
        batch_size: int,
        device: torch.device,
        pad_token_id: int | None,
        streamer: Streamer | None = None,
        stop_strings: StopStrings | None = None,
    ):
        self._device = device
        self._slots = (_Slot(batch_size, device), _Slot(batch_size, device))
        self._sent = self._read = 0
        self._pad_token_id = pad_token_id
        self._streamer = streamer
        self._stop_strings = stop_strings
        self._open = np.ones(batch_size, dtype=bool)  # rows no stop string has ended
        self.ended_after: dict[int, int] = {}
        """New tokens of the rows that a stop string ended, by row: what follows is to be padded."""

    def send(self, next_ids: Tensor, unfinished: Tensor, unusable: Tensor) -> None:
        """Start copying a step's ids int64 ``[batch]`` and its flags bool ``[batch]``."""
        slot = self._slots[self._sent % 2]
        flags = (unfinished.long(), unusable.long())
        slot.memory.copy_(torch.stack((next_ids, *flags)), non_blocking=True)
        if slot.landed is not None:
            slot.landed.record(torch.cuda.current_stream(self._device))
        self._sent += 1

    def next_report(self) -> bool:
        """Read the oldest unread step: stream its ids, and say whether any row goes on.

        RuntimeError if a running row had no finite score to choose by.
        """
        slot = self._slots[self._read % 2]
        if slot.landed is not None:
            slot.landed.synchronize()
        self._read += 1
        next_ids = slot.view[0].copy()
        unfinished, unusable = slot.view[1] != 0, slot.view[2] != 0
        if (unusable & self._open).any():
            rows = np.flatnonzero(unusable & self._open).tolist()
            raise RuntimeError(
                f"scores of rows {rows} at new token {self._read}: expected finite ones, got NaN "
                "or nothing above -inf; look at the dtype (float16 overflows) and at the processors"
            )
        if self._pad_token_id is not None:
            next_ids[~self._open] = self._pad_token_id
        if self._streamer is not None:
            self._streamer.put(torch.from_numpy(next_ids))
        if self._stop_strings is not None:
            ended = self._stop_strings.completed_by(next_ids) & self._open
            self._open &= ~ended
            for row in np.flatnonzero(ended).tolist():
                self.ended_after[row] = self._read
        return bool((unfinished & self._open).any())
